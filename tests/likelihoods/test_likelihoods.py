"""Likelihoods: densities against quadrature and scipy, noise scales, and fits with each."""

import copy
import itertools
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from scipy import integrate, special, stats
from torch import nn

import combinations
import oracles
from captured import assert_equal, both_fits
from draws import draw, generator
from ppl_vae import CapturedSVI, fit_svi, mlp
from ppl_vae.core.batch import Batch
from ppl_vae.core.config import constructor_call
from ppl_vae.core.pair import Pair
from ppl_vae.evaluation import Annealing, compare, gaps, impute, log_likelihood
from ppl_vae.evaluation.prediction.predictive import draw_data, mean_data
from ppl_vae.inference import freeze_scale
from ppl_vae.inference.svi.data_statistics import set_data_statistics
from ppl_vae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Gaussian,
    Multinomial,
    OptimalGaussian,
    Poisson,
)
from ppl_vae.likelihoods import distributions as densities
from ppl_vae.likelihoods.discrete import LIKELIHOODS
from ppl_vae.likelihoods.gaussian import SCALES
from ppl_vae.models import VAE, load, save
from ppl_vae.objectives import ELBO, IWAE, elbo, log_weights

N, D, K, C = 24, 4, 2, 3
LOGITS = (-700.0, -30.0, -1.0, -1e-3, -1e-9, 0.0, 1e-12, 1e-5, 0.3, 0.5, 2.0, 40.0, 500.0)


