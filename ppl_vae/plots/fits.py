"""Plots of one fitted model: its objective during the fit, its loadings, log p of rows."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ppl_vae.core.fit_result import FitResult
from ppl_vae.plots.axes import (
    BLUE,
    CELL_HEIGHT,
    GREY,
    MAX_NAMED,
    NATS,
    ORANGE,
    SIZE,
    SMALL,
    axis_names,
    legend_below,
    log_scale,
    new_axes,
    title,
)


def plot_history(fit: FitResult, ax: Axes | None = None) -> Axes:
    """Plot the objective of a fit against its steps, and the validation ELBO if there is one.

    Args:
        fit: the result of the fit.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    curve = fit.curve()
    marker = "o" if len(curve.steps) == 1 else ""
    ax.plot(curve.steps, curve.value, marker=marker, color=BLUE, lw=1.2, label="objective")
    ends = [float(curve.value[len(curve.value) // 10 :].min()), float(curve.value.max())]
    if fit.validation is not None and fit.validation_steps is not None:
        at, value = fit.validation_steps, fit.validation
        ax.plot(at, value, color=ORANGE, lw=1.2, label="ELBO of the validation rows")
        ends += [float(value[len(value) // 10 :].min()), float(value.max())]
    height = max(max(ends) - min(ends), 1e-3)
    ax.set_ylim(min(ends) - 0.05 * height, max(ends) + 0.05 * height)
    log_scale(ax, "x")
    ax.set_xlabel("iterations or steps")
    ax.set_ylabel(NATS)
    title(ax, f"Objective of the fit ({fit.algorithm})")
    legend_below(ax)
    return ax


def loadings_size(names: Sequence[str]) -> tuple[float, float]:
    """Width and height that :func:`plot_loadings` needs, in inches."""
    return SIZE[0], 1.8 + CELL_HEIGHT * min(len(names), MAX_NAMED)


def plot_loadings(
    loadings: Float[Tensor, "D K"], names: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Plot the loadings of each column on each latent dimension.

    Of many columns, those with the largest loadings are drawn.

    Args:
        loadings: W, with one row per column of the data, in standard deviations of the columns.
        names: the names of the columns, (D,).
        ax: the axes to plot on.
    """
    ax = new_axes(ax, loadings_size(names))
    values = loadings.numpy(force=True)
    order = np.argsort(-np.abs(values).max(1), kind="stable")[:MAX_NAMED]
    shown = np.sort(order)
    limit = max(float(np.abs(values).max()), 1e-12)
    colours = matplotlib.colormaps["RdBu_r"]
    ax.imshow(values[shown], colours, aspect="auto", vmin=-limit, vmax=limit)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_yticks(range(len(shown)), axis_names(names, shown.tolist()), fontsize=SMALL)
    step = -(-values.shape[1] // 12)
    at = np.arange(0, values.shape[1], step)
    ax.set_xticks(at, [str(k + 1) for k in at])
    notes = [
        "colour: standard deviations per unit of z,",
        f"{-limit:.2f} (blue) to {limit:.2f} (red)",
    ]
    if len(shown) < len(names):
        notes.append(f"{len(shown)} of {len(names)} columns, with the largest")
    ax.set_xlabel("\n".join(["latent dimension", *notes]))
    ax.set_ylabel("column")
    title(ax, "Loadings")
    return ax


def plot_log_p(
    log_p: Float[Tensor, " N"], reliable: Tensor | None = None, ax: Axes | None = None
) -> Axes:
    """Plot a histogram of log p over rows.

    Args:
        log_p: in nats, finite.
        reliable: which estimates are reliable; None for exact values.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    values = log_p.numpy(force=True)
    edges = np.histogram_bin_edges(values, bins="auto" if len(values) > 1 else 1).tolist()
    parts = {"rows": values}
    if reliable is not None and not bool(reliable.all()):
        parts = {
            "reliable": values[reliable.numpy(force=True)],
            "not reliable, a lower bound": values[~reliable.numpy(force=True)],
        }
    colours = [BLUE, GREY][: len(parts)]
    ax.hist([*parts.values()], bins=edges, stacked=True, color=colours, label=[*parts])
    ax.axvline(float(values.mean()), color="black", lw=1, ls=":", label="mean")
    ax.set_xlabel("log p of a row, nats per datum")
    ax.set_ylabel("number of rows")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    title(ax, "log p of the rows")
    legend_below(ax)
    return ax
