"""The family that a guide's q is of, read off the guide, and the gaps within it or in total."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as T

import oracles
import user_pairs
from draws import generator
from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.evaluation.inference_gaps import estimator
from ppl_vae.evaluation.inference_gaps.family import family_of
from ppl_vae.evaluation.inference_gaps.gaps import gaps
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, PerDatumGuide
from ppl_vae.models.ppca import PPCA
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.objectives.bounds import log_weights

N, D, K = 8, 6, 3
SHIFT = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


class Conjugate:
    """A linear Gaussian model with its exact posterior N(m_n, C), by numpy."""

    def __init__(self, loadings=None, seed=0):
        rng = np.random.default_rng(seed)
        loc, noise = 3 * rng.normal(size=D), 0.6
        loadings = rng.normal(size=(D, K)) if loadings is None else loadings
        scale = torch.tensor(noise**0.5, dtype=torch.float64)
        self.ppca = PPCA.from_parameters(torch.tensor(loadings), torch.tensor(loc), scale)
        self.x = self.ppca.sample(N, seed=seed)
        self.parameters = loc, loadings, noise
        means, covariances = oracles.posterior(self.x.numpy(), *self.parameters)
        self.means, self.covariance = torch.tensor(means), torch.tensor(covariances[0])
        self.factor = torch.linalg.cholesky(self.covariance)
        self.precision = torch.linalg.inv(self.covariance)
        self.log_p = torch.tensor(oracles.log_density(self.x.numpy(), *self.parameters))

    def guide(self, q, covariance=None):
        """A guide that draws z from ``q(means)``, optionally with an attribute ``covariance``."""

        class UserGuide:
            def __call__(_, x, index=None, num_data=None):
                rows = torch.arange(len(x)) if index is None else index
                with pyro.plate("data", num_data or len(x), subsample=rows):
                    pyro.sample("z", q(self.means[rows]))

        guide = UserGuide()
        if covariance is not None:
            guide.covariance = covariance
        return guide

    def gaps(self, guide, **options):
        options = {"log_p": self.log_p, "steps": 10, "tolerance": None, "seed": 0} | options
        return gaps(self.ppca.model, guide, self.x, **options)


@pytest.fixture(scope="module")
def exact():
    return Conjugate()


def low_rank(exact, shift=0.0, factor=1.0):
    """q = N(m + shift, factor C), written as F F' + d I with F of full rank."""
    least = 0.5 * torch.linalg.eigvalsh(exact.covariance)[0]
    directions = torch.linalg.cholesky(
        exact.covariance - least * torch.eye(K, dtype=torch.float64)
    )

    def q(means):
        diagonal = (factor * least).expand(len(means), K)
        return dist.LowRankMultivariateNormal(
            means + shift, (factor**0.5 * directions).expand(len(means), K, K), diagonal
        )

    return q


def full(exact):
    return lambda means: dist.MultivariateNormal(means, scale_tril=exact.factor)


def by_covariance(exact):
    return lambda means: dist.MultivariateNormal(means, covariance_matrix=exact.covariance)


def cholesky_flow(exact):
    def q(means):
        base = dist.Normal(torch.zeros_like(means), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [T.LowerCholeskyAffine(means, exact.factor)])

    return q


def normal(scale, shift=0.0):
    return lambda means: dist.Normal(means + shift, scale).to_event(1)


def affine(scale, shift=0.0):
    def q(means):
        base = dist.Normal(torch.zeros_like(means), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [T.AffineTransform(means + shift, scale)])

    return q


def laplace(scale, shift=0.0):
    return lambda means: dist.Laplace(means + shift, scale).to_event(1)


# The exact posterior, however it is written