def counts(*shape, seed=0, rate=3.0):
    return torch.poisson(torch.full(shape, rate, dtype=torch.float64), generator=generator(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


MAKERS = {
    "fixed": (lambda: Gaussian(0.7), draw),
    **{name: (lambda name=name: Gaussian(name), draw) for name in SCALES},
    "optimal": (OptimalGaussian, draw),
    "bernoulli": (Bernoulli, lambda *s: (uniform(*s) > 0.4).double()),
    "soft": (lambda: Bernoulli(soft_targets=True), uniform),
    "continuous": (ContinuousBernoulli, uniform),
    "categorical": (lambda: Categorical(C), lambda *s: (uniform(*s) * C).floor()),
    "poisson": (Poisson, counts),
    "multinomial": (lambda: Multinomial(5), counts),
}
UNIVARIATE = [name for name in MAKERS if name != "multinomial"]
DENSITIES = [name for name in MAKERS if name != "soft"]


def likelihood_of(name, data_dim=D):
    """A likelihood in float64, ready for evaluation: an optimal scale is frozen."""
    likelihood = MAKERS[name][0]()
    likelihood.set_data_dim(data_dim)
    likelihood.double().requires_grad_(False)
    if name == "optimal":
        with likelihood.collect_statistics():
            likelihood(torch.zeros(N, data_dim).double(), 0.8 * torch.ones(N, data_dim).double())
    return likelihood.eval()


def vae_of(name, hidden=(6,), **options):
    return VAE.mlp(D, K, hidden=hidden, likelihood=MAKERS[name][0](), seed=0, **options).double()


def fitted(name, steps=5, **options):
    vae, x = vae_of(name), MAKERS[name][1](N, D)
    fit = fit_svi(vae.model, vae.guide, x, steps=steps, batch_size=8, lr=1e-2, seed=0, **options)
    return vae, x, fit


# Densities


def test_pyros_continuous_bernoulli_is_inaccurate():
    logits, x = torch.tensor([1e-2, 40.0]), torch.tensor([1.0, 1.0])
    exact = reference(logits.double().numpy(), x.double().numpy())
    theirs = dist.ContinuousBernoulli(logits=logits).log_prob(x).numpy()
    ours = densities.LogitContinuousBernoulli(logits).log_prob(x).numpy()
    assert np.abs(ours - exact).max() < 1e-6
    assert (np.abs(theirs - exact) > 1e-5).any()


def reference(logit, x):
    """log p of a continuous Bernoulli by another formula: x l + log(l / (e^l - 1))."""
    logit = np.asarray(logit)
    safe = np.where(logit == 0, 1.0, np.abs(logit))
    # For l > 0 log(e^l - 1) = l + log(1 - e^-l); log C is symmetric under x -> 1 - x, l -> -l.
    log_c = np.log(safe) - np.log(-np.expm1(-safe))
    value = np.where(logit > 0, (x - 1) * safe, -x * safe) + log_c
    return np.where(logit == 0, 0.0, value)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_the_continuous_bernoulli_is_accurate_at_every_logit(dtype, tolerance):
    logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    p, exact = densities.LogitContinuousBernoulli(logits), np.array(LOGITS, dtype=np.float64)
    for x in (0.0, 0.3, 1.0):
        value = p.log_prob(torch.full_like(logits, x))
        expected = reference(
            logits.detach().double().numpy(), np.float64(torch.tensor(x, dtype=dtype))
        )
        scale = 1 + np.abs(expected)
        assert (np.abs(value.detach().numpy() - expected) / scale).max() < 2 * tolerance
        # d log p / dl = x - E x, which must not cancel near 0.
        (slope,) = torch.autograd.grad(value.sum(), logits)
        assert (slope - (x - p.mean)).abs().max() < 4 * tolerance
    small = np.abs(exact) < 1e-2
    series = 0.5 + exact / 12 - exact**3 / 720
    with np.errstate(all="ignore"):
        closed = 1 / -np.expm1(-exact) - 1 / exact
    mean = np.where(small, series, closed)
    assert np.abs(p.mean.detach().numpy() - mean).max() < 4 * tolerance
    with np.errstate(all="ignore"):
        variance = np.where(
            small, 1 / 12 - exact**2 / 240, exact**-2.0 - 0.25 / np.sinh(exact / 2) ** 2
        )
    assert (np.abs(p.variance.detach().numpy() / variance - 1)).max() < 50 * tolerance


@pytest.mark.parametrize("logit", [-700.0, -30.0, -1e-3, 0.0, 1e-9, 0.3, 40.0])
def test_a_continuous_bernoulli_integrates_to_one(logit):
    p = densities.LogitContinuousBernoulli(torch.tensor(logit, dtype=torch.float64))
    density = lambda x: p.log_prob(torch.tensor(x, dtype=torch.float64)).exp().item()  # noqa: E731
    peak = [1 / 700, 1 - 1 / 700, 1 / 30, 1 - 1 / 30]
    total, _ = integrate.quad(density, 0, 1, points=peak, epsabs=1e-12)
    assert total == pytest.approx(1, abs=1e-9)


def test_draws_of_the_continuous_bernoulli_follow_its_distribution():
    logits = torch.tensor([-50.0, -2.0, 0.0, 1e-6, 3.0, 300.0]).double()
    torch.manual_seed(0)
    x = densities.LogitContinuousBernoulli(logits).rsample((4000,)).numpy()
    for column, logit in zip(x.T, logits.numpy(), strict=True):
        a = -abs(logit)
        cdf = (lambda v: v) if abs(a) < 1e-3 else (lambda v, a=a: np.expm1(a * v) / np.expm1(a))
        other = column if logit <= 0 else 1 - column
        assert stats.kstest(other, cdf).pvalue > oracles.FAILURE_RATE / len(logits)
    single = densities.LogitContinuousBernoulli(torch.tensor([-90.0, 0.0, 90.0]))
    drawn = single.rsample((1000,))
    assert drawn.isfinite().all() and drawn.min() >= 0 and drawn.max() <= 1


def test_soft_targets_define_no_density():
    """The integral of p^x (1 - p)^(1 - x) is (2p - 1) / logit(p): 0.47 at p = 0.3."""
    logits = torch.tensor([special.logit(0.3)]).double()
    soft, binary = Bernoulli(soft_targets=True)(logits[None]), Bernoulli()(logits[None])
    at = lambda x: soft.log_prob(torch.tensor([[x]], dtype=torch.float64)).exp().item()  # noqa: E731
    assert integrate.quad(at, 0, 1)[0] == pytest.approx(0.4 / 0.8472978603872034, abs=1e-10)
    ends = torch.tensor([[0.0], [1.0]]).double()
    assert binary.log_prob(ends).exp().sum() == pytest.approx(1)
    torch.testing.assert_close(soft.log_prob(ends), binary.log_prob(ends))


GRIDS = {
    "bernoulli": range(2),
    "categorical": range(C),
    "poisson": range(200),
}


@pytest.mark.parametrize("name", [n for n in DENSITIES if n != "multinomial"])
def test_every_univariate_density_integrates_to_one_and_has_its_moments(name):
    likelihood = likelihood_of(name, data_dim=1)
    outputs = draw(5, 1 * likelihood.outputs_per_dim)
    p = likelihood(outputs)
    assert (p.batch_shape, p.event_shape) == ((5,), (1,))
    for row in range(5):
        one = likelihood(outputs[row : row + 1])

        def density(x, one=one):
            return one.log_prob(torch.tensor([[x]], dtype=torch.float64)).exp().item()

        for power, expected in (
            (0, 1.0),
            (1, p.mean[row]),
            (2, p.variance[row] + p.mean[row] ** 2),
        ):
            if name in GRIDS:
                total = sum(density(x) * x**power for x in GRIDS[name])
            else:
                ends = (0, 1) if name == "continuous" else (-60, 60)
                f = lambda x, n=power: density(x) * x**n  # noqa: E731
                total = integrate.quad(f, *ends, points=(0, 0.5), limit=400)[0]
            assert total == pytest.approx(float(expected), abs=1e-7)


def test_the_multinomial_sums_to_one_for_each_total_and_equals_scipys():
    logits = draw(2, 3)
    p = Multinomial()(logits)
    for total in range(5):
        rows = [r for r in itertools.product(range(total + 1), repeat=3) if sum(r) == total]
        x = torch.tensor(rows).double()
        values = Multinomial()(logits[:, None], None).log_prob(x)
        assert values.exp().sum(-1) == pytest.approx(np.ones(2))
        for row, shares in enumerate(special.softmax(logits.numpy(), -1)):
            expected = stats.multinomial(total, shares).logpmf(rows)
            np.testing.assert_allclose(values[row], expected, atol=1e-12)
    x = counts(2, 3)
    assert x[0].sum() != x[1].sum()
    given = Multinomial()(draw(7, 2, 3), x)
    assert (given.batch_shape, given.event_shape) == ((7, 2), (3,))
    torch.testing.assert_close(given.mean.sum(-1), x.sum(-1).expand(7, 2))
    with pytest.raises(ValueError, match=r"only given a total.*Multinomial\(total_count=n\)"):
        p.sample()


def test_draws_of_the_multinomial_have_its_totals_and_moments():
    totals = torch.tensor([0.0, 1.0, 40.0]).double()
    logits = torch.tensor([1.0, -40.0, 0.0, 2.0]).double().expand(3, 4)
    p = densities.ConditionalMultinomial(logits, totals)
    torch.manual_seed(0)
    x = p.sample((20_000,))
    assert torch.equal(x.sum(-1), totals.expand(20_000, 3))
    assert (x >= 0).all() and (x == x.floor()).all() and not x[..., 1].any()
    variance = p.variance[2, [0, 2, 3]]
    z = (x[:, 2, [0, 2, 3]].mean(0) - p.mean[2, [0, 2, 3]]) / (variance / len(x)).sqrt()
    assert z.abs().max() < oracles.z_limit(3)
    covariance = (x[:, 2, 0] * x[:, 2, 3]).mean() - x[:, 2, 0].mean() * x[:, 2, 3].mean()
    expected = -40 * p.probs[2, 0] * p.probs[2, 3]
    error = 40 * float((p.probs[2, 0] * p.probs[2, 3]).sqrt()) / len(x) ** 0.5
    assert abs(covariance - expected) < oracles.z_limit() * error


def test_densities_equal_scipys():
    x, outputs = MAKERS["poisson"][1](N, D), draw(N, D)
    expected = stats.poisson(outputs.exp()).logpmf(x).sum(-1)
    np.testing.assert_allclose(Poisson()(outputs).log_prob(x), expected, rtol=1e-12)
    deep = Poisson()(torch.full((1, 1), -800.0).double()).log_prob(torch.tensor([[2.0]]).double())
    assert deep == pytest.approx(-1600 - np.log(2))
    x, outputs = MAKERS["categorical"][1](N, D), draw(N, D * C)
    logits = outputs.reshape(N, D, C).numpy()
    each = np.take_along_axis(
        special.log_softmax(logits, -1), x.numpy()[..., None].astype(int), -1
    )
    np.testing.assert_allclose(Categorical(C)(outputs).log_prob(x), each.sum((1, 2)), rtol=1e-12)
    x, outputs = draw(N, D), draw(N, 2 * D, seed=1)
    loc, raw = outputs.reshape(N, D, 2).numpy().transpose(2, 0, 1)
    network = Gaussian("network", initial=0.5, floor=0.01)
    scale = 0.01 + 0.5 * np.exp(raw)
    expected = stats.norm(loc, scale).logpdf(x).sum(-1)
    np.testing.assert_allclose(network(outputs).log_prob(x), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [0.1, 0.5, 3.0])
def test_the_gaussian_is_the_normal_density(scale):
    outputs, x = draw(4, D), draw(4, D, seed=1)
    expected = stats.norm(outputs, scale).logpdf(x).sum(-1)
    np.testing.assert_allclose(Gaussian(scale)(outputs).log_prob(x), expected, rtol=1e-12)


def test_the_bernoulli_is_its_probability_function():
    logits = torch.tensor([-800.0, -3.0, 0.0, 2.0, 800.0]).double()
    for soft in (False, True):
        p = Bernoulli(soft)(logits[:, None])
        for x in (0.0, 1.0, *([0.3] if soft else [])):
            expected = x * logits.numpy() - np.logaddexp(0, logits.numpy())
            value = p.log_prob(torch.full((5, 1), x, dtype=torch.float64))
            np.testing.assert_allclose(value, expected, rtol=1e-12)
        np.testing.assert_allclose(p.mean[:, 0], special.expit(logits.numpy()), rtol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_equal_finite_differences(name):
    likelihood, x = likelihood_of(name), MAKERS[name][1](3, D)
    if name == "optimal":
        likelihood.unfreeze()
        likelihood.train()
    outputs = draw(3, D * likelihood.outputs_per_dim, seed=2).requires_grad_()
    likelihood.requires_grad_()
    names = [name for name, _ in likelihood.named_parameters()]

    def value(outputs, *parameters):
        given = dict(zip(names, parameters, strict=True))
        with pyro.get_param_store().scope():
            return torch.func.functional_call(likelihood, given, (outputs, x)).log_prob(x)

    parameters = [p.detach().clone().requires_grad_() for p in likelihood.parameters()]
    assert torch.autograd.gradcheck(value, (outputs, *parameters))


@pytest.mark.parametrize("name", UNIVARIATE)
def test_only_observed_entries_are_scored(name):
    likelihood, x = likelihood_of(name), MAKERS[name][1](N, D)
    outputs = draw(5, N, D * likelihood.outputs_per_dim)
    mask = uniform(N, D, seed=3) < 0.6
    value = likelihood(outputs, x, mask).log_prob(torch.where(mask, x, 0.0))
    assert value.shape == (5, N)
    whole = likelihood(outputs, x).base_dist.log_prob(x)
    torch.testing.assert_close(value, torch.where(mask, whole, 0.0).sum(-1))


@pytest.mark.parametrize("name", MAKERS)
def test_draws_have_the_mean_of_the_density(name):
    likelihood = likelihood_of(name)
    p = likelihood(draw(1, D * likelihood.outputs_per_dim))
    torch.manual_seed(0)
    x = p.sample((20_000,))
    assert x.dtype == torch.float64
    likelihood.check(x[:, 0])
    z = (x.mean(0) - p.mean) / (p.variance / len(x)).sqrt()
    assert z.abs().max() < oracles.z_limit(D * len(MAKERS))
    wider = p.expand((3, 1))
    assert (wider.sample().shape, wider.mean.shape) == ((3, 1, D), (3, 1, D))
    torch.testing.assert_close(wider.log_prob(x[0]), p.log_prob(x[0]).expand(3, 1))


@pytest.mark.parametrize("name", ["continuous", "soft", "poisson", "multinomial", "categorical"])
def test_pyros_validation_detects_values_outside_the_support(name):
    p = likelihood_of(name)(torch.zeros(1, D * likelihood_of(name).outputs_per_dim).double())
    wrong = torch.tensor([[0.0, 1.5, 0.0, 0.0]]).double()
    with pytest.raises(ValueError, match="support"):
        p.log_prob(wrong)


# Scales


def test_learned_scales_are_parameters_and_fixed_ones_are_not():
    assert list(Gaussian(0.5).parameters()) == []
    for kind, shape in (("shared", ()), ("per-dim", (D,))):
        likelihood = Gaussian(kind, initial=0.7)
        likelihood.set_data_dim(D)
        assert len(list(likelihood.parameters())) == 1
        torch.testing.assert_close(likelihood.scale, torch.full(shape, 0.7))
    assert list(Gaussian("network").parameters()) == list(OptimalGaussian().parameters()) == []
    assert Gaussian("network").outputs_per_dim == 2


def test_scales_per_dimension_need_the_data_dimension():
    likelihood = Gaussian("per-dim")
    with pytest.raises(ValueError, match=r"needs the number of columns.*set_data_dim\(data_dim"):
        likelihood(torch.zeros(2, D))
    likelihood.set_data_dim(D)
    likelihood.set_data_dim(D)
    with pytest.raises(ValueError, match=f"already has {D} columns, not {D + 1}"):
        likelihood.set_data_dim(D + 1)


@pytest.mark.parametrize("kind", ["shared", "per-dim"])
def test_learned_scales_stay_above_their_floor_and_notes_report_it(kind):
    likelihood = Gaussian(kind, floor=0.01)
    likelihood.set_data_dim(3)
    assert likelihood.notes() == []
    with torch.no_grad():
        likelihood.scale_unconstrained.view(-1)[:1].fill_(-50)
    assert likelihood.scale.min().item() == pytest.approx(0.01, rel=1e-6)
    assert likelihood(torch.zeros(1, 3)).variance.detach().sqrt().min() == pytest.approx(
        0.01, rel=1e-6
    )
    subject = "the noise scale" + ("" if kind == "shared" else " of 1 of 3 columns")
    assert likelihood.notes() == [
        f"{subject} has reached its floor, 0.01: lower floor= or check x"
    ]
    assert Gaussian(0.005).notes() == Gaussian("per-dim").notes() == []


def test_scales_of_a_network_at_their_floor_are_counted_after_a_fit(tmp_path):
    vae, x = vae_of("network", hidden=()), MAKERS["network"][1](N, D)
    with torch.no_grad():
        vae.decoder[0].weight.zero_()
        vae.decoder[0].bias.zero_()
        vae.decoder[0].bias[1] = -100  # the scale of the first column
    set_data_statistics(Pair(vae.model, vae.guide), Batch(x, None))
    expected = ["the noise scale of 0.25 of all entries has reached its floor, 0.0001: lower "
                "floor= or check x"]  # fmt: skip
    assert vae.notes() == load(save(vae, tmp_path)).notes() == expected
    mask = torch.ones(N, D, dtype=torch.bool)
    mask[: N // 2, 0] = False
    set_data_statistics(Pair(vae.model, vae.guide), Batch(x, mask))
    assert "of 0.14 of all" in vae.notes()[0]
    fit = fit_svi(vae.model, vae.guide, x, steps=1, lr=1e-9)
    assert fit.notes == tuple(expected)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"scale": 0.0}, "scale must be positive, or one of 'shared', 'per-dim'.*; got 0"),
        ({"scale": -1.0}, "scale must be positive, or one of .*; got -1"),
        ({"scale": float("nan")}, "scale must be positive, or one of .*; got nan"),
        ({"scale": "learned"}, "scale must be one of 'shared', .*'network'; got 'learned'"),
        ({"scale": "optimal"}, r"has a class of its own: use OptimalGaussian\(\)"),
        ({"initial": 1e-5}, "need 0 <= floor < initial; got floor=0.0001, initial=1e-05"),
        ({"floor": -1.0}, "need 0 <= floor < initial"),
    ],
)
def test_an_invalid_scale_raises(arguments, match):
    with pytest.raises(ValueError, match=match):
        Gaussian(**arguments)


