"""A user's pair that mixes devices is refused by program, site and the line that made the tensor.

On a pretended accelerator, or on a real one where there is one.
"""

import contextlib
import inspect
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pretend_device
from ppl_vae import elbo, fit_svi, log_likelihood
from ppl_vae.core.devices.accelerators import current_accelerator

pretend_device.register()
D, K, N = 4, 2, 12
WIDTHS = torch.full((D,), 0.5)
PRIOR = dist.Normal(torch.zeros(K), torch.ones(K)).to_event(1)


@pytest.fixture
def device():
    with contextlib.ExitStack() as stack:
        real = current_accelerator()
        if real is None and pretend_device.STATE.unsupported:
            pytest.skip(pretend_device.STATE.unsupported)
        yield real or stack.enter_context(pretend_device.pretended_device())


class Base(nn.Module):
    """A linear pair without faults; subclasses have one each."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(D, 2 * K), nn.Linear(K, D)

    def prior(self, x):
        return dist.Normal(x.new_zeros(K), x.new_ones(K))

    def density(self, mean):
        return dist.Normal(mean, 0.5)

    def model(self, x):
        pyro.module("decode", self.decode)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x).to_event(1))
            pyro.sample("x", self.density(self.decode(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encode", self.encode)
        with pyro.plate("data", len(x)):
            loc, raw = self.encode(x).chunk(2, -1)
            pyro.sample("z", self.posterior(loc, raw.exp()).to_event(1))

    def posterior(self, loc, scale):
        return dist.Normal(loc, scale)


class PriorInProgram(Base):
    def prior(self, x):
        loc = torch.zeros(K)  # made here
        return dist.Normal(loc, 1.0)


class AttributeOfTheModule(Base):
    def __init__(self):
        super().__init__()
        self.widths = torch.full((D,), 0.5)  # made here

    def density(self, mean):
        return dist.Normal(mean, self.widths)


class NoiseInTheGuide(Base):
    def posterior(self, loc, scale):
        noise = 0.1 * torch.randn(K)  # made here
        return dist.Normal(loc + noise, scale)


class DrawnThenDecoded(Base):
    """The guide's draws are on the CPU; the decoder is where they meet."""

    def guide(self, x):
        pyro.module("encode", self.encode)
        with pyro.plate("data", len(x)):
            loc = self.encode(x)[:, :K].mean() * 0
            start = torch.zeros(len(x), K)  # made here
            pyro.sample("z", dist.Normal(start + loc.cpu(), 1.0).to_event(1))


class MaskOfTheDatum(Base):
    def model(self, x):
        observed = torch.rand(len(x)) > 0.5  # made here
        with pyro.poutine.mask(mask=observed):
            super().model(x)


class ParameterOfTheStore(Base):
    def guide(self, x):
        loc = pyro.param("loc", torch.zeros(N, K))  # made here
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(loc, torch.ones_like(loc)).to_event(1))


class ConstrainedParameterOfTheStore(Base):
    def guide(self, x):
        start, positive = torch.ones(N, K), dist.constraints.positive
        scale = pyro.param("scale", start, constraint=positive)  # made here
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(torch.zeros_like(scale), scale).to_event(1))


CASES = {
    PriorInProgram: ("model", "z", K),
    AttributeOfTheModule: ("model", "x", D),
    NoiseInTheGuide: ("guide", "z", K),
    DrawnThenDecoded: ("guide", "z", N),
    MaskOfTheDatum: ("model", "z", N),
    ParameterOfTheStore: ("guide", "z", N),
    ConstrainedParameterOfTheStore: ("guide", "z", N),
}


def line_of(kind):
    lines, start = inspect.getsourcelines(kind)
    return start + next(k for k, line in enumerate(lines) if "made here" in line)


CALLS = {
    "elbo": lambda pair, x: elbo(pair.model, pair.guide, x),
    "log_likelihood": lambda pair, x: log_likelihood(pair.model, pair.guide, x, 3),
    "fit_svi": lambda pair, x: fit_svi(pair.model, pair.guide, x, steps=2),
    "stock": lambda pair, x: fit_svi(
        pair.model, pair.guide, x, steps=2, objective=pyro.infer.Trace_ELBO()
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", CASES)
def test_the_line_that_made_the_tensor_is_named(kind, call, device):
    program, site, width = CASES[kind]
    pair, x = kind().to(device), torch.randn(N, D).to(device)
    message = (
        rf"the {program} mixes devices at site '{site}': x is on {device}, a tensor of shape "
        rf"\({width},.*\) on cpu.*made at {re.escape(__file__)}:{line_of(kind)}\."
    )
    with pytest.raises(ValueError, match=message):
        CALLS[call](pair, x)


class WidthsOfTheFile(Base):
    def density(self, mean):
        return dist.Normal(mean, WIDTHS)


class PriorOfTheFile(Base):
    """The distribution was made when the file was imported."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", PRIOR)
            pyro.sample("x", self.density(self.decode(z)).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("kind", "site", "name"), [(WidthsOfTheFile, "x", "WIDTHS"), (PriorOfTheFile, "z", "PRIOR")]
)
def test_a_variable_of_the_module_is_named(kind, site, name, device):
    pair, x = kind().to(device), torch.randn(N, D).to(device)
    line = next(
        k
        for k, text in enumerate(inspect.getsource(inspect.getmodule(kind)).splitlines(), 1)
        if text.startswith(name)
    )
    message = rf"the model mixes devices at site '{site}'.*variable '{name}', made at .*:{line}\."
    with pytest.raises(ValueError, match=message):
        elbo(pair.model, pair.guide, x)


class LayersInAList(Base):
    """torch does not move modules in a list."""

    def __init__(self):
        super().__init__()
        self.layers = [{"last": nn.Linear(D, D)}]

    def density(self, mean):
        return super().density(self.layers[0]["last"](mean))


def test_a_module_in_a_list_is_named(device):
    pair, x = LayersInAList().to(device), torch.randn(N, D).to(device)
    with pytest.raises(ValueError, match=r"variable \"layers.0..'last'..weight\". Make"):
        elbo(pair.model, pair.guide, x)


class WidthsOfNumpy(Base):
    def density(self, mean):
        widths = torch.from_numpy(np.full(D, 0.5, dtype=np.float32))
        return dist.Normal(mean, widths)  # made here


def test_an_array_of_numpy_is_named_where_it_is_used(device):
    pair, x = WidthsOfNumpy().to(device), torch.randn(N, D).to(device)
    message = rf"the model .* site 'x'.*first used at .*:{line_of(WidthsOfNumpy)}\."
    with pytest.raises(ValueError, match=message):
        elbo(pair.model, pair.guide, x)


def test_pairs_without_a_fault_run(device):
    pair, x = Base().to(device), torch.randn(N, D).to(device)
    assert elbo(pair.model, pair.guide, x, seed=0).device == device
