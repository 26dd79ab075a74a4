"""Pictures of dictionaries and of the lineage of sparse codes, which compute nothing."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from ppl_vae.evaluation.latent_space.atoms import Atoms
from ppl_vae.lineage.sparse_metrics import Coded
from ppl_vae.lineage.sparse_run import SparseLineage
from ppl_vae.plots.drawing import GREY, NATS, ORANGE, SIZE, legend_below, new_axes, title

DICTIONARY, CODES = "#9a9a9a", ORANGE
COLOURS = "RdBu_r"
BETWEEN = "#d8d8d8"
"""The colour between atoms."""
SEEN = 0.995
"""The share of entries that the scale of colours spans; the others are as dark as can be."""
BESIDE, LOWEST = 1.6, 3.4
"""Inches left and right of the atoms; the least height, for what is written along it."""
HELD_OUT = 0.5
"""How pale the bars of held-out rows are."""
ROOM = 1.45
"""The axes are this times as wide as the longest bar of a fit: room for what is written."""


def atoms(
    atoms_: Atoms,
    ax: Axes | None = None,
    *,
    image_shape: tuple[int, int] | None = None,
    across: int = 10,
    heading: str = "Atoms, the most used first",
) -> Axes:
    """The atoms of a dictionary along rows, as images if they are, on one scale about zero.

    Args:
        atoms_: what :func:`ppl_vae.evaluation.latent_space.atoms.atoms` gave.
        ax: where to draw.
        image_shape: height and width of an atom; without it each is a row of one picture.
        across: so many images beside one another.
        heading: the title.
    """
    values = atoms_.atoms.double().numpy()
    reach = float(np.quantile(np.abs(values), SEEN))
    canvas = values if image_shape is None else _mosaic(values, image_shape, across)
    ratio = min(canvas.shape[0] / canvas.shape[1], 1.5)
    ax = new_axes(ax, (SIZE[0], max((SIZE[0] - BESIDE) * ratio + 0.8, LOWEST)))
    scale: dict[str, Any] = {"vmin": -reach, "vmax": reach, "interpolation": "nearest"}
    if image_shape is None:  # atoms and columns are counted from one
        scale["extent"] = (0.5, canvas.shape[1] + 0.5, canvas.shape[0] + 0.5, 0.5)
    drawn = ax.imshow(canvas, COLOURS, aspect="equal" if image_shape else "auto", **scale)
    figure: Any = ax.figure
    label = "entry of an atom, whose length is 1"
    figure.colorbar(drawn, ax=ax, shrink=0.7, extend="both", label=label)
    if image_shape is None:
        ax.set_xlabel("column of the data")
        ax.set_ylabel("rank of the atom, by mean |z|")
    else:
        _label_rows(ax, len(values), image_shape[0], across)
    title(ax, heading)
    return ax


def _label_rows(ax: Axes, number: int, high: int, across: int) -> None:
    ax.set_facecolor(BETWEEN)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_xticks([])
    rows = np.arange(-(-number // across))
    ax.set_yticks(rows * (high + 1) + (high - 1) / 2, [str(row * across + 1) for row in rows])
    ax.set_xlabel(f"{across} atoms a row")
    ax.set_ylabel("rank of the row's first atom, by mean |z|")


def _mosaic(
    values: Float[np.ndarray, "K D"], shape: tuple[int, int], across: int
) -> Float[np.ndarray, "H W"]:
    high, wide = shape
    down = -(-len(values) // across)
    canvas = np.full((down * (high + 1) - 1, across * (wide + 1) - 1), np.nan)
    for k, value in enumerate(values):
        top, left = k // across * (high + 1), k % across * (wide + 1)
        canvas[top : top + high, left : left + wide] = value.reshape(high, wide)
    return canvas


def sparse_lineage_size(ladder: SparseLineage) -> tuple[float, float]:
    """Width and height that :func:`plot_sparse_lineage` needs, in inches."""
    return SIZE[0] + 1, 1.5 + 0.5 * len(ladder.rows)


def plot_sparse_lineage(ladder: SparseLineage, ax: Axes | None = None) -> Axes:
    """What each stage loses in log p(x, z): for its dictionary, and for how its codes are found.

    The upper bar of each is of the training rows, the lower, paler one of held-out rows. A bar
    left of zero is a dictionary that is better than the reference's. Bars of what was not fitted
    may be cut at the edge; the numbers say how long they are.
    """
    ax = new_axes(ax, sparse_lineage_size(ladder))
    fitted = [row for row in ladder.rows if row.fit is not None]
    longest = max(coded.lost for row in fitted for coded in (row.train, row.test))
    lowest = min(0.0, *(coded.dictionary for row in fitted for coded in (row.train, row.test)))
    edge = max(longest, 1e-3)
    for place, row in enumerate(ladder.rows):
        for coded, at, alpha in ((row.train, place - 0.2, 1.0), (row.test, place + 0.2, HELD_OUT)):
            _bar(ax, coded, at, alpha, edge)
    ax.set_xlim(1.15 * lowest, ROOM * edge)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(range(len(ladder.rows)), [row.stage for row in ladder.rows])
    ax.invert_yaxis()
    ax.set_xlabel(f"log p(x, z) lost, {NATS}")
    ax.set_ylabel("stage")
    title(ax, "What each dictionary and its codes lose")
    _legend(ax)
    return ax


def _bar(ax: Axes, coded: Coded, at: float, alpha: float, edge: float) -> None:
    codes = 0.0 if math.isnan(coded.amortization) else coded.amortization
    how = {"height": 0.36, "alpha": alpha, "lw": 0}
    ax.barh(at, coded.dictionary, color=DICTIONARY, **how)
    # Beside the dictionary's part where that is a loss; from zero where it is a gain.
    ax.barh(at, codes, left=max(coded.dictionary, 0.0), color=CODES, **how)
    end = max(coded.dictionary, 0.0) + codes
    lost = "0" if abs(coded.lost) < 5e-3 else f"{coded.lost:.2f}"
    text = lost + (" (cut)" if end > 1.2 * edge else "")
    ax.text(min(end, 1.2 * edge) + 0.015 * edge, at, text, va="center", fontsize=8, clip_on=True)


def _legend(ax: Axes) -> None:
    for shade, name, alpha in (
        (DICTIONARY, "dictionary", 1.0),
        (CODES, "codes: amortization", 1.0),
        (GREY, "paler: held-out rows", HELD_OUT),
    ):
        ax.barh(0, 0, color=shade, alpha=alpha, label=name, lw=0)
    legend_below(ax, 3, side="right")
