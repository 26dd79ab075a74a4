"""Coverage of intervals for imputed values when the parameters were fitted."""

import numpy as np
import oracles
import pytest
import torch
from scipy import stats

from ppl_vae import PPCA, fit_em
from ppl_vae.core.imputed import COVERAGE

D, K, MISSING = 12, 3, 0.3
TABLES = {20: 60, 50: 30, 200: 10}
"""Number of simulated data sets for each number of rows."""


def coverage(noise, num_rows, fitted):
    """The share of missing values within 1.96 sd of the imputed mean, over all data sets."""
    inside, total = 0, 0
    for seed in range(TABLES[num_rows]):
        rng = np.random.default_rng(seed)
        loadings = rng.normal(size=(D, K))
        scale = 0.7 if noise == "isotropic" else rng.uniform(0.4, 1.2, size=D)
        whole = rng.normal(size=(num_rows, K)) @ loadings.T + scale * rng.normal(
            size=(num_rows, D)
        )
        x = oracles.with_missing_values(whole, MISSING, seed)
        ppca = PPCA.like(x, K, noise=noise, seed=0)
        if fitted:
            fit_em(ppca, x, tol=1e-6)
        else:
            scale = torch.tensor(scale, dtype=torch.float64)
            ppca.assign(loadings=torch.from_numpy(loadings), loc=0 * ppca.loc, noise_scale=scale)
        found, missing = ppca.impute(x), np.isnan(x)
        away = np.abs(whole - found.mean.numpy())[missing] / found.sd.numpy()[missing]
        inside, total = inside + int((away < stats.norm.ppf(0.975)).sum()), total + missing.sum()
    return inside / total


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
def test_intervals_have_the_documented_coverage(noise):
    stated = {"isotropic": (0.80, 0.91, 0.94), "diagonal": (0.66, 0.88, 0.94)}[noise]
    for num_rows, share in zip(TABLES, stated, strict=True):
        found, known = (coverage(noise, num_rows, fitted) for fitted in (True, False))
        print(f"{noise}, N = {num_rows}: {found:.3f}; with the true parameters {known:.3f}")
        assert found == pytest.approx(share, abs=0.015)
        assert f"{share:.0%}".removesuffix("%") in COVERAGE
        assert known == pytest.approx(0.95, abs=0.01)
