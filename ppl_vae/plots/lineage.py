"""Plots of the lineage: the loss of each stage, and its objective during the fit.

Each function takes a stored result and, optionally, the axes to draw on; by default it creates a
figure of the size that its texts need.
"""

import math

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from ppl_vae.core.validation import check_option
from ppl_vae.lineage.metrics import StageMetrics
from ppl_vae.lineage.result import Lineage
from ppl_vae.plots.axes import (
    BLUE,
    NATS,
    ORANGE,
    SIZE,
    colour,
    legend_below,
    line_style,
    log_scale,
    new_axes,
    title,
)

PARTS = {
    "shortfall of log p": "#b8b8b8",
    "approximation gap": BLUE,
    "amortization gap": ORANGE,
}
AGAINST = {"steps": "iterations or steps", "seconds": "seconds"}
OBJECTIVE_SIZE = (SIZE[0], 4.4)


def gaps_size(lineage: Lineage) -> tuple[float, float]:
    """Width and height that :func:`plot_gaps` needs, in inches."""
    return SIZE[0], 1.5 + 0.31 * len(_point_estimates(lineage))


def plot_gaps(lineage: Lineage, ax: Axes | None = None) -> Axes:
    """Plot each stage's shortfall of log p and its two gaps between log p and the ELBO.

    Exact zeros are marked as exact. The error bars are plus and minus one standard error.
    Bayesian stages, which do not maximize log p, are left out.

    Args:
        lineage: a result of :func:`ppl_vae.lineage.run.run_lineage`.
        ax: the axes to plot on.
    """
    ax = new_axes(ax, gaps_size(lineage))
    rows = _point_estimates(lineage)
    losses = np.array([_losses(row) for row in rows]).reshape(len(rows), len(PARTS))
    left = np.zeros(len(rows))
    for part, (name, part_colour) in enumerate(PARTS.items()):
        ax.barh(np.arange(len(rows)), losses[:, part], left=left, color=part_colour, label=name)
        left += losses[:, part]
    # The number is placed to the right of the error bars.
    errors = np.array([(row.approximation_error, row.amortization_error) for row in rows])
    ends = (losses.cumsum(1)[:, 1:] + np.nan_to_num(errors)).max(1)
    _error_bars(ax, errors, losses.cumsum(1))
    ax.set_xlim(0, 1.25 * max(ends.max(), 1e-3))
    for index, (total, row) in enumerate(zip(left, rows, strict=True)):
        ax.text(ends[index] + 0.015 * ax.get_xlim()[1], index, _loss_text(row, total), va="center")
    ax.set_yticks(np.arange(len(rows)), [row.stage for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel(f"loss, {NATS} (training rows)")
    ax.set_ylabel("stage")
    title(ax, "Loss of each stage")
    legend_below(ax, side="right")
    return ax


def _point_estimates(lineage: Lineage) -> list[StageMetrics]:
    # Bayesian stages have no log p of training rows at parameters of their own.
    return [row for row in lineage.rows if row.posterior is None]


def _losses(row: StageMetrics) -> list[float]:
    parts = (row.shortfall, row.approximation, row.amortization)
    return [0.0 if math.isnan(part) else max(part, 0.0) for part in parts]


def _error_bars(
    ax: Axes, errors: Float[np.ndarray, "M 2"], ends: Float[np.ndarray, "M 3"]
) -> None:
    # The bars of the first gap are above the middle of the row, those of the second below it;
    # bars shorter than the width of their line are not drawn.
    shortest = 2e-3 * max(float(ends.max()), 1e-3)
    for part, offset in ((1, -0.18), (2, 0.18)):
        error = errors[:, part - 1]
        shown = np.flatnonzero(error > shortest)
        ax.errorbar(
            ends[shown, part],
            shown + offset,
            xerr=error[shown],
            fmt="none",
            ecolor="black",
            elinewidth=1.1,
        )


def _loss_text(row: StageMetrics, total: float) -> str:
    exact = row.log_p.method == "exact"
    if total < 5e-4:
        return "0, exact" if exact else "~0"
    return ("" if exact else "~") + (f"{total:.3f}" if total < 1 else f"{total:.2f}")


def plot_objective(lineage: Lineage, ax: Axes | None = None, *, against: str = "steps") -> Axes:
    """Plot each stage's objective during the fit, and PPCA's optimum as a dotted line.

    Args:
        lineage: a result of :func:`ppl_vae.lineage.run.run_lineage`.
        ax: the axes to plot on.
        against: ``"steps"`` (iterations of EM, steps of SVI) or ``"seconds"``.

    Raises:
        ValueError: if ``against`` is unknown.
    """
    check_option("against", against, AGAINST)
    ax = new_axes(ax, OBJECTIVE_SIZE)
    rows = [row for row in lineage.rows if not math.isnan(row.elbo)]  # the others have no bound
    for index, row in enumerate(rows):
        x = getattr(row.curve, against)
        style = line_style(index)
        marker = "o" if len(x) == 1 else ""
        ax.plot(
            x, row.curve.value, style, marker=marker, color=colour(index), lw=1.2, label=row.stage
        )
    ax.axhline(lineage.optimum, color="black", lw=1, ls=":", label="optimum of PPCA")
    log_scale(ax, "x")
    # The limits are from the ELBOs, since the last value of a noisy objective may be far below.
    ends = [row.elbo for row in rows] + [lineage.optimum]
    top = max([*ends, *(float(row.curve.value[-1]) for row in rows)])
    height = max(top - min(ends), 1e-3)
    ax.set_ylim(min(ends) - height, top + 0.1 * height)
    ax.set_xlabel(AGAINST[against])
    ax.set_ylabel(f"objective, {NATS}")
    title(ax, "Objective of each stage")
    legend_below(ax)
    return ax
