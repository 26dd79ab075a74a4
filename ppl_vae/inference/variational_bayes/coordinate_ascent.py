"""The iterations of variational Bayes: updates of the factors, and extrapolation."""

import math
import time
from dataclasses import replace
from typing import NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.em.history import WITHIN_ROUNDING, iteration_limit, remaining_gain
from ppl_vae.inference.variational_bayes.latent_moments import LatentMoments
from ppl_vae.inference.variational_bayes.parameters import (
    ConjugateUpdates,
    ParameterPosterior,
    expected_log,
)
from ppl_vae.inference.variational_bayes.reparametrization import best_inverse_map
from ppl_vae.models.linear.linear_gaussian import LOG_2PI
from ppl_vae.models.linear.table_statistics import TableStatistics

NUM_SMALL_GAINS = 2
"""The number of consecutive cycles with small gains at which the iterations stop."""


class VBState(NamedTuple):
    """A posterior of the parameters, the best q(z) for it, and the bound.

    Attributes:
        posterior: q(W, mu) q(sigma) q(relevance).
        latents: sums under q(z).
        bound: the bound of log p(x), in nats per datum.
    """

    posterior: ParameterPosterior
    latents: LatentMoments
    bound: Float[Tensor, ""]


class CoordinateAscent:
    """The iterations of variational Bayes, and the history of the bound.

    Attributes:
        bounds: the bound after each iteration, in nats per datum.
        elapsed: seconds since the start, after each iteration.
        state: the current state.
        converged: whether the end satisfies the stopping rule.
        max_length: the largest factor of an extrapolation; adapted.
    """

    state: VBState

    def __init__(
        self,
        statistics: TableStatistics,
        updates: ConjugateUpdates,
        rotate: bool,
        start_time: float,
    ) -> None:
        self.statistics, self.updates, self.rotate = statistics, updates, rotate
        self.start_time = start_time
        self.bounds: list[float] = []
        self.elapsed: list[float] = []
        self.converged = False
        self.max_length = 4.0

    @torch.no_grad()
    def run(self, initial: ParameterPosterior, tol: float, max_iterations: int) -> str:
        """Iterate to the end: in turn two iterations, and one from extrapolated parameters.

        Returns:
            The reason to stop.
        """
        self._accept(self._iteration_from(initial))
        num_small, stopped = 0, ""
        while not stopped:
            stopped, gain = self._cycle(max_iterations)
            # Slow components show only after fast ones have vanished, so that one small gain is
            # not enough.
            num_small = num_small + 1 if gain < tol else 0
            if not stopped and num_small == NUM_SMALL_GAINS:
                stopped = f"converged: under {tol:g} nats per datum to gain"
        self.converged = stopped != iteration_limit(max_iterations)
        return stopped

    def _cycle(self, max_iterations: int) -> tuple[str, float]:
        # Two iterations, and one from extrapolated parameters: the reason to stop, if there is
        # one, and the gain of the third or the one that the first two promise, if larger.
        cycle = [self.state]
        for _ in range(2):
            if len(self.bounds) >= max_iterations:
                return iteration_limit(max_iterations), math.inf
            following = self._updated(self.state.posterior, self.state.latents)
            if float(following.bound - self.state.bound) <= self._rounding():
                return WITHIN_ROUNDING, 0.0  # no gain, or a decrease by rounding errors
            self._accept(following)
            cycle.append(following)
        if len(self.bounds) >= max_iterations:
            return iteration_limit(max_iterations), math.inf
        to_come = remaining_gain([float(state.bound) for state in cycle])
        return "", max(to_come, self._extrapolate(cycle))

    def _extrapolate(self, cycle: list[VBState]) -> float:
        # The gain of an iteration from extrapolated parameters, which is accepted if positive.
        first, second, third = (state.posterior for state in cycle)
        proposal, length = extrapolated(first, second, third, self.max_length)
        state = self.state
        try:
            state = self._iteration_from(proposal)
            gain = float(state.bound - self.state.bound)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            gain = math.nan  # far beyond the data a precision matrix overflows
        if not gain > 0:  # as NaN is not
            self.max_length = max(self.max_length / 2, 1.0)
            return 0.0
        if length == self.max_length:
            self.max_length *= 4
        self._accept(state)
        return gain

    def _iteration_from(self, posterior: ParameterPosterior) -> VBState:
        return self._updated(posterior, LatentMoments.of(self.statistics, posterior.moments))

    def _accept(self, state: VBState) -> None:
        self.state = state
        self.bounds.append(float(state.bound))
        self.elapsed.append(time.perf_counter() - self.start_time)

    def _updated(self, posterior: ParameterPosterior, latents: LatentMoments) -> VBState:
        # Updates all factors but q(z), the map of z, and q(z).
        posterior = self.updates.update_rows(posterior, latents)
        squares = latents.expected_squares(posterior.mean, posterior.second_moment)
        posterior = self.updates.update_noise(posterior, squares, latents.counts)
        if self.rotate:
            inverse = best_inverse_map(self.updates, posterior, latents)
            posterior = posterior.transformed(inverse)
        posterior = self.updates.update_relevance(posterior)
        latents = LatentMoments.of(self.statistics, posterior.moments)
        return VBState(posterior, latents, self._bound(posterior, latents))

    def _bound(self, posterior: ParameterPosterior, latents: LatentMoments) -> Float[Tensor, ""]:
        squares = latents.expected_squares(posterior.mean, posterior.second_moment)
        log_variance = -expected_log(posterior.noise)
        terms = latents.counts * (LOG_2PI + log_variance) + posterior.noise.mean * squares
        total = latents.expected_log_prior_and_entropy() - 0.5 * terms.sum()
        return (total - self.updates.divergence(posterior)) / latents.num_data

    def _rounding(self) -> float:
        # A sum of squares loses the digits by which the variance exceeds that of the noise.
        ratio = self.statistics.columns.variance * self.state.posterior.noise.mean
        return torch.finfo(torch.float64).eps * float(ratio.sum() + self.state.bound.abs())


