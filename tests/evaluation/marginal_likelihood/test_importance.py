"""Marginal log-likelihoods by importance sampling, and their reliability."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import loops
import oracles
import user_pairs
from ppl_vae.core.batch import Batch
from ppl_vae.core.introspection import modules_of
from ppl_vae.core.pair import Pair
from ppl_vae.data.handwritten_digits import digits
from ppl_vae.evaluation.local_guides.local_gaussian import LocalGaussianGuide
from ppl_vae.evaluation.marginal_likelihood import batching
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood, prior_guide
from ppl_vae.evaluation.marginal_likelihood.reliability import (
    assess_reliability,
    effective_sample_size,
    k_hat,
    summarize_weights,
)
from ppl_vae.guides.families import num_scale_outputs
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, PerDatumGuide
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.likelihoods.discrete import Bernoulli
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp, zero_output
from ppl_vae.objectives.bounds import log_weights
from unchanged import assert_unchanged

N, D, K = 30, 6, 3


def make(K=K, D=D, noise=0.6, seed=0):
    """A model in general position, and its parameters (loc, loadings, noise variance)."""
    rng = np.random.default_rng(seed)
    loadings, loc = rng.normal(size=(D, K)), 3 * rng.normal(size=D)
    return from_arrays(loc, loadings, noise), (loc, loadings, noise)


def from_arrays(loc, loadings, noise):
    scale = torch.tensor(noise**0.5, dtype=torch.float64)
    return PPCA.from_parameters(torch.tensor(loadings), torch.tensor(loc), scale)


def rows_of(ppca, num_rows, seed=0):
    return ppca.double().sample(num_rows, seed=seed).numpy()


def scaled(ppca, c2=1.0, shift=0.0):
    """The posterior with its covariance times c^2, shifted by ``shift`` standard deviations."""

    def guide(x, index=None, num_data=None):
        posterior = ppca.posterior(x)
        with pyro.plate("data", num_data or len(x), subsample=rows_in(x, index)):
            tril = posterior.scale_tril
            loc = posterior.mean + shift * tril[..., :, 0]
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=c2**0.5 * tril))

    return guide


def rows_in(x, index):
    return torch.arange(len(x)) if index is None else index


def assert_agree(estimate, truth, atol=1e-9):
    np.testing.assert_allclose(estimate.value.numpy(), truth, rtol=0, atol=atol)


def assert_agree_within_errors(estimate, truth):
    """Each datum is within its own error, where most draws are effective."""
    assert (estimate.ess > 0.8 * estimate.num_samples).all()
    z = (estimate.value.numpy() - truth) / (estimate.standard_error.numpy() + 1e-9)
    assert np.abs(z).max() < oracles.z_limit(len(z))


def centred_guide(D, K, covariance="diagonal"):
    """An amortized guide with q = N(0, I) for every datum, far from the posterior."""
    outputs = K + num_scale_outputs(covariance, K)
    return AmortizedGuide(zero_output(mlp(D, outputs, seed=0)), K, covariance=covariance).double()


def small_vae(data_dim=D, seed=0, **options):
    return VAE.mlp(data_dim, 2, hidden=(5,), seed=seed, **options).double()


# Exact under the exact guide


@pytest.mark.parametrize("num_samples", [1, 2, 24, 25, 100])
def test_with_the_exact_guide_every_draw_is_the_log_likelihood(num_samples):
    ppca, parameters = make()
    x = rows_of(ppca, N)
    estimate = log_likelihood(ppca.model, ExactGuide(ppca), x, num_samples, seed=0)
    assert_agree(estimate, oracles.log_density(x, *parameters))
    assert estimate.num_samples == num_samples
    # The square root of rounding.
    assert (estimate.standard_error < 1e-7).all()
    torch.testing.assert_close(estimate.ess, torch.full((N,), float(num_samples)).double())
    if num_samples > 1:
        assert estimate.reliable.all()
        assert "reliable for all 30 data points" in repr(estimate)


def test_one_draw_of_a_bad_guide_is_unreliable():
    ppca, _ = make()
    estimate = log_likelihood(ppca.model, scaled(ppca, 0.1), rows_of(ppca, N), 1, seed=0)
    assert not estimate.reliable.any()
    assert "too few draws were made to assess it, 1;" in repr(estimate)


def test_rows_of_a_table_are_looked_up_by_their_index(monkeypatch):
    """K = 1: a diagonal q is exact, so that a wrong row changes the value."""
    ppca, parameters = make(K=1)
    x = rows_of(ppca, N)
    means, covariances = oracles.posterior(x, *parameters)
    guide = PerDatumGuide(N, 1).double()
    with torch.no_grad():
        guide.loc.copy_(torch.from_numpy(means))
        guide.unconstrained_scale.copy_(torch.from_numpy(np.log(covariances[:, 0])))
    truth = oracles.log_density(x, *parameters)
    assert_agree(log_likelihood(ppca.model, guide, x, 2), truth)
    for rows in ([3], [7, 2, 25], list(range(N))[::-1], [4, 4, 4]):
        some = log_likelihood(ppca.model, guide, x, 2, rows=torch.tensor(rows))
        assert_agree(some, truth[rows])
    monkeypatch.setattr(batching, "ROWS_AT_ONCE", dict.fromkeys(batching.ROWS_AT_ONCE, 8))
    assert_agree(log_likelihood(ppca.model, guide, x, 5), truth)


def test_rows_select_data():
    ppca, parameters = make()
    x = rows_of(ppca, N)
    rows = torch.tensor([5, 0, 29])
    estimate = log_likelihood(ppca.model, ExactGuide(ppca), x, 3, rows=rows)
    assert_agree(estimate, oracles.log_density(x, *parameters)[rows])
    missing = oracles.with_missing_values(x, 0.3, seed=0)
    options = {"rows": rows, "refine": 2, "seed": 0}
    some = log_likelihood(ppca.model, ExactGuide(ppca), missing, 100, **options)
    assert_agree_within_errors(some, oracles.log_density(missing, *parameters)[rows])


# Streaming


def numpy_log_weights(x, values, parameters, c2):
    """log p(x, z) - log q(z | x), (S, N), with scipy's densities at given values (S, N, K)."""
    loc, loadings, noise = parameters
    means, covariances = oracles.posterior(x, *parameters)
    weights = np.zeros(values.shape[:2])
    for n, row in enumerate(x):
        z = values[:, n]
        likelihood = stats.norm(z @ loadings.T + loc, noise**0.5).logpdf(row).sum(-1)
        prior = stats.norm.logpdf(z).sum(-1)
        q = stats.multivariate_normal(means[n], c2 * covariances[n]).logpdf(z)
        weights[:, n] = likelihood + prior - q
    return weights


