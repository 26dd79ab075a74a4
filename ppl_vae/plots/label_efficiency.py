"""Plots of the accuracy of classifiers that are trained with few labels."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppl_vae.evaluation.prediction.label_efficiency import LabelEfficiency
from ppl_vae.plots.axes import BLUE, GREY, ORANGE, legend_below, new_axes, title

TICK_LABELS = {"logistic regression": "logistic\nregression", "fine-tuned": "fine-\ntuned"}
BASELINE = "scratch"


def plot_accuracy(found: LabelEfficiency, ax: Axes | None = None) -> Axes:
    """Plot the held-out accuracy of each method, one line per draw of labels.

    Args:
        found: a result of :func:`ppl_vae.evaluation.label_efficiency`.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    at, percent = np.arange(len(found.methods)), 100 * found.accuracy.numpy(force=True)
    for draw, values in enumerate(percent.T):
        label = "one draw of labels" if not draw else None
        ax.plot(at, values, "o-", ms=3, lw=0.8, color=GREY, alpha=0.7, label=label)
    ax.plot(at, percent.mean(1), "o", ms=7, color=BLUE, label="mean")
    ax.set_xticks(at, [TICK_LABELS.get(way, way) for way in found.methods])
    ax.set_xlim(-0.4, len(at) - 0.6)
    ax.set_ylabel("held-out accuracy, %")
    title(ax, f"Accuracy with {found.num_labels} labels")
    legend_below(ax, 2)
    return ax


def plot_accuracy_gain(found: LabelEfficiency, ax: Axes | None = None) -> Axes:
    """Plot the accuracy of each method minus that of the network from scratch.

    Each draw of labels is a point; the mean has a 95 % confidence interval.

    Args:
        found: a result of :func:`ppl_vae.evaluation.label_efficiency`.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    others = [way for way in found.methods if way != BASELINE]
    ax.axvline(0, color="black", lw=1, ls=":")
    base = found.accuracy[found.methods.index(BASELINE)]
    for index, way in enumerate(others):
        points = 100 * (found.accuracy[found.methods.index(way)] - base).numpy(force=True)
        label = "one draw of labels" if not index else None
        above = np.full(len(points), index - 0.14)
        ax.plot(points, above, "o", ms=3, color=GREY, alpha=0.7, label=label)
        mean = found.difference(way)
        half_width = 100 * (mean.high - mean.mean)
        label = "mean, 95 % interval" if not index else None
        ax.errorbar(
            100 * mean.mean,
            index + 0.14,
            xerr=half_width,
            fmt="o",
            ms=6,
            lw=1.8,
            color=ORANGE,
            label=label,
        )
    ax.set_yticks(np.arange(len(others)), [TICK_LABELS.get(way, way) for way in others])
    ax.set_ylim(len(others) - 0.5, -0.5)
    ax.set_xlabel("accuracy minus scratch, percentage points")
    title(ax, "Gain over the network from scratch")
    return ax


def plot_label_efficiency(found: LabelEfficiency) -> Figure:
    """Plot the accuracy of each method and its gain over the network from scratch."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4.2), layout="constrained")
    plot_accuracy(found, axes[0])
    plot_accuracy_gain(found, axes[1])
    legend_below(axes[1], 2)
    return figure
