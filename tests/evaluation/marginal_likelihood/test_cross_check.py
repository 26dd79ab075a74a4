"""Estimates of log p by several methods, where the exact value is known."""

import dataclasses
import itertools
import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import oracles
import user_pairs
from ppl_vae import PPCA, VAE, ExactGuide, cross_check, log_likelihood
from ppl_vae.evaluation import Annealing, EstimatorComparison
from ppl_vae.evaluation.marginal_likelihood.estimate import exact_result

METHODS = ["importance", "refined", "annealed"]
REPETITIONS = 40
SHORT = {"refine": 60, "num_chains": 30, "annealing": Annealing(10, leapfrog=4), "seed": 0}


def ppca(seed=0):
    loadings = torch.tensor(np.random.default_rng(seed).normal(size=(6, 2)))
    return PPCA.from_parameters(loadings, torch.zeros(6).double(), torch.tensor(0.7).double())


def narrow(model, c=0.3):
    """The posterior with its standard deviations times c, which misses the tails."""

    def guide(x, *, index=None, num_data=None):
        posterior = model.posterior(x)
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            tril = c * posterior.scale_tril
            pyro.sample("z", dist.MultivariateNormal(posterior.mean, scale_tril=tril))

    return guide


def test_under_the_exact_guide_all_methods_are_exact():
    model = ppca()
    x = model.sample(20, seed=1)
    found = cross_check(model.model, ExactGuide(model), x, 50, **SHORT)
    truth = model.log_likelihood(x).detach()
    assert list(found.estimates) == METHODS
    for name in ("importance", "annealed"):
        torch.testing.assert_close(found.estimates[name].value, truth, rtol=0, atol=1e-8)
    refined = found.estimates[
        "refined"
    ]  # whose optimization takes noisy steps away from the exact q
    assert ((refined.value - truth) / refined.standard_error).abs().max() < oracles.z_limit(20)
    assert (refined.value - truth).abs().max() < 0.02


def test_a_narrow_guide_falls_short():
    model = ppca()
    x = model.sample(40, seed=1)
    truth = float(model.log_likelihood(x).detach().mean())
    options = SHORT | {"annealing": Annealing(35, leapfrog=5)}
    found = cross_check(model.model, narrow(model), x, 1000, **options)
    behind, error = found.shortfalls["importance"]
    assert found.highest in ("refined", "annealed") and behind > 5 * error
    for name in ("refined", "annealed"):
        estimate = found.estimates[name]
        error = float(estimate.standard_error.square().sum().sqrt()) / len(x)
        assert abs(estimate.mean - truth) < oracles.z_limit() * error + 1e-3
    text = repr(found)
    assert text.startswith("log p of 40 data points by each method, nats per datum, ± one Monte")
    assert f"importance falls short of {found.highest} by {behind:.3f} ± " in text
    assert "because too few data are reliable by annealed" in text
    row = next(line for line in text.splitlines() if line.startswith("  importance"))
    assert "≥" in row and "% reliable  1000 draws" in row and "30 chains" in text


def made_up(share, num_data=20):
    """Estimates near zero, of which a share is reliable."""
    noise = 0.01 * torch.randn(num_data, generator=torch.Generator().manual_seed(0)).double()
    return dataclasses.replace(
        exact_result(noise),
        standard_error=torch.full((num_data,), 0.1).double(),
        reliable=torch.arange(num_data) < share * num_data,
        method="importance",
        num_samples=100,
    )


def test_an_agreement_with_unreliable_estimates_is_not_trusted():
    good, bad = made_up(1.0), made_up(0.0)
    text = repr(EstimatorComparison.of({"one": good, "two": good, "three": bad}))
    assert "one and two agree: 0.000 ± " in text
    assert "left out of this agreement, because too few data are reliable: three" in text
    text = repr(EstimatorComparison.of({"one": good, "two": bad, "three": bad}))
    assert "agree:" not in text and "one, two and three differ by 0.000 ± " in text
    assert "cannot be trusted, because too few data are reliable by two and three" in text


@pytest.mark.slow
def test_the_error_of_a_difference_agrees_with_repetitions():
    """The standard deviation of a difference over seeds is its Monte Carlo error."""
    model = ppca()
    x = model.sample(10, seed=1)
    wide, differences = narrow(model, 1.3), []
    for seed in range(REPETITIONS):
        estimates = {
            "importance": log_likelihood(model.model, wide, x, 400, seed=2 * seed),
            "more": log_likelihood(model.model, wide, x, 800, seed=2 * seed + 1),
        }
        differences.append(EstimatorComparison.of(estimates).difference("importance", "more"))
    values, errors = np.array(differences).T
    ratio = (values**2 / errors**2).mean()  # chi squared / n, but for the bias
    assert abs(ratio - 1) < oracles.z_limit() * np.sqrt(2 / REPETITIONS)
    means = np.abs(values.mean()) / (errors.mean() / np.sqrt(REPETITIONS))
    assert means < oracles.z_limit()


QUICK = sorted(user_pairs.PAIRS)[::4]


@pytest.mark.parametrize(
    "name",
    [
        n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
        for n in sorted(user_pairs.PAIRS)
    ],
)
def test_every_pair(name, float64):
    model, guide, x = user_pairs.PAIRS[name]()
    options = SHORT | {"refine": 5, "annealing": Annealing(4, leapfrog=2)}
    found = cross_check(model, guide, x[:6], 40, **options)
    assert list(found.estimates) == METHODS
    for one, other in itertools.combinations(METHODS, 2):
        difference, error = found.difference(one, other)
        assert np.isfinite([difference, error]).all()
    again = cross_check(model, guide, x[:6], 40, **options)
    for method in METHODS:
        assert torch.equal(found.estimates[method].value, again.estimates[method].value)


def test_a_comparison_converts_to_frames_and_json():
    vae = VAE.mlp(6, 2, hidden=(5,), seed=0).double()
    x = vae.sample(8, seed=0)
    found = cross_check(vae.model, vae.guide, x, 40, **SHORT, rows=torch.arange(2, 7))
    frame = found.to_frame()
    assert list(frame.index) == METHODS and frame.index.name == "method"
    assert list(frame.columns) == ["mean", "error", "monte_carlo", "reliable", "draws"]
    assert frame.loc["refined", "mean"] == found.estimates["refined"].mean
    assert frame["draws"].tolist() == [40, 40, 30] and len(found.estimates["refined"].value) == 5
    again = EstimatorComparison.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert repr(again) == repr(found)


def test_invalid_arguments_raise():
    model = ppca()
    x = model.sample(5, seed=0)
    with pytest.raises(ValueError, match="there is no estimate; pass at least one"):
        EstimatorComparison.of({})
    two = {"a": exact_result(torch.zeros(3)), "b": exact_result(torch.zeros(4))}
    with pytest.raises(
        ValueError, match=r"the same data; the numbers of data points are {'a': 3, 'b': 4}"
    ):
        EstimatorComparison.of(two)
    with pytest.raises(ValueError, match="refine must be a whole number >= 1; got 0"):
        cross_check(model.model, ExactGuide(model), x, refine=0)
