"""Pairs whose draws are given, fitted by the processes of the tests."""

import math

import cases
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from ppl_vae import VAE, fit_svi
from ppl_vae.core.processes.messages import record_messages
from ppl_vae.core.processes.ranks import Processes


class GivenDraws(PyroModule):
    """A pair in which z_n is a function of given noise, so that nothing is drawn.

    q(z_n) has the mean of an encoder, or with ``per_datum`` a mean of its own.
    """

    def __init__(self, x, *, per_datum=False, normalized=False, name="given"):
        super().__init__(name)
        generator = torch.Generator().manual_seed(0)
        rows, columns = x.shape
        self.register_buffer("noise", torch.randn(rows, 2, generator=generator).to(x))
        self.encoder = nn.Identity() if per_datum else nn.Linear(columns, 2).to(x)
        self.decoder = nn.Linear(2, columns).to(x)
        self.norm = nn.BatchNorm1d(columns, affine=False).to(x) if normalized else nn.Identity()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        self.log_scale = nn.Parameter(torch.zeros(2).to(x))
        self.loc = nn.Parameter(torch.zeros(rows, 2).to(x)) if per_datum else None

    def tables(self):
        return [] if self.loc is None else [self.loc]

    def model(self, x=None, *, mask=None, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            density = dist.Normal(self.decoder(z), 0.5)
            density = density if mask is None else density.mask(mask)
            pyro.sample("x", density.to_event(1), obs=x)

    def guide(self, x=None, *, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            loc = self.encoder(self.norm(x)) if self.loc is None else self.loc[rows]
            q = dist.Normal(loc, self.log_scale.exp()).to_event(1)
            value = loc + self.log_scale.exp() * self.noise[rows]
            pyro.sample("z", dist.Delta(value, q.log_prob(value), event_dim=1))


def fit_given(x, options, pair_options=None):
    pair = GivenDraws(x, **(pair_options or {}))
    with record_messages() as log:
        result = fit_svi(
            pair.model, pair.guide, x, seed=0, progress=False, **({"capture": False} | options)
        )
    return cases.state(pair), result.objective, result, dict(log.counts)


def fit_vae(x, options, x_val=None, hidden=(8,)):
    vae = VAE.like(x, 2, hidden=hidden, seed=0)
    result = fit_svi(vae.model, vae.guide, x, x_val=x_val, seed=0, progress=False, **options)
    return cases.state(vae), result


def draws_of_a_fit(x):
    """Every value of z that this rank draws."""
    vae, drawn = VAE.like(x, 2, hidden=(8,), seed=0), []

    def guide(x, **keywords):
        z = vae.guide(x, **keywords)
        drawn.extend(z.detach().flatten().tolist() if torch.is_grad_enabled() else [])
        return z

    before = len(drawn)
    fit_svi(vae.model, guide, x, steps=4, seed=0, progress=False, capture=False)
    return drawn[before + x.shape[0] * 2 :]  # without the run that finds the parameters


class Mistaken(GivenDraws):
    def __init__(self, x, fails_at=None, nan_at=None):
        super().__init__(x)
        self.fails_at, self.nan_at, self.runs = fails_at, nan_at, 0

    def model(self, x=None, *, mask=None, index=None, num_data=None):
        self.runs += 1
        is_second = Processes.current().rank == 1
        if self.runs == self.fails_at and is_second:
            raise ZeroDivisionError("a mistake of the user")
        x = x * math.nan if self.runs == self.nan_at and is_second else x
        return super().model(x, mask=mask, index=index, num_data=num_data)


def fit_of_rank(x, options):
    """A fit whose arguments differ between ranks."""
    options = {"seed": 0, "steps": 8, **options}
    x = x[: options.pop("rows", len(x))] + options.pop("shift", 0.0)
    x = x.to(options.pop("dtype", x.dtype))
    if (missing := options.pop("missing", None)) is not None:
        x[missing, 0] = math.nan
    mistakes = {name: options.pop(name, None) for name in ("fails_at", "nan_at")}
    pair = Mistaken(x, **mistakes)
    fit_svi(pair.model, pair.guide, x, progress=False, **{"capture": False} | options)


def endless(kind, x, file):
    """Fits without end, by one of three algorithms; those of SVI write a checkpoint."""
    hidden = (400, 400) if kind == "SVI by shared memory" else (8,)
    while True:
        if kind == "EM":
            cases.linear_fit("EM", x)
        elif kind == "Bayesian":
            cases.bayesian(x)
        else:
            options = {"steps": 10**6, "batch_size": 10, "capture": False, "checkpoint": file}
            fit_vae(x, options, hidden=hidden)
