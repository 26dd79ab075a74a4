"""The best Gaussian for each datum: a guide's own q taken as a start and optimised, q*."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import Density, ProgramLike
from ppl_vae.core.state import dry_run
from ppl_vae.core.traces import Site, sites
from ppl_vae.evaluation.local_guides.local_guide import LocalGuide, Place
from ppl_vae.guides.families import gaussian
from ppl_vae.objectives.divergences import check_latents, is_delta

MOMENT_DRAWS = 256


@dataclass(frozen=True)
class _Latent:
    """What a local guide must know of a site: its place, support and starting point."""

    place: Place
    support: constraints.Constraint
    event_shape: torch.Size
    loc: Tensor
    scale_tril: Tensor

    @property
    def direct(self) -> bool:
        """Whether the site is a real vector, so that its q is a Gaussian itself."""
        return len(self.event_shape) == 1 and _is_real(self.support)


class LocalGaussianGuide(LocalGuide):
    """One Gaussian for every datum and latent site, started from another guide's.

    Sites with another support than real vectors get a Gaussian in unconstrained space. Several
    sites are independent of one another.

    Args:
        model, guide: the pair that it is for.
        x: the rows that it is for, and no others.
        keywords: what the pair is told of these rows.
        covariance: the family of each site, see :mod:`ppl_vae.guides.families`.

    Raises:
        ValueError: if a site has no density to start from (a Delta, a discrete variable).
    """

    def __init__(
        self,
        model: ProgramLike,
        guide: ProgramLike,
        x: Tensor,
        keywords: Mapping[str, Any],
        covariance: str,
    ) -> None:
        if isinstance(guide, LocalGaussianGuide):
            latents = guide.latents()
        else:
            with dry_run(model, guide):
                run = Pair(model, guide).run(Batch(x, **keywords))
                check_latents(run)
                latents = [_latent(run.guide, sites(run.guide)[n]) for n in run.latent]
        held = [{"loc": v.loc, "scale_tril": v.scale_tril} for v in latents]
        super().__init__(len(x), [v.place for v in latents], held)
        self.covariance = covariance
        self._latents = [(v.direct, v.support, v.event_shape) for v in latents]
        # Both move in units of the starting standard deviation, so that one step size fits all.
        self.shifts = nn.ParameterList(torch.zeros_like(v.loc) for v in latents)
        self.raws = nn.ParameterList(_start(v.scale_tril, covariance) for v in latents)

    def density(self, which: int, *, repeats: int = 1, still: bool = False) -> Density:
        """The Gaussian of a site, in unconstrained space if need be."""
        place, held = self._place(which), self._fixed(which)
        shift, raw = self.shifts[which], self.raws[which]
        if still:
            shift, raw = shift.detach(), raw.detach()
        scale = held["scale_tril"].diagonal(dim1=-2, dim2=-1)
        loc = held["loc"] + scale * shift
        units = _units(scale, self.covariance)
        parts = loc, raw * _stride(loc.shape[-1], raw), units
        loc, raw, units = (place.stretched(part, repeats, rank=1) for part in parts)
        return gaussian(loc, raw, self.covariance, units)

    def latents(self) -> list[_Latent]:
        """Where its Gaussians stand, for another local guide to start from."""
        latents = []
        for which, (_, support, event_shape) in enumerate(self._latents):
            loc, scale_tril = _moments(self.density(which, still=True), constraints.real)
            place = self._place(which)
            latents.append(_Latent(place, support, event_shape, loc, scale_tril))
        return latents

    def _sample(self, which: int, q: Density) -> None:
        direct, support, event_shape = self._latents[which]
        name = self._places[which].name
        if direct:
            pyro.sample(name, q)
        else:
            _sample_transformed(name, support, event_shape, q)


def _sample_transformed(
    name: str, support: constraints.Constraint, event_shape: torch.Size, q: Density
) -> None:
    transform = biject_to(support)
    auxiliary: Any = {"is_auxiliary": True}
    flat = pyro.sample(f"_{name}_unconstrained", q, infer=auxiliary)
    shape = transform.inverse_shape(event_shape)
    unconstrained = flat.reshape(*flat.shape[:-1], *shape)
    value = transform(unconstrained)
    rank = len(event_shape)
    log_density = transform.inv.log_abs_det_jacobian(value, unconstrained)
    log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + rank)
    delta: Any = dist.Delta
    pyro.sample(name, delta(value, log_density=log_density, event_dim=rank))


def _is_real(support: constraints.Constraint) -> bool:
    inner = getattr(support, "base_constraint", support)
    return inner is constraints.real or isinstance(inner, type(constraints.real))


def can_be_refined(fn: Density) -> bool:
    """Whether a Gaussian can be started at a distribution: it is continuous, on a known support.

    The support may not differ from datum to datum.
    """
    if not fn.has_rsample or is_delta(fn):
        return False
    support = getattr(fn.support, "base_constraint", fn.support)
    return not any(isinstance(bound, Tensor) for bound in vars(support).values())


def _latent(trace: Any, site: Site) -> _Latent:
    name, fn = site["name"], site["fn"]
    support = fn.support
    if not can_be_refined(fn):
        raise ValueError(
            f"site {name!r} of the guide ({type(fn).__name__}) has no density that could be "
            "refined; use refine=0, or a guide with a continuous density, on one support for all "
            "data"
        )
    return _Latent(Place.of(trace, site), support, fn.event_shape, *_moments(fn, support))


def _moments(fn: Density, support: constraints.Constraint) -> tuple[Tensor, Tensor]:
    # Mean and scale_tril of the flattened, unconstrained site.
    if isinstance(fn, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return fn.mean, fn.scale_tril
    if _is_normal(fn):
        rank = len(fn.event_shape)
        loc, scale = (
            v.flatten(v.dim() - rank) if rank else v.unsqueeze(-1) for v in (fn.mean, fn.stddev)
        )
        return loc.clone(), torch.diag_embed(scale)
    draws = biject_to(support).inv(fn.sample(torch.Size([MOMENT_DRAWS])))
    rank = draws.dim() - 1 - len(fn.batch_shape)
    draws = draws.flatten(draws.dim() - rank) if rank else draws.unsqueeze(-1)
    return draws.mean(0), torch.diag_embed(draws.std(0))


def _is_normal(fn: Any) -> bool:
    while not isinstance(fn, dist.Normal) and hasattr(fn, "base_dist"):
        if isinstance(fn, torch.distributions.TransformedDistribution):
            return False
        fn = fn.base_dist
    return isinstance(fn, dist.Normal)


def _start(scale_tril: Tensor, covariance: str) -> Tensor:
    """The free numbers of :func:`~ppl_vae.guides.families.gaussian` that make this scale in its
    units."""
    scale = scale_tril.diagonal(dim1=-2, dim2=-1)
    if covariance == "unit":
        return torch.zeros_like(scale[..., :0])
    if covariance == "isotropic":
        return torch.zeros_like(scale[..., :1])
    if covariance == "diagonal":
        return torch.zeros_like(scale)
    dim = scale.shape[-1]
    rows, columns = torch.tril_indices(dim, dim, -1, device=scale.device)
    below = (scale_tril / scale.unsqueeze(-1))[..., rows, columns]
    raw = torch.cat([torch.zeros_like(scale), below], -1)
    return raw / _stride(dim, raw)


def _units(scale: Tensor, covariance: str) -> Tensor:
    """The standard deviations that log-variances are relative to; one for all if isotropic."""
    if covariance != "isotropic":
        return scale
    return scale.log().mean(-1, keepdim=True).exp().expand_as(scale)


def _stride(dim: int, raw: Tensor) -> Tensor:
    """By how much each unconstrained number moves where its parameter moves by one, (R,).

    Adam moves all of them alike. Of K dimensions a row of the factor has up to K - 1 entries
    beside its diagonal; moved by as much as that each, they would turn the row by sqrt(K - 1)
    times as much, and of 50 dimensions make a factor that single precision cannot solve with.
    So a row is turned by three times as much at most.
    """
    place = torch.arange(raw.shape[-1], device=raw.device)
    return torch.where(place < dim, 1.0, min(1.0, 3 * max(dim - 1, 1) ** -0.5)).to(raw)