WRITTEN = {
    "low-rank": (low_rank, "LowRankMultivariateNormal"),
    "full": (full, "full"),
    "full, by its covariance": (by_covariance, "full"),
    "affine flow": (cholesky_flow, "Normal through LowerCholeskyAffine"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_exact_posterior_of_any_class_has_no_gaps(exact, name):
    write, family = WRITTEN[name]
    found = exact.gaps(exact.guide(write(exact)))
    assert found.covariance == family and not found.unsplit_reason
    np.testing.assert_allclose(found.elbo, exact.log_p, rtol=0, atol=1e-9)
    assert abs(found.total) < 1e-9 > found.total_error
    assert abs(found.approximation) < 1e-9 > found.approximation_error
    assert 0 <= found.amortization < 1e-9 > found.amortization_error
    assert found.is_zero and "both gaps are zero up to rounding" in repr(found)
    assert "Monte Carlo" not in repr(found) and "e-09" not in repr(found)


@pytest.mark.parametrize("write", [normal, affine], ids=["normal", "affine flow"])
def test_an_exact_posterior_that_is_diagonal_has_no_gaps(write):
    loadings = np.linalg.qr(np.random.default_rng(1).normal(size=(D, K)))[0] * [2.0, 1.0, 0.5]
    exact = Conjugate(loadings)
    found = exact.gaps(exact.guide(write(exact.covariance.diagonal().sqrt())))
    assert abs(found.approximation) < 1e-9 > found.approximation_error
    assert 0 <= found.amortization < 1e-9


@pytest.mark.parametrize("covariance", ["unit", "isotropic", "diagonal"])
def test_a_wrong_attribute_covariance_is_not_used(exact, covariance):
    found = exact.gaps(exact.guide(full(exact), covariance))
    assert found.covariance == "full"
    assert abs(found.approximation) < 1e-9 and 0 <= found.amortization < 1e-9
    other = exact.gaps(exact.guide(normal(torch.tensor([0.3, 0.5, 0.4]).double()), covariance))
    assert other.covariance == "diagonal"


def test_the_families_of_the_package_guides(exact):
    guides = [
        (PerDatumGuide(N, K, covariance=c).double() for c in COVARIANCES),
        (ExactGuide(exact.ppca, covariance=c) for c in COVARIANCES),
        (
            AmortizedGuide(mlp(D, K, seed=0), K, covariance=c, homoscedastic=True).double()
            for c in COVARIANCES
        ),
    ]
    for kind in guides:
        for guide, covariance in zip(kind, COVARIANCES, strict=True):
            family = family_of(Pair(exact.ppca.model, guide), Batch(exact.x))
            assert (family.name, family.unsplit_reason) == (covariance, "")
            assert family.searchable and family.gaussian

    def pair(x):
        return x[:, :K], 0.3 + x[:, :K].abs()

    for covariance in ("unit", "isotropic", "diagonal"):
        guide = AmortizedGuide(pair, K, covariance=covariance)
        assert family_of(Pair(exact.ppca.model, guide), Batch(exact.x)).name == "diagonal"


# Gaps of known size


def test_a_shifted_low_rank_q_has_the_amortization_gap_of_its_shift(exact):
    """N(m + d, c C) costs 1/2 d' P d + K/2 (c - 1 - log c), and the family nothing."""
    guide = exact.guide(low_rank(exact, SHIFT, 0.5))
    found = exact.gaps(guide, steps=50, tolerance=1e-3)
    cost = float(0.5 * SHIFT @ exact.precision @ SHIFT) + K / 2 * (0.5 - 1 - math.log(0.5))
    assert found.covariance == "LowRankMultivariateNormal"
    assert found.total == pytest.approx(cost, abs=1e-9)
    assert found.amortization == pytest.approx(cost, abs=1e-3)
    assert 0 <= found.approximation < 1e-3 and found.remaining < 1e-3
    assert not found.kept_own_q.any()


@pytest.mark.slow
def test_the_best_product_of_laplace_distributions_agrees_with_the_formula(exact):
    """b_k = (2 P_kk)^-1/2 minimises sum(P_kk b_k^2 - 1 - log 2 b_k), the KL up to constants."""
    scales = (2 * exact.precision.diagonal()) ** -0.5
    kl = (exact.precision.diagonal() * scales**2 - 1 - (2 * scales).log()).sum()
    kl = float(kl + K / 2 * math.log(2 * math.pi) - 0.5 * torch.logdet(exact.precision))
    options = {"steps": 50, "tolerance": 1.0}
    at_best = exact.gaps(exact.guide(laplace(scales)), **options)
    off = exact.gaps(exact.guide(laplace(0.5, SHIFT)), **options)
    for found in (at_best, off):
        assert found.covariance == "Laplace"
        error = oracles.z_limit(4) * found.approximation_monte_carlo
        assert found.approximation == pytest.approx(kl, abs=error + found.remaining)
    assert at_best.amortization <= oracles.z_limit(4) * at_best.amortization_monte_carlo
    assert off.amortization > 0.5


def test_a_best_q_of_its_own_class_is_the_posterior_itself():
    """Binary data: the posterior is Beta(2 + k, 6 - k), and q another Beta distribution."""
    x = torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]).double()
    heads = x.sum(-1)
    log_p = torch.lgamma(2 + heads) + torch.lgamma(6 - heads) - math.lgamma(8) + math.log(6)

    def model(x, index=None, num_data=None):
        with pyro.plate("data", num_data or len(x), subsample=index):
            p = pyro.sample("p", dist.Beta(x.new_tensor(2.0), x.new_tensor(2.0)))
            cells = dist.Bernoulli(p.unsqueeze(-1).expand(*p.shape, 4))
            pyro.sample("x", cells.to_event(1), obs=x)

    def guide(off):
        def program(x, index=None, num_data=None):
            heads = x.sum(-1)
            with pyro.plate("data", num_data or len(x), subsample=index):
                pyro.sample("p", dist.Beta(2 + heads + off, 6 - heads + off))

        return program

    found = gaps(model, guide(0.0), x, steps=10, tolerance=None, num_samples=50, seed=0)
    assert found.covariance == "Beta" and found.estimate is not None
    error = oracles.z_limit(3) * found.estimate.standard_error
    assert ((found.log_likelihood - log_p).abs() < error + 1e-9).all()
    assert abs(found.approximation) < 1e-3 and abs(found.amortization) < 1e-3
    off = gaps(model, guide(1.5), x, log_p=log_p, steps=100, tolerance=None, seed=0)
    posterior, q = (torch.distributions.Beta(2 + heads + a, 6 - heads + a) for a in (0.0, 1.5))
    kl = float(torch.distributions.kl_divergence(q, posterior).mean())
    error = oracles.z_limit(2) * off.amortization_monte_carlo
    assert off.amortization == pytest.approx(kl, abs=error + 1e-3)
    assert abs(off.approximation) < 5e-3


