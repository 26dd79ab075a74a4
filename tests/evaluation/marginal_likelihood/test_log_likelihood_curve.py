"""Estimates of log p as a function of the number of draws, and in bits per dimension."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import oracles
from ppl_vae import PPCA, ExactGuide, log_likelihood
from ppl_vae.core.program import data_plate
from ppl_vae.evaluation.marginal_likelihood.estimate import (
    LogLikelihood,
    curve_draws,
    exact_result,
    log_mean_weights,
)


def ppca():
    loadings = np.random.default_rng(0).normal(size=(6, 2))
    scale = torch.tensor(0.7, dtype=torch.float64)
    return PPCA.from_parameters(torch.tensor(loadings), torch.zeros(6).double(), scale)


def wide_guide(model):
    """The posterior with three times its standard deviations."""

    def guide(x, index=None, num_data=None):
        posterior = model.posterior(x)
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            tril = 3 * posterior.scale_tril
            pyro.sample("z", dist.MultivariateNormal(posterior.mean, scale_tril=tril))

    return guide


def test_each_point_is_the_mean_weight_of_the_first_draws():
    weights = torch.randn(640, 5, generator=torch.Generator().manual_seed(0)).double() * 3 - 700
    curve = log_mean_weights(weights)
    assert (
        curve_draws(640) == (10, 40, 160, 640)
        and curve_draws(5) == (1, 5)
        and curve_draws(1) == (1,)
    )
    for place, number in enumerate(curve_draws(640)):
        mean = np.log(np.exp(weights[:number].numpy() + 700).mean(0)) - 700
        np.testing.assert_allclose(curve[:, place].numpy(), mean, rtol=1e-12)


def test_the_curve_is_flat_for_the_exact_guide_and_rises_for_a_poor_one():
    model = ppca()
    x = model.sample(500, seed=1)
    exact = model.log_likelihood(x).detach()
    flat = log_likelihood(model.model, ExactGuide(model), x, 256, seed=0)
    for _, mean in flat.convergence:
        assert mean == pytest.approx(float(exact.mean()), abs=1e-9)
    poor = log_likelihood(model.model, wide_guide(model), x, 256, seed=0)
    draws, means = zip(*poor.convergence, strict=True)
    assert draws == (4, 16, 64, 256) and means[-1] == pytest.approx(poor.mean, abs=1e-12)
    assert all(first < second for first, second in itertools.pairwise(means))
    assert means[0] < float(exact.mean()) - 0.1 and abs(means[-1] - float(exact.mean())) < 0.03
    assert f"from fewer of these draws: {means[0]:.3f} with 4" in repr(poor)


def test_bits_per_dimension_count_observed_entries():
    model = ppca()
    x = model.sample(50, seed=1)
    whole = log_likelihood(model.model, ExactGuide(model), x, 20, seed=0)
    bits = -float(whole.value.mean()) / 6 / math.log(2)
    assert whole.bits_per_dimension == pytest.approx(bits, rel=1e-12)
    assert f"{bits:.4f} bits per dimension" in repr(whole)
    incomplete = torch.from_numpy(oracles.with_missing_values(x.numpy(), 0.3, seed=0))
    part = log_likelihood(
        model.model, ExactGuide(model), incomplete, 20, rows=torch.arange(10, 30), seed=0
    )
    num_observed = (~incomplete[10:30].isnan()).sum(1)
    assert torch.equal(part.num_entries, num_observed.double())
    exact = float(model.log_likelihood(incomplete[10:30]).detach().sum())
    expected = -exact / int(num_observed.sum()) / math.log(2)
    assert part.bits_per_dimension == pytest.approx(expected, rel=1e-9)


def conditional_pair():
    """The first two columns given the others, which the model does not score."""

    def model(x, *, mask=None, index=None, num_data=None):
        with data_plate(len(x), index=index, num_data=num_data):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            scored, given = x[:, :2], x[:, 2:]
            fn = dist.Normal(given.sum(-1, keepdim=True) + z, 1.0).expand(scored.shape)
            fn = fn if mask is None else fn.mask(mask[:, :2])
            pyro.sample("x", fn.to_event(1), obs=scored)

    def guide(x, *, mask=None, index=None, num_data=None):
        with data_plate(len(x), index=index, num_data=num_data):
            pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))

    return model, guide


def test_bits_per_dimension_count_the_entries_that_the_model_scores():
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 6)))
    found = log_likelihood(*conditional_pair(), x, 20, seed=0)
    assert found.num_entries.tolist() == [2.0] * 5
    assert found.bits_per_dimension == pytest.approx(-found.mean / 2 / math.log(2))
    wider = torch.cat([x, torch.zeros(5, 10).double()], 1)
    again = log_likelihood(*conditional_pair(), wider, 20, seed=0)
    assert again.bits_per_dimension == pytest.approx(found.bits_per_dimension, rel=1e-12)
    x[0, 0] = math.nan
    incomplete = log_likelihood(*conditional_pair(), x, 20, seed=0)
    assert incomplete.num_entries is None and "bits" not in repr(incomplete)


def test_shifting_units_shifts_values_and_curve():
    model = ppca()
    x = model.sample(20, seed=1)
    estimate = log_likelihood(model.model, wide_guide(model), x, 100, seed=0)
    nats = torch.arange(20).double()
    moved = estimate.shifted(nats)
    assert torch.equal(moved.value, estimate.value + nats)
    assert torch.equal(moved.curve, estimate.curve + nats[:, None])
    again = LogLikelihood.from_dict(moved.to_dict())
    assert torch.equal(again.curve, moved.curve) and torch.equal(
        again.num_entries, moved.num_entries
    )


def test_exact_values_have_no_curve():
    exact = exact_result(torch.zeros(3))
    assert exact.convergence == () and exact.shifted(torch.ones(3)).curve is None
    assert "draws:" not in repr(exact) and "bits" not in repr(exact)
    with pytest.raises(ValueError, match="it is not known how many entries"):
        _ = exact.bits_per_dimension
