"""Data with missing values, and linear-Gaussian models of random parameters."""

import numpy as np
import torch

import oracles
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
