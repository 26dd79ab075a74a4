"""Annealed importance sampling, and bidirectional Monte Carlo, against exact answers."""

import itertools
import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, special, stats

import loops
import oracles
import user_pairs
from ppl_vae import PPCA, VAE, ExactGuide, Gaussian, digits, fit_svi, log_likelihood
from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import isolated_store, seeded, train_mode
from ppl_vae.evaluation import Annealing, bidirectional
from ppl_vae.evaluation.marginal_likelihood import annealed, batching
from ppl_vae.evaluation.marginal_likelihood.annealed import AISChains, AISWeights
from ppl_vae.evaluation.marginal_likelihood.annealing_path import AnnealingPath
from ppl_vae.evaluation.marginal_likelihood.importance import prior_guide

D, K = 4, 2


def make(K=K, D=D, noise=0.8, seed=0):
    """A PPCA in general position, and its parameters (loc, loadings, noise variance)."""
    rng = np.random.default_rng(seed)
    loadings, loc = 0.7 * rng.normal(size=(D, K)), 3 * rng.normal(size=D)
    scale = torch.tensor(noise**0.5, dtype=torch.float64)
    ppca = PPCA.from_parameters(torch.tensor(loadings), torch.tensor(loc), scale)
    return ppca, (loc, loadings, noise)


def log_weights_of(model, guide, x, num_chains, annealing, seed=0):
    """The log weights of chains per datum, (S, N)."""
    x = torch.as_tensor(x)
    with torch.no_grad(), isolated_store(), seeded(seed), train_mode(model, guide, training=False):
        sampler = AISWeights(annealing, x, len(x), num_chains, capture="auto")
        return sampler(Pair(model, guide), Batch(x), num_chains)


def agrees(estimates, truth, num_assertions=1):
    """Whether a mean of independent values agrees with the exact value within its error."""
    error = estimates.std(ddof=1) / len(estimates) ** 0.5
    return abs(estimates.mean() - truth) < oracles.z_limit(num_assertions) * error


# Exact chains


@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
@pytest.mark.parametrize("num_temperatures", [1, 4])
def test_from_the_exact_posterior_every_chain_is_the_log_likelihood(schedule, num_temperatures):
    ppca, parameters = make()
    x, annealing = ppca.sample(10, seed=0), Annealing(num_temperatures, schedule, leapfrog=2)
    options = {"method": "annealed", "annealing": annealing, "seed": 0}
    found = log_likelihood(ppca.model, ExactGuide(ppca), x, 25, **options)
    np.testing.assert_allclose(found.value, oracles.log_density(x, *parameters), atol=1e-9)
    assert found.reliable.all()
    assert (found.num_samples, found.method) == (25, "annealed")


# The mean weight is p(x), however few the temperatures


def data_plate(x, index, num_data, dim=None):
    rows = torch.arange(len(x)) if index is None else index
    return pyro.plate("data", num_data or len(x), subsample=rows, dim=dim)


RATES, COUNTS = torch.tensor([0.7, 1.5]), torch.tensor([1.5, 0.8, 2.0])


def gamma_poisson(x, index=None, num_data=None):
    with data_plate(x, index, num_data):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0).expand([1]).to_event(1))
        pyro.sample("x", dist.Poisson(z * RATES).to_event(1), obs=x)


def gamma_poisson_log_p(x):
    """z ~ Gamma(2, 1), x_d ~ Poisson(r_d z): the counts' sum is negative binomial."""
    total, rate = x.sum(-1), float(RATES.sum())
    return (
        (special.xlogy(x, RATES.numpy()) - special.gammaln(x + 1)).sum(-1)
        + special.gammaln(2 + total)
        - special.gammaln(2)
        - (2 + total) * np.log1p(rate)
    )


def log_normal_guide(x, index=None, num_data=None):
    with data_plate(x, index, num_data):
        pyro.sample("z", dist.LogNormal(torch.zeros(1), 0.8).to_event(1))


def dirichlet_multinomial(x, index=None, num_data=None):
    with data_plate(x, index, num_data):
        z = pyro.sample("z", dist.Dirichlet(COUNTS))
        pyro.sample("x", dist.Multinomial(5, z), obs=x)


def dirichlet_multinomial_log_p(x):
    alpha, n = COUNTS.numpy(), x.sum(-1)
    return (
        special.gammaln(n + 1)
        + special.gammaln(alpha.sum())
        - special.gammaln(alpha.sum() + n)
        + (special.gammaln(alpha + x) - special.gammaln(alpha) - special.gammaln(x + 1)).sum(-1)
    )


