"""Diagonal noise: factor analysis against dense oracles and scikit-learn."""

import numpy as np
import oracles
import pytest
import torch
from pyro import poutine
from sklearn.decomposition import FactorAnalysis

from fitted import assert_close, parameters
from ppl_vae import PPCA, ExactGuide, fit_closed_form, fit_em, load, save, variational_em
from ppl_vae.evaluation import subspace
from ppl_vae.inference.em.noise import Noise

N, D, K = 60, 7, 3


def simulate(N, D, K, seed):
    """Data of a factor model with noise variances of several sizes."""
    rng = np.random.default_rng(seed)
    scale = np.exp(0.5 * rng.normal(size=D))
    return rng.normal(size=(N, K)) @ rng.normal(size=(K, D)) + scale * rng.normal(size=(N, D)) + 2


def make(seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=D), rng.normal(size=(D, K)), rng.uniform(0.3, 2.0, size=D)
    loc, loadings, variance = map(torch.tensor, truth)
    return PPCA.from_parameters(loadings, loc, variance.sqrt()), truth


# Exact quantities


def test_every_exact_quantity_matches_the_dense_covariance():
    ppca, (loc, loadings, variance) = make()
    x, C = simulate(N, D, K, 1), oracles.ppca_covariance(loadings, variance)
    assert ppca.noise == "diagonal"
    assert_close(ppca.covariance(), C)
    assert_close(ppca.marginal().covariance_matrix, C)
    assert_close(ppca.log_likelihood(x), oracles.log_density(x, loc, loadings, variance))
    means, covariances = oracles.posterior(x, loc, loadings, variance)
    assert_close(ppca.posterior(x).mean, means)
    assert_close(ppca.posterior(x).covariance_matrix, covariances)
    assert_close(ppca.reconstruct(x), means @ loadings.T + loc)
    weighted = loadings / variance[:, None]  # Bartlett scores
    scores = np.linalg.solve(loadings.T @ weighted, weighted.T @ (x - loc).T).T
    assert_close(ppca.reconstruct(x, shrink=False), scores @ loadings.T + loc)
    draws = ppca.sample(20_000, seed=0).numpy()
    spread = np.linalg.eigvals(np.linalg.solve(C, np.cov(draws.T))).real
    assert np.abs(spread - 1).max() < 6 * np.sqrt(D / 20_000)


def test_isotropic_noise_is_a_special_case():
    ppca, (loc, loadings, _) = make()
    x = simulate(N, D, K, 1)
    ppca.assign(noise_scale=0.7)
    other = PPCA.from_parameters(torch.tensor(loadings), torch.tensor(loc), 0.7)
    assert other.noise == "isotropic"
    assert_close(ppca.log_likelihood(x), other.log_likelihood(x).detach())
    assert_close(ppca.reconstruct(x, shrink=False), other.reconstruct(x, shrink=False).detach())
    assert_close(ppca.canonical().loadings, other.canonical().loadings.detach())


def test_the_canonical_form_makes_the_latents_independent_given_x():
    ppca, (_, loadings, variance) = make()
    canonical = ppca.canonical()
    found = parameters(canonical)[1]
    inner = found.T @ (found / variance[:, None])
    assert_close(inner - np.diag(np.diag(inner)), 0)
    assert (np.diff(np.diag(inner)) < 0).all()
    assert_close(found @ found.T, loadings @ loadings.T)
    assert (found[np.abs(found).argmax(0), range(K)] > 0).all()


def test_the_program_has_one_noise_scale_per_column():
    ppca, (_, _, variance) = make()
    x = torch.from_numpy(simulate(N, D, K, 1))
    trace = poutine.trace(ppca.model).get_trace(x, mask=x > 0)
    site = trace.nodes["x"]["fn"]
    assert (site.batch_shape, site.event_shape) == ((N,), (D,))
    z = trace.nodes["z"]["value"]
    cells = torch.distributions.Normal(
        z @ ppca.loadings.T + ppca.loc, torch.tensor(variance).sqrt()
    ).log_prob(x)
    expected = torch.where(x > 0, cells, 0.0).sum(1)
    torch.testing.assert_close(site.log_prob(trace.nodes["x"]["value"]), expected)
    assert ppca.model(num_data=3).shape == (3, D)


def test_the_kl_between_factor_models_matches_dense_covariances():
    (first, ours), (second, theirs) = make(0), make(1)
    assert subspace(first, second).kl == pytest.approx(oracles.implied_kl(ours, theirs), rel=1e-9)
    flat = PPCA.from_parameters(second.loadings.detach(), second.loc.detach(), 0.8)
    theirs = (*theirs[:2], 0.64)
    assert subspace(first, flat).kl == pytest.approx(oracles.implied_kl(ours, theirs), rel=1e-9)
    assert subspace(flat, first).kl == pytest.approx(oracles.implied_kl(theirs, ours), rel=1e-9)


