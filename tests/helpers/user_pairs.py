"""Pairs that the package has never observed, in the styles in which user-written pairs write them.

``PAIRS`` maps a name to a function that makes a fresh ``(model, guide, x)``: tensors of the
default dtype, N = 24 rows. Whatever takes a pair must take all of them. A network with dropout
or batch norm starts in training mode, as everywhere.

``param_table``, ``auto_normal``, ``colliding_names`` and ``without_parameters`` stand outside
``PAIRS``: the first two hold a table with a row a datum (no held-out rows), the third is broken
and must be found out, and the last has no parameters to fit.
"""

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from draws import generator
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints
from torch.nn import functional as F

N = 24


def draw(*shape, seed):
    """Standard normal numbers of the default dtype."""
    return torch.randn(*shape, generator=generator(seed))


def network(*layers, seed=1):
    """A network whose weights are drawn without the global generator; moderate gains."""
    net = nn.Sequential(*layers)
    source = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 1
            scale = 0.7 / math.sqrt(fan_in) if p.dim() > 1 else 0.1
            p.copy_(scale * torch.randn(p.shape, generator=source))
    return net


def normal_guide(encode):
    """The guide q(z | x) = N(loc, diag(scale^2)) of a network that gives loc and log scale."""

    def guide(x=None, *, index=None, num_data=None):
        rows = torch.arange(len(x), device=x.device) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            loc, log_scale = encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return guide


# A bare pair of functions, closing over networks


def functions():
    """The pair of the documentation: keywords for masks, minibatches and prediction."""
    encoder, decoder = network(nn.Linear(6, 4)), network(nn.Linear(2, 6), seed=2)
    log_sigma = nn.Linear(1, 1)
    with torch.no_grad():
        log_sigma.bias.fill_(-0.5)

    def model(x=None, *, mask=None, index=None, num_data=None, observe=True):
        n = len(x) if x is not None else num_data
        rows = torch.arange(n) if index is None else index
        with pyro.plate("data", num_data or n, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            px = dist.Normal(decoder(z), log_sigma.bias.exp())
            px = px if mask is None else px.mask(mask)
            return pyro.sample("x", px.to_event(1), obs=x if observe else None)

    def guide(x=None, *, index=None, num_data=None, **_):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))

    # A parameter that only one of them reads must still be a parameter of the pair.
    log_sigma.weight.requires_grad_(False)
    return model, guide, draw(N, 6, seed=3)


# The VAE of Pyro's tutorial


class TutorialEncoder(nn.Module):
    def __init__(self, data_dim, z_dim, hidden_dim):
        super().__init__()
        self.fc1 = network(nn.Linear(data_dim, hidden_dim))
        self.fc21 = network(nn.Linear(hidden_dim, z_dim), seed=4)
        self.fc22 = network(nn.Linear(hidden_dim, z_dim), seed=5)
        self.softplus = nn.Softplus()

    def forward(self, x):
        hidden = self.softplus(self.fc1(x))
        return self.fc21(hidden), torch.exp(self.fc22(hidden))


class TutorialDecoder(nn.Module):
    def __init__(self, data_dim, z_dim, hidden_dim):
        super().__init__()
        self.net = network(
            nn.Linear(z_dim, hidden_dim), nn.Softplus(), nn.Linear(hidden_dim, data_dim), seed=6
        )

    def forward(self, z):
        return torch.sigmoid(self.net(z))


class TutorialVAE(nn.Module):
    """``pyro.module`` inside the programs, sites "latent" and "obs", no keywords."""

    def __init__(self, data_dim, z_dim=3, hidden_dim=8):
        super().__init__()
        self.encoder = TutorialEncoder(data_dim, z_dim, hidden_dim)
        self.decoder = TutorialDecoder(data_dim, z_dim, hidden_dim)
        self.z_dim = z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], self.z_dim)))
            z_scale = x.new_ones(torch.Size((x.shape[0], self.z_dim)))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            probs = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(probs, validate_args=False).to_event(1), obs=x)
            return probs

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


def tutorial():
    vae = TutorialVAE(12)
    return vae.model, vae.guide, (draw(N, 12, seed=7) > 0).to(torch.get_default_dtype())


# Parameters that have no home but the parameter store


BARE_PARAMETERS = ("W", "loc", "psi", "V", "scale")
"""The names in the parameter store of ``param_only``."""


def param_only():
    """Factor analysis of ``pyro.param`` statements alone; the guide is linear in x."""
    D, K = 7, 2

    def model(x):
        W = pyro.param("W", lambda: draw(D, K, seed=8))
        loc = pyro.param("loc", lambda: torch.zeros(D))
        psi = pyro.param("psi", lambda: torch.ones(D), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), torch.ones(K)).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T + loc, psi.sqrt()).to_event(1), obs=x)

    def guide(x):
        V = pyro.param("V", lambda: 0.3 * draw(D, K, seed=9))
        scale = pyro.param("scale", lambda: torch.full((K,), 0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ V, scale).to_event(1))

    return model, guide, draw(N, D, seed=10)