def triangle(x, index=None, num_data=None):
    """A support that depends on another site: 0 < b < a < 1."""
    with data_plate(x, index, num_data):
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))
        pyro.sample("x", dist.Normal(b.unsqueeze(-1), 0.3).to_event(1), obs=x)


def triangle_log_p(x):
    def mean(value):
        def inner(a):
            return np.diff(stats.norm(value, 0.3).cdf([0, a]))[0] / a

        return integrate.quad(inner, 0, 1)[0]

    return np.log([mean(value) for value in x[:, 0]])


def latents_in_a_plate(x, index=None, num_data=None):
    """Data at dim -1, features, each with a latent variable of its own, at dim -2."""
    with data_plate(x, index, num_data, dim=-1), pyro.plate("features", 3, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x.T)


def latents_in_a_plate_log_p(x):
    return stats.norm(0, np.sqrt(1.64)).logpdf(x).sum(-1)


def two_dimensions_only(x, index=None, num_data=None):
    """A program that cannot be run under another plate: its rows are run many times."""
    with data_plate(x, index, num_data):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        assert z.dim() == 2
        pyro.sample("x", dist.Normal(z, 0.8).to_event(1), obs=x)


def two_dimensions_only_log_p(x):
    return stats.norm(0, np.sqrt(1.64)).logpdf(x).sum(-1)


