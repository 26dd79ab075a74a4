"""Any distribution as a class with parameters, which are then free for each datum."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from torch import Tensor, nn
from torch import distributions as td
from torch.distributions import biject_to, constraints

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import Density, ProgramLike
from ppl_vae.core.state import dry_run
from ppl_vae.core.traces import sites
from ppl_vae.evaluation.local_guides.local_gaussian import LocalGaussianGuide
from ppl_vae.evaluation.local_guides.local_guide import LocalGuide, Place, StickTheLanding
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.objectives.divergences import check_latents, is_delta

OTHER_NAMES = ("covariance_matrix", "precision_matrix")
"""Parameters of a Gaussian that say again what its ``scale_tril`` says."""
WITHOUT_PARAMETERS = (
    td.ExpTransform,
    td.SigmoidTransform,
    td.TanhTransform,
    td.SoftplusTransform,
)


class NoForm(ValueError):
    """A distribution whose parameters cannot be freed; the message says why, after its site."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a distribution, by the unconstrained numbers that it is made from.

    Attributes:
        start: these numbers.
        unit: by how much each moves where its free number moves by one.
        transform: from unconstrained numbers to the parameter.
        rank: how many dimensions it has on the right of the site's plates.
    """

    start: Tensor
    unit: Tensor
    transform: Callable[[Tensor], Tensor]
    rank: int


@dataclass(frozen=True)
class Form:
    """A class of distributions: its parameters at one of its members, and how to build others.

    Attributes:
        name: of the class, for a person.
        parameters: at the member that it was read off.
        build: the member with other values of the parameters.
    """

    name: str
    parameters: list[Parameter]
    build: Callable[[list[Tensor]], Density]

    @classmethod
    def of(cls, fn: Density) -> "Form":
        """The form of a distribution.

        Raises:
            NoForm: if its parameters cannot be freed.
        """
        if isinstance(fn, StickTheLanding):
            return cls.of(fn.q)
        if is_delta(fn):
            raise NoForm("is a Delta, which has no density of its own")
        if not fn.has_rsample:
            raise NoForm(f"is a {_name(fn)}, whose draws have no gradient to search along")
        form = _read(fn)
        _check(form, fn)
        return form


def _name(fn: Any) -> str:
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    return type(fn).__name__


def _read(fn: Any) -> Form:
    if isinstance(fn, td.Independent):
        return _independent(fn)
    if type(fn) in (td.TransformedDistribution, dist.TransformedDistribution):
        return _transformed(fn)
    return _parametric(fn)


def _independent(fn: Any) -> Form:
    inner, extra = _read(fn.base_dist), fn.reinterpreted_batch_ndims
    parameters = [
        Parameter(p.start, p.unit, p.transform, p.rank + extra) for p in inner.parameters
    ]
    return Form(inner.name, parameters, lambda values: inner.build(values).to_event(extra))


def _transformed(fn: Any) -> Form:
    base = _read(fn.base_dist)
    stages = [_stage(transform, fn) for transform in _chain(fn.transforms)]
    parameters = [*base.parameters, *(p for _, given in stages for p in given)]

    def build(values: list[Tensor]) -> Density:
        left = iter(values)
        inner = base.build([next(left) for _ in base.parameters])
        made = [make(*(next(left) for _ in given)) for make, given in stages]
        return dist.TransformedDistribution(inner, made)

    names = ", ".join(type(transform).__name__ for transform in _chain(fn.transforms))
    return Form(f"{base.name} through {names}", parameters, build)


def _chain(transforms: Any) -> Iterator[Any]:
    for transform in transforms:
        if isinstance(transform, td.ComposeTransform):
            yield from _chain(transform.parts)
        else:
            yield transform


def _stage(transform: Any, fn: Any) -> tuple[Callable[..., Any], list[Parameter]]:
    shape, rank = fn.batch_shape + fn.event_shape, len(fn.event_shape)
    if type(transform) in WITHOUT_PARAMETERS:
        return lambda: transform, []
    if type(transform) is td.AffineTransform:
        loc, scale = (
            torch.as_tensor(v).to(fn.sample()).expand(shape)
            for v in (transform.loc, transform.scale)
        )
        free = [_real(value, scale.abs(), rank) for value in (loc, scale)]
        return lambda loc, scale: td.AffineTransform(loc, scale, transform.event_dim), free
    if type(transform) in (LowerCholeskyAffine, _LowerCholeskyAffine):
        factor = transform.scale_tril.expand(*shape, shape[-1])
        loc = _real(transform.loc.expand(shape), factor.norm(dim=-1), rank)
        return _LowerCholeskyAffine, [loc, _factor(factor)]
    raise NoForm(f"is a flow, whose {type(transform).__name__} has parameters that all data share")


class _LowerCholeskyAffine(LowerCholeskyAffine):
    """Pyro's takes one factor for all data; here each has its own."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        diagonal = self.scale_tril.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1).expand(x.shape[:-1])

    def with_cache(self, cache_size: int = 1) -> "_LowerCholeskyAffine":
        return type(self)(self.loc, self.scale_tril, cache_size=cache_size)


def _real(value: Tensor, unit: Tensor, rank: int) -> Parameter:
    return Parameter(value, unit, biject_to(constraints.real), rank)


