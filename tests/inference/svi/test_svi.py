"""Stochastic variational inference: optima, any pair, minibatches, stopping, what is refused."""

import copy
import functools
import itertools
import json
import random

import combinations
import numpy as np
import oracles
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import user_pairs
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from ppl_vae.core.introspection import modules_of
from ppl_vae.evaluation.latent_space.subspace import subspace
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, PerDatumGuide
from ppl_vae.inference.em.fit import fit_closed_form
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.inference.svi.trainer import VALIDATION_DRAWS, VALIDATION_SEED
from ppl_vae.likelihoods.discrete import Bernoulli
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.objectives.bounds import ELBO, IWAE, elbo

SPECTRUM, NOISE, N, D, K = (16.0, 8.0, 4.0), 1.0, 500, 10, 3


@pytest.fixture
def x():
    return oracles.simulate_ppca(SPECTRUM, NOISE, N, D, seed=0)


@pytest.fixture
def small():
    return oracles.simulate_ppca(SPECTRUM, NOISE, 40, D, seed=0)


def linear_pair(x, latent_dim=K, seed=0):
    """PPCA and a guide whose family contains the posterior if the columns of W are orthogonal."""
    ppca = PPCA.like(x, latent_dim, seed=seed)
    encoder = mlp(x.shape[1], latent_dim, seed=seed)
    return ppca, AmortizedGuide(encoder, latent_dim, homoscedastic=True).double()


def small_vae(data_dim=D, latent_dim=2, seed=0, **options):
    return VAE.mlp(data_dim, latent_dim, hidden=(6,), seed=seed, **options).double()


def values_of(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def all_differ(first, second):
    return not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Callback:
    """A scheduler that calls a function after every step."""

    def __init__(self, call):
        self.step = call


def after_each_step(call):
    return lambda optimizer: Callback(call)


# Optima


GUIDES = {
    "linear amortized": lambda ppca, seed: AmortizedGuide(
        mlp(D, K, seed=seed), K, homoscedastic=True
    ).double(),
    "per datum": lambda ppca, seed: PerDatumGuide(N, K).double(),
    "exact": lambda ppca, seed: ExactGuide(ppca),
}


def gap_and_comparison(x, name, seed=0, **options):
    """The gap of SVI to the closed form in nats per datum, and the comparison of the subspaces."""
    ppca, best = PPCA.like(x, K, seed=seed), PPCA.like(x, K, seed=0)
    fit_closed_form(best, x)
    fit_svi(
        ppca.model, GUIDES[name](ppca, seed), x, scheduler=CosineAnnealingLR, seed=seed, **options
    )
    parameters = [p.detach().numpy() for p in (ppca.loc, ppca.loadings, ppca.noise_scale.square())]
    truth = oracles.closed_form_log_likelihood(oracles.sample_spectrum(x)[0], K)
    return truth - oracles.mean_log_density(x, *parameters), subspace(best, ppca)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("linear amortized", 600), ("per datum", 1000)],
)
@pytest.mark.slow
def test_svi_converges_to_the_closed_form(name, steps, x):
    gap, comparison = gap_and_comparison(x, name, lr=0.1, steps=steps)
    assert 0 <= gap < 0.01
    assert comparison.largest_angle < 1
    assert comparison.axis_angles.max() < 12


def test_svi_with_the_exact_guide_converges_to_the_closed_form(x):
    # A full covariance is exact for every rotation of W, so its axes are arbitrary.
    gap, comparison = gap_and_comparison(x, "exact", lr=0.1, steps=300, batch_size=100)
    assert 0 <= gap < 0.01
    assert comparison.largest_angle < 1


@pytest.mark.slow
def test_svi_on_minibatches_converges_to_the_closed_form(x):
    gap, comparison = gap_and_comparison(x, "linear amortized", lr=0.05, steps=900, batch_size=100)
    assert 0 <= gap < 0.01
    assert comparison.axis_angles.max() < 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["linear amortized", "per datum"])
def test_svi_converges_to_the_closed_form_from_other_initial_values(name, seed, x):
    gap, comparison = gap_and_comparison(x, name, seed, lr=0.1, steps=6000)
    assert 0 <= gap < 0.01
    assert comparison.axis_angles.max() < 12


@pytest.mark.parametrize(
    "likelihood",
    [lambda: Gaussian("shared"), lambda: Gaussian(0.7), Bernoulli],
    ids=["shared", "fixed", "Bernoulli"],
)
def test_a_vae_trains(likelihood, small):
    x = small if likelihood is not Bernoulli else (small > small.mean(0)).astype(float)
    vae = small_vae(likelihood=likelihood())
    before = values_of(vae)
    result = fit_svi(vae.model, vae.guide, x, lr=0.03, steps=100, seed=0)
    assert result.objective[-20:].mean() > result.objective[:20].mean() + 0.1
    assert all_differ(before, values_of(vae))


def test_the_objective_of_the_exact_guide_is_the_log_likelihood(small):
    ppca = PPCA.like(small, K, seed=0)
    start = float(ppca.log_likelihood(small).detach().mean())
    sampled = ELBO(kl="sampled")
    result = fit_svi(ppca.model, ExactGuide(ppca), small, objective=sampled, steps=3, seed=0)
    assert float(result.objective[0]) == pytest.approx(start, rel=1e-12)
    assert result.objective[2] > result.objective[1] > result.objective[0]


