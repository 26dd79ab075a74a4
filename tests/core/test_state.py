"""Process-wide state is restored: generators, parameter store, validation, modes, buffers."""

import random
import sys
import traceback

import numpy as np
import pyro
import pyro.settings
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import Distribution, constraints

from global_state import generators, global_state, store_names
from ppl_vae.core.state import (
    dry_run,
    isolated_store,
    seeded,
    train_mode,
    validation,
    without_stacks,
)
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, PerDatumGuide
from ppl_vae.likelihoods.discrete import Bernoulli
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp
from user_pairs import PAIRS, regularized


def draw_from_all():
    return torch.rand(2).tolist(), random.random(), np.random.rand(2).tolist()


# Generators


def test_a_seed_makes_draws_repeat_and_gives_the_generators_back():
    before, drawn = generators(), []
    for _ in range(2):
        with seeded(5):
            drawn.append(draw_from_all())
    assert drawn[0] == drawn[1]
    assert generators() == before


def test_other_seeds_draw_otherwise():
    drawn = []
    for seed in (0, 1):
        with seeded(seed):
            drawn.append(draw_from_all())
    assert all(a != b for a, b in zip(*drawn, strict=True))


def test_without_a_seed_the_global_generators_move():
    before = generators()
    with seeded(None):
        draw_from_all()
    assert all(a != b for a, b in zip(before, generators(), strict=True))


def test_the_generators_come_back_after_an_error_and_from_inside():
    before = generators()
    with pytest.raises(KeyError), seeded(1):
        draw_from_all()
        with seeded(2):
            draw_from_all()
        raise KeyError
    assert generators() == before


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**40])
def test_seeds_may_be_large(seed):
    with seeded(seed):
        assert len(draw_from_all()) == 3


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed: PPCA(4, 2, seed=seed).loadings,
        lambda seed: PPCA.like(torch.eye(4), 2, seed=seed).loadings,
        lambda seed: PPCA(4, 2, seed=0).sample(3, seed=seed),
        lambda seed: VAE.mlp(4, 2, seed=seed).decoder[0].weight,
        lambda seed: VAE.mlp(4, 2, seed=seed).guide.encoder[0].weight,
        lambda seed: VAE.mlp(4, 2, seed=0).sample(3, seed=seed),
        lambda seed: mlp(4, 2, seed=seed)[0].weight,
    ],
    ids=["ppca", "like", "ppca sample", "decoder", "encoder", "vae sample", "mlp"],
)
def test_whatever_draws_takes_a_seed(draw):
    before = generators()
    first, again, other = draw(3), draw(3), draw(4)
    assert generators() == before
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    draw(None)
    assert generators() != before


# The parameter store


def bare_model(name):
    pyro.param(name, torch.tensor(1.0), constraint=constraints.positive)


def test_parameters_of_modules_are_not_left_in_the_store():
    vae = VAE.mlp(4, 2, seed=0)
    with isolated_store():
        vae.model(torch.ones(3, 4))
        assert store_names()
    assert store_names() == []


def test_the_block_has_no_modules_of_the_store_and_keeps_them():
    outer, inner = nn.Linear(2, 2), nn.Linear(2, 2)
    pyro.module("same", outer)
    kept = store_names()
    with isolated_store():
        assert store_names() == []
        pyro.module("same", inner)
        assert pyro.param("same$$$weight") is inner.weight
    assert store_names() == kept
    assert pyro.param("same$$$weight") is outer.weight


def test_bare_parameters_start_from_the_store_and_go_back_to_it():
    bare_model("old")
    with torch.no_grad():
        pyro.get_param_store()._params["old"].fill_(0.5)
    with isolated_store():
        assert pyro.param("old").item() == pytest.approx(np.exp(0.5))
        with torch.no_grad():
            pyro.get_param_store()._params["old"].fill_(0.7)
        bare_model("new")
    assert store_names() == ["new", "old"]
    assert pyro.param("old").item() == pytest.approx(np.exp(0.7))
    assert pyro.get_param_store()._constraints["new"] is constraints.positive


def test_the_store_comes_back_after_an_error():
    bare_model("old")
    with pytest.raises(KeyError), isolated_store():
        bare_model("new")
        raise KeyError
    assert "old" in store_names()


def test_a_block_inside_a_block():
    with isolated_store():
        bare_model("outer")
        with isolated_store():
            assert store_names() == ["outer"]
            bare_model("inner")
    assert store_names() == ["inner", "outer"]


def test_stock_training_goes_on_after_an_isolated_block():
    vae, x = VAE.mlp(4, 2, hidden=(5,), seed=0), torch.ones(3, 4)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(x)
    with isolated_store():
        Trace_ELBO().loss(vae.model, vae.guide, x)
    before = [p.detach().clone() for p in vae.parameters()]
    svi.step(x)
    moved = [not torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True)]
    assert all(moved)