SOME_COUNTS = [[3.0, 2], [1, 2], [3, 6]]
CASES = {
    "positive": (gamma_poisson, None, gamma_poisson_log_p, SOME_COUNTS),
    "guided": (gamma_poisson, log_normal_guide, gamma_poisson_log_p, SOME_COUNTS),
    "simplex": (
        dirichlet_multinomial,
        None,
        dirichlet_multinomial_log_p,
        [[5.0, 0, 0], [1, 2, 2]],
    ),
    "dependent": (triangle, None, triangle_log_p, [[0.7], [-0.2]]),
    "plate": (latents_in_a_plate, None, latents_in_a_plate_log_p, [[0.5, 1.0, -1.5]]),
    "rows": (two_dimensions_only, None, two_dimensions_only_log_p, [[0.5, -1.5], [1.0, 0.2]]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_mean_weight_is_the_likelihood(name, float64):
    """Few temperatures and large steps: what is wrong with a move or a density shows."""
    model, guide, truth, x = CASES[name]
    x = np.array(x)
    guide = guide or prior_guide(model)
    annealing = Annealing(6, "linear", leapfrog=2)
    weights = log_weights_of(model, guide, x, 4000, annealing).numpy() - truth(x)
    assert (
        np.exp(weights).std(0).max() < 1.5
    )  # so that 4,000 chains show differences of some per cent
    assert np.exp(weights).std(0).min() > 0.02  # what is exact for every chain shows nothing
    for n, column in enumerate(weights.T):
        print(
            name, n, column.std(), (np.exp(column).mean() - 1) / np.exp(column).std() * 4000**0.5
        )
        assert agrees(np.exp(column), 1, len(x))


def test_the_mean_weight_of_reverse_chains_is_the_reciprocal_likelihood():
    ppca, parameters = make()
    template = np.zeros((500, D))
    found = bidirectional(
        ppca.model, None, template, 2, annealing=Annealing(4, "linear", leapfrog=2), seed=0
    )
    truth = oracles.log_density(found.x.numpy(), *parameters)
    assert agrees(np.exp(found.lower.numpy() - truth), 1)
    ratios = np.exp(truth - found.upper.numpy())
    assert ratios.std() > 0.05
    assert agrees(ratios, 1)


# How the gap closes


def gap_of(ppca, x, parameters, annealing, num_chains, seed=0):
    """log p - E[log w], and its standard error: the mean over data and chains."""
    weights = log_weights_of(ppca.model, prior_guide(ppca.model), x, num_chains, annealing, seed)
    means = oracles.log_density(x, *parameters) - weights.numpy().mean(0)
    return means.mean(), means.std(ddof=1) / len(x) ** 0.5


def exact_gap(x, parameters, num_temperatures):
    """(KL(prior || posterior) + KL(posterior || prior)) / (2 T), the mean over the data."""
    prior, costs = (np.zeros(K), np.eye(K)), []
    for mean, covariance in zip(*oracles.posterior(x, *parameters), strict=True):
        there = oracles.gaussian_kl(*prior, mean, covariance)
        costs.append(there + oracles.gaussian_kl(mean, covariance, *prior))
    return np.mean(costs) / (2 * num_temperatures)


def test_the_gap_of_exact_moves_agrees_with_the_formula(monkeypatch):
    """Draws of f_b itself, which is Gaussian here, replace the moves."""
    ppca, (loc, loadings, noise) = make(noise=0.2)
    x = ppca.sample(60, seed=0)
    W, centred = torch.tensor(loadings), x - torch.tensor(loc)

    def exact(self, state, beta, step):
        covariance = torch.linalg.inv(torch.eye(K) + beta * W.T @ W / noise)
        mean = beta / noise * centred @ W @ covariance
        tril = torch.linalg.cholesky(covariance)
        points = mean + torch.randn_like(state.points) @ tril.T
        return self._state(points), torch.ones_like(state.density.log_weight)

    monkeypatch.setattr(AISChains, "_move", exact)
    for schedule, rel in (("linear", 0.05), ("sigmoid", 0.3)):
        annealing = Annealing(30, schedule, leapfrog=1)
        gap, error = gap_of(ppca, x, (loc, loadings, noise), annealing, 32)
        expected = exact_gap(x.numpy(), (loc, loadings, noise), 30)
        print(f"{schedule}: gap {gap:.4f} ± {error:.4f}, expected {expected:.4f}")
        assert gap == pytest.approx(expected, rel=rel, abs=4 * error)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
def test_the_gap_halves_as_temperatures_double(schedule):
    ppca, parameters = make(noise=0.05)
    x = ppca.sample(250, seed=0).numpy()
    gaps = []
    for num_temperatures in (100, 200, 400):
        annealing = Annealing(num_temperatures, schedule, leapfrog=4)
        gap, error = gap_of(ppca, x, parameters, annealing, 32)
        expected = exact_gap(x, parameters, num_temperatures)
        print(f"T = {num_temperatures}: gap {gap:.5f} ± {error:.5f}, exact linear {expected:.5f}")
        assert error < 0.07 * gap
        gaps.append(gap)
    for first, second in itertools.pairwise(gaps):
        assert first / second == pytest.approx(2, rel=0.2)


@pytest.mark.slow
def test_enough_temperatures_come_within_a_hundredth_of_a_nat():
    ppca, parameters = make()
    x = ppca.sample(100, seed=0).numpy()
    truth = oracles.log_density(x, *parameters).mean()
    annealing = Annealing(600, "linear", leapfrog=4)
    weights = log_weights_of(ppca.model, prior_guide(ppca.model), x, 64, annealing)
    print(f"truth - E[log w] = {truth - float(weights.mean()):.5f}")
    assert abs(truth - float(weights.mean())) < 0.01
    estimate = torch.logsumexp(weights, 0) - np.log(64)
    assert abs(float(estimate.mean()) - truth) < 0.01


# The estimate and its reliability


def test_annealing_is_reliable_where_prior_draws_are_not():
    ppca, parameters = make(K=4, D=8, noise=0.2)
    x = ppca.sample(40, seed=0).numpy()
    truth = oracles.log_density(x, *parameters)
    prior = log_likelihood(ppca.model, None, x, 500, method="prior", seed=0)
    options = {"method": "annealed", "annealing": Annealing(30, leapfrog=2), "seed": 0}
    found = log_likelihood(ppca.model, None, x, 100, **options)
    print(prior, found)
    assert prior.share_reliable < 0.2
    assert found.share_reliable > 0.5
    z = (found.value.numpy() - truth) / found.standard_error.numpy()
    assert np.abs(z[found.reliable]).max() < 6
    assert "moves accepted" in found.execution
    assert found.value.dtype == torch.float64


def test_chains_start_from_a_refined_guide():
    ppca, parameters = make()
    x = ppca.sample(10, seed=0).numpy()
    options = {"method": "annealed", "annealing": Annealing(3, leapfrog=2), "seed": 0}
    found = log_likelihood(ppca.model, two_sided(ppca), x, 30, refine=80, **options)
    np.testing.assert_allclose(found.value, oracles.log_density(x, *parameters), atol=0.1)
    assert (found.ess > 25).all()


def two_sided(ppca):
    """A guide far from the posterior: N(1, 4 I)."""

    def guide(x, index=None, num_data=None):
        with data_plate(x, index, num_data):
            loc = torch.ones(K, dtype=torch.float64)
            pyro.sample("z", dist.Normal(loc, 2.0).to_event(1))

    return guide


def test_few_chains_and_few_temperatures_are_unreliable():
    ppca, _ = make(K=6, D=10, noise=0.001)
    x = ppca.sample(5, seed=0)
    options = {"method": "annealed", "annealing": Annealing(2, leapfrog=1), "seed": 0}
    found = log_likelihood(ppca.model, None, x, 30, **options)
    assert not found.reliable.any()
    assert "remedy: more chains, or more temperatures" in repr(found)
    few = log_likelihood(ppca.model, None, x, 3, **options)
    assert "too few draws were made to assess it, 3;" in repr(few)


def test_missing_values_are_marginalized():
    ppca, parameters = make()
    x = oracles.with_missing_values(ppca.sample(20, seed=0).numpy(), 0.4, seed=0)
    options = {"method": "annealed", "annealing": Annealing(10, leapfrog=2), "seed": 0}
    found = log_likelihood(ppca.model, None, x, 200, **options)
    z = (found.value.numpy() - oracles.log_density(x, *parameters)) / found.standard_error.numpy()
    assert np.abs(z).max() < oracles.z_limit(20)
    assert float(found.standard_error.mean()) < 0.1


def test_data_and_chains_are_processed_in_batches(monkeypatch):
    """Estimates are exact for any number of rows at once."""
    ppca, parameters = make()
    x, sizes = ppca.sample(3, seed=0).numpy(), []
    monkeypatch.setattr(batching, "ROWS_AT_ONCE", dict.fromkeys(batching.ROWS_AT_ONCE, 6))
    monkeypatch.setattr(annealed, "FIRST_TUNING_MOVES", 1)

    def model(x, index=None, num_data=None):
        sizes.append(0 if index is None else len(index))
        return ppca.model(x, index=index, num_data=num_data)

    options = {"method": "annealed", "annealing": Annealing(2, leapfrog=1), "seed": 0}
    found = log_likelihood(model, ExactGuide(ppca), x, 13, **options)
    np.testing.assert_allclose(found.value, oracles.log_density(x, *parameters), atol=1e-9)
    assert max(sizes) == 1
    bounds = bidirectional(ppca.model, ExactGuide(ppca), x, 13, annealing=Annealing(2, leapfrog=1))
    np.testing.assert_allclose(
        bounds.upper, oracles.log_density(bounds.x.numpy(), *parameters), atol=1e-9
    )


def test_step_sizes_of_measured_chains_are_fixed():
    ppca, _ = make(noise=0.05)
    x = ppca.sample(20, seed=0)
    with torch.no_grad(), isolated_store(), seeded(0):
        sampler = AISWeights(Annealing(15, leapfrog=2), x, 20, 8)
        pair = Pair(ppca.model, prior_guide(ppca.model))
        chains = AISChains(sampler, AnnealingPath(pair, Batch(x)))
        before = chains.steps.clone()
        chains.forward(8)
    assert torch.equal(chains.steps, before)
    assert chains.steps.shape == (14, 20)
    # Steps become smaller towards the posterior, which is much narrower than the prior here.
    assert (chains.steps[-1] < 0.7 * chains.steps[0]).all()
    acceptance = float(torch.stack(sampler.acceptance).mean())
    assert acceptance == pytest.approx(annealed.TARGET_ACCEPTANCE, abs=0.1)


def test_a_leapfrog_step_takes_one_evaluation():
    """Densities at the points of chains are kept for the next temperature."""
    ppca, _ = make()
    x, calls = ppca.sample(3, seed=0), []

    class Counted(AnnealingPath):
        def density(self, tensors, points):
            calls.append(len(points))
            return super().density(tensors, points)

    with torch.no_grad(), isolated_store(), seeded(0):
        annealing = Annealing(4, leapfrog=3)
        chains = AISChains(
            AISWeights(annealing, x, 3, 20),
            Counted(Pair(ppca.model, prior_guide(ppca.model)), Batch(x)),
        )
        assert set(calls) == {annealed.TUNING_CHAINS}
        calls.clear()
        chains.forward(20)
    assert calls == [20] * (1 + 3 * 3)


@torch.no_grad()
def test_the_gradients_along_the_path_are_those_of_its_densities(float64):
    ppca, _ = make()
    x = ppca.sample(3, seed=0)
    with isolated_store(), seeded(0):
        path = AnnealingPath(Pair(ppca.model, prior_guide(ppca.model)), Batch(x))
        points, beta, step = path.draw(2), torch.tensor(0.3), 1e-6
        density = path.density(path.batch.tensors, points)
        direction = torch.randn_like(points)
        ends = [
            path.density(path.batch.tensors, points + sign * step * direction).log_prob(beta)
            for sign in (-1, 1)
        ]
    slope = (density.grad(beta) * direction).sum(-1)
    torch.testing.assert_close((ends[1] - ends[0]) / (2 * step), slope, rtol=1e-6, atol=1e-6)


def test_temperatures_without_tuning_use_the_nearest_step_size(monkeypatch):
    monkeypatch.setattr(annealed, "MAX_TUNED_TEMPERATURES", 4)
    ppca, _ = make()
    x = ppca.sample(3, seed=0)
    with torch.no_grad(), isolated_store(), seeded(0):
        sampler = AISWeights(Annealing(12, leapfrog=2), x, 3, 8)
        path = AnnealingPath(Pair(ppca.model, prior_guide(ppca.model)), Batch(x))
        steps = AISChains(sampler, path).steps
    assert steps.shape == (11, 3)
    assert [len(np.unique(column)) for column in steps.numpy().T] == [4, 4, 4]


# Any pair


def first_rows(name):
    model, guide, x = user_pairs.PAIRS[name]()
    return model, guide, x[:4]


@pytest.mark.parametrize("name", user_pairs.PAIRS)
@pytest.mark.parametrize(
    "from_prior", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["guide", "prior"]
)
def test_densities_along_the_path_agree_with_a_slow_loop(name, from_prior, float64):
    """log w at points of unconstrained space, and log q there, up to the Jacobian of exp."""
    model, guide, x = first_rows(name)
    guide = prior_guide(model) if from_prior else guide
    with torch.no_grad(), isolated_store(), train_mode(model, guide, training=False):
        sampler = AISWeights(Annealing(), x, len(x), 3)
        with seeded(0), loops.Recorder() as recorder:
            path = AnnealingPath(Pair(model, guide), Batch(x))
            recorder.values.clear()
            points = path.draw(3)
        log_q, weights = path.log_q_and_weight(path.batch.tensors, points)
        expected = loops.slow_log_weights(model, guide, x, recorder, 3)
        q = sum(slow_guide(guide, x, recorder, s) for s in range(3))
        density = sampler.density(path, points)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)
    jacobian = points.sum((-2, -1)) if name == "positive_latent" else torch.zeros(3)
    torch.testing.assert_close(log_q.sum(), q + jacobian.sum(), rtol=1e-9, atol=1e-9)
    log_prob = density.log_prob(torch.tensor(0.3))
    torch.testing.assert_close(log_prob, log_q + 0.3 * weights)


def slow_guide(guide, x, recorder, s):
    """The sum over the data of log q at one of the recorded draws."""
    draw = recorder.draws(3)[s]
    return sum(loops.log_joint(guide, recorder.row(draw, n), x[n : n + 1]) for n in range(len(x)))


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_every_pair_can_be_annealed(name, float64):
    model, guide, x = first_rows(name)
    rng_state = torch.get_rng_state()
    options = {"method": "annealed", "annealing": Annealing(4, leapfrog=1), "seed": 0}
    found = log_likelihood(model, guide, x, 30, **options)
    assert torch.equal(rng_state, torch.get_rng_state())
    plain = log_likelihood(model, guide, x, 8000, seed=1)
    error = (found.standard_error.square() + plain.standard_error.square()).sqrt()
    z = ((found.value - plain.value) / error)[plain.ess > 100]
    print(name, z.tolist(), found.ess.tolist(), plain.ess.tolist())
    assert len(z)
    assert z.abs().max() < 6


QUICK = ("two_level", "features_first", "naive_conv", "positive_latent")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in user_pairs.PAIRS],
)
def test_every_pair_has_bounds(name, float64):
    model, guide, x = user_pairs.PAIRS[name]()
    found = bidirectional(model, guide, x, 4, annealing=Annealing(3, leapfrog=1), seed=0)
    print(name, found)
    assert found.x.shape == x.shape
    assert found.gap > -4 * found.gap_error
    # The importance-sampling estimate of the same data is between the bounds.
    plain = log_likelihood(model, guide, found.x, 1000, seed=1).value
    for side in (plain - found.lower, found.upper - plain):
        assert float(side.mean()) > -4 * float(side.std()) / len(x) ** 0.5


