"""Pictures of stored results: one function a picture, which computes nothing but where to draw.

Each takes a result and, if wanted, the axes to draw on; by default it makes a new figure of the
size that its letters need.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ppl_vae.core.validation import check_option
from ppl_vae.evaluation.inference_gaps.ascent import Ascent, BoundSlice
from ppl_vae.evaluation.latent_space.spectrum import Spectrum
from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE, Comparison
from ppl_vae.lineage.metrics import Row
from ppl_vae.lineage.report_data import LatentMeans
from ppl_vae.lineage.run import Lineage
from ppl_vae.plots.drawing import (
    BLUE,
    GREY,
    NATS,
    ORANGE,
    SIZE,
    colour,
    legend_below,
    log_scale,
    new_axes,
    scatter_by_class,
    title,
)

PARTS = {"short of the best log p": "#b8b8b8", "approximation": BLUE, "amortization": ORANGE}
SHOWN_ITERATIONS = 6
AGAINST = {"steps": "iterations or steps", "seconds": "seconds"}


def gaps_size(lineage: Lineage) -> tuple[float, float]:
    """Width and height that :func:`plot_gaps` needs, in inches."""
    return SIZE[0], 1.5 + 0.31 * len(lineage.rows)


def plot_gaps(lineage: Lineage, ax: Axes | None = None) -> Axes:
    """Nats per datum lost at each stage: what log p falls short by, and the two gaps below it.

    Zeros that are exact say so. Lines at the ends of the gaps are one standard error to each side.
    """
    ax = new_axes(ax, gaps_size(lineage))
    rows = lineage.rows
    losses = np.array([_losses(row) for row in rows]).reshape(len(rows), len(PARTS))
    left = np.zeros(len(rows))
    for part, (name, shade) in enumerate(PARTS.items()):
        ax.barh(np.arange(len(rows)), losses[:, part], left=left, color=shade, label=name)
        left += losses[:, part]
    _error_bars(ax, rows, losses.cumsum(1))
    # What is written stands right of the error's line.
    ends = left + np.nan_to_num([row.amortization_error for row in rows])
    ax.set_xlim(0, 1.25 * max(ends.max(), 1e-3))
    for place, (total, row) in enumerate(zip(left, rows, strict=True)):
        at = ends[place] + 0.015 * ax.get_xlim()[1]
        ax.text(at, place, _lost(row, total), va="center")
    ax.set_yticks(np.arange(len(rows)), [row.stage for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel(f"lost, {NATS} (training rows)")
    ax.set_ylabel("stage")
    title(ax, "What each stage loses")
    legend_below(ax, side="right")
    return ax


def _losses(row: Row) -> list[float]:
    parts = (row.shortfall, row.approximation, row.amortization)
    return [0.0 if math.isnan(part) else max(part, 0.0) for part in parts]


def _error_bars(ax: Axes, rows: Sequence[Row], ends: np.ndarray) -> None:
    # Those of one gap a little above, of the other a little below the middle of their bar; what
    # would be shorter than its line is wide is not drawn.
    errors = np.array([(row.approximation_error, row.amortization_error) for row in rows])
    shortest = 2e-3 * max(float(ends.max()), 1e-3)
    for part, place in ((1, -0.18), (2, 0.18)):
        error = errors[:, part - 1]
        seen = np.flatnonzero(error > shortest)
        how = {"fmt": "none", "ecolor": "black", "elinewidth": 1.1}
        ax.errorbar(ends[seen, part], seen + place, xerr=error[seen], **how)


def _lost(row: Row, total: float) -> str:
    sure = "" if row.log_p.how == "exact" else "~"
    if total < 5e-4:
        return "0, exact" if row.log_p.how == "exact" else "~0"
    return sure + (f"{total:.3f}" if total < 1 else f"{total:.2f}")


def objective(lineage: Lineage, ax: Axes | None = None, *, against: str = "steps") -> Axes:
    """Each stage's objective as it rose, and PPCA's exact optimum as a line.

    Args:
        lineage: what :func:`ppl_vae.lineage.run.run_lineage` gave.
        ax: where to draw.
        against: ``"steps"`` (iterations of EM, steps of SVI) or ``"seconds"``.
    """
    check_option("against", against, AGAINST)
    ax = new_axes(ax, (SIZE[0], 4.4))
    rows = [row for row in lineage.rows if not math.isnan(row.elbo)]  # the others have no bound
    for place, row in enumerate(rows):
        x = getattr(row.curve, against)
        style = "-" if place < 9 else "--"
        marker = "o" if len(x) == 1 else ""
        ax.plot(
            x, row.curve.value, style, marker=marker, color=colour(place), lw=1.2, label=row.stage
        )
    ax.axhline(lineage.optimum, color="black", lw=1, ls=":", label="PPCA's optimum")
    log_scale(ax, "x")
    # From the ELBOs, since where a noisy objective happened to end may be far below.
    ends = [row.elbo for row in rows] + [lineage.optimum]
    top = max([*ends, *(float(row.curve.value[-1]) for row in rows)])
    room = max(top - min(ends), 1e-3)
    ax.set_ylim(min(ends) - room, top + 0.1 * room)
    ax.set_xlabel(AGAINST[against])
    ax.set_ylabel(f"objective, {NATS}")
    title(ax, "How fast each stage rises")
    legend_below(ax)
    return ax


def plot_em(ascent: Ascent, ax: Axes | None = None, *, shown: int = SHOWN_ITERATIONS) -> Axes:
    """EM: the bound touches log p after each E-step, and both rise in the M-step.

    Args:
        ascent: of EM, as a lineage's row holds it.
        ax: where to draw.
        shown: so many iterations from the start.
    """
    ax = new_axes(ax)
    part = ascent.at <= shown
    at, log_p, bound = ascent.at[part], ascent.log_likelihood[part], ascent.bound[part]
    _bounded(ax, at, log_p, bound)
    touching = at == at.floor()
    ax.plot(at[touching], bound[touching], "o", color=BLUE, ms=5, label="after an E-step: equal")
    ax.set_xlabel("iterations of EM (M-steps halfway)")
    title(ax, "EM: E-steps close the gap")
    legend_below(ax)
    return ax


def plot_svi(ascent: Ascent, ax: Axes | None = None) -> Axes:
    """SVI raises the bound in model and guide together: it never has to touch log p."""
    ax = new_axes(ax)
    part = ascent.at > 0
    _bounded(ax, ascent.at[part], ascent.log_likelihood[part], ascent.bound[part])
    log_scale(ax, "x")
    ax.set_xlabel("steps of SVI")
    title(ax, "SVI: both rise at once")
    legend_below(ax)
    return ax


def _bounded(ax: Axes, at: Tensor, log_p: Tensor, bound: Tensor) -> None:
    ax.plot(at, log_p, color="black", lw=1.4, label="log p(x)")
    ax.plot(at, bound, color=BLUE, lw=1.4, label="bound (ELBO)")
    ax.fill_between(at, bound, log_p, color=BLUE, alpha=0.22, lw=0, label="KL(q || p(z|x))")
    ax.set_ylabel(NATS)


def bound_slice(slice_: BoundSlice, ax: Axes | None = None) -> Axes:
    """log p along a line through the parameters, and bounds that touch it where q is exact."""
    ax = new_axes(ax)
    ax.plot(slice_.at, slice_.log_likelihood, color="black", lw=1.6, label="log p(x)")
    for place, (touch, bound) in enumerate(zip(slice_.touching, slice_.bounds, strict=True)):
        where = int((slice_.at - touch).abs().argmin())
        ax.plot(slice_.at, bound, color=colour(place), lw=1.2, label=f"q exact at {touch:.2f}")
        ax.plot(slice_.at[where], bound[where], "o", color=colour(place), ms=5)
    low, high = float(slice_.log_likelihood.min()), float(slice_.log_likelihood.max())
    room = max(high - low, 1e-3)
    ax.set_ylim(low - 0.25 * room, high + 0.08 * room)
    ax.set_xlabel("from PPCA's start (0) to its optimum (1)")
    ax.set_ylabel(NATS)
    title(ax, "Bounds touch log p from below")
    legend_below(ax, 2)
    return ax


def latent_means(means: LatentMeans, ax: Axes | None = None, *, name: str = "") -> Axes:
    """The mean of q(z|x) of each datum, by class if there are classes.

    Args:
        means: of a pair with two latents.
        ax: where to draw.
        name: of the pair, for the title.
    """
    ax = new_axes(ax, (SIZE[0], 4.6))
    if scatter_by_class(ax, means.means.numpy(), means.labels):
        legend_below(ax, 5)
    ax.set_xlabel("$z_1$, standard deviations of the prior")
    ax.set_ylabel("$z_2$, standard deviations of the prior")
    ax.set_aspect("equal", adjustable="datalim")
    title(ax, f"Codes of {name}, {means.about}")
    return ax


def kl_by_dimension(kl: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """The KL of each latent dimension, most used first: what is near zero is not used."""
    ax = new_axes(ax)
    for place, (name, values) in enumerate(kl.items()):
        ordered = np.sort(values.numpy())[::-1]
        at = np.arange(1, len(ordered) + 1) + (place - (len(kl) - 1) / 2) * 0.8 / len(kl)
        ax.bar(at, ordered, width=0.8 / len(kl), color=colour(place), label=name)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("latent dimension, most used first")
    ax.set_ylabel(f"KL(q || p), {NATS}")
    title(ax, "Which dimensions are used")
    legend_below(ax)
    return ax


def spectrum(spectrum_: Spectrum, ax: Axes | None = None) -> Axes:
    """Eigenvalues of the data, and the noise variances below which an axis collapses."""
    ax = new_axes(ax)
    values = spectrum_.eigenvalues.numpy()
    seen = values > 1e-9 * values[0]
    at = np.arange(1, len(values) + 1)
    leading = at <= spectrum_.latent_dim
    num_zero = int((~seen).sum())
    rest = "left to the noise" + (f" ({num_zero} more are zero)" if num_zero else "")
    kinds = (
        (seen & leading, BLUE, f"the {spectrum_.latent_dim} leading axes"),
        (seen & ~leading, GREY, rest),
    )
    for part, shade, name in kinds:
        ax.plot(at[part], values[part], "o", ms=4, color=shade, label=name)
    for place, (name, variance) in enumerate(spectrum_.noise.items()):
        off = len(spectrum_.collapsing(variance))
        label = f"{name}: $\\sigma^2$ = {variance:.3g}, {off} of {spectrum_.latent_dim} off"
        ax.axhline(variance, color=colour(place), lw=1.2, ls="--", label=label)
    log_scale(ax, "y")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("principal axis")
    unit = "standard deviations" if spectrum_.standardized else "units of the data"
    ax.set_ylabel(f"variance, squared {unit}")
    title(ax, "Axes above the noise")
    legend_below(ax, 2)
    return ax


def comparison_size(comparison_: Comparison) -> tuple[float, float]:
    """Width and height that :func:`comparison` needs, in inches."""
    return SIZE[0], 1.3 + 0.31 * len(comparison_.names)


def comparison(comparison_: Comparison, ax: Axes | None = None) -> Axes:
    """Held-out log p against the best model's, with paired standard errors."""
    ax = new_axes(ax, comparison_size(comparison_))
    at = np.arange(len(comparison_.names))
    sure = comparison_.reliable.numpy() >= FEW_RELIABLE
    value, error = comparison_.difference.numpy(), comparison_.difference_error.numpy()
    kinds = (
        (sure, BLUE, "± paired standard error"),
        (~sure, "white", "no more than a lower bound"),
    )
    for part, fill, name in kinds:
        if part.any():
            where: dict[str, Any] = {"x": value[part], "y": at[part], "xerr": error[part]}
            ax.errorbar(**where, fmt="o", ms=6, color=BLUE, mfc=fill, label=name)
    ax.axvline(0, color="black", lw=1, ls=":")
    ax.set_yticks(at, comparison_.names)
    ax.set_ylim(len(at) - 0.5, -0.5)
    ax.set_xlabel(f"held-out log p less the best one's, {NATS}")
    ax.set_ylabel("model")
    title(ax, "Who explains new data best")
    legend_below(ax, side="right")
    return ax