def param_table():
    """One q per datum in ``pyro.param`` tables, looked up by ``index``."""
    _, _, x = param_only()

    def indexed_model(x, index=None, num_data=None):
        W = pyro.param("W", lambda: draw(7, 2, seed=8))
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T, 1.0).to_event(1), obs=x)

    def guide(x, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        loc = pyro.param("table_loc", lambda: 0.5 * draw(N, 2, seed=11))
        scale = pyro.param(
            "table_scale", lambda: torch.full((N, 2), 0.8), constraint=constraints.positive
        )
        with pyro.plate("data", num_data or len(x), subsample=rows):
            pyro.sample("z", dist.Normal(loc[rows], scale[rows]).to_event(1))

    return indexed_model, guide, x


# Two levels, sampled in opposite order


def two_level():
    """z2 -> z1 -> x, with q(z1 | x) q(z2 | z1): a closed-form KL site by site would be wrong."""
    up, down = network(nn.Linear(3, 4)), network(nn.Linear(2, 3), nn.Tanh(), seed=12)
    encoder, decoder = network(nn.Linear(6, 6), seed=13), network(nn.Linear(3, 6), seed=14)

    def model(x=None, num_data=None, index=None, observe=True):
        n = len(x) if x is not None else num_data
        rows = torch.arange(n) if index is None else index
        with pyro.plate("data", num_data or n, subsample=rows):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(2 * down(z2), 0.5).to_event(1))
            return pyro.sample(
                "x", dist.Normal(decoder(z1), 0.6).to_event(1), obs=x if observe else None
            )

    def guide(x, num_data=None, index=None, **_):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            loc, raw = encoder(x).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, 0.4 * (0.5 * raw).exp()).to_event(1))
            loc2, raw2 = up(z1).chunk(2, -1)
            pyro.sample("z2", dist.Normal(loc2, 0.8 * (0.5 * raw2).exp()).to_event(1))

    return model, guide, draw(N, 6, seed=15)


# A plate of features inside the data


def feature_plate():
    """Data at dim -2, independent features at dim -1."""
    D, K = 8, 2
    encoder, decoder = network(nn.Linear(D, 2 * K), seed=16), network(nn.Linear(K, D), seed=17)
    noise = nn.Parameter(torch.tensor(-0.3))

    def model(x):
        pyro.module("features.decoder", decoder)
        sigma = pyro.param("features.noise", noise).exp()
        data, features = pyro.plate("data", len(x), dim=-2), pyro.plate("features", D, dim=-1)
        with data:
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            with features:
                pyro.sample("x", dist.Normal(decoder(z).squeeze(-2), sigma), obs=x)

    def guide(x):
        pyro.module("features.encoder", encoder)
        with pyro.plate("data", len(x), dim=-2):
            loc, raw = encoder(x).unsqueeze(-2).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))

    return model, guide, draw(N, D, seed=18)


def features_first():
    """The features' plate outside the data's: densities are (D, N)."""
    D, K = 5, 2
    nets = nn.ModuleDict(
        {
            "encoder": network(nn.Linear(D, 2 * K), seed=37),
            "decoder": network(nn.Linear(K, D), seed=38),
        }
    )

    def model(x):
        pyro.module("features_first", nets)
        data, features = pyro.plate("data", len(x), dim=-1), pyro.plate("features", D, dim=-2)
        with data:
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            mean = nets["decoder"](z).transpose(-1, -2)
            with features:
                pyro.sample("x", dist.Normal(mean, 0.7), obs=x.T)

    def guide(x):
        pyro.module("features_first", nets)
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = nets["encoder"](x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))

    return model, guide, draw(N, D, seed=39)


# Networks that know two dimensions only


class NaiveConvVAE(nn.Module):
    """A convolutional decoder for (B, K) codes alone: a further sample dimension breaks it."""

    def __init__(self, latent_dim=3):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = network(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), seed=19
        )
        self.decoder = network(
            nn.ConvTranspose2d(latent_dim, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 1, 3), seed=20
        )

    def decode(self, z):
        return self.decoder(z.view(-1, self.latent_dim, 1, 1)).flatten(1)

    def model(self, x):
        pyro.module("conv_vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 0.8).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("conv_vae", self)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x.view(-1, 1, 4, 4)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))


def naive_conv():
    vae = NaiveConvVAE()
    return vae.model, vae.guide, draw(N, 16, seed=21)


def normalized_over_dim_one():
    """Mixture weights by ``softmax(..., dim=1)``: under a sample dimension that is another one.

    Nothing raises there; only the numbers are wrong.
    """
    encoder, decoder = network(nn.Linear(6, 4), seed=22), network(nn.Linear(2, 3), seed=23)
    centres = nn.Linear(3, 6, bias=False)
    with torch.no_grad():
        centres.weight.copy_(2 * draw(6, 3, seed=24))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            shares = F.softmax(3 * decoder(z), dim=1)
            pyro.sample("x", dist.Normal(centres(shares), 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))

    return model, guide, draw(N, 6, seed=25)


# Latent variables that are not real numbers


def positive_latent():
    """Gamma factors of counts, with a log-normal guide: no closed-form KL, positive support."""
    D, K = 8, 2
    encoder, loadings = network(nn.Linear(D, 2 * K), seed=26), nn.Parameter(draw(K, D, seed=27))
    networks = nn.ModuleDict({"encoder": encoder})
    networks.register_parameter("loadings", loadings)

    def model(x=None, *, index=None, num_data=None, observe=True):
        n = len(x) if x is not None else num_data
        rows = torch.arange(n) if index is None else index
        with pyro.plate("data", num_data or n, subsample=rows):
            z = pyro.sample("z", dist.Gamma(torch.full((K,), 2.0), 1.0).to_event(1))
            rate = z @ F.softplus(networks.loadings) + 0.1
            return pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x if observe else None)

    def guide(x, *, index=None, num_data=None, **_):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            loc, raw = encoder(torch.log1p(x)).chunk(2, -1)
            pyro.sample("z", dist.LogNormal(0.3 * loc, 0.4 * (0.5 * raw).exp()).to_event(1))

    return model, guide, torch.poisson(torch.full((N, D), 3.0), generator=generator(28))