def test_a_negative_floor_of_an_optimal_scale_raises():
    with pytest.raises(ValueError, match="floor must not be negative; got -1"):
        OptimalGaussian(floor=-1.0)


@pytest.mark.parametrize("name", ["fixed", "per-dim", "network"])
def test_rescaling_a_column_changes_log_p_by_the_logarithm(name):
    """Column 1 and its part of the model are multiplied by 10: log p - log 10."""
    vae, x, _ = fitted(name)
    other = copy.deepcopy(vae)
    factor = torch.ones(D).double()
    factor[1] = 10.0
    with torch.no_grad():
        other.guide.encoder[0].weight /= factor
        last = other.decoder[-1]
        outputs = vae.likelihood.outputs_per_dim
        last.weight.view(D, outputs, -1)[:, 0] *= factor[:, None]
        last.bias.view(D, outputs)[:, 0] *= factor
        if name == "per-dim":
            scale = vae.likelihood.scale * factor
            other.likelihood.scale_unconstrained.copy_((scale - vae.likelihood.floor).log())
    if name == "fixed":  # one sigma for all columns, so all are rescaled
        other, factor = copy.deepcopy(vae), torch.full((D,), 10.0).double()
        with torch.no_grad():
            other.guide.encoder[0].weight /= factor
            other.decoder[-1].weight *= 10
            other.decoder[-1].bias *= 10
            other.likelihood.scale *= 10
    if name == "network":
        # soft_clamp does not commute with a factor, so the scale itself is multiplied.
        other.likelihood = Scaled(other.likelihood, factor)
    before = log_weights(vae.model, vae.guide, x, 4, seed=0)
    after = log_weights(other.model, other.guide, x * factor, 4, seed=0)
    assert (after - before + factor.log().sum()).abs().max() < 1e-10


