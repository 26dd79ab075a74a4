"""Checks of figures: texts do not overlap, axes have units."""

import itertools
import re

from matplotlib.text import Text

UNITS = re.compile(
    r"nats per datum|iterations|steps|seconds|squared units|standard deviations|no unit|axis|datum"
    r"|row|draw|position|dimension|initial parameters"
)


def texts(figure):
    """The texts of a figure with their boxes, without tick labels outside the axes' limits."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    hidden = set()
    for ax in figure.axes:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            low, high = sorted((low, high))
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                inside = low - 1e-9 <= tick.get_loc() <= high + 1e-9
                if not inside:
                    hidden |= {tick.label1, tick.label2}
    found = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in found if t not in hidden]


def assert_texts_are_readable(figure):
    """Check that no two texts overlap, and that all are within the figure."""
    boxes = texts(figure)
    assert len(boxes) > 4
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        across = min(box.x1, other.x1) - max(box.x0, other.x0)
        down = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert across <= 0.5 or down <= 0.5, (a, b)
    whole = figure.bbox
    for text, box in boxes:
        assert box.x0 >= -0.5 and box.x1 <= whole.x1 + 0.5, text
        assert box.y0 >= -0.5 and box.y1 <= whole.y1 + 0.5, text


def assert_readable(figure):
    """Check the texts of a figure with one pair of axes, its title and its units."""
    assert_texts_are_readable(figure)
    (ax,) = figure.axes
    assert ax.get_title(loc="left")
    assert UNITS.search(ax.get_xlabel()), ax.get_xlabel()
    assert ax.get_ylabel() in ("stage", "model", "rows of the data", "column") or UNITS.search(
        ax.get_ylabel()
    )
