"""The sampler that ``sample_posterior`` chooses, and what it refuses."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_vae.inference.mcmc import sampling
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.inference.mcmc.sampling import sample_posterior
from ppl_vae.models.bayesian_ppca import BayesianPPCA


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(20, 3))


def short(model, x, **options):
    return sample_posterior(
        model, x, num_samples=4, warmup=2, chains=2, seed=0, progress=False, **options
    )


def test_conjugate_priors_are_sampled_by_gibbs(x):
    model = BayesianPPCA.like(x, 1)
    samples = short(model, x)
    assert samples.sampler == "Gibbs" and samples.num_chains == 2 and samples.num_samples == 4
    assert samples.num_data == 20 and samples.model is model
    by_method = short(model.model, x)
    assert all(torch.equal(by_method.draws[k], v) for k, v in samples.draws.items())


def test_other_priors_are_sampled_by_nuts_with_a_note(x, monkeypatch):
    model = BayesianPPCA(3, 1, noise_prior=dist.HalfNormal(1.0))

    def sample_nuts(given, rows, mask, settings, sampler):
        assert given is model and rows is x and mask is None and settings.chains == 2
        return PosteriorSamples({"loc": torch.zeros(2, 4, 3)}, "NUTS", 0.0, len(rows))

    monkeypatch.setattr(sampling, "sample_nuts", sample_nuts)
    samples = short(model, x)
    assert "sampled by NUTS, because priors are not conjugate: noise_prior" in samples.notes


def test_missing_values_by_mask_and_by_nan(x):
    mask = np.random.default_rng(0).random(x.shape) > 0.3
    mask[:, 0] = True
    model = BayesianPPCA.like(x, 1, mask=mask)
    first, second = short(model, x, mask=mask), short(model, np.where(mask, x, np.nan))
    assert all(torch.equal(first.draws[k], second.draws[k]) for k in first.draws)


def test_progress_is_reported(x):
    reports = []
    sample_posterior(
        BayesianPPCA.like(x, 1),
        x,
        num_samples=60,
        warmup=60,
        seed=0,
        progress=lambda step, value: reports.append((step, value)),
    )
    steps, values = zip(*reports, strict=True)
    assert len(steps) >= 2 and np.isfinite(values).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"sampler": "hmc"},
            "sampler must be one of 'auto', 'gibbs', 'nuts', 'nutpie'; got 'hmc'",
        ),
        ({"num_samples": 0}, "num_samples must be a whole number >= 4; got 0"),
        ({"chains": 0}, "chains must be a whole number >= 1; got 0"),
        ({"warmup": -1}, "warmup must be a whole number >= 0; got -1"),
    ],
)
def test_wrong_arguments_are_named(x, options, said):
    with pytest.raises(ValueError, match=said):
        sample_posterior(BayesianPPCA.like(x, 1), x, **options)


def test_gibbs_sampling_of_another_program_is_refused(x):
    def model(x=None, num_data=None):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"sampler='gibbs' needs a BayesianPPCA.*sampler='nuts'"):
        short(model, x, sampler="gibbs")
    # A condition makes it another program.
    conditioned = pyro.poutine.condition(
        BayesianPPCA.like(x, 1).model, data={"noise_scale": torch.tensor(1.0)}
    )
    with pytest.raises(ValueError, match="sampler='gibbs' needs a BayesianPPCA"):
        short(conditioned, x, sampler="gibbs")
