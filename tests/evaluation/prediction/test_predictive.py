"""Means of q, and means and draws of x, for any pair."""

import numpy as np
import oracles
import pytest
import torch
import user_pairs
from scipy import stats

from ppl_vae import PPCA, VAE, Bernoulli, ExactGuide, PerDatumGuide
from ppl_vae.evaluation.prediction.predictive import (
    draw_data,
    latent_means,
    mean_data,
    reconstruct,
)


@pytest.fixture(scope="module")
def table():
    return torch.from_numpy(oracles.simulate_ppca((16, 8), 1, 60, 5, seed=0))


def test_means_agree_with_ppca(table):
    ppca = PPCA.like(table, 2, seed=0)
    guide = ExactGuide(ppca)
    means = latent_means(ppca.model, guide, table)["z"]
    assert (means - ppca.posterior(table).mean).abs().max() < 1e-12
    assert (reconstruct(ppca.model, guide, table) - ppca.reconstruct(table)).abs().max() < 1e-12
    z = torch.randn(60, 2).double()
    expected = z @ ppca.loadings.detach().mT + ppca.loc.detach()
    assert (mean_data(ppca.model, {"z": z}, table) - expected).abs().max() < 1e-12


def test_draws_have_the_moments_of_the_marginal(table):
    ppca = PPCA.like(table, 2, seed=0)
    number = 20_000
    drawn = draw_data(ppca.model, table[:1].expand(number, -1), seed=0).numpy()
    loc = ppca.loc.detach().numpy()
    w, s2 = ppca.loadings.detach().numpy(), float(ppca.noise_scale.detach()) ** 2
    covariance = oracles.ppca_covariance(w, s2)
    z = (drawn.mean(0) - loc) / np.sqrt(np.diag(covariance) / number)
    assert np.abs(z).max() < oracles.z_limit(5)
    spread = (drawn - loc) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    assert stats.kstest(spread.ravel(), "norm").pvalue > 1e-6
    again = draw_data(ppca.model, table[:1].expand(number, -1), seed=0).numpy()
    assert np.array_equal(drawn, again)


def test_binary_data_and_per_datum_guides():
    vae = VAE.mlp(6, 2, hidden=(8,), likelihood=Bernoulli(), seed=0)
    x = (torch.rand(9, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    assert set(draw_data(vae.model, x, seed=0).unique().tolist()) <= {0.0, 1.0}
    assert (
        (reconstruct(vae.model, vae.guide, x) > 0) & (reconstruct(vae.model, vae.guide, x) < 1)
    ).all()
    table = PerDatumGuide(9, 2)
    assert latent_means(vae.model, table, x)["z"].shape == (9, 2)


def test_rows_with_missing_values_have_means_of_all_their_values(table):
    ppca = PPCA.like(table, 2, seed=0)
    x = oracles.with_missing_values(table.numpy(), 0.3, seed=0)
    mask, guide = ~np.isnan(x), ExactGuide(ppca)
    arbitrary = np.where(mask, x, 1e6)
    for values, observed in ((x, None), (arbitrary, mask)):
        means = latent_means(ppca.model, guide, values, mask=observed)["z"]
        assert (means - ppca.posterior(x).mean).abs().max() < 1e-12
        rebuilt = reconstruct(ppca.model, guide, values, mask=observed)
        assert (rebuilt - ppca.reconstruct(x)).abs().max() < 1e-12


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_external_pairs(name):
    model, guide, x = user_pairs.PAIRS[name]()
    rows = torch.as_tensor(x)
    means = latent_means(model, guide, x)
    assert all(v.dim() == 2 and len(v) == len(rows) and v.isfinite().all() for v in means.values())
    drawn = draw_data(model, x, seed=0)
    assert drawn.shape == rows.shape and drawn.isfinite().all()
    rebuilt = reconstruct(model, guide, x)
    assert rebuilt.shape == rows.shape and rebuilt.isfinite().all()
