"""Comparison of numbers of latent dimensions: evidence, p(K | x), and the model average."""

import math

import pyro.distributions as dist
import pytest
import torch

from ppl_vae.evaluation.evidence.latent_dims import compare_latent_dims
from ppl_vae.evaluation.evidence.latent_dims_result import LatentDims, posterior_probabilities
from ppl_vae.evaluation.evidence.log_evidence import evidence_coordinates, log_evidence
from ppl_vae.evaluation.evidence.loo import leave_one_out
from ppl_vae.inference.mcmc.sampling import sample_posterior
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.linear.integrated_likelihood import integrated_log_likelihood
from ppl_vae.models.linear.table_statistics import TableStatistics
from ppl_vae.models.priors import InverseGammaScale
from ppl_vae.plots.latent_dims import plot_latent_dims


def simulated(num_data: int, data_dim: int, latent_dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_data, latent_dim, generator=generator, dtype=torch.float64)
    loadings = torch.randn(latent_dim, data_dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_data, data_dim, generator=generator, dtype=torch.float64)
    return z @ loadings + 0.4 * noise


def unit_model(data_dim: int, latent_dim: int, noise: str = "isotropic") -> BayesianPPCA:
    """Priors that do not depend on data."""
    return BayesianPPCA(
        data_dim, latent_dim, noise=noise, loc_prior=dist.Normal(0.0, 1.0)
    ).double()


def prior_average(model: BayesianPPCA, x: torch.Tensor, num_draws: int) -> tuple[float, float]:
    """log E p(x | theta) over draws of the prior, mu from a normal near its posterior."""
    statistics = TableStatistics.of(x)
    with torch.no_grad():
        proposal = torch.distributions.Normal(x.mean(0), 1.3 * x.std(0) / math.sqrt(len(x)))
        loc = proposal.sample(torch.Size([num_draws]))
        loadings = model.loadings_prior().sample(torch.Size([num_draws]))
        scale = model.noise_prior().sample(torch.Size([num_draws]))
        log_weights = integrated_log_likelihood(statistics, loadings, loc, scale)
        log_weights = log_weights + model.loc_prior().log_prob(loc)
        log_weights = log_weights - proposal.log_prob(loc).sum(-1)
    weights = (log_weights - log_weights.max()).exp()
    value = float(log_weights.max() + weights.mean().log())
    return value, float(weights.std() / weights.mean()) / math.sqrt(num_draws)


@pytest.mark.parametrize("noise", ["isotropic", pytest.param("diagonal", marks=pytest.mark.slow)])
def test_the_evidence_equals_the_average_over_the_prior(noise: str) -> None:
    """Five standard errors of the difference between two independent estimates."""
    x = simulated(12, 2, 1, seed=0)
    model = unit_model(2, 1, noise)
    samples = sample_posterior(model, x, num_samples=1000, warmup=200, chains=4, seed=0)
    found = log_evidence(samples, x, seed=0)
    torch.manual_seed(1)
    value, error = prior_average(model, x, 400_000)
    assert error < 0.05
    assert abs(found.value - value) < 5 * math.hypot(error, found.standard_error)


@pytest.mark.slow
def test_the_evidence_equals_quadrature() -> None:
    """K = 1, D = 2: a grid over both loadings and log sigma, mu integrated in closed form."""
    x = simulated(12, 2, 1, seed=0)
    model = unit_model(2, 1)
    grid = torch.linspace(-6, 6, 241, dtype=torch.float64)
    log_scale = torch.linspace(-3.5, 2.0, 166, dtype=torch.float64)
    first, second = (g.flatten() for g in torch.meshgrid(grid, grid, indexing="ij"))
    total, n = [], len(x)
    centred = x - x.mean(0)
    for s in log_scale.exp():
        loadings = torch.stack([first, second], -1)
        covariance = loadings[:, :, None] * loadings[:, None] + s.square() * torch.eye(2)
        within = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance)
        # The mean of the data is N(0, C / n + I) under mu ~ N(0, I); deviations given it are free.
        mean = torch.distributions.MultivariateNormal(
            torch.zeros(2).double(), covariance / n + torch.eye(2)
        ).log_prob(x.mean(0))
        spread = within.log_prob(centred[:, None]).sum(0) + math.log(2 * math.pi)
        spread = spread + torch.logdet(covariance / n) / 2
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(loadings).sum(-1)
        noise = InverseGammaScale(torch.tensor(1.0), torch.tensor(0.1)).log_prob(s) + s.log()
        total.append(torch.logsumexp(mean + spread + prior, 0) + noise)
    step = float(grid[1] - grid[0]) ** 2 * float(log_scale[1] - log_scale[0])
    exact = float(torch.logsumexp(torch.stack(total), 0)) + math.log(step)
    samples = sample_posterior(model, x, num_samples=4000, warmup=500, chains=4, seed=0)
    found = log_evidence(samples, x, seed=0)
    assert found.standard_error < 0.01
    assert abs(found.value - exact) < 5 * found.standard_error + 1e-4