def recorded_values(recorder, blocks, num_samples):
    """The draws of blocks of rows, each in chunks of draws, as one (S, N, K) array."""
    drawn, columns = iter(recorder.values["z"]), []
    for size in blocks:
        chunks = []
        while sum(len(chunk) for chunk in chunks) < num_samples:
            chunks.append(next(drawn).reshape(-1, size, K).numpy())
        columns.append(np.concatenate(chunks))
        assert len(columns[-1]) == num_samples  # not more draws than requested
    assert next(drawn, None) is None
    return np.concatenate(columns, axis=1)


@pytest.mark.parametrize("rows_at_once", [1, 8, 100])
@pytest.mark.parametrize("num_samples", [1, 2, 17])
def test_exactly_the_requested_draws_are_used(rows_at_once, num_samples, monkeypatch):
    """For any batch size, the value is that of a slow loop over the same draws."""
    ppca, parameters = make()
    x, c2 = rows_of(ppca, 12), 1.5
    monkeypatch.setattr(
        batching, "ROWS_AT_ONCE", dict.fromkeys(batching.ROWS_AT_ONCE, rows_at_once)
    )
    with loops.Recorder() as recorder:
        estimate = log_likelihood(ppca.model, scaled(ppca, c2), x, num_samples, seed=0)
    size = max(1, rows_at_once // num_samples)
    blocks = [len(block) for block in np.split(np.arange(12), range(size, 12, size))]
    values = recorded_values(recorder, blocks, num_samples)
    weights = numpy_log_weights(x, values, parameters, c2)
    mean = np.exp(weights - weights.max(0)).mean(0)
    assert_agree(estimate, np.log(mean) + weights.max(0))
    relative = np.exp(weights - estimate.value.numpy())
    ess = relative.sum(0) ** 2 / (relative**2).sum(0)
    np.testing.assert_allclose(estimate.ess, ess, rtol=1e-9)
    if num_samples > 1:
        error = oracles.pooled_standard_error(weights)
        np.testing.assert_allclose(estimate.standard_error, error, rtol=1e-6)
    assert len(np.unique(values[..., 0])) == values[..., 0].size  # no draw is repeated


def test_the_number_of_entries_at_once_is_bounded(monkeypatch):
    sizes = []
    ppca, _ = make()
    guide = scaled(ppca, 1.5)

    def model(x, index=None, num_data=None):
        sizes.append(len(x))
        return ppca.model(x, index=index, num_data=num_data)

    monkeypatch.setattr(batching, "WEIGHTS_AT_ONCE", 120)
    log_likelihood(model, guide, rows_of(ppca, N), 20, refine=1, seed=0)
    assert max(sizes) == 6


def test_a_tensor_of_draws_is_bounded(monkeypatch):
    x = torch.zeros(5, 100, device="cpu")
    at_once = {"cpu": 3200, "accelerator": 12800}
    monkeypatch.setattr(batching, "ENTRIES_AT_ONCE", at_once)
    assert batching.rows_at_once(x) == 32 and batching.rows_at_once(x.to("meta")) == 128
    assert batching.block_size(x, 50, refined=True) == 4
    assert batching.block_size(x, 16, refined=False) == 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_draws():
    script = """
import numpy as np, torch
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.models.vae import VAE
from ppl_vae.objectives.bounds import log_weights

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

vae = VAE.mlp(32, 2, hidden=(16,), seed=0)
x = np.random.default_rng(0).normal(size=(50, 32))
log_likelihood(vae.model, vae.guide, x, 200, seed=0)
before = peak()
log_likelihood(vae.model, vae.guide, x, 20_000, seed=0)
print(peak() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the peak from /proc")
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    grown = float(run.stdout)
    print(f"peak memory at S = 20,000 minus at S = 200: {grown:.0f} MB")
    # One array of 20,000 x 50 weights is 8 MB, and all 32-dimensional decodings at once are 128.
    assert grown < 100


# Any pair


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_every_pair_agrees_with_a_slow_loop(name, float64):
    model, guide, x = user_pairs.PAIRS[name]()
    x, num_samples = x[:5], 4
    with loops.Recorder() as recorder:
        estimate = log_likelihood(model, guide, x, num_samples, seed=0)
    for part in modules_of(model, guide):
        part.eval()
    with torch.no_grad():
        weights = loops.slow_log_weights(model, guide, x, recorder, num_samples)
    expected = torch.logsumexp(weights, 0) - np.log(num_samples)
    torch.testing.assert_close(estimate.value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (k % 3 != 1))
        for k, n in enumerate(user_pairs.PAIRS)
    ],
)
def test_every_pair_can_be_refined_and_is_left_unchanged(name, float64):
    model, guide, x = user_pairs.PAIRS[name]()
    bare = user_pairs.BARE_PARAMETERS if name == "param_only" else ()
    with assert_unchanged(model, guide, new_parameters=bare):
        plain = log_likelihood(model, guide, x, 100, seed=0)
        refined = log_likelihood(model, guide, x, 100, refine=60, seed=0)
    assert refined.ess.median() > plain.ess.median()
    # Both are lower bounds in expectation, and more effective draws make the tighter one.
    assert refined.mean > plain.mean - 0.1


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_prior_draws_of_every_pair_agree_with_a_slow_loop(name, float64):
    model, _, x = user_pairs.PAIRS[name]()
    x, num_samples = x[:5], 4
    with loops.Recorder() as recorder:
        estimate = log_likelihood(model, None, x, num_samples, method="prior", seed=0)
    for part in modules_of(model):
        part.eval()
    with torch.no_grad():
        prior = prior_guide(model)
        weights = loops.slow_log_weights(model, prior, x, recorder, num_samples)
    expected = torch.logsumexp(weights, 0) - np.log(num_samples)
    torch.testing.assert_close(estimate.value, expected, rtol=1e-9, atol=1e-9)


def test_a_table_of_pyro_parameters(float64):
    model, guide, x = user_pairs.param_table()
    with loops.Recorder() as recorder:
        estimate = log_likelihood(model, guide, x, 3, seed=0)
    weights = torch.stack([weights_of_draw(x, draw["z"]) for draw in recorder.draws(3)])
    torch.testing.assert_close(estimate.value, torch.logsumexp(weights, 0) - np.log(3))
    with torch.no_grad():
        joint = loops.slow_joint_log_weights(model, guide, x, recorder, 3)
    torch.testing.assert_close(weights.sum(1), joint)


def weights_of_draw(x, z):
    """log p(x_n, z_n) - log q(z_n) of ``user_pairs.param_table`` from its parameters."""
    table = {name: p.detach().numpy() for name, p in pyro.get_param_store().items()}
    x, z = x.numpy(), z.numpy()
    joint = stats.norm(z @ table["W"].T, 1.0).logpdf(x).sum(1) + stats.norm.logpdf(z).sum(1)
    q = stats.norm(table["table_loc"], table["table_scale"]).logpdf(z).sum(1)
    return torch.from_numpy(joint - q)


# Statistics


def rotated(num_rows, rho=0.2, lengths=(1.5, 1.0), seed=0):
    """K = 2 with the posterior's precision M / s2 of this correlation; and its best diagonal q."""
    noise, lengths = 0.7, np.array(lengths)
    inner = rho * np.sqrt(np.prod(lengths**2 + noise))  # M_12 = w_1 . w_2
    cosine = inner / np.prod(lengths)
    loadings = np.zeros((D, 2))
    loadings[0, 0] = lengths[0]
    loadings[:2, 1] = lengths[1] * np.array([cosine, np.sqrt(1 - cosine**2)])
    loadings = oracles.rotation(D, seed) @ loadings
    ppca = from_arrays(np.zeros(D), loadings, noise)
    return ppca, (np.zeros(D), loadings, noise), rows_of(ppca, num_rows, seed)


def test_the_mean_weight_of_the_best_diagonal_guide():
    """mean(w / p) - 1 over its exact standard deviation; rho < 1/4: a finite fourth moment."""
    ppca, parameters, x = rotated(200)
    _, loadings, noise = parameters
    _, covariances = oracles.posterior(x[:1], *parameters)
    best = np.diag(oracles.best_q_variances(loadings, noise, "diagonal"))
    assert oracles.proposal_tail_index(best, covariances[0]) == pytest.approx(0.2, rel=1e-9)
    moment = oracles.proposal_second_moment(best, covariances[0], np.zeros(2))
    S = 500
    guide = ExactGuide(ppca, covariance="diagonal")
    estimate = log_likelihood(ppca.model, guide, x, S, seed=0)
    ratios = np.exp(estimate.value.numpy() - oracles.log_density(x, *parameters))
    z = (ratios.mean() - 1) / np.sqrt((moment - 1) / (S * len(x)))
    assert abs(z) < oracles.z_limit()
    # The reported errors are the standard deviations of the estimates.
    relative = estimate.standard_error.square().mean() / ((moment - 1) / S)
    assert float(relative) == pytest.approx(1, abs=0.1)
    # k-hat scatters around the true index of 0.2.
    assert estimate.share_reliable > 0.95


def coverage(num_rows, seed=0, S=1000):
    """z-scores of an over-dispersed guide, c^2 = 1.5 in five dimensions."""
    ppca, parameters = make(K=5, D=8)
    x = rows_of(ppca, num_rows)
    estimate = log_likelihood(ppca.model, scaled(ppca, 1.5), x, S, seed=seed)
    truth = oracles.log_density(x, *parameters)
    return ((estimate.value.numpy() - truth) / estimate.standard_error.numpy()), estimate


def assert_coverage(num_rows):
    z, estimate = coverage(num_rows)
    slack = oracles.z_limit(3)
    covered = (np.abs(z) < stats.norm.isf(0.025)).mean()
    # Over-dispersed guides cover 93 to 97 %, up to the sampling error of a share of num_rows.
    error = slack * np.sqrt(0.95 * 0.05 / num_rows)
    assert 0.93 - error < covered < 0.97 + error
    # The bias is -cv^2 / (2 S), -cv / (2 sqrt(S)) standard errors; that of the skewness is
    # similar.
    moment = oracles.proposal_second_moment(1.5 * np.eye(5), np.eye(5), np.zeros(5))
    bias = np.sqrt((moment - 1) / 1000)
    assert abs(z.mean()) < bias + slack / np.sqrt(num_rows)
    assert abs(z.std() - 1) < 0.03 + slack / np.sqrt(2 * num_rows)
    assert stats.kstest((z - z.mean()) / z.std(), "norm").pvalue > oracles.FAILURE_RATE
    assert estimate.reliable.all()


def test_intervals_of_an_over_dispersed_guide_cover():
    assert_coverage(300)


@pytest.mark.slow
def test_intervals_of_an_over_dispersed_guide_cover_in_many_replications():
    assert_coverage(2000)


@pytest.mark.parametrize(("c2", "K"), [(0.3, 5), (0.1, 10)])
def test_intervals_of_a_narrow_guide_do_not_cover_and_are_unreliable(c2, K):
    """The weights have infinite variance (c^2 < 1/2), so that own errors are too small."""
    ppca, parameters = make(K=K, D=K + 3)
    x = rows_of(ppca, 200)
    estimate = log_likelihood(ppca.model, scaled(ppca, c2), x, 1000, seed=0)
    errors = np.abs(estimate.value.numpy() - oracles.log_density(x, *parameters))
    own = np.sqrt((1000 / estimate.ess.numpy() - 1) / 999)
    covered = (errors < 1.96 * own).mean()
    assert covered < 0.9 - oracles.z_limit() * np.sqrt(0.09 / len(x))
    assert not estimate.reliable.any()
    assert "above" in repr(estimate) and "the weights' variance is not finite" in repr(estimate)


@pytest.mark.parametrize("c2", [0.8, 1.5])
def test_the_second_moment_of_the_weights_agrees_with_the_formula(c2):
    """E[w^2] / Z^2 = S / ESS in the limit; its fourth moment is finite for c^2 > 3/4."""
    K, S, rows = 2, 4000, 100
    ppca, parameters = make(K=K, D=4)
    x = rows_of(ppca, rows)
    weights = log_weights(ppca.model, scaled(ppca, c2), torch.from_numpy(x), S).detach().numpy()
    ratios = np.exp(weights - oracles.log_density(x, *parameters))
    expected = oracles.proposal_second_moment(c2 * np.eye(K), np.eye(K), np.zeros(K))
    squares = (ratios**2).mean(0)
    z = (squares.mean() - expected) / (squares.std() / np.sqrt(rows))
    assert abs(z) < oracles.z_limit()
    estimate = log_likelihood(ppca.model, scaled(ppca, c2), x, S, seed=0)
    assert float((S / estimate.ess).mean()) == pytest.approx(expected, rel=0.02)


def test_the_value_is_a_lower_bound_in_expectation_with_the_known_bias():
    """-cv^2 / (2 S) nats at c^2 = 2, D = 5; the next order is about its square."""
    S, num_rows = 20, 4000
    ppca, parameters = make(K=5, D=8)
    x = rows_of(ppca, num_rows)
    estimate = log_likelihood(ppca.model, scaled(ppca, 2.0), x, S, seed=0)
    errors = estimate.value.numpy() - oracles.log_density(x, *parameters)
    moment = oracles.proposal_second_moment(2 * np.eye(5), np.eye(5), np.zeros(5))
    bias, slack = -(moment - 1) / (2 * S), oracles.z_limit() * errors.std() / num_rows**0.5
    assert abs(errors.mean() - bias) < slack + 2 * bias**2
    assert errors.mean() < -slack


def test_prior_draws_agree_with_the_exact_value_in_few_dimensions():
    ppca, parameters = make(K=1, D=3, noise=4.0)
    x, S = rows_of(ppca, 100), 2000
    estimate = log_likelihood(ppca.model, None, x, S, method="prior", seed=0)
    truth = oracles.log_density(x, *parameters)
    means, covariances = oracles.posterior(x, *parameters)
    moments = np.array(
        [
            oracles.proposal_second_moment(np.eye(1), cov, mean)
            for mean, cov in zip(means, covariances, strict=True)
        ]
    )
    ratios = np.exp(estimate.value.numpy() - truth)
    z = (ratios - 1).sum() / np.sqrt(((moments - 1) / S).sum())
    assert abs(z) < oracles.z_limit()
    assert estimate.method == "prior"


def test_prior_draws_agree_with_a_refined_guide_on_a_vae():
    vae = small_vae(likelihood=Gaussian(1.0))
    x = vae.sample(40, seed=0)
    prior = log_likelihood(vae.model, None, x, 5000, method="prior", seed=0)
    refined = log_likelihood(vae.model, vae.guide, x, 1000, refine=150, seed=0)
    both = prior.reliable & refined.reliable
    assert both.sum() >= 10
    error = (prior.standard_error.square() + refined.standard_error.square()).sqrt()
    assert ((prior.value - refined.value) / error)[both].abs().max() < oracles.z_limit(40)


# Reliability


def reliable(weights):
    """The data with these log weights that are reliable."""
    return assess_reliability(
        summarize_weights(weights, weights.logsumexp(0)[:, None]), len(weights)
    ).reliable


def pareto(k, shape, seed=0):
    """Log weights with tail index k: w = u^-k."""
    return torch.from_numpy(-k * np.log(np.random.default_rng(seed).random(shape)))


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.2])
def test_k_hat_finds_a_known_tail(k):
    found = k_hat(pareto(k, (4000, 50)))
    assert float(found.mean()) == pytest.approx(k, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("c2", [0.5, 0.3])
def test_k_hat_of_a_narrow_guide_in_two_dimensions(c2):
    """Weights of c^2 I against I are exactly Pareto there, with index 1 - c^2."""
    ppca, _ = make(K=2, D=4)
    estimate = log_likelihood(ppca.model, scaled(ppca, c2), rows_of(ppca, 100), 10_000, seed=0)
    assert float(estimate.k_hat.mean()) == pytest.approx(1 - c2, abs=0.04)


def test_a_narrow_guide_in_ten_dimensions_is_called_unreliable():
    ppca, _ = make(K=10, D=12)
    x = rows_of(ppca, 50)
    narrow = log_likelihood(ppca.model, scaled(ppca, 0.1), x, 1000, seed=0)
    assert not narrow.reliable.any()
    assert (narrow.k_hat > 0.7).all()
    assert log_likelihood(ppca.model, ExactGuide(ppca), x, 1000, seed=0).reliable.all()


def test_a_shifted_guide_is_unreliable():
    ppca, _ = make(K=1, D=4)
    shifted = scaled(ppca, shift=4.0)
    estimate = log_likelihood(ppca.model, shifted, rows_of(ppca, 100), 1000, seed=0)
    assert not estimate.reliable.any()
    assert float(estimate.k_hat.mean()) == pytest.approx(1.34, abs=0.2)


def test_one_huge_weight_is_unreliable():
    weights = torch.randn(1000, 300, generator=torch.Generator().manual_seed(0)).double() * 0.1
    weights[17, 1] = 10_000.0
    assert (~reliable(weights)).nonzero().flatten().tolist() == [1]
    torch.testing.assert_close(effective_sample_size(weights)[1], torch.tensor(1.0).double())


def test_a_few_dominating_weights_are_unreliable():
    weights = torch.zeros(1000, 1).double()
    weights[:6] = 50.0
    assert not reliable(weights).item()


def test_constant_weights_are_reliable_whatever_their_number():
    for num_samples in (2, 24, 25, 1000):
        weights = torch.full((num_samples, 2), -1234.5).double()
        weights[0] += 1e-9
        assert k_hat(weights).tolist() == [0, 0]
        assert reliable(weights).all()


def test_weights_of_zero():
    """A proposal that misses the support altogether, and one that misses half of it."""
    weights = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).double() * 0.1
    weights[:, 0] = -torch.inf
    weights[::2, 1] = -torch.inf
    assert reliable(weights).tolist() == [False, True]
    assert effective_sample_size(weights)[1] == pytest.approx(500, rel=0.05)


