"""Pictures of topics, which compute nothing but where to draw."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from ppl_vae.plots.drawing import GREY, SIZE, colour, legend_below, new_axes, title

SHOWN = 5
"""So many topics have a colour of their own."""


def gradation(
    shares: Float[Tensor, "T K"],
    words: Sequence[Sequence[str]],
    ends: tuple[str, str],
    ax: Axes | None = None,
) -> Axes:
    """How the topics change by degrees on the way from one document to another.

    Args:
        shares: of the K topics at each of T positions, at equal distances; rows sum to one.
        words: some of each topic's, for the legend.
        ends: what the two documents are called.
        ax: where to draw.
    """
    ax = new_axes(ax, (SIZE[0], 4.6))
    order: list[int] = shares.amax(0).argsort(descending=True)[:SHOWN].tolist()
    at = np.linspace(0, 1, len(shares))
    parts = [shares[:, k].numpy() for k in order]
    rest = (shares.sum(1) - shares[:, order].sum(1)).numpy()
    shades = [*map(colour, range(len(order))), GREY]
    names = [" ".join(words[k]) for k in order]
    ax.stackplot(at, *parts, rest, colors=shades, labels=[*names, "all others"], lw=0)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.set_xlabel(f"position between {ends[0]} (0) and {ends[1]} (1)")
    ax.set_ylabel("share of each topic")
    title(ax, "From one document to another, by degrees")
    legend_below(ax, 1)
    return ax
