"""Values of discrete latent variables that a guide seldom draws although the posterior has them.

Weights of a discrete variable take few values. Those drawn say nothing of a value that was not
drawn: a guide that gives a probability of 1e-4 to a class which holds 30 % of the posterior makes
equal weights with hardly an exception. So each value is looked at in turn. With the site c fixed
at a value and all other sites drawn from the guide, the mean of

    p(x, c, z) / q(z | x, c)

is p(x, c) whatever the guide; its share in the sum over values is the posterior probability of
that value, and the guide says with which probability it draws it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from pyro import poutine
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import DATA_PLATE, Density, ProgramLike
from ppl_vae.core.state import dry_run
from ppl_vae.core.traces import PairTraces, Site, frames, sites
from ppl_vae.evaluation.local_guides.local_gaussian import can_be_refined
from ppl_vae.evaluation.marginal_likelihood.reliability import FEWEST_COUNT

MOST_RUNS = 1024
"""So often at most the pair is run on a block of data."""
DRAWS_EACH = 16
"""Draws of the other sites for each value of a discrete one."""


def discrete_sites(run: PairTraces) -> dict[str, Site]:
    """The sites of the guide that draw discrete latent variables of the model."""
    guide = sites(run.guide)
    return {
        name: guide[name]
        for name in run.latent
        if getattr(guide[name]["fn"].support, "is_discrete", False)
    }


@dataclass(frozen=True)
class _Variable:
    """One discrete variable for each datum: a site, or one of its entries.

    Attributes:
        name: of the site.
        entry: where the variable stands in the batch of the innermost distribution.
        values: those it can take, (C, ...), each broadcastable to that batch.
    """

    name: str
    entry: Bool[Tensor, "..."]
    values: Tensor

    def fixed(self, site: Site, value: Tensor) -> poutine.Trace:
        """The site alone, with this variable at a value, for a guide to replay."""
        base = _innermost(site["fn"])
        where = self.entry[(..., *[None] * len(base.event_shape))]
        trace = poutine.Trace()
        trace.add_node(self.name, **(site | {"value": torch.where(where, value, site["value"])}))
        return trace

    def log_prob(self, run: PairTraces) -> Float[Tensor, " B"]:
        """The guide's log probability of the value at which the variable was fixed."""
        site = sites(run.guide)[self.name]
        base = _innermost(site["fn"])
        values = torch.where(self.entry, base.log_prob(site["value"]), 0.0)
        inner = values.dim() - len(site["fn"].batch_shape)
        values = values.sum(list(range(-inner, 0))) if inner else values
        return run.per_datum(site, values).squeeze(0)


class Missed(NamedTuple):
    """What values of discrete variables add that S draws are likely to miss.

    Of each discrete variable these are the values which the guide is expected to draw fewer than
    ten times; of several variables the worst counts.

    Attributes:
        mass: their posterior probability, as far as it is more than the guide's own.
        error: the standard error that they add to log p(x_n), in nats: with posterior
            probabilities r and the guide's q, sqrt(sum (r - q)^2 / (S q)).
    """

    mass: Float[Tensor, " N"]
    error: Float[Tensor, " N"]


class Examined(NamedTuple):
    """What the sites of a pair say of its estimates.

    Attributes:
        refinable: whether a Gaussian can be refined for each of them.
        missed: None if no site is discrete.
        complete: whether there is one discrete variable alone, all of whose values were looked
            at, so that nothing else can be missed.
        notes: which sites could not be looked at.
    """

    refinable: bool
    missed: Missed | None
    complete: bool
    notes: tuple[str, ...]


