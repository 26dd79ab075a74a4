"""ELBOs at common points with their Monte Carlo errors, and the best q to a tolerance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributions as td

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import dry_run, seeded
from ppl_vae.core.traces import sites
from ppl_vae.evaluation.local_guides.distribution_forms import per_datum
from ppl_vae.evaluation.local_guides.local_guide import LocalGuide
from ppl_vae.evaluation.local_guides.site_override import (
    Imposed,
    from_noise,
    laid_out,
    noise_shape,
)
from ppl_vae.evaluation.marginal_likelihood.batching import LocalVI
from ppl_vae.objectives.divergences import is_delta

MOST_DIRECTIONS = 16
"""Of the noise, looked along at once."""
POINTS = 2 * MOST_DIRECTIONS + 1
"""At most so many points per datum go together."""


@dataclass(frozen=True)
class SphericalRadialRule:
    """Standard normal noise for each datum, chosen so that little of a mean is left to chance.

    The centre, and k orthogonal directions u in d dimensions, at random, to a random distance r
    both ways, r chi-distributed with d + 2 degrees of freedom. Then

        E f(noise) = E [f(0) + d / r^2 (mean_j (f(r u_j) + f(-r u_j)) / 2 - f(0))],

    whatever f, and for a quadratic f and k = d there is no chance left at all.

    Attributes:
        noise: G independent groups of 2 k + 1 points, (P, B, d) with P = (2 k + 1) G, centres
            first; None: draws are left to chance.
        square: r^2 of each group and datum, (G, B).
        seed: of what is left to chance.

    References:
        Genz, Monahan: Stochastic integration rules for infinite regions (1998), degree three.
    """

    noise: Float[Tensor, "P B d"] | None
    square: Float[Tensor, "G B"]
    seed: int

    @classmethod
    def draw(cls, size: int, x: Float[Tensor, "B D"]) -> "SphericalRadialRule":
        """Points of noise of d = ``size`` dimensions, for each row of x."""
        seed = int(torch.randint(2**31, ()))
        if not size:
            return cls(None, x.new_zeros(POINTS, len(x)), seed)
        k = min(size, MOST_DIRECTIONS)
        shape = torch.Size([POINTS // (2 * k + 1), len(x)])
        directions = torch.linalg.qr(torch.randn(*shape, size, k).to(x))[0].permute(3, 0, 1, 2)
        square = td.Gamma(x.new_tensor(size / 2 + 1), x.new_tensor(0.5)).sample(shape)
        arms = square.sqrt()[..., None] * directions
        noise = torch.cat([torch.zeros_like(arms[:1]), arms, -arms])
        return cls(noise.flatten(0, 1), square, seed)

    @property
    def number(self) -> int:
        """P, points per datum."""
        return POINTS if self.noise is None else len(self.noise)

    def means(self, values: Float[Tensor, "P B"]) -> Float[Tensor, "G B"]:
        """Independent estimates of a mean, one a group (or draw), from values at these points."""
        if self.noise is None:
            return values
        grouped = values.reshape(-1, *self.square.shape)
        centre, arms = grouped[0], grouped[1:].mean(0)
        return centre + self.noise.shape[-1] / self.square * (arms - centre)


class CommonNoiseELBO:
    """ELBOs of guides for the same data, at points of noise that they have in common.

    Guides whose sites are not all made from normal noise draw as they do, from common seeds.

    Args:
        model: of the pairs.
        guides: to be compared.
        x: a block of data.
        keywords: what the programs are told of it.
    """

    def __init__(
        self,
        model: ProgramLike,
        guides: Sequence[ProgramLike],
        x: Tensor,
        keywords: dict[str, Any],
    ) -> None:
        self.model, self.guides, self.x, self.keywords = model, guides, x, keywords
        self.dims = [Pair(model, guide).sample_dim(Batch(x, **keywords)) for guide in guides]
        sizes = [self._noise_size(guide) for guide in guides]
        self.size = max(sizes) if all(sizes) else 0

    def _noise_size(self, guide: ProgramLike) -> int:
        with dry_run(self.model, guide):
            run = Pair(self.model, guide).run(Batch(self.x, **self.keywords))
        drawn = [s["fn"] for s in sites(run.guide).values() if not is_delta(s["fn"])]
        shapes = [noise_shape(fn) for fn in drawn]
        return sum(shape.numel() for shape in shapes if shape) // len(self.x) * all(shapes)

    def points(self) -> SphericalRadialRule:
        """New points."""
        return SphericalRadialRule.draw(self.size, self.x)

    def at(self, points: SphericalRadialRule) -> Float[Tensor, "guides G B"]:
        """Estimates of each guide's ELBO from these points, in nats per datum."""
        pairs = zip(self.guides, self.dims, strict=True)
        return torch.stack([points.means(self._weights(g, dim, points)) for g, dim in pairs])

    def _weights(
        self, guide: ProgramLike, dim: int | None, points: SphericalRadialRule
    ) -> Float[Tensor, "P B"]:
        told, seed = (self.x, self.keywords), points.seed if points.noise is None else None
        with seeded(seed), Imposed(_Reader(points)):
            run = Pair(self.model, guide).run(
                Batch(told[0], **told[1]), num_samples=points.number, dim=dim
            )
        return run.log_weights().double().expand(points.number, -1)


