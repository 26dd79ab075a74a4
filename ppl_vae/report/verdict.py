"""What a lineage says, in sentences: who explains new data best, by how much, and how sure."""

import math
from collections.abc import Iterator, Sequence

from scipy.stats import t as student_t

from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE
from ppl_vae.lineage.metrics import Row
from ppl_vae.lineage.run import Lineage
from ppl_vae.report.table import number

CONFIDENCE = 0.95
"""A difference is called one if Student's interval of this confidence does not hold zero."""
FEW_ROWS = 30
"""Errors over fewer held-out rows than these are called rough."""
REACHED = 0.005
"""A stage so close to the exact optimum, in nats per datum, is said to reach it."""
OTHER_OPTIMUM = 1e-6
"""A reference so far above the one at first, in nats per datum, is another optimum: EM's fits end
closer to theirs than that."""


def verdict(lineage: Lineage) -> tuple[str, ...]:
    """The sentences that a reader wants first, most important first."""
    parts = (_held_out(lineage), _reference(lineage), _exact(lineage), _theory(lineage.rows))
    parts += (_hidden(lineage.rows), _unconverged(lineage.rows))
    return tuple(sentence for part in parts for sentence in part)


def _held_out(lineage: Lineage) -> Iterator[str]:
    scored = [row for row in lineage.rows if row.held_out is not None]
    if not scored:
        return
    linear = [row for row in scored if not math.isnan(row.shortfall)]
    others = [row for row in scored if math.isnan(row.shortfall)]
    best = max(others, key=_mean, default=None)
    if linear and best is not None:
        yield _against(best, min(linear, key=lambda row: row.shortfall))
    else:
        top = max(scored, key=_mean)
        yield f"On held-out rows {top.stage} does best: {_value(top)}."
    unsure = [row.stage for row in scored if row.test_log_p.reliable < FEW_RELIABLE]
    if unsure:
        yield (
            f"Held-out log p of {_listed(unsure)} is no more than a lower bound: fewer than "
            f"{FEW_RELIABLE:.0%} of the estimates are reliable."
        )
    num_rows = lineage.about["num_scored"]
    if num_rows < FEW_ROWS:
        yield f"There are only {num_rows} held-out rows, so all errors over them are rough."


def _mean(row: Row) -> float:
    return row.test_log_p.value


def _against(other: Row, ppca: Row) -> str:
    assert other.held_out is not None and ppca.held_out is not None
    differences = other.held_out.value - ppca.held_out.value
    mean = float(differences.mean())
    error = float(differences.std()) / math.sqrt(len(differences))
    reach = error * float(student_t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    is_bound = other.test_log_p.reliable < FEW_RELIABLE
    if mean > reach:
        found = f"On held-out rows {other.stage} does better than PPCA"
    elif mean < -reach and not is_bound:
        found = f"On held-out rows PPCA does better than {other.stage}"
    else:
        found = f"On held-out rows {other.stage} and PPCA cannot be told apart"
    return (
        f"{found}: {_value(other)} against {_value(ppca)}; row by row the difference is "
        f"{number(mean, 2)} ± {number(error, 2)}."
    )


def _value(row: Row) -> str:
    value = row.test_log_p
    sign = (
        "" if value.how == "exact" else "at least " if value.reliable < FEW_RELIABLE else "about "
    )
    how = "exact" if value.how == "exact" else f"{math.floor(100 * value.reliable)} % reliable"
    error = 0.0 if value.error is None else value.error
    return f"{sign}{number(value.value, 2)} ± {number(error, 2)} nats per datum ({how})"


def _reference(lineage: Lineage) -> Iterator[str]:
    if lineage.reference_gain < OTHER_OPTIMUM:
        return
    first = "PX-EM's" if lineage.about["num_missing"] else "the closed form's"
    yield (
        f"The reference is {lineage.reference}'s end, {lineage.reference_gain:.2g} nats per datum "
        f"above {first}, which therefore is not the optimum."
    )


def _theory(rows: Sequence[Row]) -> Iterator[str]:
    known = [row for row in rows if not math.isnan(row.excess)]
    if not known:
        return
    beyond = [row for row in known if row.excess >= REACHED]
    costly = [row for row in known if row.loss - row.excess >= REACHED]
    if costly:
        listed = _listed([f"{number(row.loss - row.excess, 2)} for {row.stage}" for row in costly])
        yield f"Theory prices what q is restricted to, in nats per datum at the optimum: {listed}."
    if beyond:
        listed = _listed([f"{row.stage} ({number(row.excess, 2)})" for row in beyond])
        yield f"Beyond these prices, for want of training, these lose nats per datum: {listed}."


def _unconverged(rows: Sequence[Row]) -> Iterator[str]:
    unmet = [row for row in rows if not row.convergence.met]
    if unmet:
        listed = _listed([f"{row.stage} ({row.convergence})" for row in unmet])
        yield f"Not trained until their tolerance was met: {listed}."


def _exact(lineage: Lineage) -> Iterator[str]:
    linear = [row for row in lineage.rows if not math.isnan(row.shortfall)]
    reached = [row.stage for row in linear if row.shortfall < REACHED]
    short = [row for row in linear if row.shortfall >= REACHED]
    if reached:
        found = "exact optimum"
        if not lineage.exact_optimum:
            found = f"best known optimum, {lineage.about['reference']},"
        yield f"PPCA's {found} is reached by {_listed(reached)}."
    if short:
        listed = _listed([f"{row.stage} ({number(row.shortfall, 2)})" for row in short])
        it = "it" if reached else "PPCA's optimum"
        yield f"Short of {it}, in nats per datum of log p on the training rows: {listed}."


def _hidden(rows: Sequence[Row]) -> Iterator[str]:
    hiding = [row for row in rows if row.approximation + row.amortization >= REACHED]
    if not hiding:
        return
    most = max(hiding, key=lambda row: row.approximation + row.amortization)
    total = most.approximation + most.amortization
    yield (
        f"The ELBO hides most at {most.stage}: it is {number(total, 2)} nats per datum below log "
        f"p, {number(most.approximation, 2)} for the family of q and "
        f"{number(most.amortization, 2)} for how q is found."
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
