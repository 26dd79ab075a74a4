"""Draws of any pair as plain arrays, draw by draw and datum by datum; labels come later."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike, check_support
from ppl_vae.core.state import eval_mode, isolated_store, seeded
from ppl_vae.core.traces import PairTraces, by_draw_and_datum, data_sites, log_prob, sites
from ppl_vae.evaluation.marginal_likelihood.batching import rows_at_once
from ppl_vae.evaluation.marginal_likelihood.importance import prior_guide
from ppl_vae.objectives.bounds import batch_keywords

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class PairDraws:
    """What a pair draws, by site; S draws of each of B data.

    Attributes:
        latent: draws of q(z | x), (S, B, ...).
        predictive: draws of x given each of them, missing values filled, (S, B, ...).
        prior_predictive: draws of x given draws of the prior, one datum a draw, (S, ...).
        observed: the data as the model observes them, NaN where missing, (B, ...).
        log_weight: log p(x, z) - log q(z | x), in nats, (S, B).
        log_joint: log p(x, z), in nats, (S, B).
    """

    latent: Arrays = field(default_factory=dict)
    predictive: Arrays = field(default_factory=dict)
    prior_predictive: Arrays = field(default_factory=dict)
    observed: Arrays = field(default_factory=dict)
    log_weight: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    log_joint: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def numbers(self) -> int:
        """How many there are in the largest group."""
        groups = (self.latent, self.predictive, self.prior_predictive)
        sizes = [sum(array.size for array in group.values()) for group in groups]
        return max(*sizes, 2 * self.log_weight.size)


@torch.no_grad()
def pair_draws(
    model: ProgramLike,
    guide: ProgramLike,
    x: Float[Tensor, "N D"],
    *,
    num_samples: int,
    mask: Bool[Tensor, "N D"] | None,
    rows: Int[Tensor, " B"],
    seed: int | None,
) -> PairDraws:
    """Draw from a pair, in blocks, so that memory holds the result and little else.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x, mask: the whole data, as :func:`ppl_vae.core.program.as_data_and_mask` gives them.
        num_samples: draws per datum, S; and as many from the prior.
        rows: of x to draw for.
        seed: of the draws.

    Raises:
        ValueError: what :func:`ppl_vae.core.traces.check_pair` refuses; a model that observes
            nothing; missing entries and an observed site that has another number of entries per
            datum.
    """
    check_support(model, x, mask)
    size = (num_samples, len(rows))
    draws = PairDraws(log_weight=np.empty(size), log_joint=np.empty(size))
    with isolated_store(), seeded(seed), eval_mode(model, guide):
        for place, run in _runs(model, guide, x, mask, rows, num_samples):
            _keep(draws, place, run, None if mask is None else mask[rows[place[1]]])
        _keep_prior(draws, model, x, num_samples)
    return draws


Place = tuple[slice, slice]


def _runs(
    model: ProgramLike,
    guide: ProgramLike,
    x: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    num_samples: int,
) -> Iterator[tuple[Place, PairTraces]]:
    """Runs of the pair on blocks of draws and rows, and where these stand among all."""
    for first in range(0, len(rows), rows_at_once(x)):
        block = rows[first : first + rows_at_once(x)]
        batch = x[block], batch_keywords(x, mask, block)
        dim = (
            Pair(model, guide).sample_dim(Batch(batch[0], **batch[1])) if num_samples > 1 else None
        )
        step = max(1, rows_at_once(x) // len(block))
        for start in range(0, num_samples, step):
            number = min(step, num_samples - start)
            run = Pair(model, guide).run(Batch(batch[0], **batch[1]), num_samples=number, dim=dim)
            yield (slice(start, start + number), slice(first, first + len(block))), run


def _keep(draws: PairDraws, place: Place, run: PairTraces, mask: Tensor | None) -> None:
    size = draws.log_weight.shape
    for name, site in run.latent.items():
        _write(draws.latent, name, by_draw_and_datum(run, site, site["value"]), place, size)
    for name, site in data_sites(run).items():
        drawn = by_draw_and_datum(run, site, site["fn"].sample())
        _write(draws.predictive, name, drawn, place, size)
        if place[0].start == 0:
            seen = _with_holes(name, by_draw_and_datum(run, site, site["value"])[0], mask)
            _write(draws.observed, name, seen, place[1:], size[1:])
    joint = [run.per_datum(site, log_prob(site)) for site in sites(run.model).values()]
    draws.log_joint[place] = torch.stack(torch.broadcast_tensors(*joint)).sum(0).double().cpu()
    draws.log_weight[place] = run.log_weights().double().cpu()


def _keep_prior(draws: PairDraws, model: ProgramLike, x: Tensor, num_samples: int) -> None:
    # The model is run on rows of x, for models that cannot run without; none of its draws is used
    # again, so each row gives one.
    rows = torch.arange(num_samples, device=x.device)
    for block in rows.split(rows_at_once(x)):
        which = block.remainder(len(x))
        told = {"index": which, "num_data": len(x)}
        run = Pair(model, prior_guide(model)).run(Batch(x[which], **told))
        place = (slice(int(block[0]), int(block[-1]) + 1),)
        for name, site in data_sites(run).items():
            drawn = by_draw_and_datum(run, site, site["fn"].sample())[0]
            _write(draws.prior_predictive, name, drawn, place, (num_samples,))


def _with_holes(name: str, value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return value
    if value.numel() != mask.numel():
        raise ValueError(
            f"x has missing entries, and site {name!r} has shape {tuple(value.shape[1:])} a datum "
            f"where x has {mask.shape[1]} columns, so it is not known which of its entries are "
            "missing; hand over complete rows (rows=)"
        )
    return torch.where(mask.reshape(value.shape), value, torch.nan)


def _write(
    into: Arrays, name: str, value: Tensor, place: tuple[slice, ...], size: tuple[int, ...]
) -> None:
    array = value.detach().cpu().numpy()
    if name not in into:
        into[name] = np.empty((*size, *array.shape[len(size) :]), array.dtype)
    into[name][place] = array
