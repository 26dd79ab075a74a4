"""Draw the figures of *Architecture*: ``python docs/figures/architecture.py``."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

STATIC = Path(__file__).parents[1] / "_static"
BLUE, LIGHT, GREY = "#1f5a99", "#e8f0f9", "#555555"
WIDTH = 4.3
LAYERS = (
    (("core", "pair, batch, traces, results"),),
    (("networks", "encoders"), ("data", "tables"), ("capture", "fast steps")),
    (("objectives", "ELBO, IWAE"),),
    (("guides", "q(z given x)"),),
    (("likelihoods", "p(x given z)"),),
    (("models", "p(x, z)"),),
    (("inference", "EM, SVI, variational Bayes, MCMC"),),
    (("evaluation", "log p, gaps, evidence, calibration"),),
    (("lineage", "stages in one table"),),
    (("fitted", "of tables"), ("interop", "ArviZ"), ("plots", "figures")),
    (("report", "tables, pages"),),
    (("cli", "commands"),),
)
STEPS = (
    ("x", "a table, NaN where missing"),
    ("Batch", "zeros, mask, index, N (core)"),
    ("model and guide", "run with S samples of z (core)"),
    ("log weights", "log p(x, z) - log q(z) (core)"),
    ("fit", "the ELBO is maximised (inference)"),
    ("estimate", "with a verdict (evaluation)"),
    ("row", "with the exact value (lineage)"),
    ("report", "table, figures, page (report)"),
)


def box(ax: Axes, x: float, y: float, width: float, name: str, text: str) -> None:
    """A rounded box with a name and a line of text."""
    shape = "round,pad=0,rounding_size=0.1"
    ax.add_patch(FancyBboxPatch((x, y), width, 0.78, shape, fc=LIGHT, ec=BLUE, lw=1))
    middle = x + width / 2
    ax.text(middle, y + 0.54, name, ha="center", va="center", weight="bold", size=11)
    ax.text(middle, y + 0.22, text, ha="center", va="center", size=10, color=GREY)


def draw_layers(ax: Axes) -> None:
    """The folders of the package, each above those that it imports from."""
    for row, layer in enumerate(LAYERS):
        width = 8 / len(layer)
        for index, (name, text) in enumerate(layer):
            box(ax, index * width + 0.06, row, width - 0.12, name, text)
    top = len(LAYERS) - 0.2
    ax.annotate("", (-0.25, 0.1), (-0.25, top), arrowprops={"arrowstyle": "->", "color": BLUE})
    ax.text(-0.6, top / 2, "imports", rotation=90, ha="center", va="center", color=BLUE, size=10)
    ax.set(xlim=(-0.9, 8.05), ylim=(-0.1, len(LAYERS)))


def draw_steps(ax: Axes) -> None:
    """What happens to data, from the table to the report."""
    for step, (name, text) in enumerate(STEPS):
        row = 1.5 * (len(STEPS) - 1 - step)
        box(ax, 1, row, 6, name, text)
        if row:
            end, start = (4, row - 0.7), (4, row)
            ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": BLUE})
    ax.set(xlim=(0, 8), ylim=(-0.1, len(LAYERS)))


for name, draw in (("layers", draw_layers), ("data_to_report", draw_steps)):
    figure, ax = plt.subplots(figsize=(WIDTH, 0.5 * len(LAYERS)), layout="constrained")
    draw(ax)
    ax.axis("off")
    figure.savefig(STATIC / f"{name}.svg", metadata={"Date": None})