# Gaps that are not split


def two_sites(x, index=None, num_data=None):
    """z1 ~ N(0, 1), z2 | z1 ~ N(z1, 1), x ~ N((z1, z2), diag(0.5, 0.7)^2)."""
    with pyro.plate("data", num_data or len(x), subsample=index):
        z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
        scales = x.new_tensor([0.5, 0.7])
        mean = torch.stack(torch.broadcast_tensors(z1, z2), -1)
        pyro.sample("x", dist.Normal(mean, scales).to_event(1), obs=x)


def chain(shift=0.0):
    """The exact posterior of ``two_sites`` as q(z1 | x) q(z2 | z1, x), z2 shifted."""
    noise = torch.diag(torch.tensor([0.5, 0.7], dtype=torch.float64) ** 2)
    prior = torch.tensor([[1.0, 1.0], [1.0, 2.0]]).double()
    gain = prior @ torch.linalg.inv(prior + noise)
    posterior = prior - gain @ prior

    def guide(x, index=None, num_data=None):
        mean1, mean2 = (x @ gain.T).unbind(-1)
        slope = posterior[1, 0] / posterior[0, 0]
        with pyro.plate("data", num_data or len(x), subsample=index):
            z1 = pyro.sample("z1", dist.Normal(mean1, posterior[0, 0].sqrt()))
            scale = (posterior[1, 1] - slope * posterior[0, 1]).sqrt()
            pyro.sample("z2", dist.Normal(mean2 + shift + slope * (z1 - mean1), scale))

    marginal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), prior + noise)
    return guide, marginal.log_prob, torch.linalg.inv(posterior)


