"""Recorded steps contain nothing that an accelerator cannot replay alone, as a CUDA graph.

They are recorded on a pretended accelerator, which distinguishes tensors on the CPU.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pretend_device
import user_pairs
from captured import B, Steps
from ppl_vae.capture.device_graph import check_graph, move_constants
from ppl_vae.capture.graph import CaptureError
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.inference.svi.steps.captured_step import CapturedSteps
from pretend_run import on_pretended_device

pretend_device.register()
pytestmark = pytest.mark.skipif(
    bool(pretend_device.STATE.unsupported), reason=pretend_device.STATE.unsupported
)
FAST = ("functions", "param_only", "feature_plate")


@pytest.fixture
def device(monkeypatch):
    """The device; recorded graphs are checked as those that are compiled and replayed."""

    def move_and_check(graph):
        move_constants(graph)
        check_graph(graph, pretend_device.DEVICE)

    monkeypatch.setattr("ppl_vae.capture.compiled.move_constants", move_and_check)
    with on_pretended_device():
        yield pretend_device.DEVICE


def record(model, guide, x):
    """Make a recorded step, and count where the host waits when it is made once more."""
    with isolated_store(), seeded(0):
        run = Steps(model, guide, x, optimizer="adam")
        rows = [torch.arange(B)]
        run.run(rows)
        captured = CapturedSteps(run.minibatch, run.update, run.named, 1, compiled=False)
        captured.run_steps(rows, 1)
        with pretend_device.count_waits() as waits:
            captured.run_steps(rows, 2)
    return waits


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in user_pairs.PAIRS],
)
def test_recorded_steps_of_pairs_run_on_the_device_alone(name, device):
    model, guide, x = user_pairs.PAIRS[name]()
    assert x.device == device
    waits = record(model, guide, x)
    assert not waits, dict(waits)


def pair_with(change):
    """A pair whose decoder passes its mean through a function of (mean, x)."""
    encode, decode = nn.Linear(4, 2), nn.Linear(2, 4)

    def model(x):
        pyro.module("decode", decode)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
            mean = change(decode(z), x)
            pyro.sample("x", dist.Normal(mean, torch.ones_like(mean)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encode", encode)
        with pyro.plate("data", len(x)):
            loc = encode(x)
            pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))

    return model, guide, torch.randn(24, 4)


OBSTACLES = {
    "read": (lambda mean, x: mean * float(x.mean()), "reads a value|cannot be captured"),
    "branch": (lambda mean, x: mean if x.mean() > 0 else -mean, "reads a value"),
    "copy": (lambda mean, x: mean.cpu().to(x.device), "_to_copy copies from gpu to cpu"),
    "shape": (
        lambda mean, x: mean + 0 * (x > -9).nonzero().sum(),
        "the shape of nonzero's result depends on values",
    ),
    "mask": (
        lambda mean, x: mean + 0 * x[x > -99].sum(),
        "the shape of index's result depends on values",
    ),
    "factory": (
        lambda mean, x: mean + torch.zeros(4, device="cpu").to(mean.device),
        "makes a tensor on the cpu; pass device=|copies from gpu to cpu",
    ),
    "factorization": (
        lambda mean, x: mean @ torch.linalg.cholesky(torch.eye(4)),
        "_linalg_check_errors reads values on the host",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle_is_named(name, device):
    change, message = OBSTACLES[name]
    with pytest.raises(CaptureError, match=message):
        record(*pair_with(change))


def test_the_same_pair_without_an_obstacle(device):
    assert not record(*pair_with(lambda mean, x: mean))
