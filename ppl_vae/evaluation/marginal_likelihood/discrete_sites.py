"""Values of discrete latent variables that a guide rarely draws but that the posterior favours.

The weights of a discrete variable take few values, and those that were drawn carry no information
about a value that was not: a guide that gives a probability of 1e-4 to a class with 30 % of the
posterior produces equal weights almost always. Therefore each value is evaluated. With the site c
fixed at a value and all other sites drawn from the guide, the mean of

    p(x, c, z) / q(z | x, c)

is p(x, c) for any guide. Its share in the sum over all values is the posterior probability of the
value, which is compared with the guide's.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from pyro import poutine
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import DATA_PLATE, Density
from ppl_vae.core.traces import PairTraces, Site, plates_of
from ppl_vae.evaluation.local_guides.local_gaussian import can_be_refined
from ppl_vae.evaluation.marginal_likelihood.reliability import MIN_COUNT

MAX_RUNS = 1024
"""The largest number of runs of the pair on a batch."""
DRAWS_PER_VALUE = 16
"""Draws of the other sites for each value of a discrete one."""


def discrete_sites(run: PairTraces) -> dict[str, Site]:
    """The guide's sites of the discrete latent variables of the model."""
    guide = run.drawn
    return {
        name: guide[name]
        for name in run.latent
        if getattr(guide[name]["fn"].support, "is_discrete", False)
    }


@dataclass(frozen=True)
class _Variable:
    """One discrete variable per datum: a site, or one of its entries.

    Attributes:
        name: the name of the site.
        entry: True at the variable's entries in the batch of the innermost distribution.
        values: the values that it can take, (C, ...), each broadcastable to that batch.
    """

    name: str
    entry: Bool[Tensor, "..."]
    values: Tensor

    def fixed(self, site: Site, value: Tensor) -> poutine.Trace:
        """A trace of the site with this variable at a value, for a guide to replay."""
        base = _innermost(site["fn"])
        entry = self.entry[(..., *[None] * len(base.event_shape))]
        trace = poutine.Trace()
        trace.add_node(self.name, **(site | {"value": torch.where(entry, value, site["value"])}))
        return trace

    def log_prob(self, run: PairTraces) -> Float[Tensor, " B"]:
        """The guide's log probability of the value at which the variable is fixed."""
        site = run.drawn[self.name]
        base = _innermost(site["fn"])
        values = torch.where(self.entry, base.log_prob(site["value"]), 0.0)
        inner = values.dim() - len(site["fn"].batch_shape)
        values = values.sum(list(range(-inner, 0))) if inner else values
        return run.per_datum(site, values).squeeze(0)


class Undersampled(NamedTuple):
    """The values of discrete variables that the guide is expected to draw fewer than ten times.

    Of several discrete variables, the maximum over variables is given.

    Attributes:
        mass: their posterior probability in excess of the guide's.
        error: the standard error that they add to log p(x_n), in nats: with posterior
            probabilities r and those of the guide q, sqrt(sum (r - q)^2 / (S q)).
    """

    mass: Float[Tensor, " N"]
    error: Float[Tensor, " N"]


class LatentDiagnostics(NamedTuple):
    """Properties of the latent sites of a pair that affect the reliability of its estimates.

    Attributes:
        refinable: whether a Gaussian can be refined for each site.
        undersampled: the rarely drawn values; None if no site is discrete.
        complete: whether the only latent site is one discrete variable all of whose values were
            evaluated, so that no others can be missed.
        notes: the sites whose values could not be evaluated.
    """

    refinable: bool
    undersampled: Undersampled | None
    complete: bool
    notes: tuple[str, ...]


