"""What the pictures have in common: axes, colours, legends, tiles."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import offset_copy

from ppl_vae.data.image_grid import ImageGrid

SIZE = (5.2, 3.9)
"""Width and height of a picture in inches: narrow, so that its letters are legible on a phone."""
NATS = "nats per datum"
GREY, BLUE, ORANGE, GREEN = "#8a8a8a", "#3b75af", "#ef8636", "#519e3e"
PALETTE = (BLUE, ORANGE, GREEN, "#c53a32", "#8d69b8", "#84584e", "#d57dbe", "#616161", "#bcbd3a")
MISSING_COLOUR = "#f3d3b5"
"""The colour of a missing pixel."""
LEGEND_OFFSET = -36
"""Where a legend begins under its axes, in points: below the ticks and the label."""
SMALL = 8.5
"""Size of letters in legends and notes, in points."""


def new_axes(ax: Axes | None, size: tuple[float, float] = SIZE) -> Axes:
    """The axes themselves, or those of a new figure."""
    if ax is None:
        ax = plt.figure(figsize=size, layout="constrained").add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def title(ax: Axes, text: str) -> None:
    """The title, on the left, where a page's headings are."""
    ax.set_title(text, loc="left", fontsize=11)


def legend_below(ax: Axes, columns: int = 3, *, side: str = "center") -> None:
    """A legend under the axes and their label, where it hides nothing.

    ``side="right"`` is for axes with long names on their left, under which there is room.
    """
    _, labels = ax.get_legend_handles_labels()
    place: Any = f"upper {side}"
    figure: Any = ax.figure
    below = offset_copy(ax.transAxes, figure, y=LEGEND_OFFSET, units="points")
    ax.legend(
        loc=place,
        bbox_to_anchor=(0.5 if side == "center" else 1.0, 0),
        bbox_transform=below,
        ncols=min(columns, max(len(labels), 1)),
        frameon=False,
        borderpad=0,
        fontsize=SMALL,
        handlelength=1.4,
        columnspacing=1.2,
    )


def colour(place: int) -> str:
    """The colour of a line among others."""
    return PALETTE[place % len(PALETTE)]


def log_scale(ax: Axes, axis: str) -> None:
    """A logarithmic axis with few ticks; for less than a factor 10 a linear one.

    Args:
        ax: after everything is drawn on it.
        axis: ``"x"`` or ``"y"``.
    """
    one: Any = getattr(ax, f"{axis}axis")
    low, high = getattr(ax.dataLim, f"interval{axis}")
    if not 0 < 10 * low <= high:  # fewer than two ticks at 1, 2, 5 would be filled up with others
        one.set_major_locator(MaxNLocator(5))
        return
    getattr(ax, f"set_{axis}scale")("log")
    decades = np.log10(high / low)
    one.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)))
    if decades <= 2:
        one.set_major_formatter(StrMethodFormatter("{x:g}"))
    one.set_minor_formatter(NullFormatter())


def scatter_by_class(
    ax: Axes, points: Float[np.ndarray, "N 2"], labels: Sequence[Any] | None
) -> bool:
    """Points in the colours of their classes; whether there are 1 to 20, so that they have names.

    Args:
        ax: where to draw.
        points: with the coordinates across and up.
        labels: a class for each, or None.
    """
    size = min(max(4000 / len(points), 9.0), 30.0)
    classes = [] if labels is None else sorted(set(labels), key=_order)
    if labels is None or not 0 < len(classes) <= 20:
        ax.scatter(*points.T, s=size, color=BLUE, alpha=0.7, lw=0)
        return False
    number = np.array([classes.index(label) for label in labels])
    for place, value in enumerate(classes):
        shade = _class_colour(place, len(classes))
        ax.scatter(*points[number == place].T, s=size, color=shade, label=str(value), lw=0)
    return True