@pytest.mark.parametrize("num_samples", [2, 10, 24])
def test_few_draws_are_unreliable(num_samples):
    ppca, _ = make()
    guide = scaled(ppca, 1.3)
    estimate = log_likelihood(ppca.model, guide, rows_of(ppca, N), num_samples, seed=0)
    assert not estimate.reliable.any()
    assert estimate.k_hat.isnan().all()
    text = repr(estimate)
    assert "NOT reliable for 30 of 30 data points" in text
    assert (
        f"unreliable because too few draws were made to assess it, {num_samples}; use at least 25"
        in text
    )
    enough = log_likelihood(ppca.model, scaled(ppca, 1.1), rows_of(ppca, N), 1000, seed=0)
    assert enough.reliable.all()


def test_the_effective_sample_size_is_that_of_the_weights():
    weights = torch.tensor([[0.0, 700.0], [0.0, -700.0], [0.0, -700.0]]).double()
    torch.testing.assert_close(
        effective_sample_size(weights), torch.tensor([3.0, 1.0]).double(), rtol=1e-12, atol=0
    )


# Refining


BAD_GUIDES = {
    "narrow": lambda ppca: scaled(ppca, 0.1),
    "shifted": lambda ppca: scaled(ppca, shift=4.0),
    "prior": lambda ppca: centred_guide(6, 4),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != "narrow")) for n in BAD_GUIDES],
)
def test_refining_makes_a_bad_guide_reliable(name):
    ppca, parameters = make(K=4, D=6)
    x = rows_of(ppca, 40)
    guide = BAD_GUIDES[name](ppca)
    tensors = [*ppca.parameters(), *(guide.parameters() if isinstance(guide, nn.Module) else [])]
    before = [p.detach().clone() for p in tensors]
    plain = log_likelihood(ppca.model, guide, x, 500, seed=0)
    assert plain.share_reliable < 0.2
    assert "remedy: refine=300" in repr(plain)
    # The mean converges fast; correlations take longer from a q that has none.
    steps = 150 if name in ("narrow", "shifted") else 300
    refined = log_likelihood(ppca.model, guide, x, 500, refine=steps, seed=0)
    assert refined.share_reliable > 0.95
    assert_agree_within_errors(refined, oracles.log_density(x, *parameters))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert all(p.requires_grad and p.grad is None for p in tensors)