def diagnose_latents(
    pair: Pair, first: Batch, batches: Iterable[Batch], num_samples: int
) -> LatentDiagnostics:
    """Examine the latent sites of a pair, and evaluate the values of the discrete ones.

    Args:
        pair: the pair.
        first: some of the data.
        batches: all of them.
        num_samples: draws per datum of the estimates, S.
    """
    run = pair.inspect(first)
    drawn, found = run.drawn, discrete_sites(run)
    refinable = bool(run.latent) and all(can_be_refined(drawn[name]["fn"]) for name in run.latent)
    variables = {name: list(_variables(name, site)) for name, site in found.items()}
    notes = tuple(
        f"site {name!r} has too many values to evaluate those that the guide rarely draws"
        for name, found_variables in variables.items()
        if not found_variables
    )
    undersampled = None
    if found:
        parts = [undersampled_values(pair, batch, num_samples) for batch in batches]
        undersampled = Undersampled(*(torch.cat(part) for part in zip(*parts, strict=True)))
    complete = sum(map(len, variables.values())) == 1 == len(found)
    return LatentDiagnostics(refinable, undersampled, complete, notes)


def undersampled_values(pair: Pair, batch: Batch, num_samples: int) -> Undersampled:
    """The values of discrete variables that S draws of the guide are likely to miss.

    Args:
        pair: the pair.
        batch: the data.
        num_samples: draws per datum of the estimates, S.

    Returns:
        Zeros where there is no discrete variable, and for sites with more than 1,024 values.
    """
    mass, error = torch.zeros(2, len(batch), dtype=torch.float64)
    with pair.dry_run():
        run = pair.run(batch)
        for name, site in discrete_sites(run).items():
            for variable in _variables(name, site):
                posterior, q = _probabilities(variable, pair, batch, run)
                rare = q * num_samples < MIN_COUNT
                excess = torch.where(rare, (posterior - q).clamp(min=0), 0.0)
                ratio = (excess.square() / (q * num_samples)).nan_to_num(nan=0.0)
                mass = torch.maximum(mass, excess.sum(0).cpu())
                error = torch.maximum(error, ratio.sum(0).sqrt().cpu())
    return Undersampled(mass, error)


def _probabilities(
    variable: _Variable, pair: Pair, batch: Batch, run: PairTraces
) -> tuple[Float[Tensor, "C B"], Float[Tensor, "C B"]]:
    """The posterior probability of each value, and the guide's probability of it."""
    site = run.drawn[variable.name]
    only_latent = len(run.latent) == 1 and bool(variable.entry.all())
    limit = max(1, min(DRAWS_PER_VALUE, MAX_RUNS // len(variable.values)))
    draws = 1 if only_latent else limit
    log_joint, q = [], []
    for value in variable.values:
        guide = poutine.replay(pair.guide, trace=variable.fixed(site, value))
        runs = [pair.with_guide(guide).run(batch) for _ in range(draws)]
        log_q = torch.stack([variable.log_prob(each) for each in runs]).double()
        log_weights = torch.stack([each.log_weights().squeeze(0) for each in runs]).double()
        log_joint.append((log_weights + log_q).logsumexp(0) - math.log(draws))
        q.append(log_q.exp().mean(0))
    posterior = torch.stack(log_joint).softmax(0).nan_to_num(nan=0.0)
    return posterior, torch.stack(q)


def _variables(name: str, site: Site) -> Iterator[_Variable]:
    """The variables of a site, if they have few enough values to evaluate each."""
    base = _innermost(site["fn"])
    if not base.has_enumerate_support:
        return
    values = base.enumerate_support(expand=False)
    shape = base.batch_shape
    data = plates_of(site)[DATA_PLATE].dim - (len(shape) - len(site["fn"].batch_shape))
    entries = [1 if dim - len(shape) == data else size for dim, size in enumerate(shape)]
    number = math.prod(entries)
    if number * len(values) > MAX_RUNS:
        return
    eye = torch.eye(number, dtype=torch.bool, device=values.device)
    yield from (_Variable(name, row.reshape(entries).expand(shape), values) for row in eye)


def _innermost(fn: Density) -> Any:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn
