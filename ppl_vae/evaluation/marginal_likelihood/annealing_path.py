"""The annealing path between a guide's q and the posterior, in unconstrained space."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to

from ppl_vae.core.batch import Batch
from ppl_vae.core.global_sites import check_no_globals
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import DATA_PLATE, Density
from ppl_vae.core.traces import SAMPLE_PLATE, PairTraces, Site, log_prob, plates_of
from ppl_vae.evaluation.local_guides.site_override import SiteOverride
from ppl_vae.evaluation.marginal_likelihood.batching import PairFunction
from ppl_vae.objectives.divergences import check_latents


@dataclass(frozen=True)
class _Coordinates:
    """The position of a site's unconstrained values in its tensor.

    Attributes:
        name: the name of the site.
        data, draw: the dimensions of data and of draws, counted from the right. Draws without a
            dimension of their own are in that of the data, one draw after another (see
            :meth:`ppl_vae.core.pair.Pair.run`).
        rest: the sizes of the other dimensions.
    """

    name: str
    data: int
    draw: int | None
    rest: torch.Size

    @classmethod
    def of(cls, site: Site) -> "_Coordinates":
        plates, transform = plates_of(site), _transform(site)
        event_dim = len(site["fn"].event_shape)
        event_dim += transform.domain.event_dim - transform.codomain.event_dim
        shape = _unconstrained(site).shape
        data = plates[DATA_PLATE].dim - event_dim
        draw = plates[SAMPLE_PLATE].dim - event_dim if SAMPLE_PLATE in plates else None
        taken = {dim + len(shape) for dim in (data, draw) if dim is not None}
        rest = torch.Size(size for dim, size in enumerate(shape) if dim not in taken)
        return cls(site["name"], data, draw, rest)

    @property
    def width(self) -> int:
        """The number of unconstrained values per datum."""
        return self.rest.numel()

    def flatten(self, value: Tensor, num_rows: int) -> Float[Tensor, "S B K"]:
        """The site's tensor, with one row per draw and datum."""
        if self.draw is None:
            return value.movedim(self.data, 0).reshape(-1, num_rows, self.width)
        value = value.movedim((self.draw, self.data), (0, 1))
        return value.reshape(*value.shape[:2], self.width)

    def unflatten(self, flat: Float[Tensor, "S B K"]) -> Tensor:
        """The inverse of :meth:`flatten`."""
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


class _UnconstrainedValues:
    """Gives the sites of a guide the values at points of unconstrained space.

    Attributes:
        log_jacobians: log |dz/du| of each site that was given a value, in the shape of its
            density.
    """

    def __init__(self, points: dict[str, Tensor]) -> None:
        self.points = points
        self.log_jacobians: dict[str, Any] = {}

    def __call__(self, site: Any) -> Tensor | None:
        if site["name"] not in self.points:
            return None
        point, transform = self.points[site["name"]], _transform(site)
        value = transform(point)
        log_jacobian: Any = transform.log_abs_det_jacobian(point, value)
        batch_dim = value.dim() - len(site["fn"].event_shape)
        self.log_jacobians[site["name"]] = sum_rightmost(
            log_jacobian, log_jacobian.dim() - batch_dim
        )
        return value


class PathDensity(NamedTuple):
    """The densities of the annealed distributions f_b at given points, for all b.

    Attributes:
        log_q: log q, in unconstrained space, (S, B).
        log_weight: log w = log p(x, z) - log q(z), (S, B).
        grad_q, grad_weight: their gradients with respect to the points, (S, B, K).
    """

    log_q: Tensor
    log_weight: Tensor
    grad_q: Tensor
    grad_weight: Tensor

    def log_prob(self, beta: Float[Tensor, ""]) -> Float[Tensor, "S B"]:
        """log f_b = log q + b log w, unnormalized."""
        return self.log_q + beta * self.log_weight

    def grad(self, beta: Float[Tensor, ""]) -> Float[Tensor, "S B K"]:
        """The gradient of log f_b."""
        return self.grad_q + beta * self.grad_weight


