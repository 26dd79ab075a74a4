"""A plot of the topics of a sequence of documents."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from ppl_vae.plots.axes import GREY, SIZE, colour, legend_below, new_axes, title

NUM_COLOURED = 5
"""The number of topics with a colour; the others are grey."""


def plot_topic_interpolation(
    shares: Float[Tensor, "T K"],
    words: Sequence[Sequence[str]],
    ends: tuple[str, str],
    ax: Axes | None = None,
) -> Axes:
    """Plot the shares of the topics along an interpolation between two documents.

    Args:
        shares: the proportions of the K topics at each of T equidistant positions; rows sum to
            one.
        words: some words of each topic, for the legend.
        ends: the names of the two documents.
        ax: the axes to plot on.
    """
    ax = new_axes(ax, (SIZE[0], 4.6))
    order: list[int] = shares.amax(0).argsort(descending=True)[:NUM_COLOURED].tolist()
    at = np.linspace(0, 1, len(shares))
    parts = [shares[:, k].numpy(force=True) for k in order]
    rest = (shares.sum(1) - shares[:, order].sum(1)).numpy(force=True)
    colours = [*map(colour, range(len(order))), GREY]
    names = [" ".join(words[k]) for k in order]
    ax.stackplot(at, *parts, rest, colors=colours, labels=[*names, "all others"], lw=0)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.set_xlabel(f"position between {ends[0]} (0) and {ends[1]} (1)")
    ax.set_ylabel("share of each topic")
    title(ax, "Interpolation between two documents")
    legend_below(ax, 1)
    return ax
