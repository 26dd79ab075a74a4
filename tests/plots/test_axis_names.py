"""Names of columns on the axes of plots: long ones, formulas, characters without a glyph."""

import torch

from ppl_vae.plots.axes import MAX_NAME_LENGTH, axis_names
from ppl_vae.plots.fits import plot_loadings

PREFIX = "concentration of the metabolite "


def test_long_names_keep_their_ends():
    first, second, short = axis_names([f"{PREFIX}A", f"{PREFIX}B", "short"], [0, 1, 2])
    assert first != second and first.endswith("A") and "…" in first and short == "short"
    assert len(first) == MAX_NAME_LENGTH


def test_names_that_differ_in_their_middle_are_numbered():
    names = [f"{PREFIX}{k} in the blood plasma of a patient" for k in range(3)]
    found = axis_names(names, [0, 2])
    assert found[0].startswith("1: conc") and found[1].startswith("3: conc")
    assert all(name.endswith("…") and len(name) <= MAX_NAME_LENGTH for name in found)


def test_characters_without_a_glyph_are_replaced_by_the_number_of_the_column():
    assert axis_names(["größe", "\u6e29\u5ea6", "a\nb"], [0, 1, 2]) == ["größe", "column 2", "a b"]


def test_dollars_are_no_formulas():
    names = ["price in $ or US$", "$\\frac{1}{$"]
    axes = plot_loadings(torch.tensor([[1.0], [-0.5]]).double(), names)
    axes.figure.canvas.draw()
    first = axes.get_yticklabels()[0]
    assert first.get_text() == r"price in \$ or US\$"
