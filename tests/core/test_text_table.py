"""Tables of text and their representation in notebooks."""

import dataclasses

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.results import UNSAVED, Result
from ppl_vae.core.text_table import render, render_html

ROWS = [("first", "1.0", "<2>"), ("second one", "-10.0", "3")]
HEADER = ("", "a & b", "c")


def test_columns_are_aligned():
    assert render(ROWS) == "first         1.0  <2>\nsecond one  -10.0    3"
    lines = render(ROWS, HEADER, indent="  ").splitlines()
    assert lines[0] == "              a & b    c"
    assert lines[1] == "  first         1.0  <2>"
    assert render(ROWS, text_columns=2).splitlines()[0] == "first       1.0    <2>"


def test_no_line_ends_with_spaces():
    text = render([("first", "1", ""), ("second", "2", "<- best")], ("", "", "choice"))
    assert [line.rstrip() for line in text.splitlines()] == text.splitlines()


def test_html_is_escaped():
    text = render_html(ROWS, HEADER)
    assert "&lt;2&gt;" in text and "a &amp; b" in text and "<2>" not in text
    assert text.count("<tr>") == 3
    assert '<td style="text-align: left">first</td>' in text
    assert '<td style="text-align: right">1.0</td>' in text


@dataclasses.dataclass(frozen=True)
class Estimate(Result):
    value: float
    network: Tensor | None = dataclasses.field(default=None, compare=False, metadata=UNSAVED)


def test_live_objects_are_not_saved():
    found = Estimate(1.5, torch.zeros(2))
    assert found.to_dict() == {"value": 1.5}
    again = Estimate.from_dict(found.to_dict())
    assert again == found and again.network is None


def test_results_are_shown_in_a_notebook_as_they_are_printed():
    fit = FitResult("SVI", torch.zeros(3), torch.arange(3.0), 3, 0.5, "after 3 steps <all>")
    text = fit._repr_html_()
    assert text.startswith("<pre>SVI: 3 steps in 0.50 s, after 3 steps &lt;all&gt;")
    assert text.endswith("</pre>")


def test_a_progress_bar_is_rendered_in_a_notebook(monkeypatch):
    """rich detects notebooks and passes HTML to the output cell."""
    shown = []
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: shown.append(text))
    console = Console(force_jupyter=True)
    progress = Progress(console=console)
    progress.add_task("SVI", total=10, completed=5)
    console.print(progress.get_renderable())
    assert console.is_jupyter and len(shown) == 1
    assert "SVI" in shown[0] and "50%" in shown[0]