def test_the_reported_objective_is_the_elbo_per_datum_for_any_batch_size(small):
    """With a vanishing learning rate its mean over an epoch is the ELBO of the data."""
    ppca, guide = linear_pair(small)
    truth = elbo(ppca.model, guide, small, num_samples=4000, seed=1)
    for batch_size in (None, 10):
        result = fit_svi(
            ppca.model, guide, small, batch_size=batch_size, lr=1e-12, epochs=40, seed=0
        )
        error = result.objective.std() / len(result.objective) ** 0.5
        z = (result.objective.mean() - truth.mean()) / error
        assert abs(z) < oracles.z_limit(2)


# Any pair


def run_once(model, guide, x):
    """The parameters of the store and of the modules that a pair reads when it runs."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()), torch.random.fork_rng(), torch.no_grad():
        modules = modules_of(model, guide)
        training = [part.training for module in modules for part in module.modules()]
        for module in modules:
            module.eval()
        trace = poutine.trace(guide).get_trace(x)
        poutine.replay(model, trace=trace)(x)
        found = {name: p.detach().clone() for name, p in store.named_parameters()}
        for i, module in enumerate(modules):
            found |= {(i, name): p.detach().clone() for name, p in module.named_parameters()}
        for part, flag in zip((p for m in modules for p in m.modules()), training, strict=True):
            part.training = flag
    return found


def generators():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize(
    ("name", "batch_size"), combinations.one_in(2, user_pairs.PAIRS, [None, 7])
)
def test_every_pair_trains_without_side_effects(name, batch_size, float64):
    model, guide, x = user_pairs.PAIRS[name]()
    pyro.module("other", nn.Linear(2, 2))
    kept = {key: id(p) for key, p in pyro.get_param_store().named_parameters()}
    before, states = run_once(model, guide, x), generators()
    result = fit_svi(model, guide, x, lr=0.03, steps=40, batch_size=batch_size, seed=0)
    assert generators() == states
    assert result.objective[-10:].mean() > result.objective[:10].mean()
    stored = {key: id(p) for key, p in pyro.get_param_store().named_parameters()}
    bare = {"W", "loc", "psi", "V", "scale"} if name == "param_only" else set()
    assert stored.keys() == kept.keys() | bare
    assert {key: stored[key] for key in kept} == kept
    after = run_once(model, guide, x)
    still = {key for key in before if torch.equal(before[key], after[key])}
    # One weight of "functions" is frozen.
    assert still == {
        key
        for key, value in before.items()
        if "other" in str(key) or (name == "functions" and value.shape == (1, 1))
    }


def test_parameters_of_another_pair_in_the_store_are_ignored(float64, small):
    model, guide, x = user_pairs.param_only()
    fit_svi(model, guide, x, steps=3, seed=0)
    left = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    ppca, guide = linear_pair(small)
    assert fit_svi(ppca.model, guide, small, steps=3, seed=0).steps == 3
    for name, value in pyro.get_param_store().items():
        assert torch.equal(value, left[name])


def test_bare_parameters_stay_in_the_store_and_continue_to_train(float64):
    model, guide, x = user_pairs.param_only()
    first = fit_svi(model, guide, x, lr=0.05, steps=100, seed=0)
    trained = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    assert set(trained) == {"W", "loc", "psi", "V", "scale"}
    assert (trained["psi"] > 0).all()
    second = fit_svi(model, guide, x, lr=1e-9, steps=100, seed=0)
    assert second.objective.mean() > first.objective[:20].mean() + 1
    for name, value in pyro.get_param_store().items():
        torch.testing.assert_close(value, trained[name], atol=1e-6, rtol=0)


OBJECTIVES = {
    "IWAE": IWAE(4),
    "three draws": ELBO(3),
    "beta": ELBO(beta=0.5),
    "sticking_the_landing": ELBO(2, gradient="stl"),
    "score": ELBO(2, gradient="score-loo"),
    "DReG": IWAE(3, gradient="dreg"),
    "stock": Trace_ELBO(),
}


@pytest.mark.parametrize(
    ("name", "objective"), combinations.one_in(3, user_pairs.PAIRS, OBJECTIVES)
)
def test_every_pair_trains_with_every_objective(name, objective, float64):
    model, guide, x = user_pairs.PAIRS[name]()
    result = fit_svi(model, guide, x, objective=OBJECTIVES[objective], lr=0.01, steps=2, seed=0)
    assert result.objective.isfinite().all()
    assert len(result.objective) == 2


@pytest.mark.parametrize("make", [user_pairs.param_table, user_pairs.auto_normal])
def test_user_written_per_datum_parameters_train(make, float64):
    model, guide, x = make()
    result = fit_svi(model, guide, x, lr=0.05, steps=80, seed=0)
    assert result.objective[-20:].mean() > result.objective[:20].mean()


def test_training_modes_and_buffers_are_preserved(float64):
    model, guide, x = user_pairs.regularized()
    module = model.__self__
    module.decoder.eval()
    flags = [part.training for part in module.modules()]
    norm = next(part for part in module.modules() if isinstance(part, nn.BatchNorm1d))
    fit_svi(model, guide, x, steps=5, seed=0, x_val=x[:6])
    assert [part.training for part in module.modules()] == flags
    # One update per step: neither the search for parameters nor validation counts.
    assert int(norm.num_batches_tracked) == 5


# Trained parameters


class Headed(nn.Module):
    """An encoder with an unused head."""

    def __init__(self):
        super().__init__()
        self.body, self.spare = nn.Linear(D, 2 * K), nn.Linear(D, 2)

    def forward(self, x):
        return self.body(x)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(D, 2 * K)

    def forward(self, x):
        return self.body(x).detach()


@pytest.mark.parametrize(
    ("encoder", "parameter"),
    [(Headed, "encoder.spare.weight"), (Detached, "encoder.body.weight")],
)
def test_a_parameter_that_would_not_train_is_named(encoder, parameter, small):
    ppca = PPCA.like(small, K, seed=0)
    guide = AmortizedGuide(encoder(), K).double()
    before = values_of(ppca, guide)
    with pytest.raises(ValueError, match=f"would not train: .*{parameter}.*requires_grad_"):
        fit_svi(ppca.model, guide, small, steps=3, seed=0)
    assert same(before, values_of(ppca, guide))


def test_a_parameter_in_the_store_that_would_not_train_is_named(float64):
    model, guide, x = user_pairs.param_only()

    def with_spare(x):
        pyro.param("spare", torch.ones(2))
        return guide(x)

    with pytest.raises(ValueError, match=r"would not train: \['spare'\]"):
        fit_svi(model, with_spare, x, steps=3, seed=0)


def test_frozen_parameters_are_allowed_and_do_not_change(small):
    vae = small_vae()
    vae.decoder.requires_grad_(False)
    frozen, free = values_of(vae.decoder), values_of(vae.guide)
    fit_svi(vae.model, vae.guide, small, lr=0.05, steps=3, seed=0)
    assert same(frozen, values_of(vae.decoder))
    assert all_differ(free, values_of(vae.guide))
    assert not any(p.requires_grad for p in vae.decoder.parameters())


def test_colliding_names_are_rejected_every_time(float64):
    model, guide, x = user_pairs.colliding_names()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'.*noise_unconstrained' was replaced by another"):
            fit_svi(model, guide, x, steps=3, seed=0)


def test_a_pair_without_parameters_is_rejected(float64):
    model, guide = user_pairs.without_parameters()
    with pytest.raises(ValueError, match="the pair has no parameters to fit"):
        fit_svi(model, guide, torch.zeros(4, 2), steps=3)


def test_a_loss_that_depends_on_no_parameter_is_rejected(small):
    vae = small_vae(likelihood=Gaussian(1.0))

    def detached(x, **_):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            loc = vae.decode(z).mean.detach()
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x, **_):
        with pyro.plate("data", len(x)), torch.no_grad():
            pyro.sample("z", vae.guide.distribution(x))

    with pytest.raises(ValueError, match="the loss depends on no parameter"):
        fit_svi(detached, guide, torch.from_numpy(small), steps=3)


# Minibatches


def changed_rows(guide, x, model, **options):
    """Which rows of the guide's means and log-variances changed in each step."""
    tables, changes = list(guide.parameters()), []
    last = values_of(guide)

    def compare():
        nonlocal last
        current = [t.detach().clone() for t in tables]
        changes.append([(a != b).any(1) for a, b in zip(last, current, strict=True)])
        last = current

    fit_svi(model, guide, x, scheduler=after_each_step(compare), seed=0, lr=0.05, **options)
    return changes


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam,
        torch.optim.RMSprop,
        functools.partial(torch.optim.SGD, momentum=0.9),
        functools.partial(torch.optim.AdamW, weight_decay=0.1),
    ],
    ids=["Adam", "RMSprop", "momentum", "weight decay"],
)
def test_a_minibatch_updates_only_its_own_rows(optimizer, small):
    ppca, guide = PPCA.like(small, K, seed=0), PerDatumGuide(40, K).double()
    changes = changed_rows(guide, small, ppca.model, optimizer=optimizer, batch_size=15, epochs=4)
    for epoch in (changes[i : i + 3] for i in range(0, 12, 3)):
        rows = [step[0] for step in epoch]
        assert [int(r.sum()) for r in rows] == [15, 15, 10]
        assert torch.stack(rows).sum(0).eq(1).all()  # each datum once per epoch
        for loc, raw in epoch:
            assert torch.equal(loc, raw)
    orders = [torch.stack([step[0] for step in changes[i : i + 3]]) for i in (0, 3)]
    assert not torch.equal(*orders)  # in a new order every epoch


