"""Fits and evaluations in threads of one process have the results that they have alone."""

import os
import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Distribution

import oracles
from killed import completed
from ppl_vae.core.results import Result
from ppl_vae.core.state import exclusive, isolated_store, seeded
from ppl_vae.evaluation.inference_gaps.gaps import gaps
from ppl_vae.evaluation.latent_space.collapse import collapse
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.evaluation.marginal_likelihood.bidirectional import bidirectional
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.evaluation.prediction.imputation import impute
from ppl_vae.evaluation.prediction.masked_cv import select_by_masked_cv
from ppl_vae.inference.em.fit import fit_closed_form, fit_em
from ppl_vae.inference.mcmc.sampling import sample_posterior
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.inference.variational_bayes.fit import fit_vb
from ppl_vae.interop.arviz import to_arviz
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.objectives.bounds import elbo, log_weights

X = oracles.simulate_ppca((4.0, 2.0), 1.0, 40, 5, seed=0)


def vae():
    return VAE.mlp(5, 2, hidden=(4,), seed=0).double()


def fitted(seed):
    model = vae()
    options = {"steps": 40, "batch_size": 8, "lr": 0.01, "progress": False, "capture": False}
    fit_svi(model.model, model.guide, X, seed=seed, x_val=X[:7], **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def estimated(seed):
    model = vae()
    return log_likelihood(model.model, model.guide, X, num_samples=50, seed=seed).value


def bound(seed):
    model = vae()
    return elbo(model.model, model.guide, X, num_samples=20, seed=seed)


def sampled(seed):
    return vae().sample(50, seed=seed)


WORK = (fitted, estimated, bound, sampled, fitted)


def in_threads(functions):
    """The results of functions that are called at once, each in a thread of its own."""
    results, start = [None] * len(functions), threading.Barrier(len(functions))

    def run(number, function):
        start.wait()
        try:
            results[number] = function()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def global_state():
    flags = Distribution._validate_args, torch.get_num_threads()
    return str(torch.get_rng_state()), str(np.random.get_state()), random.getstate(), flags


def test_each_thread_has_the_result_that_it_has_alone():
    functions = [partial(work, seed) for seed, work in enumerate(WORK)]
    alone = [function() for function in functions]
    before = torch.get_rng_state(), global_state()
    for expected, result in zip(alone, in_threads(functions), strict=True):
        assert isinstance(result, torch.Tensor), result
        assert torch.equal(expected, result)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == global_state()


# Pairs of entry points


def contents(value):
    """What two equal results have in common: not their times."""
    if isinstance(value, dict):
        times = {"seconds", "elapsed", "execution"}
        return {name: contents(part) for name, part in value.items() if name not in times}
    if isinstance(value, list | tuple):
        return [contents(part) for part in value]
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value


def text_of(result):
    """A result as text, with all digits."""
    if isinstance(result, nn.Module):
        result = result.state_dict()
    return repr(contents(result.to_dict() if isinstance(result, Result) else result))


def fitted_to(fit, x, **options):
    model = PPCA(5, 2, seed=0).double()
    return contents(fit(model, x, **options).to_dict()), contents(dict(model.state_dict()))


def posterior(seed):
    model, options = BayesianPPCA.like(X, 2), {"warmup": 5, "chains": 2, "progress": False}
    return sample_posterior(model, X, num_samples=10, seed=seed, **options).draws


def on_pair(function, *arguments, **options):
    """An entry point that takes a pair, on a model of its own."""

    def run(seed):
        model = vae()
        return function(model.model, model.guide, *arguments, seed=seed, **options)

    return run


def drawn(seed):
    with seeded(seed):
        return torch.rand(3), np.random.rand(3), random.random()


INCOMPLETE = X.copy()
INCOMPLETE[::7, 1] = np.nan
ENTRIES = {
    "fit_svi": fitted,
    "sample": sampled,
    "log_likelihood": on_pair(log_likelihood, X, num_samples=50),
    "log_likelihood, refined": on_pair(log_likelihood, X, num_samples=10, refine=3),
    "elbo": on_pair(elbo, X, num_samples=20),
    "log_weights": on_pair(log_weights, X, 5),
    "impute": on_pair(impute, INCOMPLETE, num_samples=20),
    "gaps": on_pair(gaps, X[:6], steps=10, num_samples=50),
    "collapse": on_pair(collapse, X),
    "bidirectional": on_pair(bidirectional, X[:4], 4, annealing=Annealing(5)),
    "fit_em": lambda seed: fitted_to(fit_em, X),
    "fit_em, missing values": lambda seed: fitted_to(fit_em, INCOMPLETE),
    "fit_closed_form": lambda seed: fitted_to(fit_closed_form, X),
    "fit_vb": lambda seed: fit_vb(BayesianPPCA.like(X, 2), X, seed=seed).guide,
    "sample_posterior": posterior,
    "select_by_masked_cv": lambda seed: select_by_masked_cv(X, latent_dims=[1, 2], seed=seed),
    "reconstruct": lambda seed: vae().reconstruct(X),
    "to_arviz": lambda seed: str(to_arviz(*pair(), X, num_samples=8, seed=seed)),
    "seeded": drawn,
}


def pair():
    model = vae()
    return model.model, model.guide


def check_pair(names):
    """Two entry points at once, each twice, have the results that they have alone."""
    functions = [partial(ENTRIES[name], seed) for seed, name in enumerate((*names, *names))]
    alone = [text_of(function()) for function in functions]
    before = global_state()
    for name, expected, result in zip(names * 2, alone, in_threads(functions), strict=True):
        assert not isinstance(result, BaseException), (name, result)
        assert text_of(result) == expected, (names, name)
    assert before == global_state()


PAIRS = [tuple(random.Random(seed).sample(sorted(ENTRIES), 2)) for seed in range(24)]


@pytest.mark.parametrize("names", PAIRS[:3], ids=" and ".join)
def test_two_entry_points_at_once(names):
    check_pair(names)


@pytest.mark.slow
@pytest.mark.parametrize("names", PAIRS[3:], ids=" and ".join)
def test_further_pairs_of_entry_points_at_once(names):
    check_pair(names)


def test_one_model_is_evaluated_in_two_threads():
    model = vae()
    functions = [
        lambda: log_likelihood(model.model, model.guide, X, seed=0, num_samples=9).value,
        lambda: elbo(model.model, model.guide, X, seed=1),
        lambda: model.sample(5, seed=2),
        lambda: model.reconstruct(X),
    ]
    alone = [function() for function in functions]
    for expected, result in zip(alone * 2, in_threads(functions * 2), strict=True):
        assert torch.equal(expected, result)


def test_a_thread_waits_for_another_that_is_inside():
    inside, finished = threading.Event(), threading.Event()
    order = []

    def first():
        with seeded(0):
            inside.set()
            finished.wait(0.3)
            order.append("first")

    def second():
        inside.wait()
        with isolated_store():
            order.append("second")

    in_threads([first, second])
    assert order == ["first", "second"]


def test_blocks_may_be_nested_in_one_thread():
    with exclusive(), seeded(0), exclusive(), isolated_store(), seeded(None):
        assert sampled(0).shape == (50, 5)


def test_an_error_lets_other_threads_go_on():
    def failing():
        with seeded(0), isolated_store():
            raise KeyError

    results = in_threads([failing, failing, partial(sampled, 0)])
    assert sorted(type(result).__name__ for result in results) == [
        "KeyError",
        "KeyError",
        "Tensor",
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent():
    inside, finished = threading.Event(), threading.Event()

    def hold():
        with seeded(0):
            inside.set()
            finished.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        assert completed(lambda: sampled(0)) == 0
    finally:
        finished.set()
        thread.join()
    with seeded(1):  # in the thread that forks
        assert completed(lambda: sampled(0)) == 0