class AnnealingPath(PairFunction):
    """The distributions between a guide's q and the posterior, for a batch of data.

    Args:
        pair: the pair; a guide that is the model's prior makes the prior the start of the path.
        batch: the batch.

    Raises:
        ValueError: if the guide has a site without an unconstrained space (a discrete variable),
            or has no density over as many dimensions as the model's latent sites (a point mass);
            if the model has global latent variables.
    """

    def __init__(self, pair: Pair, batch: Batch) -> None:
        super().__init__(pair, batch, several=True)
        run = self.run(batch.tensors, 2)
        check_no_globals(run, "annealing")
        self.coordinates = _coordinates_of(run)
        check_latents(run)
        guide_dim = sum(c.width for c in self.coordinates)
        latent = (_Coordinates.of(site) for site in run.latent.values())
        if guide_dim != (latent_dim := sum(c.width for c in latent)):
            points = [n for n, s in run.drawn.items() if _is_point(s["fn"])]
            raise ValueError(
                f"the guide draws {guide_dim} values per datum and the model has {latent_dim} "
                f"latent ones, so q has no density to anneal from (point masses: {points}); use a "
                "guide with a density, or start from the prior (guide=None)"
            )

    def draw(self, num_chains: int) -> Float[Tensor, "S B K"]:
        """Draws of q, in unconstrained space."""
        return self._flatten(self.run(self.batch.tensors, num_chains))

    def locate(self, latents: Any) -> Float[Tensor, "1 B K"]:
        """The latent values of a trace of the model, in unconstrained space.

        Raises:
            ValueError: if the guide has sites that the model has not.
        """
        if others := [c.name for c in self.coordinates if c.name not in latents]:
            raise ValueError(
                f"the guide draws auxiliary sites, {others}, so the point of its space that "
                "corresponds to the model's draws is not known; start from the prior (guide=None)"
            )
        replayed = self.pair.with_guide(poutine.replay(self.pair.guide, trace=latents))
        return self._flatten(replayed.run(self.batch))

    def _flatten(self, run: PairTraces) -> Float[Tensor, "S B K"]:
        found, num_rows = run.drawn, len(self.batch)
        points = [c.flatten(_unconstrained(found[c.name]), num_rows) for c in _coordinates_of(run)]
        return torch.cat(points, -1)

    def log_q_and_weight(
        self, tensors: Sequence[Tensor], points: Float[Tensor, "S B K"]
    ) -> tuple[Float[Tensor, "S B"], Float[Tensor, "S B"]]:
        """log q, in unconstrained space, and log w at these points."""
        parts = points.split([c.width for c in self.coordinates], -1)
        values = _UnconstrainedValues(
            {c.name: c.unflatten(p) for c, p in zip(self.coordinates, parts, strict=True)}
        )
        with SiteOverride(values):
            run = self.run(tensors, len(points))
        found = run.drawn
        terms = [
            run.per_datum(found[name], log_prob(found[name]) + log_jacobian)
            for name, log_jacobian in values.log_jacobians.items()
        ]
        log_q = torch.stack(torch.broadcast_tensors(*terms)).sum(0)
        return log_q, run.log_weights().expand(log_q.shape)

    def density(self, tensors: Sequence[Tensor], points: Float[Tensor, "S B K"]) -> PathDensity:
        """log q, log w and their gradients at these points."""
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            values = self.log_q_and_weight(tensors, points)
            gradients = [_gradient(value, points) for value in values]
        return PathDensity(*(value.detach() for value in values), *gradients)


def _gradient(value: Float[Tensor, "S B"], points: Float[Tensor, "S B K"]) -> Tensor:
    # A likelihood that does not depend on z has no gradient.
    if not value.requires_grad:
        return torch.zeros_like(points)
    (gradient,) = torch.autograd.grad(
        value.sum(), points, retain_graph=True, materialize_grads=True
    )
    return gradient


def _coordinates_of(run: PairTraces) -> list[_Coordinates]:
    found = [site for site in run.drawn.values() if not _is_point(site["fn"])]
    return [_Coordinates.of(site) for site in found]


def _is_point(fn: Density) -> bool:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)
