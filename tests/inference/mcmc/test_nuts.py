"""NUTS on the integrated likelihood: its density against the model's own, its draws against
quadrature."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ppl_vae.inference.mcmc.gibbs import sample_gibbs
from ppl_vae.inference.mcmc.hamiltonian import DensityGradient, value_and_gradient
from ppl_vae.inference.mcmc.integrated_posterior import IntegratedPosterior
from ppl_vae.inference.mcmc.nuts import sample_nuts
from ppl_vae.inference.mcmc.settings import ChainSettings
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.linear.table_statistics import TableStatistics

PRIORS = {
    "normal": {},
    "diagonal": {"noise": "diagonal"},
    "ard": {"prior": "ard"},
    "ard, not gamma": {"prior": "ard", "relevance_prior": dist.LogNormal(0.0, 2.0)},
    "one scale per element": {
        "loadings_prior": dist.Normal(0.0, 1 + torch.arange(10.0).reshape(5, 2))
    },
    "Laplace": {"loadings_prior": dist.Laplace(0.0, 1.0), "loc_prior": dist.Cauchy(0.0, 1.0)},
    "not about zero": {"loadings_prior": dist.Normal(1.0, 1.0)},
    "half-normal noise": {"noise": "diagonal", "noise_prior": dist.HalfNormal(1.0)},
}


def table(rows=12, columns=5, missing=0.0, seed=0):
    generator = np.random.default_rng(seed)
    loadings = generator.normal(size=(2, columns))
    x = generator.normal(size=(rows, 2)) @ loadings + 0.5 * generator.normal(size=(rows, columns))
    x[generator.random(x.shape) < missing] = np.nan
    return torch.from_numpy(x)


def posterior_of(x, latent_dim=2, **settings):
    model = BayesianPPCA(x.shape[1], latent_dim, marginal=True, **settings)
    return IntegratedPosterior(model.double(), TableStatistics.of(x))


def log_joint(posterior, parameters, x):
    """log p(x, parameters) of the model as a Pyro program."""
    values = {k: v for k, v in parameters._asdict().items() if v is not None}
    program = poutine.condition(posterior.model.model, data=values)
    observed = ~x.isnan()
    trace = poutine.trace(program).get_trace(x.nan_to_num(), mask=observed)
    return trace.log_prob_sum()


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("prior", PRIORS)
def test_density_is_that_of_the_program(prior, missing):
    x = table(missing=missing)
    posterior = posterior_of(x, **PRIORS[prior])
    model = posterior.model
    torch.manual_seed(0)
    normal = torch.randn(3, posterior.num_coordinates, dtype=torch.float64)
    for position in posterior.start + 0.5 * normal:
        blocks = posterior.blocks(position)
        parameters = posterior.parameters(position)
        expected = log_joint(posterior, parameters, x)
        # Jacobians of the coordinates, and the density of what stands beside the parameters.
        if prior == "not about zero":
            expected = expected + model.latent_dim * posterior.scale.log().sum()
        else:
            expected = expected + posterior.trapezoid.log_volume(blocks["trapezoid"])
        expected = expected + dist.Normal(0.0, 1.0).log_prob(blocks["rotation"]).sum()
        expected = expected + posterior.scale.log().sum() + blocks["log_noise"].sum()
        expected = expected + blocks["log_relevance"].sum()
        if prior == "ard":  # p(W) = p(W, relevance) / p(relevance | W)
            gamma = model.relevance_prior().base_dist
            rate = gamma.rate + parameters.loadings.square().sum(0) / 2
            conditional = dist.Gamma(gamma.concentration + model.data_dim / 2, rate)
            expected = expected - conditional.log_prob(parameters.relevance).sum()
        torch.testing.assert_close(posterior.log_density(position), expected)


def test_density_of_several_positions_is_that_of_each():
    posterior = posterior_of(table(missing=0.2), prior="ard")
    positions = posterior.start + torch.randn(2, 3, posterior.num_coordinates).double()
    each = [[posterior.log_density(p) for p in row] for row in positions]
    expected = torch.stack([torch.stack(row) for row in each])
    torch.testing.assert_close(posterior.log_density(positions), expected)


@pytest.mark.parametrize("prior", ["normal", "ard"])
def test_captured_gradient_is_that_of_autograd_and_of_differences(prior):
    posterior = posterior_of(table(), **PRIORS[prior])
    start = posterior.start
    density = DensityGradient(posterior.log_density, start, compiled=False)
    torch.manual_seed(0)
    for _ in range(3):
        position = start + 0.3 * torch.randn_like(start)
        value, gradient = density(position)
        expected = value_and_gradient(posterior.log_density, position)
        torch.testing.assert_close((value, gradient), expected)
        step, along = 1e-4, torch.randn_like(start)
        ends = [posterior.log_density(position + sign * step * along) for sign in (1, -1)]
        # The error of central differences is step^2 times a third derivative: 1e-8 here.
        torch.testing.assert_close(
            (ends[0] - ends[1]) / (2 * step), gradient @ along, rtol=1e-5, atol=1e-4
        )


def quadrature(x, model):
    """Means of W W', sigma and mu at D = 2, K = 1, on a grid of W and log sigma."""
    num_data, mean = len(x), x.mean(0)
    scatter = (x - mean).T @ (x - mean)
    axis = torch.linspace(-5, 5, 121, dtype=torch.float64)
    log_scale = torch.linspace(-3, 2, 81, dtype=torch.float64)
    w0, w1, t = torch.meshgrid(axis, axis, log_scale, indexing="ij")
    loadings = torch.stack([w0, w1], -1)
    products = loadings[..., :, None] * loadings[..., None, :]
    eye = torch.eye(2, dtype=torch.float64)
    covariance = products + (2 * t).exp()[..., None, None] * eye
    # x given W and sigma, with mu ~ N(0, 10^2) integrated out: scatter and mean are independent.
    density = dist.MultivariateNormal(torch.zeros(2).double(), covariance / num_data + 100 * eye)
    log_p = density.log_prob(mean) - (num_data - 1) / 2 * covariance.logdet()
    log_p = log_p - (covariance.inverse() @ scatter).diagonal(dim1=-1, dim2=-2).sum(-1) / 2
    log_p = log_p + dist.Normal(0.0, 1.0).log_prob(loadings).sum(-1)
    log_p = log_p + model.noise_prior().log_prob(t.exp()) + t
    weight = (log_p - log_p.max()).exp()
    weight = weight / weight.sum()
    precision = covariance.inverse() * num_data
    loc = torch.linalg.solve(precision + 0.01 * eye, precision @ mean)
    return {
        "products": (weight[..., None, None] * products).sum((0, 1, 2)),
        "noise_scale": (weight * t.exp()).sum(),
        "loc": (weight[..., None] * loc).sum((0, 1, 2)),
    }


