"""Distributions as parametric families whose parameters can be made free for each datum."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from torch import Tensor, nn
from torch import distributions as td
from torch.distributions import biject_to, constraints

from ppl_vae.core.batch import Batch
from ppl_vae.core.global_sites import global_part
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import Density
from ppl_vae.evaluation.local_guides.local_gaussian import LocalGaussianGuide
from ppl_vae.evaluation.local_guides.local_guide import LocalGuide, SitePlates, StickTheLanding
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.objectives.divergences import check_latents, is_delta

REDUNDANT_PARAMETERS = ("covariance_matrix", "precision_matrix")
"""Parameters of a Gaussian that its ``scale_tril`` determines."""
WITHOUT_PARAMETERS = (
    td.ExpTransform,
    td.SigmoidTransform,
    td.TanhTransform,
    td.SoftplusTransform,
)
"""Transforms without parameters, which are kept unchanged."""


class ParametrizationError(ValueError):
    """Raised for a distribution whose parameters cannot be made free for each datum.

    The message is a predicate, to follow the name of the site.
    """


@dataclass(frozen=True)
class FreeParameter:
    """A parameter of a distribution as a transform of unconstrained values.

    Attributes:
        start: the initial unconstrained values.
        unit: the change of each per unit change of its free parameter.
        transform: maps unconstrained values to the parameter.
        event_dim: the number of its dimensions that are right of the site's plates.
    """

    start: Tensor
    unit: Tensor
    transform: Callable[[Tensor], Tensor]
    event_dim: int


@dataclass(frozen=True)
class Parametrization:
    """A parametric family of distributions, with the parameters of one of its members.

    Attributes:
        name: the name of the family, for messages.
        parameters: the parameters of the member that the family was derived from.
        build: constructs the member with other values of the parameters.
    """

    name: str
    parameters: list[FreeParameter]
    build: Callable[[list[Tensor]], Density]

    @classmethod
    def of(cls, fn: Density) -> "Parametrization":
        """The parametric family of a distribution.

        Raises:
            ParametrizationError: if its parameters cannot be made free for each datum.
        """
        if isinstance(fn, StickTheLanding):
            return cls.of(fn.q)
        if is_delta(fn):
            raise ParametrizationError("is a Delta, which has no density of its own")
        if not fn.has_rsample:
            raise ParametrizationError(f"is a {_name(fn)}, whose draws have no gradient")
        family = _parametrize(fn)
        _check(family, fn)
        return family


def _name(fn: Any) -> str:
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    return type(fn).__name__


def _parametrize(fn: Any) -> Parametrization:
    if isinstance(fn, td.Independent):
        return _independent(fn)
    if type(fn) in (td.TransformedDistribution, dist.TransformedDistribution):
        return _transformed(fn)
    return _parametric(fn)


def _independent(fn: Any) -> Parametrization:
    inner, extra = _parametrize(fn.base_dist), fn.reinterpreted_batch_ndims
    parameters = [
        FreeParameter(p.start, p.unit, p.transform, p.event_dim + extra) for p in inner.parameters
    ]
    return Parametrization(
        inner.name, parameters, lambda values: inner.build(values).to_event(extra)
    )


def _transformed(fn: Any) -> Parametrization:
    base = _parametrize(fn.base_dist)
    layers = [_layer(transform, fn) for transform in _flatten(fn.transforms)]
    parameters = [*base.parameters, *(p for _, free in layers for p in free)]

    def build(values: list[Tensor]) -> Density:
        remaining = iter(values)
        inner = base.build([next(remaining) for _ in base.parameters])
        transforms = [make(*(next(remaining) for _ in free)) for make, free in layers]
        return dist.TransformedDistribution(inner, transforms)

    names = ", ".join(type(transform).__name__ for transform in _flatten(fn.transforms))
    return Parametrization(f"{base.name} through {names}", parameters, build)


def _flatten(transforms: Any) -> Iterator[Any]:
    for transform in transforms:
        if isinstance(transform, td.ComposeTransform):
            yield from _flatten(transform.parts)
        else:
            yield transform


def _layer(transform: Any, fn: Any) -> tuple[Callable[..., Any], list[FreeParameter]]:
    shape, event_dim = fn.batch_shape + fn.event_shape, len(fn.event_shape)
    if type(transform) in WITHOUT_PARAMETERS:
        return lambda: transform, []
    if type(transform) is td.AffineTransform:
        loc, scale = (
            torch.as_tensor(v).to(fn.sample()).expand(shape)
            for v in (transform.loc, transform.scale)
        )
        free = [_real(value, scale.abs(), event_dim) for value in (loc, scale)]
        return lambda loc, scale: td.AffineTransform(loc, scale, transform.event_dim), free
    if type(transform) in (LowerCholeskyAffine, _LowerCholeskyAffine):
        factor = transform.scale_tril.expand(*shape, shape[-1])
        loc = _real(transform.loc.expand(shape), factor.norm(dim=-1), event_dim)
        return _LowerCholeskyAffine, [loc, _factor(factor)]
    raise ParametrizationError(
        f"is a flow, whose {type(transform).__name__} has parameters that all data share"
    )


class _LowerCholeskyAffine(LowerCholeskyAffine):
    """An affine transform with a Cholesky factor for each datum, where Pyro's takes one for
    all."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        diagonal = self.scale_tril.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1).expand(x.shape[:-1])

    def with_cache(self, cache_size: int = 1) -> "_LowerCholeskyAffine":
        return type(self)(self.loc, self.scale_tril, cache_size=cache_size)