# Pyro modules whose root has no name


class PlainModel(PyroModule):
    def __init__(self, data_dim, latent_dim):
        super().__init__()
        self.loadings = nn.Parameter(draw(data_dim, latent_dim, seed=29))
        self.noise = PyroParam(torch.tensor(0.8), constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.loadings.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.loadings.T, self.noise).to_event(1), obs=x)


class PlainGuide(PyroModule):
    def __init__(self, data_dim, latent_dim):
        super().__init__()
        self.encoder = network(nn.Linear(data_dim, latent_dim), seed=30)
        self.scale = PyroParam(torch.full((latent_dim,), 0.6), constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.scale).to_event(1))


def unnamed_modules():
    """Two ``PyroModule``s named "": a second such pair has the same names in the store."""
    return PlainModel(6, 2), PlainGuide(6, 2), draw(N, 6, seed=31)


class NoiseGuide(PlainGuide):
    """A guide with a parameter of the same name as the model's."""

    def __init__(self, data_dim, latent_dim):
        super().__init__(data_dim, latent_dim)
        self.noise = PyroParam(torch.tensor(0.3), constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.scale * self.noise).to_event(1))


def colliding_names():
    """Broken: both programs own a parameter "noise", and Pyro lets one replace the other."""
    return PlainModel(6, 2), NoiseGuide(6, 2), draw(N, 6, seed=31)


# Layers that act differently in training


class Regularized(nn.Module):
    """Batch norm in the encoder, dropout in the decoder."""

    def __init__(self, data_dim=6, latent_dim=2):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = network(
            nn.Linear(data_dim, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2 * latent_dim)
        )
        self.decoder = network(
            nn.Linear(latent_dim, 10), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, data_dim), seed=32
        )

    def model(self, x=None, *, mask=None, observe=True, num_data=None):
        pyro.module("regularized", self)
        with pyro.plate("data", len(x) if x is not None else num_data):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1))
            px = dist.Normal(self.decoder(z), 0.7)
            px = px if mask is None else px.mask(mask)
            return pyro.sample("x", px.to_event(1), obs=x if observe else None)

    def guide(self, x, **_):
        pyro.module("regularized", self)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))


def regularized():
    pair = Regularized()
    return pair.model, pair.guide, draw(N, 6, seed=33)


# An object that is no module, and cannot be hashed


@dataclass
class Experiment:
    """Networks kept in a plain object, one of them in a dictionary."""

    networks: dict
    noise: float = 0.7

    def model(self, x, index=None, num_data=None):
        decoder = pyro.module("experiment.decoder", self.networks["decoder"])
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), self.noise).to_event(1), obs=x)

    def guide(self, x, index=None, num_data=None):
        encoder = pyro.module("experiment.encoder", self.networks["encoder"])
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))


def plain_object():
    networks = {
        "encoder": network(nn.Linear(6, 4), seed=34),
        "decoder": network(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6), seed=35),
    }
    experiment = Experiment(networks)
    return experiment.model, experiment.guide, draw(N, 6, seed=36)


# Nothing to fit


def without_parameters():
    """A model and a guide that hold no parameter; x has two columns."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(torch.full((len(x), 2), 2.0), 1.5).to_event(1))

    return model, guide


# Pyro's own guide, on a constrained latent variable


def auto_normal():
    """``AutoNormal``: an auxiliary site and a Delta that carries a density, one row per datum."""
    model, _, x = positive_latent()
    start = init_to_value(values={"z": torch.full((N, 2), 2.0)})
    guide = AutoNormal(model, init_scale=0.4, init_loc_fn=start)
    guide(x)
    return model, guide, x


PAIRS = {
    make.__name__: make
    for make in (
        functions,
        tutorial,
        param_only,
        two_level,
        feature_plate,
        features_first,
        naive_conv,
        normalized_over_dim_one,
        positive_latent,
        unnamed_modules,
        regularized,
        plain_object,
    )
}
