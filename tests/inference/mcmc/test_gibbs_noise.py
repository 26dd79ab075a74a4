"""Moves of Gibbs sampling in single columns: against direct densities and conditional moments."""

import math

import pytest
import torch
from sklearn.datasets import load_wine
from sklearn.preprocessing import scale as standardize

import oracles
from ppl_vae.inference.mcmc.gibbs import GibbsSampler, sample_gibbs
from ppl_vae.inference.mcmc.gibbs_noise import _Regression
from ppl_vae.inference.mcmc.gibbs_priors import ConjugatePriors
from ppl_vae.inference.mcmc.settings import ChainSettings
from ppl_vae.models.bayesian_ppca import BayesianPPCA, ParameterDraws
from ppl_vae.models.linear.table_statistics import TableStatistics


def some_parameters(chains, data_dim, latent_dim):
    torch.manual_seed(0)
    return ParameterDraws(
        torch.randn(chains, data_dim, latent_dim).double(),
        torch.randn(chains, data_dim).double(),
        torch.rand(chains, data_dim).double() + 0.3,
        None,
    )


def log_likelihood(parameters, scatter, num_data):
    """The density of N data with this scatter about mu, up to a constant."""
    covariance = parameters.loadings @ parameters.loadings.mT
    covariance = covariance + torch.diag_embed(parameters.noise_scale.square())
    quadratic = torch.linalg.solve(covariance, scatter).diagonal(dim1=-2, dim2=-1).sum(-1)
    return -0.5 * (quadratic + num_data * torch.linalg.slogdet(covariance).logabsdet)


def test_the_likelihood_of_a_column_is_that_of_the_regression():
    parameters, d, num_data = some_parameters(6, 5, 2), 3, 11
    x = torch.randn(6, num_data, 5).double()
    scatter = x.mT @ x
    regression = _Regression.of(parameters._replace(), scatter, d)

    def by_regression(loadings, variance):
        total = variance + regression.communality(loadings.unsqueeze(1)).squeeze(1)
        return -0.5 * (regression.residual(loadings) / total + num_data * total.log())

    direct, indirect = [], []
    for _ in range(2):
        loadings, variance = torch.randn(6, 2).double(), torch.rand(6).double() + 0.1
        changed = parameters._replace(
            loadings=parameters.loadings.clone(), noise_scale=parameters.noise_scale.clone()
        )
        changed.loadings[:, d], changed.noise_scale[:, d] = loadings, variance.sqrt()
        direct.append(log_likelihood(changed, scatter, num_data))
        indirect.append(by_regression(loadings, variance))
    torch.testing.assert_close(direct[1] - direct[0], indirect[1] - indirect[0])


def test_missing_values_are_drawn_given_the_others():
    """Means over many chains against conditional moments, row by row; one pattern has enough rows
    that some become rows of zeros."""
    parameters = some_parameters(1, 4, 2)
    x = torch.randn(30, 4).double()
    x[:20, 0] = x[:3, 2] = x[25, 1] = torch.nan
    statistics, number = TableStatistics.of(x), 20_000
    assert (statistics.num_zero[~statistics.observed.bool().all(1)] > 0).any()
    model = BayesianPPCA(4, 2, noise="diagonal")
    sampler = GibbsSampler(statistics, ConjugatePriors.of(model.double()))
    several = ParameterDraws(
        *(None if part is None else part.expand(number, *part.shape[1:]) for part in parameters)
    )
    drawn = sampler.codes.scatter(several)
    loadings, loc, noise_scale, _ = (None if part is None else part[0] for part in parameters)
    covariance = loadings @ loadings.mT + noise_scale.square().diag()
    exact = torch.zeros(4, 4).double()
    for row in x:
        known = ~row.isnan()
        slope = torch.linalg.solve(covariance[known][:, known], covariance[known])
        mean = slope.mT @ (row - loc)[known]
        exact += mean[:, None] * mean + covariance - covariance[:, known] @ slope
    z = (drawn.mean(0) - exact) / (drawn.std(0) / math.sqrt(number) + 1e-9)
    assert z.abs().max() < oracles.z_limit(16)


@pytest.mark.slow
def test_moves_of_columns_make_draws_less_dependent():
    x = standardize(load_wine().data)
    model = BayesianPPCA.like(x, 3, noise="diagonal")
    settings = ChainSettings(num_samples=150, warmup=100, seed=0, progress=False)
    ess = [
        float(
            sample_gibbs(model, x, settings=settings, expand=expand).diagnostics().ess_bulk.min()
        )
        for expand in (False, True)
    ]
    assert ess[1] > 3 * ess[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "missing", "r_hat", "ess"),
    [("normal", 0.0, 1.01, 1000), ("ard", 0.0, 1.01, 1000), ("normal", 0.1, 1.02, 250)],
)
def test_chains_mix_with_diagonal_noise(prior, missing, r_hat, ess):
    x = oracles.with_missing_values(standardize(load_wine().data), missing, 0)
    model = BayesianPPCA.like(x, 3, noise="diagonal", prior=prior)
    samples = sample_gibbs(
        model, x, settings=ChainSettings(num_samples=2000, seed=0, progress=False)
    )
    found = samples.diagnostics(max_elements=None)
    assert float(found.r_hat.max()) < r_hat
    assert float(torch.minimum(found.ess_bulk, found.ess_tail).min()) > ess


def test_the_move_of_isotropic_noise_leaves_its_conditional_density():
    """Against quadrature of the direct likelihood on a grid, W and mu fixed."""
    torch.manual_seed(0)
    x = torch.randn(9, 4).double() @ torch.randn(4, 4).double()
    model = BayesianPPCA(4, 3)
    sampler = GibbsSampler(TableStatistics.of(x), ConjugatePriors.of(model.double()))
    one, number = some_parameters(1, 4, 3), 40_000
    parameters = ParameterDraws(
        one.loadings.expand(number, 4, 3),
        one.loc.expand(number, 4),
        torch.ones(number).double(),
        None,
    )
    for _ in range(6):
        parameters = sampler.noise_move.move(parameters)
    variance = torch.linspace(-7, 4, 4000).double().exp()
    grid = ParameterDraws(one.loadings, one.loc, variance.sqrt()[:, None].expand(-1, 4), None)
    scatter = (x - one.loc).mT @ (x - one.loc)
    log_p = log_likelihood(grid, scatter, len(x)) - variance.log() - 0.1 / variance
    weight = (log_p - log_p.max()).exp()  # the grid is even in log sigma^2: times sigma^2
    exact = (weight * variance.log()).sum() / weight.sum()
    drawn = 2 * parameters.noise_scale.log()
    assert abs(drawn.mean() - exact) < oracles.z_limit(1) * drawn.std() / math.sqrt(number)
    assert drawn.std() > 0.1