def _real(value: Tensor, unit: Tensor, event_dim: int) -> FreeParameter:
    return FreeParameter(value, unit, biject_to(constraints.real), event_dim)


def _factor(factor: Tensor) -> FreeParameter:
    """A Cholesky factor by the logarithms of its diagonal, and rows in units of the diagonal."""
    scale = factor.diagonal(dim1=-2, dim2=-1)
    unit = scale.unsqueeze(-1).expand_as(factor).tril(-1) + torch.diag_embed(
        torch.ones_like(scale)
    )
    transform: Any = td.LowerCholeskyTransform()
    return FreeParameter(transform.inv(factor), unit, transform, 2)


def _parametric(fn: Any) -> Parametrization:
    constraint_of = {n: c for n, c in fn.arg_constraints.items() if n not in REDUNDANT_PARAMETERS}
    if not constraint_of or {"probs", "logits"} <= constraint_of.keys():
        raise ParametrizationError(f"is a {type(fn).__name__}, whose parameters are not known")
    parameters = [_parameter(fn, name, c) for name, c in constraint_of.items()]
    names = list(constraint_of)

    def build(values: list[Tensor]) -> Density:
        return type(fn)(**dict(zip(names, values, strict=True)))

    return Parametrization(type(fn).__name__, parameters, build)


def _parameter(fn: Any, name: str, constraint: Any) -> FreeParameter:
    value = getattr(fn, name)
    event_dim = constraint.event_dim
    value = value.expand(fn.batch_shape + value.shape[value.dim() - event_dim :])
    if name == "scale_tril":
        return _factor(value)
    if any(isinstance(bound, Tensor) for bound in vars(constraint).values()):
        raise ParametrizationError(
            f"is a {type(fn).__name__}, whose {name} is bounded by its other parameters"
        )
    transform = biject_to(constraint)
    return FreeParameter(transform.inv(value), _unit(fn, name, value), transform, event_dim)


def _unit(fn: Any, name: str, value: Tensor) -> Tensor:
    """The units of steps: standard deviations for means, one for all other parameters."""
    if name not in ("loc", "cov_factor"):
        return torch.ones_like(value)
    if "scale_tril" in fn.arg_constraints:
        scale = fn.scale_tril.norm(dim=-1)
    else:
        scale = fn.scale if hasattr(fn, "scale") else fn.variance.sqrt()
    return (scale if name == "loc" else scale.unsqueeze(-1)).expand_as(value)


def _check(family: Parametrization, fn: Density) -> None:
    """Check that the distribution built from the parameters has the density of the original."""
    value = fn.sample()
    try:
        rebuilt = family.build([p.transform(p.start) for p in family.parameters])
        same = torch.allclose(rebuilt.log_prob(value), fn.log_prob(value), rtol=1e-3, atol=1e-3)
        shaped = all(p.start.shape == p.unit.shape for p in family.parameters)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        same = shaped = False
    if not (same and shaped):
        raise ParametrizationError(
            f"is a {_name(fn)}, which cannot be reconstructed from its parameters"
        )


class LocalFamilyGuide(LocalGuide):
    """A member of the parametric family that a guide samples from, for each datum and site.

    All parameters of the family are free for each datum, and initialized at those of the guide's
    own q. Sites are independent of one another.

    Args:
        pair: the pair whose guide gives the families and the initial parameters.
        batch: the rows that the guide is for; it takes no others.

    Raises:
        ParametrizationError: if the parameters of a site cannot be made free for each datum.
    """

    def __init__(self, pair: Pair, batch: Batch) -> None:
        with pair.dry_run():
            run = pair.run(batch)
            check_latents(run)
            found = run.drawn
            families = [Parametrization.of(site["fn"]) for site in found.values()]
        plates = [SitePlates.of(run.guide, site) for site in found.values()]
        fixed = [_fixed_tensors(family) for family in families]
        global_q = global_part(pair.guide) if pair.has_globals(batch) else None
        super().__init__(len(batch), plates, fixed, global_q)
        self._families = families
        self.free = nn.ParameterList(
            torch.zeros_like(p.start) for family in families for p in family.parameters
        )

    def density(self, k: int, *, repeats: int = 1, detached: bool = False) -> Density:
        """The member of the k-th site's family with the current parameters."""
        family, fixed, plates = self._families[k], self._fixed(k), self._site(k)
        first = sum(len(earlier.parameters) for earlier in self._families[:k])
        values = []
        for j, parameter in enumerate(family.parameters):
            free = self.free[first + j]
            change = (free.detach() if detached else free) * fixed[f"unit{j}"]
            value = parameter.transform(fixed[f"start{j}"] + change)
            values.append(plates.repeat_rows(value, repeats, parameter.event_dim))
        return family.build(values)


def _fixed_tensors(family: Parametrization) -> dict[str, Tensor]:
    starts = {f"start{j}": p.start for j, p in enumerate(family.parameters)}
    return starts | {f"unit{j}": p.unit for j, p in enumerate(family.parameters)}


def make_local_guide(pair: Pair, batch: Batch, family: str) -> LocalGuide:
    """A guide with a separate q for each datum, initialized at the pair's guide.

    Args:
        pair: the pair whose guide gives the initial q.
        batch: the rows that the guide is for; it takes no others.
        family: a covariance of :mod:`ppl_vae.guides.families`, for Gaussians; any other value
            selects the family of the guide's own distributions.
    """
    if family in COVARIANCES:
        return LocalGaussianGuide(pair, batch, family)
    return LocalFamilyGuide(pair, batch)