def test_the_moments_of_a_row_change_only_with_its_batch(small):
    """The moments of a row that is not in the batch do not decay."""
    ppca, guide = PPCA.like(small, K, seed=0), PerDatumGuide(40, K).double()
    made, states = [], []

    def optimizer(parameters, lr):
        made.append(torch.optim.Adam(parameters, lr=lr))
        return made[-1]

    def store():
        state = made[-1].state[guide.loc]
        states.append(
            [state[key].clone() for key in ("exp_avg", "exp_avg_sq")] + [guide.loc.clone()]
        )

    options = {"optimizer": optimizer, "scheduler": after_each_step(store), "lr": 0.05, "seed": 0}
    fit_svi(ppca.model, guide, small, batch_size=10, epochs=2, **options)
    first, last = states[0], states[3]
    assert (first[0] != 0).any(1).sum() == (first[1] != 0).any(1).sum() == 10
    assert (last[0] != 0).all()
    for earlier, later in itertools.pairwise(states):
        changed = [(a != b).any(1) for a, b in zip(earlier, later, strict=True)]
        assert all(torch.equal(rows, changed[-1]) for rows in changed)
        assert changed[-1].sum() == 10


def test_the_first_update_of_a_row_is_that_of_adam_times_its_rarity(small):
    """The learning rate times the gradient's sign, and N / B = 2 times that."""
    ppca, guide = PPCA.like(small, K, seed=0), PerDatumGuide(40, K).double()
    fit_svi(ppca.model, guide, small, batch_size=20, steps=1, lr=0.05, seed=0)
    moved = guide.loc.detach().abs()
    rows = (moved != 0).any(1)
    assert rows.sum() == 20
    torch.testing.assert_close(moved[rows], torch.full((20, K), 0.1).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("batch_size", "steps"), [(15, 7), (40, 7), (39, 7), (1, 7)])
