"""Plots of the bound and log p: along a fit, and along a line through the parameters."""

from matplotlib.axes import Axes
from torch import Tensor

from ppl_vae.evaluation.inference_gaps.bound_history import Ascent, BoundSlice
from ppl_vae.plots.axes import BLUE, NATS, colour, legend_below, log_scale, new_axes, title

NUM_ITERATIONS = 6
"""The number of iterations of EM that are shown by default."""


def plot_em(
    ascent: Ascent, ax: Axes | None = None, *, num_iterations: int = NUM_ITERATIONS
) -> Axes:
    """Plot bound and log p of EM: equal after each E-step, both increasing in each M-step.

    Args:
        ascent: the ascent of EM, from a row of the lineage.
        ax: the axes to plot on.
        num_iterations: the number of iterations from the start to show.
    """
    ax = new_axes(ax)
    part = ascent.at <= num_iterations
    at, log_p, bound = ascent.at[part], ascent.log_likelihood[part], ascent.bound[part]
    _bound_and_log_p(ax, at, log_p, bound)
    equal = at == at.floor()
    ax.plot(at[equal], bound[equal], "o", color=BLUE, ms=5, label="after an E-step: equal")
    ax.set_xlabel("iterations of EM (M-steps halfway)")
    title(ax, "EM: each E-step closes the gap")
    legend_below(ax)
    return ax


def plot_svi(ascent: Ascent, ax: Axes | None = None) -> Axes:
    """Plot bound and log p of SVI, which optimizes model and guide jointly.

    Args:
        ascent: the ascent of SVI, from a row of the lineage.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    part = ascent.at > 0
    _bound_and_log_p(ax, ascent.at[part], ascent.log_likelihood[part], ascent.bound[part])
    log_scale(ax, "x")
    ax.set_xlabel("steps of SVI")
    title(ax, "SVI: joint ascent in model and guide")
    legend_below(ax)
    return ax


def _bound_and_log_p(ax: Axes, at: Tensor, log_p: Tensor, bound: Tensor) -> None:
    ax.plot(at, log_p, color="black", lw=1.4, label="log p(x)")
    ax.plot(at, bound, color=BLUE, lw=1.4, label="bound (ELBO)")
    ax.fill_between(at, bound, log_p, color=BLUE, alpha=0.22, lw=0, label="KL(q || p(z|x))")
    ax.set_ylabel(NATS)


def plot_bound_slice(bounds: BoundSlice, ax: Axes | None = None) -> Axes:
    """Plot log p along a line through the parameters, with bounds tangent where q is exact.

    Args:
        bounds: a result of :func:`ppl_vae.evaluation.inference_gaps.bound_history.bound_slice`.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    ax.plot(bounds.at, bounds.log_likelihood, color="black", lw=1.6, label="log p(x)")
    for index, (touch, bound) in enumerate(zip(bounds.touching, bounds.bounds, strict=True)):
        where = int((bounds.at - touch).abs().argmin())
        ax.plot(bounds.at, bound, color=colour(index), lw=1.2, label=f"q exact at {touch:.2f}")
        ax.plot(bounds.at[where], bound[where], "o", color=colour(index), ms=5)
    low, high = float(bounds.log_likelihood.min()), float(bounds.log_likelihood.max())
    height = max(high - low, 1e-3)
    ax.set_ylim(low - 0.25 * height, high + 0.08 * height)
    ax.set_xlabel("from PPCA's initial parameters (0) to its optimum (1)")
    ax.set_ylabel(NATS)
    title(ax, "Bounds are tangent to log p from below")
    legend_below(ax, 2)
    return ax
