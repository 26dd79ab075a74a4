"""The objective of an ascent along its iterations, and whether these gain anything any more."""

import time
from typing import Any

import torch
from torch import Tensor

from ppl_vae.core.results import FitResult

WITHIN_ROUNDING = "converged to rounding"


class EMHistory:
    """What the iterations gave, two half-steps each, and whether they should go on."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.bounds: list[float] = []
        self.log_likelihoods: list[float] = []
        self.elapsed: list[float] = []

    @property
    def iterations(self) -> int:
        """How many were made."""
        return len(self.bounds) // 2

    def add(self, bound: Tensor | float, log_likelihood: Tensor | float) -> None:
        """Enter a half-step."""
        self.bounds.append(float(bound))
        self.log_likelihoods.append(float(log_likelihood))
        self.elapsed.append(time.perf_counter() - self.began)

    def why_stop(self, tol: float, max_iterations: int, rounding: float, *, since: int = 0) -> str:
        """Why to stop here, or an empty string.

        Gains g_t that shrink by a ratio r leave g_t r / (1 - r) to be gained.

        Args:
            tol: in nats per datum, what may be left.
            max_iterations: at most so many.
            rounding: gains below it are none.
            since: the iteration after which gains belong together.
        """
        if self.iterations >= max_iterations:
            return after(max_iterations)
        if self.iterations - since < 3:
            return ""
        first, second, third = self.bounds[-5], self.bounds[-3], self.bounds[-1]
        gain, ratio = third - second, (third - second) / max(second - first, 1e-300)
        if abs(gain) <= rounding:
            return WITHIN_ROUNDING
        if gain >= 0 and ratio < 1 and gain * ratio / (1 - ratio) < tol:
            return f"converged: under {tol:g} nats per datum to gain"
        return ""

    def result(self, name: str, stopped: str, notes: tuple[str, ...], **more: Any) -> FitResult:
        """What is handed to the user; ``more`` are further fields of it."""
        return FitResult(
            algorithm=name,
            objective=torch.tensor(self.bounds, dtype=torch.float64),
            log_likelihood=torch.tensor(self.log_likelihoods, dtype=torch.float64),
            elapsed=torch.tensor(self.elapsed, dtype=torch.float64),
            steps=self.iterations,
            seconds=time.perf_counter() - self.began,
            stopped=stopped,
            notes=notes,
            **more,
        )


def after(max_iterations: int) -> str:
    """Why an ascent stopped that was not to go on."""
    return f"after max_iterations={max_iterations}"
