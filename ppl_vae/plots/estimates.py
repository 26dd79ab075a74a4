"""Plots of estimates of log p: their reliability, and the comparison of models."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE, Comparison
from ppl_vae.evaluation.marginal_likelihood.cross_check import EstimatorComparison
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.plots.axes import (
    BLUE,
    NATS,
    SIZE,
    colour,
    legend_below,
    log_scale,
    new_axes,
    title,
)


def plot_tail_index(estimates: Mapping[str, LogLikelihood], ax: Axes | None = None) -> Axes:
    """Plot the pooled tail index of each datum's weights, and the limit of reliable ones.

    Data without a tail index (whose weights are equal, or have few values) are omitted.

    Args:
        estimates: by model.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    for index, (name, estimate) in enumerate(estimates.items()):
        share = math.floor(100 * estimate.share_reliable)
        shade = colour(index)
        pooled = estimate.k_hat if estimate.tail_index is None else estimate.tail_index
        at = np.arange(1, len(pooled) + 1)
        label = f"{name}: {share} % reliable"
        ax.plot(at, pooled, ".", ms=4, color=shade, alpha=0.75, label=label)
        if estimate.limit is not None and len(pooled):
            limit = float(estimate.limit.nanmedian())
            label = f"its limit, {limit:.2f}"
            ax.axhline(limit, lw=1, ls=":", color=shade, alpha=0.75, label=label)
    ax.set_xlabel("held-out datum")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("pooled tail index (no unit)")
    title(ax, "Tail index of the importance weights")
    legend_below(ax, 2)
    return ax


def plot_convergence(estimates: Mapping[str, LogLikelihood], ax: Axes | None = None) -> Axes:
    """Plot the mean log p from the first draws, minus that from all draws.

    Args:
        estimates: by model.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    for index, (name, estimate) in enumerate(estimates.items()):
        num_draws, means = zip(*estimate.convergence, strict=True)
        differences = [mean - means[-1] for mean in means]
        ax.plot(num_draws, differences, "o-", ms=4, lw=1.2, color=colour(index), label=name)
    ax.axhline(0, color="black", lw=1, ls=":")
    log_scale(ax, "x")
    ax.set_xlabel("draws per datum")
    ax.set_ylabel(f"mean log p minus that of all draws,\n{NATS}")
    title(ax, "Convergence in the number of draws")
    legend_below(ax)
    return ax


def plot_cross_check(
    comparisons: Mapping[str, EstimatorComparison], ax: Axes | None = None
) -> Axes:
    """Plot each datum's log p by annealed minus that by plain importance sampling.

    Both are lower bounds in expectation: positive values mean that importance sampling is too
    low, negative ones that annealing is.

    Args:
        comparisons: the estimates ``"importance"`` and ``"annealed"``, by model.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    for index, (name, comparison) in enumerate(comparisons.items()):
        importance, annealed = (comparison.estimates[k] for k in ("importance", "annealed"))
        error = importance.standard_error.hypot(annealed.standard_error)
        # The models are side by side, so that their points do not overlap.
        offset = (index - (len(comparisons) - 1) / 2) * 0.7 / len(comparisons)
        at = torch.arange(1, len(error) + 1) + offset
        mean, mean_error = comparison.difference("annealed", "importance")
        ax.errorbar(
            at.numpy(force=True),
            (annealed.value - importance.value).numpy(force=True),
            yerr=error.numpy(force=True),
            fmt="o",
            ms=3,
            elinewidth=0.9,
            color=colour(index),
            label=f"{name}: mean {mean:.3f} ± {mean_error:.3f}",
        )
    ax.axhline(0, color="black", lw=1, ls=":")
    ax.set_xlabel("held-out datum")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel(f"log p by annealing minus that by\nimportance sampling, {NATS}")
    title(ax, "Cross-check by annealed importance sampling")
    legend_below(ax, 2)
    return ax


def comparison_size(comparison: Comparison) -> tuple[float, float]:
    """Width and height that :func:`plot_comparison` needs, in inches."""
    return SIZE[0], 1.3 + 0.31 * len(comparison.names)


def plot_comparison(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """Plot held-out log p minus the best model's, with paired standard errors.

    Args:
        comparison: a result of :func:`ppl_vae.compare`.
        ax: the axes to plot on.
    """
    ax = new_axes(ax, comparison_size(comparison))
    at = np.arange(len(comparison.names))
    reliable = comparison.reliable.numpy(force=True) >= FEW_RELIABLE
    value, error = (
        comparison.difference.numpy(force=True),
        comparison.difference_error.numpy(force=True),
    )
    kinds = ((reliable, BLUE, "± paired standard error"), (~reliable, "white", "lower bound"))
    for part, fill, name in kinds:
        if part.any():
            x, y, xerr = value[part], at[part], error[part]
            ax.errorbar(x, y, xerr=xerr, fmt="o", ms=6, color=BLUE, mfc=fill, label=name)
    ax.axvline(0, color="black", lw=1, ls=":")
    ax.set_yticks(at, comparison.names)
    ax.set_ylim(len(at) - 0.5, -0.5)
    ax.set_xlabel(f"held-out log p minus the best, {NATS}")
    ax.set_ylabel("model")
    title(ax, "Held-out log p")
    legend_below(ax, side="right")
    return ax
