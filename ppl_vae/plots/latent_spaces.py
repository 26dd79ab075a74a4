"""Pictures of latent spaces side by side, which compute nothing but where to draw."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppl_vae.evaluation.latent_space.embeddings import Embedding, Embeddings
from ppl_vae.evaluation.latent_space.latent_spaces import LatentSpace, LatentSpaces
from ppl_vae.plots.drawing import SMALL, new_axes, scatter_by_class, title

ACROSS = 2
"""Spaces beside one another; more stand below."""
EACH = (3.9, 4.1)
"""Inches of one of them."""


def latent_space(
    space: LatentSpace, labels: tuple[Any, ...] | None = None, ax: Axes | None = None
) -> Axes:
    """The codes of data in the two latent dimensions that are used most; below it, log p.

    Args:
        space: of a pair.
        labels: a class for each datum.
        ax: where to draw.
    """
    ax = new_axes(ax, EACH)
    scatter_by_class(ax, space.codes.numpy(), labels)
    names = [f"$z_{{{dimension + 1}}}$, sds of the prior" for dimension in space.leading]
    active = f"{int(space.active.sum())} of {space.latent_dim} dimensions active"
    ax.set_xlabel(f"{names[0]}\nlog p {space.log_p}\n{active}", fontsize=SMALL)
    ax.set_ylabel(names[1], fontsize=SMALL)
    ax.set_aspect("equal", adjustable="datalim")
    chosen = "" if space.latent_dim == 2 else f": the most used 2 of {space.latent_dim}"
    title(ax, f"{space.name}{chosen}")
    return ax


def latent_spaces(spaces: LatentSpaces) -> Figure:
    """All of them, two beside one another, with one legend below."""
    drawn = [partial(latent_space, space, spaces.labels) for space in spaces.spaces]
    return _side_by_side(drawn)


def one_map(
    found: Embedding, labels: tuple[Any, ...], neighbours: int, ax: Axes | None = None
) -> Axes:
    """Held-out data where a pair puts them on its plane; below it, what the map keeps of them.

    Args:
        found: of a pair.
        labels: a class for each datum.
        neighbours: that the accuracy is by.
        ax: where to draw.
    """
    ax = new_axes(ax, EACH)
    scatter_by_class(ax, found.codes.numpy(), labels)
    error = "squared error {:.3f} ± {:.3f} a datum".format(*found.mean_error)
    share, sure = (100 * value for value in found.accuracy)
    right = f"{share:.1f} ± {sure:.1f} % rightly named by {neighbours} neighbours"
    ax.set_xlabel(f"$z_1$, units of the code\n{error}\n{right}", fontsize=SMALL)
    ax.set_ylabel("$z_2$, units of the code", fontsize=SMALL)
    ax.set_aspect("equal", adjustable="datalim")
    title(ax, found.name)
    return ax


def maps(found: Embeddings) -> Figure:
    """All of them, two beside one another, with one legend below."""
    how = (found.labels, found.neighbours)
    return _side_by_side([partial(one_map, each, *how) for each in found.embeddings])


def _side_by_side(drawn: Sequence[Callable[[Axes], Axes]]) -> Figure:
    across = min(ACROSS, len(drawn))
    down = math.ceil(len(drawn) / across)
    size = (EACH[0] * across, EACH[1] * down + 0.5)
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for ax in grid.flat[len(drawn) :]:
        ax.remove()
    for draw, ax in zip(drawn, grid.flat, strict=False):
        draw(ax)
    handles, names = grid[0, 0].get_legend_handles_labels()
    if names:
        below: Any = "outside lower center"
        columns = min(5 * across, len(names))
        figure.legend(handles, names, loc=below, ncols=columns, frameon=False, fontsize=SMALL)
    return figure
