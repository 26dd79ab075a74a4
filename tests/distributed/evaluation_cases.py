"""Evaluations of a whole table, whose rows the processes of the tests share."""

import svi_cases
import torch

from ppl_vae import PPCA, VAE, ExactGuide, elbo, gaps, impute, log_likelihood
from ppl_vae.core import single_process


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
    from ppl_vae.core.processes.ranks import Processes

    if Processes.current().rank != rank:
        return None
    with single_process():
        return exact("log_likelihood", x)


def with_other(x, shift, draws):
    model, guide = exact_pair(x)
    return log_likelihood(model.model, guide, x + shift, draws, seed=0).value


def with_other_parameters(x, seed):
    model = PPCA(x.shape[1], 2, seed=seed).to(x)
    return elbo(model.model, ExactGuide(model), x)


def failing(x):
    pair = svi_cases.Mistaken(x, fails_at=1)
    return elbo(pair.model, pair.guide, x)


def rows_of(x):
    model, guide = exact_pair(x)
    rows = torch.tensor([5, 3, 2, 11, 7])
    return log_likelihood(model.model, guide, x, 5, rows=rows, seed=0).value