def _order(value: Any) -> tuple[bool, Any]:
    # Numbers before texts, each in their own order.
    return isinstance(value, str), value


def _class_colour(place: int, count: int) -> Any:
    wide: Any = matplotlib.colormaps["tab10" if count <= 10 else "tab20"]
    assert isinstance(wide, ListedColormap)
    return wide.colors[place]  # pyright: ignore[reportIndexIssue]


LOWEST, HIGHEST = 0.24, 2.0
"""Inches that a row of tiles may be high: room for its name, and for others."""


def _row_height(image_grid: ImageGrid) -> tuple[float, bool]:
    # In inches, and whether pixels are square at this height.
    shape = image_grid.image_shape or (3, 4)
    height = (SIZE[0] - 0.9) / image_grid.values.shape[1] * shape[0] / shape[1]
    return min(max(height, LOWEST), HIGHEST), LOWEST <= height <= HIGHEST


def tile_size(image_grid: ImageGrid) -> tuple[float, float]:
    """Width and height that tiles need, in inches."""
    labels = 0.95 + 0.2 * (image_grid.image_shape is None) + 0.2 * image_grid.has_missing
    return SIZE[0], max(1.6, len(image_grid.values) * _row_height(image_grid)[0] + labels)


def draw_tiles(image_grid: ImageGrid, ax: Axes) -> None:
    """Images on one grey scale, or profiles over the columns in their standard deviations."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    (_draw_images if image_grid.image_shape else _draw_profiles)(image_grid, ax)


def _draw_images(image_grid: ImageGrid, ax: Axes) -> None:
    assert image_grid.image_shape is not None
    (rows, columns, _), (high, wide) = image_grid.values.shape, image_grid.image_shape
    low, top = image_grid.limits
    canvas = np.full((rows * (high + 1) - 1, columns * (wide + 1) - 1), low)
    for r in range(rows):
        for c in range(columns):
            place = (
                slice(r * (high + 1), r * (high + 1) + high),
                slice(c * (wide + 1), c * (wide + 1) + wide),
            )
            canvas[place] = image_grid.values[r, c].reshape(high, wide).numpy()
    aspect = "equal" if _row_height(image_grid)[1] else "auto"
    grey = matplotlib.colormaps["gray_r"].with_extremes(bad=MISSING_COLOUR)
    ax.imshow(canvas, grey, aspect=aspect, vmin=low, vmax=top, interpolation="nearest")
    ax.set_xticks(
        [c * (wide + 1) + (wide - 1) / 2 for c in range(columns)], image_grid.column_labels
    )
    ax.set_yticks([r * (high + 1) + (high - 1) / 2 for r in range(rows)], image_grid.row_labels)


def _draw_profiles(image_grid: ImageGrid, ax: Axes) -> None:
    rows, columns, width = image_grid.values.shape
    heights = ((image_grid.values - image_grid.loc) / image_grid.scale).numpy()
    reach = max(float(np.nanmax(np.abs(heights))), 1e-12)
    along = np.linspace(0.06, 0.94, width) if width > 1 else np.array([0.5])
    for r in range(rows):
        for c in range(columns):
            ax.plot([c + 0.06, c + 0.94], [r + 0.5] * 2, color="#cccccc", linewidth=0.6)
            line = r + 0.5 - 0.45 * heights[r, c] / reach
            holes = np.pad(np.isnan(line), 1, constant_values=True)
            alone = ~holes[1:-1] & holes[:-2] & holes[2:]  # points of no line
            style = {"color": BLUE, "linewidth": 0.9, "marker": ".", "ms": 3}
            ax.plot(c + along, line, markevery=alone.nonzero()[0].tolist(), **style)
    ax.set_xlim(0, columns)
    ax.set_ylim(rows, 0)
    ax.set_xticks(np.arange(columns) + 0.5, image_grid.column_labels)
    ax.set_yticks(np.arange(rows) + 0.5, image_grid.row_labels)
