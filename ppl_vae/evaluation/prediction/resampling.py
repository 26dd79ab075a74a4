"""Draws of z in proportion to their weights, from draws that are made in several runs."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_vae.core.program import DATA_PLATE
from ppl_vae.core.traces import SAMPLE_PLATE, PairTraces, Site, plates_of


def resample(
    resampled: PairTraces,
    run: PairTraces,
    draws: int,
    weights: Float[Tensor, "S B"],
    total: Float[Tensor, " B"],
) -> None:
    """Replace each of R draws of z by one of this run, with this run's share of all weights.

    After all runs the R draws are samples in proportion to the weights of all of them (Chao's
    reservoir sampling, 1982).
    """
    run_total = weights.sum(0)
    probs = torch.where(run_total > 0, weights, 1.0).mT
    which = torch.multinomial(probs, draws, replacement=True).mT
    replaced = torch.rand_like(which, dtype=run_total.dtype) < run_total / total
    for name, site in resampled.drawn.items():
        site["value"] = _with_replaced(site, run.drawn[name], which, replaced)


def _with_replaced(
    old: Site, new: Site, which: Int[Tensor, "R B"], replaced: Bool[Tensor, "R B"]
) -> Tensor:
    """The value of a site, with draw r of datum b replaced by draw ``which[r, b]`` of another
    run."""
    plates, event = plates_of(old), len(old["fn"].event_shape)
    data, values = plates[DATA_PLATE].dim - event, [old["value"], new["value"]]
    repeated = SAMPLE_PLATE not in plates
    if repeated:  # draws and data share one dimension, see run_pair
        values = [value.unflatten(data, (-1, which.shape[1])) for value in values]
    draw = data - 1 if repeated else plates[SAMPLE_PLATE].dim - event
    shape = [1] * values[0].dim()
    shape[draw], shape[data] = which.shape
    picked = torch.take_along_dim(values[1], which.reshape(shape), draw)
    value = torch.where(replaced.reshape(shape), picked, values[0])
    return value.flatten(draw, data) if repeated else value