@pytest.mark.parametrize(
    "covariance",
    [
        "unit",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("isotropic", "diagonal")),
        "full",
    ],
)
def test_the_family_of_the_refined_guide(covariance):
    """A wider family is a better proposal; only the full one is exact here."""
    # Tail indices under 1/4, where an empirical second moment can be trusted.
    ppca, parameters, x = rotated(40, rho=0.15, lengths=(1.2, 1.1))
    guide = ExactGuide(ppca, covariance="unit")
    options = {"refine": 120, "covariance": covariance, "seed": 0}
    estimate = log_likelihood(ppca.model, guide, x, 2000, **options)
    if covariance == "full":
        assert_agree_within_errors(estimate, oracles.log_density(x, *parameters))
        assert (estimate.ess > 1999).all()
        return
    _, covariances = oracles.posterior(x[:1], *parameters)
    best = np.diag(oracles.best_q_variances(*parameters[1:], covariance))
    moment = oracles.proposal_second_moment(best, covariances[0], np.zeros(2))
    assert oracles.proposal_tail_index(best, covariances[0]) < 0.25
    # S / ESS estimates E w^2 / (E w)^2; near its optimum q is as good as at it.
    assert float(2000 / estimate.ess.mean()) == pytest.approx(moment, rel=0.05)