def test_chains_start_from_a_guide_with_auxiliary_sites(float64):
    model, guide, x = user_pairs.auto_normal()
    options = {"method": "annealed", "annealing": Annealing(6, leapfrog=2), "seed": 0}
    found = log_likelihood(model, guide, x, 50, **options)
    plain = log_likelihood(model, guide, x, 10_000, seed=1)
    error = (found.standard_error.square() + plain.standard_error.square()).sqrt()
    assert ((found.value - plain.value) / error).abs().max() < 6
    with pytest.raises(ValueError, match=r"auxiliary sites, \['z_unconstrained'\]"):
        bidirectional(model, guide, x)


# Bidirectional


def test_the_exact_mean_is_between_the_bounds():
    ppca, parameters = make(noise=0.2)
    found = bidirectional(
        ppca.model, None, np.zeros((250, D)), 4, annealing=Annealing(10, leapfrog=2), seed=0
    )
    truth = oracles.log_density(found.x.numpy(), *parameters)
    below, above = truth - found.lower.numpy(), found.upper.numpy() - truth
    for side in (below, above):
        print(f"{side.mean():.4f} ± {side.std() / 250**0.5:.4f}")
        assert side.mean() > -3 * side.std() / 250**0.5
        assert 0.005 < side.mean() < 1
    assert found.gap == pytest.approx((below + above).mean())


