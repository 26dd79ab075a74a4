"""Plots of dictionaries and of the sparse lineage."""

import math
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from ppl_vae.evaluation.latent_space.atoms import Atoms
from ppl_vae.lineage.sparse_metrics import CodeMetrics
from ppl_vae.lineage.sparse_run import SparseLineage
from ppl_vae.plots.axes import GREY, NATS, ORANGE, SIZE, legend_below, new_axes, title

DICTIONARY_COLOUR, CODES_COLOUR = "#9a9a9a", ORANGE
COLORMAP = "RdBu_r"
BACKGROUND = "#d8d8d8"
"""The colour between atoms."""
COLOUR_QUANTILE = 0.995
"""The quantile of the absolute entries at which the colour scale saturates."""
MARGIN, MIN_HEIGHT = 1.6, 3.4
"""Inches to the left and right of the atoms; minimal height of the figure, for its labels."""
HELD_OUT_ALPHA = 0.5
"""The opacity of the bars of held-out rows."""
WIDTH_FACTOR = 1.45
"""Width of the axes relative to the longest bar of a fit, with space for the numbers."""


def plot_atoms(
    atoms: Atoms,
    ax: Axes | None = None,
    *,
    image_shape: tuple[int, int] | None = None,
    num_columns: int = 10,
    heading: str = "Atoms in decreasing order of use",
) -> Axes:
    """Plot the atoms of a dictionary, as images or as rows of a matrix, on a symmetric scale.

    Args:
        atoms: a result of :func:`ppl_vae.evaluation.latent_space.atoms.atoms`.
        ax: the axes to plot on.
        image_shape: height and width of an atom; without it each is a row of a matrix.
        num_columns: the number of images in a row.
        heading: the title.
    """
    values = atoms.atoms.double().numpy(force=True)
    limit = float(np.quantile(np.abs(values), COLOUR_QUANTILE))
    canvas = values if image_shape is None else _mosaic(values, image_shape, num_columns)
    ratio = min(canvas.shape[0] / canvas.shape[1], 1.5)
    ax = new_axes(ax, (SIZE[0], max((SIZE[0] - MARGIN) * ratio + 0.8, MIN_HEIGHT)))
    extent = None
    if image_shape is None:  # atoms and columns are counted from one
        extent = (0.5, canvas.shape[1] + 0.5, canvas.shape[0] + 0.5, 0.5)
    image = ax.imshow(
        canvas,
        COLORMAP,
        aspect="equal" if image_shape else "auto",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
        extent=extent,
    )
    figure: Any = ax.figure
    label = "entry of an atom of length 1"
    figure.colorbar(image, ax=ax, shrink=0.7, extend="both", label=label)
    if image_shape is None:
        ax.set_xlabel("column of the data")
        ax.set_ylabel("rank of the atom, by mean |z|")
    else:
        _label_rows(ax, len(values), image_shape[0], num_columns)
    title(ax, heading)
    return ax


def _label_rows(ax: Axes, num_atoms: int, height: int, num_columns: int) -> None:
    ax.set_facecolor(BACKGROUND)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_xticks([])
    rows = np.arange(-(-num_atoms // num_columns))
    centres = rows * (height + 1) + (height - 1) / 2
    ax.set_yticks(centres, [str(row * num_columns + 1) for row in rows])
    ax.set_xlabel(f"{num_columns} atoms per row")
    ax.set_ylabel("rank of the first atom, by mean |z|")


def _mosaic(
    values: Float[np.ndarray, "K D"], shape: tuple[int, int], num_columns: int
) -> Float[np.ndarray, "H W"]:
    height, width = shape
    num_rows = -(-len(values) // num_columns)
    size = (num_rows * (height + 1) - 1, num_columns * (width + 1) - 1)
    canvas = np.full(size, np.nan)
    for k, value in enumerate(values):
        top, left = k // num_columns * (height + 1), k % num_columns * (width + 1)
        canvas[top : top + height, left : left + width] = value.reshape(height, width)
    return canvas


def sparse_lineage_size(lineage: SparseLineage) -> tuple[float, float]:
    """Width and height that :func:`plot_sparse_lineage` needs, in inches."""
    return SIZE[0] + 1, 1.5 + 0.5 * len(lineage.rows)


def plot_sparse_lineage(lineage: SparseLineage, ax: Axes | None = None) -> Axes:
    """Plot each stage's loss in log p(x, z), due to its dictionary and due to its codes.

    The upper bar of a stage is of the training rows, the lower, paler one of held-out rows. A
    dictionary that is better than the reference's has a bar to the left of zero. Bars of stages
    that were not fitted may be truncated; the numbers give the full loss.

    Args:
        lineage: a result of :func:`ppl_vae.lineage.run_sparse_lineage`.
        ax: the axes to plot on.
    """
    ax = new_axes(ax, sparse_lineage_size(lineage))
    fitted = [row for row in lineage.rows if row.fit is not None]
    metrics = [each for row in fitted for each in (row.train, row.test)]
    longest = max(each.loss for each in metrics)
    lowest = min(0.0, *(each.dictionary for each in metrics))
    edge = max(longest, 1e-3)
    for index, row in enumerate(lineage.rows):
        _bar(ax, row.train, index - 0.2, 1.0, edge)
        _bar(ax, row.test, index + 0.2, HELD_OUT_ALPHA, edge)
    ax.set_xlim(1.15 * lowest, WIDTH_FACTOR * edge)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(range(len(lineage.rows)), [row.stage for row in lineage.rows])
    ax.invert_yaxis()
    ax.set_xlabel(f"loss in log p(x, z), {NATS}")
    ax.set_ylabel("stage")
    title(ax, "Loss due to dictionary and codes")
    _legend(ax)
    return ax


def _bar(ax: Axes, metrics: CodeMetrics, at: float, alpha: float, edge: float) -> None:
    codes = 0.0 if math.isnan(metrics.amortization) else metrics.amortization
    bar = partial(ax.barh, at, height=0.36, alpha=alpha, lw=0)
    bar(metrics.dictionary, color=DICTIONARY_COLOUR)
    # The bar of the codes starts at the end of the dictionary's loss, or at zero after a gain.
    start = max(metrics.dictionary, 0.0)
    bar(codes, left=start, color=CODES_COLOUR)
    end = start + codes
    text = "0" if abs(metrics.loss) < 5e-3 else f"{metrics.loss:.2f}"
    if end > 1.2 * edge:
        text, x, align = f"{text} (truncated)", 0.99 * WIDTH_FACTOR * edge, "right"
    else:
        x, align = end + 0.015 * edge, "left"
    ax.text(x, at, text, ha=align, va="center", fontsize=8, clip_on=True)


def _legend(ax: Axes) -> None:
    for part_colour, name, alpha in (
        (DICTIONARY_COLOUR, "dictionary", 1.0),
        (CODES_COLOUR, "codes: amortization", 1.0),
        (GREY, "paler: held-out rows", HELD_OUT_ALPHA),
    ):
        ax.barh(0, 0, color=part_colour, alpha=alpha, label=name, lw=0)
    legend_below(ax, 3, side="right")
