"""PPCA and factor analysis: posterior, likelihood and imputation with missing values."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import oracles
from fitted import assert_close
from incomplete import (
    MECHANISMS,
    NOISES,
    SPECTRUM,
    D,
    K,
    N,
    assert_draws_of_missing_values,
    data,
    make,
)
from ppl_vae import PPCA, ExactGuide, fit_em, log_weights
from ppl_vae.models.linear.linear_gaussian import MissingnessPatterns


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_posterior_and_log_likelihood_match_the_observed_marginals(noise, mechanism):
    (ppca, truth), x = make(noise), data(mechanism)
    means, covariances = oracles.posterior(x, *truth)
    posterior = ppca.posterior(x)
    assert (posterior.batch_shape, posterior.event_shape) == ((N,), (K,))
    assert_close(posterior.mean, means)
    assert_close(posterior.covariance_matrix, covariances)
    assert_close(ppca.log_likelihood(x), oracles.log_density(x, *truth))
    assert_close(ppca.reconstruct(x), means @ truth[1].T + truth[0])


@pytest.mark.parametrize("noise", NOISES)
def test_a_mask_and_nan_are_equivalent_for_any_hidden_value(noise):
    (ppca, truth), x = make(noise), data()
    mask = ~np.isnan(x)
    expected = oracles.log_density(x, *truth)
    for filler in (0.0, 1e6, np.nan):
        filled = np.where(mask, x, filler)
        for form in (mask, torch.from_numpy(mask), mask.tolist()):
            assert_close(ppca.log_likelihood(filled, mask=form), expected)
        assert_close(ppca.posterior(filled, mask=mask).mean, ppca.posterior(x).mean.detach())
        assert_close(ppca.reconstruct(filled, mask=mask), ppca.reconstruct(x).detach())
        assert_close(ppca.impute(filled, mask=mask).mean, ppca.impute(x).mean)
    both = x.copy()
    both[0, 1], mask[0, 1] = 3.0, False
    x[0, 1] = np.nan
    assert_close(ppca.log_likelihood(both, mask=mask), oracles.log_density(x, *truth))


@pytest.mark.parametrize("noise", NOISES)
def test_a_complete_mask_changes_nothing(noise):
    ppca, _ = make(noise)
    x = oracles.simulate_ppca(SPECTRUM, 0.8, N, D, seed=0)
    full = np.ones(x.shape, dtype=bool)
    assert torch.equal(ppca.log_likelihood(x, mask=full), ppca.log_likelihood(x))
    # One missing value: the other rows, now solved by pattern, have the same results.
    incomplete = x.copy()
    incomplete[0, 0] = np.nan
    assert_close(ppca.log_likelihood(incomplete)[1:], ppca.log_likelihood(x)[1:].detach())
    assert_close(ppca.posterior(incomplete).mean[1:], ppca.posterior(x).mean[1:].detach())
    tril = ppca.posterior(x).scale_tril[1:]
    assert_close(ppca.posterior(incomplete).scale_tril[1:], tril.detach())


def test_gradients_match_the_dense_density():
    ppca, _ = make("diagonal")
    x = data(N=12)
    names = [ppca.loadings, ppca.loc, ppca.noise_scale_unconstrained]
    actual = torch.autograd.grad(ppca.log_likelihood(x).sum(), names)
    C = ppca.loadings @ ppca.loadings.mT + ppca.noise_scale.square().diag()
    total = torch.zeros((), dtype=torch.float64)
    for row in torch.from_numpy(x):
        s = (~row.isnan()).nonzero().flatten()
        block = torch.distributions.MultivariateNormal(ppca.loc[s], C[s][:, s])
        total = total + block.log_prob(row[s])
    torch.testing.assert_close(actual, torch.autograd.grad(total, names), rtol=1e-9, atol=1e-9)


def test_rows_that_share_a_pattern_are_solved_once():
    few = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]], dtype=bool)
    like = torch.zeros(3, dtype=torch.float64)
    patterns = MissingnessPatterns.distinct(torch.from_numpy(few), like)
    assert len(patterns.observed) == 3
    assert np.array_equal(patterns.gather_rows(patterns.observed).numpy(), few)
    sums = patterns.sum_by_pattern(torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64))
    assert sorted(sums.tolist()) == [10.0, 101.0, 1000.0]
    assert MissingnessPatterns.distinct(torch.eye(3).bool(), like).index is None


@pytest.mark.parametrize("noise", NOISES)
def test_weights_of_the_exact_guide_equal_the_observed_likelihood(noise):
    (ppca, truth), x = make(noise), data()
    weights = log_weights(ppca.model, ExactGuide(ppca), x, 3, seed=0)
    assert_close(weights, np.tile(oracles.log_density(x, *truth), (3, 1)), 1e-9)


def test_a_projection_needs_complete_rows():
    ppca, _ = make()
    x = data()
    with pytest.raises(
        ValueError, match=f"{np.isnan(x).sum()} missing .*shrink=True takes missing"
    ):
        ppca.reconstruct(x, shrink=False)


# Imputation


@pytest.mark.parametrize("noise", NOISES)
def test_missing_values_are_imputed_by_conditional_mean_and_sd(noise):
    (ppca, truth), x = make(noise), data("MAR")
    found = ppca.impute(x)
    mean, sd = oracles.impute(x, *truth)
    assert_close(found.mean, mean)
    assert_close(found.sd, sd)
    observed = ~np.isnan(x)
    assert np.array_equal(found.mean.numpy()[observed], x[observed])
    assert found.draws is None
    assert repr(found).startswith(
        f"Imputation: {int((~observed).sum())} of {x.size} entries filled, st"
    )


@pytest.mark.parametrize("noise", NOISES)
def test_draws_of_the_missing_values_of_a_row_are_joint(noise):
    """The squared Mahalanobis distances of the draws and of their mean are chi^2."""
    (ppca, (loc, loadings, variance)), x = make(noise), data("MAR")
    x = x[np.isnan(x).sum(1) > 1][:2]
    S = 4000
    draws = ppca.impute(x, draws=S, seed=0).draws.numpy()
    assert draws.shape == (S, *x.shape)
    # Two rows for each of the two noises, with three tails each.
    assert_draws_of_missing_values(draws, x, loc, oracles.ppca_covariance(loadings, variance), 12)


def test_draws_repeat_with_a_seed():
    (ppca, _), x = make(), data()
    first, again = (ppca.impute(x, draws=2, seed=4).draws for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, ppca.impute(x, draws=2, seed=5).draws)


def test_imputing_complete_data_changes_nothing():
    ppca, _ = make()
    x = oracles.simulate_ppca(SPECTRUM, 0.8, N, D, seed=0)
    found = ppca.impute(x, draws=2)
    assert np.array_equal(found.mean.numpy(), x)
    assert not found.sd.any()
    assert np.array_equal(found.draws.numpy(), np.stack([x, x]))


def test_a_float32_model_keeps_the_digits_of_observed_entries():
    x = data()
    ppca = PPCA.like(x, K, seed=0).float()
    found = ppca.impute(x).mean.numpy()
    assert found.dtype == np.float64
    assert np.array_equal(found[~np.isnan(x)], x[~np.isnan(x)])


@pytest.mark.parametrize("noise", NOISES)
def test_imputation_intervals_have_nominal_coverage(noise):
    """95 % intervals over five fits at N = 500, D = 20, K = 3, 20 % missing."""
    inside, cells = 0, 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scale = 0.7 if noise == "isotropic" else rng.uniform(0.4, 1.2, size=20)
        whole = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 20))
        whole = whole + scale * rng.normal(size=(500, 20))
        x = oracles.with_missing_values(whole, 0.2, seed)
        ppca = PPCA.like(x, 3, noise=noise, seed=0)
        fit_em(ppca, x)
        found, missing = ppca.impute(x), np.isnan(x)
        z = np.abs(whole - found.mean.numpy())[missing] / found.sd.numpy()[missing]
        inside, cells = inside + int((z < stats.norm.ppf(0.975)).sum()), cells + missing.sum()
    print(f"{noise}: {inside / cells:.4f} of {cells} cells covered")
    assert cells >= 2000
    assert 0.935 < inside / cells < 0.965


@pytest.mark.data
@pytest.mark.skipif("PPL_VAE_DATA" not in os.environ, reason="needs PPL_VAE_DATA")
def test_metabolite_imputation_matches_iterative_svd_and_covers():
    folder = Path(os.environ["PPL_VAE_DATA"]) / "pcaMethods"
    x, truth = (
        pd.read_csv(folder / f"metaboliteData{which}.csv", index_col=0).to_numpy(dtype=float)
        for which in ("", "Complete")
    )
    missing = np.isnan(x)
    assert missing.sum() == 419

    def error(filled):
        return np.sqrt(np.mean((filled - truth)[missing] ** 2))

    means = error(np.where(missing, np.nanmean(x, 0), x))
    for latent_dim in range(1, 9):
        ppca = PPCA.like(x, latent_dim, seed=0)
        fit_em(ppca, x)
        found = ppca.impute(x)
        mine, svd = error(found.mean.numpy()), error(oracles.iterative_svd(x, latent_dim))
        z = np.abs(found.mean.numpy() - truth)[missing] / found.sd.numpy()[missing]
        covered = (z < stats.norm.ppf(0.975)).mean()
        print(
            f"K = {latent_dim}: RMSE {mine:.4f}, {mine / means:.3f} of that of column means, "
            f"{mine / svd:.3f} of that of iterative SVD, {covered:.3f} covered"
        )
        assert mine <= 0.5 * means
        assert mine <= 1.02 * svd
        assert covered > 0.88  # the noise is neither normal nor of one size


@pytest.mark.parametrize("bad", [-1, 1.5, True])
def test_the_number_of_draws_must_be_an_integer(bad):
    with pytest.raises((ValueError, TypeError), match="draws"):
        make()[0].impute(data(), draws=bad)
