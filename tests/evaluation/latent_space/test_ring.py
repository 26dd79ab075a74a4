"""A ring, g(z) = z/10 + z/|z|, learned back by a VAE that sees draws of it alone."""

import math

import numpy as np
import oracles
import pytest
import torch
from scipy import integrate, stats
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import IWAE, VAE, Gaussian, fit_svi

MEAN_RADIUS = 1 + math.sqrt(math.pi / 2) / 10
"""|x| = 1 + |z|/10, and |z| has Rayleigh's distribution."""


def ring(rows, seed):
    z = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed))
    return z / 10 + z / z.norm(dim=1, keepdim=True)


def angles(x):
    return (torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) + 0.5).numpy()


def test_the_density_of_the_ring_agrees_with_the_change_of_variables():
    # The density of examples/ring.py: p(z) / |det|, with the determinant (1/10 + 1/s) / 10.
    def radial(r):
        s = 10 * (r - 1)
        return r * 2 * math.pi * stats.norm.pdf(s) * stats.norm.pdf(0) / ((0.1 + 1 / s) / 10)

    mass, mean = (integrate.quad(lambda r, k=k: r**k * radial(r), 1, 3)[0] for k in (0, 1))
    assert mass == pytest.approx(1, abs=1e-7) and mean == pytest.approx(MEAN_RADIUS, abs=1e-7)
    radii = ring(5000, seed=0).norm(dim=1).numpy()
    assert stats.kstest(10 * (radii - 1), "rayleigh").pvalue > oracles.FAILURE_RATE
    assert stats.kstest(angles(ring(5000, seed=0)), "uniform").pvalue > oracles.FAILURE_RATE


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_vae_learns_the_ring(seed):
    likelihood = Gaussian("shared", initial=0.1)
    vae = VAE.mlp(2, 2, hidden=(64, 64), covariance="full", likelihood=likelihood, seed=seed)
    fit_svi(
        vae.model,
        vae.guide,
        ring(2000, seed),
        steps=3000,
        batch_size=256,
        lr=5e-3,
        scheduler=CosineAnnealingLR,
        objective=IWAE(8),
        capture=False,
        seed=seed,
    )
    new = vae.sample(2000, seed=seed)
    radii = new.norm(dim=1).numpy()
    assert radii.mean() == pytest.approx(MEAN_RADIUS, rel=0.02)
    # Within 2 % that is not by chance: its own error is far smaller.
    assert oracles.z_limit(3) * radii.std() / np.sqrt(len(radii)) < 0.02 * MEAN_RADIUS
    assert stats.kstest(angles(new), "uniform").pvalue > oracles.FAILURE_RATE