def test_the_data_are_drawn_from_the_model():
    ppca, (loc, loadings, noise) = make()
    template = np.ones((4000, D))
    found = bidirectional(ppca.model, None, template, 1, annealing=Annealing(1), seed=0)
    assert not torch.isclose(found.x, torch.ones_like(found.x)).any()
    covariance = oracles.ppca_covariance(loadings, noise)
    white = (found.x.numpy() - loc) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    assert np.abs(white.mean(0)).max() < oracles.z_limit(D) / 4000**0.5
    np.testing.assert_allclose(np.cov(white.T), np.eye(D), atol=0.12)


def test_the_draws_have_the_missing_values_of_the_template():
    ppca, parameters = make()
    template = oracles.with_missing_values(np.zeros((60, D)), 0.3, seed=0)
    annealing = Annealing(12, leapfrog=2)
    found = bidirectional(ppca.model, None, template, 20, annealing=annealing, seed=0)
    drawn = np.where(np.isnan(template), np.nan, found.x.numpy())
    assert (found.x.numpy()[np.isnan(template)] == 0).all()
    truth = oracles.log_density(drawn, *parameters)
    np.testing.assert_allclose(found.lower.mean(), truth.mean(), atol=0.1)
    np.testing.assert_allclose(found.upper.mean(), truth.mean(), atol=0.1)


