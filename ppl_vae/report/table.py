"""The lineage's table on a terminal."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE
from ppl_vae.lineage.metrics import MeanEstimate, Row
from ppl_vae.lineage.stages import POINT, STAGES


@dataclass(frozen=True)
class Column:
    """A column of the lineage's table: its title and how a row's cell is written."""

    title: str
    cell: Callable[[Row], str]
    numeric: bool = True
    always: bool = True


COLUMNS = (
    Column("stage", lambda row: row.stage, numeric=False),
    Column("model", lambda row: row.model, numeric=False, always=False),
    Column("q(z|x)", lambda row: row.q, numeric=False, always=False),
    Column("algorithm", lambda row: row.algorithm, numeric=False, always=False),
    Column("ELBO", lambda row: number(row.elbo, 2)),
    Column("log p", lambda row: measure(row.log_p)),
    Column("", lambda row: reliability(row.log_p)),
    Column("appr.", lambda row: number(row.approximation, 3)),
    Column("amort.", lambda row: number(row.amortization, 3)),
    Column("loss", lambda row: number(row.loss, 2), always=False),
    Column("theory", lambda row: number(row.loss - row.excess, 2), always=False),
    Column("held out", lambda row: measure(row.test_log_p)),
    Column("", lambda row: reliability(row.test_log_p)),
    Column("sigma", lambda row: number(row.noise_scale, 3), always=False),
    Column("angle", lambda row: number(row.angle, 1), always=False),
    Column("steps", lambda row: str(row.fit.steps), always=False),
    Column("met", lambda row: "yes" if row.convergence.met else "no", always=False),
    Column("s", lambda row: number(row.fit.seconds, 1)),
)


def lineage_table(rows: Sequence[Row], *, width: int = 160, waiting: str = "") -> Table:
    """The rows as a table; ``waiting`` names a stage that is being fitted.

    Where the whole table is wider than ``width``, it keeps to the columns it cannot do without.
    """
    whole = _table(rows, COLUMNS, waiting)
    endless = Console(width=1000)
    if Measurement.get(endless, endless.options, whole).maximum <= width:
        return whole
    return _table(rows, [column for column in COLUMNS if column.always], waiting)


def _table(rows: Sequence[Row], columns: Sequence[Column], waiting: str) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    if waiting:
        table.add_row(Text(waiting, style="dim"), Text("...", style="dim"))
    return table


def number(value: float, digits: int) -> str:
    """A number with so many digits after the point, "-" where there is none, and no minus zero."""
    if math.isnan(value):
        return "-"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def measure(value: MeanEstimate) -> str:
    """A mean log-likelihood and its error; ~ is estimated, ≥ no more than a bound."""
    if math.isnan(value.value):
        return "-"
    sign = "" if value.how == "exact" else "≥" if value.reliable < FEW_RELIABLE else "~"
    error = "" if value.error is None else f"±{value.error:.2f}"
    return f"{sign}{number(value.value, 2)}{error}"


def reliability(value: MeanEstimate) -> str:
    """``exact``, or the share of data whose estimate is reliable."""
    if math.isnan(value.value):
        return ""
    return "exact" if value.how == "exact" else percent(value.reliable)


def percent(share: float) -> str:
    """A share in whole per cent, rounded down, so that only all is 100 %."""
    return f"{math.floor(100 * share)} %"


def legend(about: Mapping[str, Any]) -> str:
    """What the columns of a lineage's table mean, which is about this."""
    holes = " Missing cells are integrated out: what is scored is what was observed."
    points = any(name in STAGES and STAGES[name].q == POINT for name in about["stages"])
    standard = " Sigma is in standard deviations of the columns, which were standardised."
    implied = (
        " An autoencoder, whose q is a point, has no bound: its log p is that of the Gaussian "
        "which its codes and its squared error imply."
    )
    return (
        "Nats per datum, in the units of the data. ELBO and log p are means over the training "
        "rows. log p is exact, or (~) estimated by importance sampling, with the share of data "
        f"whose estimate is reliable (≥: under {FEW_RELIABLE:.0%}, a lower bound). log p - ELBO = "
        "approximation gap, the price of q's family, + amortization gap, the price of how q is "
        f"found; measured on {about['gap_rows']} training rows. Loss: the best log p that PPCA is "
        "known to reach on the training rows, minus the ELBO (minus log p where there is no "
        "bound); theory: what it is at the optimum of q's family, which is known for complete "
        "data. Met: whether a stage was trained until its tolerance was met. Held out: log p of "
        "the test rows, ± standard error over them. Angle: the largest principal angle to "
        f"{about['reference']}, in degrees.{standard * (about.get('scale') == 'standardize')}"
        f"{implied * points}{holes * (about['num_missing'] > 0)}"
    )


def filled(text: str, width: int) -> str:
    """A paragraph on a terminal of this width."""
    return "\n".join(textwrap.wrap(text, min(width, 110), break_on_hyphens=False))
