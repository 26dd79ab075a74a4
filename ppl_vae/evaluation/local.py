"""The best Gaussian for each datum: a guide's own q taken as a start and optimised, q*."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from ppl_vae.divergences import check_latents
from ppl_vae.families import LOG_VARIANCE_BOUND, gaussian
from ppl_vae.program import DATA_PLATE, Density, Program, ProgramLike, owner_of
from ppl_vae.state import probing
from ppl_vae.traces import Site, run_pair, sites

MOMENT_DRAWS = 256
LARGEST_LOSS = 0.03
"""By so much a standard normal number may be off that comes back from a draw made of it."""


@dataclass(frozen=True)
class _Latent:
    """What a local guide must know of a site: its plates, support and starting point."""

    name: str
    plates: list[tuple[str, int, Tensor | None, int]]
    support: constraints.Constraint
    event_shape: torch.Size
    loc: Tensor
    scale_tril: Tensor

    @property
    def direct(self) -> bool:
        """Whether the site is a real vector, so that its q is a Gaussian itself."""
        return len(self.event_shape) == 1 and _is_real(self.support)

    def repeated(
        self, repeats: int, shift: Tensor, raw: Tensor
    ) -> tuple["_Latent", Tensor, Tensor]:
        """The same for data each of whose rows comes so many times, and its free numbers."""
        if repeats == 1:
            return self, shift, raw
        plates = []
        axis = 0
        for name, size, rows, dim in self.plates:
            if name == DATA_PLATE:
                axis = dim - 1
                many = size if rows is None else len(rows)
                rows = (torch.arange(many) if rows is None else rows).repeat(repeats)
            plates.append((name, size, rows, dim))
        loc, shift, raw = (torch.cat([v] * repeats, axis) for v in (self.loc, shift, raw))
        scale_tril = torch.cat([self.scale_tril] * repeats, axis - 1)
        return replace(self, plates=plates, loc=loc, scale_tril=scale_tril), shift, raw


def _tensors(latent: _Latent) -> dict[str, Tensor]:
    rows = {f"rows_{name}": rows for name, _, rows, _ in latent.plates if rows is not None}
    return {"loc": latent.loc, "scale_tril": latent.scale_tril} | rows


class LocalGuide(Program):
    """One Gaussian for every datum and latent site, started from another guide's.

    Sites with another support than real vectors get a Gaussian in unconstrained space. Several
    sites are independent of one another.

    Args:
        model, guide: the pair that it is for.
        x: the rows that it is for, and no others.
        keywords: what the pair is told of these rows.
        covariance: the family of each site, see :mod:`ppl_vae.families`.

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
        super().__init__()
        self.covariance = covariance
        self._num_rows = len(x)
        if isinstance(guide, LocalGuide):
            latents = guide.settled()
        else:
            with probing(model, guide):
                run = run_pair(model, guide, x, keywords)
                check_latents(run)
                latents = [_latent(run.guide, sites(run.guide)[n]) for n in run.latent]
        self._hold(latents)
        # Means move in units of the starting standard deviation, so that one step size fits all.
        self.shifts = nn.ParameterList(torch.zeros_like(latent.loc) for latent in latents)
        starts = [_raw(latent.scale_tril, covariance) for latent in latents]
        pairs = zip(latents, starts, strict=True)
        self.raws = nn.ParameterList(raw / _stride(latent, raw) for latent, raw in pairs)

    def forward(self, x: Tensor, **_: Any) -> None:
        """The guide as a Pyro program, for the rows that it was made for."""
        repeats = len(x) // self._num_rows
        plates: dict[str, pyro.plate] = {}
        for latent, *free in zip(self._held_latents(), self.shifts, self.raws, strict=True):
            latent, shift, raw = latent.repeated(repeats, *free)
            q = self._gaussian(latent, shift, raw)
            still = self._gaussian(latent, shift.detach(), raw.detach())
            with ExitStack() as stack:
                for name, size, rows, dim in latent.plates:
                    if name not in plates:
                        plates[name] = pyro.plate(name, size, subsample=rows, dim=dim)
                    stack.enter_context(plates[name])
                self._sample(latent, PathGradient(q, still))

    def _hold(self, latents: list[_Latent]) -> None:
        # Their tensors are buffers, so that what reads a program's tensors finds them.
        self._latents = latents
        for place, latent in enumerate(latents):
            for name, tensor in _tensors(latent).items():
                self.register_buffer(
                    f"{name}_{place}", tensor.clone(memory_format=torch.contiguous_format)
                )

    def _held_latents(self) -> list[_Latent]:
        latents = []
        for place, latent in enumerate(self._latents):
            held = {name: getattr(self, f"{name}_{place}") for name in _tensors(latent)}
            plates = [
                (name, size, held.pop(f"rows_{name}", None), dim)
                for name, size, _, dim in latent.plates
            ]
            latents.append(replace(latent, plates=plates, **held))
        return latents

    def _gaussian(self, latent: _Latent, shift: Tensor, raw: Tensor) -> Density:
        scale = latent.scale_tril.diagonal(dim1=-2, dim2=-1)
        return gaussian(latent.loc + scale * shift, raw * _stride(latent, raw), self.covariance)

    def settled(self) -> list[_Latent]:
        """Where its Gaussians stand, for another local guide to start from."""
        latents = []
        for latent, shift, raw in zip(self._held_latents(), self.shifts, self.raws, strict=True):
            loc, scale_tril = _moments(self._gaussian(latent, shift, raw), constraints.real)
            latents.append(replace(latent, loc=loc.detach(), scale_tril=scale_tril.detach()))
        return latents

    def check_figures(self) -> None:
        """Check that draws of each Gaussian can be told from one another by its density.

        Raises:
            FloatingPointError: if a covariance is so nearly singular that they cannot, in its
                dtype; weights would be anything then, far above one too.
        """
        for latent, shift, raw in zip(self._held_latents(), self.shifts, self.raws, strict=True):
            q = self._gaussian(latent, shift, raw)
            if not isinstance(q, dist.MultivariateNormal):
                continue
            factor = q.scale_tril.detach()
            ones = torch.ones_like(factor[..., :1])
            again = torch.linalg.solve_triangular(factor, factor @ ones, upper=False)
            lost = ~((again - ones).abs() < LARGEST_LOSS).all(-1).all(-1)
            if num_lost := int(lost.sum()):
                raise FloatingPointError(
                    f"the refined q of site {latent.name!r} is nearly singular for {num_lost} of "
                    f"{lost.numel()} data: {factor.dtype} has no figures left for its density. "
                    "Use covariance='diagonal', fewer steps, or the pair in float64: .double()"
                )

    def _sample(self, latent: _Latent, q: Density) -> None:
        if latent.direct:
            pyro.sample(latent.name, q)
        else:
            self._sample_transformed(latent, q)

    def _sample_transformed(self, latent: _Latent, q: Density) -> None:
        transform = biject_to(latent.support)
        auxiliary: Any = {"is_auxiliary": True}
        flat = pyro.sample(f"_{latent.name}_unconstrained", q, infer=auxiliary)
        shape = transform.inverse_shape(latent.event_shape)
        unconstrained = flat.reshape(*flat.shape[:-1], *shape)
        value = transform(unconstrained)
        rank = len(latent.event_shape)
        log_density = transform.inv.log_abs_det_jacobian(value, unconstrained)
        log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + rank)
        delta: Any = dist.Delta
        pyro.sample(latent.name, delta(value, log_density=log_density, event_dim=rank))