# Validation


@pytest.fixture
def some_flags(request):
    before = pyro.settings.get()
    pyro.settings.set(**request.param)
    yield request.param
    pyro.settings.set(**before)
    Distribution.set_default_validate_args(before["validate_distributions_torch"])


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    "some_flags",
    [
        {},
        {"validate_infer": False, "validate_poutine": False},
        {"validate_distributions_torch": False},
        {"validate_distributions_pyro": False},
    ],
    indirect=True,
)
def test_validation_flags_are_given_back_as_they_were(some_flags, enabled):
    before = pyro.settings.get(), Distribution._validate_args
    with validation(enabled):
        inside = pyro.settings.get()
        assert {v for k, v in inside.items() if k.startswith("validate")} == {enabled}
        assert Distribution._validate_args is enabled
    assert (pyro.settings.get(), Distribution._validate_args) == before
    with pytest.raises(KeyError), validation(enabled):
        raise KeyError
    assert (pyro.settings.get(), Distribution._validate_args) == before


# Modes


def flags(*modules):
    return [part.training for module in modules for part in module.modules()]


def test_modes_are_set_for_every_module_of_a_pair_and_given_back():
    encoder, decoder = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Sequential(nn.Dropout())
    decoder[0].eval()

    def model(x):
        return decoder(x)

    def guide(x):
        return encoder(x)

    before = flags(encoder, decoder)
    with train_mode(model, guide, training=False):
        assert not any(flags(encoder, decoder))
    assert flags(encoder, decoder) == before
    with pytest.raises(KeyError), train_mode(model, guide, training=True):
        assert all(flags(encoder, decoder))
        raise KeyError
    assert flags(encoder, decoder) == before


class PlainObject:
    """Networks as attributes of an object that is no module."""

    def __init__(self):
        self.net = nn.Dropout()
        self.nets = {"more": [nn.Dropout()]}

    def model(self, x):
        return self.nets["more"][0](self.net(x))


def test_modes_reach_modules_in_containers_and_plain_objects():
    nets = {"decoder": nn.Dropout()}
    plain = PlainObject()

    def model(x):
        return nets["decoder"](x)

    with train_mode(model, plain.model, training=False):
        assert flags(nets["decoder"], plain.net, plain.nets["more"][0]) == [False] * 3
    assert flags(nets["decoder"], plain.net, plain.nets["more"][0]) == [True] * 3


# Dry runs


def test_a_dry_run_leaves_generators_and_buffers():
    model, guide, x = regularized()
    (norm,) = [m for m in model.__self__.modules() if isinstance(m, nn.BatchNorm1d)]
    before = generators(), norm.running_mean.clone(), norm.num_batches_tracked.clone()
    with isolated_store(), dry_run(model, guide):
        guide(x)
        model(x)
        draw_from_all()
        assert not torch.equal(norm.running_mean, before[1])
        assert not torch.is_grad_enabled()
    assert torch.equal(norm.running_mean, before[1])
    assert torch.equal(norm.num_batches_tracked, before[2])
    assert generators() == before[0]


def test_a_dry_run_is_invisible_to_handlers_outside():
    model, guide, x = PAIRS["functions"]()
    with pyro.poutine.trace() as trace, dry_run(model, guide):
        guide(x)
    assert list(trace.trace.nodes) == []


# All process-wide state

CONSTRUCTORS = [
    lambda: PPCA(4, 2),
    lambda: PPCA.like(torch.eye(4), 2),
    lambda: VAE.mlp(4, 2, likelihood=Bernoulli()),
    lambda: Gaussian("shared"),
    lambda: ExactGuide(PPCA(4, 2)),
    lambda: PerDatumGuide(5, 2),
    lambda: AmortizedGuide(mlp(4, 4), 2),
]


@pytest.mark.parametrize("construct", CONSTRUCTORS)
def test_no_constructor_touches_the_world(construct):
    pyro.param("mine", torch.tensor(1.0))
    before = global_state()
    construct()
    assert global_state() == before
    assert store_names() == ["mine"]


def test_stacks_are_extracted_again_after_a_block_without_them(monkeypatch):
    for limit in (None, 7):
        if limit:
            monkeypatch.setattr(sys, "tracebacklimit", limit, raising=False)
        before = len(traceback.extract_stack())
        assert before > 1
        with pytest.raises(ValueError, match="inside"), without_stacks():
            with without_stacks():
                assert not traceback.extract_stack()
            assert not traceback.extract_stack()
            raise ValueError("inside")
        assert len(traceback.extract_stack()) == before
