"""Estimates of log p with discrete latent variables in the guide, against finite mixtures."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from ppl_vae import collapse, log_likelihood
from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.evaluation.marginal_likelihood.discrete_sites import undersampled_values

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[-3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
SCALE = 2.0


def log_joint(x):
    """log p(x, c) of the mixture, (N, 3), by scipy."""
    densities = stats.norm(MEANS[None], SCALE).logpdf(np.asarray(x)[:, None]).sum(-1)
    return densities + np.log(WEIGHTS)


def posterior(x):
    joint = log_joint(x)
    return torch.from_numpy(np.exp(joint - logsumexp(joint, axis=1, keepdims=True)))


def single(x):
    """Rounded as programs without parameters, whose dtype is not known, are given it."""
    return x.astype(np.float32).astype(np.float64)


def data(num_data=200, seed=0):
    rng = np.random.default_rng(seed)
    noise = SCALE * rng.normal(size=(num_data, 2))
    return single(MEANS[rng.choice(3, num_data, p=WEIGHTS)] + noise)


def mixture(x=None, index=None, num_data=None):
    rows = torch.arange(num_data if x is None else len(x)) if index is None else index
    with pyro.plate("data", num_data or len(rows), subsample=rows):
        c = pyro.sample("c", dist.Categorical(torch.from_numpy(WEIGHTS)))
        loc = torch.from_numpy(MEANS)[c]
        pyro.sample("x", dist.Normal(loc, SCALE).to_event(1), obs=x)


def guide_of(probabilities):
    """The guide that draws c with these functions of the posterior probabilities."""

    def guide(x, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            pyro.sample("c", dist.Categorical(probabilities(posterior(x))))

    return guide


def without_second(r):
    """A probability of 1e-4 for the second most probable class of the posterior."""
    q = r.scatter(1, r.argsort(1)[:, 1:2], 1e-4)
    return q / q.sum(1, keepdim=True)


def errors(estimate, x):
    return (estimate.value - torch.from_numpy(logsumexp(log_joint(x), axis=1))).abs()


@pytest.mark.parametrize("num_samples", [2, 25, 100, 1000])
@pytest.mark.parametrize("num_data", [1, 200])
def test_equal_weights_of_the_exact_posterior_are_reliable(num_samples, num_data):
    x = data(num_data)
    estimate = log_likelihood(mixture, guide_of(lambda r: r), x, num_samples, seed=0)
    assert errors(estimate, x).max() < 1e-9
    assert estimate.reliable.all() and (estimate.standard_error < 1e-6).all()
    stated = "reliable for 1 data point" if num_data == 1 else f"reliable for all {num_data} data"
    assert stated in repr(estimate)
    assert estimate.expected_coverage > 0.85


@pytest.mark.parametrize("num_samples", [25, 100, 1000])
@pytest.mark.parametrize("power", [0.5, 1.5])
def test_a_guide_near_the_posterior_is_reliable_and_covers(power, num_samples):
    x = data()
    guide = guide_of(lambda r: r.pow(power) / r.pow(power).sum(1, keepdim=True))
    estimate = log_likelihood(mixture, guide, x, num_samples, seed=0)
    covered = errors(estimate, x) <= 1.96 * estimate.standard_error
    assert estimate.share_reliable > 0.9
    assert covered[estimate.reliable].double().mean() > 0.9
    if num_samples == 1000:
        assert errors(estimate, x).max() < 0.1


@pytest.mark.parametrize("num_samples", [25, 100, 1000])
@pytest.mark.parametrize("num_data", [1, 200])
def test_a_class_that_the_guide_rarely_draws_is_found(num_samples, num_data):
    """Most data have equal weights and miss the posterior probability of the class, up to 47 %."""
    x = data(num_data, seed=1)
    estimate = log_likelihood(mixture, guide_of(without_second), x, num_samples, seed=0)
    held = posterior(torch.from_numpy(x)).sort(1).values[:, 1]
    assert torch.equal(estimate.reliable[held > 0.1], torch.zeros(int((held > 0.1).sum())).bool())
    assert errors(estimate, x)[estimate.reliable].sum() < 0.05 * num_data
    rare = num_samples * 1e-4 * torch.ones_like(held) < 10
    excess = torch.where(rare, held - 1e-4, 0.0)
    assert (estimate.undersampled_mass[held > 0.1] - excess[held > 0.1]).abs().max() < 1e-2
    text = repr(estimate)
    share = f"{estimate.undersampled_mass[~estimate.reliable].max():.0%}"
    assert f"that the guide draws fewer than 10 times hold up to {share} of the posterior" in text
    assert "remedy: more draws, or a guide that is closer to the posterior" in text
    assert "refine" not in text.split("refine=0")[1]


def test_the_remedy_works():
    x = data(20, seed=1)
    with pytest.raises(ValueError, match="no density that can be refined"):
        log_likelihood(mixture, guide_of(without_second), x, 100, refine=10, seed=0)
    many = log_likelihood(mixture, guide_of(without_second), x[:3], 150_000, seed=0)
    assert many.reliable.all() and errors(many, x[:3]).max() < 0.3


def test_undersampled_values_agree_with_the_exact_ones():
    x = torch.from_numpy(data(30))
    r = posterior(x)
    q = without_second(r)
    batch = Batch(x, index=torch.arange(30), num_data=30)
    found = undersampled_values(Pair(mixture, guide_of(without_second)), batch, 1000)
    rare = q * 1000 < 10
    excess = torch.where(rare, (r - q).clamp(min=0), 0.0)
    torch.testing.assert_close(found.mass, excess.sum(1), rtol=1e-6, atol=1e-12)
    error = (excess.square() / (1000 * q)).sum(1).sqrt()
    torch.testing.assert_close(found.error, error, rtol=1e-6, atol=1e-12)


def test_draws_from_the_prior_of_a_discrete_variable_are_reliable():
    x = data()
    estimate = log_likelihood(mixture, None, x, 1000, method="prior", seed=0)
    covered = errors(estimate, x) <= 1.96 * estimate.standard_error
    assert estimate.share_reliable > 0.9
    assert covered[estimate.reliable].double().mean() > 0.9


# Together with continuous variables, and several binary ones


def switching(x=None, index=None, num_data=None):
    """c ~ Bernoulli(0.4), z ~ N(0, 1), x ~ N(z + 4 c, 1)."""
    rows = torch.arange(num_data if x is None else len(x)) if index is None else index
    with pyro.plate("data", num_data or len(rows), subsample=rows):
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
        z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
        loc = z + 4 * c[..., None]
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def switching_guide(wrong):
    """The exact posterior, or a q that gives the less probable value of c a probability of
    1e-4."""

    def guide(x, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        x = x.double()
        odds = (x[:, 0].square() - (x[:, 0] - 4).square()) / 4 + math.log(0.4 / 0.6)
        odds = odds.sign() * math.log(1e4) if wrong else odds
        with pyro.plate("data", num_data or len(x), subsample=rows):
            c = pyro.sample("c", dist.Bernoulli(logits=odds))
            mean = (x - 4 * c[..., None]) / 2
            pyro.sample("z", dist.Normal(mean, math.sqrt(0.5)).to_event(1))

    return guide


def test_a_discrete_and_a_continuous_variable():
    # The classes overlap: the less probable one has 19 to 46 % of the posterior.
    x = single(np.linspace(1.7, 2.9, 40)[:, None])
    parts = [stats.norm(m, math.sqrt(2)).logpdf(x[:, 0]) for m in (0, 4)]
    truth = logsumexp(np.stack(parts, 1) + np.log([0.6, 0.4]), axis=1)
    good = log_likelihood(switching, switching_guide(False), x, 100, seed=0)
    assert np.abs(good.value.numpy() - truth).max() < 1e-9 and good.reliable.all()
    bad = log_likelihood(switching, switching_guide(True), x, 100, seed=0)
    assert np.abs(bad.value.numpy() - truth).max() > 0.2 and not bad.reliable.any()
    assert not bad.refinable and "refine=300" not in repr(bad)


def test_each_of_several_binary_variables_is_evaluated():
    """Three in one site; the guide never draws the second, which x does not determine."""

    def model(x=None, index=None, num_data=None):
        rows = torch.arange(num_data if x is None else len(x)) if index is None else index
        with pyro.plate("data", num_data or len(rows), subsample=rows):
            b = pyro.sample("b", dist.Bernoulli(0.5 * torch.ones(3).double()).to_event(1))
            pyro.sample(
                "x", dist.Normal(b * torch.tensor([9.0, 0.0, 9.0]), 1.0).to_event(1), obs=x
            )

    def guide(x, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        q = torch.where(x > 4.5, 1 - 1e-9, 1e-9)
        q[:, 1] = 1e-5
        with pyro.plate("data", num_data or len(x), subsample=rows):
            pyro.sample("b", dist.Bernoulli(q).to_event(1))

    x = np.array([[0.0, 0.3, 9.0], [9.0, -0.2, 0.0]])
    estimate = log_likelihood(model, guide, x, 100, seed=0)
    assert not estimate.reliable.any()
    assert estimate.undersampled_mass.tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


# Mutual information


def test_collapse_does_not_contradict_its_mutual_information():
    """Classes 0 and 2 exchange probability: the mean of c is constant, and c depends on x."""

    def guide(x, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        share = torch.where(x[:, :1] > 0, 0.45, 0.1)
        q = torch.cat([share, 1 - 2 * share, share], 1)
        with pyro.plate("data", num_data or len(x), subsample=rows):
            pyro.sample("c", dist.Categorical(q))

    found = collapse(mixture, guide, data(), num_samples=8, seed=0)
    error = found.mutual_information_error
    assert found.mutual_information > 3 * error and not found.active.any()
    information = min(found.mutual_information, found.upper_bound)
    assert (
        found.verdict
        == f"q(z | x) depends on x, mutual information {information:.3f} ± {error:.3f} nats"
    )
    assert "variances of the posterior means" not in repr(found)  # classes have no mean
    constant = guide_of(lambda r: torch.tensor([0.1, 0.1, 0.8]).double().expand_as(r))
    none = collapse(mixture, constant, data(), num_samples=8, seed=0)
    assert none.verdict.startswith(
        "q(z | x) differs from the prior, but no dependence on x is detected"
    )


def test_a_continuous_code_of_which_only_the_variance_depends_on_x():
    def guide(x, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        scale = torch.where(x[:, :1] > 2, 0.2, 1.0)
        with pyro.plate("data", num_data or len(x), subsample=rows):
            pyro.sample("c", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
            pyro.sample("z", dist.Normal(torch.zeros_like(scale), scale).to_event(1))

    x = torch.linspace(0, 4, 200)[:, None].double()
    found = collapse(switching, guide, x, num_samples=8, seed=0)
    assert not found.active.any() and found.depends_on_x
    assert "q(z | x) depends on x, mutual information 0." in found.verdict