def test_the_number_of_steps(batch_size, steps, small):
    ppca, guide = linear_pair(small)
    result = fit_svi(ppca.model, guide, small, batch_size=batch_size, steps=steps, seed=0)
    assert result.steps == len(result.objective) == len(result.elapsed) == 7
    assert result.stopped == "all requested"


@pytest.mark.parametrize(("batch_size", "steps"), [(None, 3), (15, 9), (40, 3), (39, 3)])
def test_the_number_of_steps_of_epochs(batch_size, steps, small):
    ppca, guide = linear_pair(small)
    assert fit_svi(ppca.model, guide, small, batch_size=batch_size, epochs=3).steps == steps


# Objectives


@pytest.mark.parametrize("batch_size", [None, 15])
@pytest.mark.parametrize(
    ("ours", "stock"),
    [(ELBO(kl="sampled"), Trace_ELBO()), (ELBO(), TraceMeanField_ELBO())],
    ids=["Trace_ELBO", "TraceMeanField_ELBO"],
)
def test_objectives_of_pyro_give_the_same_fit(ours, stock, batch_size, small):
    fits, values = [], []
    for objective in (ours, stock):
        vae = small_vae()
        options = {"objective": objective, "batch_size": batch_size, "lr": 0.05, "seed": 3}
        fits.append(fit_svi(vae.model, vae.guide, small, steps=7, **options))
        values.append(values_of(vae))
    torch.testing.assert_close(fits[0].objective, fits[1].objective, rtol=1e-10, atol=0)
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_iwae_of_one_draw_is_the_elbo_and_tightens_with_more(small):
    ppca, guide = linear_pair(small)
    still = {"lr": 1e-12, "seed": 0}
    one = fit_svi(ppca.model, guide, small, objective=IWAE(1), steps=50, **still)
    sampled = fit_svi(ppca.model, guide, small, objective=ELBO(kl="sampled"), steps=50, **still)
    torch.testing.assert_close(one.objective, sampled.objective, rtol=1e-9, atol=0)
    means = [float(one.objective.mean())]
    for num_samples in (8, 64):
        fit = fit_svi(ppca.model, guide, small, objective=IWAE(num_samples), steps=50, **still)
        means.append(float(fit.objective.mean()))
    truth = float(ppca.log_likelihood(small).detach().mean())
    assert means[0] < means[1] < means[2] < truth


def test_warmup_raises_the_weight_of_the_kl(small):
    """At fixed parameters the weight of the KL at step t of a warm-up of w steps is beta t / w."""
    vae, fits = small_vae(), {}
    for name, beta, warmup in (("off", 0.0, None), ("on", 1.0, None), ("warm", 2.0, 4)):
        options = {"objective": ELBO(beta=beta), "warmup": warmup, "lr": 1e-13, "seed": 0}
        fits[name] = fit_svi(vae.model, vae.guide, small, steps=6, **options).objective
    kl = fits["off"] - fits["on"]
    assert (kl > 0.01).all()
    weights = 2 * torch.tensor([0.25, 0.5, 0.75, 1, 1, 1]).double()
    torch.testing.assert_close(fits["warm"], fits["off"] - weights * kl, rtol=1e-9, atol=1e-9)


def test_warmup_does_not_change_the_objective(small):
    vae, objective = small_vae(), ELBO(beta=2.0)
    fit_svi(vae.model, vae.guide, small, objective=objective, warmup=10, steps=3, seed=0)
    assert objective.beta == 2.0


# Optimizers and schedulers


def test_gradients_are_clipped(small):
    vae = small_vae()
    before = values_of(vae)
    options = {"optimizer": torch.optim.SGD, "lr": 1.0, "grad_clip": 1e-3, "seed": 0}
    fit_svi(vae.model, vae.guide, small, steps=1, **options)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, values_of(vae), strict=True)])
    # clip_grad_norm_ divides by the norm plus 1e-6.
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-4)


def test_a_norm_that_is_not_reached_does_not_clip(small):
    values = []
    for grad_clip in (None, 1e9):
        vae = small_vae()
        fit_svi(vae.model, vae.guide, small, steps=3, lr=0.05, grad_clip=grad_clip, seed=0)
        values.append(values_of(vae))
    assert same(*values)


SCHEDULERS = {
    "class of two": (CosineAnnealingLR, [0.075, 0.025, 0.0]),
    "class of one": (functools.partial(StepLR, step_size=2, gamma=0.1), [0.1, 0.01, 0.01]),
    "function of two": (
        lambda optimizer, num_steps: CosineAnnealingLR(optimizer, num_steps),
        [0.075, 0.025, 0.0],
    ),
    "function of one": (
        lambda optimizer: StepLR(optimizer, step_size=1, gamma=0.5),
        [0.05, 0.025, 0.0125],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_one_or_two_arguments(name, small):
    scheduler, expected = SCHEDULERS[name]
    rates = []

    def make(optimizer, num_steps):
        takes_two = name.endswith("two")
        inner = scheduler(optimizer, num_steps) if takes_two else scheduler(optimizer)

        def step():
            inner.step()
            rates.append(optimizer.param_groups[0]["lr"])

        return Callback(step)

    ppca, guide = linear_pair(small)
    fit_svi(ppca.model, guide, small, lr=0.1, steps=3, scheduler=make, seed=0)
    assert rates == pytest.approx(expected, abs=1e-12)
    result = fit_svi(ppca.model, guide, small, lr=0.1, steps=3, scheduler=scheduler, seed=0)
    assert result.steps == 3


def test_parameters_do_not_change_with_a_learning_rate_of_zero(small):
    ppca, guide = linear_pair(small)
    values = []

    def freeze(optimizer):
        def step():
            optimizer.param_groups[0]["lr"] = 0.0
            values.append(values_of(ppca, guide))

        return Callback(step)

    fit_svi(ppca.model, guide, small, lr=0.1, steps=4, scheduler=freeze, seed=0)
    assert same(values[0], values[-1])


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.SGD,
        torch.optim.AdamW,
        functools.partial(torch.optim.Adam, betas=(0.5, 0.9)),
        lambda parameters, lr: torch.optim.Adagrad(parameters, lr=lr),
    ],
    ids=["SGD", "AdamW", "partial", "function"],
)
def test_an_optimizer_is_any_callable_of_parameters_and_a_learning_rate(optimizer, small):
    ppca, guide = linear_pair(small)
    before = values_of(ppca, guide)
    result = fit_svi(ppca.model, guide, small, optimizer=optimizer, lr=0.01, steps=60, seed=0)
    assert all_differ(before, values_of(ppca, guide))
    assert result.objective[-10:].mean() > result.objective[:10].mean()