class PathGradient(TorchDistribution):
    """Draws from q with q's gradient, and q's log density without it.

    The gradient of an ELBO of sampled log weights then has no score term, whose mean is zero
    but whose variance is not: at q = p(z | x) the gradient is exactly zero for every draw.

    Args:
        q: the distribution.
        still: the same one with parameters that have no gradient.

    References:
        Roeder, Wu, Duvenaud: Sticking the landing (2017).
    """

    has_rsample = True

    def __init__(self, q: Density, still: Density) -> None:
        self.q, self.still = q, still
        super().__init__(q.batch_shape, q.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        """That of q."""
        return self.q.support

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, differentiable in q's parameters."""
        return self.q.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value), differentiable in the value alone."""
        return self.still.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PathGradient":
        """The same distribution with further batch dimensions."""
        return PathGradient(self.q.expand(batch_shape), self.still.expand(batch_shape))


def is_refinable(fn: Density) -> bool:
    """Whether a Gaussian can be started from a guide's distribution of a site and refined."""
    return fn.has_rsample and not isinstance(fn, dist.Delta)


def _is_real(support: constraints.Constraint) -> bool:
    inner = getattr(support, "base_constraint", support)
    return inner is constraints.real or isinstance(inner, type(constraints.real))


def _latent(trace: Any, site: Site) -> _Latent:
    name, fn = site["name"], site["fn"]
    support = fn.support
    if not is_refinable(fn):
        raise ValueError(
            f"site {name!r} of the guide ({type(fn).__name__}) has no density that could be "
            "refined; use refine=0, or a guide with a continuous density"
        )
    plates = [
        (f.name, f.full_size or f.size, _rows(trace, f), f.dim)
        for f in sorted(site["cond_indep_stack"], key=lambda f: f.dim)
        if f.vectorized
    ]
    loc, scale_tril = _moments(fn, support)
    return _Latent(name, plates, support, fn.event_shape, loc, scale_tril)