def mean_and_error(draws):
    """Means over chains and draws, and their Monte Carlo errors, of values (C, S, ...)."""
    draws = draws.reshape(*draws.shape[:2], -1)
    ess = pyro.ops.stats.effective_sample_size(draws, chain_dim=0, sample_dim=1)
    return draws.mean((0, 1)), draws.flatten(0, 1).std(0) / ess.sqrt()


@pytest.mark.slow  # the density is compared with quadrature, and Gibbs sampling with weights
def test_posterior_means_are_those_of_quadrature():
    x = table(20, 2)
    model = BayesianPPCA(2, 1).double()
    samples = sample_nuts(
        model,
        x,
        settings=ChainSettings(num_samples=120, warmup=80, chains=2, seed=0, progress=False),
    )
    expected = quadrature(x, model)
    loadings = samples.draws["loadings"]
    found = {"products": loadings @ loadings.mT, **samples.draws}
    for name, value in expected.items():
        mean, error = mean_and_error(found[name])
        z = (mean - value.flatten()) / error
        assert z.abs().max() < 4, name
    assert samples.divergences == 0
    assert samples.acceptance is not None and 0.6 < samples.acceptance < 1
    # Both signs of a column are in the posterior, which NUTS draws afterwards.
    assert abs(float((loadings > 0).double().mean()) - 0.5) < 4 * math.sqrt(0.25 / 240)


def short(seed):
    x = table()
    model = BayesianPPCA.like(x, 2)
    return sample_nuts(
        model,
        x,
        settings=ChainSettings(num_samples=4, warmup=5, chains=2, progress=False, seed=seed),
    )


def test_draws_repeat_with_a_seed_and_leave_the_generators():
    torch.manual_seed(3)
    before, stored = torch.get_rng_state(), set(pyro.get_param_store().keys())
    first, second, other = short(seed=1), short(seed=1), short(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(pyro.get_param_store().keys()) == stored
    assert torch.equal(first.draws["loadings"], second.draws["loadings"])
    assert not torch.equal(first.draws["loadings"], other.draws["loadings"])
    assert first.draws["loadings"].shape == (2, 4, 5, 2)
    assert first.draws["loadings"].dtype == torch.float64
    assert first.draws["noise_scale"].shape == (2, 4)


def test_progress_counts_all_iterations():
    steps = []
    x = table()
    sample_nuts(
        BayesianPPCA.like(x, 1),
        x,
        settings=ChainSettings(
            num_samples=3,
            warmup=4,
            chains=2,
            seed=0,
            progress=lambda step, value: steps.append((step, value)),
        ),
    )
    assert [step for step, _ in steps] == list(range(1, 15))
    assert all(math.isfinite(value) for _, value in steps)


def test_the_model_is_left_as_it_is():
    x = table()
    model = BayesianPPCA.like(x.float(), 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    samples = sample_nuts(
        model, x, settings=ChainSettings(num_samples=4, warmup=4, chains=1, seed=0, progress=False)
    )
    assert samples.model is model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "noise", "latent_dim", "missing"),
    [
        ("normal", "isotropic", 2, 0.0),
        ("normal", "diagonal", 1, 0.1),  # with K = 2 both mix slowly here
        ("ard", "isotropic", 2, 0.1),
        ("ard", "diagonal", 1, 0.0),
    ],
)
def test_nuts_and_gibbs_agree(prior, noise, latent_dim, missing):
    x = table(60, 6, missing)
    model = BayesianPPCA.like(x, latent_dim, prior=prior, noise=noise)
    nuts = sample_nuts(
        model,
        x,
        settings=ChainSettings(num_samples=400, warmup=400, chains=2, seed=0, progress=False),
    )
    gibbs = sample_gibbs(
        model,
        x,
        settings=ChainSettings(num_samples=4000, warmup=1000, chains=4, seed=1, progress=False),
    )
    assert nuts.divergences == 0
    for name in ("covariance", "noise_scale", "loc", "subspace"):
        first, second = nuts.invariants()[name], gibbs.invariants()[name]
        centre = second.mean((0, 1))
        for values in ((first, second), ((first - centre) ** 2, (second - centre) ** 2)):
            (mean, error), (other, other_error) = map(mean_and_error, values)
            z = (mean - other) / torch.hypot(error, other_error)
            assert z.abs().max() < 4.5, name