def extrapolated(
    first: ParameterPosterior,
    second: ParameterPosterior,
    third: ParameterPosterior,
    max_length: float,
) -> tuple[ParameterPosterior, float]:
    """Parameters beyond those of three iterations x_0, x_1, x_2, and the factor s >= 1.

    With r = x_1 - x_0 and v = x_2 - 2 x_1 + x_0 they are x_0 + 2 s r + s^2 v, where
    s = |r| / |v|; for s = 1 they are x_2. The coordinates are the means of the rows in units of
    the noise, and the logarithms of the rates; all else is that of x_2.
    """
    unit = third.noise.mean.expand(len(third.mean)).sqrt()[:, None]
    points = [_coordinates(posterior, unit) for posterior in (first, second, third)]
    velocities = [middle - start for start, middle, _ in zip(*points, strict=True)]
    changes = [end - 2 * middle + start for start, middle, end in zip(*points, strict=True)]
    ratio = _norm(velocities) / max(_norm(changes), 1e-300)
    length = min(max(ratio, 1.0), max_length)
    mean, noise_rate, *relevance_rate = (
        start + 2 * length * velocity + length**2 * change
        for start, velocity, change in zip(points[0], velocities, changes, strict=True)
    )
    relevance = third.relevance
    if relevance is not None:
        relevance = _gamma(relevance.concentration, relevance_rate[0])
    noise = _gamma(third.noise.concentration, noise_rate)
    return replace(third, mean=mean / unit, noise=noise, relevance=relevance), length


def _gamma(concentration: Tensor, log_rate: Tensor) -> dist.Gamma:
    # Not validated: a rate may overflow, and the proposal is then rejected.
    return dist.Gamma(concentration, log_rate.exp(), validate_args=False)


def _coordinates(posterior: ParameterPosterior, unit: Float[Tensor, "D 1"]) -> list[Tensor]:
    parts = [posterior.mean * unit, posterior.noise.rate.log()]
    relevance = posterior.relevance
    return parts if relevance is None else [*parts, relevance.rate.log()]


def _norm(parts: list[Tensor]) -> float:
    return sum(float(part.square().sum()) for part in parts) ** 0.5