def test_bounds_print_and_convert():
    ppca, _ = make()
    found = bidirectional(
        ppca.model, None, np.zeros((9, D)), 3, annealing=Annealing(4, leapfrog=2), seed=0
    )
    text = repr(found)
    assert "log-likelihood of 9 data points that the model drew: lower bound" in text
    assert "3 chains in each direction, 4 temperatures" in text
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    again = type(found).from_dict(content)
    assert torch.equal(again.lower, found.lower)
    assert list(found.to_frame().columns) == ["lower", "upper", "lower_error", "upper_error"]
    one = bidirectional(ppca.model, None, np.zeros((9, D)), 1, annealing=Annealing(1), seed=0)
    assert one.lower_error.isnan().all()


# Schedules, seeds, numbers


def test_schedules_run_from_zero_to_one():
    for num_temperatures in (1, 2, 9):
        for schedule in ("linear", "sigmoid"):
            betas = Annealing(num_temperatures, schedule).betas()
            assert len(betas) == num_temperatures + 1
            assert (betas[0], betas[-1]) == (0, 1)
            assert (betas.diff() > 0).all()
            torch.testing.assert_close(betas + betas.flip(0), torch.ones_like(betas))
    np.testing.assert_allclose(Annealing(4, "linear").betas(), [0, 0.25, 0.5, 0.75, 1])
    ends = special.expit([-4, -2, 4])
    quarter = (ends[1] - ends[0]) / (ends[2] - ends[0])
    assert float(Annealing(4, "sigmoid").betas()[1]) == pytest.approx(quarter)