def test_a_factor_model_can_be_saved_and_loaded(tmp_path):
    ppca, _ = make()
    again = load(save(ppca, tmp_path / "fa"))
    assert again.noise == "diagonal"
    assert_close(again.covariance(), ppca.covariance().detach())


@pytest.mark.parametrize("missing", [False, True])
def test_the_initial_model_has_the_scale_of_each_column(missing):
    x = simulate(N, D, K, 1) * 10.0 ** np.arange(D)
    x = oracles.with_missing_values(x, 0.2, 0) if missing else x
    ppca = PPCA.like(x, K, noise="diagonal", seed=0)
    assert_close(ppca.noise_scale, np.sqrt(np.nanvar(x, 0) / 2))
    assert_close(ppca.loc, np.nanmean(x, 0))
    explained = ppca.loadings.detach().square().sum(1).numpy() / (np.nanvar(x, 0) / 2)
    assert ((explained > 0.01) & (explained < 10)).all()


# Fits


@pytest.mark.parametrize("sizes", [(500, 20, 3), (1000, 60, 5), (300, 10, 2)])
def test_px_em_reaches_the_optimum_of_scikit_learn(sizes):
    N, D, K = sizes
    x = simulate(N, D, K, seed=D + 1)
    theirs = FactorAnalysis(K, svd_method="lapack", tol=1e-10, max_iter=10_000).fit(x)
    ppca = PPCA.like(x, K, noise="diagonal", seed=0)
    result = fit_em(ppca, x, tol=1e-10)
    assert float(result.log_likelihood[-1]) == pytest.approx(theirs.score(x), abs=1e-7)
    assert float(ppca.log_likelihood(x).mean().detach()) == pytest.approx(
        theirs.score(x), abs=1e-7
    )
    np.testing.assert_allclose(
        ppca.covariance().detach(), theirs.get_covariance(), atol=1e-2 * np.var(x, 0).max()
    )
    assert result.notes == ()
    assert result.steps < theirs.n_iter_


def test_one_step_on_complete_data_matches_explicit_posteriors():
    (ppca, (_, loadings, variance)), x = make(), simulate(N, D, K, 1)
    truth = x.mean(0), loadings, variance
    for accelerate in (True, False):
        ppca.assign(loadings=torch.tensor(loadings), noise_scale=torch.tensor(variance).sqrt())
        fit_em(ppca, x, accelerate=accelerate, max_iterations=1)
        expected = oracles.em_step_missing(x, *truth, diagonal=True, expand=accelerate)
        for mine, its in zip(parameters(ppca), expected, strict=True):
            assert_close(mine, its, 1e-9)


@pytest.mark.parametrize("start", [(1e-3, 1.0), (1e3, 1.0), (1.0, 1e-6), (1.0, 1e6), (1e-3, 1e-4)])
@pytest.mark.parametrize("name", ["EM", "PX-EM", "diagonal", "isotropic", "unit", "rotating"])
def test_the_bound_is_monotone_from_extreme_starts(start, name):
    x, (scale, variance) = simulate(N, D, K, 1), start
    rng = np.random.default_rng(3)
    loadings = torch.tensor(scale * rng.normal(size=(D, K)))
    noise = torch.tensor(variance * rng.uniform(0.5, 2.0, size=D)).sqrt()
    ppca = PPCA.from_parameters(loadings, torch.zeros(D), noise)
    if "EM" in name:
        result = fit_em(ppca, x, accelerate=name == "PX-EM", tol=0.0, max_iterations=40)
    else:
        rotate = name == "rotating"
        family = "diagonal" if rotate else name
        result = variational_em(
            ppca, x, covariance=family, rotate=rotate, tol=0.0, max_iterations=40
        )
    least = min(variance / 2, parameters(ppca)[2].min())
    size = result.objective.abs()
    largest = max(np.var(x, 0).sum(), scale**2 * D)
    slack = 1e-14 * (D * largest / least + torch.maximum(size[1:], size[:-1]))
    assert (result.objective.diff() >= -slack).all()
    assert (result.objective <= result.log_likelihood + slack[0]).all()
    truth = oracles.mean_log_density(x, *parameters(ppca))
    assert float(result.log_likelihood[-1]) == pytest.approx(truth, rel=1e-9)


def test_rotating_variational_em_reaches_the_optimum():
    x = simulate(300, 10, 2, seed=11)
    first, second = (PPCA.like(x, 2, noise="diagonal", seed=0) for _ in range(2))
    best = float(fit_em(first, x, tol=1e-11).objective[-1])
    rotating = variational_em(second, x, tol=1e-11)
    assert float(rotating.objective[-1]) == pytest.approx(best, abs=1e-8)
    q = ExactGuide(second, covariance="diagonal").distribution(x)
    assert_close(q.variance[0], second.posterior(x).variance[0].detach(), 1e-8)


