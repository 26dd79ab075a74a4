"""The package's models and guides in the hands of Pyro's own algorithms."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from scipy import stats

import oracles
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, PerDatumGuide
from ppl_vae.likelihoods.discrete import Bernoulli
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.objectives.bounds import ELBO, elbo, log_weights

D, K, N, S = 6, 2, 8, 9


@pytest.fixture
def ppca():
    return PPCA(D, K, seed=0).assign(loc=torch.linspace(-1, 1, D), noise_scale=0.5)


@pytest.fixture
def x(ppca):
    return ppca.sample(N, seed=1)


# Prediction


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("make", [PPCA, VAE.mlp])
def test_prior_predictive(make, parallel):
    model = make(D, K, seed=0).model
    drawn = Predictive(model, num_samples=S, parallel=parallel)(num_data=5)
    assert drawn["x"].shape == (S, 5, D)
    assert drawn["z"].shape == (S, 5, K)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_posterior_predictive_of_a_vae(covariance, parallel):
    vae = VAE.mlp(D, K, hidden=(8,), likelihood=Bernoulli(), covariance=covariance, seed=0)
    x = (torch.randn(N, D, generator=torch.Generator().manual_seed(0)) > 0).float()
    predictive = Predictive(vae.model, guide=vae.guide, num_samples=S, parallel=parallel)
    drawn = predictive(x, observe=False)["x"]
    assert drawn.shape == (S, N, D)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(predictive(x)["x"][0], x)


def test_posterior_predictive_of_ppca_has_the_moments_of_the_oracle(ppca, x):
    S = 2_000
    torch.manual_seed(0)
    predictive = Predictive(ppca.model, guide=ExactGuide(ppca), num_samples=S, parallel=True)
    drawn = predictive(x, observe=False)["x"].numpy()
    loc, W = ppca.loc.detach().numpy(), ppca.loadings.detach().numpy()
    means, covariances = oracles.posterior(x.numpy(), loc, W, 0.25)
    z = drawn - (means @ W.T + loc)
    total = 0.0
    for n in range(N):
        inverse = np.linalg.inv(W @ covariances[n] @ W.T + 0.25 * np.eye(D))
        total += np.einsum("sd,de,se->", z[:, n], inverse, z[:, n])
    chi2 = stats.chi2(S * N * D)
    assert min(chi2.cdf(total), chi2.sf(total)) > oracles.FAILURE_RATE / 2


def test_prior_draws_have_the_marginal_of_the_model(ppca):
    torch.manual_seed(0)
    x = Predictive(ppca.model, num_samples=1)(num_data=2_000)["x"][0].numpy()
    loc, W = ppca.loc.detach().numpy(), ppca.loadings.detach().numpy()
    inverse = np.linalg.inv(oracles.ppca_covariance(W, 0.25))
    total = np.einsum("nd,de,ne->", x - loc, inverse, x - loc)
    chi2 = stats.chi2(x.size)
    assert min(chi2.cdf(total), chi2.sf(total)) > oracles.FAILURE_RATE / 2


# Conditioning and interventions


def test_a_conditioned_model_is_the_model_that_observes(ppca, x):
    torch.manual_seed(0)
    conditioned = poutine.trace(poutine.condition(ppca.model, data={"x": x})).get_trace(num_data=N)
    torch.manual_seed(0)
    observed = poutine.trace(ppca.model).get_trace(x)
    assert conditioned.log_prob_sum() == observed.log_prob_sum()
    assert conditioned.nodes["x"]["is_observed"]


def test_conditioning_on_z_gives_the_density_of_both(ppca, x):
    z = torch.randn(N, K, generator=torch.Generator().manual_seed(2))
    trace = poutine.trace(poutine.condition(ppca.model, data={"z": z})).get_trace(x)
    expected = (
        dist.Normal(0.0, 1.0).log_prob(z).sum()
        + dist.Normal(z @ ppca.loadings.T + ppca.loc, 0.5).log_prob(x).sum()
    )
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_an_intervention_moves_the_output(ppca):
    z = torch.full((4, K), 3.0)
    x = poutine.do(ppca.model, data={"z": z})(num_data=4)
    mean = z @ ppca.loadings.T + ppca.loc
    assert ((x - mean).abs() < oracles.z_limit(x.numel()) * 0.5).all()


# Importance sampling


def test_importance_weights_of_the_exact_guide_are_the_likelihood(ppca, x):
    posterior = Importance(ppca.model, ExactGuide(ppca), num_samples=5).run(x)
    weights = torch.stack([w.detach() for w in posterior.log_weights])
    exact = ppca.log_likelihood(x).sum().detach()
    torch.testing.assert_close(weights, exact.expand(5), rtol=1e-5, atol=1e-4)


# Automatic guides


@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_automatic_guides_fit_the_posterior(guide, ppca, x):
    """The model's parameters are held, so that the posterior is known."""
    for p in ppca.parameters():
        p.requires_grad_(False)
    torch.manual_seed(0)
    automatic = guide(ppca.model, init_scale=0.3)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98})
    svi = SVI(automatic.model, automatic, optimizer, Trace_ELBO())
    for _ in range(200):
        svi.step(x)
    z = automatic.median(x)["z"]
    means, covariances = oracles.posterior(
        x.numpy(), ppca.loc.detach().numpy(), ppca.loadings.detach().numpy(), 0.25
    )
    sd = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))
    assert (np.abs(z.detach().numpy() - means) < 0.5 * sd).all()


