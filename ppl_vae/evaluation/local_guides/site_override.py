"""Guides run on values, or on noise, that are given in place of draws."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Num
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch import distributions as td

from ppl_vae.core.program import DATA_PLATE, Density
from ppl_vae.core.traces import SAMPLE_PLATE, frames
from ppl_vae.evaluation.local_guides.local_guide import StickTheLanding


class Imposed(Messenger):
    """Gives the sites of a guide the values that a function reads off, where it gives one.

    It must be entered before a pair's plates, to see each site as they have expanded it. Sites
    that have a value already (observed, replayed) keep it.

    Args:
        read: the value of a site, or None to let it be drawn.
    """

    def __init__(self, read: Callable[[Any], Tensor | None]) -> None:
        super().__init__()
        self.read = read

    def _pyro_sample(self, msg: Any) -> None:
        taken = msg["done"] or msg["is_observed"] or msg["value"] is not None
        if not taken and not site_is_subsample(msg) and (value := self.read(msg)) is not None:
            msg["value"], msg["done"] = value, True


def laid_out(
    values: Num[Tensor, "S B n"], site: Any, shape: torch.Size, event: int
) -> Num[Tensor, "..."]:
    """Numbers by draw and datum in the shape that a site has under its plates.

    Args:
        values: all numbers of a draw and a datum in one row.
        site: with its plates; without a plate of samples its rows are repeated, draw by draw.
        shape: to be had.
        event: how many dimensions on the right of it stand in no plate.
    """
    plates = frames(site)
    axes = [plates[n].dim - event for n in (SAMPLE_PLATE, DATA_PLATE) if n in plates]
    rest = [size for k, size in enumerate(shape) if k - len(shape) not in axes]
    front = values.shape[:2] if len(axes) == 2 else [values.shape[0] * values.shape[1]]
    return values.reshape(*front, *rest).movedim(list(range(len(axes))), axes)


def noise_shape(fn: Density) -> torch.Size | None:
    """The shape of the standard normal numbers that a draw is made from; None if of others."""
    if isinstance(fn, StickTheLanding):
        return noise_shape(fn.q)
    if isinstance(fn, td.Normal | td.MultivariateNormal):
        return fn.batch_shape + fn.event_shape
    if isinstance(fn, td.LowRankMultivariateNormal):
        return fn.batch_shape + torch.Size([sum(fn.cov_factor.shape[-2:])])
    if isinstance(fn, td.Independent | td.TransformedDistribution):
        inner: Any = fn.base_dist
        return noise_shape(inner)
    return None


def from_noise(fn: Density, noise: Tensor) -> Tensor:
    """The draw that these standard normal numbers make, differentiable in fn's parameters."""
    if isinstance(fn, StickTheLanding):
        return from_noise(fn.q, noise)
    if isinstance(fn, td.Normal):
        return fn.loc + fn.scale * noise
    if isinstance(fn, td.MultivariateNormal):
        return fn.loc + (fn.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    if isinstance(fn, td.LowRankMultivariateNormal):
        each, common = noise.split(list(fn.cov_factor.shape[-2:]), -1)
        along = (fn.cov_factor @ common.unsqueeze(-1)).squeeze(-1)
        return fn.loc + fn.cov_diag.sqrt() * each + along
    inner: Any = fn.base_dist
    value = from_noise(inner, noise)
    for transform in getattr(fn, "transforms", ()):
        value = transform(value)
    return value
