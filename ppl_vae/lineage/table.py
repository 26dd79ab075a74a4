"""The table of a lineage: its columns, the text of their cells, and a legend."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppl_vae.core.text_table import render, render_html
from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE
from ppl_vae.lineage.estimates import PREDICTIVE, MeanEstimate
from ppl_vae.lineage.metrics import StageMetrics
from ppl_vae.lineage.stages import BAYESIAN, POINT, STAGES


@dataclass(frozen=True)
class Column:
    """A column of the lineage's table.

    Attributes:
        title: its header.
        cell: formats the cell of a row.
        numeric: whether the cells are aligned on the right.
        essential: whether the column is kept where space is scarce.
        bayesian: whether the column is shown only if a stage is Bayesian.
    """

    title: str
    cell: Callable[[StageMetrics], str]
    numeric: bool = True
    essential: bool = True
    bayesian: bool = False


def format_number(value: float, digits: int) -> str:
    """A number with this many decimals, without minus zero; "-" for NaN."""
    if math.isnan(value):
        return "-"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def format_estimate(value: MeanEstimate) -> str:
    """A mean log-likelihood and its standard error; ~ marks estimates, ≥ lower bounds."""
    if math.isnan(value.value):
        return "-"
    bound = "≥" if value.is_lower_bound else "~"
    sign = "" if value.method == "exact" else bound
    error = "" if value.error is None else f"±{value.error:.2f}"
    return f"{sign}{format_number(value.value, 2)}{error}"


def format_reliability(value: MeanEstimate) -> str:
    """``exact``, ``average`` over draws, or the share of data whose estimate is reliable."""
    if math.isnan(value.value):
        return ""
    if value.method == PREDICTIVE:
        return "average"
    return "exact" if value.method == "exact" else format_percent(value.share_reliable)


def format_percent(share: float) -> str:
    """A share in whole per cent, rounded down, so that 100 % means all."""
    return f"{math.floor(100 * share)} %"


def _gain(row: StageMetrics, name: str) -> str:
    # All gains are Monte Carlo estimates: none is marked as one.
    gain = None if row.posterior is None else getattr(row.posterior, name)
    if gain is None or math.isnan(gain.value):
        return "-"
    error = "" if gain.error is None else f"±{gain.error:.3f}"
    return f"{format_number(gain.value, 3)}{error}"


def is_compiled(row: StageMetrics) -> bool:
    """Whether steps of the stage's fit were compiled."""
    return row.fit.execution.startswith("compiled")


def _active(row: StageMetrics) -> str:
    number = None if row.posterior is None else row.posterior.num_active
    return "-" if number is None else str(number)


COLUMNS = (
    Column("stage", lambda row: row.stage, numeric=False),
    Column("model", lambda row: row.model, numeric=False, essential=False),
    Column("q(z|x)", lambda row: row.q, numeric=False, essential=False),
    Column("algorithm", lambda row: row.algorithm, numeric=False, essential=False),
    Column("ELBO", lambda row: format_number(row.elbo, 2)),
    Column("log p", lambda row: format_estimate(row.log_p)),
    Column("", lambda row: format_reliability(row.log_p)),
    Column("appr.", lambda row: format_number(row.approximation, 3)),
    Column("amort.", lambda row: format_number(row.amortization, 3)),
    Column("loss", lambda row: format_number(row.loss, 2), essential=False),
    Column("theory", lambda row: format_number(row.loss - row.excess, 2), essential=False),
    Column("held out", lambda row: format_estimate(row.test_log_p)),
    Column("", lambda row: format_reliability(row.test_log_p)),
    Column("over ML", lambda row: _gain(row, "over_optimum"), bayesian=True),
    Column("over mean", lambda row: _gain(row, "over_mean"), essential=False, bayesian=True),
    Column("axes", lambda row: _active(row), essential=False, bayesian=True),
    Column("sigma", lambda row: format_number(row.noise_scale, 3), essential=False),
    Column("angle", lambda row: format_number(row.angle, 1), essential=False),
    Column("steps", lambda row: str(row.fit.steps), essential=False),
    Column("conv.", lambda row: "yes" if row.convergence.met else "no", essential=False),
    Column("s", lambda row: f"{format_number(row.fit.seconds, 1)}{'*' * is_compiled(row)}"),
)
NUM_TEXT_COLUMNS = sum(not column.numeric for column in COLUMNS)


def shown_columns(rows: Sequence[StageMetrics], *, only_essential: bool = False) -> list[Column]:
    """The columns for these rows: those for Bayesian stages only if there is one."""
    bayesian = any(row.posterior is not None for row in rows)
    return [
        column
        for column in COLUMNS
        if (column.essential or not only_essential) and (bayesian or not column.bayesian)
    ]


def text_table(rows: Sequence[StageMetrics]) -> str:
    """The essential columns as lines of text."""
    columns = shown_columns(rows, only_essential=True)
    cells = [[column.cell(row) for column in columns] for row in rows]
    return render(cells, [column.title for column in columns])


def html_table(rows: Sequence[StageMetrics]) -> str:
    """All columns as a table in HTML."""
    columns = shown_columns(rows)
    cells = [[column.cell(row) for column in columns] for row in rows]
    header = [column.title for column in columns]
    return render_html(cells, header, text_columns=NUM_TEXT_COLUMNS)


LEGEND = (
    "Nats per datum, in the units of the data. ELBO and log p are means over the training rows; "
    "log p is exact, or estimated (~) by importance sampling, with the share of data whose "
    f"estimate is reliable (≥ marks a lower bound: under {FEW_RELIABLE:.0%} are reliable). "
    "log p - ELBO = approximation gap (appr.), due to the family of q, + amortization gap "
    "(amort.), due to a q that is not optimal within its family; both are measured on {gap_rows} "
    "training rows. loss: the highest known log p of PPCA on the training rows, minus the ELBO "
    "(minus log p where there is no bound); theory: the expected loss at the optimum within the "
    "family of q, for complete data. conv.: whether the fit met its tolerance. held out: mean "
    "log p of the test rows. ±: one standard error over the rows. angle: the largest principal "
    "angle to {reference}, in degrees. s: seconds of the fit; *: its steps were compiled, which "
    "took part of the time."
)
STANDARDIZED = " sigma is in standard deviations of the columns, which were standardised."
IMPLIED = (
    " An autoencoder has no bound on log p, since its q is a point: its log p is that of the "
    "Gaussian implied by its codes and its squared error."
)
AVERAGED = (
    " Bayesian stages have a posterior of the parameters of PPCA. Their held-out log p averages "
    "the density over draws of the parameters; over ML, over mean: this minus log p of PPCA at "
    "{reference} and at the posterior mean. Variational Bayes (VB) has a prior that shrinks "
    "columns of W to zero (axes: the number of active ones); its ELBO is a bound on the log "
    "evidence, per datum."
)
INTEGRATED_OUT = " Missing values are integrated out: log p is that of the observed entries."


def legend(about: Mapping[str, Any]) -> str:
    """The meaning of the columns, for the lineage that ``about`` describes."""
    text = LEGEND.format(gap_rows=about["gap_rows"], reference=about["reference"])
    if about.get("scale") == "standardize":
        text += STANDARDIZED
    if any(name in STAGES and STAGES[name].q == POINT for name in about["stages"]):
        text += IMPLIED
    if any(name in STAGES and STAGES[name].model == BAYESIAN for name in about["stages"]):
        text += AVERAGED.format(reference=about["reference"])
    if about["num_missing"]:
        text += INTEGRATED_OUT
    return text