@pytest.mark.slow
def test_many_dimensions_are_refined_in_single_precision():
    """Factors with 1,225 entries below the diagonal, which long steps would make singular."""
    x = torch.as_tensor(digits(), dtype=torch.float32)
    vae = VAE.mlp(64, 50, likelihood=Gaussian("shared", initial=0.2), seed=0)
    fit_svi(vae.model, vae.guide, x[:1500], epochs=20, batch_size=100, lr=2e-3, seed=0)
    rows = torch.arange(1500, 1512)
    full, diagonal = (
        log_likelihood(
            vae.model, vae.guide, x, 300, covariance=family, refine=300, rows=rows, seed=0
        )
        for family in ("full", "diagonal")
    )
    assert (full.k_hat < 0.67).double().mean() > 0.7 and full.share_reliable > 0.5
    # A diagonal q is nearly exact here, so that no estimate may be far from its value.
    assert (full.value - diagonal.value).abs().max() < 3


def test_a_nearly_singular_refined_q_raises():
    ppca, _ = make(K=4)
    x = torch.from_numpy(rows_of(ppca, 3)).float()
    batch = Batch(x, index=torch.arange(3))
    pair = Pair(ppca.float().model, centred_guide(D, 4).float())
    local = LocalGaussianGuide(pair, batch, "full")
    local.check_conditioning()
    with torch.no_grad():
        local.raws[0][1, 4:] = 1.2345e7 * torch.linspace(1, 2, 6)
    with pytest.raises(
        FloatingPointError,
        match=r"nearly singular for 1 of 3 data points.*inaccurate in torch.float32",
    ):
        local.check_conditioning()


