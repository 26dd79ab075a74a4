"""Pictures of stored results: one function a picture, which computes nothing but where to draw."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ppl_vae.lineage import Lineage, Row

PARTS = {
    "short of the best log p": "#b8b8b8",
    "approximation gap": "#3b75af",
    "amortization gap": "#ef8636",
}


def gap_staircase(lineage: Lineage, ax: Axes | None = None) -> Axes:
    """Nats a datum lost at each rung: what log p falls short by, and the two gaps below it.

    Args:
        lineage: what :func:`ppl_vae.lineage.run_lineage` gave.
        ax: where to draw; by default a new figure.
    """
    rows = lineage.rows
    if ax is None:
        ax = plt.figure(figsize=staircase_size(lineage), layout="constrained").add_subplot()
    y = np.arange(len(rows))
    losses = np.array([_losses(row) for row in rows]).reshape(len(rows), len(PARTS))
    left = np.zeros(len(rows))
    for part, (label, color) in enumerate(PARTS.items()):
        ax.barh(y, losses[:, part], left=left, color=color, label=label, height=0.7)
        left += losses[:, part]
    ax.set_xlim(0, 1.3 * max(left.max(), 1e-3))
    for place, (total, row) in enumerate(zip(left, rows, strict=True)):
        ax.text(total + 0.01 * ax.get_xlim()[1], place, _label(row, total), va="center")
    ax.set_yticks(y, [f"{row.rung}" for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("lost, in nats a datum (training rows)")
    ax.set_ylabel("rung")
    ax.set_title("What each rung loses", loc="left", pad=30)
    ax.spines[["top", "right"]].set_visible(False)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3}
    ax.legend(frameon=False, ncols=3, handlelength=1.2, columnspacing=1.2, **place)
    return ax


def staircase_size(lineage: Lineage) -> tuple[float, float]:
    """Width and height that :func:`gap_staircase` needs, in inches."""
    return 9.0, 1.6 + 0.42 * len(lineage.rows)


def _losses(row: Row) -> list[float]:
    parts = (row.shortfall, row.approximation, row.amortization)
    return [0.0 if math.isnan(part) else max(part, 0.0) for part in parts]


def _label(row: Row, total: float) -> str:
    lost = "0" if total < 5e-4 else f"{total:.3f}" if total < 1 else f"{total:.2f}"
    return f"{lost}   (log p {'' if row.log_p.how == 'exact' else '~ '}{row.log_p.value:.2f})"