class Scaled(Gaussian):
    """Scales of a network, multiplied by a factor."""

    def __init__(self, likelihood, factor):
        super().__init__(**constructor_call(likelihood).arguments)
        self.factor = factor

    def density(self, outputs, x, mask, observe):
        entries = super().density(outputs, None, None, observe).base_dist
        return dist.Normal(entries.loc, entries.scale * self.factor).to_event(1)


# The optimal scale


def test_the_optimal_scale_maximises_the_density_of_the_batch():
    likelihood, x = OptimalGaussian().double(), draw(N, D)
    outputs = 0.3 * draw(5, N, D, seed=1)
    p = likelihood(outputs, x)
    sigma = float((x - outputs).square().mean().sqrt())
    best = p.log_prob(x).mean()
    assert best == pytest.approx(stats.norm(outputs, sigma).logpdf(x).sum(-1).mean(), abs=1e-12)
    for other in (0.99 * sigma, 1.01 * sigma):
        assert Gaussian(other)(outputs).log_prob(x).mean() < best
    mask = uniform(N, D, seed=3) < 0.6
    held = likelihood(outputs, torch.where(mask, x, 1e6), mask).base_dist.base_dist
    expected = (x - outputs).square()[mask.expand(5, N, D)].mean().sqrt()
    torch.testing.assert_close(held.scale.unique(), expected[None])
    zero = OptimalGaussian(floor=0.01)(torch.zeros(3, D), torch.zeros(3, D))
    torch.testing.assert_close(zero.base_dist.scale.unique(), torch.tensor([0.01]))


