"""Draws of any pair as unlabelled arrays with one axis for draws and one for data."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.global_sites import with_globals_of
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.core.traces import PairTraces, by_draw, by_draw_and_datum, data_sites, log_prob
from ppl_vae.evaluation.marginal_likelihood.batching import rows_at_once
from ppl_vae.evaluation.marginal_likelihood.importance import prior_guide

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class PairDraws:
    """Draws of a pair by site, S for each of B data.

    Attributes:
        latent: draws of q(z | x), (S, B, ...).
        global_latent: draws of q(theta), which all data share, (S, ...).
        predictive: draws of x given each of these, missing values included, (S, B, ...).
        prior_predictive: draws of x given draws of the prior, one datum per draw, (S, ...).
        observed: the data in the shape of the model's observed sites, NaN where missing, (B, ...).
        log_weight: log p(x, z | theta) - log q(z | x, theta), in nats, (S, B).
        log_joint: log p(x, z | theta), in nats, (S, B).
        global_log_weight: log p(theta) - log q(theta), in nats, (S,); empty without theta.
    """

    latent: Arrays = field(default_factory=dict)
    global_latent: Arrays = field(default_factory=dict)
    predictive: Arrays = field(default_factory=dict)
    prior_predictive: Arrays = field(default_factory=dict)
    observed: Arrays = field(default_factory=dict)
    log_weight: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    log_joint: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    global_log_weight: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def size(self) -> int:
        """The number of values in the largest group."""
        groups = (self.latent, self.global_latent, self.predictive, self.prior_predictive)
        sizes = [sum(array.size for array in group.values()) for group in groups]
        return max(*sizes, 2 * self.log_weight.size)


@torch.no_grad()
def pair_draws(
    pair: Pair, data: Batch, rows: Int[Tensor, " B"], num_samples: int, *, seed: int | None
) -> PairDraws:
    """Draw from a pair in blocks, so that memory use is dominated by the result.

    Args:
        pair: any pair under the contract; run in evaluation mode.
        data: the whole data set.
        rows: indices of the rows of the data to draw for.
        num_samples: draws per datum, S; the same number is drawn from the prior.
        seed: seed of the draws.

    Raises:
        ValueError: as :func:`ppl_vae.core.traces.check_pair`; if the model observes nothing; if x
            has missing values and an observed site has another number of entries per datum.
    """
    pair.check_support(data)
    shape = (num_samples, len(rows))
    with isolated_store(), seeded(seed), pair.eval_mode():
        has_globals = pair.has_globals(data.rows(rows[:1]))
        draws = PairDraws(
            log_weight=np.empty(shape),
            log_joint=np.empty(shape),
            global_log_weight=np.empty(num_samples if has_globals else 0),
        )
        for block, batch, run in _runs(pair, data, rows, num_samples):
            _store(draws, block, run, batch.mask)
        _store_prior(draws, pair.with_guide(prior_guide(pair.model)), data.x, num_samples)
    return draws


BlockSlices = tuple[slice, slice]
"""The draws and the data of a block, as slices of all draws and all data."""


def _runs(
    pair: Pair, data: Batch, rows: Tensor, num_samples: int
) -> Iterator[tuple[BlockSlices, Batch, PairTraces]]:
    """Run the pair on blocks of draws and rows; yields the slices, rows and traces of each."""
    batches = list(data.split(rows, rows_at_once(data.x)))
    dim = pair.sample_dim(batches[0]) if num_samples > 1 else None
    has_globals = pair.has_globals(batches[0])
    # A run of one draw at a time can be repeated with its global variables.
    step = max(1, rows_at_once(data.x) // len(batches[0]))
    step = 1 if has_globals and dim is None else step
    for start in range(0, num_samples, step):
        first, drawing, number = 0, pair, min(step, num_samples - start)
        for batch in batches:
            run = drawing.run(batch, num_samples=number, dim=dim)
            yield (slice(start, start + number), slice(first, first + len(batch))), batch, run
            first += len(batch)
            drawing = with_globals_of(pair, run) if has_globals else pair


def _store(draws: PairDraws, block: BlockSlices, run: PairTraces, mask: Tensor | None) -> None:
    shape = draws.log_weight.shape
    for name, site in run.latent.items():
        _write(draws.latent, name, by_draw_and_datum(run, site, site["value"]), block, shape)
    for name, site in run.global_latent.items():
        _write(draws.global_latent, name, by_draw(site, site["value"]), block[:1], shape[:1])
    for name, site in data_sites(run).items():
        drawn = by_draw_and_datum(run, site, site["fn"].sample())
        _write(draws.predictive, name, drawn, block, shape)
        if block[0].start == 0:
            observed = _nan_where_missing(
                name, by_draw_and_datum(run, site, site["value"])[0], mask
            )
            _write(draws.observed, name, observed, block[1:], shape[1:])
    local = (*run.latent.values(), *run.observed.values())
    joint = [run.per_datum(site, log_prob(site)) for site in local]
    draws.log_joint[block] = torch.stack(torch.broadcast_tensors(*joint)).sum(0).double().cpu()
    draws.log_weight[block] = run.log_weights().double().cpu()
    if run.global_latent:
        draws.global_log_weight[block[0]] = run.global_log_weights().double().cpu()


def _store_prior(draws: PairDraws, pair: Pair, x: Tensor, num_samples: int) -> None:
    # The model is run on rows of x, because some models cannot run without data. Observed sites
    # are sampled again, so each row gives one draw of the prior predictive; where rows would share
    # global variables, each run has one row.
    rows = torch.arange(num_samples, device=x.device)
    first_row = Batch(x[:1], index=rows[:1] * 0, num_data=len(x))
    size = 1 if pair.has_globals(first_row) else rows_at_once(x)
    for draws_of_block in rows.split(size):
        index = draws_of_block.remainder(len(x))
        run = pair.run(Batch(x[index], index=index, num_data=len(x)))
        block = (slice(int(draws_of_block[0]), int(draws_of_block[-1]) + 1),)
        for name, site in data_sites(run).items():
            drawn = by_draw_and_datum(run, site, site["fn"].sample())[0]
            _write(draws.prior_predictive, name, drawn, block, (num_samples,))


def _nan_where_missing(name: str, value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return value
    if value.numel() != mask.numel():
        raise ValueError(
            f"x has missing values, and site {name!r} has shape {tuple(value.shape[1:])} per "
            f"datum where x has {mask.shape[1]} columns, so it is not known which of its entries "
            "are missing; choose complete rows (rows=)"
        )
    return torch.where(mask.reshape(value.shape), value, torch.nan)


def _write(
    into: Arrays, name: str, value: Tensor, block: tuple[slice, ...], shape: tuple[int, ...]
) -> None:
    array = value.detach().cpu().numpy()
    if name not in into:
        into[name] = np.empty((*shape, *array.shape[len(shape) :]), array.dtype)
    into[name][block] = array
