"""Rows of the lineage's table with given metrics, without any fit."""

import dataclasses
import math

import torch

from ppl_vae.core.fit_result import FitResult
from ppl_vae.inference.svi.convergence import Convergence
from ppl_vae.lineage.estimates import MeanEstimate
from ppl_vae.lineage.metrics import StageMetrics
from ppl_vae.lineage.result import Lineage
from ppl_vae.lineage.stages import STAGES

FIT = FitResult("SVI", torch.zeros(3), torch.arange(3.0), 2000, 5.25, "after 2000 steps")
MET = Convergence(True, 0.05, 0.01, 800, "tolerance met")
EXPECTED = dict.fromkeys(list(STAGES)[2:10], 0.0) | {"pca": 0.43, "unit-q": 11.8}


def row(name, log_p, shortfall, approximation, amortization, method="exact", reliable=1.0):
    """A row of the lineage's table with these metrics."""
    stage = STAGES.get(name)
    value = MeanEstimate(log_p, None if method == "exact" else 0.1, reliable, method)
    return StageMetrics(
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
        expected_loss=EXPECTED.get(name, math.nan),
        expected_shortfall=EXPECTED.get(name, math.nan),
        test_log_p=dataclasses.replace(value, error=0.75),
        noise_scale=0.15,
        angle=0.2 if method == "exact" else math.nan,
        fit=FIT,
        convergence=MET,
        curve=FIT.curve(),
        ascent=None,
        held_out=None,
    )


POINTS = [row(name, 17.3, 0.43, math.nan, math.nan) for name in list(STAGES)[:2]]
EXACT = [row(name, 17.7, 0.0, 0.0, 0.0) for name in list(STAGES)[2:6]]
SVI = [row(name, 17.5, 0.21, 0.1 * i, 0.02 * i) for i, name in enumerate(list(STAGES)[6:11])]
RESTRICTED = [row("unit-q", 10.6, 7.1, 4.7, 0.01)]
NEURAL = [
    row(name, 49.9, math.nan, 0.5, 4.0, "estimated", 0.98) for name in ("vae", "iwae", "score-vae")
]
USER = [row("a pair with a long name", -12345.6, math.nan, 3.0, 120.0, "estimated", 0.5)]
TABLES = {
    "one exact": EXACT[:1],
    "exact": EXACT,
    "default": POINTS + EXACT + SVI + RESTRICTED + NEURAL,
    "large": POINTS + EXACT + SVI + RESTRICTED + NEURAL + USER,
}


def lineage(rows):
    """A lineage with these rows."""
    about = {
        "data": "a table",
        "num_train": 500,
        "num_val": 50,
        "num_test": 100,
        "data_dim": 8,
        "latent_dim": 2,
        "seed": 0,
        "gap_rows": 500,
        "num_missing": 0,
        "reference": "the closed form",
        "stages": [r.stage for r in rows],
    }
    return Lineage(tuple(rows), 17.7, about)