def test_the_learning_rate_is_used(small):
    ppca, guide = linear_pair(small)
    before = values_of(ppca, guide)
    fit_svi(ppca.model, guide, small, lr=0.02, steps=1, seed=0)
    for old, new in zip(before, values_of(ppca, guide), strict=True):
        # Adam's first step is lr times the gradient's sign.
        torch.testing.assert_close(
            (new - old).abs(), torch.full_like(old, 0.02), rtol=1e-4, atol=0
        )


# Seeds


def test_a_seed_makes_fits_repeatable(small):
    fits = []
    for seed in (1, 1, 2):
        vae = small_vae()
        fits.append(
            (
                fit_svi(vae.model, vae.guide, small, batch_size=15, steps=5, seed=seed),
                values_of(vae),
            )
        )
    (first, values), (second, again), (other, _) = fits
    assert torch.equal(first.objective, second.objective)
    assert same(values, again)
    assert not torch.isclose(first.objective, other.objective).any()


def test_without_a_seed_the_global_generator_is_used(small):
    fits = []
    for _ in range(2):
        ppca, guide = linear_pair(small)
        torch.manual_seed(5)
        fits.append(fit_svi(ppca.model, guide, small, batch_size=15, steps=5).objective)
        fits.append(fit_svi(ppca.model, guide, small, batch_size=15, steps=5).objective)
    assert torch.equal(fits[0], fits[2])
    assert not torch.equal(fits[0], fits[1])


# Validation and stopping


def overfitting(**options):
    """A VAE with far more parameters than the 12 rows of noise have entries."""
    rng = np.random.default_rng(0)
    x, x_val = rng.normal(size=(12, 6)), rng.normal(size=(60, 6))
    vae = VAE.mlp(6, 2, hidden=(32,), seed=0).double()
    result = fit_svi(vae.model, vae.guide, x, x_val=x_val, lr=0.01, seed=0, **options)
    return vae, result, x_val


def test_early_stopping_restores_the_best_state():
    vae, result, x_val = overfitting(steps=2000, patience=4)
    best = int(result.validation.argmax())
    assert result.steps < 2000
    assert len(result.validation) == best + 1 + 4
    assert result.stopped == (
        f"early at step {result.steps}: validation ELBO did not improve for 4 evaluations"
    )
    assert result.restored
    assert result.validation_steps.tolist() == list(range(0, result.steps + 1, 25))
    draws = {"num_samples": VALIDATION_DRAWS, "seed": VALIDATION_SEED}
    now = elbo(vae.model, vae.guide, x_val, **draws).mean()
    assert float(now) == pytest.approx(float(result.validation[best]), rel=1e-12)
    assert result.validation[-1] < result.validation[best]


@pytest.mark.slow
def test_without_patience_the_best_state_is_restored_at_the_end():
    vae, result, x_val = overfitting(steps=210)
    assert result.steps == 210
    assert result.validation_steps[-1] == 210
    assert result.restored
    draws = {"num_samples": VALIDATION_DRAWS, "seed": VALIDATION_SEED}
    now = elbo(vae.model, vae.guide, x_val, **draws).mean()
    assert float(now) == pytest.approx(float(result.validation.max()), rel=1e-12)


def test_a_fit_that_improves_until_its_end_is_not_restored(small):
    ppca, guide = linear_pair(small)
    result = fit_svi(ppca.model, guide, small, x_val=small, lr=0.005, steps=50, patience=1, seed=0)
    assert not result.restored
    assert result.stopped == "all requested"
    assert (result.validation.diff() > 0).all()


def test_validation_is_the_elbo_for_any_objective(small):
    fits, objectives = {}, {"one": ELBO(), "heavy": ELBO(beta=50.0), "iwae": IWAE(16)}
    objectives |= {"floored": ELBO(free_bits=30.0), "score": ELBO(2, 3.0, gradient="score-loo")}
    for name, objective in objectives.items():
        ppca, guide = linear_pair(small)
        still = {"objective": objective, "lr": 1e-13, "seed": 0, "steps": 1}
        fits[name] = fit_svi(ppca.model, guide, small, x_val=small + 0.1, **still)
    for fit in fits.values():
        torch.testing.assert_close(fit.validation, fits["one"].validation, rtol=1e-9, atol=0)
    for name in ("heavy", "floored"):
        assert fits[name].objective[0] < fits[name].validation[0] - 10
    truth = elbo(ppca.model, guide, small + 0.1, num_samples=5000, seed=1)
    draws = [elbo(ppca.model, guide, small + 0.1, seed=s).mean() for s in range(40)]
    error = torch.stack(draws).std() / VALIDATION_DRAWS**0.5
    z = (fits["heavy"].validation[0] - truth.mean()) / error
    assert abs(z) < oracles.z_limit()


