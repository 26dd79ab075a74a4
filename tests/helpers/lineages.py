"""Small lineages, fitted once per process for several test files."""

import dataclasses
import functools

import pyro
import pyro.distributions as dist
import torch

import oracles
import user_pairs
from ppl_vae import run_lineage
from ppl_vae.lineage.problem import LineageSettings
from ppl_vae.lineage.report_data import report_data
from ppl_vae.lineage.stages import POINT, STAGES


def with_evaluation(settings, *, num_samples, refine, rows, temperatures):
    """The settings with another length of the evaluation."""
    return dataclasses.replace(
        settings,
        num_samples=num_samples,
        refine=refine,
        cross_check_rows=rows,
        num_temperatures=temperatures,
    )


SHORT = with_evaluation(
    LineageSettings(steps=120, batch_size=64, lr=2e-2, patience=3, posterior_draws=200),
    num_samples=200,
    refine=40,
    rows=10,
    temperatures=20,
)
TINY = with_evaluation(
    LineageSettings(steps=5, batch_size=8, posterior_draws=20),
    num_samples=100,
    refine=10,
    rows=4,
    temperatures=5,
)
"""For tests that need no convergence."""
USER_PAIR = "a user's pair"
LABELS = tuple("abc"[k % 3] for k in range(200))


@functools.cache
def table():
    return oracles.simulate_ppca((16, 8), 1, 200, 6, seed=0)


def linear_networks(width=6, latent_dim=2):
    """A decoder, and an encoder that gives a mean and a log scale."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decode = torch.nn.Linear(latent_dim, width).double()
        return decode, torch.nn.Linear(width, 2 * latent_dim).double()


def user_written_pair(width=6, latent_dim=2):
    """A pair as a user writes it: two functions around two networks."""
    decode, encode = linear_networks(width, latent_dim)

    def model(x=None, *, index=None, num_data=None):
        rows = torch.arange(len(x), device=x.device) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            prior = decode.weight.new_zeros(latent_dim)
            z = pyro.sample("z", dist.Normal(prior, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 1.5).to_event(1), obs=x)

    return model, user_pairs.normal_guide(encode)


@functools.cache
def small_lineage():
    """All stages and a user-written pair."""
    extra = {USER_PAIR: user_written_pair()}
    about = {"data": "a <small> table", "notes": ["found: a note"]}
    return run_lineage(table(), latent_dim=2, extra=extra, settings=SHORT, seed=1, about=about)


def bounded(lineage):
    """The rows of a lineage with a bound on log p: all except the autoencoders and the stages
    with a posterior of the parameters, whose bound is on the evidence."""
    return [row for row in lineage.rows if row.q != POINT and row.posterior is None]


def default_stages():
    """The names of the stages that are run unless others are given."""
    return [stage.name for stage in STAGES.values() if not stage.on_request]


@functools.cache
def small_report_data():
    return report_data(small_lineage(), labels=LABELS, label="letter", image_shape=(2, 3))


def subset(lineage, names):
    """The lineage as if only these stages had been requested."""
    rows = tuple(row for row in lineage.rows if row.stage in names)
    pairs = {name: lineage.pairs[name] for name in names}
    about = lineage.about | {"stages": [row.stage for row in rows]}
    return dataclasses.replace(lineage, rows=rows, pairs=pairs, about=about)


@functools.cache
def single_stage_lineage():
    """One stage, no classes, no images."""
    return run_lineage(table(), latent_dim=1, stages=["px-em"], settings=SHORT, seed=1)


@functools.cache
def single_stage_report_data():
    return report_data(single_stage_lineage())
