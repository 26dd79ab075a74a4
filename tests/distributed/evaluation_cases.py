"""Evaluations of a whole table, whose rows the processes of the tests share."""

from contextlib import contextmanager

import numpy as np
import svi_cases
import torch
from cases import own_rows

from ppl_vae import PPCA, VAE, ExactGuide, elbo, gaps, impute, log_likelihood
from ppl_vae.core import single_process
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.data.sources import observed_rows
from ppl_vae.inference import fit_vb, sample_posterior
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.models import BayesianPPCA


def exact_pair(x):
    ppca = PPCA(x.shape[1], 2, seed=0).to(x)
    return ppca, ExactGuide(ppca)


def exact(kind, x):
    """Evaluations under the posterior itself, which no draw changes, and draws have no error."""
    model, guide = exact_pair(x)
    if kind == "elbo":
        pair = svi_cases.GivenDraws(x)
        return elbo(pair.model, pair.guide, x, seed=0)
    if kind == "impute":
        found = impute(model.model, guide, x, 10_000, seed=0)
        return found.mean
    if kind == "gaps":
        found = gaps(model.model, guide, x, steps=2, num_samples=10, tolerance=None, seed=0)
        return found.elbo
    return log_likelihood(model.model, guide, x, 10, seed=0).value


def sampled(x):
    """Evaluations by random draws."""
    model, guide = exact_pair(x)
    bound = elbo(model.model, guide, x, num_samples=200, seed=0)
    found = log_likelihood(model.model, guide, x, 50, method="prior", seed=0)
    filled = impute(model.model, guide, x, 50, draws=3, seed=0)
    return bound, found.value, found.standard_error, filled.mean, filled.draws


def unseeded(x):
    vae = VAE.like(x, 2, hidden=(8,), seed=0)
    return elbo(vae.model, vae.guide, x)


def alone_on_rank(rank, x):
    if Processes.current().rank != rank:
        return None
    with single_process():
        return exact("log_likelihood", x)


def drawn_posterior(x, scale=1.0):
    """Draws of the parameters of PPCA, the same on all processes."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return scale * torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)

    width = x.shape[1]
    draws = {"loadings": normal(width, 2), "loc": normal(width), "noise_scale": normal().exp()}
    model = BayesianPPCA(width, 2).to(x)
    return PosteriorSamples(draws, "none", 0.0, len(x), model=model)


def from_posterior(x, draws=0, num_samples=6, scale=1.0, seed=0):
    posterior = drawn_posterior(x, scale)
    options = {"posterior": posterior, "draws": draws, "quantiles": (0.1, 0.9), "seed": seed}
    return impute(posterior.model.model, None, x, num_samples, **options)


def moments_from_posterior(x):
    found = from_posterior(x, draws=2)
    return found.mean, found.sd, found.quantiles, found.draws


def call(kind, x, shift=0.0, parameter_seed=0, **options):
    """A function of this name, with other arguments on some process."""
    x = x + shift
    bayesian = BayesianPPCA(x.shape[1], 2).to(x)
    quiet = {"progress": False, "num_samples": 4, "warmup": 2, "chains": 2}
    model = PPCA(x.shape[1], 2, seed=parameter_seed).to(x)
    pair = model.model, ExactGuide(model)
    functions = {
        "log_likelihood": lambda: log_likelihood(*pair, x, **{"num_samples": 5} | options),
        "elbo": lambda: elbo(*pair, x, **options),
        "gaps": lambda: gaps(*pair, x, **{"steps": 2, "num_samples": 10} | options),
        "impute": lambda: impute(*pair, x, **{"num_samples": 5} | options),
        "impute from a posterior": lambda: from_posterior(x, **options),
        "fit_vb": lambda: fit_vb(bayesian, own_rows(x, None), **options),
        "sample_posterior": lambda: sample_posterior(
            bayesian, own_rows(x, None), **quiet | options
        ),
    }
    functions[kind]()


def call_kw(kind, x, options):
    call(kind, x, **options)


def elbo_of_file(path):
    """The ELBO of rows that are read in blocks."""
    x = np.memmap(path, np.float64, "r").reshape(31, 7)
    vae = VAE.mlp(7, 2, hidden=(4,), seed=0).double()
    with unloaded():
        return elbo(vae.model, vae.guide, x, seed=0)


@contextmanager
def unloaded():
    """Context manager: no source is loaded into memory."""
    before = observed_rows.LOADED_NUMBERS
    observed_rows.LOADED_NUMBERS = 0
    try:
        yield
    finally:
        observed_rows.LOADED_NUMBERS = before


def failing(x):
    pair = svi_cases.Mistaken(x, fails_at=1)
    return elbo(pair.model, pair.guide, x)


def rows_of(x):
    model, guide = exact_pair(x)
    rows = torch.tensor([5, 3, 2, 11, 7])
    return log_likelihood(model.model, guide, x, 5, rows=rows, seed=0).value