def test_full_is_the_default_family():
    ppca, _ = make()
    x = rows_of(ppca, N)
    options = {"refine": 20, "seed": 0}
    default = log_likelihood(ppca.model, scaled(ppca, 0.5), x, 50, **options)
    full = log_likelihood(ppca.model, scaled(ppca, 0.5), x, 50, covariance="full", **options)
    assert torch.equal(default.value, full.value)


def test_refining_starts_from_the_guide():
    """A short refinement of an exact guide leaves it nearly exact."""
    ppca, parameters = make()
    x = rows_of(ppca, N)
    estimate = log_likelihood(ppca.model, ExactGuide(ppca), x, 10, refine=1, seed=0)
    assert_agree(estimate, oracles.log_density(x, *parameters), atol=1e-6)


def test_a_guide_without_a_density_cannot_be_refined(float64):
    model, guide, x = user_pairs.auto_normal()
    with pytest.raises(ValueError, match=r"site 'z' of the guide \(Delta\) has no density"):
        log_likelihood(model, guide, x, 10, refine=5)
    assert log_likelihood(model, guide, x, 10, seed=0).value.isfinite().all()


# Missing values, and data of other kinds


def test_missing_values_are_marginalized():
    ppca, parameters = make()
    x = oracles.with_missing_values(rows_of(ppca, N), 0.3, seed=0)
    guide, options = centred_guide(D, K), {"refine": 250, "seed": 0}
    estimate = log_likelihood(ppca.model, guide, x, 200, **options)
    assert_agree_within_errors(estimate, oracles.log_density(x, *parameters))
    filled, mask = np.nan_to_num(x, nan=77.0), ~np.isnan(x)
    options["refine"] = 5
    by_nan = log_likelihood(ppca.model, guide, x, 200, **options)
    by_mask = log_likelihood(ppca.model, guide, filled, 200, mask=mask, **options)
    assert torch.equal(by_mask.value, by_nan.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refine": 30},
        {"refine": 30, "covariance": "diagonal"},
        {"method": "prior"},
        pytest.param(
            {"method": "annealed", "annealing": Annealing(5, leapfrog=2)}, marks=pytest.mark.slow
        ),
    ],
    ids=["importance", "refined", "refined diagonal", "prior", "annealed"],
)
def test_a_change_of_units_adds_its_logarithm_to_log_p(options):
    _, (loc, loadings, noise) = make()
    factor = np.where(np.arange(D) == 2, 10.0, 1.0)
    scale = torch.full((D,), noise**0.5).double()
    ppca, other = (
        PPCA.from_parameters(
            torch.from_numpy(f[:, None] * loadings),
            torch.from_numpy(f * loc),
            torch.from_numpy(f) * scale,
        )
        for f in (np.ones(D), factor)
    )
    x = rows_of(ppca, N)
    guides = (
        (None, None)
        if options.get("method") == "prior"
        else (scaled(ppca, 1.4), scaled(other, 1.4))
    )
    first = log_likelihood(ppca.model, guides[0], x, 40, **options, seed=0)
    second = log_likelihood(other.model, guides[1], factor * x, 40, **options, seed=0)
    assert_agree(second, first.value.numpy() - np.log(10.0), atol=1e-8)


