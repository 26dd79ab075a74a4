"""Plot of the ranks of simulation-based calibration."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from ppl_vae.core.validation import check_option
from ppl_vae.evaluation.calibration.result import SimulationBasedCalibration
from ppl_vae.plots.axes import GREY, colour, legend_below, new_axes, title

MAX_NAMED = 6
"""The number of quantities with a colour and a name; others are grey."""


def plot_rank_ecdf(
    result: SimulationBasedCalibration,
    quantities: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the distribution functions of ranks minus that of uniform ranks, with their band.

    All curves stay in the band with probability 0.95 if the draws are those of the posterior. A
    curve that rises and then falls belongs to draws that are too large, the reverse to draws that
    are too small; one that is above zero first and then below it belongs to draws that are too
    narrow.

    Args:
        result: the result of :func:`ppl_vae.simulation_based_calibration`.
        quantities: the names of the quantities to draw; by default all, with names of the six
            with the smallest p-values.
        ax: the axes to plot on.

    Raises:
        ValueError: if a quantity is not in the result.

    References:
        Saeilynoja, Buerkner, Vehtari: Graphical test for discrete uniformity and its applications
        in goodness-of-fit evaluation and multiple sample comparison (2022).
    """
    ax = new_axes(ax)
    chosen = result.quantities if quantities is None else tuple(quantities)
    indices = [
        result.quantities.index(check_option("quantities", n, result.quantities)) for n in chosen
    ]
    named = sorted(indices, key=lambda index: result.p_values[index])[:MAX_NAMED]
    band, curves = result.band(), result.ecdf()
    at = np.concatenate([[0], band.probability, [1]])

    def closed(values: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], values - band.probability, [0]])

    ax.fill_between(
        at, closed(band.lower), closed(band.upper), color=GREY, alpha=0.25, lw=0, label="95 % band"
    )
    for index in indices:
        if index not in named:
            ax.plot(at, closed(curves[index]), color=GREY, lw=0.6, alpha=0.6)
    for order, index in enumerate(named):
        name = result.quantities[index]
        ax.plot(at, closed(curves[index]), color=colour(order), lw=1.2, label=name)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.set_xlabel("rank of the true value (proportion of draws, no unit)")
    ax.set_ylabel("difference from uniform (no unit)")
    title(ax, "Ranks of simulation-based calibration")
    legend_below(ax)
    return ax
