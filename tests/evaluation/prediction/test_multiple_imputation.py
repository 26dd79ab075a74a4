"""Imputation under draws of the parameters, and Rubin's rules."""

import time

import numpy as np
import oracles
import pytest
import torch
from scipy import optimize, stats
from sklearn.datasets import load_breast_cancer

from ppl_vae import PPCA, BayesianPPCA, impute, sample_posterior
from ppl_vae.core.imputed import Imputation
from ppl_vae.evaluation import pool
from ppl_vae.evaluation.prediction.multiple_imputation import parameters_matter
from ppl_vae.inference.mcmc.samples import PosteriorSamples

D, K = 5, 2


def samples(diagonal=False, num_draws=3, seed=0):
    """Two chains of draws that are not those of any posterior."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(2, num_draws, *shape, generator=generator, dtype=torch.float64)

    scale = draw(D) if diagonal else draw()
    draws = {"loadings": draw(D, K), "loc": draw(D), "noise_scale": 0.5 + scale.abs()}
    return PosteriorSamples(draws, "none", 0.0, 10)


def table(num_rows=7):
    x = np.random.default_rng(1).normal(size=(num_rows, D))
    x[0, 1], x[2, :3], x[4, 4], x[5] = np.nan, np.nan, np.nan, np.nan
    return x


def conditionals(x, posterior):
    """Mean and covariance of the missing values of a row, for each draw of the parameters."""
    loadings, loc, noise_scale, _ = (
        None if p is None else p.numpy() for p in posterior.parameters()
    )
    missing = np.isnan(x)
    for w, mu, sigma in zip(loadings, loc, noise_scale, strict=True):
        covariance = w @ w.T + np.diag(np.broadcast_to(sigma, D) ** 2)
        cross = covariance[np.ix_(missing, ~missing)]
        gain = cross @ np.linalg.inv(covariance[np.ix_(~missing, ~missing)])
        mean = mu[missing] + gain @ (x[~missing] - mu[~missing])
        yield mean, covariance[np.ix_(missing, missing)] - gain @ cross.T


MODEL = BayesianPPCA(D, K)


@pytest.mark.parametrize("diagonal", [False, True])
def test_moments_and_quantiles_are_those_of_the_mixture(diagonal):
    x, posterior = table(), samples(diagonal)
    levels = (0.025, 0.5, 0.9)
    found = impute(MODEL.model, None, x, posterior=posterior, quantiles=levels)
    assert found.parameter_draws == 6 and found.levels == levels
    observed = ~np.isnan(x)
    for values in (found.mean, *found.quantiles):
        np.testing.assert_array_equal(values.numpy()[observed], x[observed])
    assert not found.sd.numpy()[observed].any()
    for n in (0, 2, 4, 5):
        means, covariances = map(np.array, zip(*conditionals(x[n], posterior), strict=True))
        variances = np.diagonal(covariances, axis1=1, axis2=2)
        missing = np.isnan(x[n])
        np.testing.assert_allclose(found.mean[n].numpy()[missing], means.mean(0), atol=1e-10)
        total = variances.mean(0) + means.var(0)
        np.testing.assert_allclose(found.sd[n].numpy()[missing] ** 2, total, rtol=1e-10)
        for place, level in enumerate(levels):
            for k, d in enumerate(np.flatnonzero(missing)):
                exact = mixture_quantile(means[:, k], variances[:, k] ** 0.5, level)
                assert float(found.quantiles[place, n, d]) == pytest.approx(exact, abs=1e-4)


def mixture_quantile(means, sds, level):
    return optimize.brentq(lambda x: stats.norm.cdf(x, means, sds).mean() - level, -50, 50)


def test_each_joint_draw_has_parameters_of_its_own():
    # Draw r is normal with the conditional moments under draw r of the parameters.
    x, number = np.repeat(table()[2:3], 20_000, axis=0), 3
    posterior = samples(num_draws=2)
    drawn = impute(MODEL.model, None, x, posterior=posterior, draws=4, seed=0).draws
    exact = list(conditionals(x[0], posterior))
    for r in range(4):
        mean, covariance = exact[r]
        values = drawn[r, :, :number].numpy()
        error = np.sqrt(np.diag(covariance) / len(values))
        np.testing.assert_allclose((values.mean(0) - mean) / error, 0, atol=4)
        # The error of an element of a sample covariance is at most sqrt(2 / N) of its scale.
        scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
        away = (np.cov(values.T) - covariance) / scale
        np.testing.assert_allclose(away, 0, atol=4 * np.sqrt(2 / len(values)))
        np.testing.assert_array_equal(drawn[r, :, number:].numpy(), x[:, number:])


def test_draws_of_equal_parameters_are_plug_in_imputation():
    x = table()[[0, 1, 2, 4]]
    one = samples(num_draws=1).thin(1)
    same = {name: value[:1].expand(2, *value.shape[1:]) for name, value in one.draws.items()}
    ppca = MODEL.double().ppca(
        PosteriorSamples(same, "none", 0.0, 4)
        .parameters()
        ._replace(**{name: value[0, 0] for name, value in same.items()})
    )
    found = impute(MODEL.model, None, x, posterior=PosteriorSamples(same, "none", 0.0, 4))
    expected = ppca.impute(x)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.sd, expected.sd)


def test_a_complete_table_and_blocks_of_rows(monkeypatch):
    posterior, x = samples(), table()
    whole = impute(MODEL.model, None, np.nan_to_num(x), posterior=posterior, draws=2)
    assert not whole.sd.any() and torch.equal(whole.draws[0], torch.from_numpy(np.nan_to_num(x)))
    first = impute(MODEL.model, None, x, posterior=posterior)
    monkeypatch.setattr("ppl_vae.data.sources.row_blocks.WORKING_FLOATS", 1)
    second = impute(MODEL.model, None, x, posterior=posterior)
    torch.testing.assert_close(first.sd, second.sd)
    fewer = impute(MODEL.model, None, x, 2, posterior=posterior)
    assert fewer.parameter_draws == 2 and "uncertainty of the parameters (2 draws" in repr(fewer)
    again = Imputation.from_dict(fewer.to_dict())
    torch.testing.assert_close(again.sd, fewer.sd)


@pytest.mark.parametrize(
    ("model", "guide", "others", "text"),
    [
        (MODEL.model, None, {}, "guide=None and quantiles need the draws of a posterior"),
        (PPCA(D, K).model, None, {"posterior": 1}, "posterior needs a BayesianPPCA as the model"),
        (MODEL.model, MODEL.model, {"posterior": 1}, "with posterior no guide is used"),
        (MODEL.model, None, {"posterior": 1, "refine": 3}, "and no refine"),
        (MODEL.model, None, {"posterior": 1, "draws": 7}, "the posterior has 6"),
        (MODEL.model, None, {"posterior": 1, "quantiles": (0.0,)}, "between 0 and 1"),
        (MODEL.model, None, {"posterior": 1, "x": table()[:, :3]}, "x must have 5 columns"),
    ],
)
def test_invalid_arguments_are_named(model, guide, others, text):
    others = {"x": table()} | others | ({"posterior": samples()} if "posterior" in others else {})
    with pytest.raises(ValueError, match=text):
        impute(model, guide, **others)


# Rubin's rules


def test_pooling_follows_the_published_rules():
    rng = np.random.default_rng(0)
    q, u, m, complete = rng.normal(2, 0.3, size=(5, 3)), rng.uniform(0.1, 0.2, size=(5, 3)), 5, 40
    found = pool(list(q), list(u), freedom=complete)
    within, between = u.mean(0), q.var(0, ddof=1)
    total = within + (1 + 1 / m) * between
    share = (1 + 1 / m) * between / total
    old = (m - 1) / share**2
    observed = (complete + 1) / (complete + 3) * complete * (1 - share)
    freedom = old * observed / (old + observed)
    ratio = (1 + 1 / m) * between / within
    np.testing.assert_allclose(found.estimate, q.mean(0))
    np.testing.assert_allclose(found.variance, total)
    np.testing.assert_allclose(found.freedom, freedom)
    information = (ratio + 2 / (freedom + 3)) / (ratio + 1)
    np.testing.assert_allclose(found.missing_information, information)
    low, high = found.interval(0.9)
    half = stats.t.ppf(0.95, freedom) * total**0.5
    np.testing.assert_allclose(high - low, 2 * half)
    np.testing.assert_allclose(pool(list(q), list(u)).freedom, old)


def test_pooling_of_equal_estimates_and_of_quantities_of_the_table():
    found = pool([1.5, 1.5, 1.5], [0.04, 0.04, 0.04])
    assert float(found.standard_error) == pytest.approx(0.2) and found.freedom.isinf()
    assert float(found.interval()[1]) == pytest.approx(1.5 + 0.2 * stats.norm.ppf(0.975))
    found = pool([1.0, 2.0, 3.0])
    assert float(found.variance) == pytest.approx(4 / 3) and float(found.freedom) == 2
    assert "estimate 2" in repr(found) and "3 completed tables" in repr(found)
    assert "of shape (20,)" in repr(pool([torch.zeros(20)] * 2))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([1.0],), "at least two tables; got 1"),
        (([1.0, np.nan],), "must be finite"),
        (([1.0, 2.0], [0.1, -0.1]), "at least zero"),
        (([1.0, 2.0], [0.1]), "as many as estimates"),
        (([np.zeros(2), np.zeros(3)],), "must have one shape"),
    ],
)
def test_invalid_estimates_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        pool(*arguments)
    with pytest.raises(ValueError, match="needs variances"):
        pool([1.0, 2.0], freedom=3)


def test_the_rule_of_the_command():
    # D = 12, K = 3 with isotropic noise has 46 parameters, and 8.4 observed values per row.
    assert parameters_matter(int(8.4 * 200), 46) and not parameters_matter(int(8.4 * 300), 46)


# Coverage


def simulated(num_rows, seed, data_dim=12, latent_dim=3, scale=0.7):
    """A table of rank three with noise, and the same with 30 % of its values missing."""
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(data_dim, latent_dim))
    noise = scale * rng.normal(size=(num_rows, data_dim))
    whole = rng.normal(size=(num_rows, latent_dim)) @ loadings.T + noise
    return whole, oracles.with_missing_values(whole, 0.3, seed)


def imputed(x, latent_dim, noise, seed, num_samples=250, warmup=250):
    model = BayesianPPCA.like(x, latent_dim, noise=noise)
    posterior = sample_posterior(
        model, x, num_samples=num_samples, warmup=warmup, seed=seed, progress=False
    )
    return posterior, impute(
        model.model, None, x, posterior=posterior, quantiles=(0.025, 0.975), draws=20, seed=seed
    )


def shares(whole, found, missing):
    """The number of missing values within 1.96 sd, and between the quantiles."""
    away = np.abs(whole - found.mean.numpy())[missing] / found.sd.numpy()[missing]
    low, high = found.quantiles.numpy()[:, missing]
    inside = (low < whole[missing]) & (whole[missing] < high)
    return np.array([(away < stats.norm.ppf(0.975)).sum(), inside.sum()])


@pytest.mark.slow
@pytest.mark.parametrize(("num_rows", "num_tables"), [(20, 60), (30, 40), (50, 30), (100, 15)])
def test_intervals_have_their_coverage_with_few_rows(num_rows, num_tables):
    inside, total = np.zeros(2), 0
    for seed in range(num_tables):
        whole, x = simulated(num_rows, seed)
        inside = inside + shares(whole, imputed(x, 3, "isotropic", seed)[1], np.isnan(x))
        total += np.isnan(x).sum()
    print(f"N = {num_rows}: {inside / total}")
    assert ((inside / total > 0.93) & (inside / total < 0.97)).all()


@pytest.mark.slow
def test_pooled_means_have_their_coverage():
    # The mean of a column in the population, which is 0, from tables with 30 % missing.
    covered = []
    for seed in range(60):
        _, x = simulated(40, seed)
        tables = imputed(x, 3, "isotropic", seed)[1].draws.numpy()
        estimates, variances = tables.mean(1), tables.var(1, ddof=1) / len(x)
        low, high = pool(list(estimates), list(variances), freedom=len(x) - 1).interval()
        covered.append(((low < 0) & (high > 0)).double().mean())
    # Means of the 12 columns of a table are dependent: errors are those between tables.
    error = np.std(covered) / len(covered) ** 0.5
    print(f"coverage {np.mean(covered):.3f} +- {error:.3f}")
    assert abs(np.mean(covered) - 0.95) < 3 * error + 0.01


@pytest.mark.slow
def test_breast_cancer_with_half_of_all_cells_missing():
    whole = load_breast_cancer().data
    whole = (whole - whole.mean(0)) / whole.std(0)
    x = np.where(np.random.default_rng(0).random(whole.shape) < 0.5, np.nan, whole)
    x, whole = x[~np.isnan(x).all(1)], whole[~np.isnan(x).all(1)]
    start = time.perf_counter()
    # Neither K nor the noise uses the truth: under priors that shrink them, loadings of half as
    # many dimensions as columns are no risk, and diagonal noise includes isotropic noise.
    posterior, found = imputed(x, x.shape[1] // 2, "diagonal", 0, 150, 150)
    seconds, missing = time.perf_counter() - start, np.isnan(x)
    error = np.square(whole - found.mean.numpy())[missing].mean()
    inside = shares(whole, found, missing) / missing.sum()
    print(f"MSE {error:.3f}, coverage {inside}, {seconds:.0f} s")
    print(posterior.verdict)
    assert error < 0.25 and ((inside > 0.93) & (inside < 0.97)).all()