def test_seeds_repeat_and_leave_the_generators_unchanged():
    ppca, _ = make()
    x, before = ppca.sample(5, seed=0), torch.get_rng_state()
    options = {"method": "annealed", "annealing": Annealing(2, leapfrog=1)}
    first, again, other = (
        log_likelihood(ppca.model, None, x, 4, seed=s, **options).value for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()
    bounds = [
        bidirectional(ppca.model, None, x, 4, seed=1, annealing=options["annealing"])
        for _ in range(2)
    ]
    assert torch.equal(bounds[0].upper, bounds[1].upper)
    assert torch.equal(before, torch.get_rng_state())


def test_single_precision_is_near_double():
    vae = VAE.mlp(6, 2, hidden=(8,), likelihood=Gaussian(0.8), seed=0)
    x = vae.sample(20, seed=0)
    options = {"method": "annealed", "annealing": Annealing(8, leapfrog=2), "seed": 0}
    single = log_likelihood(vae.model, vae.guide, x, 50, **options)
    double = log_likelihood(vae.double().model, vae.guide, x.double(), 50, **options)
    assert single.value.dtype == torch.float64
    error = (single.standard_error.square() + double.standard_error.square()).sqrt()
    assert ((single.value - double.value).abs() < 5 * error + 1e-4).all()


@pytest.mark.parametrize(
    ("name", "from_prior", "refine"),
    [("functions", False, 2), ("positive_latent", True, 0), ("naive_conv", False, 0)],
)
def test_recorded_moves_equal_eager_ones(name, from_prior, refine, float64, monkeypatch):
    """There are two batches, each with its own refined q if there is one."""
    monkeypatch.setattr(batching, "ROWS_AT_ONCE", dict.fromkeys(batching.ROWS_AT_ONCE, 64))
    model, guide, x = first_rows(name)
    options = {"annealing": Annealing(2, leapfrog=1), "refine": refine, "seed": 0}
    found = [
        log_likelihood(
            model, None if from_prior else guide, x, 8, method="annealed", capture=c, **options
        )
        for c in (False, "recorded")
    ]
    assert [each.execution.split(":")[0] for each in found] == ["eager", "recorded"]
    assert torch.equal(found[0].value, found[1].value)


def test_models_that_cannot_be_recorded_run_eagerly(float64):
    branches, guide, x = user_pairs.functions()

    def model(x, index=None, num_data=None):
        assert float(x.sum()) != torch.inf
        return branches(x, index=index, num_data=num_data)

    options = {"annealing": Annealing(3, leapfrog=2), "seed": 0, "method": "annealed"}
    plain = log_likelihood(branches, guide, x, 10, capture=False, **options)
    for capture in ("recorded", True):
        with pytest.warns(
            UserWarning, match="could not be captured, so it runs eagerly"
        ) as warned:
            found = log_likelihood(model, guide, x, 10, capture=capture, **options)
        assert len(warned) == 1 and found.execution.startswith("eager")
        assert torch.equal(found.value, plain.value)


@pytest.mark.slow
def test_compiled_moves_equal_eager_ones():
    ppca, _ = make()
    x = ppca.sample(9, seed=0)
    options = {"annealing": Annealing(3, leapfrog=2), "seed": 0, "method": "annealed"}
    found = [log_likelihood(ppca.model, None, x, 10, capture=c, **options) for c in (False, True)]
    assert found[1].execution.startswith("compiled")
    torch.testing.assert_close(found[0].value, found[1].value, rtol=1e-9, atol=1e-9)


# Errors


def assert_refused(match, *arguments, **options):
    with pytest.raises(ValueError, match=match):
        log_likelihood(*arguments, method="annealed", **options)


def test_invalid_arguments_raise():
    for options, match in (
        ({"num_temperatures": 0}, "temperatures must be a whole number >= 1; got 0"),
        ({"leapfrog": 0}, "leapfrog must be a whole number >= 1; got 0"),
        ({"schedule": "steep"}, "schedule must be one of 'linear', 'sigmoid'; got 'steep'"),
    ):
        with pytest.raises(ValueError, match=match):
            Annealing(**options)
    ppca, _ = make()
    x = ppca.sample(3, seed=0)
    with pytest.raises(ValueError, match=r"annealing= is for method='annealed'.*'importance'"):
        log_likelihood(ppca.model, ExactGuide(ppca), x, annealing=Annealing(3))
    assert_refused("refine= needs .* a guide to start from", ppca.model, None, x, 10, refine=5)
    with pytest.raises(ValueError, match="num_chains must be a whole number >= 1; got 0"):
        bidirectional(ppca.model, None, x, 0)


def test_discrete_sites_raise():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k.unsqueeze(-1), 1.0).to_event(1), obs=x)

    assert_refused(r"site 'k' \(Bernoulli\) is discrete", model, None, np.zeros((3, 1)), 10)