def examine(
    model: ProgramLike,
    guide: ProgramLike,
    blocks: Sequence[tuple[Tensor, Mapping[str, Any]]],
    num_samples: int,
) -> Examined:
    """Look at the latent sites of a pair, and at the values of the discrete ones.

    Args:
        model, guide: the pair.
        blocks: of data, and what the pair is told of each.
        num_samples: S.
    """
    with dry_run(model, guide):
        run = Pair(model, guide).run(Batch(blocks[0][0], **blocks[0][1]))
    drawn, found = sites(run.guide), discrete_sites(run)
    refinable = bool(run.latent) and all(can_be_refined(drawn[name]["fn"]) for name in run.latent)
    variables = {name: list(_variables(name, site)) for name, site in found.items()}
    notes = tuple(
        f"site {name!r} has too many values to look for those that the guide hardly draws"
        for name, those in variables.items()
        if not those
    )
    missed = [missed_values(model, guide, *b, num_samples) for b in blocks] if found else []
    whole = Missed(*(torch.cat(part) for part in zip(*missed, strict=True))) if found else None
    complete = sum(map(len, variables.values())) == 1 == len(found)
    return Examined(refinable, whole, complete, notes)


def missed_values(
    model: ProgramLike,
    guide: ProgramLike,
    x: Float[Tensor, "B D"],
    keywords: Mapping[str, Any],
    num_samples: int,
) -> Missed:
    """What S draws of the guide are likely to miss of each datum in a block.

    Args:
        model, guide: the pair.
        x: a block of data.
        keywords: what the pair is told of it.
        num_samples: S.

    Returns:
        Zeros where there is no discrete variable, and for sites with more than 1,024 values.
    """
    mass, error = torch.zeros(2, len(x), dtype=torch.float64)
    with dry_run(model, guide):
        run = Pair(model, guide).run(Batch(x, **keywords))
        for name, site in discrete_sites(run).items():
            for variable in _variables(name, site):
                posterior, chance = _probabilities(variable, (model, guide), x, keywords, run)
                rare = chance * num_samples < FEWEST_COUNT
                excess = torch.where(rare, (posterior - chance).clamp(min=0), 0.0)
                ratio = (excess.square() / (chance * num_samples)).nan_to_num(nan=0.0)
                mass = torch.maximum(mass, excess.sum(0).cpu())
                error = torch.maximum(error, ratio.sum(0).sqrt().cpu())
    return Missed(mass, error)


def _probabilities(
    variable: _Variable,
    pair: tuple[ProgramLike, ProgramLike],
    x: Tensor,
    keywords: Mapping[str, Any],
    run: PairTraces,
) -> tuple[Float[Tensor, "C B"], Float[Tensor, "C B"]]:
    """Of each value: its posterior probability, and that with which the guide draws it."""
    site = sites(run.guide)[variable.name]
    number = len(variable.values)
    alone = len(run.latent) == 1 and bool(variable.entry.all())
    draws = 1 if alone else max(1, min(DRAWS_EACH, MOST_RUNS // number))
    masses, chances = [], []
    for value in variable.values:
        guide = poutine.replay(pair[1], trace=variable.fixed(site, value))
        runs = [Pair(pair[0], guide).run(Batch(x, **keywords)) for _ in range(draws)]
        chance = torch.stack([variable.log_prob(each) for each in runs]).double()
        weights = torch.stack([each.log_weights().squeeze(0) for each in runs]).double()
        masses.append((weights + chance).logsumexp(0) - math.log(draws))
        chances.append(chance.exp().mean(0))
    posterior = torch.stack(masses).softmax(0).nan_to_num(nan=0.0)
    return posterior, torch.stack(chances)


def _variables(name: str, site: Site) -> Iterator[_Variable]:
    """The variables of a site that have few enough values to look at each."""
    base = _innermost(site["fn"])
    if not base.has_enumerate_support:
        return
    values = base.enumerate_support(expand=False)
    shape = base.batch_shape
    data = frames(site)[DATA_PLATE].dim - (len(shape) - len(site["fn"].batch_shape))
    entries = [1 if dim - len(shape) == data else size for dim, size in enumerate(shape)]
    number = math.prod(entries)
    if number * len(values) > MOST_RUNS:
        return
    eye = torch.eye(number, dtype=torch.bool, device=values.device)
    yield from (_Variable(name, row.reshape(entries).expand(shape), values) for row in eye)


def _innermost(fn: Density) -> Any:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn
