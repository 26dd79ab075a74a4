"""Data with missing values, and linear-Gaussian models of random parameters."""

import numpy as np
import oracles
import torch
from scipy import stats

from ppl_vae import PPCA

SPECTRUM, N, D, K = (9.0, 4.0, 2.5), 60, 7, 3
MECHANISMS = {"MCAR": oracles.with_missing_values, "MAR": oracles.drop_high}
NOISES = ("isotropic", "diagonal")


def data(mechanism="MCAR", fraction=0.3, N=N, D=D, seed=0):
    """Data of a PPCA model, with missing values of one mechanism."""
    x = oracles.simulate_ppca(SPECTRUM, 0.8, N, D, seed)
    return MECHANISMS[mechanism](x, fraction, seed + 1)


def make(noise="isotropic", seed=0, D=D, K=K):
    """A model in general position, and its parameters as arrays (noise as variances)."""
    rng = np.random.default_rng(seed)
    loc, loadings = rng.normal(size=D), rng.normal(size=(D, K))
    variance = rng.uniform(0.3, 2.0, size=() if noise == "isotropic" else D)
    return ppca_from_arrays(loc, loadings, variance), (loc, loadings, variance)


def ppca_from_arrays(loc, loadings, variance):
    """A PPCA with these parameters; isotropic if ``variance`` is a number."""
    return PPCA.from_parameters(
        torch.tensor(loadings), torch.tensor(loc), torch.tensor(variance).double().sqrt()
    )


def assert_draws_of_missing_values(draws, x, loc, covariance, num_assertions):
    """Assert that draws (S, N, D) are of N(loc, covariance) given the observed values of each row.

    The sum over draws of squared Mahalanobis distances is chi^2 with S times as many degrees of
    freedom as missing values, and S times that of their mean is chi^2 with as many as these.
    """
    for n, row in enumerate(x):
        m, s = np.isnan(row), ~np.isnan(row)
        assert (draws[:, n, s] == row[s]).all()
        gain = covariance[np.ix_(m, s)] @ np.linalg.inv(covariance[np.ix_(s, s)])
        precision = np.linalg.inv(covariance[np.ix_(m, m)] - gain @ covariance[np.ix_(s, m)])
        deviation = draws[:, n, m] - (loc[m] + gain @ (row - loc)[s])
        distances = np.einsum("si,ij,sj->", deviation, precision, deviation)
        mean = deviation.mean(0)
        total = stats.chi2(m.sum() * len(draws))
        tails = [
            total.sf(distances),
            total.cdf(distances),
            stats.chi2(m.sum()).sf(len(draws) * mean @ precision @ mean),
        ]
        assert min(tails) > oracles.FAILURE_RATE / num_assertions