def test_vb_bound_is_below_the_evidence_and_the_data_are_sure_of_k() -> None:
    x = simulated(80, 5, 2, seed=1)
    found = compare_latent_dims(x, [1, 2, 3], num_samples=300, warmup=200, chains=4, seed=0)
    assert found.best == 2
    assert found.chosen_by("bic") == found.chosen_by("minka") == 2
    assert float(found.probability.sum()) == pytest.approx(1)
    assert bool(
        (found.approximations["vb_bound"] < found.log_evidence + 3 * found.evidence_error).all()
    )
    # Laplace's approximation has an error of order one nat here; other K are further away.
    assert bool(((found.approximations["laplace"] - found.log_evidence).abs() < 3).all())
    assert "K = 2 has probability" in repr(found)
    assert list(found.to_frame().index) == [1, 2, 3]
    average = found.log_predictive(x[:5])
    each = torch.stack([s.log_predictive(x[:5]).value for s in found.samples])
    assert bool((average <= each.amax(0)).all())
    assert bool((average >= each.amin(0)).all())
    assert torch.allclose(
        average.exp(), (found.probability[:, None] * each.exp()).sum(0), rtol=1e-10
    )
    axes = plot_latent_dims(found)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3"]
    with pytest.raises(ValueError, match="holds no draws"):
        LatentDims.from_dict(found.to_dict()).log_predictive(x)


def test_leave_one_out_of_a_normal_mean_is_exact() -> None:
    """The tolerance is five standard errors of the mean of 4,000 weights, about 0.05 / 63 each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, generator=generator).double() + 0.5
    sd = math.sqrt(1 / 21)
    draws = x.sum() / 21 + sd * torch.randn(4000, generator=generator).double()
    values, k_hat = leave_one_out(torch.distributions.Normal(draws[:, None], 1.0).log_prob(x))
    others = torch.stack([(x.sum() - one) / 20 for one in x])
    exact = torch.distributions.Normal(others, math.sqrt(1 + 1 / 20)).log_prob(x)
    assert bool(((values - exact).abs() < 0.02).all())
    assert bool((k_hat < 0.7).all())


def test_probabilities_and_their_errors() -> None:
    """The errors agree with those of simulated evidences."""
    torch.manual_seed(0)
    value = torch.tensor([-3.0, -2.0, -4.0]).double()
    error = torch.tensor([0.02, 0.01, 0.03]).double()
    probability, found = posterior_probabilities(value, error)
    simulated_evidences = value + error * torch.randn(20_000, 3).double()
    assert torch.allclose(probability, value.softmax(0))
    assert torch.allclose(found, simulated_evidences.softmax(1).std(0), rtol=0.03)


def test_models_that_are_not_invariant_are_refused() -> None:
    x = simulated(20, 3, 1, seed=0)
    statistics = TableStatistics.of(x)
    with pytest.raises(ValueError, match="prior='normal'"):
        evidence_coordinates(BayesianPPCA(3, 1, prior="ard"), statistics)
    with pytest.raises(ValueError, match="pass its log density"):
        evidence_coordinates(None, statistics)
    with pytest.raises(ValueError, match="distinct values of K"):
        compare_latent_dims(x, [1, 1])
    with pytest.raises(ValueError, match="must return a BayesianPPCA with latent_dim=2"):
        compare_latent_dims(x, [2], make_model=lambda k: BayesianPPCA(3, 1))


@pytest.mark.slow
def test_p_of_k_is_right_as_often_as_it_says() -> None:
    """200 tables with K and the parameters drawn from their priors: 1[K = k] - p(k | x) has mean
    zero for each k; the tolerance is four standard errors."""
    dims, differences, correct = [1, 2, 3], [], []
    for seed in range(200):
        torch.manual_seed(seed)
        truth = int(torch.randint(1, 4, ()))
        x = unit_model(4, truth).model(num_data=30).detach()
        found = compare_latent_dims(
            x,
            dims,
            make_model=lambda k: unit_model(4, k),
            num_samples=300,
            warmup=200,
            chains=2,
            seed=seed,
        )
        one = torch.tensor([float(k == truth) for k in dims])
        differences.append(one - found.probability)
        correct.append((found.best == truth, float(found.probability.max())))
    stacked = torch.stack(differences)
    z = stacked.mean(0) / (stacked.std(0) / math.sqrt(len(stacked)))
    assert bool((z.abs() < 4).all()), z
    right = sum(hit for hit, _ in correct) / len(correct)
    claimed = sum(value for _, value in correct) / len(correct)
    assert abs(right - claimed) < 4 * math.sqrt(claimed * (1 - claimed) / len(correct))


def test_bridge_sampling_of_draws_in_identified_coordinates_is_reproducible() -> None:
    x = simulated(20, 3, 1, seed=0)
    samples = sample_posterior(unit_model(3, 1), x, num_samples=100, warmup=50, chains=2, seed=0)
    first, second = (log_evidence(samples, x, seed=4) for _ in range(2))
    assert first == second
