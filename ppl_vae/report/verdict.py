"""The main findings of a lineage, in sentences."""

import math
from collections.abc import Iterator, Sequence

from scipy.stats import t as student_t

from ppl_vae.core.stats import mean_and_error
from ppl_vae.core.text import counted
from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE
from ppl_vae.lineage.estimates import PREDICTIVE, MeanEstimate
from ppl_vae.lineage.metrics import StageMetrics
from ppl_vae.lineage.result import Lineage
from ppl_vae.lineage.table import format_number, format_percent

CONFIDENCE = 0.95
"""A difference is significant if Student's interval with this confidence excludes zero."""
FEW_ROWS = 30
"""With fewer held-out rows than this, standard errors over them are called imprecise."""
NEGLIGIBLE = 0.005
"""A stage within this distance of the exact optimum, in nats per datum, is said to attain it."""
DISTINCT_OPTIMUM = 1e-6
"""A reference that exceeds the initial one by this, in nats per datum, is a different optimum: the
fits of EM end closer to theirs."""


def verdict(lineage: Lineage) -> tuple[str, ...]:
    """The main findings, the most important first."""
    rows = lineage.rows
    parts = (
        _held_out(lineage),
        _posterior(lineage),
        _reference(lineage),
        _optimum(lineage),
        _theory(rows),
    )
    parts += (_largest_gap(rows), _not_converged(rows))
    return tuple(sentence for part in parts for sentence in part)


def _held_out(lineage: Lineage) -> Iterator[str]:
    scored = [row for row in lineage.rows if row.held_out is not None]
    if not scored:
        return
    linear = [row for row in scored if not math.isnan(row.shortfall)]
    others = [row for row in scored if math.isnan(row.shortfall) and row.posterior is None]
    best = max(others, key=_test_log_p, default=None)
    if linear and best is not None:
        yield _compare(best, min(linear, key=lambda row: row.shortfall))
    else:
        top = max(scored, key=_test_log_p)
        yield f"On held-out rows {top.stage} has the highest log p: {_format_value(top)}."
    unreliable = [row.stage for row in scored if row.test_log_p.is_lower_bound]
    if unreliable:
        yield (
            f"Held-out log p of {_join(unreliable)} is only a lower bound: fewer than "
            f"{FEW_RELIABLE:.0%} of the estimates are reliable."
        )
    num_rows = lineage.about["num_scored"]
    if num_rows < FEW_ROWS:
        yield (
            f"Standard errors are over {counted(num_rows, 'held-out row')} only, and imprecise."
        )


def _test_log_p(row: StageMetrics) -> float:
    return row.test_log_p.value


def _compare(other: StageMetrics, ppca: StageMetrics) -> str:
    assert other.held_out is not None and ppca.held_out is not None
    differences = other.held_out.value - ppca.held_out.value
    mean, error = mean_and_error(differences)
    half_width = error * _quantile(len(differences))
    is_bound = other.test_log_p.is_lower_bound
    if mean > half_width:
        finding = f"On held-out rows {other.stage} has a higher log p than PPCA"
    elif mean < -half_width and not is_bound:
        finding = f"On held-out rows PPCA has a higher log p than {other.stage}"
    elif mean < -half_width:
        finding = (
            f"On held-out rows it is not known whether {other.stage} or PPCA has the higher "
            f"log p, since that of {other.stage} is only a lower bound"
        )
    else:
        finding = (
            f"On held-out rows {other.stage} and PPCA do not differ significantly, since the "
            f"{CONFIDENCE:.0%} interval of the paired difference contains zero"
        )
    return (
        f"{finding}: {_format_value(other)} against {_format_value(ppca)}; the paired difference "
        f"is {format_number(mean, 2)} ± {format_number(error, 2)}."
    )


def _format_value(row: StageMetrics) -> str:
    value = row.test_log_p
    sign = "at least " if value.is_lower_bound else "about "
    remark = f"{format_percent(value.share_reliable)} reliable"
    if value.method == PREDICTIVE:
        remark = "averaged over draws of the parameters"
    if value.method == "exact":
        sign, remark = "", "exact"
    error = 0.0 if value.error is None else value.error
    mean = format_number(value.value, 2)
    return f"{sign}{mean} ± {format_number(error, 2)} nats per datum ({remark})"