def test_log_weights_and_elbo_of_an_automatic_guide(ppca, x):
    guide = AutoNormal(ppca.model)
    guide(x)
    exact = ppca.log_likelihood(x)
    weights = log_weights(ppca.model, guide, x, 3, seed=0)
    values = elbo(ppca.model, guide, x, num_samples=400, seed=0)
    assert weights.shape == (3, N)
    assert (values < exact + 1e-3).all()
    torch.manual_seed(0)
    stock = Trace_ELBO().loss(ppca.model, guide, x)
    torch.manual_seed(0)
    assert ELBO(kl="sampled").loss(ppca.model, guide, x) == pytest.approx(stock, rel=1e-5)


def test_an_automatic_guide_for_a_vae(x):
    vae = VAE.mlp(D, K, hidden=(8,), seed=0)
    guide = AutoNormal(vae.model)
    svi = SVI(vae.model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(30)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


# Markov chains


def nuts(model, x):
    pyro.set_rng_seed(0)
    chain = MCMC(
        NUTS(model, max_tree_depth=4), num_samples=20, warmup_steps=50, disable_progbar=True
    )
    chain.run(x)
    return chain.get_samples()["z"].numpy()


def test_nuts_draws_what_it_draws_from_a_plain_function(ppca, x):
    loadings, loc, x = ppca.loadings.detach().clone(), ppca.loc.detach().clone(), x[:3]

    def plain(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings.T + loc, 0.5).to_event(1), obs=x)

    z = nuts(ppca.model, x)
    np.testing.assert_allclose(z, nuts(plain, x), rtol=1e-4, atol=1e-4)
    means, covariances = oracles.posterior(x.numpy(), loc.numpy(), loadings.numpy(), 0.25)
    distances = np.einsum("snk,nkl,snl->sn", z - means, np.linalg.inv(covariances), z - means)
    assert z.shape == (20, 3, K)
    assert (distances < stats.chi2(K).isf(oracles.FAILURE_RATE / distances.size)).all()
    # A chain that stands still would pass the line above.
    assert (z.std(0) > 0.1 * np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))).all()


# Training


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO, ELBO])
@pytest.mark.parametrize("optimizer", [pyro.optim.Adam, pyro.optim.ClippedAdam])
def test_svi_with_any_objective_and_optimizer(objective, optimizer, x):
    vae = VAE.mlp(D, K, hidden=(8,), seed=0)
    torch.manual_seed(0)
    svi = SVI(vae.model, vae.guide, optimizer({"lr": 0.02}), objective())
    losses = [svi.step(x) for _ in range(40)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_the_exact_guide_climbs_the_exact_likelihood(ppca, x):
    svi = SVI(ppca.model, ExactGuide(ppca), pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
    values = []
    for _ in range(20):
        exact = -ppca.log_likelihood(x).sum().item()
        values.append(exact)
        assert svi.step(x) == pytest.approx(exact, rel=1e-4)
    assert (np.diff(values) < 0).all()


@pytest.mark.parametrize("guide", ["table", "amortized"])
def test_minibatches_with_index_and_num_data(guide, ppca, x):
    guide = PerDatumGuide(N, K) if guide == "table" else AmortizedGuide(mlp(D, 2 * K, seed=0), K)
    svi = SVI(ppca.model, guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    torch.manual_seed(0)
    losses = []
    for _ in range(40):
        index = torch.randperm(N)[:4]
        losses.append(svi.step(x[index], index=index, num_data=N))
    assert np.mean(losses[-8:]) < np.mean(losses[:8])


def test_many_vectorized_particles(x):
    vae = VAE.mlp(D, K, hidden=(8,), seed=0)
    values = []
    for vectorized in (True, False):
        torch.manual_seed(0)
        stock = Trace_ELBO(num_particles=100, vectorize_particles=vectorized, max_plate_nesting=1)
        values.append(stock.loss(vae.model, vae.guide, x))
    with torch.no_grad():
        per_draw = log_weights(vae.model, vae.guide, x, 100, seed=0).sum(1)
    error = 2**0.5 * per_draw.std().item() / 100**0.5
    assert abs(values[0] - values[1]) < oracles.z_limit() * error
