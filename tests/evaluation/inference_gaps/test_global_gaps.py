"""Gaps of pairs with global latent variables, against a model in which all parts are known."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

import oracles
from global_pairs import linear_decoder, random_decoder, rows_of
from ppl_vae.evaluation.inference_gaps.gaps import gaps
from ppl_vae.evaluation.inference_gaps.global_draws import average_over_draws
from ppl_vae.evaluation.inference_gaps.result import Gaps
from user_pairs import draw

N, D, K = 6, 2, 1
SIGMA = 0.6


class RandomMean:
    """theta ~ N(0, 2^2 I), z_n ~ N(0, 1), x_n ~ N(theta + W z_n, SIGMA^2 I), W known.

    The guide has the exact q(z | x, theta), with means moved by ``shift`` standard deviations, and
    the posterior of theta with standard deviations times ``widening``.
    """

    def __init__(self, shift=0.0, widening=1.0):
        self.x, self.loadings = draw(N, D, seed=1), draw(D, K, seed=2)
        self.shift, self.widening = shift, widening
        self.covariance = self.loadings @ self.loadings.T + SIGMA**2 * torch.eye(D)
        inverse = torch.linalg.inv(self.covariance)
        precision = torch.eye(D) / 4 + N * inverse
        self.scale_tril = torch.linalg.cholesky(torch.linalg.inv(precision))
        self.loc = torch.linalg.solve(precision, inverse @ self.x.sum(0))

    def posterior(self):
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    def proposal(self):
        return dist.MultivariateNormal(self.loc, scale_tril=self.widening * self.scale_tril)

    def prior(self):
        return dist.Normal(torch.zeros(D), 2.0).to_event(1)

    def model(self, x, index=None, num_data=None):
        theta = pyro.sample("theta", self.prior())
        with rows_of(x, index, num_data):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            mean = theta + z @ self.loadings.T
            pyro.sample("x", dist.Normal(mean, SIGMA).to_event(1), obs=x)

    def guide(self, x, index=None, num_data=None):
        theta = pyro.sample("theta", self.proposal())
        with rows_of(x, index, num_data):
            inner = float(self.loadings.square().sum()) + SIGMA**2
            sd = SIGMA / inner**0.5
            mean = (x - theta) @ self.loadings / inner + self.shift * sd
            pyro.sample("z", dist.Normal(mean, sd).to_event(1))

    def log_p(self, theta):
        """log p(x_n | theta) for each draw."""
        px = dist.MultivariateNormal(theta[:, None], self.covariance)
        return px.log_prob(self.x)

    def log_evidence(self):
        one = torch.ones(N, N)
        whole = torch.kron(torch.eye(N), self.covariance) + torch.kron(one, 4 * torch.eye(D))
        return dist.MultivariateNormal(torch.zeros(N * D), whole).log_prob(self.x.flatten())


def found_by(pair, **options):
    options = {"steps": 30, "num_samples": 50, "tolerance": None, "num_global_draws": 3} | options
    return gaps(pair.model, pair.guide, pair.x, seed=0, **options)


def monte_carlo_limit(found):
    """The largest error of a mean over the data that the draws for log p(x | theta) explain.

    The best q is found by a search of few steps, which leaves less than 1e-3 nats.
    """
    return oracles.z_limit() * found.total_monte_carlo + 1e-3


def test_with_the_exact_posterior_no_part_is_left(float64):
    """log p(x | theta) p(theta) / q(theta) is the evidence for every draw of theta."""
    pair = RandomMean()
    found = found_by(pair)
    error = monte_carlo_limit(found)
    assert found.total == pytest.approx(0, abs=error)
    assert found.global_part.kl == pytest.approx(0, abs=3**0.5 * error)
    assert found.global_part.num_draws == 3
    theta = pair.proposal().sample((4,))
    joint = pair.log_p(theta).sum(1) + pair.prior().log_prob(theta)
    evidence = joint - pair.proposal().log_prob(theta)
    torch.testing.assert_close(evidence, pair.log_evidence().expand(4))


def test_a_shifted_guide_of_each_datum_is_an_amortization_gap(float64):
    """KL of two normals whose means are s standard deviations apart: s^2 / 2."""
    found = found_by(RandomMean(shift=0.8), tolerance=1e-3)
    error = monte_carlo_limit(found)
    assert found.total == pytest.approx(0.8**2 / 2, abs=error)
    assert found.amortization == pytest.approx(0.8**2 / 2, abs=error)
    assert found.approximation == pytest.approx(0, abs=error)
    assert found.global_part.kl == pytest.approx(0, abs=3**0.5 * error)


def test_a_wide_q_of_the_global_variables_is_the_global_part(float64):
    """KL(q(theta) || p(theta | x)), by many draws with the exact log p(x | theta)."""
    pair, number = RandomMean(widening=1.5), 4000
    one = found_by(pair, num_global_draws=2)
    assert one.total == pytest.approx(0, abs=monte_carlo_limit(one))
    assert one.global_part.kl <= math.log(2) / N + monte_carlo_limit(one)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = pair.proposal().sample((number,))
    log_p = pair.log_p(theta)
    ratios = pair.prior().log_prob(theta) - pair.proposal().log_prob(theta)
    parts = [replace(one, log_likelihood=values, estimate=None) for values in log_p.cpu()]
    found = average_over_draws(parts, ratios.cpu(), has_all_data=True).global_part.kl * N
    exact = D * (1.5**2 / 2 - 0.5 - math.log(1.5))
    joint = log_p.sum(1) + ratios
    weights = (joint - pair.log_evidence()).exp()
    error = float((joint.std() + weights.std()) / number**0.5)
    assert abs(found - exact) < oracles.z_limit() * error
    assert oracles.z_limit() * error < exact / 2


def test_errors_count_the_draws_that_the_data_share(float64):
    """The total given theta varies over draws; its mean has the error of G draws at least."""
    model, guide, x = linear_decoder()
    found = gaps(
        model, guide, x, steps=5, num_samples=200, tolerance=None, num_global_draws=4, seed=0
    )
    part = found.global_part
    assert part.total_error > 0
    assert found.total_error > part.total_error
    assert found.amortization_error >= part.amortization_error
    text = repr(found)
    assert "means over 4 draws of the global variables" in text
    assert "KL(q || posterior) / N is at least" in text
    assert math.isnan(
        gaps(
            model, guide, x, rows=torch.arange(5), steps=2, num_samples=20, tolerance=None,
            num_global_draws=2,
        ).global_part.kl
    )  # fmt: skip


def test_results_are_saved_with_their_global_part(float64):
    model, guide, x = random_decoder()
    found = gaps(
        model, guide, x[:4], steps=2, num_samples=20, tolerance=None, num_global_draws=2, seed=0
    )
    again = Gaps.from_dict(found.to_dict())
    assert again.global_part == found.global_part


def test_constants_of_a_random_model_are_refused(float64):
    model, guide, x = linear_decoder()
    with pytest.raises(ValueError, match="log_p depends on the global latent variables"):
        gaps(model, guide, x, log_p=torch.zeros(len(x)))
    with pytest.raises(ValueError, match="best depends on the global latent variables"):
        gaps(model, guide, x, best=guide)