def _posterior(lineage: Lineage) -> Iterator[str]:
    for row in lineage.rows:
        if row.posterior is None:
            continue
        gain, over_mean = row.posterior.over_optimum, row.posterior.over_mean
        if gain.error is not None:
            yield (
                f"Averaging over the posterior of the parameters ({row.stage}) "
                f"{_effect(gain, row)} relative to PPCA at the maximum of the likelihood: the "
                f"paired difference is {_with_error(gain)} nats per datum, and "
                f"{_with_error(over_mean)} relative to the posterior mean."
            )
        if row.posterior.num_active is not None:
            number, total = row.posterior.num_active, lineage.about["latent_dim"]
            columns = counted(total, "column")
            yield f"Under the prior of {row.stage} {number} of {columns} of W are active."


def _effect(gain: MeanEstimate, row: StageMetrics) -> str:
    assert row.held_out is not None and gain.error is not None
    half_width = gain.error * _quantile(len(row.held_out.value))
    if gain.value > half_width:
        return "raises held-out log p"
    if gain.value < -half_width:
        return "lowers held-out log p"
    return "does not change held-out log p significantly"


def _with_error(gain: MeanEstimate) -> str:
    error = 0.0 if gain.error is None else gain.error
    return f"{format_number(gain.value, 3)} ± {format_number(error, 3)}"


def _quantile(num_rows: int) -> float:
    # The half-width of Student's interval, in standard errors.
    return float(student_t.ppf((1 + CONFIDENCE) / 2, num_rows - 1))


def _reference(lineage: Lineage) -> Iterator[str]:
    if lineage.reference_gain < DISTINCT_OPTIMUM:
        return
    initial = "PX-EM" if lineage.about["num_missing"] else "the closed form"
    yield (
        f"The reference is the result of {lineage.reference}, which exceeds that of {initial} by "
        f"{lineage.reference_gain:.2g} nats per datum: {initial} did not attain the optimum."
    )


def _optimum(lineage: Lineage) -> Iterator[str]:
    linear = [row for row in lineage.rows if not math.isnan(row.shortfall)]
    attained = [row.stage for row in linear if row.shortfall < NEGLIGIBLE]
    short = [row for row in linear if row.shortfall >= NEGLIGIBLE]
    if attained:
        optimum = "exact optimum"
        if not lineage.exact_optimum:
            optimum = f"best known optimum, {lineage.about['reference']},"
        yield f"PPCA's {optimum} is attained by {_join(attained)}."
    if short:
        values = _join([f"{row.stage} ({format_number(row.shortfall, 2)})" for row in short])
        yield f"Shortfall of log p on the training rows, in nats per datum: {values}."


def _theory(rows: Sequence[StageMetrics]) -> Iterator[str]:
    known = [row for row in rows if not math.isnan(row.excess)]
    costly = [row for row in known if row.loss - row.excess >= NEGLIGIBLE]
    exceeding = [row for row in known if row.excess >= NEGLIGIBLE]
    if costly:
        values = [f"{format_number(row.loss - row.excess, 2)} for {row.stage}" for row in costly]
        yield (
            "Expected loss due to the restriction of q, in nats per datum at the optimum: "
            f"{_join(values)}."
        )
    if exceeding:
        values = _join([f"{row.stage} ({format_number(row.excess, 2)})" for row in exceeding])
        yield f"Loss above the expected one, due to incomplete convergence: {values}."


def _largest_gap(rows: Sequence[StageMetrics]) -> Iterator[str]:
    with_gap = [row for row in rows if row.approximation + row.amortization >= NEGLIGIBLE]
    if not with_gap:
        return
    largest = max(with_gap, key=lambda row: row.approximation + row.amortization)
    total = largest.approximation + largest.amortization
    yield (
        f"The gap between log p and the ELBO is largest at {largest.stage}: "
        f"{format_number(total, 2)} nats per datum, of which "
        f"{format_number(largest.approximation, 2)} is the approximation gap and "
        f"{format_number(largest.amortization, 2)} the amortization gap."
    )


def _not_converged(rows: Sequence[StageMetrics]) -> Iterator[str]:
    unmet = [row for row in rows if not row.convergence.met]
    if unmet:
        reasons = _join([f"{row.stage} ({row.convergence})" for row in unmet])
        yield f"These stages did not meet their tolerance: {reasons}."


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