def test_validation_does_not_change_the_fit(small):
    values = []
    for x_val in (None, small[:10] + 0.1):
        vae = small_vae()
        options = {"batch_size": 15, "lr": 0.005, "seed": 0, "x_val": x_val}
        fit = fit_svi(vae.model, vae.guide, small, steps=30, **options)
        values.append(fit.objective)
    assert torch.equal(*values)


@pytest.mark.slow
def test_validation_rows_are_evaluated_once_per_epoch_at_most_every_25_steps(small):
    ppca, guide = linear_pair(small)
    options = {"x_val": small, "seed": 0, "lr": 1e-9}
    short = fit_svi(ppca.model, guide, small, epochs=20, batch_size=15, **options)
    assert short.validation_steps.tolist() == [0, 27, 54, 60]
    long = fit_svi(ppca.model, guide, small, epochs=3, batch_size=1, **options)
    assert long.validation_steps.tolist() == [0, 40, 80, 120]


def test_validation_rows_with_a_per_datum_guide_are_rejected(small):
    ppca, guide = PPCA.like(small, K, seed=0), PerDatumGuide(40, K).double()
    for x_val in (small[:10], small[::-1].copy()):
        with pytest.raises(ValueError, match="one q per datum for"):
            fit_svi(ppca.model, guide, small, x_val=x_val, steps=2, seed=0)


# Losses that are not finite


class Breaking(nn.Module):
    """An encoder whose output is NaN from a certain call on."""

    def __init__(self, at):
        super().__init__()
        self.inner, self.calls, self.at = nn.Linear(D, 2 * K), 0, at

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * (float("nan") if self.calls > self.at else 1.0)


def test_a_loss_that_becomes_nan_stops_the_fit_with_step_and_site(small):
    torch.manual_seed(0)
    ppca, guide = PPCA.like(small, K, seed=0), AmortizedGuide(Breaking(1 + 130), K).double()
    states = [values_of(ppca, guide)]
    remember = after_each_step(lambda: states.append(values_of(ppca, guide)))
    with pytest.raises(FloatingPointError, match="not finite at step 131: site 'z' of the guide"):
        fit_svi(ppca.model, guide, small, steps=200, scheduler=remember, seed=0, lr=0.01)
    assert len(states) == 131
    # One of the states in the second half of the fit.
    assert any(same(values_of(ppca, guide), state) for state in states[90:])


def test_data_with_an_infinite_density_are_reported(small):
    ppca, guide = linear_pair(small)
    ppca.noise_scale = 1e-9
    with pytest.raises(FloatingPointError, match=r"at step 1: site '[xz]' of the model has"):
        fit_svi(ppca.model, guide, small * 1e149, steps=20, seed=0)


@pytest.mark.parametrize("pair", ["amortized", "exact"])
def test_after_too_large_a_step_the_last_good_state_is_restored(pair, small):
    ppca, guide = linear_pair(small)
    guide = ExactGuide(ppca) if pair == "exact" else guide
    before = values_of(ppca, guide)
    with pytest.raises(FloatingPointError, match=r"not finite at step 2.*smaller lr"):
        fit_svi(ppca.model, guide, small, steps=20, lr=1e160, seed=0)
    assert same(before, values_of(ppca, guide))


def test_infinite_parameters_after_the_last_step_are_detected(small):
    ppca, guide = linear_pair(small)
    with pytest.raises(FloatingPointError, match="not finite"):
        fit_svi(ppca.model, guide, small, steps=1, lr=1e308, optimizer=torch.optim.SGD, seed=0)
    assert all(p.isfinite().all() for p in values_of(ppca, guide))


def test_bare_parameters_are_restored_after_a_failure(float64):
    model, guide, x = user_pairs.param_only()
    fit_svi(model, guide, x, lr=0.05, steps=30, seed=0)
    before = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        fit_svi(model, guide, x, steps=5, lr=1e300, seed=0)
    for name, value in pyro.get_param_store().items():
        assert torch.equal(value, before[name])


def test_new_bare_parameters_are_kept_after_a_failure(float64):
    model, guide, x = user_pairs.param_only()
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        fit_svi(model, guide, x, steps=5, lr=1e300, seed=0)
    assert set(pyro.get_param_store().keys()) == {"W", "loc", "psi", "V", "scale"}
    assert all(v.isfinite().all() for v in pyro.get_param_store().values())


# Missing values, and data of other kinds


MISSING_LABELS = {
    "PPCA, amortized": lambda x: linear_pair(x),
    "PPCA, per datum": lambda x: (PPCA.like(x, K, seed=0), PerDatumGuide(len(x), K).double()),
    "VAE": lambda x: (vae := small_vae(), vae.guide),
}


@pytest.mark.parametrize("batch_size", [None, 15])
@pytest.mark.parametrize("name", MISSING_LABELS)
def test_missing_values_equal_a_mask_written_by_hand(name, batch_size, small):
    x = oracles.with_missing_values(small, 0.3, seed=0)
    observed, filled = torch.from_numpy(~np.isnan(x)), torch.from_numpy(np.nan_to_num(x))
    options = {"batch_size": batch_size, "lr": 0.05, "steps": 6, "seed": 0}

    def by_hand(owner):
        def program(x, index=None, num_data=None):
            rows = torch.arange(len(x)) if index is None else index
            with pyro.plate("data", num_data or len(x), subsample=rows):
                z = pyro.sample(
                    "z", dist.Normal(torch.zeros(owner.latent_dim).double(), 1.0).to_event(1)
                )
                if isinstance(owner, PPCA):
                    p_x = dist.Normal(z @ owner.loadings.mT + owner.loc, owner.noise_scale)
                else:
                    p_x = dist.Normal(owner.decoder(z), owner.likelihood.scale)
                pyro.sample("x", p_x.mask(observed[rows]).to_event(1), obs=x)

        return program

    owner, guide = MISSING_LABELS[name](small)
    ours = fit_svi(owner.model, guide, x, **options), values_of(owner, guide)
    owner, guide = MISSING_LABELS[name](small)
    theirs = fit_svi(by_hand(owner), guide, filled, **options), values_of(owner, guide)
    torch.testing.assert_close(ours[0].objective, theirs[0].objective, rtol=1e-10, atol=0)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    # A mask has the same effect as NaN, whatever the values of the missing entries.
    owner, guide = MISSING_LABELS[name](small)
    junk = np.where(np.isnan(x), 1e6, x)
    masked = fit_svi(owner.model, guide, junk, mask=observed.numpy(), **options)
    assert torch.equal(masked.objective, ours[0].objective)


