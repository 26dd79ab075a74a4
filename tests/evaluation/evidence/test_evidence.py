"""Bridge sampling, Laplace's approximation, Minka's and BIC, against known integrals."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ppl_vae.evaluation.evidence.bridge_sampling import bridge_sampling
from ppl_vae.evaluation.evidence.laplace import (
    bic_log_evidence,
    laplace_log_evidence,
    minka_log_evidence,
    number_of_parameters,
)

LOG_CONSTANT = 3.7


def student(freedom: float) -> torch.distributions.StudentT:
    zero = torch.zeros((), dtype=torch.float64)
    return torch.distributions.StudentT(zero + freedom, zero, zero + 1)


def test_bridge_sampling_is_right_as_often_as_its_error_says() -> None:
    """z-scores of 200 estimates of a known integral have mean 0 and standard deviation 1."""
    torch.manual_seed(0)
    target, scores = student(6.0), []
    for seed in range(200):
        found = bridge_sampling(
            lambda v: target.log_prob(v).sum(-1) + LOG_CONSTANT,
            target.sample(torch.Size([2, 200, 2])),
            seed=seed,
        )
        scores.append((found.value - LOG_CONSTANT) / found.standard_error)
    # Five standard errors of a mean and, about, of a standard deviation of 200 normal scores.
    assert abs(np.mean(scores)) < 5 / math.sqrt(200)
    assert abs(np.std(scores) - 1) < 5 / math.sqrt(400)


def test_bridge_sampling_is_exact_where_the_posterior_is_the_proposal() -> None:
    """With proposals from the target itself every ratio is the integral."""
    draws = torch.randn(4, 4000, 1, generator=torch.Generator().manual_seed(0)).double()
    first = draws[:, :2000].reshape(-1, 1)
    same = torch.distributions.Normal(first.mean(), first.std())
    found = bridge_sampling(lambda v: same.log_prob(v).sum(-1) + LOG_CONSTANT, draws, seed=0)
    assert found.value == pytest.approx(LOG_CONSTANT, abs=1e-8)
    assert found.standard_error < 1e-6
    assert found.reliable


def test_bridge_sampling_in_autocorrelated_chains_counts_effective_draws() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 2000, 1, generator=generator).double()
    chain = noise.clone()
    for t in range(1, 2000):
        chain[:, t] = 0.95 * chain[:, t - 1] + math.sqrt(1 - 0.95**2) * noise[:, t]
    target = student(6.0)
    found = bridge_sampling(lambda v: target.log_prob(v).sum(-1), chain, seed=0)
    assert found.ess < 0.5 * found.num_draws


def test_bridge_sampling_refuses_few_draws_and_nan() -> None:
    with pytest.raises(ValueError, match="draws must be at least 4 a chain"):
        bridge_sampling(lambda v: v.sum(-1), torch.zeros(2, 4, 5), seed=0)
    with pytest.raises(ValueError, match="log_density is NaN at 100 of 100"):
        bridge_sampling(lambda v: v.sum(-1) * math.nan, torch.randn(2, 100, 2), seed=0)


def test_laplace_is_exact_for_a_normal_density() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator).double()
    target = torch.distributions.MultivariateNormal(
        torch.arange(4.0).double(), root @ root.mT + torch.eye(4)
    )
    start = torch.zeros(4).double()
    found = laplace_log_evidence(lambda v: target.log_prob(v) + LOG_CONSTANT, start)
    assert found == pytest.approx(LOG_CONSTANT, abs=1e-9)


def test_laplace_is_nan_without_a_mode() -> None:
    assert math.isnan(laplace_log_evidence(lambda v: v.sum(-1) * 0.0, torch.zeros(2).double()))


def test_minka_by_a_slow_obvious_version() -> None:
    """Equation 30 of Minka (2000), term by term in Python."""
    values, num_data = [5.0, 3.0, 1.25, 0.875, 0.5], 40
    for rank, found in enumerate(minka_log_evidence(torch.tensor(values).double(), num_data), 1):
        noise = sum(values[rank:]) / (5 - rank)
        smoothed = [v if i < rank else noise for i, v in enumerate(values)]
        total = -rank * math.log(2) - rank / 2 * math.log(num_data)
        for i in range(rank):
            half = (5 - i) / 2
            total += math.lgamma(half) - half * math.log(math.pi)
            total -= num_data / 2 * math.log(values[i])
            for j in range(i + 1, 5):
                gap = (1 / smoothed[j] - 1 / smoothed[i]) * (values[i] - values[j])
                total -= math.log(gap * num_data) / 2
        total -= num_data * (5 - rank) / 2 * math.log(noise)
        total += (5 * rank - rank * (rank + 1) / 2 + rank) / 2 * math.log(2 * math.pi)
        assert float(found) == pytest.approx(total, rel=1e-12)


def test_minka_of_equal_eigenvalues_is_minus_infinity() -> None:
    found = minka_log_evidence(torch.tensor([2.0, 1.0, 1.0, 0.5]), 30)
    assert found[1:].tolist() == [-math.inf, -math.inf]
    assert bool(found[0].isfinite())


@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
def test_the_number_of_parameters_is_the_rank_of_the_derivative(noise: str) -> None:
    """It is the dimension of the set of means and covariances that the parameters reach."""
    size, rank = 6, 2
    generator = torch.Generator().manual_seed(0)
    variances = 1 if noise == "isotropic" else size

    def moments(v: torch.Tensor) -> torch.Tensor:
        loadings, loc, variance = v.split([size * rank, size, variances])
        loadings = loadings.reshape(size, rank)
        return torch.cat([loc, (loadings @ loadings.mT + variance.expand(size).diag()).flatten()])

    point = torch.rand(size * rank + size + variances, generator=generator).double()
    jacobian = torch.autograd.functional.jacobian(moments, point)
    assert torch.linalg.matrix_rank(jacobian) == number_of_parameters(size, rank, noise)


def test_bic_is_the_evidence_of_a_normal_mean_up_to_a_constant() -> None:
    """For a normal mean the error of BIC stays bounded as N grows."""
    errors = []
    for num_data in (100, 10_000, 1_000_000):
        # x has mean 0.3 and variance 1 exactly: log p(x) in closed form under mu ~ N(0, 1).
        at_best = num_data * (-0.5 * math.log(2 * math.pi) - 0.5)
        precision = num_data + 1
        spread = num_data * (1 + 0.3**2) - (0.3 * num_data) ** 2 / precision
        exact = -num_data / 2 * math.log(2 * math.pi) - 0.5 * math.log(precision) - spread / 2
        errors.append(bic_log_evidence(at_best, 1, num_data) - exact)
    limit = -stats.norm.logpdf(0.3) - 0.5 * math.log(2 * math.pi)
    assert errors[-1] == pytest.approx(limit, abs=1e-4)
    assert abs(errors[0] - limit) < 0.02
