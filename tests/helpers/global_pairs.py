"""Pairs with global latent variables, outside the plate over data, in the styles of users.

``GLOBAL_PAIRS`` maps a name to a function that makes a fresh ``(model, guide, x)``; x has
N = 24 rows and D = 4 columns, in the default dtype. The guides are not exact.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints
from user_pairs import N, draw, network

D, K = 4, 2


def rows_of(x, index, num_data):
    rows = torch.arange(len(x)) if index is None else index
    return pyro.plate("data", num_data or len(x), subsample=rows)


# Without local latent variables


class NormalMean(PyroModule):
    """theta ~ N(0, 2^2 I), x_n ~ N(theta, I), with a diagonal q(theta)."""

    def __init__(self):
        super().__init__("normal_mean")
        self.loc = nn.Parameter(0.3 * draw(D, seed=1))
        self.scale = PyroParam(torch.linspace(0.2, 0.5, D), constraints.positive)

    def model(self, x=None, *, mask=None, index=None, num_data=None, observe=True):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(D), 2.0).to_event(1))
        with rows_of(torch.empty(num_data, D) if x is None else x, index, num_data):
            px = dist.Normal(theta, 1.0)
            px = px if mask is None else px.mask(mask)
            return pyro.sample("x", px.to_event(1), obs=x if observe else None)

    def forward(self, x=None, **_):
        pyro.sample("theta", dist.Normal(self.loc, self.scale).to_event(1))


def normal_mean():
    pair = NormalMean()
    return pair.model, pair, 0.5 + draw(N, D, seed=2)


# A linear decoder with a prior on its weights


def linear_decoder_model(x=None, *, mask=None, index=None, num_data=None, observe=True):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(D, K), 1.0).to_event(2))
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(-0.5), 0.3))
    with rows_of(torch.empty(num_data, D) if x is None else x, index, num_data):
        z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        mean = (z.unsqueeze(-2) @ weight.mT).squeeze(-2)
        px = dist.Normal(mean, scale.unsqueeze(-1))
        px = px if mask is None else px.mask(mask)
        return pyro.sample("x", px.to_event(1), obs=x if observe else None)


class MeanFieldGuide(PyroModule):
    """Independent distributions of the globals, and an encoder for z."""

    def __init__(self, scale=True):
        super().__init__("mean_field_guide")
        self.encoder = network(nn.Linear(D, 2 * K), seed=3)
        self.weight_loc = nn.Parameter(0.5 * draw(D, K, seed=4))
        self.weight_scale = PyroParam(torch.full((D, K), 0.2), constraints.positive)
        self.noise_scale = PyroParam(torch.tensor(0.2), constraints.positive) if scale else None

    def forward(self, x, *, index=None, num_data=None, **_):
        weight = dist.Normal(self.weight_loc, self.weight_scale).to_event(2)
        pyro.sample("weight", weight)
        if self.noise_scale is not None:
            pyro.sample("scale", dist.LogNormal(torch.tensor(-0.4), self.noise_scale))
        with rows_of(x, index, num_data):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))


def linear_decoder():
    return linear_decoder_model, MeanFieldGuide(), draw(N, D, seed=5)


def conditioned():
    """One of the two globals is observed, by ``poutine.condition``."""
    model = poutine.condition(linear_decoder_model, data={"scale": torch.tensor(0.7)})
    return model, MeanFieldGuide(scale=False), draw(N, D, seed=5)


# Priors on the weights of a network, which reads them as one matrix


class RandomDecoder(PyroModule):
    """``PyroSample`` weights, read outside the plate; ``F.linear`` takes one matrix only."""

    def __init__(self):
        super().__init__("random_decoder")
        self.linear = PyroModule[nn.Linear](K, D)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([D, K]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([D]).to_event(1))

    def forward(self, x=None, *, index=None, num_data=None, observe=True):
        self.linear.weight, self.linear.bias  # noqa: B018
        with rows_of(torch.empty(num_data, D) if x is None else x, index, num_data):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            px = dist.Normal(self.linear(z), 0.8)
            return pyro.sample("x", px.to_event(1), obs=x if observe else None)


class WithAutomatic(PyroModule):
    """An automatic guide of the globals, and an encoder of z."""

    def __init__(self, automatic):
        super().__init__("with_automatic")
        self.automatic = automatic
        self.encoder = network(nn.Linear(D, 2 * K), seed=6)

    def forward(self, x, *, index=None, num_data=None, **_):
        self.automatic(x, index=index, num_data=num_data)
        with rows_of(x, index, num_data):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))


def automatic(kind, model, x):
    """A pair whose globals have an automatic guide, which has run once."""
    guide = WithAutomatic(kind(poutine.block(model, hide=["z"])))
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(7)
        guide(x)
    return model, guide, x


def random_decoder():
    return automatic(AutoNormal, RandomDecoder(), draw(N, D, seed=8))


def auto_normal():
    return automatic(AutoNormal, linear_decoder_model, draw(N, D, seed=5))


def auto_multivariate_normal():
    return automatic(AutoMultivariateNormal, linear_decoder_model, draw(N, D, seed=5))


def auto_low_rank():
    return automatic(AutoLowRankMultivariateNormal, linear_decoder_model, draw(N, D, seed=5))


def auto_delta():
    return automatic(AutoDelta, linear_decoder_model, draw(N, D, seed=5))


# Hierarchical: the prior of each group's mean, in a plate of its own, and a guide that reads it


def hierarchical():
    """A plate of columns outside the data, and q(z | x, theta)."""
    encoder = network(nn.Linear(D + 1, 2), seed=9)
    params = nn.ParameterDict({"loc": nn.Parameter(0.2 * draw(D, seed=10))})

    def model(x=None, *, index=None, num_data=None, observe=True):
        spread = pyro.sample("spread", dist.Gamma(torch.tensor(4.0), 4.0))
        with pyro.plate("columns", D, dim=-2):
            offset = pyro.sample("offset", dist.Normal(torch.tensor(0.0), spread))
        with rows_of(torch.empty(num_data, D) if x is None else x, index, num_data):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), spread))
            mean = z.unsqueeze(-1) + offset.transpose(-1, -2)
            return pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x if observe else None)

    def guide(x, *, index=None, num_data=None, **_):
        pyro.module("hierarchical.encoder", encoder)
        loc = pyro.param("hierarchical.loc", params["loc"])
        spread = pyro.sample("spread", dist.LogNormal(torch.tensor(-0.1), 0.3))
        with pyro.plate("columns", D, dim=-2):
            pyro.sample("offset", dist.Normal(loc.unsqueeze(-1), 0.3))
        with rows_of(x, index, num_data):
            shape = torch.broadcast_shapes(spread.shape, x.shape[:1])
            inputs = torch.cat([x.expand(*shape, D), spread.log().expand(shape).unsqueeze(-1)], -1)
            mean, raw = encoder(inputs).unbind(-1)
            pyro.sample("z", dist.Normal(mean, (0.5 * raw).exp()))

    return model, guide, draw(N, D, seed=11)


GLOBAL_PAIRS = {
    make.__name__: make
    for make in (
        normal_mean,
        linear_decoder,
        conditioned,
        random_decoder,
        auto_normal,
        auto_multivariate_normal,
        auto_low_rank,
        auto_delta,
        hierarchical,
    )
}