def test_the_exact_posterior_of_two_sites_by_the_chain_rule_has_a_total_of_zero():
    x = 2 * torch.randn(N, 2, generator=generator(0)).double()
    guide, log_p, precision = chain()
    found = gaps(two_sites, guide, x, log_p=log_p(x), seed=0)
    assert abs(found.total) < 1e-9 > found.total_error
    assert "depends on its earlier draws" in found.unsplit_reason
    low, high = found.approximation_range
    assert low == 0 and high < 1e-9 and found.amortization_range == (low, high)
    assert math.isnan(found.approximation) and math.isnan(found.amortization)
    assert math.isnan(found.approximation_error) and math.isnan(found.amortization_error)
    estimated = gaps(two_sites, guide, x, steps=10, num_samples=30, seed=0)
    np.testing.assert_allclose(estimated.log_likelihood, log_p(x), rtol=0, atol=1e-9)
    shifted = gaps(two_sites, chain(0.3)[0], x, log_p=log_p(x), seed=0)
    assert shifted.total == pytest.approx(0.5 * 0.09 * float(precision[1, 1]), abs=1e-9)
    assert shifted.approximation_range == pytest.approx((0, shifted.total), abs=1e-8)
    assert not shifted.is_zero
    text = repr(shifted)
    assert (
        "the gap is not split, because the guide's q of site 'z2' depends on its earlier draws"
        in text
    )
    assert f"total {shifted.total:.3f} ± 0.000" in text and "nan" not in text


def flow(exact):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoregressive = T.AffineAutoregressive(pyro.nn.AutoRegressiveNN(K, [4])).double()

    def q(means):
        base = dist.Normal(means, 0.3 * torch.ones_like(means)).to_event(1)
        return dist.TransformedDistribution(base, [autoregressive])

    return q


def mixture(exact):
    def q(means):
        parts = dist.Normal(torch.stack([means - 0.1, means + 0.1], 1), 0.4).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(means.new_ones(len(means), 2)), parts)

    return q


def uniform(exact):
    return lambda means: dist.Uniform(means - 2, means + 2).to_event(1)


UNSPLIT = {
    flow: "site 'z' is a flow, whose AffineAutoregressive has parameters that all data share",
    mixture: "site 'z' is a MixtureSameFamily, whose draws have no gradient",
    uniform: "site 'z' is a Uniform, whose low is bounded by its other parameters",
}


@pytest.mark.parametrize("write", UNSPLIT, ids=lambda write: write.__name__)
def test_without_a_best_q_the_total_and_the_reason_are_reported(exact, write):
    guide = exact.guide(write(exact))
    found = exact.gaps(guide, steps=5)
    assert UNSPLIT[write] in found.unsplit_reason
    assert UNSPLIT[write] in repr(found)
    truth = exact.log_p - elbo_of_draws(exact, guide)
    assert found.total == pytest.approx(float(truth.mean()), abs=6 * found.total_monte_carlo)
    assert math.isnan(found.amortization) and math.isnan(found.approximation)
    assert not found.kept_own_q.any()
    estimated = exact.gaps(guide, log_p=None, steps=30, num_samples=200)
    assert estimated.estimate is not None
    error = oracles.z_limit(3) * monte_carlo(estimated.estimate)
    assert float((estimated.log_likelihood - exact.log_p).mean()) == pytest.approx(0, abs=error)


def elbo_of_draws(exact, guide):
    """The ELBO by 20,000 plain draws."""
    return log_weights(exact.ppca.model, guide, exact.x, 20_000, seed=5).mean(0).detach()


def monte_carlo(estimate):
    return float(estimate.standard_error.square().sum().sqrt() / len(estimate.value))


def test_discrete_sites_are_not_split(float64):
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + c.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    x = torch.randn(N, 2, generator=generator(1))
    components = [torch.distributions.Normal(c, 2**0.5).log_prob(x).sum(-1) for c in (0.0, 1.0)]
    truth = torch.stack([components[0] + math.log(0.3), components[1] + math.log(0.7)])
    found = gaps(model, guide, x, num_samples=4000, seed=0)
    assert "site 'c' is a Categorical, whose draws have no gradient" in found.unsplit_reason
    error = oracles.z_limit() * monte_carlo(found.estimate)
    assert float((found.log_likelihood - truth.logsumexp(0)).mean()) == pytest.approx(0, abs=error)
    assert found.total > 0 and math.isnan(found.amortization)


