"""The objective along the iterations of a coordinate ascent, and the stopping rule."""

import math
import time

import torch
from torch import Tensor

from ppl_vae.core.fit_result import FitResult

WITHIN_ROUNDING = "converged to rounding"


class EMHistory:
    """The objective after each half-step, two per iteration, and whether to continue.

    Attributes:
        start_time: when the fit started, by ``time.perf_counter``.
        bounds: the bound after each half-step, in nats per datum.
        log_likelihoods: log p(x) after each half-step, in nats per datum.
        elapsed: seconds since the start, after each half-step.
    """

    def __init__(self, start_time: float) -> None:
        self.start_time = start_time
        self.bounds: list[float] = []
        self.log_likelihoods: list[float] = []
        self.elapsed: list[float] = []

    @property
    def iterations(self) -> int:
        """The number of complete iterations."""
        return len(self.bounds) // 2

    @property
    def last_gain(self) -> float:
        """The gain of the last iteration, in nats per datum; zero before there is one."""
        return self.bounds[-1] - self.bounds[max(-3, -len(self.bounds))]

    def add(self, bound: Tensor | float, log_likelihood: Tensor | float) -> None:
        """Append the objective after a half-step."""
        self.bounds.append(float(bound))
        self.log_likelihoods.append(float(log_likelihood))
        self.elapsed.append(time.perf_counter() - self.start_time)

    def stop_reason(
        self, tol: float, max_iterations: int, rounding: float, *, since: int = 0
    ) -> str:
        """The reason to stop after this iteration; an empty string to continue.

        The gains still to come are extrapolated by :func:`remaining_gain`.

        Args:
            tol: the gain that may remain, in nats per datum.
            max_iterations: the largest number of iterations.
            rounding: gains up to this size are rounding errors.
            since: the iteration from which on gains are extrapolated (the last restart).
        """
        if self.iterations >= max_iterations:
            return iteration_limit(max_iterations)
        if self.iterations - since < 3:
            return ""
        if abs(self.last_gain) <= rounding:
            return WITHIN_ROUNDING
        if remaining_gain(self.bounds[-5::2]) < tol:
            return f"converged: under {tol:g} nats per datum to gain"
        return ""

    def result(
        self,
        algorithm: str,
        stopped: str,
        notes: tuple[str, ...],
        *,
        converged: bool | None = None,
        certificate: float | None = None,
    ) -> FitResult:
        """The history as a :class:`~ppl_vae.core.fit_result.FitResult`.

        Args:
            algorithm: the name of the algorithm.
            stopped: the reason why it stopped.
            notes: caveats for the user.
            converged, certificate: fields of the result.
        """
        return FitResult(
            algorithm=algorithm,
            objective=torch.tensor(self.bounds, dtype=torch.float64),
            log_likelihood=torch.tensor(self.log_likelihoods, dtype=torch.float64),
            elapsed=torch.tensor(self.elapsed, dtype=torch.float64),
            steps=self.iterations,
            seconds=time.perf_counter() - self.start_time,
            stopped=stopped,
            notes=notes,
            converged=converged,
            certificate=certificate,
        )


def iteration_limit(max_iterations: int) -> str:
    """The reason of a fit that stopped at its largest number of iterations."""
    return f"after max_iterations={max_iterations}"


def remaining_gain(bounds: list[float]) -> float:
    """The gain still to come, extrapolated from the last three of an ascending sequence.

    If gains g_t shrink by a constant ratio r, the gains still to come sum to g_t r / (1 - r). It
    is infinite if gains do not shrink, or with fewer than three bounds.
    """
    if len(bounds) < 3:
        return math.inf
    first, second, third = bounds[-3:]
    gain, ratio = third - second, (third - second) / max(second - first, 1e-300)
    return gain * ratio / (1 - ratio) if gain >= 0 and ratio < 1 else math.inf