@pytest.mark.parametrize(
    "convert",
    [pd.DataFrame, torch.from_numpy, lambda x: x.tolist(), lambda x: x.astype("i4")],
    ids=["pandas", "torch", "list", "integers"],
)
def test_data_of_any_kind(convert):
    vae = small_vae()
    x = np.round(3 * np.random.default_rng(0).normal(size=(N, D)))
    first, second = (
        log_likelihood(vae.model, vae.guide, data, 30, seed=0) for data in (x, convert(x))
    )
    assert torch.equal(first.value, second.value)


def test_float32_programs_are_summed_in_float64():
    vae = VAE.mlp(D, 2, hidden=(5,), seed=0)
    x = np.random.default_rng(0).normal(size=(N, D))
    estimate = log_likelihood(vae.model, vae.guide, x, 50, seed=0)
    assert estimate.value.dtype == estimate.ess.dtype == torch.float64


def test_pairs_run_in_evaluation_mode(float64):
    model, guide, x = user_pairs.regularized()
    estimates = [log_likelihood(model, guide, x, 20, seed=0) for _ in range(2)]
    model.__self__.eval()
    estimates.append(log_likelihood(model, guide, x, 20, seed=0))
    for estimate in estimates[1:]:
        assert torch.equal(estimate.value, estimates[0].value)


