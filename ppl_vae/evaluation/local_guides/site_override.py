"""Running guides with given values, or with given noise, instead of random draws."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Num
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch import distributions as td

from ppl_vae.core.program import DATA_PLATE, Density
from ppl_vae.core.traces import SAMPLE_PLATE, plates_of
from ppl_vae.evaluation.local_guides.local_guide import StickTheLanding


class SiteOverride(Messenger):
    """Replaces the draw of each site by ``value_of(site)``; sites for which that is None are
    drawn.

    It must be entered before a pair's plates, so that ``value_of`` receives each site as expanded
    by them. Sites that have a value already (observed or replayed) keep it.

    Args:
        value_of: the value of a site, or None for a random draw.
    """

    def __init__(self, value_of: Callable[[Any], Tensor | None]) -> None:
        super().__init__()
        self.value_of = value_of

    def _pyro_sample(self, msg: Any) -> None:
        has_value = msg["done"] or msg["is_observed"] or msg["value"] is not None
        if has_value or site_is_subsample(msg):
            return
        if (value := self.value_of(msg)) is not None:
            msg["value"], msg["done"] = value, True


def to_site_shape(
    values: Num[Tensor, "S B n"], site: Any, shape: torch.Size, event_dim: int
) -> Num[Tensor, "..."]:
    """Reshape values that are arranged by draw and datum to the shape of a site under its plates.

    Args:
        values: the values of each draw and datum, flattened.
        site: the site; without a plate of samples, its rows are the data of one draw after
            another.
        shape: the shape of the result.
        event_dim: the number of dimensions of the result that are right of all plates.
    """
    plates = plates_of(site)
    axes = [plates[n].dim - event_dim for n in (SAMPLE_PLATE, DATA_PLATE) if n in plates]
    rest = [size for k, size in enumerate(shape) if k - len(shape) not in axes]
    front = values.shape[:2] if len(axes) == 2 else [values.shape[0] * values.shape[1]]
    return values.reshape(*front, *rest).movedim(list(range(len(axes))), axes)


def noise_shape(fn: Density) -> torch.Size | None:
    """The shape of the standard normal noise of a draw; None for draws that use other noise."""
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
    """The draw with this standard normal noise, differentiable in the parameters of ``fn``."""
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
