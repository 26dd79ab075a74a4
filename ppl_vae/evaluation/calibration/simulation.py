"""Simulated data with the values that generated them, and draws of a guide given data."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self, TypeAlias

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.introspection import filter_kwargs, placement
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import DATA_PLATE, ProgramLike
from ppl_vae.core.state import eval_mode
from ppl_vae.core.traces import PairTraces, Site, by_draw, by_draw_and_datum, plates_of, sites
from ppl_vae.evaluation.marginal_likelihood.drawn_data import draw_batch

SiteDraws: TypeAlias = dict[str, Tensor]
"""Values by the names of sites: (S, ...) of global sites, (S, B, ...) of local ones."""


class LogJoint(NamedTuple):
    """log p of x and of all latent sites, for each draw.

    Attributes:
        local: the terms of each datum, (S, B).
        of_globals: those of global sites, (S,).
    """

    local: Float[Tensor, "S B"]
    of_globals: Float[Tensor, " S"]

    @property
    def total(self) -> Float[Tensor, " S"]:
        """The sum of all terms."""
        return self.local.sum(1) + self.of_globals


@dataclass(frozen=True)
class Simulation:
    """Data drawn from a model, and the values that generated them.

    Attributes:
        model: the model.
        batch: the data.
        trace: the run that drew them.
    """

    model: ProgramLike
    batch: Batch
    trace: Trace

    @classmethod
    @torch.no_grad()
    def of(cls, model: ProgramLike, num_data: int, data_dim: int) -> Self:
        """Draw data.

        Raises:
            ValueError: as :func:`~ppl_vae.evaluation.marginal_likelihood.drawn_data.draw_batch`.
        """
        with eval_mode(model):
            template = zeros(model, num_data, data_dim)
            return cls(model, *draw_batch(model, template, "simulation_based_calibration"))

    @cached_property
    def latent(self) -> dict[str, Site]:
        """The latent sites."""
        drawn = {n: s for n, s in sites(self.trace).items() if not s["is_observed"]}
        return {n: s for n, s in drawn.items() if not s["infer"].get("was_observed")}

    @property
    def local(self) -> set[str]:
        """The names of the latent sites of each datum."""
        return {name for name, site in self.latent.items() if DATA_PLATE in plates_of(site)}

    @cached_property
    def draws(self) -> SiteDraws:
        """The true values, as one draw."""
        return latent_values(PairTraces(self.trace, Trace()), list(self.latent))

    @cached_property
    def log_joint(self) -> LogJoint:
        """The log joint density of the true values."""
        return _log_joint(self.trace)


def zeros(model: ProgramLike, num_data: int, data_dim: int) -> Batch:
    """A batch of zeros of the model's dtype and device."""
    place = placement(model) or {"dtype": torch.get_default_dtype()}
    return Batch(torch.zeros(num_data, data_dim, **place))


def latent_values(run: PairTraces, names: list[str]) -> SiteDraws:
    """The values of these sites of the model in a run."""
    return {name: _by_draw(run, sites(run.model)[name]) for name in names}


def _by_draw(run: PairTraces, site: Site) -> Tensor:
    if DATA_PLATE in plates_of(site):
        return by_draw_and_datum(run, site, site["value"])
    return by_draw(site, site["value"])


def _log_joint(trace: Trace) -> LogJoint:
    run = PairTraces(trace, Trace())
    return LogJoint(run.log_weights().double(), run.global_log_weights().double())


def draw_from_guide(
    pair: Pair, batch: Batch, names: list[str], num_draws: int
) -> tuple[SiteDraws, LogJoint]:
    """Draws of these latent sites from a guide, and their log joint density."""
    run = pair.run(batch, num_samples=num_draws, dim=pair.sample_dim(batch))
    draws = {
        name: value.expand(num_draws, *value.shape[1:])
        for name, value in latent_values(run, names).items()
    }
    model = PairTraces(run.model, Trace(), run.stated_num_data, run.repeats)
    local, of_globals = model.log_weights().double(), model.global_log_weights().double()
    return draws, LogJoint(local.expand(num_draws, -1), of_globals.expand(num_draws))


def log_joint_of_draws(
    model: ProgramLike, batch: Batch, draws: Mapping[str, Tensor]
) -> Float[Tensor, " S"]:
    """log p(x, draws) for each draw of all latent sites, by one run of the model for each."""
    values = []
    for place in range(len(next(iter(draws.values())))):
        given = {name: value[place] for name, value in draws.items()}
        keywords = filter_kwargs(model, batch.keywords)
        conditioned = poutine.condition(model, data=given)
        values.append(_log_joint(poutine.trace(conditioned).get_trace(batch.x, **keywords)).total)
    return torch.cat(values)
