"""The reliability of estimates of log p, calibrated on PPCA, where log p is exact."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import oracles
from ppl_vae import PPCA, ExactGuide, log_likelihood
from ppl_vae.evaluation.marginal_likelihood import batching
from ppl_vae.evaluation.marginal_likelihood.coverage import (
    expected_coverage,
    largest_tail_index,
)
from ppl_vae.evaluation.marginal_likelihood.estimate import log_mean_weights
from ppl_vae.evaluation.marginal_likelihood.reliability import (
    MIN_DRAWS,
    assess_reliability,
    summarize_weights,
)

FACTORS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.1, 1.5, 4.0)
SHIFTS = (1.0, 2.0, 3.0)
DRAWS = (25, 100, 1000, 10_000)


def model_of(K=5, D=12, seed=0):
    rng = np.random.default_rng(seed)
    loadings, loc = rng.normal(size=(D, K)), 3 * rng.normal(size=D)
    scale = torch.tensor(0.6**0.5, dtype=torch.float64)
    return PPCA.from_parameters(torch.tensor(loadings), torch.tensor(loc), scale)


def proposal(ppca, factors, shifts):
    """The posterior of each datum, with scaled covariance, shifted by standard deviations."""

    def guide(x, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        posterior, factor, shift = ppca.posterior(x), factors[rows], shifts[rows]
        with pyro.plate("data", num_data or len(x), subsample=rows):
            tril = posterior.scale_tril
            loc = posterior.mean + shift[:, None] * tril[..., :, 0]
            scaled = factor.sqrt()[:, None, None] * tril
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scaled))

    return guide


def mixed(ppca, num_data, *kinds):
    """A guide of several kinds, (factor, shift), for the data in turn."""
    values = torch.tensor(kinds, dtype=torch.float64)
    turns = values[torch.arange(num_data) % len(kinds)]
    return proposal(ppca, turns[:, 0], turns[:, 1])


def guides(ppca, num_data):
    named = {f"covariance x {c:g}": mixed(ppca, num_data, (c, 0.0)) for c in FACTORS}
    named |= {f"moved by {s:g} sd": mixed(ppca, num_data, (1.0, s)) for s in SHIFTS}
    return named | {"best diagonal q": ExactGuide(ppca, covariance="diagonal")}


def mixtures(ppca, num_data):
    pairs = ((1.0, 0), (0.3, 0)), ((1.1, 0), (0.3, 0)), ((1.0, 0), (1.0, 2)), ((1.5, 0), (0.3, 0))
    return {f"{a[0]:g}, {b[0]:g} moved by {b[1]}": mixed(ppca, num_data, a, b) for a, b in pairs}


def cell(ppca, guide, x, S, seed):
    """Errors, whether intervals cover, and the estimate."""
    estimate = log_likelihood(ppca.model, guide, x, S, seed=seed)
    errors = (estimate.value - ppca.log_likelihood(x).detach()).abs()
    return errors, errors <= 1.96 * estimate.standard_error + 1e-9, estimate


def holds(errors, covered, reliable):
    """The two bounds: what is called reliable covers, and what is good is called reliable."""
    covers = not reliable.any() or covered[reliable].double().mean() >= 0.9
    return bool(covers) and bool(errors.max() >= 0.1 or reliable.double().mean() >= 0.9)


def table(ppca, x, named, draws, seed):
    """Print a row for each guide and number of draws; those for which a bound does not hold."""
    print("\n| guide | S | pooled index | covers | expected | reliable | of these cover | error |")
    print("|---|---|---|---|---|---|---|---|")
    failed = []
    for S, (name, guide) in itertools.product(draws, named.items()):
        errors, covered, found = cell(ppca, guide, x, S, seed)
        good = found.reliable
        share = f"{covered[good].double().mean():.2f}" if good.any() else "-"
        print(
            f"| {name} | {S} | {found.tail_index.nanmedian():.2f} "
            f"| {covered.double().mean():.2f} | {found.expected_coverage:.2f} "
            f"| {good.double().mean():.2f} | {share} | {errors.max():.3f} |",
            flush=True,
        )
        failed += [] if holds(errors, covered, good) else [(name, S)]
    return failed


@pytest.mark.slow
@pytest.mark.parametrize(("K", "D", "seed"), [(5, 12, 0), (2, 6, 1), (10, 20, 2)])
def test_reliable_intervals_cover_and_small_errors_are_reliable(K, D, seed):
    ppca = model_of(K, D, seed)
    x = ppca.sample(300, seed=seed)
    # Ten thousand draws of 300 data points for each of twelve guides: once.
    draws = DRAWS if K == 5 else DRAWS[:-1]
    assert table(ppca, x, guides(ppca, 300), draws, seed) == []
    assert table(ppca, x, mixtures(ppca, 300), DRAWS[:-1], seed) == []


@pytest.mark.parametrize("factor", [0.3, 0.9, 1.1])
@pytest.mark.parametrize("num_samples", [25, 100])
def test_coverage_with_few_draws(factor, num_samples):
    ppca = model_of()
    x = ppca.sample(200, seed=3)
    errors, covered, found = cell(ppca, mixed(ppca, 200, (factor, 0.0)), x, num_samples, 3)
    assert holds(errors, covered, found.reliable)
    assert found.reliable.all() if factor > 0.5 else not found.reliable.any()
    # If the k-hat of each datum decided, many assessments with 25 draws would be wrong.
    own = (found.k_hat <= 0.5).double().mean()
    assert num_samples > 25 or factor > 1 or 0.2 < own < 0.8


@pytest.mark.parametrize("other", [(0.3, 0.0), (1.0, 2.0)])
@pytest.mark.parametrize("first", [1.0, 1.1])
def test_a_guide_that_is_good_for_half_of_the_data(first, other):
    ppca = model_of()
    x = ppca.sample(200, seed=4)
    guide = mixed(ppca, 200, (first, 0.0), other)
    errors, covered, found = cell(ppca, guide, x, 100, 4)
    assert holds(errors, covered, found.reliable)
    assert found.reliable[::2].all() and found.reliable[1::2].double().mean() < 0.1
    assert errors[1::2].max() > 0.5
    text = repr(found)
    assert "NOT reliable for 1" in text and "unreliable because the tail index 0." in text
    assert "the weights' variance is not finite" in text


@pytest.mark.parametrize("num_data", [1, pytest.param(2, marks=pytest.mark.slow), 5])
def test_with_few_data_only_nearly_exact_guides_are_reliable(num_data):
    """With little to pool, a narrow guide is unreliable for any k-hats."""
    ppca = model_of()
    narrow, near = [], []
    for seed in range(20):
        x = ppca.sample(num_data, seed=seed)
        for found, factor in ((narrow, 0.3), (near, 1.05)):
            guide = mixed(ppca, num_data, (factor, 0.0))
            found.append(log_likelihood(ppca.model, guide, x, 100, seed=seed).share_reliable)
    assert np.mean(narrow) <= 0.05 and np.mean(near) == 1


def test_reliability_does_not_depend_on_batches(monkeypatch):
    """The same weights are assessed in batches and at once."""
    ppca = model_of()
    x = ppca.sample(60, seed=5)
    guide = mixed(ppca, 60, (0.5, 0.0), (1.2, 0.0))
    weights = []
    real = batching.LogWeightSampler.__call__

    def recorded(self, *args):
        weights.append(real(self, *args))
        return weights[-1]

    monkeypatch.setattr(batching.LogWeightSampler, "__call__", recorded)
    monkeypatch.setattr(
        batching, "ROWS_AT_ONCE", dict.fromkeys(batching.ROWS_AT_ONCE, 7 * batching.DRAWS_AT_ONCE)
    )
    found = log_likelihood(ppca.model, guide, x, 200, seed=5)
    assert len(weights) == 9
    whole = torch.cat(weights, 1)
    again = assess_reliability(summarize_weights(whole, whole.logsumexp(0)[:, None]), 200)
    for name in ("standard_error", "tail_index", "limit", "coverage", "reliable"):
        torch.testing.assert_close(
            getattr(found, name), getattr(again, name), rtol=1e-12, atol=0, equal_nan=True
        )
    some = found.first(10)
    assert len(some.tail_index) == len(some.coverage) == len(some.limit) == len(some.curve) == 10
    assert torch.equal(some.reliable, found.reliable[:10])


def test_reliability_does_not_depend_on_the_order_of_rows():
    weights = torch.randn(100, 40, generator=torch.Generator().manual_seed(0)).double()
    weights = weights * torch.linspace(0.1, 3, 40).double()
    turned = torch.arange(39, -1, -1)
    one, other = (
        assess_reliability(summarize_weights(w, w[:1].T), 100)
        for w in (weights, weights[:, turned])
    )
    torch.testing.assert_close(one.tail_index, other.tail_index[turned])
    torch.testing.assert_close(one.standard_error, other.standard_error[turned])
    assert torch.equal(one.reliable, other.reliable[turned])


def test_a_subset_of_many_data_is_representative(monkeypatch):
    """All data as references, and a quarter of them, agree up to sampling error."""
    weights = torch.randn(100, 200, generator=torch.Generator().manual_seed(0)).double()
    whole = assess_reliability(summarize_weights(weights, weights[:1].T), 100)
    monkeypatch.setattr("ppl_vae.evaluation.marginal_likelihood.reliability.MAX_REFERENCES", 50)
    part = assess_reliability(summarize_weights(weights, weights[:1].T), 100)
    assert (whole.tail_index - part.tail_index).abs().max() < 0.15
    torch.testing.assert_close(whole.standard_error, part.standard_error, rtol=0.15, atol=0)
    assert whole.reliable.all() and part.reliable.all()


def test_expected_coverage_is_monotone():
    sizes = torch.tensor([1.0, 3.0, 10.0, 100.0, 1000.0]).double()
    limits = torch.stack([largest_tail_index(S, sizes) for S in (25, 100, 1000, 10_000)])
    assert (limits.diff(dim=0) >= 0).all() and (limits.diff(dim=1) >= 0).all()
    assert limits.max() == 0.7
    for S in (MIN_DRAWS, 1000):
        for size in sizes:
            tails = torch.linspace(-1, 1.5, 200).double()
            found = expected_coverage(tails, S, size.expand(200))
            assert (found.diff() <= 0).all() and 0.5 - 1e-9 <= found.min() <= found.max() <= 0.95
            at = expected_coverage(largest_tail_index(S, size[None]), S, size[None])
            assert 0.9 <= float(at) < 0.951


@pytest.mark.parametrize("width", [0.1, 0.01])
def test_no_coverage_is_stated_for_very_narrow_guides(width):
    """In one dimension their tail index is moderate, and their intervals hardly ever cover."""
    z = width * torch.randn(100, 60, generator=torch.Generator().manual_seed(0)).double()
    weights = 0.5 * z.square() * (1 / width**2 - 1) + math.log(width)  # of mean one
    found = assess_reliability(summarize_weights(weights, log_mean_weights(weights)), 100)
    errors = weights.logsumexp(0) - math.log(100)
    assert (errors.abs() <= 1.96 * found.standard_error).double().mean() < 0.2
    assert found.tail_index.mean() < 1 and found.coverage[~found.reliable].isnan().all()
    assert not found.reliable.any()


def test_the_reason_names_the_number_of_data_of_the_limit():
    ppca = model_of()
    x = ppca.sample(40, seed=3)
    _, _, found = cell(ppca, mixed(ppca, 40, (0.3, 0.0)), x, 100, 3)
    heavy = ~found.reliable & (found.tail_index > found.limit)
    pooled = round(float(found.pool_size[heavy].median()))
    limit = float(found.limit[heavy].median())
    assert f"above {limit:.2f}, the limit when it is pooled over {pooled} data" in repr(found)
    expected = largest_tail_index(100, found.pool_size)
    torch.testing.assert_close(found.limit, expected)


def test_standard_errors_are_pooled_over_similar_data():
    """They vary much less than the errors from each datum's own weights."""
    ppca = model_of()
    x = ppca.sample(100, seed=6)
    _, covered, found = cell(ppca, mixed(ppca, 100, (0.5, 0.0)), x, 400, 6)
    own = ((400 / found.ess - 1) / 399).sqrt()
    assert found.standard_error.log().std() < 0.3 * own.log().std()
    errors = (found.value - ppca.log_likelihood(x).detach()).abs()
    assert covered.double().mean() > (errors <= 1.96 * own).double().mean()


def test_standard_errors_of_dissimilar_data_are_not_pooled():
    """Weights whose spreads differ by much: a slow loop in numpy pools them the same."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(24, 30)) * np.geomspace(1e-3, 1, 30)
    torched = torch.from_numpy(weights)
    found = assess_reliability(
        summarize_weights(torched, torched[:1].T), 24
    ).standard_error.numpy()
    np.testing.assert_allclose(found, oracles.pooled_standard_error(weights), rtol=1e-9)
    own = np.exp(weights).std(0, ddof=1) / np.exp(weights).mean(0) / np.sqrt(24)
    assert np.abs(np.log(found / own)).max() < 1
