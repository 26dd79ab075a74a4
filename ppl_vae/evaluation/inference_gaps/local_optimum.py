"""ELBOs with common random numbers, and the q that maximizes each datum's ELBO."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributions as td

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import seeded, validation
from ppl_vae.evaluation.local_guides.cosine_descent import cosine_rates, descend, store_gradient
from ppl_vae.evaluation.local_guides.local_guide import LocalGuide
from ppl_vae.evaluation.local_guides.parametrization import make_local_guide
from ppl_vae.evaluation.local_guides.site_override import (
    SiteOverride,
    from_noise,
    noise_shape,
    to_site_shape,
)
from ppl_vae.evaluation.marginal_likelihood.batching import PairFunction
from ppl_vae.evaluation.marginal_likelihood.call_runner import CallRunner
from ppl_vae.evaluation.marginal_likelihood.local_vi import LocalGradient, LocalVI
from ppl_vae.objectives.divergences import is_delta

MAX_DIRECTIONS = 16
"""The largest number of directions of the noise in one integration rule."""
MAX_POINTS = 2 * MAX_DIRECTIONS + 1
"""The largest number of points per datum in one integration rule."""


@dataclass(frozen=True)
class SphericalRadialRule:
    """A randomized integration rule for expectations over standard normal noise.

    Its points are the centre and, along k random orthogonal directions u in d dimensions, two
    opposite points at a random distance r, which is chi-distributed with d + 2 degrees of
    freedom. Then

        E f(noise) = E [f(0) + d / r^2 (mean_j (f(r u_j) + f(-r u_j)) / 2 - f(0))]

    for any f. For a quadratic f and k = d the rule is exact.

    Attributes:
        noise: G independent groups of 2 k + 1 points, (P, B, d) with P = (2 k + 1) G, centres
            first; None: draws are random.
        square: r^2 of each group and datum, (G, B).
        seed: the seed of random draws.

    References:
        Genz, Monahan: Stochastic integration rules for infinite regions (1998), degree three.
    """

    noise: Float[Tensor, "P B d"] | None
    square: Float[Tensor, "G B"]
    seed: int

    @classmethod
    def draw(cls, size: int, x: Float[Tensor, "B D"]) -> "SphericalRadialRule":
        """A new rule for noise of d = ``size`` dimensions, for each row of x."""
        seed = int(torch.randint(2**31, ()))
        if not size:
            return cls(None, x.new_zeros(MAX_POINTS, len(x)), seed)
        k = min(size, MAX_DIRECTIONS)
        shape = torch.Size([MAX_POINTS // (2 * k + 1), len(x)])
        normal = torch.randn(*shape, size, k, device=x.device).to(x.dtype)
        directions = torch.linalg.qr(normal)[0].permute(3, 0, 1, 2)
        concentration, rate = x.new_full((), size / 2 + 1), x.new_full((), 0.5)
        square = td.Gamma(concentration, rate, validate_args=False).sample(shape)
        offsets = square.sqrt()[..., None] * directions
        noise = torch.cat([torch.zeros_like(offsets[:1]), offsets, -offsets])
        return cls(noise.flatten(0, 1), square, seed)

    @property
    def num_points(self) -> int:
        """The number of points per datum, P."""
        return MAX_POINTS if self.noise is None else len(self.noise)

    def means(self, values: Float[Tensor, "P B"]) -> Float[Tensor, "G B"]:
        """Independent estimates of a mean, one per group (or draw), from values at the points."""
        if self.noise is None:
            return values
        grouped = values.reshape(-1, *self.square.shape)
        centre, mean = grouped[0], grouped[1:].mean(0)
        return centre + self.noise.shape[-1] / self.square * (mean - centre)


class CommonNoiseELBO:
    """ELBOs of several guides of a model on the same data, with common noise.

    If some guide's draws are not transforms of normal noise, all guides draw with common seeds.

    Args:
        pairs: the pairs to compare.
        batch: the data.
    """

    def __init__(self, pairs: Sequence[Pair], batch: Batch) -> None:
        self.pairs, self.batch = pairs, batch
        sizes = [_noise_size(pair, batch) for pair in pairs]
        self.size = max(sizes) if all(sizes) else 0

    def rule(self) -> SphericalRadialRule:
        """A new integration rule."""
        return SphericalRadialRule.draw(self.size, self.batch.x)

    def estimates(
        self, rule: SphericalRadialRule, tensors: Sequence[Tensor] | None = None
    ) -> Float[Tensor, "P G B"]:
        """Independent estimates of each pair's ELBO by this rule, in nats per datum.

        Args:
            rule: the rule.
            tensors: the tensors of the batch, where they are others than its own.
        """
        batch = self.batch if tensors is None else self.batch.with_tensors(tensors)
        found = [rule.means(self._log_weights(pair, batch, rule)) for pair in self.pairs]
        return torch.stack(found)

    def _log_weights(
        self, pair: Pair, batch: Batch, rule: SphericalRadialRule
    ) -> Float[Tensor, "P B"]:
        dim, seed = pair.sample_dim(batch), rule.seed if rule.noise is None else None
        # The programs' arguments were checked when the size of the noise was found.
        with seeded(seed), validation(False), SiteOverride(_NoiseReader(rule)):
            run = pair.run(batch, num_samples=rule.num_points, dim=dim)
            values = run.log_weights().double()
        return values.expand(rule.num_points, -1)


def _noise_size(pair: Pair, batch: Batch) -> int:
    """The normal noise values of a draw per datum; 0 if some site uses other noise."""
    with pair.dry_run():
        run = pair.run(batch)
    random = [s["fn"] for s in run.drawn.values() if not is_delta(s["fn"])]
    shapes = [noise_shape(fn) for fn in random]
    if not all(shapes):
        return 0
    return sum(shape.numel() for shape in shapes if shape) // len(batch)


class _NoiseReader:
    """Assigns consecutive columns of the noise of a rule to the sites of a guide."""

    def __init__(self, rule: SphericalRadialRule) -> None:
        self.noise, self.used = rule.noise, 0

    def __call__(self, site: Any) -> Tensor | None:
        fn = site["fn"]
        if self.noise is None or is_delta(fn) or (shape := noise_shape(fn)) is None:
            return None
        width = shape.numel() // (self.noise.shape[0] * self.noise.shape[1])
        noise = self.noise[..., self.used : self.used + width]
        self.used += width
        return from_noise(fn, to_site_shape(noise, site, shape, len(shape) - len(fn.batch_shape)))


class LocalOptimum:
    """Maximizes the ELBO of each datum over a family of q, to a tolerance.

    Adam runs from the guide's own q; then in rounds of steps, with gradients by
    :class:`SphericalRadialRule`, until a round gains less than the tolerance. Each round starts
    from the q found so far and scales its parameters by it; a round that loses is discarded.

    Args:
        steps: the number of steps before the first round.
        covariance: the family, see
            :func:`ppl_vae.evaluation.local_guides.parametrization.make_local_guide`.
        tolerance: the smallest gain of a round, in nats per datum; None: there are no rounds.
        make_runner: makes what decides whether steps run eagerly, recorded or compiled, from the
            number of steps of a batch.
    """

    STEPS = 50
    LEARNING_RATE = 0.05
    MAX_ROUNDS, EXPECTED_ROUNDS = 20, 3
    RULES = 4

    def __init__(
        self,
        *,
        steps: int,
        covariance: str,
        tolerance: float | None,
        make_runner: Callable[[int], CallRunner],
    ) -> None:
        self.covariance, self.tolerance = covariance, tolerance
        self.local_vi = LocalVI(steps=steps, covariance=covariance, runner=make_runner(steps))
        self.runner = make_runner(self.EXPECTED_ROUNDS * self.STEPS)

    def __call__(self, pair: Pair, batch: Batch) -> tuple[Pair, Float[Tensor, " B"]]:
        """The model with the best guide of these rows, and each datum's last gain, in nats."""
        best = self.local_vi(pair, batch)
        gain = torch.full((len(batch),), math.nan).double()
        if self.tolerance is None:
            return best, gain
        for _ in range(self.MAX_ROUNDS):
            guide = make_local_guide(best, batch, self.covariance)
            candidate = pair.with_guide(guide, sample_dim=pair.sample_dim(batch))
            self._maximize(guide, CommonNoiseELBO([candidate], batch))
            gain = self._gain(CommonNoiseELBO([best, candidate], batch))
            if float(gain.mean()) > 0:
                best = candidate
            if float(gain.mean()) < self.tolerance:
                break
        return best, gain

    def _maximize(self, guide: LocalGuide, elbo: CommonNoiseELBO) -> None:
        (candidate,), batch = elbo.pairs, elbo.batch
        function = PairFunction(candidate, batch, several=True)

        def loss(tensors: Sequence[Tensor], rule: SphericalRadialRule) -> Tensor:
            return -elbo.estimates(rule, tensors).mean(1).sum()

        def loss_of_noise(tensors: Sequence[Tensor], noise: Sequence[Tensor]) -> Tensor:
            return loss(tensors, SphericalRadialRule(*noise, seed=0))

        gradient = LocalGradient(guide, function, loss_of_noise)

        def store() -> None:
            rule = elbo.rule()
            if rule.noise is None:  # seeds of draws are no tensors, so this cannot be captured
                store_gradient(gradient.parameters, lambda: loss(batch.tensors, rule))
            else:
                gradient.store(self.runner, self.STEPS, [rule.noise, rule.square])

        descend(gradient.parameters, cosine_rates(self.LEARNING_RATE, self.STEPS), store)
        guide.requires_grad_(False).eval()

    @torch.no_grad()
    def _gain(self, elbo: CommonNoiseELBO) -> Float[Tensor, " B"]:
        values = torch.cat([elbo.estimates(elbo.rule()) for _ in range(self.RULES)], 1)
        before, after = values.mean(1)
        return (after - before).cpu()