def test_missing_values_in_validation_rows(small):
    ppca, guide = linear_pair(small)
    incomplete = oracles.with_missing_values(small, 0.3, seed=0)
    result = fit_svi(ppca.model, guide, small, x_val=incomplete, steps=2, lr=1e-9, seed=0)
    draws = {"num_samples": VALIDATION_DRAWS, "seed": VALIDATION_SEED}
    expected = elbo(ppca.model, guide, incomplete, **draws).mean()
    assert float(result.validation[0]) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize(
    "convert",
    [
        pd.DataFrame,
        torch.from_numpy,
        lambda x: x.tolist(),
        lambda x: x.astype("i4"),
        lambda x: pd.DataFrame(x.astype("i8"), dtype="Int64"),
        lambda x: torch.from_numpy(x).float(),
    ],
    ids=["pandas", "torch", "list", "integers", "nullable integers", "float32"],
)
def test_data_of_any_type(convert, small):
    x = np.round(3 * small)
    fits = []
    for data in (x, convert(x)):
        ppca, guide = linear_pair(small)
        fits.append(fit_svi(ppca.model, guide, data, x_val=data, steps=3, seed=0))
    assert torch.equal(fits[0].objective, fits[1].objective)
    assert torch.equal(fits[0].validation, fits[1].validation)


def test_the_users_data_are_not_changed(small):
    x = oracles.with_missing_values(small, 0.2, seed=0)
    before = x.copy()
    ppca, guide = linear_pair(small)
    fit_svi(ppca.model, guide, x, x_val=x, steps=3, seed=0)
    np.testing.assert_array_equal(x, before)


# Invalid arguments

BAD = [
    ({"steps": None}, "give exactly one of epochs and steps; got epochs=None and steps=None"),
    ({"epochs": 2}, "give exactly one of epochs and steps; got epochs=2 and steps=3"),
    ({"steps": 0}, "steps must be a whole number >= 1; got 0"),
    ({"steps": None, "epochs": -1}, "epochs must be a whole number >= 1; got -1"),
    ({"batch_size": 0}, "batch_size must be a whole number >= 1; got 0"),
    ({"batch_size": 41}, "batch_size=41 is larger than the data, 40 rows"),
    ({"patience": 3}, "patience needs x_val"),
    ({"patience": 0, "x_val": np.zeros((5, D))}, "patience must be a whole number >= 1; got 0"),
    ({"lr": 0.0}, "lr and grad_clip must be positive; got lr=0.0"),
    ({"lr": -1.0}, "lr and grad_clip must be positive; got lr=-1.0"),
    ({"lr": float("nan")}, "(lr|learning rate)"),
    ({"grad_clip": 0.0}, "lr and grad_clip must be positive.*grad_clip=0.0"),
    ({"grad_clip": -1.0}, "lr and grad_clip must be positive.*grad_clip=-1.0"),
    ({"warmup": 0}, "warmup must be a whole number >= 1; got 0"),
    (
        {"warmup": 5, "objective": IWAE(4)},
        "warmup changes the weight of the KL, which IWAE does not have",
    ),
    (
        {"warmup": 5, "objective": Trace_ELBO()},
        "which Trace_ELBO does not have; use objective=ELBO",
    ),
    ({"x_val": np.zeros((5, D - 1))}, r"x_val.*(rows, 10\)|data_dim=10)"),
    ({"x_val": np.zeros(D)}, r"x_val must be 2-d"),
    ({"x_val": np.zeros((0, D))}, r"x_val is empty"),
    ({"x_val": np.full((2, D), np.inf)}, "x_val has 20 infinite entries"),
    ({"mask": np.ones((40, D - 1), dtype=bool)}, "mask must be boolean with the shape of x"),
    ({"mask": np.zeros((40, D), dtype=bool)}, "x has rows with nothing observed"),
    ({"device": "no-such-device"}, "device 'no-such-device'"),
    ({"device": "mps"}, "device 'mps' is not available"),
    ({"progress": "off"}, "progress must be one of"),
]