def _factor(factor: Tensor) -> Parameter:
    """A Cholesky factor: the logarithms of its diagonal, and each row in units of it."""
    scale = factor.diagonal(dim1=-2, dim2=-1)
    unit = scale.unsqueeze(-1).expand_as(factor).tril(-1) + torch.diag_embed(
        torch.ones_like(scale)
    )
    transform: Any = td.LowerCholeskyTransform()
    return Parameter(transform.inv(factor), unit, transform, 2)


def _parametric(fn: Any) -> Form:
    constraint_of = {n: c for n, c in fn.arg_constraints.items() if n not in OTHER_NAMES}
    if not constraint_of or {"probs", "logits"} <= constraint_of.keys():
        raise NoForm(f"is a {type(fn).__name__}, of which no parameters are known")
    parameters = [_parameter(fn, name, c) for name, c in constraint_of.items()]
    names = list(constraint_of)

    def build(values: list[Tensor]) -> Density:
        return type(fn)(**dict(zip(names, values, strict=True)))

    return Form(type(fn).__name__, parameters, build)


def _parameter(fn: Any, name: str, constraint: Any) -> Parameter:
    value = getattr(fn, name)
    rank = constraint.event_dim
    value = value.expand(fn.batch_shape + value.shape[value.dim() - rank :])
    if name == "scale_tril":
        return _factor(value)
    if any(isinstance(bound, Tensor) for bound in vars(constraint).values()):
        raise NoForm(f"is a {type(fn).__name__}, whose {name} is bounded by its other parameters")
    transform = biject_to(constraint)
    return Parameter(transform.inv(value), _unit(fn, name, value), transform, rank)


def _unit(fn: Any, name: str, value: Tensor) -> Tensor:
    """Means move in standard deviations; what is positive moves by its logarithm."""
    if name not in ("loc", "cov_factor"):
        return torch.ones_like(value)
    if "scale_tril" in fn.arg_constraints:
        scale = fn.scale_tril.norm(dim=-1)
    else:
        scale = fn.scale if hasattr(fn, "scale") else fn.variance.sqrt()
    return (scale if name == "loc" else scale.unsqueeze(-1)).expand_as(value)


def _check(form: Form, fn: Density) -> None:
    """Check that a distribution built from its parameters is the same one."""
    value = fn.sample()
    try:
        again = form.build([p.transform(p.start) for p in form.parameters])
        same = torch.allclose(again.log_prob(value), fn.log_prob(value), rtol=1e-3, atol=1e-3)
        shaped = all(p.start.shape == p.unit.shape for p in form.parameters)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        same = shaped = False
    if not (same and shaped):
        raise NoForm(f"is a {_name(fn)}, which could not be built again from its parameters")


class LocalFamilyGuide(LocalGuide):
    """For every datum and site its own member of the class that a guide samples from.

    All parameters of the class are free for each datum, and start at those of the guide's own q.
    Several sites are independent of one another.

    Args:
        model, guide: the pair that it is for.
        x: the rows that it is for, and no others.
        keywords: what the pair is told of these rows.

    Raises:
        NoForm: if the parameters of a site cannot be freed.
    """

    def __init__(
        self, model: ProgramLike, guide: ProgramLike, x: Tensor, keywords: Mapping[str, Any]
    ) -> None:
        with dry_run(model, guide):
            run = Pair(model, guide).run(Batch(x, **keywords))
            check_latents(run)
            found = sites(run.guide)
            forms = [Form.of(site["fn"]) for site in found.values()]
        places = [Place.of(run.guide, site) for site in found.values()]
        super().__init__(len(x), places, [_tensors(form) for form in forms])
        self._forms = forms
        self.free = nn.ParameterList(
            torch.zeros_like(p.start) for form in forms for p in form.parameters
        )

    def density(self, which: int, *, repeats: int = 1, still: bool = False) -> Density:
        """The member of a site's class that its free numbers make."""
        form, held, place = self._forms[which], self._fixed(which), self._place(which)
        before = sum(len(earlier.parameters) for earlier in self._forms[:which])
        values = []
        for number, parameter in enumerate(form.parameters):
            free = self.free[before + number]
            moved = (free.detach() if still else free) * held[f"unit{number}"]
            value = parameter.transform(held[f"start{number}"] + moved)
            values.append(place.stretched(value, repeats, parameter.rank))
        return form.build(values)


def _tensors(form: Form) -> dict[str, Tensor]:
    starts = {f"start{k}": p.start for k, p in enumerate(form.parameters)}
    return starts | {f"unit{k}": p.unit for k, p in enumerate(form.parameters)}


def per_datum(
    model: ProgramLike, guide: ProgramLike, x: Tensor, keywords: Mapping[str, Any], family: str
) -> LocalGuide:
    """Each datum's own q, started at a guide's: a Gaussian, or of the guide's own class.

    Args:
        model, guide: the pair that it is for.
        x: the rows that it is for, and no others.
        keywords: what the pair is told of these rows.
        family: a covariance of :mod:`ppl_vae.guides.families`; else the guide's class is taken.
    """
    if family in COVARIANCES:
        return LocalGaussianGuide(model, guide, x, keywords, family)
    return LocalFamilyGuide(model, guide, x, keywords)