def test_scaling_a_column_changes_its_own_parameters_alone():
    x, scale = simulate(300, 10, 2, seed=11), 10.0 ** np.arange(-4, 6)
    first, second = (PPCA.like(units * x, 2, noise="diagonal", seed=0) for units in (1, scale))
    ends = [fit_em(ppca, units * x) for ppca, units in ((first, 1), (second, scale))]
    shift = float(ends[0].log_likelihood[-1] - ends[1].log_likelihood[-1])
    assert shift == pytest.approx(np.log(scale).sum(), abs=1e-8)
    assert_close(second.noise_scale.detach().numpy() / scale, first.noise_scale.detach(), 1e-3)


@pytest.mark.parametrize("d", range(D))
def test_an_accelerated_noise_variance_maximizes_the_density_in_it_alone(d):
    (_, loadings, variance), x = make()[1], simulate(N, D, K, 1)
    loc = x.mean(0)
    means, covariances = oracles.posterior(x, loc, loadings, variance)
    residual = ((x - loc - means @ loadings.T) ** 2).mean(0)
    spread = np.einsum("dk,kl,dl->d", loadings, covariances[0], loadings)
    rule = Noise(torch.full((D,), 1e-9, dtype=torch.float64), True)
    accelerated = rule.accelerate(*map(torch.tensor, (variance, residual, spread))).numpy()

    def value(factor):
        moved = variance.copy()
        moved[d] = accelerated[d] * factor
        return oracles.mean_log_density(x, loc, loadings, moved)

    assert accelerated[d] > 1e-8
    assert value(1.0) > max(value(1.01), value(0.99), value(variance[d] / accelerated[d]))
    slope = (value(1 + 1e-4) - value(1 - 1e-4)) / 2e-4
    assert abs(slope) < 1e-6


# Columns without noise (Heywood cases)


def heywood(missing):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 6)) * 2 + rng.normal(size=(40, 6))
    return oracles.with_missing_values(x, 0.1, 1) if missing else x


@pytest.mark.parametrize("missing", [False, True])
def test_a_vanishing_noise_variance_reaches_its_floor_and_is_noted(missing):
    x = heywood(missing)
    ends = []
    for floor in (1e-2, 1e-4):
        ppca = PPCA.like(x, 2, noise="diagonal", seed=0)
        result = fit_em(ppca, x, noise_floor=floor)
        assert result.notes == ("noise at its floor (Heywood cases): 5",)
        assert "note: noise at its floor" in repr(result)
        shares = parameters(ppca)[2] / np.nanvar(x, 0)
        assert shares[5] == pytest.approx(floor, rel=1e-9)
        assert (np.delete(shares, 5) > 0.02).all()
        assert result.steps < 300
        ends.append(float(result.log_likelihood[-1]))
    assert ends[0] < ends[1]


def test_a_duplicated_column_is_noted():
    x = simulate(100, 8, 2, seed=0)
    x[:, 1] = x[:, 0]
    result = fit_em(PPCA.like(x, 2, noise="diagonal", seed=0), x)
    (note,) = result.notes
    assert note.startswith("noise at its floor (Heywood cases): 0, 1")


# Invalid arguments


def test_a_constant_column_is_rejected():
    x = simulate(N, D, K, 1)
    x[:, 2] = 0.1
    message = r"x has constant columns: \[2\]; .*noise='isotropic'"
    with pytest.raises(ValueError, match=message):
        PPCA.like(x, K, noise="diagonal")
    with pytest.raises(ValueError, match=message):
        fit_em(PPCA(D, K, noise="diagonal"), x)
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match=message):
        fit_em(PPCA(D, K, noise="diagonal"), x)


def test_there_is_no_closed_form_of_factor_analysis():
    x = simulate(N, D, K, 1)
    with pytest.raises(ValueError, match=r"no closed form with noise='diagonal'.*use fit_em"):
        fit_closed_form(PPCA(D, K, noise="diagonal"), x)


@pytest.mark.parametrize("bad", [0.0, 1.0, -1e-3])
@pytest.mark.parametrize("fit", [fit_em, variational_em])
def test_noise_floor_must_be_a_share(fit, bad):
    with pytest.raises(ValueError, match="noise_floor must lie between 0 and 1"):
        fit(PPCA(D, K, noise="diagonal"), simulate(N, D, K, 1), noise_floor=bad)


def test_an_unknown_noise_is_rejected():
    with pytest.raises(
        ValueError, match="noise must be one of 'isotropic', 'diagonal'; got 'full'"
    ):
        PPCA(D, K, noise="full")


@pytest.mark.parametrize("shape", [(1,), (D - 1,), (D, 1)])
def test_noise_scales_of_another_shape_are_not_broadcast(shape):
    with pytest.raises((ValueError, TypeError), match="noise_scale"):
        make()[0].assign(noise_scale=torch.ones(shape))
    with pytest.raises(ValueError, match=r"noise_scale must be positive; got -1\.0"):
        make()[0].assign(noise_scale=torch.linspace(-1, 1, D))
