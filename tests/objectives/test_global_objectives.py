"""Objectives of pairs with global latent variables: Pyro's values and gradients, exact bounds."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import MultivariateNormal, kl_divergence

import oracles
from global_pairs import GLOBAL_PAIRS, linear_decoder, normal_mean, random_decoder
from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.inference.svi.batches.minibatch import WeightedObjective
from ppl_vae.objectives.bounds import ELBO, IWAE, elbo
from user_pairs import N

D = 4
CONSTRAINED = ("auto_normal", "auto_multivariate_normal", "auto_low_rank")
"""Pairs for which ``TraceMeanField_ELBO`` drops the log-Jacobian of a positive site."""


def loss_and_gradients(objective, model, guide, x, keywords):
    with pyro.get_param_store().scope(), seeded(0):
        loss = objective.differentiable_loss(model, guide, x, **keywords)
        named = dict(pyro.get_param_store().named_parameters())
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), dict(zip(named, found, strict=True))


@pytest.mark.parametrize("rows", [None, slice(5, 15)], ids=["all rows", "minibatch"])
@pytest.mark.parametrize("name", GLOBAL_PAIRS)
def test_value_and_gradient_are_those_of_pyros_objectives(name, rows, float64):
    model, guide, x = GLOBAL_PAIRS[name]()
    keywords = {} if rows is None else {"index": torch.arange(N)[rows], "num_data": N}
    x = x if rows is None else x[rows]
    both = [(ELBO(kl="sampled"), Trace_ELBO())]
    if name not in CONSTRAINED:
        both.append((ELBO(), TraceMeanField_ELBO()))
    for ours, theirs in both:
        value, gradients = loss_and_gradients(ours, model, guide, x, keywords)
        expected, others = loss_and_gradients(theirs, model, guide, x, keywords)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        assert gradients.keys() == others.keys() and gradients
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, others[key], rtol=1e-8, atol=1e-8)


def exact_normal_mean():
    """The pair of ``normal_mean`` with the exact posterior, and its log evidence by data."""
    model, guide, x = normal_mean()
    precision = 1 / 2.0**2 + N
    with torch.no_grad():
        guide.loc.copy_(x.sum(0) / precision)
        guide.scale = torch.full((D,), precision**-0.5)
    covariance = torch.eye(N) + 4.0 * torch.ones(N, N)
    evidence = MultivariateNormal(torch.zeros(N), covariance).log_prob(x.T).sum()
    return model, guide, x, evidence


@pytest.mark.parametrize("objective", [ELBO(kl="sampled"), ELBO(3, kl="sampled"), IWAE(3)])
def test_at_the_exact_posterior_the_bound_is_the_log_evidence(objective, float64):
    model, guide, x, evidence = exact_normal_mean()
    assert -objective.loss(model, guide, x) == pytest.approx(float(evidence), rel=1e-10)


def test_the_elbos_of_the_data_add_up_to_the_bound(float64):
    """They are exact up to the draws of theta, given a closed-form KL."""
    model, guide, x, evidence = exact_normal_mean()
    values = elbo(model, guide, x, num_samples=4000, seed=0)
    with torch.no_grad():
        theta = dist.Normal(guide.loc, guide.scale).expand([4000, D]).sample()
        spread = (-0.5 * (x.sum(0) - N * theta).square().sum(1) / N).std()
    assert abs(float(values.sum() - evidence)) < oracles.z_limit() * float(spread) / 4000**0.5
    without = elbo(model, guide, x, num_samples=4000, global_kl=False, seed=0)
    prior = dist.Normal(torch.zeros(D), 2.0)
    kl = kl_divergence(dist.Normal(guide.loc, guide.scale), prior).sum().detach()
    torch.testing.assert_close(without - values, (kl / N).expand(N))


def test_beta_weighs_the_kl_of_globals_and_free_bits_do_not(float64):
    model, guide, x = linear_decoder()
    values = {}
    for name, objective in {
        "1": ELBO(),
        "0": ELBO(beta=0.0),
        "3": ELBO(beta=3.0),
        "floor": ELBO(free_bits=100.0),
    }.items():
        with seeded(0):
            values[name] = -objective.loss(model, guide, x) / N
    with seeded(0), isolated_store(), torch.no_grad():
        terms = ELBO().terms_of(Pair(model, guide).run(Batch(x)))
    kl = float(terms.kl.mean()) + float(terms.global_kl.mean()) / N
    assert values["0"] - values["1"] == pytest.approx(kl)
    assert values["0"] - values["3"] == pytest.approx(3 * kl)
    shared = float(terms.global_kl.mean()) / N
    assert values["0"] - values["floor"] == pytest.approx(2 * 100.0 + shared)


def test_warmup_weighs_the_kl_of_globals(float64):
    model, guide, x = linear_decoder()
    objective = WeightedObjective(ELBO(), warmup=4)
    with seeded(0), isolated_store():
        first = objective(Pair(model, guide), Batch(x), 1)
    with seeded(0):
        expected = -ELBO(beta=0.25).loss(model, guide, x) / N
    assert float(first.detach()) == pytest.approx(expected)


def test_the_importance_weighted_bound_of_all_data_tightens(float64):
    """E log-mean-exp of joint weights: never above the log evidence, and rising in S."""
    model, guide, x, evidence = exact_normal_mean()
    with torch.no_grad():
        guide.scale = 1.5 * guide.scale
    means, errors = [], []
    for number in (1, 4, 16):
        bound = IWAE(number)
        with seeded(0):
            draws = torch.tensor([-bound.loss(model, guide, x) for _ in range(100)])
        means.append(float(draws.mean()))
        errors.append(float(draws.std()) / 100**0.5)
    limit = oracles.z_limit()
    for low, high, error in zip(means, means[1:], errors, strict=False):
        assert low < high + limit * error
    assert means[-1] < float(evidence) + limit * errors[-1]
    # The gap of one draw is KL(q || posterior).
    kl = D * (1.5**2 / 2 - 0.5 - math.log(1.5))
    assert abs(float(evidence) - kl - means[0]) < limit * errors[0]


def test_the_importance_weighted_bound_needs_all_rows(float64):
    model, guide, x = linear_decoder()
    match = "weighs draws of all 24 data points jointly, and this batch"
    with pytest.raises(ValueError, match=match):
        IWAE(3).loss(model, guide, x[:10], index=torch.arange(10), num_data=N)


# Gradients


def gradient_means(objective, model, guide, x, repeats):
    """Mean and standard error of the gradient of the parameters of the guide."""
    found = []
    with isolated_store(), seeded(0):
        for _ in range(repeats):
            guide.zero_grad()
            objective.differentiable_loss(model, guide, x).backward()
            found.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
    values = torch.stack(found)
    return values.mean(0), values.std(0) / repeats**0.5


ESTIMATORS = {
    "stl": ELBO(40, gradient="stl"),
    "score": ELBO(40, gradient="score"),
    "score-loo": ELBO(40, gradient="score-loo"),
}


@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_each_estimator_of_the_gradient_has_the_same_mean(gradient, float64):
    model, guide, x = linear_decoder()
    x = x[:6]
    exact, error = gradient_means(ELBO(100), model, guide, x, 40)
    mean, other = gradient_means(ESTIMATORS[gradient], model, guide, x, 40)
    limit = oracles.z_limit(len(mean))
    assert bool(((mean - exact).abs() < limit * error.hypot(other) + 1e-12).all())


def test_the_doubly_reparameterized_gradient_has_the_mean_of_the_plain_one(float64):
    model, guide, x = linear_decoder()
    x = x[:3]
    mean, error = gradient_means(IWAE(4), model, guide, x, 60)
    other, others = gradient_means(IWAE(4, gradient="dreg"), model, guide, x, 60)
    limit = oracles.z_limit(len(mean))
    assert bool(((mean - other).abs() < limit * error.hypot(others) + 1e-12).all())


def test_at_the_exact_posterior_sticking_the_landing_leaves_no_noise(float64):
    model, guide, x, _ = exact_normal_mean()
    mean, error = gradient_means(ELBO(2, gradient="stl"), model, guide, x, 3)
    assert float(mean.abs().max()) < 1e-10 and float(error.max()) < 1e-10


def test_estimators_through_draws_need_a_plate_of_samples(float64):
    model, guide, x = random_decoder()
    for objective in (ELBO(2, gradient="stl"), IWAE(2, gradient="dreg")):
        with pytest.raises(ValueError, match="needs a pair that can be run under a plate of sam"):
            objective.differentiable_loss(model, guide, x).backward()
    with isolated_store():
        ELBO(2, gradient="score").differentiable_loss(model, guide, x).backward()
    assert guide.encoder[0].weight.grad.abs().max() > 0
