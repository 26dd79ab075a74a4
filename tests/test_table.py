"""Tables and pictures: readable, and nothing on top of anything else."""

import dataclasses
import itertools
import math

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from ppl_vae.data import Split, Units
from ppl_vae.lineage import Lineage, Measure, Row
from ppl_vae.report import plots
from ppl_vae.report.table import legend, lineage_table, measure, number, reliability
from ppl_vae.results import FitResult
from ppl_vae.rungs import RUNGS

FIT = FitResult("SVI", torch.zeros(3), torch.arange(3.0), 2000, 5.25, "after 2000 steps, as asked")


def row(name, log_p, shortfall, approximation, amortization, how="exact", reliable=1.0):
    rung = RUNGS.get(name)
    value = Measure(log_p, None if how == "exact" else 0.1, reliable, how)
    return Row(
        rung=name,
        model=rung.model if rung else "function",
        q=rung.q if rung else "function",
        algorithm=rung.algorithm if rung else "SVI",
        elbo=log_p - approximation - amortization,
        log_p=value,
        approximation=approximation,
        amortization=amortization,
        shortfall=shortfall,
        test_log_p=dataclasses.replace(value, error=0.75),
        noise_scale=0.15,
        angle=0.2 if how == "exact" else math.nan,
        fit=FIT,
    )


EXACT = [row(name, 17.7, 0.0, 0.0, 0.0) for name in list(RUNGS)[:4]]
SVI = [row(name, 17.5, 0.21, 0.1 * i, 0.02 * i) for i, name in enumerate(list(RUNGS)[4:9])]
COSTLY = [row("unit-q", 10.6, 7.1, 4.7, 0.01)]
NEURAL = [row(name, 49.9, math.nan, 0.5, 4.0, "estimated", 0.98) for name in ("vae", "iwae")]
MINE = [row("a pair with a long name", -12345.6, math.nan, 3.0, 120.0, "estimated", 0.5)]
TABLES = {
    "one exact": EXACT[:1],
    "exact": EXACT,
    "default": EXACT + SVI + COSTLY + NEURAL,
    "large": EXACT + SVI + COSTLY + NEURAL + MINE,
}


def lineage(rows):
    empty = torch.zeros(0, 2)
    units = Units(torch.zeros(2), torch.ones(()))
    return Lineage(tuple(rows), {"gap_rows": 500}, {}, Split(empty, empty, empty), units)


def shown(rows, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(lineage_table(rows, width=width))
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_the_table_is_never_cut(width):
    text = shown(TABLES["default"], width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) == len(TABLES["default"]) + 1
    assert ("q(z|x)" in text) == (width == 160)


def test_cells():
    assert number(-0.0001, 3) == "0.000"
    assert number(-0.1, 3) == "-0.100"
    assert number(math.nan, 3) == "-"
    assert measure(Measure(17.716)) == "17.72"
    assert measure(Measure(49.94, 0.1, 0.99, "estimated")) == "~49.94±0.10"
    assert measure(Measure(49.94, 0.1, 0.5, "estimated")) == "≥49.94±0.10"
    assert reliability(Measure(49.94, 0.1, 0.996, "estimated")) == "99 %"
    assert reliability(Measure(1.0)) == "exact"
    assert measure(Measure(math.nan, None, math.nan, "none")) == "-"
    assert all(len(line) <= 100 for line in legend(500, 100).splitlines())


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_no_two_texts_overlap(rows):
    result = lineage(rows)
    figure = Figure(figsize=plots.staircase_size(result), layout="constrained")
    FigureCanvasAgg(figure)
    axes = plots.gap_staircase(result, figure.add_subplot())
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    low, high = axes.get_xlim()
    drawn = lambda t: t not in ticks or low <= t.get_position()[0] <= high  # noqa: E731
    ticks = axes.get_xticklabels()
    texts = [t for t in axes.findobj(Text) if t.get_text() and t.get_visible() and drawn(t)]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    assert len(boxes) > len(rows)
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        overlap = min(box.x1, other.x1) > max(box.x0, other.x0) and min(box.y1, other.y1) > max(
            box.y0, other.y0
        )
        assert not overlap, (a, b)
    whole = figure.bbox
    for text, box in boxes:
        assert box.x0 >= whole.x0 and box.x1 <= whole.x1, text


def test_the_staircase_draws_what_the_rows_say():
    rows = TABLES["default"]
    figure = Figure()
    axes = plots.gap_staircase(lineage(rows), figure.add_subplot())
    assert "nats a datum" in axes.get_xlabel() and axes.get_ylabel() == "rung"
    for part, bars in enumerate(axes.containers):
        for bar, r in zip(bars, rows, strict=True):
            expected = (r.shortfall, r.approximation, r.amortization)[part]
            assert bar.get_width() == pytest.approx(0 if math.isnan(expected) else expected)


def test_without_axes_it_makes_a_figure():
    matplotlib.use("Agg")
    axes = plots.gap_staircase(lineage(EXACT))
    assert axes.figure.number in matplotlib.pyplot.get_fignums()
    matplotlib.pyplot.close(axes.figure)