def test_a_guide_with_auxiliary_sites_is_not_split(float64):
    model, guide, x = user_pairs.auto_normal()
    found = gaps(model, guide, x, num_samples=200, seed=0)
    assert "transforms draws of the auxiliary sites" in found.unsplit_reason
    assert found.total > 0 and found.best_elbo.isnan().all()


def test_auxiliary_variables_that_the_model_does_not_score_raise(exact):
    """p(x, z) / (q(a) q(z | a)) is no weight: its mean over q is the volume of all a."""

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(exact.means + 0.1 * a.unsqueeze(-1), 0.4).to_event(1))

    for evaluate in (gaps, log_likelihood):
        with pytest.raises(ValueError, match=r"auxiliary sites, \['a'\], and the model scores"):
            evaluate(exact.ppca.model, guide, exact.x)


def test_another_family_than_the_guides_has_no_amortization_gap(exact):
    gap = oracles.best_q_gap(*exact.parameters[1:], "diagonal")
    found = exact.gaps(exact.guide(full(exact)), covariance="diagonal", steps=30, tolerance=1e-2)
    assert found.covariance == "diagonal"
    assert found.approximation == pytest.approx(gap, abs=5e-3)
    assert math.isnan(found.amortization) and abs(found.total) < 1e-9
    assert "the guide's own q is not of the requested family (diagonal)" in repr(found)
    within = exact.gaps(exact.guide(low_rank(exact)), covariance="full")
    assert not within.unsplit_reason and within.amortization >= 0


# A search that fails


def test_the_guides_own_q_is_kept_where_the_search_fails(exact, monkeypatch):
    guide = exact.guide(low_rank(exact, SHIFT))
    worse, far = exact.guide(low_rank(exact, 10.0)), torch.arange(N) < 3

    class Failing(estimator.LocalOptimum):
        def __call__(self, pair, batch):
            _, last_gain = super().__call__(pair, batch)
            mixed = torch.where(far[:, None], 10.0, 0.0).double()
            guide = exact.guide(lambda means: low_rank(exact, mixed)(means))
            return pair.with_guide(guide), last_gain

    monkeypatch.setattr(estimator, "LocalOptimum", Failing)
    found = exact.gaps(guide, steps=2)
    assert torch.equal(found.kept_own_q, far)
    cost = float(0.5 * SHIFT @ exact.precision @ SHIFT)
    gap = found.best_elbo - found.elbo
    np.testing.assert_allclose(
        gap, torch.tensor([0.0] * 3 + [cost] * 5, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert (found.amortization_mc_error[far] == 0).all()
    assert found.total == pytest.approx(cost)
    assert "for 3 of 8 data points no better q was found than the guide's own" in repr(found)
    # A given best guide is used for each datum unless it is worse on average.
    given = exact.gaps(guide, best=worse)
    assert given.kept_own_q.all() and given.amortization == 0
    assert given.approximation == pytest.approx(cost)


def test_the_amortization_gap_is_never_below_zero_by_more_than_its_error(exact):
    """At the best Laplace distribution the search can only fit noise."""
    guide = exact.guide(laplace((2 * exact.precision.diagonal()) ** -0.5))
    for seed in range(3):
        found = exact.gaps(guide, steps=5, seed=seed)
        error = min(found.amortization_error, found.amortization_monte_carlo)
        assert found.amortization >= -1.96 * error


def test_a_low_rank_q_in_single_precision(exact):
    def single(x, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        q = low_rank(exact, SHIFT)(exact.means[rows])
        parts = (part.float() for part in (q.loc, q.cov_factor, q.cov_diag))
        with pyro.plate("data", num_data or len(x), subsample=rows):
            pyro.sample("z", dist.LowRankMultivariateNormal(*parts))

    loc, loadings, noise = (torch.as_tensor(p).float() for p in exact.parameters)
    model = PPCA.from_parameters(loadings, loc, noise.sqrt()).model
    options = {"log_p": exact.log_p, "steps": 50, "tolerance": 1e-2, "seed": 0}
    found = gaps(model, single, exact.x.float(), **options)
    cost = float(0.5 * SHIFT @ exact.precision @ SHIFT)
    assert found.amortization == pytest.approx(cost, abs=5e-3)
    assert found.approximation == pytest.approx(0, abs=5e-3)