def test_the_optimal_scale_equals_the_closed_form_of_ppca():
    """The first two moments of the draws are exactly those of the posterior."""
    x = oracles.simulate_ppca((9.0, 4.0), 0.3, 60, 6, seed=0)
    loadings, loc, noise = oracles.closed_form_ppca(x, 2)
    posterior = oracles.posterior(x, loc, loadings, noise)
    mean, covariance = posterior[0], posterior[1]
    covariance = np.broadcast_to(covariance, (len(x), 2, 2))
    roots = np.linalg.cholesky(covariance) * np.sqrt(2)
    z = np.stack([mean + sign * roots[:, :, k] for k in range(2) for sign in (-1, 1)])
    outputs = torch.from_numpy(z @ loadings.T + loc)
    likelihood, data = OptimalGaussian().double(), torch.from_numpy(x)
    scale = likelihood(outputs, data).base_dist.scale.unique()
    assert float(scale**2) == pytest.approx(noise, abs=1e-10)
    with likelihood.collect_statistics():
        for draws in outputs.split(1):
            for rows in torch.arange(60).split(17):
                likelihood(draws[:, rows], data[rows])
    assert float(likelihood.scale**2) == pytest.approx(noise, abs=1e-10)
    assert Gaussian(float(noise**0.5))(outputs).log_prob(data).mean() == pytest.approx(
        float(likelihood.eval()(outputs).log_prob(data).mean()), abs=1e-9
    )


def test_a_linear_vae_with_an_optimal_scale_converges_to_the_closed_form():
    x = oracles.simulate_ppca((9.0, 4.0), 0.3, 100, 6, seed=0)
    noise = oracles.closed_form_ppca(x, 2)[2]
    likelihood = OptimalGaussian()
    vae = VAE.mlp(6, 2, hidden=(), likelihood=likelihood, covariance="full", seed=0).double()
    vae.center(x)
    fit_svi(
        vae.model, vae.guide, x, steps=400, lr=0.05, seed=0, capture=False,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
    )  # fmt: skip
    assert float(vae.likelihood.scale**2) == pytest.approx(noise, rel=0.02)
    exact = oracles.closed_form_log_likelihood(oracles.sample_spectrum(x)[0], 2)
    bound = elbo(vae.model, vae.guide, x, num_samples=50, seed=0).mean()
    assert exact - 0.05 < bound < exact + 0.02


def with_missing_values(x):
    """x with NaN in some entries, none in the first column."""
    incomplete = torch.where(uniform(*x.shape, seed=3) < 0.8, x, torch.nan)
    incomplete[:, 0] = x[:, 0]
    return incomplete


EVALUATIONS = {
    "elbo": lambda vae, x: elbo(vae.model, vae.guide, x),
    "elbo, draws": lambda vae, x: elbo(vae.model, vae.guide, x, num_samples=3),
    "log p": lambda vae, x: log_likelihood(vae.model, vae.guide, x, 10),
    "annealed": lambda vae, x: log_likelihood(
        vae.model,
        None,
        x,
        2,
        method="annealed",
        annealing=Annealing(num_temperatures=2, leapfrog=2),
    ),
    "gaps": lambda vae, x: gaps(vae.model, vae.guide, x, steps=2, num_samples=10, tolerance=None),
    "impute": lambda vae, x: impute(vae.model, vae.guide, with_missing_values(x), 10),
    "mean": lambda vae, x: mean_data(vae.model, {"z": torch.zeros(N, K)}, x),
    "draws": lambda vae, x: draw_data(vae.model, x),
    "sample": lambda vae, x: vae.sample(2),
    "reconstruct": lambda vae, x: vae.reconstruct(x),
    "decode": lambda vae, x: vae.decode(torch.zeros(1, K)),
    "Predictive": lambda vae, x: Predictive(vae.model, num_samples=2)(x, observe=False),
    "eval": lambda vae, x: vae.eval().model(x),
}


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluation_with_an_unfrozen_scale_raises(evaluate, tmp_path):
    vae, x = vae_of("optimal"), MAKERS["optimal"][1](N, D)
    for one in (vae, load(save(vae, tmp_path))):
        assert log_weights(one.model, one.guide, x, 3).isfinite().all()  # as in training
        with pytest.raises(ValueError, match=r"optimal scale is not frozen.*call freeze_scale"):
            evaluate(one, x)
        one.train()
        freeze_scale(one.model, one.guide, x)
        evaluate(one, x)


