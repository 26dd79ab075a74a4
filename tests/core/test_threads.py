"""Fits and evaluations in threads of one process have the results that they have alone."""

import os
import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Distribution

import oracles
from killed import completed
from ppl_vae.core.state import exclusive, isolated_store, seeded
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.models.vae import VAE
from ppl_vae.objectives.bounds import elbo

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
