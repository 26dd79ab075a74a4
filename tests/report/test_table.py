"""Tables on a terminal: readable, and never cut."""

import dataclasses
import math

import pytest
import torch
from rich.console import Console

from ppl_vae.core.results import FitResult
from ppl_vae.inference.svi.convergence import Convergence
from ppl_vae.lineage.metrics import MeanEstimate, Row
from ppl_vae.lineage.run import Lineage
from ppl_vae.lineage.stages import STAGES
from ppl_vae.report.table import filled, legend, lineage_table, measure, number, reliability

FIT = FitResult("SVI", torch.zeros(3), torch.arange(3.0), 2000, 5.25, "after 2000 steps, as asked")
MET = Convergence(True, 0.05, 0.01, 800, "as asked")
PRICES = dict.fromkeys(list(STAGES)[2:10], 0.0) | {"pca": 0.43, "unit-q": 11.8}


def row(name, log_p, shortfall, approximation, amortization, how="exact", reliable=1.0):
    stage = STAGES.get(name)
    value = MeanEstimate(log_p, None if how == "exact" else 0.1, reliable, how)
    return Row(
        stage=name,
        model=stage.model if stage else "function",
        q=stage.q if stage else "function",
        algorithm=stage.algorithm if stage else "SVI",
        elbo=log_p - approximation - amortization,
        log_p=value,
        approximation=approximation,
        amortization=amortization,
        approximation_error=0.1 * abs(approximation),
        amortization_error=0.1 * abs(amortization),
        shortfall=shortfall,
        price=PRICES.get(name, math.nan),
        log_p_price=PRICES.get(name, math.nan),
        test_log_p=dataclasses.replace(value, error=0.75),
        noise_scale=0.15,
        angle=0.2 if how == "exact" else math.nan,
        fit=FIT,
        convergence=MET,
        curve=FIT.curve(),
        ascent=None,
        held_out=None,
    )


POINTS = [row(name, 17.3, 0.43, math.nan, math.nan) for name in list(STAGES)[:2]]
EXACT = [row(name, 17.7, 0.0, 0.0, 0.0) for name in list(STAGES)[2:6]]
SVI = [row(name, 17.5, 0.21, 0.1 * i, 0.02 * i) for i, name in enumerate(list(STAGES)[6:11])]
COSTLY = [row("unit-q", 10.6, 7.1, 4.7, 0.01)]
NEURAL = [
    row(name, 49.9, math.nan, 0.5, 4.0, "estimated", 0.98) for name in ("vae", "iwae", "score-vae")
]
MINE = [row("a pair with a long name", -12345.6, math.nan, 3.0, 120.0, "estimated", 0.5)]
TABLES = {
    "one exact": EXACT[:1],
    "exact": EXACT,
    "default": POINTS + EXACT + SVI + COSTLY + NEURAL,
    "large": POINTS + EXACT + SVI + COSTLY + NEURAL + MINE,
}


def lineage(rows):
    return Lineage(
        tuple(rows), 17.7, {"gap_rows": 500, "num_missing": 0, "stages": [r.stage for r in rows]}
    )


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
    assert measure(MeanEstimate(17.716)) == "17.72"
    assert measure(MeanEstimate(49.94, 0.1, 0.99, "estimated")) == "~49.94±0.10"
    assert measure(MeanEstimate(49.94, 0.1, 0.5, "estimated")) == "≥49.94±0.10"
    assert reliability(MeanEstimate(49.94, 0.1, 0.996, "estimated")) == "99 %"
    assert reliability(MeanEstimate(1.0)) == "exact"
    assert measure(MeanEstimate(math.nan, None, math.nan, "none")) == "-"
    about = {"gap_rows": 500, "reference": "the closed form", "num_missing": 3, "stages": ["em"]}
    text = filled(legend(about), 100)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "angle to the closed form" in text.replace("\n", " ") and "observed" in text
    assert "observed" not in legend(about | {"num_missing": 0})
