"""Pictures of classifiers from few labels, which compute nothing but where to draw."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppl_vae.evaluation.prediction.label_efficiency import LabelEfficiency
from ppl_vae.plots.drawing import BLUE, GREY, ORANGE, legend_below, new_axes, title

WRAPPED = {"logistic regression": "logistic\nregression", "fine-tuned": "fine-\ntuned"}
BASE = "scratch"


def accuracies(found: LabelEfficiency, ax: Axes | None = None) -> Axes:
    """The share of held-out rows that each way names rightly, one line a draw of labels.

    Args:
        found: what :func:`ppl_vae.label_efficiency` gave.
        ax: where to draw.
    """
    ax = new_axes(ax)
    at, percent = np.arange(len(found.methods)), 100 * found.accuracy.numpy()
    for draw, values in enumerate(percent.T):
        label = "one draw of labels" if not draw else None
        ax.plot(at, values, "o-", ms=3, lw=0.8, color=GREY, alpha=0.7, label=label)
    ax.plot(at, percent.mean(1), "o", ms=7, color=BLUE, label="mean")
    ax.set_xticks(at, [WRAPPED.get(way, way) for way in found.methods])
    ax.set_xlim(-0.4, len(at) - 0.6)
    ax.set_ylabel("held-out rows named rightly, %")
    title(ax, f"Learned from {found.num_labels} labels")
    legend_below(ax, 2)
    return ax


def differences(found: LabelEfficiency, ax: Axes | None = None) -> Axes:
    """What each way gains over the network from scratch, draw by draw, with the 95 % interval.

    Args:
        found: what :func:`ppl_vae.label_efficiency` gave.
        ax: where to draw.
    """
    ax = new_axes(ax)
    others = [way for way in found.methods if way != BASE]
    ax.axvline(0, color="black", lw=1, ls=":")
    base = found.accuracy[found.methods.index(BASE)]
    for place, way in enumerate(others):
        points = 100 * (found.accuracy[found.methods.index(way)] - base).numpy()
        dots = "one draw of labels" if not place else None
        high = np.full(len(points), place - 0.14)
        ax.plot(points, high, "o", ms=3, color=GREY, alpha=0.7, label=dots)
        mean = found.difference(way)
        reach = 100 * (mean.high - mean.mean)
        how = {"fmt": "o", "ms": 6, "lw": 1.8, "color": ORANGE}
        name = "mean, 95 % interval" if not place else None
        ax.errorbar(100 * mean.mean, place + 0.14, xerr=reach, label=name, **how)
    ax.set_yticks(np.arange(len(others)), [WRAPPED.get(way, way) for way in others])
    ax.set_ylim(len(others) - 0.5, -0.5)
    ax.set_xlabel("accuracy against scratch, percentage points")
    title(ax, "Less the same network from scratch")
    return ax


def label_efficiency(found: LabelEfficiency) -> Figure:
    """Both, beside one another."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4.2), layout="constrained")
    accuracies(found, axes[0])
    differences(found, axes[1])
    legend_below(axes[1], 2)
    return figure