def test_a_frozen_scale_is_the_root_mean_squared_residual_and_is_kept(tmp_path):
    vae, x = vae_of("optimal"), MAKERS["optimal"][1](N, D)
    freeze_scale(vae.model, vae.guide, x, num_samples=400, seed=1)
    q = vae.guide.distribution(x)
    torch.manual_seed(0)
    with torch.no_grad():
        squares = (x - vae.decoder(q.sample((400,)).reshape(-1, K)).reshape(400, N, D)).square()
    by_draw = squares.mean((1, 2))
    error = by_draw.std() * (2 / 400) ** 0.5
    assert abs(vae.likelihood.scale**2 - by_draw.mean()) < oracles.z_limit() * error
    scale = float(vae.likelihood.scale)
    fixed = copy.deepcopy(vae)
    fixed.likelihood = Gaussian(scale)
    held = load(save(vae, tmp_path))
    for one in (vae, held, copy.deepcopy(vae)):
        for training in (True, False):
            one.train(training)
            ours, theirs = (log_weights(v.model, v.guide, x, 3, seed=0) for v in (one, fixed))
            torch.testing.assert_close(ours, theirs)
    SVI(held.model, held.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    assert float(held.likelihood.scale) == scale
    assert f"the noise scale is frozen at {scale:.4g}" in held.notes()[0]
    freeze_scale(vae.model, vae.guide, x, num_samples=400, seed=1)
    assert float(vae.likelihood.scale) == scale


def test_svi_of_pyro_with_the_optimal_scale_and_freeze_scale():
    vae, x = vae_of("optimal"), 3 * MAKERS["optimal"][1](N, D)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    assert vae.likelihood.scale.isnan()
    freeze_scale(vae.model, vae.guide, x)
    assert 2 < vae.likelihood.scale < 4
    assert log_likelihood(vae.model, vae.guide, x, 50).value.isfinite().all()


@pytest.mark.slow
def test_captured_steps_use_a_scale_that_was_frozen_meanwhile():
    found = []
    for kind in (SVI, partial(CapturedSVI, compiled=False)):
        vae, x = vae_of("optimal"), MAKERS["optimal"][1](N, D)
        svi = kind(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        torch.manual_seed(0)
        losses = [svi.step(x) for _ in range(4)]
        freeze_scale(vae.model, vae.guide, 10 * x)
        losses += [svi.step(x) for _ in range(2)]
        found.append(losses)
        assert kind is SVI or svi.execution == "recorded"
    np.testing.assert_allclose(*found, rtol=1e-10)
    assert found[0][4] > found[0][3] + N * D


def test_fits_unfreeze_validate_and_freeze_the_scale():
    vae, x, first = fitted("optimal", steps=50, x_val=draw(10, D, seed=5))
    scale = vae.likelihood.scale.clone()
    assert scale.isfinite()
    assert first.validation.isfinite().all()
    assert "the noise scale is frozen at" in repr(first)
    small = fit_svi(vae.model, vae.guide, 0.1 * x, steps=30, lr=1e-2, objective=IWAE(3), seed=0)
    assert vae.likelihood.scale < 0.2 * scale
    assert small.notes == tuple(vae.notes())
    # The training objective uses the scale of each batch; with the old scale it would be far
    # lower.
    assert small.objective[-1] > first.objective[-1] + 0.5 * D * np.log(10)


def test_a_finished_fit_with_an_optimal_scale_resumes_to_the_same_result(tmp_path):
    x, x_val = MAKERS["optimal"][1](N, D), draw(10, D, seed=5)

    def scale(steps, checkpoint):
        vae = vae_of("optimal")
        fit = fit_svi(
            vae.model,
            vae.guide,
            x,
            steps=steps,
            batch_size=8,
            lr=1e-2,
            seed=0,
            x_val=x_val,
            checkpoint=checkpoint,
        )
        return float(vae.likelihood.scale), fit.objective.tolist()

    first = scale(54, tmp_path / "a")
    again = scale(54, tmp_path / "a")  # only freezes the scale
    assert again == first


def test_freezing_a_scale_that_is_not_optimal_raises():
    vae, x = vae_of("shared"), MAKERS["shared"][1](N, D)
    with pytest.raises(ValueError, match="has no OptimalGaussian"):
        freeze_scale(vae.model, vae.guide, x)
    with pytest.raises(ValueError, match="num_samples must be a whole number >= 1; got 0"):
        freeze_scale(vae_of("optimal").model, vae.guide, x, num_samples=0)


def test_the_optimal_scale_in_a_user_written_pair():
    likelihood, decoder, encoder = OptimalGaussian(), nn.Linear(K, D), nn.Linear(D, K)

    def model(x, **_):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.sample("x", likelihood(decoder(z), x), obs=x)

    def guide(x, **_):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.1).to_event(1))

    x = draw(N, D).float()
    fit = fit_svi(model, guide, x, steps=20, lr=1e-2, seed=0)
    assert likelihood.scale.isfinite()
    assert "the noise scale is frozen" in fit.notes[0]
    assert log_likelihood(model, guide, x, 50, seed=0).value.isfinite().all()


# Fits and evaluation with every likelihood


@pytest.mark.parametrize("name", combinations.one_in(2, MAKERS))
def test_fitting_evaluating_saving_and_sampling(name, tmp_path):
    vae, x, fit = fitted(name, x_val=MAKERS[name][1](7, D))
    assert fit.steps == 5 and fit.objective.isfinite().all()
    found = log_likelihood(vae.model, vae.guide, x, 20, refine=2, seed=0)
    assert found.value.isfinite().all()
    loaded = load(save(vae, tmp_path))
    assert repr(loaded.likelihood) == repr(vae.likelihood)
    again = log_likelihood(loaded.model, loaded.guide, x, 20, refine=2, seed=0)
    assert torch.equal(again.value, found.value) and again.notes == found.notes
    assert vae.sample(3, seed=0).shape == (3, D)
    vae.check_data(vae.sample(3, seed=0))
    assert vae.reconstruct(x).shape == (N, D)
    prior = Predictive(vae.model, num_samples=2)(num_data=3)["x"]
    posterior = Predictive(vae.model, guide=vae.guide, num_samples=2)(x, observe=False)["x"]
    assert (prior.shape, posterior.shape) == ((2, 3, D), (2, N, D))
    assert not torch.equal(posterior[0], x)
    vae.check_data(posterior.flatten(0, 1))
    drawn = draw_data(vae.model, x, seed=0)
    assert drawn.shape == x.shape and drawn.dtype == x.dtype
    assert elbo(vae.model, vae.guide, x, num_samples=2).shape == (N,)


