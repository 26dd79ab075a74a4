"""SVI stopped at a tolerance: cosine cycles, each twice as long as the last."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.text import counted
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.inference.svi.progress import ProgressCallback

CYCLES = 3
"""The largest number of cycles of a fit."""
OPTIMIZER = partial(torch.optim.Adam, betas=(0.9, 0.95))
"""Adam with a shorter memory of squared gradients than by default: the first gradients of PPCA
are by far the largest, and would keep the steps small for another thousand steps."""
LR_DECAY = 10**-0.5
"""The factor of the learning rate after a cycle that made the fit worse."""


@dataclass(frozen=True)
class Convergence(Result):
    """Whether a fit continued until its tolerance was met.

    Attributes:
        met: whether it was met.
        tolerance: in nats per datum; NaN if another rule was used.
        gained: the gain of the last ``steps`` steps in nats per datum; NaN if unknown.
        steps: the number of steps over which the gain is measured.
        rule: the rule as text.
    """

    met: bool
    tolerance: float
    gained: float
    steps: int
    rule: str

    def __str__(self) -> str:
        if self.met or math.isnan(self.gained):
            return self.rule
        return f"the last {counted(self.steps, 'step')} gained {self.gained:.2g} nats per datum"


def fit_in_cycles(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    value: Callable[[], float],
    tolerance: float,
    steps: int,
    batch_size: int,
    lr: float,
    progress: ProgressCallback,
    seed: int,
    device: str | torch.device = "auto",
) -> tuple[FitResult, Convergence]:
    """Fit a pair by SVI until a cycle of the learning rate gains less than a tolerance.

    In each of three cycles the learning rate falls from ``lr`` to zero along a cosine, and each
    cycle is twice as long as the one before. Fits are thus compared where the noise of the steps
    has vanished, and the gain compared is that of twice the work. If a cycle made the fit worse
    by more than the tolerance, or its loss became infinite, the learning rate of the next one is
    lower.

    Args:
        model, guide, x: as for :func:`~ppl_vae.fit_svi`; fitted in place.
        value: computes the current objective of the pair over all rows, in nats per datum,
            without noise from call to call.
        tolerance: nats per datum.
        steps: the largest total number of steps.
        batch_size: rows per step.
        lr: learning rate at the start of each cycle.
        progress: is called with the total number of steps made.
        seed: the seed of data order and draws; each cycle has another one.
        device: where the pair is fitted, as for ``fit_svi``; ``value`` is computed with the pair
            there.

    Returns:
        The cycles as one fit, and whether the tolerance was met.

    Raises:
        ValueError: as ``fit_svi``; if the tolerance is not positive.
        FloatingPointError: if the loss is not finite in the last cycle.

    References:
        Loshchilov, Hutter: SGDR: stochastic gradient descent with warm restarts (2017).
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, in nats per datum; got {tolerance}")
    lengths = cycle_lengths(steps)
    fits: list[FitResult] = []
    last, gained, met = -math.inf, math.nan, False
    for cycle, length in enumerate(lengths):
        done = sum(fit.steps for fit in fits)
        try:
            fit = fit_svi(
                model, guide, x, steps=length, batch_size=batch_size, lr=lr,
                optimizer=OPTIMIZER, scheduler=CosineAnnealingLR, seed=seed + cycle,
                progress=_offset_progress(progress, done), device=device,
            )  # fmt: skip
        except FloatingPointError:
            if cycle + 1 == len(lengths):
                raise
            lr *= LR_DECAY
            continue
        fits.append(fit)
        current = value()
        gained, last = (current - last if math.isfinite(last) else math.nan), current
        met = abs(gained) < tolerance
        if met:
            break
        if gained < -tolerance:
            lr *= LR_DECAY
    rule = f"a cycle twice as long as the one before gained less than {tolerance:g} nats per datum"
    convergence = Convergence(met, tolerance, gained, fits[-1].steps, rule)
    return _joined(fits, str(convergence)), convergence


def cycle_lengths(steps: int) -> list[int]:
    """The number of steps of each cycle, in the proportions 1 : 2 : 4; the last has the rest."""
    part = check_int("steps", steps) // (2**CYCLES - 1)
    if not part:
        return [steps]
    lengths = [part * 2**cycle for cycle in range(CYCLES)]
    return [*lengths[:-1], lengths[-1] + steps - sum(lengths)]


def _offset_progress(progress: ProgressCallback, offset: int) -> ProgressCallback:
    return lambda step, value: progress(offset + step, value)


def _joined(fits: list[FitResult], stopped: str) -> FitResult:
    elapsed, start = [], 0.0
    for fit in fits:
        elapsed.append(fit.elapsed + start)
        start += fit.seconds
    steps = sum(fit.steps for fit in fits)
    return replace(
        fits[-1],
        objective=torch.cat([fit.objective for fit in fits]),
        elapsed=torch.cat(elapsed),
        steps=steps,
        seconds=start,
        stopped=f"after {steps} steps: {stopped}",
    )
