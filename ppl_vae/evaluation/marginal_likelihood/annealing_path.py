"""The distributions between a guide's q and the posterior, in unconstrained space."""

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import DATA_PLATE, Density, ProgramLike
from ppl_vae.core.traces import SAMPLE_PLATE, PairTraces, Site, frames, log_prob, sites
from ppl_vae.evaluation.marginal_likelihood.batching import Block
from ppl_vae.objectives.divergences import check_latents


@dataclass(frozen=True)
class _Coordinates:
    """Where the unconstrained numbers of a site stand in its tensor.

    Attributes:
        data, draw: dimensions from the right, of data and of draws; draws without a dimension of
            their own stand in the data's, draw by draw (see :func:`ppl_vae.core.traces.run_pair`).
        rest: the other dimensions.
    """

    name: str
    data: int
    draw: int | None
    rest: torch.Size

    @classmethod
    def of(cls, site: Site) -> "_Coordinates":
        plates, transform = frames(site), _transform(site)
        event = len(site["fn"].event_shape)
        event += transform.domain.event_dim - transform.codomain.event_dim
        shape = _unconstrained(site).shape
        data = plates[DATA_PLATE].dim - event
        draw = plates[SAMPLE_PLATE].dim - event if SAMPLE_PLATE in plates else None
        taken = {dim + len(shape) for dim in (data, draw) if dim is not None}
        rest = torch.Size(size for dim, size in enumerate(shape) if dim not in taken)
        return cls(site["name"], data, draw, rest)

    @property
    def width(self) -> int:
        """Numbers per datum."""
        return self.rest.numel()

    def flat(self, value: Tensor, num_rows: int) -> Float[Tensor, "S B K"]:
        """The site's tensor, one row a draw and datum."""
        if self.draw is None:
            return value.movedim(self.data, 0).reshape(-1, num_rows, self.width)
        value = value.movedim((self.draw, self.data), (0, 1))
        return value.reshape(*value.shape[:2], self.width)

    def native(self, flat: Float[Tensor, "S B K"]) -> Tensor:
        """The inverse of :meth:`flat`."""
        value = flat.reshape(*flat.shape[:2], *self.rest)
        if self.draw is None:
            return value.flatten(0, 1).movedim(0, self.data).contiguous()
        return value.movedim((0, 1), (self.draw, self.data)).contiguous()


def _transform(site: Any) -> Any:
    fn, name = site["fn"], site["name"]
    try:
        return biject_to(fn.support)
    except NotImplementedError as error:
        raise ValueError(
            f"site {name!r} ({type(fn).__name__}) is discrete, or has a support that torch does "
            "not map to real numbers (biject_to), so chains cannot move it; sum it out in the "
            "model, or use method='importance'"
        ) from error


def _unconstrained(site: Site) -> Tensor:
    return _transform(site).inv(site["value"])


class _Placed(Messenger):
    """Puts a guide's sites at points of unconstrained space; what hangs on them follows.

    Attributes:
        log_jacobians: log |dz/du| of each site, in the shape of its density.
    """

    def __init__(self, points: dict[str, Tensor]) -> None:
        super().__init__()
        self.points, self.log_jacobians = points, {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.points:
            return
        point, transform = self.points[msg["name"]], _transform(msg)
        value = transform(point)
        msg["value"], msg["done"] = value, True
        log_jacobian = transform.log_abs_det_jacobian(point, value)
        batch = value.dim() - len(msg["fn"].event_shape)
        self.log_jacobians[msg["name"]] = sum_rightmost(log_jacobian, log_jacobian.dim() - batch)


class Path(Block):
    """The distributions between a guide's q and the posterior, for a block of data.

    Args:
        model, guide: the pair; a guide that is the model's prior makes the prior the start.
        x: the rows.
        keywords: what the pair is told of them.

    Raises:
        ValueError: if the guide draws what cannot be moved (a discrete site), or has no density
            over as many numbers as the model's latent sites (a point mass).
    """

    def __init__(
        self, model: ProgramLike, guide: ProgramLike, x: Tensor, keywords: dict[str, Any]
    ) -> None:
        super().__init__(model, guide, x, keywords, several=True)
        self.coordinates = self._drawn(run := self._run(guide, self.tensors, 2, self.dim))
        check_latents(run)
        have = sum(c.width for c in self.coordinates)
        latent = (_Coordinates.of(site) for site in run.latent.values())
        if have != (needed := sum(c.width for c in latent)):
            points = [n for n, s in sites(run.guide).items() if _is_point(s["fn"])]
            raise ValueError(
                f"the guide draws {have} numbers per datum and the model has {needed} latent "
                f"ones, so q has no density to anneal from (point masses: {points}); use a guide "
                "with a density, or start from the prior (guide=None)"
            )

    def _run(
        self, guide: ProgramLike, tensors: list[Tensor], number: int, dim: int | None
    ) -> PairTraces:
        x, *given = tensors
        told: dict[str, Any] = self.others | dict(zip(self.names, given, strict=True))
        return Pair(self.model, guide).run(Batch(x, **told), num_samples=number, dim=dim)

    def _drawn(self, run: PairTraces) -> list[_Coordinates]:
        found = [s for s in sites(run.guide).values() if not _is_point(s["fn"])]
        return [_Coordinates.of(site) for site in found]

    def start(self, number: int) -> Float[Tensor, "S B K"]:
        """Draws of q, in unconstrained space."""
        return self._read(self._run(self.guide, self.tensors, number, self.dim))

    def place(self, drawn: Any) -> Float[Tensor, "1 B K"]:
        """The values that a model's trace holds, in unconstrained space.

        Raises:
            ValueError: if the guide draws other sites than the model's.
        """
        if others := [c.name for c in self.coordinates if c.name not in drawn]:
            raise ValueError(
                f"the guide draws auxiliary sites, {others}, so it is not known where the model's "
                "draws lie among its own; start from the prior (guide=None)"
            )
        guide = poutine.replay(self.guide, trace=drawn)
        return self._read(self._run(guide, self.tensors, 1, None))

    def _read(self, run: PairTraces) -> Float[Tensor, "S B K"]:
        found, num_rows = sites(run.guide), len(self.tensors[0])
        points = [c.flat(_unconstrained(found[c.name]), num_rows) for c in self._drawn(run)]
        return torch.cat(points, -1)

    def densities(self, tensors: list[Tensor], points: Float[Tensor, "S B K"]) -> tuple[Any, Any]:
        """log q, in unconstrained space, and log w at these points, each (S, B)."""
        parts = points.split([c.width for c in self.coordinates], -1)
        natives = {c.name: c.native(p) for c, p in zip(self.coordinates, parts, strict=True)}
        to_device = _Placed(natives)
        run = self._run(to_device(self.guide), tensors, len(points), self.dim)
        found = sites(run.guide)
        terms = [
            run.per_datum(found[name], log_prob(found[name]) + log_jacobian)
            for name, log_jacobian in to_device.log_jacobians.items()
        ]
        start = torch.stack(torch.broadcast_tensors(*terms)).sum(0)
        return start, run.log_weights().expand(start.shape)

    def slopes(
        self, tensors: list[Tensor], points: Float[Tensor, "S B K"], beta: Float[Tensor, ""]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log w, log f_b, and its gradient at these points."""
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            start, weight = self.densities(tensors, points)
            value = start + beta * weight
            (slope,) = torch.autograd.grad(value.sum(), points)
        return weight.detach(), value.detach(), slope


def _is_point(fn: Density) -> bool:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)