def _rows(trace: Any, frame: Any) -> Tensor | None:
    node = trace.nodes.get(frame.name)
    rows = None if node is None else node["value"]
    return rows if isinstance(rows, Tensor) else None


def _moments(fn: Density, support: constraints.Constraint) -> tuple[Tensor, Tensor]:
    # Mean and scale_tril of the flattened, unconstrained site.
    if isinstance(fn, dist.MultivariateNormal):
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


def _raw(scale_tril: Tensor, covariance: str) -> Tensor:
    """The unconstrained numbers from which :func:`~ppl_vae.families.gaussian` makes this scale."""
    scale = scale_tril.diagonal(dim1=-2, dim2=-1)
    log_variance = 2 * scale.log()
    limit = LOG_VARIANCE_BOUND
    raw = limit * torch.atanh((log_variance / limit).clamp(-0.99, 0.99))
    if covariance == "unit":
        return raw[..., :0]
    if covariance == "isotropic":
        return raw.mean(-1, keepdim=True)
    if covariance == "diagonal":
        return raw
    rows, columns = torch.tril_indices(scale.shape[-1], scale.shape[-1], -1, device=scale.device)
    return torch.cat([raw, (scale_tril / scale.unsqueeze(-1))[..., rows, columns]], -1)


def _stride(latent: _Latent, raw: Tensor) -> Tensor:
    """By how much each unconstrained number moves where its parameter moves by one, (R,).

    Adam moves all of them alike. Of K dimensions a row of the factor has up to K - 1 entries
    beside its diagonal; moved by as much as that each, they would turn the row by sqrt(K - 1)
    times as much, and of 50 dimensions make a factor that single precision cannot solve with.
    So a row is turned by three times as much at most.
    """
    dim = latent.loc.shape[-1]
    place = torch.arange(raw.shape[-1], device=raw.device)
    return torch.where(place < dim, 1.0, min(1.0, 3 * max(dim - 1, 1) ** -0.5)).to(raw)


def family_of(
    model: ProgramLike, guide: ProgramLike, x: Tensor, keywords: Mapping[str, Any]
) -> str:
    """The Gaussian family that a guide says it is of; else, of the distributions it samples."""
    declared = getattr(owner_of(guide), "covariance", None)
    if isinstance(declared, str):
        return declared
    with probing(model, guide):
        run = run_pair(model, guide, x, keywords)
    full = (isinstance(s["fn"], dist.MultivariateNormal) for s in sites(run.guide).values())
    return "full" if any(full) else "diagonal"