def test_point_masses_raise():
    ppca, _ = make()

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.zeros(len(x), K).double(), event_dim=1))

    def line(x):
        one = dist.Normal(x.new_zeros(()), 1.0)
        with pyro.plate("data", len(x)):
            t = pyro.sample("t", one, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(t.unsqueeze(-1).expand(-1, K), event_dim=1))

    x = ppca.sample(3, seed=0)
    assert_refused(
        "site 'z' of the guide is a Delta: a point mass has no density", ppca.model, point, x, 10
    )
    match = r"draws 1 values per datum and the model has 2.*point masses: \['z'\]"
    assert_refused(match, ppca.model, line, x, 10)


def test_models_that_do_not_observe_x_raise():
    def factor(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)
            pyro.factor("penalty", -z.square())

    def doubled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=2 * x)

    for model, match in (
        (factor, r"has factors, \['penalty'\]"),
        (doubled, r"do not observe the columns of x"),
    ):
        with pytest.raises(ValueError, match=match):
            bidirectional(model, None, np.ones((4, 1)))


def test_nan_densities_raise(float64):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            scale = (z * 0).unsqueeze(-1) + torch.nan
            fn = dist.Normal(z.unsqueeze(-1), scale, validate_args=False)
            pyro.sample("x", fn.to_event(1), obs=x)

    with pytest.raises((FloatingPointError, ValueError), match=r"NaN|nan"):
        options = {"method": "annealed", "annealing": Annealing(2)}
        log_likelihood(model, None, np.zeros((3, 1)), 10, **options)


# Against importance sampling, on a VAE


@pytest.mark.slow
def test_three_estimates_of_a_vaes_log_likelihood_agree():
    """Annealing, 50,000 draws of the guide, and 2,000 of a refined q, over 200 held-out digits."""
    x = digits()
    x, x_test = x[:1500], x[1500:1700]
    vae = VAE.mlp(64, 3, hidden=(64,), likelihood=Gaussian(0.3), seed=0)
    fit_svi(vae.model, vae.guide, x, epochs=60, batch_size=100, lr=3e-3, seed=0)
    annealing = Annealing(200, leapfrog=5)
    found = {
        "annealed": log_likelihood(
            vae.model, vae.guide, x_test, 32, method="annealed", annealing=annealing, seed=0
        ),
        "importance": log_likelihood(vae.model, vae.guide, x_test, 50_000, seed=1),
        "refined": log_likelihood(vae.model, vae.guide, x_test, 2000, refine=300, seed=2),
    }
    for estimate in found.values():
        print(estimate, estimate.execution, sep="\n")
    for one, other in itertools.combinations(found, 2):
        first, second = found[one], found[other]
        difference = first.value - second.value
        errors = (first.standard_error.square() + second.standard_error.square()).sqrt()
        error = float(errors.square().sum().sqrt()) / len(x_test)
        z = difference / errors
        print(f"{one} - {other}: {difference.mean():.5f} ± {error:.5f} nats per datum")
        both = first.reliable & second.reliable
        print(f"  per datum: z from {z.min():.2f} to {z.max():.2f}, sd {z.std():.2f}")
        print(f"  reliable: {both.sum()}, z {z[both].min():.2f} to {z[both].max():.2f}")
        assert abs(float(difference.mean())) < 4 * error
        assert z[both].abs().max() < 4
        if (one, other) == ("annealed", "refined"):
            assert float(difference.mean()) > -3 * error
            assert z.min() > -3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("capture", [False, True])
def test_on_a_gpu(capture):
    ppca, parameters = make(noise=0.2)
    ppca = ppca.cuda()
    x = ppca.sample(100, seed=0)
    truth = oracles.log_density(x.cpu().numpy(), *parameters)
    options = {"annealing": Annealing(40, leapfrog=4), "capture": capture, "seed": 0}
    found = log_likelihood(ppca.model, None, x, 64, method="annealed", **options)
    z = (found.value.cpu().numpy() - truth) / found.standard_error.cpu().numpy()
    assert np.abs(z).max() < 6
    bounds = bidirectional(ppca.model, None, x, 8, **options)
    exact = oracles.log_density(bounds.x.numpy(), *parameters).mean()
    assert float(bounds.lower.mean()) - 0.05 < exact < float(bounds.upper.mean()) + 0.05
