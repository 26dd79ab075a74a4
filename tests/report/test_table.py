"""The lineage's table, as text, in HTML and on a terminal: readable and never truncated."""

import math

import pytest
from rich.console import Console

from lineage_rows import TABLES, lineage
from ppl_vae.lineage.estimates import MeanEstimate
from ppl_vae.lineage.table import (
    format_estimate,
    format_number,
    format_reliability,
    legend,
    shown_columns,
)
from ppl_vae.report.table import lineage_table, omitted_columns, wrap


def printed(rows, width):
    """The table as rich prints it on a terminal of this width."""
    with open("/dev/null", "w") as file:
        console = Console(width=width, record=True, file=file)
        console.print(lineage_table(rows, width=width))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_the_table_is_never_truncated(width):
    text = printed(TABLES["default"], width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) == len(TABLES["default"]) + 1
    assert ("q(z|x)" in text) == (width == 160)
    omitted = omitted_columns(TABLES["default"], width)
    assert (omitted == "") == (width == 160)
    assert width == 160 or "q(z|x), algorithm" in omitted


def test_formats_of_cells():
    assert format_number(-0.0001, 3) == "0.000"
    assert format_number(-0.1, 3) == "-0.100"
    assert format_number(math.nan, 3) == "-"
    assert format_estimate(MeanEstimate(17.716)) == "17.72"
    assert format_estimate(MeanEstimate(49.94, 0.1, 0.99, "estimated")) == "~49.94±0.10"
    assert format_estimate(MeanEstimate(49.94, 0.1, 0.5, "estimated")) == "≥49.94±0.10"
    assert format_reliability(MeanEstimate(49.94, 0.1, 0.996, "estimated")) == "99 %"
    assert format_reliability(MeanEstimate(1.0)) == "exact"
    assert format_estimate(MeanEstimate(math.nan, None, math.nan, "none")) == "-"


def test_the_legend_mentions_what_the_table_contains():
    about = {"gap_rows": 500, "reference": "the closed form", "num_missing": 3, "stages": ["em"]}
    text = wrap(legend(about), 100)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "angle to the closed form" in text.replace("\n", " ") and "observed" in text
    assert "observed" not in legend(about | {"num_missing": 0})
    assert "implied by its codes" in legend(about | {"stages": ["pca"]})
    assert "implied by its codes" not in legend(about | {"stages": ["em", "a user's pair"]})


def test_printing_a_lineage_shows_its_table():
    found = lineage(TABLES["large"])
    text = repr(found)
    assert text.startswith("a table: 650 rows, 8 columns; K = 2, seed 0\nstage")
    for row in found.rows:
        assert any(line.startswith(row.stage) for line in text.splitlines()), row.stage
    assert max(map(len, text.splitlines())) <= 110
    assert "~49.90±0.10" in text and "≥-12345.60±0.10" in text


def test_a_notebook_shows_a_lineage_as_an_html_table():
    found = lineage(TABLES["exact"])
    text = found._repr_html_()
    assert text.count("<tr>") == len(found.rows) + 1
    for column in shown_columns(found.rows):
        assert f">{column.title}</th>" in text
    assert '<td style="text-align: left">closed-form</td>' in text
    assert "q(z|x)" in text and "<p>Nats per datum" in text
