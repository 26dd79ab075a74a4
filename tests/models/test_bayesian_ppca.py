"""Bayesian PPCA: its densities against quadrature and oracles, and stock Pyro on the program."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from scipy import integrate, stats

import oracles
from ppl_vae import BayesianPPCA, load, save
from ppl_vae.models import InverseGammaScale, priors
from ppl_vae.models.linear.observed_gaussian import ObservedGaussian

N, D, K = 12, 4, 2
NOISES = ("isotropic", "diagonal")
PRIORS = ("normal", "ard")
GLOBALS = ["loadings", "loc", "noise_scale"]


def data(missing=False, N=N, D=D, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, 1)) @ rng.normal(size=(1, D)) + 0.4 * rng.normal(size=(N, D)) + 2
    return oracles.with_missing_values(x, 0.3, seed) if missing else x


def like(x, latent_dim=K, **options):
    return BayesianPPCA.like(x, latent_dim, **options).double()


def tensors(x):
    """x with zeros in place of missing values, and the mask."""
    return torch.tensor(x).nan_to_num(), torch.tensor(~np.isnan(x))


# Densities


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("missing", [False, True])
def test_the_marginal_density_is_the_dense_gaussian(noise, missing):
    x = data(missing)
    values, mask = tensors(x)
    model = like(x, noise=noise, marginal=True)
    pyro.set_rng_seed(1)
    trace = poutine.trace(model.model).get_trace(values, mask=mask)
    trace.compute_log_prob()
    W, loc, sigma = (trace.nodes[name]["value"] for name in GLOBALS)
    expected = oracles.log_density(x, loc.numpy(), W.numpy(), (sigma**2).numpy())
    np.testing.assert_allclose(trace.nodes["x"]["log_prob"], expected, rtol=1e-9)
    ppca = model.ppca(model.sample_parameters())
    np.testing.assert_allclose(
        ppca.log_likelihood(values, mask=mask).detach(),
        oracles.log_density(
            x,
            ppca.loc.detach().numpy(),
            ppca.loadings.detach().numpy(),
            (ppca.noise_scale**2).detach().numpy(),
        ),
        rtol=1e-9,
    )


def test_z_integrated_by_quadrature_gives_the_marginal_density():
    x = data()
    joint, marginal = like(x, 1), like(x, 1, marginal=True)
    values = torch.tensor(x)
    parameters = {
        "loadings": torch.tensor([[0.5], [-1.0], [0.2], [0.8]]).double(),
        "loc": values.mean(0),
        "noise_scale": torch.tensor(0.6).double(),
    }
    trace = poutine.trace(poutine.condition(marginal.model, parameters)).get_trace(values)
    trace.compute_log_prob()

    def density(z, row):
        sites = parameters | {"z": torch.tensor([[z]], dtype=torch.float64)}
        part = poutine.trace(poutine.condition(joint.model, sites)).get_trace(row[None])
        part.compute_log_prob()
        return float((part.nodes["x"]["log_prob"] + part.nodes["z"]["log_prob"]).exp())

    for n in range(2):
        found, _ = integrate.quad(density, -8, 8, args=(values[n],), epsabs=0, epsrel=1e-8)
        assert abs(np.log(found) - float(trace.nodes["x"]["log_prob"][n])) < 1e-7


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("prior", PRIORS)
def test_the_priors_are_the_ones_that_are_documented(prior, noise):
    x = data()
    model = like(x, prior=prior, noise=noise)
    pyro.set_rng_seed(3)
    trace = poutine.trace(model.model).get_trace(torch.tensor(x))
    trace.compute_log_prob()
    sites = {name: node["value"].numpy() for name, node in trace.nodes.items() if "value" in node}
    log_prob = {name: float(trace.nodes[name]["log_prob"].sum()) for name in GLOBALS}
    mean, sd, relevance = x.mean(0), x.std(0), np.ones(K)
    if prior == "ard":
        relevance = sites["relevance"]
        expected = stats.gamma.logpdf(relevance, 0.5, scale=1000.0).sum()
        assert abs(float(trace.nodes["relevance"]["log_prob"].sum()) - expected) < 1e-6
    scale = sd[:, None] / np.sqrt(relevance)
    assert abs(log_prob["loadings"] - stats.norm.logpdf(sites["loadings"], 0, scale).sum()) < 1e-8
    assert abs(log_prob["loc"] - stats.norm.logpdf(sites["loc"], mean, 10 * sd).sum()) < 1e-8
    rate = 0.1 * (sd**2 if noise == "diagonal" else (sd**2).mean())
    sigma = sites["noise_scale"]
    density = stats.invgamma.logpdf(sigma**2, 1.0, scale=rate) + np.log(2 * sigma)
    assert abs(log_prob["noise_scale"] - density.sum()) < 1e-8


def test_the_prior_of_the_scale_is_that_of_its_square():
    prior = InverseGammaScale(*torch.tensor([2.5, 0.7]).double())
    total, _ = integrate.quad(
        lambda s: float(prior.log_prob(torch.tensor(s).double()).exp()), 0, 60
    )
    assert abs(total - 1) < 1e-6  # the tail decreases as sigma^-6
    with pyro.plate("draws", 20_000):
        pyro.set_rng_seed(0)
        draws = pyro.sample("sigma", prior)
    squares = stats.invgamma(2.5, scale=0.7)
    assert stats.kstest(draws.numpy() ** 2, squares.cdf).pvalue > oracles.FAILURE_RATE
    assert prior.expand((3,)).batch_shape == (3,)


def test_draws_of_the_observed_gaussian_have_its_covariance():
    loadings, loc = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([3.0, -1.0]).double()
    scale = torch.tensor([0.5, 1.0]).double()
    density = ObservedGaussian(loadings, loc, scale)
    pyro.set_rng_seed(0)
    draws = density.rsample((50_000,))
    covariance = oracles.ppca_covariance(loadings.numpy(), (scale**2).numpy())
    found = np.cov(draws.numpy().T)
    # The standard error of a covariance is at most sqrt(2 c_ii c_jj / S).
    error = np.sqrt(2 * np.outer(np.diag(covariance), np.diag(covariance)) / len(draws))
    assert (np.abs(found - covariance) < oracles.z_limit(4) * error).all()
    assert density.expand((5,)).log_prob(draws[:5]).shape == (5,)


# Stock Pyro


@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_stock_svi_with_an_automatic_guide(prior, marginal):
    x = data(N=30)
    values = torch.tensor(x)
    model = like(x, prior=prior, marginal=marginal)
    guide = AutoNormal(model.model, init_scale=0.1)
    pyro.set_rng_seed(0)
    svi = SVI(model.model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    losses = [svi.step(values) for _ in range(80)]
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 20
    assert not dict(model.named_parameters())


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_automatic_guides_of_the_parameters_alone(kind):
    x = data(N=30)
    model = like(x, marginal=True)
    guide = kind(poutine.block(model.model, hide=["z"]))
    pyro.set_rng_seed(0)
    svi = SVI(model.model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(torch.tensor(x)) for _ in range(60)]
    assert np.mean(losses[-20:]) < np.mean(losses[:20])


@pytest.mark.parametrize("prior", PRIORS)
def test_stock_nuts_runs_on_the_program(prior):
    x = data(N=20, D=2)
    model = like(x, 1, prior=prior, marginal=True)
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model.model, max_tree_depth=4), 20, 20, disable_progbar=True)
    mcmc.run(torch.tensor(x))
    draws = mcmc.get_samples()
    assert draws["loadings"].shape == (20, 2, 1)
    assert (draws["noise_scale"] > 0).all()
    # The posterior of mu is near the mean of the data, the prior is ten times as wide.
    assert (draws["loc"].mean(0).numpy() - x.mean(0) < x.std(0)).all()
    assert ("relevance" in draws) == (prior == "ard")


@pytest.mark.parametrize("marginal", [False, True])
def test_predictive_draws_from_prior_and_posterior(marginal):
    x = data()
    model = like(x, marginal=marginal)
    pyro.set_rng_seed(0)
    prior = Predictive(model.model, num_samples=5)(num_data=7)
    assert prior["x"].shape == (5, 7, D) and prior["loadings"].numel() == 5 * D * K
    samples = {name: prior[name] for name in GLOBALS}
    predicted = Predictive(model.model, samples)(torch.tensor(x), observe=False)
    assert predicted["x"].shape == (5, N, D)
    assert not torch.equal(predicted["x"][0], torch.tensor(x))
    observed = Predictive(model.model, samples, return_sites=["x"])(torch.tensor(x))
    assert torch.equal(observed["x"][0], torch.tensor(x))


@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("prior", PRIORS)
def test_draws_in_parallel_equal_single_ones(prior, noise, marginal):
    x = data(missing=True)
    values, mask = tensors(x)
    model = like(x, prior=prior, noise=noise, marginal=marginal)
    pyro.set_rng_seed(0)
    with pyro.plate("draws", 3, dim=-2):
        trace = poutine.trace(model.model).get_trace(values, mask=mask)
    trace.compute_log_prob()
    latents = [n for n in trace.stochastic_nodes if n not in ("draws", "data", "x")]
    assert set(latents) >= set(GLOBALS)
    for s in range(3):
        sites = {name: trace.nodes[name]["value"][s] for name in latents}
        sites = {n: v if n == "z" else v[0] for n, v in sites.items()}
        single = poutine.trace(poutine.condition(model.model, sites)).get_trace(values, mask=mask)
        single.compute_log_prob()
        found, expected = trace.nodes["x"]["log_prob"][s], single.nodes["x"]["log_prob"]
        torch.testing.assert_close(found, expected)
        for name in latents:
            torch.testing.assert_close(
                trace.nodes[name]["log_prob"][s].sum(), single.nodes[name]["log_prob"].sum()
            )


def test_a_minibatch_scales_the_data_and_not_the_parameters():
    x = torch.tensor(data())
    model, rows = like(x), torch.tensor([3, 1, 8])
    trace = poutine.trace(model.model).get_trace(x[rows], index=rows, num_data=N)
    assert trace.nodes["x"]["scale"] == trace.nodes["z"]["scale"] == N / 3
    assert all(trace.nodes[name]["scale"] == 1 for name in GLOBALS)


# Priors


def test_like_has_the_units_and_the_dtype_of_the_data():
    x = data(missing=True).astype(np.float32)
    model = BayesianPPCA.like(x, 2, noise="diagonal", prior="ard")
    assert model.loc_prior.loc.dtype == torch.float32
    np.testing.assert_allclose(model.loc_prior.loc, np.nanmean(x, 0), rtol=1e-6)
    np.testing.assert_allclose(model.loc_prior.scale, 10 * np.nanstd(x, 0), rtol=1e-5)
    with pytest.raises(ValueError, match="latent_dim must be smaller than the rank"):
        BayesianPPCA.like(data(), 4)
    with pytest.raises(ValueError, match="constant columns"):
        BayesianPPCA.like(np.where(np.arange(D) == 1, 1.0, data()), 2)


PRIOR_ERRORS = {
    "improper": (
        dict(loc_prior=dist.ImproperUniform(dist.constraints.real, (), ())),
        ValueError,
        "loc_prior must be a proper distribution",
    ),
    "multivariate": (
        dict(loc_prior=dist.MultivariateNormal(torch.zeros(D), torch.eye(D))),
        ValueError,
        "loc_prior must be univariate",
    ),
    "shape": (
        dict(loadings_prior=dist.Normal(torch.zeros(3), 1.0)),
        ValueError,
        "loadings_prior has batch shape",
    ),
    "support of the noise": (
        dict(noise_prior=dist.Normal(0.0, 1.0)),
        ValueError,
        "noise_prior must have positive numbers",
    ),
    "support of the mean": (
        dict(loc_prior=dist.HalfNormal(1.0)),
        ValueError,
        "loc_prior must have all real numbers",
    ),
    "infinite": (
        dict(loc_prior=dist.Normal(0.0, float("inf"))),
        ValueError,
        "loc_prior has a scale that is not finite",
    ),
    "relevance without ARD": (
        dict(relevance_prior=dist.Gamma(1.0, 1.0)),
        ValueError,
        'relevance_prior is used with prior="ard" only',
    ),
    "ARD with a mean": (
        dict(prior="ard", loadings_prior=dist.Normal(1.0, 1.0)),
        ValueError,
        'prior="ard" needs a normal loadings_prior with mean zero',
    ),
    "ARD of another family": (
        dict(prior="ard", loadings_prior=dist.Laplace(0.0, 1.0)),
        ValueError,
        'prior="ard" needs a normal loadings_prior',
    ),
    "unknown prior": (dict(prior="flat"), ValueError, "prior must be one of 'normal', 'ard'"),
}


@pytest.mark.parametrize("name", PRIOR_ERRORS)
def test_priors_that_are_not_possible_are_refused(name):
    arguments, error, message = PRIOR_ERRORS[name]
    with pytest.raises(error, match=message):
        BayesianPPCA(D, K, **arguments)


def test_a_prior_must_be_a_distribution():
    # The constructor's own check of types would come first here.
    with pytest.raises(TypeError, match="loc_prior must be a distribution of"):
        priors._check_prior("loc", 1.0, (D,), False)


def test_priors_outside_gibbs_sampling_are_named():
    assert BayesianPPCA(D, K).not_conjugate() == ()
    assert BayesianPPCA(D, K, prior="ard").not_conjugate() == ()
    columns = dist.Normal(0.0, torch.tensor([1.0, 2.0]))
    model = BayesianPPCA(
        D,
        K,
        loadings_prior=columns,
        loc_prior=dist.StudentT(3.0, 0.0, 1.0),
        noise_prior=dist.HalfCauchy(1.0),
    )
    assert model.not_conjugate() == ("loadings_prior", "loc_prior", "noise_prior")
    ard = BayesianPPCA(D, K, prior="ard", relevance_prior=dist.HalfNormal(1.0))
    assert ard.not_conjugate() == ("relevance_prior",)


# Representation and files


def test_the_representation_shows_the_priors():
    text = repr(like(data(), prior="ard"))
    assert text.startswith('BayesianPPCA(data_dim=4, latent_dim=2, noise="isotropic"')
    assert "loadings ~ Normal(loc=[0, 0, 0, ...], scale=[" in text
    assert "relevance ~ Gamma(concentration=0.5, rate=0.001)" in text
    assert "noise_scale ~ InverseGammaScale(concentration=1, rate=" in text
    assert max(map(len, text.splitlines())) < 120


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("prior", PRIORS)
def test_a_saved_model_has_its_priors(prior, noise, tmp_path):
    model = like(data(), prior=prior, noise=noise)
    again = load(save(model, tmp_path))
    assert repr(again) == repr(model)
    own, its = model.state_dict(), again.state_dict()
    assert own.keys() == its.keys() and all(torch.equal(own[name], its[name]) for name in own)
    pyro.set_rng_seed(0)
    trace = poutine.trace(model.model).get_trace(torch.tensor(data()))
    replayed = poutine.trace(poutine.replay(again.model, trace)).get_trace(torch.tensor(data()))
    assert trace.log_prob_sum() == replayed.log_prob_sum()


def test_priors_of_other_families_are_saved_too(tmp_path):
    model = BayesianPPCA(
        D, K, loc_prior=dist.StudentT(4.0, 0.0, 2.0), noise_prior=dist.HalfCauchy(2.0)
    )
    again = load(save(model, tmp_path / "known"))
    assert repr(again) == repr(model) and again.noise_prior.family is dist.HalfCauchy
    unusual = BayesianPPCA(D, K, noise_prior=dist.Chi2(3.0))
    with pytest.raises(ValueError, match="pass it as into="):
        load(save(unusual, tmp_path / "unusual"))
