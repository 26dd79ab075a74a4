"""Gaussian guides with free parameters for each datum, initialized at another guide's q."""

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from ppl_vae.core.batch import Batch
from ppl_vae.core.global_sites import global_part
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import Density
from ppl_vae.core.traces import Site
from ppl_vae.evaluation.local_guides.local_guide import LocalGuide, SitePlates
from ppl_vae.guides.families import gaussian
from ppl_vae.objectives.divergences import check_latents, is_delta

MOMENT_DRAWS = 256
"""The number of draws from which the moments of a q that is not Gaussian are estimated."""


@dataclass(frozen=True)
class _Latent:
    """A latent site: its plates and support, and the moments of the initial q."""

    plates: SitePlates
    support: constraints.Constraint
    event_shape: torch.Size
    loc: Tensor
    scale_tril: Tensor

    @property
    def direct(self) -> bool:
        """Whether the site is a real vector, so that its q is Gaussian without a transform."""
        return len(self.event_shape) == 1 and _is_real(self.support)


class LocalGaussianGuide(LocalGuide):
    """One Gaussian per datum and latent site, initialized at another guide's distributions.

    For sites whose support is not a real vector, the Gaussian is in unconstrained space. Sites
    are independent of one another.

    Args:
        pair: the pair whose guide gives the initial distributions.
        batch: the rows that the guide is for; it takes no others.
        covariance: the family of each site, see :mod:`ppl_vae.guides.families`.

    Raises:
        ValueError: if a site has no continuous density (a Delta, a discrete variable).
    """

    def __init__(self, pair: Pair, batch: Batch, covariance: str) -> None:
        if isinstance(pair.guide, LocalGaussianGuide):
            latents = pair.guide.latents()
        else:
            with pair.dry_run():
                run = pair.run(batch)
                check_latents(run)
                latents = [_latent(run.guide, run.drawn[n]) for n in run.latent]
        fixed = [{"loc": v.loc, "scale_tril": v.scale_tril} for v in latents]
        global_q = global_part(pair.guide) if pair.has_globals(batch) else None
        super().__init__(len(batch), [v.plates for v in latents], fixed, global_q)
        self.covariance = covariance
        self._latents = [(v.direct, v.support, v.event_shape) for v in latents]
        # Both are in units of the initial standard deviation, so that one learning rate fits all.
        self.shifts = nn.ParameterList(torch.zeros_like(v.loc) for v in latents)
        self.raws = nn.ParameterList(_start(v.scale_tril, covariance) for v in latents)

    def density(self, k: int, *, repeats: int = 1, detached: bool = False) -> Density:
        """The Gaussian of the k-th site, in unconstrained space where necessary."""
        plates, fixed = self._site(k), self._fixed(k)
        shift, raw = self.shifts[k], self.raws[k]
        if detached:
            shift, raw = shift.detach(), raw.detach()
        scale = fixed["scale_tril"].diagonal(dim1=-2, dim2=-1)
        loc = fixed["loc"] + scale * shift
        units = _units(scale, self.covariance)
        parts = loc, raw * _step_sizes(loc.shape[-1], raw), units
        loc, raw, units = (plates.repeat_rows(part, repeats, event_dim=1) for part in parts)
        return gaussian(loc, raw, self.covariance, units)

    def latents(self) -> list[_Latent]:
        """Its Gaussians, from which another local guide is initialized."""
        latents = []
        for k, (_, support, event_shape) in enumerate(self._latents):
            loc, scale_tril = _moments(self.density(k, detached=True), constraints.real)
            latents.append(_Latent(self._site(k), support, event_shape, loc, scale_tril))
        return latents

    def _sample(self, k: int, q: Density) -> None:
        direct, support, event_shape = self._latents[k]
        name = self._sites[k].name
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
    """Whether a Gaussian can be initialized at a distribution.

    It must be continuous, and its support must be known and the same for all data.
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
            f"site {name!r} of the guide ({type(fn).__name__}) has no density that can be "
            "refined; use refine=0, or a guide with a continuous density whose support is the "
            "same for all data"
        )
    return _Latent(SitePlates.of(trace, site), support, fn.event_shape, *_moments(fn, support))


def _moments(fn: Density, support: constraints.Constraint) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor of the flattened site in unconstrained space."""
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
    """The free parameters that give :func:`~ppl_vae.guides.families.gaussian` this factor."""
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
    return raw / _step_sizes(dim, raw)


def _units(scale: Tensor, covariance: str) -> Tensor:
    """The standard deviations that log-variances are relative to; equal ones if isotropic."""
    if covariance != "isotropic":
        return scale
    return scale.log().mean(-1, keepdim=True).exp().expand_as(scale)


def _step_sizes(dim: int, raw: Tensor) -> Tensor:
    """The change of each unconstrained value per unit change of its free parameter, (R,).

    Adam changes all parameters at about the same rate. In K dimensions a row of the Cholesky
    factor has up to K - 1 off-diagonal entries. With equal step sizes they would change the row
    sqrt(K - 1) times as fast as its diagonal, which in 50 dimensions leads to factors that are
    singular in single precision. Their joint change is therefore limited to three times that of
    the diagonal.
    """
    position = torch.arange(raw.shape[-1], device=raw.device)
    return torch.where(position < dim, 1.0, min(1.0, 3 * max(dim - 1, 1) ** -0.5)).to(raw)