def test_seeds_repeat_and_leave_the_generators_unchanged():
    vae = small_vae()
    x, before = vae.sample(N, seed=0), torch.get_rng_state()
    first, again, other = (
        log_likelihood(vae.model, vae.guide, x, 30, seed=s).value for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(8)
    global_draws = [log_likelihood(vae.model, vae.guide, x, 30).value for _ in range(2)]
    torch.manual_seed(8)
    assert torch.equal(global_draws[0], log_likelihood(vae.model, vae.guide, x, 30).value)
    assert not torch.equal(*global_draws)


# Errors


class Exploding(nn.Module):
    def forward(self, x):
        return torch.full((len(x), 2 * K), torch.nan).double()


BAD = [
    ({"num_samples": 0}, "num_samples must be a whole number >= 1; got 0"),
    ({"num_samples": -5}, "num_samples must be a whole number >= 1; got -5"),
    ({"method": "magic"}, "method must be one of 'importance', 'prior'.*; got 'magic'"),
    ({"refine": -1}, "refine must be a whole number >= 0; got -1"),
    ({"covariance": "full"}, "covariance= is the family of the refined q; it needs refine=steps"),
    ({"covariance": "round", "refine": 5}, "covariance must be one of .*'full'; got 'round'"),
    ({"method": "prior", "refine": 5}, "refine= needs method='importance'"),
    ({"guide": None}, "method='importance' needs a guide; method='prior' does not"),
    ({"x": np.ones(D)}, "x must be 2-d"),
    ({"x": np.ones((0, D))}, "x is empty"),
    ({"x": np.full((2, D), np.inf)}, "x has 12 infinite entries"),
    ({"x": np.full((2, D), np.nan)}, "x has rows with nothing observed"),
    ({"x": np.ones((2, D + 1))}, r"(rows, 6\)|data_dim=6)"),
    ({"mask": np.ones((2, D))}, "mask must be boolean"),
]


@pytest.mark.parametrize(("options", "match"), BAD, ids=[str(o)[:40] for o, _ in BAD])
def test_invalid_arguments_raise(options, match):
    ppca, _ = make()
    guide = AmortizedGuide(mlp(D, 2 * K, seed=0), K).double()
    arguments = {"guide": guide, "x": rows_of(ppca, N), "num_samples": 10} | options
    with pytest.raises(ValueError, match=match):
        log_likelihood(ppca.model, **arguments)


def test_data_outside_the_support_raise():
    vae = small_vae(likelihood=Bernoulli())
    with pytest.raises(ValueError, match=r"x has 12 entries outside \{0, 1\}"):
        log_likelihood(vae.model, vae.guide, np.full((2, D), 0.5), 10)


def test_nan_densities_raise():
    ppca, _ = make()
    guide = AmortizedGuide(Exploding(), K).double()
    with pytest.raises((FloatingPointError, ValueError), match=r"NaN|nan"):
        log_likelihood(ppca.model, guide, rows_of(ppca, 4), 10)


def test_a_scale_without_a_plate_raises():
    ppca, _ = make()
    scaled_model = pyro.poutine.scale(ppca.model, scale=2.0)
    with pytest.raises(ValueError, match=r"has scale 2\.0.*poutine\.scale"):
        log_likelihood(scaled_model, ExactGuide(ppca), rows_of(ppca, 4), 10)


def test_a_table_for_other_data_raises():
    ppca, _ = make()
    with pytest.raises(ValueError, match="for new data use an AmortizedGuide"):
        log_likelihood(ppca.model, PerDatumGuide(N, K).double(), rows_of(ppca, 7), 10)


# Results


def test_a_result_prints_and_converts():
    ppca, _ = make(K=6, D=10)
    x = rows_of(ppca, 20)
    estimate = log_likelihood(ppca.model, scaled(ppca, 0.2), x, 500, seed=0)
    assert isinstance(estimate, LogLikelihood)
    text = repr(estimate)
    unreliable = int((~estimate.reliable).sum())
    assert (
        f"NOT reliable for {unreliable} of 20 data points, for which it is a lower bound" in text
    )
    assert f"{estimate.mean:.3f} ± {estimate.mean_error:.3f} nats per datum" in text
    assert "by importance, 500 draws, refine=0" in text
    high, allowed = float(estimate.tail_index.median()), float(estimate.limit.median())
    assert f"the tail index {high:.2f} of their weights is above {allowed:.2f}, the limit" in text
    assert not estimate.reliable.any() and "expected to cover" not in text
    assert "remedy: refine=300" in text
    assert "tensor(" not in text
    assert estimate.mean == pytest.approx(float(estimate.value.mean()), rel=1e-12)
    spread = estimate.value.std() / 20**0.5
    assert estimate.mean_error == pytest.approx(float(spread), rel=1e-12)
    assert estimate.share_reliable == pytest.approx(1 - unreliable / 20)
    as_json = json.loads(json.dumps(estimate.to_dict()))
    assert as_json["value"] == estimate.value.tolist()
    assert as_json["num_samples"] == 500
    frame = estimate.to_frame()
    assert len(frame) == 20
    columns = {"value", "standard_error", "ess", "k_hat", "reliable", "num_entries"}
    assert set(frame.columns) == columns | {"tail_index", "limit", "pool_size", "coverage"}


def test_nan_is_none_in_json():
    ppca, _ = make()
    estimate = log_likelihood(ppca.model, scaled(ppca, 1.3), rows_of(ppca, 3), 10, seed=0)
    assert json.loads(json.dumps(estimate.to_dict(), allow_nan=False))["k_hat"] == [None] * 3


def test_remedies_depend_on_the_method():
    ppca, _ = make(K=6, D=10)
    x = rows_of(ppca, 20)
    prior = log_likelihood(ppca.model, None, x, 100, method="prior", seed=0)
    assert "prior draws rarely explain x; use method='importance'" in repr(prior)
    options = {"refine": 2, "covariance": "unit", "seed": 0}
    refined = log_likelihood(ppca.model, scaled(ppca, 0.1), x, 100, **options)
    assert "remedy: more steps in refine=, covariance='full', or more draws" in repr(refined)


def test_a_single_datum():
    ppca, parameters = make()
    x = rows_of(ppca, 1)
    estimate = log_likelihood(ppca.model, scaled(ppca, 1.5), x, 400, seed=0)
    assert estimate.mean_error == float(estimate.standard_error[0])
    z = (estimate.mean - oracles.log_density(x, *parameters)[0]) / estimate.mean_error
    assert abs(z) < oracles.z_limit()
    assert "± 0.0" in repr(estimate)
