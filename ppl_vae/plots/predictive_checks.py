"""Plots of predictive checks: statistics of replicated data sets against those of the data."""

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from ppl_vae.evaluation.prediction.predictive_checks import EXTREME, PredictiveCheck
from ppl_vae.plots.axes import BLUE, GREY, ORANGE, SIZE, legend_below, new_axes, title

CHECK_SIZE = (SIZE[0], 4.6)
INTERVAL = (0.05, 0.95)
MARGIN = 0.35
"""Space above and below the observed values, as a share of their range: wide intervals of the
prior are cut off there."""


def plot_covariance_check(check: PredictiveCheck, ax: Axes | None = None) -> Axes:
    """Plot each covariance of the data against those of replicated data sets.

    Points are medians over data sets from the posterior predictive distribution, with intervals of
    90 %; grey intervals are of the prior predictive distribution. On the diagonal both agree.
    Elements with a posterior predictive p-value below 0.025 or above 0.975 are orange.

    Args:
        check: the check of
            :func:`~ppl_vae.evaluation.prediction.predictive_checks.predictive_check`, with the
            statistic ``"covariance"``.
        ax: the axes to plot on.

    Raises:
        ValueError: if the check is of another statistic.
    """
    return _plot_check(
        check, "covariance", "covariance of the data, in products of standard deviations", ax
    )


def plot_quantile_check(check: PredictiveCheck, ax: Axes | None = None) -> Axes:
    """Plot the quantiles of each column of the data against those of replicated data sets.

    The 5, 25, 50, 75 and 95 % quantiles of all columns, drawn as in :func:`plot_covariance_check`.

    Args:
        check, ax: as for :func:`plot_covariance_check`, with the statistic ``"quantiles"``.

    Raises:
        ValueError: if the check is of another statistic.
    """
    return _plot_check(
        check, "quantiles", "quantile of the data, standard deviations from the mean", ax
    )


def _plot_check(check: PredictiveCheck, statistic: str, label: str, ax: Axes | None) -> Axes:
    if check.statistic != statistic:
        raise ValueError(
            f"check must be of the statistic {statistic!r}; it is of {check.statistic!r}. Call "
            f"predictive_check(..., {statistic!r})"
        )
    ax = new_axes(ax, CHECK_SIZE)
    observed = check.observed.numpy(force=True)
    low, high = float(observed.min()), float(observed.max())
    margin = MARGIN * max(high - low, 1e-6)
    limits = low - margin, high + margin
    if check.prior is not None:
        lower, _, upper = _interval(check.prior)
        wider = lower.min() < limits[0] or upper.max() > limits[1]
        name = "prior, 90 % (beyond the axes)" if wider else "prior, 90 %"
        ax.vlines(observed, lower, upper, color=GREY, lw=0.8, alpha=0.35, label=name)
    ax.plot(limits, limits, color="black", lw=0.8, ls=":")
    for which, colour, name in (
        (~check.extreme, BLUE, "posterior, median and 90 %"),
        (check.extreme, ORANGE, f"p below {EXTREME} or above {1 - EXTREME}"),
    ):
        if bool(which.any()):
            lower, median, upper = _interval(check.posterior[:, which])
            error = np.stack([median - lower, upper - median])
            chosen = observed[which.numpy(force=True)]
            ax.errorbar(chosen, median, error, fmt="o", ms=3, lw=1, color=colour, label=name)
    ax.set_xlim(*limits)
    ax.set_ylim(*limits)
    ax.set_xlabel(label)
    ax.set_ylabel("replicated data sets, in the same standard deviations")
    number, total = int(check.extreme.sum()), len(check.elements)
    title(ax, f"Predictive check: {number} of {total} p-values are extreme")
    legend_below(ax, 2)
    return ax


def _interval(values: Float[Tensor, "R E"]) -> Float[np.ndarray, "3 E"]:
    levels = torch.tensor([INTERVAL[0], 0.5, INTERVAL[1]]).to(values)
    return values.nanquantile(levels, dim=0).numpy(force=True)