@pytest.mark.parametrize("name", UNIVARIATE)
def test_missing_values_are_imputed_if_entries_are_independent(name):
    x = MAKERS[name][1](N, D)
    incomplete = with_missing_values(x)
    vae = vae_of(name, missing="zeros+mask").center(incomplete)
    fit_svi(vae.model, vae.guide, incomplete, steps=5, lr=1e-2, seed=0)
    filled = impute(vae.model, vae.guide, incomplete, 200, draws=2, seed=0)
    missing = incomplete.isnan()
    assert torch.equal(filled.mean[~missing], x[~missing])
    assert filled.mean.isfinite().all() and (filled.sd[missing] > 0).all()
    vae.check_data(filled.draws.flatten(0, 1))


def test_missing_values_with_a_multinomial_raise():
    vae, x = vae_of("multinomial"), MAKERS["multinomial"][1](N, D)
    incomplete = x.clone()
    incomplete[3, 1] = torch.nan
    match = r"x has 1 missing entries, but a Multinomial scores complete rows.*Poisson\(\)"
    for evaluate in (
        lambda: impute(vae.model, vae.guide, incomplete, 10),
        lambda: fit_svi(vae.model, vae.guide, incomplete, steps=1),
        lambda: log_likelihood(vae.model, vae.guide, incomplete, 10),
        lambda: vae.center(incomplete),
        lambda: vae.model(x, mask=~incomplete.isnan()),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate()
    assert torch.equal(vae.model(x, mask=torch.ones(N, D, dtype=torch.bool)), x)


def test_draws_of_count_rows_have_the_totals_of_the_data():
    vae, x = vae_of("multinomial"), MAKERS["multinomial"][1](N, D)
    assert len(x.sum(1).unique()) > 3
    posterior = Predictive(vae.model, guide=vae.guide, num_samples=5)(x, observe=False)["x"]
    assert torch.equal(posterior.sum(-1), x.sum(1).expand(5, N))
    torch.testing.assert_close(vae.reconstruct(x).sum(1), x.sum(1))
    assert torch.equal(draw_data(vae.model, x, seed=0).sum(1), x.sum(1))
    assert torch.equal(vae.sample(6, seed=0).sum(1), torch.full((6,), 5.0).double())
    vae = VAE.mlp(D, K, likelihood=Multinomial(), seed=0)
    for evaluate in (lambda: vae.sample(2), lambda: vae.model(num_data=2)):
        with pytest.raises(ValueError, match=r"pass x, whose rows have totals, or.*total_count=n"):
            evaluate()


CAPTURED = [
    name if name == "optimal" else pytest.param(name, marks=pytest.mark.slow)
    for name in MAKERS
    if name != "fixed"
]


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_steps_equal_eager_steps(name):
    def make():
        vae = vae_of(name)
        return vae.model, vae.guide

    x = MAKERS[name][1](N, D)
    objective = ELBO(2) if name in ("optimal", "multinomial") else ELBO()
    assert_equal(both_fits(make, x, steps=2, size=8, objective=objective))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimal", "multinomial"])
def test_a_captured_fit_equals_an_eager_fit(name):
    found = []
    for capture in (False, True):
        vae, _, fit = fitted(name, steps=60, capture=capture, x_val=MAKERS[name][1](7, D))
        found.append(fit.objective)
        assert fit.execution.startswith("compiled" if capture else "eager")
        assert not any(buffer.isnan().any() for buffer in vae.buffers())
    error = torch.stack([values[-30:].std() for values in found]).norm() / 30**0.5
    assert abs(found[0][-30:].mean() - found[1][-30:].mean()) < oracles.z_limit() * error


def test_results_note_that_soft_targets_give_a_cross_entropy(tmp_path):
    vae, x, fit = fitted("soft")
    note = "a bound on a negative cross-entropy, not a log density"
    found = log_likelihood(vae.model, vae.guide, x, 50, seed=0)
    split = gaps(vae.model, vae.guide, x, steps=2, num_samples=50, tolerance=None, seed=0)
    ranked = compare({"soft": found, "other": found.value - 1})
    for shown in (fit, found, split, ranked, load(save(vae, tmp_path)).notes()):
        assert note in repr(shown)
    assert ranked.notes[0].startswith("soft: Bernoulli(soft_targets=True): ")
    assert len(ranked.notes) == 1
    assert note in found.to_dict()["notes"][0]
    binary, y, plain = fitted("bernoulli")
    assert note not in repr(plain) + repr(log_likelihood(binary.model, binary.guide, y, 50))


@pytest.mark.parametrize("name", ["network", "categorical"])
def test_a_decoder_of_the_wrong_width_raises(name):
    likelihood = MAKERS[name][0]()
    vae = VAE(
        decoder=mlp(K, D), encoder=mlp(D, 2 * K), likelihood=likelihood, data_dim=D, latent_dim=K
    )
    width = D * likelihood.outputs_per_dim
    with pytest.raises(ValueError, match=rf"the decoder must return \(rows, {width}\)"):
        elbo(vae.model, vae.guide, MAKERS[name][1](N, D).float())


@pytest.mark.parametrize("name", MAKERS)
def test_a_likelihood_is_reconstructed_from_its_constructor_call(name):
    likelihood = MAKERS[name][0]()
    call = constructor_call(likelihood)
    again = LIKELIHOODS[call.name](**call.arguments)
    assert constructor_call(again) == call and repr(again) == repr(likelihood)
    assert again.outputs_per_dim == likelihood.outputs_per_dim


# Supports


OUTSIDE = {
    "grey": (
        Bernoulli(),
        [[0.0, 0.94, 1.0], [0.5, 0.0, 1.0]],
        r"x has 2 entries outside \{0, 1\} \(min 0.00, max 1.00\).*ContinuousBernoulli\(\).*"
        r"binarize.*soft_targets=True",
    ),
    "soft": (
        Bernoulli(soft_targets=True),
        [[0.0, 255.0, 0.5]],
        r"x has 1 entries outside \[0, 1\] .*x / 255",
    ),
    "continuous": (
        ContinuousBernoulli(),
        [[-0.5, 1.5, 0.5]],
        r"x has 2 entries outside \[0, 1\] \(min -0.50, max 1.50\)",
    ),
    "categorical": (
        Categorical(3),
        [[0.0, 3.0, 1.5, -1.0]],
        r"x has 3 entries outside the categories 0, 1, ..., 2 .*more categories, Poisson\(\)",
    ),
    "poisson": (Poisson(), [[0.5, 3.0, -1.0]], "x has 2 entries outside the counts 0, 1, 2,"),
    "multinomial": (Multinomial(), [[0.5, 3.0]], "x has 1 entries outside the counts 0, 1, 2,"),
}


@pytest.mark.parametrize(("likelihood", "rows", "match"), OUTSIDE.values(), ids=OUTSIDE)
def test_entries_outside_the_support_raise(likelihood, rows, match):
    x = torch.tensor(rows)
    with pytest.raises(ValueError, match=match):
        likelihood.check(x)
    inside = (x >= 0) & (x <= 1) & (x == x.floor())
    likelihood.check(torch.where(inside, x, 0.0))
    if not isinstance(likelihood, Multinomial):
        likelihood.check(x, inside)
    Gaussian().check(x)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Categorical(1), "num_categories must be a whole number >= 2; got 1"),
        (lambda: Multinomial(0), "total_count must be a whole number >= 1; got 0"),
    ],
)
def test_invalid_sizes_raise(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# Initial outputs of the decoder


@pytest.mark.parametrize("name", UNIVARIATE)
def test_a_centred_decoder_predicts_the_means_of_the_columns(name):
    x = MAKERS[name][1](N, D)
    incomplete = with_missing_values(x)
    for data in (x, incomplete):
        vae = vae_of(name)
        assert vae.center(data.numpy()) is vae
        with torch.no_grad():
            vae.decoder[-1].weight.zero_()
        if name == "optimal":
            freeze_scale(vae.model, vae.guide, x)
        mean = vae.decode(torch.zeros(1, K).double()).mean[0]
        torch.testing.assert_close(mean, data.nanmean(0))
    mask = ~incomplete.isnan()
    other = vae_of(name).center(torch.where(mask, x, 1e6), mask=mask)
    assert torch.equal(other.decoder[-1].bias, vae.decoder[-1].bias)


def test_a_centred_decoder_of_counts_predicts_the_shares_of_the_columns():
    x = MAKERS["multinomial"][1](N, D)
    vae = vae_of("multinomial").center(x)
    with torch.no_grad():
        vae.decoder[-1].weight.zero_()
    shares = vae.decode(torch.zeros(1, K).double()).probs[0]
    torch.testing.assert_close(shares, x.sum(0) / x.sum())


@pytest.mark.parametrize("name", ["bernoulli", "soft", "continuous", "poisson", "categorical"])
def test_means_on_the_boundary_are_moved_by_half_an_entry(name):
    likelihood = likelihood_of(name, data_dim=2)
    x = torch.tensor([[0.0, 1.0]]).double().expand(10, 2)
    half_weight = torch.full((likelihood.features(x).shape[1],), 1 / 20).double()
    outputs = likelihood.initial_outputs(likelihood.features(x).mean(0), half_weight)
    mean = likelihood(outputs[None]).mean[0]
    top = 1.0 if name in ("poisson", "categorical") else 0.95
    expected = torch.tensor([0.05, top]).double()
    if name == "categorical":  # half an entry for each category that does not occur
        expected = torch.tensor([0.05 + 0.1, 1 + 0.1]).double() / 1.1
    torch.testing.assert_close(mean, expected)


def test_a_column_without_counts_has_half_a_count():
    means, half_weight = torch.tensor([0.0, 1.0]).double(), torch.full((2,), 1 / 20).double()
    outputs = Multinomial().initial_outputs(means, half_weight)
    assert outputs[0] == pytest.approx(np.log(0.05))


def test_centring_errors():
    x = MAKERS["shared"][1](N, D)
    conv = nn.Sequential(nn.Linear(K, D), nn.Unflatten(1, (D, 1)), nn.Flatten())
    parts = {"encoder": mlp(D, 2 * K), "data_dim": D, "latent_dim": K, "likelihood": Gaussian()}
    with pytest.raises(TypeError, match=rf"must end in a layer with a bias.*{D} outputs.*Flatten"):
        VAE(decoder=conv, **parts).center(x)
    parts |= {"likelihood": Gaussian(), "encoder": mlp(D, 2 * K)}
    with pytest.raises(TypeError, match="must end in a layer with a bias"):
        VAE(decoder=nn.Linear(K, D, bias=False), **parts).center(x)
    empty = x.clone()
    empty[:, 2] = torch.nan
    with pytest.raises(ValueError, match=r"x has columns with nothing observed: \[2\]; drop them"):
        vae_of("shared").center(empty)
    with pytest.raises(ValueError, match=r"x has \d+ entries outside \{0, 1\}"):
        vae_of("bernoulli").center(x)