class _Reader:
    """Reads the values of a guide's sites, one after another, off points of noise."""

    def __init__(self, points: SphericalRadialRule) -> None:
        self.noise, self.used = points.noise, 0

    def __call__(self, site: Any) -> Tensor | None:
        fn = site["fn"]
        if self.noise is None or is_delta(fn) or (shape := noise_shape(fn)) is None:
            return None
        width = shape.numel() // (self.noise.shape[0] * self.noise.shape[1])
        noise = self.noise[..., self.used : self.used + width]
        self.used += width
        return from_noise(fn, laid_out(noise, site, shape, len(shape) - len(fn.batch_shape)))


class LocalOptimum:
    """The q of a family that maximises each datum's ELBO, to a tolerance.

    Adam from the guide's own q; then, in blocks of steps with the gradients at
    :class:`SphericalRadialRule`, until a block gains less than the tolerance. Each block starts in
    units of the q it finds, and one that loses is undone.

    Args:
        model: of the pair.
        steps: of the first search.
        covariance: the family, see
            :func:`ppl_vae.evaluation.local_guides.distribution_forms.per_datum`.
        tolerance: in nats per datum; None ends with the first search.
    """

    STEPS = 50
    RATE = 0.05
    BLOCKS = 20
    LOOKS = 4

    def __init__(
        self, model: ProgramLike, *, steps: int, covariance: str, tolerance: float | None
    ) -> None:
        self.model, self.covariance, self.tolerance = model, covariance, tolerance
        self.refiner = LocalVI(model, steps=steps, covariance=covariance)

    def __call__(
        self, guide: ProgramLike, x: Tensor, keywords: dict[str, Any]
    ) -> tuple[LocalGuide, Float[Tensor, " B"]]:
        """The best guide of these rows, and what the last block gained for each, in nats."""
        local = self.refiner(guide, x, keywords)
        gained = torch.full((len(x),), math.nan).double()
        if self.tolerance is None:
            return local, gained
        for _ in range(self.BLOCKS):
            further = per_datum(self.model, local, x, keywords, self.covariance)
            bounds = CommonNoiseELBO(self.model, [local, further], x, keywords)
            self._climb(further, CommonNoiseELBO(self.model, [further], x, keywords))
            gained = self._gain(bounds)
            if float(gained.mean()) > 0:
                local = further
            if float(gained.mean()) < self.tolerance:
                break
        return local, gained

    def _climb(self, local: LocalGuide, bounds: CommonNoiseELBO) -> None:
        parameters = [p for p in local.parameters() if p.numel()]
        optimizer = torch.optim.Adam(parameters, lr=self.RATE)
        with torch.enable_grad():
            for step in range(self.STEPS):
                rate = self.RATE * (1 + math.cos(math.pi * step / self.STEPS)) / 2
                optimizer.param_groups[0]["lr"] = rate
                loss = -bounds.at(bounds.points()).mean(1).sum()
                gradients = torch.autograd.grad(loss, parameters)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
        local.requires_grad_(False).eval()

    @torch.no_grad()
    def _gain(self, bounds: CommonNoiseELBO) -> Float[Tensor, " B"]:
        looks = torch.cat([bounds.at(bounds.points()) for _ in range(self.LOOKS)], 1)
        before, after = looks.mean(1)
        return (after - before).cpu()