@pytest.mark.parametrize(("options", "match"), BAD, ids=[str(sorted(o)) for o, _ in BAD])
def test_invalid_arguments_are_rejected(options, match, small):
    ppca, guide = linear_pair(small)
    before = values_of(ppca, guide)
    with pytest.raises(ValueError, match=match):
        fit_svi(ppca.model, guide, small, **({"steps": 3, "seed": 0} | options))
    assert same(before, values_of(ppca, guide))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_an_unavailable_gpu_is_rejected(device, small):
    ppca, guide = linear_pair(small)
    with pytest.raises(ValueError, match=r"device 'cuda.*' is not available; use device='auto'"):
        fit_svi(ppca.model, guide, small, steps=3, device=device)


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        (ELBO, r"objective.*instance"),
        (RenyiELBO(num_particles=2), "objective.*RenyiELBO"),
    ],
    ids=["a class", "no differentiable loss"],
)
def test_objectives_that_cannot_be_differentiated_are_rejected(objective, match, small):
    ppca, guide = linear_pair(small)
    with pytest.raises((ValueError, TypeError), match=match):
        fit_svi(ppca.model, guide, small, objective=objective, steps=3)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (np.zeros(D), ValueError, "x must be 2-d"),
        (np.zeros((0, D)), ValueError, "x is empty"),
        (np.zeros((3, D + 1)), ValueError, r"x .*(rows, 10\)|data_dim=10)"),
        (np.full((3, D), np.nan), ValueError, "x has rows with nothing observed"),
        (np.full((3, D), -np.inf), ValueError, "x has 30 infinite entries"),
        (np.full((3, D), "a"), TypeError, "x must hold numbers"),
    ],
)
def test_invalid_data_are_rejected(x, error, match, small):
    ppca, guide = linear_pair(small)
    with pytest.raises(error, match=match):
        fit_svi(ppca.model, guide, x, steps=3)


def test_missing_values_need_a_model_that_takes_a_mask(float64):
    model, guide, x = user_pairs.tutorial()
    x[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match="x has 1 missing entries, but the model takes no keyword"
    ):
        fit_svi(model, guide, x, steps=3)


@pytest.mark.parametrize("name", ["x", "x_val"])
def test_data_outside_the_support_of_the_likelihood_are_rejected(name, small):
    vae = small_vae(likelihood=Bernoulli())
    data = {"x": (small > 0).astype(float), "x_val": (small > 0).astype(float)}
    data[name] = 0.5 * data[name]
    with pytest.raises(ValueError, match=rf"{name}\b.*has \d+ entries outside {{0, 1}}"):
        fit_svi(vae.model, vae.guide, **data, steps=3)


@pytest.mark.parametrize("num_data", [39, 41])
def test_a_per_datum_guide_for_other_data_is_rejected(num_data, small):
    ppca, guide = PPCA.like(small, K, seed=0), PerDatumGuide(num_data, K).double()
    with pytest.raises(ValueError, match=f"one q per datum for {num_data}"):
        fit_svi(ppca.model, guide, small, steps=3)
    with pytest.raises(ValueError, match=f"one q per datum for {num_data}"):
        fit_svi(ppca.model, guide, small, steps=3, batch_size=10)


def test_an_exact_guide_fits_rows_with_missing_values(small):
    ppca, x = PPCA.like(small, K, seed=0), oracles.with_missing_values(small, 0.1, seed=0)
    before = float(ppca.log_likelihood(x).mean().detach())
    fit_svi(ppca.model, ExactGuide(ppca), x, steps=30, batch_size=10, lr=0.01, seed=0)
    assert float(ppca.log_likelihood(x).mean().detach()) > before


def test_a_scaled_site_is_rejected_by_name(small):
    ppca, guide = linear_pair(small)
    scaled = poutine.scale(ppca.model, scale=0.1)
    with pytest.raises(ValueError, match=r"site 'z' of the model has scale 0\.1.*poutine\.scale"):
        fit_svi(scaled, guide, small, steps=3)


# Results


def test_the_text_and_the_conversions_of_a_result(small):
    ppca, guide = linear_pair(small)
    result = fit_svi(ppca.model, guide, small, x_val=small, steps=60, seed=0)
    text = repr(result)
    assert text.startswith("SVI: 60 steps in ")
    assert "60 steps in" in text and "all requested" in text
    assert f"objective {float(result.objective[-50:].mean()):.4f} nats per datum" in text
    best = float(result.validation.max())
    assert f"validation ELBO {best:.4f} nats per datum at best" in text
    assert "tensor(" not in text
    as_json = json.loads(json.dumps(result.to_dict()))
    assert as_json["objective"] == result.objective.tolist()
    assert as_json["validation_steps"] == [0, 25, 50, 60]
    frame = result.to_frame()
    assert len(frame) == 60
    assert frame["validation"].notna().sum() == 4
    assert (result.elapsed.diff() >= 0).all()
    assert float(result.elapsed[-1]) <= result.seconds


@pytest.mark.slow
def test_notes_report_that_the_noise_scale_has_reached_its_floor():
    x = np.outer(np.linspace(-1, 1, 30), np.ones(4))
    vae = VAE.mlp(
        4, 1, hidden=(8,), likelihood=Gaussian("shared", initial=0.51, floor=0.5), seed=0
    ).double()
    result = fit_svi(vae.model, vae.guide, x, lr=0.05, steps=200, seed=0)
    assert "the noise scale has reached its floor, 0.5" in result.notes[0]
    assert "note: the noise scale has reached its floor" in repr(result)


def test_progress_is_shown_on_standard_error_if_requested(small, capfd, monkeypatch):
    ppca, guide = linear_pair(small)
    for progress in ("auto", False):
        fit_svi(ppca.model, guide, small, steps=30, progress=progress)
        captured = capfd.readouterr()
        assert captured.out == captured.err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    fit_svi(ppca.model, guide, small, steps=30, progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "SVI" in captured.err
    assert "nats per datum" in captured.err


def test_a_copy_of_a_fitted_pair_trains_independently(small):
    vae = small_vae()
    fit_svi(vae.model, vae.guide, small, lr=0.05, steps=3, seed=0)
    other, before = copy.deepcopy(vae), values_of(vae)
    fit_svi(other.model, other.guide, small, lr=0.05, steps=3, seed=0)
    assert same(before, values_of(vae))
    assert all_differ(before, values_of(other))
