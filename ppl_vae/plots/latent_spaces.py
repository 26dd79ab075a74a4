"""Plots of latent spaces: codes, the use of latent dimensions, and the spectrum of the data."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ppl_vae.core.text import counted
from ppl_vae.evaluation.latent_space.embeddings import Embedding, Embeddings
from ppl_vae.evaluation.latent_space.latent_spaces import LatentSpace, LatentSpaces
from ppl_vae.evaluation.latent_space.spectrum import Spectrum
from ppl_vae.lineage.latent_means import LatentMeans
from ppl_vae.plots.axes import (
    BLUE,
    GREY,
    NATS,
    SIZE,
    SMALL,
    colour,
    legend_below,
    log_scale,
    new_axes,
    scatter_by_class,
    title,
)

NUM_COLUMNS = 2
"""The number of panels in a row of a figure with several latent spaces."""
PANEL_SIZE = (3.9, 4.1)
"""Width and height of a panel, in inches."""
MEANS_SIZE = (SIZE[0], 4.6)


def plot_latent_space(
    space: LatentSpace, labels: tuple[Any, ...] | None = None, ax: Axes | None = None
) -> Axes:
    """Plot the codes of data in the two latent dimensions with the largest KL.

    The label of the axis reports log p and the number of active dimensions.

    Args:
        space: the latent space of a pair.
        labels: the class of each datum.
        ax: the axes to plot on.
    """
    ax = new_axes(ax, PANEL_SIZE)
    scatter_by_class(ax, space.codes.numpy(force=True), labels)
    names = [f"$z_{{{dimension + 1}}}$, sds of the prior" for dimension in space.leading]
    active = f"{int(space.active.sum())} of {counted(space.latent_dim, 'dimension')} active"
    ax.set_xlabel(f"{names[0]}\nlog p {space.log_p}, nats per datum\n{active}", fontsize=SMALL)
    ax.set_ylabel(names[1], fontsize=SMALL)
    ax.set_aspect("equal", adjustable="datalim")
    selected = "" if space.latent_dim == 2 else f": the most used 2 of {space.latent_dim}"
    title(ax, f"{space.name}{selected}")
    return ax


def plot_latent_spaces(spaces: LatentSpaces) -> Figure:
    """Plot several latent spaces side by side, with one legend."""
    panels = [partial(plot_latent_space, space, spaces.labels) for space in spaces.spaces]
    return _side_by_side(panels)


def plot_embedding(
    found: Embedding, labels: tuple[Any, ...], neighbours: int, ax: Axes | None = None
) -> Axes:
    """Plot the two-dimensional codes of held-out data.

    The label of the axis reports the reconstruction error and the accuracy of nearest neighbours.

    Args:
        found: the embedding of a pair.
        labels: the class of each datum.
        neighbours: the number of nearest neighbours.
        ax: the axes to plot on.
    """
    ax = new_axes(ax, PANEL_SIZE)
    scatter_by_class(ax, found.codes.numpy(force=True), labels)
    error = "squared error {:.3f} ± {:.3f} per datum".format(*found.mean_squared_error)
    mean, standard_error = (100 * value for value in found.accuracy)
    accuracy = f"accuracy of {neighbours} neighbours {mean:.1f} ± {standard_error:.1f} %"
    ax.set_xlabel(f"$z_1$, units of the code\n{error}\n{accuracy}", fontsize=SMALL)
    ax.set_ylabel("$z_2$, units of the code", fontsize=SMALL)
    ax.set_aspect("equal", adjustable="datalim")
    title(ax, found.name)
    return ax


def plot_embeddings(found: Embeddings) -> Figure:
    """Plot several embeddings side by side, with one legend."""
    return _side_by_side(
        [
            partial(plot_embedding, each, found.labels, found.neighbours)
            for each in found.embeddings
        ]
    )


def _side_by_side(panels: Sequence[Callable[[Axes], Axes]]) -> Figure:
    columns = min(NUM_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (PANEL_SIZE[0] * columns, PANEL_SIZE[1] * rows + 0.5)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.remove()
    for draw, ax in zip(panels, grid.flat, strict=False):
        draw(ax)
    handles, names = grid[0, 0].get_legend_handles_labels()
    if names:
        below: Any = "outside lower center"
        num_columns = min(5 * columns, len(names))
        figure.legend(handles, names, loc=below, ncols=num_columns, frameon=False, fontsize=SMALL)
    return figure


def plot_latent_means(means: LatentMeans, ax: Axes | None = None, *, name: str = "") -> Axes:
    """Plot the mean of q(z|x) of each datum, coloured by class if there are classes.

    Args:
        means: the latent means of a pair with two latent dimensions.
        ax: the axes to plot on.
        name: the name of the pair, for the title.
    """
    ax = new_axes(ax, MEANS_SIZE)
    if scatter_by_class(ax, means.means.numpy(force=True), means.labels):
        legend_below(ax, 5)
    ax.set_xlabel("$z_1$, standard deviations of the prior")
    ax.set_ylabel("$z_2$, standard deviations of the prior")
    ax.set_aspect("equal", adjustable="datalim")
    title(ax, f"Posterior means of {name}, {means.remark}")
    return ax


def plot_kl_by_dimension(kl: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Plot the KL of each latent dimension in decreasing order; a value near zero is collapsed.

    Args:
        kl: by model, (K,) each, in nats per datum.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    for index, (name, values) in enumerate(kl.items()):
        ordered = np.sort(values.numpy(force=True))[::-1]
        at = np.arange(1, len(ordered) + 1) + (index - (len(kl) - 1) / 2) * 0.8 / len(kl)
        ax.bar(at, ordered, width=0.8 / len(kl), color=colour(index), label=name)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("latent dimension, in decreasing order of KL")
    ax.set_ylabel(f"KL(q || p), {NATS}")
    title(ax, "KL of each latent dimension")
    legend_below(ax)
    return ax


def plot_spectrum(spectrum: Spectrum, ax: Axes | None = None) -> Axes:
    """Plot the eigenvalues of the data, and the noise variances below which an axis collapses.

    Args:
        spectrum: a result of :func:`ppl_vae.spectrum`.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    values = spectrum.eigenvalues.numpy(force=True)
    positive = values > 1e-9 * values[0]
    at = np.arange(1, len(values) + 1)
    leading = at <= spectrum.latent_dim
    num_zero = int((~positive).sum())
    rest = "discarded axes" + (f" ({num_zero} more are zero)" if num_zero else "")
    kinds = (
        (positive & leading, BLUE, f"{spectrum.latent_dim} leading axes"),
        (positive & ~leading, GREY, rest),
    )
    for part, part_colour, name in kinds:
        ax.plot(at[part], values[part], "o", ms=4, color=part_colour, label=name)
    for index, (name, variance) in enumerate(spectrum.noise.items()):
        collapsed = len(spectrum.collapsing(variance))
        label = (
            f"{name}: $\\sigma^2$ = {variance:.3g}, {collapsed} of {spectrum.latent_dim} collapse"
        )
        ax.axhline(variance, color=colour(index), lw=1.2, ls="--", label=label)
    log_scale(ax, "y")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("principal axis")
    unit = "standard deviations" if spectrum.standardized else "units of the data"
    ax.set_ylabel(f"variance, squared {unit}")
    title(ax, "Eigenvalues and noise variance")
    legend_below(ax, 2)
    return ax
