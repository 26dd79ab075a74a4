"""Draw the figure of *Architecture*: ``python docs/figures/architecture.py``."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

STATIC = Path(__file__).parents[1] / "_static"
BLUE, LIGHT, GREY = "#1f5a99", "#e8f0f9", "#555555"
LAYERS = (
    (("core", "pair, batch, traces, state, results"),),
    (
        ("networks", "encoders, decoders"),
        ("data", "tables, images"),
        ("objectives", "ELBO, IWAE"),
        ("capture", "recorded steps"),
    ),
    (("likelihoods", "p(x given z)"), ("guides", "q(z given x)")),
    (("models", "p(x, z)"),),
    (("inference", "EM, SVI, variational Bayes, MCMC, sparse codes"),),
    (("evaluation", "log p, gaps, evidence, calibration, latent space, prediction"),),
    (
        ("lineage", "stages in one table"),
        ("fitted", "models of tables"),
        ("interop", "ArviZ, scikit-learn"),
    ),
    (("plots", "figures"), ("report", "tables, pages"), ("cli", "commands")),
)
STEPS = (
    ("x", "a table, NaN where missing"),
    ("Batch", "zeros, mask, index, N (core)"),
    ("model and guide", "run with S samples of z (core)"),
    ("log weights", "log p(x, z) - log q(z) (core)"),
    ("fit", "the ELBO is maximised (objectives, inference)"),
    ("estimate", "with a verdict (evaluation)"),
    ("row", "with the exact value (lineage)"),
    ("report", "table, figures, page (report)"),
)


def box(ax: Axes, x: float, y: float, width: float, name: str, text: str) -> None:
    """A rounded box with a name and a line of text."""
    shape = "round,pad=0,rounding_size=0.1"
    ax.add_patch(FancyBboxPatch((x, y), width, 0.72, shape, fc=LIGHT, ec=BLUE, lw=1))
    middle = x + width / 2
    ax.text(middle, y + 0.46, name, ha="center", va="center", weight="bold", size=11)
    ax.text(middle, y + 0.2, text, ha="center", va="center", size=8, color=GREY)


figure, (left, right) = plt.subplots(
    1, 2, figsize=(10.5, 7), width_ratios=(1.6, 1), layout="constrained"
)
for row, layer in enumerate(LAYERS):
    width = 8 / len(layer)
    for place, (name, text) in enumerate(layer):
        box(left, place * width + 0.06, row, width - 0.12, name, text)
left.annotate("", (-0.25, 0.1), (-0.25, 7.7), arrowprops={"arrowstyle": "->", "color": BLUE})
left.text(-0.5, 3.9, "imports", rotation=90, ha="center", va="center", color=BLUE, size=9)
left.set(xlim=(-0.8, 8.05), ylim=(-0.1, 8), title="Folders: imports run downwards only")
for step, (name, text) in enumerate(STEPS):
    row = len(STEPS) - 1 - step
    box(right, 0.05, row, 3.9, name, text)
    if row:
        end, start = (2, row - 0.26), (2, row)
        right.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": BLUE})
right.set(xlim=(0, 4), ylim=(-0.1, 8), title="From data to report")
for ax in (left, right):
    ax.axis("off")
figure.savefig(STATIC / "architecture.svg", metadata={"Date": None})
