"""Shared parts of the plots: axes, colours, legends, grids of images."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import offset_copy

from ppl_vae.data.image_grid import ImageGrid

SIZE = (5.2, 3.9)
"""Width and height of a figure in inches, narrow enough for its text to be legible on a phone."""
NATS = "nats per datum"
GREY, BLUE, ORANGE, GREEN = "#8a8a8a", "#3b75af", "#ef8636", "#519e3e"
PALETTE = (BLUE, ORANGE, GREEN, "#c53a32", "#8d69b8", "#84584e")
"""The hues of lines and classes; where there are more than six, styles and markers differ too."""
LINE_STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "v")
MISSING_COLOUR = "#f3d3b5"
"""The colour of a missing pixel."""
LEGEND_OFFSET = -36
"""Vertical offset of a legend from its axes, in points: below the ticks and the label."""
SMALL = 8.5
"""Font size of legends and notes, in points."""


def new_axes(ax: Axes | None, size: tuple[float, float] = SIZE) -> Axes:
    """These axes, or those of a new figure, without spines on the top and on the right."""
    if ax is None:
        ax = plt.figure(figsize=size, layout="constrained").add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def title(ax: Axes, text: str) -> None:
    """Set a left-aligned title."""
    ax.set_title(text, loc="left", fontsize=11)


def legend_below(ax: Axes, columns: int = 3, *, side: str = "center") -> None:
    """Draw a legend below the axes and their label.

    Args:
        ax: the axes, after everything is drawn on them.
        columns: maximal number of columns.
        side: ``"center"``, or ``"right"`` for axes with long tick labels on the left.
    """
    _, labels = ax.get_legend_handles_labels()
    corner: Any = f"upper {side}"
    figure: Any = ax.figure
    below = offset_copy(ax.transAxes, figure, y=LEGEND_OFFSET, units="points")
    ax.legend(
        loc=corner,
        bbox_to_anchor=(0.5 if side == "center" else 1.0, 0),
        bbox_transform=below,
        ncols=min(columns, max(len(labels), 1)),
        frameon=False,
        borderpad=0,
        fontsize=SMALL,
        handlelength=1.4,
        columnspacing=1.2,
    )


def colour(index: int) -> str:
    """The colour of the line or class number ``index``; it repeats after six."""
    return PALETTE[index % len(PALETTE)]


def line_style(index: int) -> str:
    """The style of the line number ``index``, which differs between lines of one colour."""
    return LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)]


def log_scale(ax: Axes, axis: str) -> None:
    """Set a logarithmic axis with few ticks; a linear one if the range is below a factor of 10.

    Args:
        ax: the axes, after everything is drawn on them.
        axis: ``"x"`` or ``"y"``.
    """
    one: Any = getattr(ax, f"{axis}axis")
    low, high = getattr(ax.dataLim, f"interval{axis}")
    if not 0 < 10 * low <= high:  # with fewer than two ticks at 1, 2, 5 Matplotlib adds others
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
    """Draw points in the colours and markers of their classes, if these are at most 20.

    Args:
        ax: the axes to plot on.
        points: their horizontal and vertical coordinates.
        labels: the class of each point, or None.

    Returns:
        Whether there are 1 to 20 classes, so that a legend is useful.
    """
    size = min(max(4000 / len(points), 9.0), 30.0)
    classes = [] if labels is None else sorted(set(labels), key=_order)
    if labels is None or not 0 < len(classes) <= 20:
        ax.scatter(*points.T, s=size, color=BLUE, alpha=0.7, lw=0)
        return False
    number = np.array([classes.index(label) for label in labels])
    for index, value in enumerate(classes):
        ax.scatter(
            *points[number == index].T,
            s=size,
            color=colour(index),
            marker=MARKERS[index // len(PALETTE)],
            label=str(value),
            lw=0,
        )
    return True


def _order(value: Any) -> tuple[bool, Any]:
    # Numbers are sorted before strings.
    return isinstance(value, str), value


MIN_ROW_HEIGHT, MAX_ROW_HEIGHT = 0.24, 2.0
"""Limits of the height of a row of images, in inches: space for its label, and for other rows."""


CELL_HEIGHT = 0.17
"""The height of a row of cells, in inches, which its name needs."""
MAX_NAMED, MAX_NAME_LENGTH = 24, 18
"""The number of columns of a table that are shown, and the length of their names."""


def _row_height(image_grid: ImageGrid) -> tuple[float, bool]:
    # The height of a row of images in inches, and whether pixels are square at this height.
    assert image_grid.image_shape is not None
    height, width = image_grid.image_shape
    natural = (SIZE[0] - 0.9) / image_grid.values.shape[1] * height / width
    limited = min(max(natural, MIN_ROW_HEIGHT), MAX_ROW_HEIGHT)
    return limited, limited == natural


def image_grid_size(image_grid: ImageGrid) -> tuple[float, float]:
    """Width and height that :func:`draw_image_grid` needs, in inches."""
    labels = 0.95 + 0.2 * image_grid.has_missing
    if image_grid.image_shape is None:
        return SIZE[0], max(2.2, 0.9 + labels + CELL_HEIGHT * len(_shown_columns(image_grid)))
    return SIZE[0], max(1.6, len(image_grid.values) * _row_height(image_grid)[0] + labels)


def draw_image_grid(image_grid: ImageGrid, ax: Axes) -> None:
    """Draw images on a common grey scale, or cells of a table with their columns named.

    A table has a block of cells for each row of the grid: one line per column of the data, and in
    it one cell per column of the grid.
    """
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    (_draw_images if image_grid.image_shape else _plot_heatmap)(image_grid, ax)


def heatmap_notes(image_grid: ImageGrid) -> list[str]:
    """What the colours of cells mean, and which columns of the data are drawn."""
    limit = _standardized(image_grid)[1]
    notes = [
        "colour: standard deviations from the mean,",
        f"{-limit:.1f} (blue) to {limit:.1f} (red)",
    ]
    number, shown = len(image_grid.names), len(_shown_columns(image_grid))
    return [*notes, *[f"{shown} of {number} columns, evenly spaced"] * (shown < number)]


def _shown_columns(image_grid: ImageGrid) -> list[int]:
    number = len(image_grid.names)
    return np.linspace(0, number - 1, min(number, MAX_NAMED)).round().astype(int).tolist()


def _standardized(image_grid: ImageGrid) -> tuple[Float[np.ndarray, "R C D"], float]:
    # The drawn columns in their standard deviations, and the limit of the colours.
    values = ((image_grid.values - image_grid.loc) / image_grid.scale).numpy(force=True)
    values = values[..., _shown_columns(image_grid)]
    return values, max(float(np.nanmax(np.abs(values))), 1e-12)


def shortened(name: str, length: int = MAX_NAME_LENGTH) -> str:
    """A name of at most this length, with an ellipsis where it is cut."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def axis_names(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Names of columns as they stand on an axis.

    Long names lose their middle, in which names of one table differ least, and get an ellipsis. A
    name with characters that the font does not have is replaced by the number of the column, and
    one that is the same as another on the axis gets it in front.

    Args:
        names: the names of all columns.
        numbers: those that are named, from 0.
    """
    shown = [_axis_name(names[k], k) for k in numbers]
    return [
        f"{k + 1}: {name.partition('…')[0]}…" if shown.count(name) > 1 else name
        for k, name in zip(numbers, shown, strict=True)
    ]


def _axis_name(name: str, number: int) -> str:
    name = " ".join(name.split())
    font = get_font(findfont(FontProperties()))
    if not all(font.get_char_index(ord(character)) for character in name):
        return f"column {number + 1}"
    if len(name) > MAX_NAME_LENGTH:
        half = MAX_NAME_LENGTH // 2
        name = f"{name[:half]}…{name[half + 1 - MAX_NAME_LENGTH :]}"
    return name.replace("$", r"\$")


def _draw_images(image_grid: ImageGrid, ax: Axes) -> None:
    assert image_grid.image_shape is not None
    (rows, columns, _), (height, width) = image_grid.values.shape, image_grid.image_shape
    low, high = image_grid.limits
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), low)
    for r in range(rows):
        for c in range(columns):
            top, left = r * (height + 1), c * (width + 1)
            image = image_grid.values[r, c].reshape(height, width).numpy(force=True)
            canvas[top : top + height, left : left + width] = image
    aspect = "equal" if _row_height(image_grid)[1] else "auto"
    grey = matplotlib.colormaps["gray_r"].with_extremes(bad=MISSING_COLOUR)
    ax.imshow(canvas, grey, aspect=aspect, vmin=low, vmax=high, interpolation="nearest")
    centres = [c * (width + 1) + (width - 1) / 2 for c in range(columns)]
    ax.set_xticks(centres, image_grid.column_labels)
    centres = [r * (height + 1) + (height - 1) / 2 for r in range(rows)]
    ax.set_yticks(centres, image_grid.row_labels)


def _plot_heatmap(image_grid: ImageGrid, ax: Axes) -> None:
    values, limit = _standardized(image_grid)
    (rows, columns, width), gap = values.shape, 1
    canvas = np.zeros((width, rows * (columns + gap) - gap))
    for r in range(rows):
        left = r * (columns + gap)
        canvas[:, left : left + columns] = values[r].T
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=MISSING_COLOUR)
    ax.imshow(canvas, colours, aspect="auto", vmin=-limit, vmax=limit, interpolation="nearest")
    for r in range(1, rows):
        between = r * (columns + gap) - 1
        ax.axvspan(between - 0.5, between + 0.5, color="white", lw=0)
    centres = [r * (columns + gap) + (columns - 1) / 2 for r in range(rows)]
    ax.set_xticks(centres, [shortened(label) for label in image_grid.row_labels])
    if rows > 4:
        ax.tick_params(axis="x", labelrotation=90)
    names = axis_names(image_grid.names, _shown_columns(image_grid))
    ax.set_yticks(range(width), names, fontsize=SMALL)
