"""Pictures of estimates of log p: whether they are to be believed."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes

from ppl_vae.evaluation.marginal_likelihood.cross_check import EstimatorComparison
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.plots.drawing import NATS, colour, legend_below, log_scale, new_axes, title


def tail_index(estimates: Mapping[str, LogLikelihood], ax: Axes | None = None) -> Axes:
    """The pooled tail index of each datum's weights, and up to which it is reliable.

    Data without one (whose weights are equal, or have few values) are left out.

    Args:
        estimates: by model.
        ax: where to draw.
    """
    ax = new_axes(ax)
    for place, (name, estimate) in enumerate(estimates.items()):
        share = math.floor(100 * estimate.share_reliable)
        label, how = f"{name}: {share} % reliable", {"color": colour(place), "alpha": 0.75}
        pooled = estimate.k_hat if estimate.tail_index is None else estimate.tail_index
        ax.plot(np.arange(1, len(pooled) + 1), pooled, ".", ms=4, label=label, **how)
        if estimate.limit is not None and len(pooled):
            limit = float(estimate.limit.nanmedian())
            ax.axhline(limit, lw=1, ls=":", label=f"its limit, {limit:.2f}", **how)
    ax.set_xlabel("held-out datum")
    ax.set_ylabel("pooled tail index (no unit)")
    title(ax, "Whose log p is to be believed")
    legend_below(ax, 2)
    return ax


def convergence(estimates: Mapping[str, LogLikelihood], ax: Axes | None = None) -> Axes:
    """How far the mean log p from fewer of the same draws lies from that of all of them.

    Args:
        estimates: by model.
        ax: where to draw.
    """
    ax = new_axes(ax)
    for place, (name, estimate) in enumerate(estimates.items()):
        draws, means = zip(*estimate.convergence, strict=True)
        short = [mean - means[-1] for mean in means]
        ax.plot(draws, short, "o-", ms=4, lw=1.2, color=colour(place), label=name)
    ax.axhline(0, color="black", lw=1, ls=":")
    log_scale(ax, "x")
    ax.set_xlabel("draws per datum")
    ax.set_ylabel(f"mean log p less that of all draws,\n{NATS}")
    title(ax, "Are there enough draws?")
    legend_below(ax)
    return ax


def annealing(told: Mapping[str, EstimatorComparison], ax: Axes | None = None) -> Axes:
    """Each datum's log p by annealing less that by importance sampling, with its error.

    Both are lower bounds in expectation: above zero importance sampling falls short, below zero
    annealing does.

    Args:
        told: estimates ``"importance"`` and ``"annealed"``, by model.
        ax: where to draw.
    """
    ax = new_axes(ax)
    for place, (name, pair) in enumerate(told.items()):
        importance, annealed = pair.estimates["importance"], pair.estimates["annealed"]
        error = importance.standard_error.hypot(annealed.standard_error)
        # Side by side, so that models do not hide one another.
        at = torch.arange(1, len(error) + 1) + (place - (len(told) - 1) / 2) * 0.7 / len(told)
        less, mean = annealed.value - importance.value, pair.difference("annealed", "importance")
        label = f"{name}: mean {mean[0]:.3f} ± {mean[1]:.3f}"
        how = {"fmt": "o", "ms": 3, "elinewidth": 0.9, "color": colour(place), "label": label}
        ax.errorbar(at.numpy(), less.numpy(), yerr=error.numpy(), **how)
    ax.axhline(0, color="black", lw=1, ls=":")
    ax.set_xlabel("held-out datum")
    ax.set_ylabel(f"log p by annealing less that by\nimportance sampling, {NATS}")
    title(ax, "Does another method agree?")
    legend_below(ax, 2)
    return ax
