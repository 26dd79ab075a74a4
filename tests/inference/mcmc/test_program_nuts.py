"""NUTS over all latent sites of a program, against exact posteriors."""

import importlib.util

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_vae import sample_posterior
from ppl_vae.inference.mcmc.program_nuts import sample_program
from ppl_vae.inference.mcmc.settings import ChainSettings
from ppl_vae.models.bayesian_ppca import BayesianPPCA

X = torch.tensor([[1.2], [-0.3], [0.8], [2.1], [0.4]], dtype=torch.float64)


def hierarchical(x):
    """mu ~ N(0, 4), z_n ~ N(mu, 1), x_n ~ N(z_n, 0.25)."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.5).to_event(1), obs=x)


def with_scale(x):
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2).double()).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(2).double(), scale).to_event(1), obs=x)


def exact_hierarchical():
    """Mean and covariance of (mu, z) given x."""
    size = len(X) + 1
    precision = torch.zeros(size, size, dtype=torch.float64)
    precision[0, 0] = 0.25 + len(X)
    precision[0, 1:] = precision[1:, 0] = -1
    precision[1:, 1:] = torch.eye(len(X), dtype=torch.float64) * (1 + 4)
    score = torch.cat([torch.zeros(1).double(), 4 * X[:, 0]])
    covariance = precision.inverse()
    return covariance @ score, covariance


@pytest.mark.slow
def test_draws_of_globals_and_locals_have_the_exact_moments():
    samples = sample_program(
        hierarchical,
        X,
        settings=ChainSettings(num_samples=200, warmup=100, chains=2, seed=0, progress=False),
    )
    mean, covariance = exact_hierarchical()
    assert samples.draws["mu"].shape == (2, 200)
    assert samples.draws["z"].shape == (2, 200, 5)
    draws = torch.cat([samples.draws["mu"].unsqueeze(-1), samples.draws["z"]], -1)
    deviation = covariance.diagonal().sqrt()
    for power, expected in ((1, torch.zeros(6).double()), (2, torch.ones(6).double())):
        values = ((draws - mean) / deviation) ** power
        ess = pyro.ops.stats.effective_sample_size(values, chain_dim=0, sample_dim=1)
        z = (values.mean((0, 1)) - expected) / (values.flatten(0, 1).std(0) / ess.sqrt())
        assert z.abs().max() < 4
    assert samples.notes == ("sampled are all latent sites of the model: mu, z",)


def short(model, x=X, sampler="nuts"):
    settings = ChainSettings(num_samples=4, warmup=6, chains=2, seed=0, progress=False)
    return sample_program(model, x, settings=settings, sampler=sampler)


def test_a_program_that_branches_on_values_is_run_itself():
    def branching(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 2.0))
        spread = 0.5 if float(mu.detach()) > -100 else 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu.expand(len(x), 1), spread).to_event(1), obs=x)

    def pure(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu.expand(len(x), 1), 0.5).to_event(1), obs=x)

    assert torch.equal(short(branching).draws["mu"], short(pure).draws["mu"])


def test_sites_keep_their_supports_and_generators_their_states():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = short(with_scale, x)
    assert (samples.draws["scale"] > 0).all()
    assert torch.equal(torch.get_rng_state(), before)
    assert not pyro.get_param_store().keys()
    assert torch.equal(samples.draws["scale"], short(with_scale, x).draws["scale"])


def test_discrete_sites_are_refused_by_name():
    def mixture(x):
        with pyro.plate("data", len(x)):
            which = pyro.sample("which", dist.Bernoulli(0.5 * torch.ones(len(x)).double()))
            pyro.sample("x", dist.Normal(which.unsqueeze(-1), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"discrete sites of the model: \['which'\]"):
        short(mixture)


def test_a_program_without_latent_sites_is_refused():
    def fixed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="no latent site"):
        short(fixed)


def test_sample_posterior_takes_any_program():
    samples = sample_posterior(
        hierarchical, X, num_samples=4, warmup=6, chains=1, seed=0, progress=False
    )
    assert samples.draws["z"].shape == (1, 4, 5)
    assert samples.sampler == "NUTS"


def test_missing_nutpie_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"ppl_vae\[mcmc\]"):
        short(hierarchical, sampler="nutpie")


@pytest.mark.skipif(importlib.util.find_spec("nutpie") is None, reason="nutpie is not installed")
def test_nutpie_samples_the_same_posterior():
    samples = sample_program(
        hierarchical,
        X,
        sampler="nutpie",
        settings=ChainSettings(num_samples=300, warmup=200, chains=2, seed=0, progress=False),
    )
    mean, covariance = exact_hierarchical()
    mu = samples.draws["mu"]
    ess = pyro.ops.stats.effective_sample_size(mu, chain_dim=0, sample_dim=1)
    assert abs(mu.mean() - mean[0]) < 4 * covariance[0, 0].sqrt() / ess.sqrt()
    assert samples.divergences == 0


@pytest.mark.skipif(importlib.util.find_spec("nutpie") is None, reason="nutpie is not installed")
def test_nutpie_repeats_with_a_seed():
    x = np.random.default_rng(0).normal(size=(12, 4))
    first, second = (
        sample_posterior(
            BayesianPPCA.like(x, 1),
            x,
            sampler="nutpie",
            num_samples=5,
            warmup=10,
            chains=2,
            seed=1,
            progress=False,
        )
        for _ in range(2)
    )
    assert torch.equal(first.draws["loadings"], second.draws["loadings"])
    assert first.sampler == "NUTS of nutpie on the integrated likelihood"
