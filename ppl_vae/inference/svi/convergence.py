"""Stochastic fits that go on until a tolerance is met: cosine cycles, each twice as long."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import FitResult, Result
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.inference.svi.progress import Report

CYCLES = 3
OPTIMIZER = partial(torch.optim.Adam, betas=(0.9, 0.95))
"""Adam that forgets gradients sooner than by default: PPCA's first ones are by far the largest,
and would keep the steps small for a thousand more."""
SLOWER = 10**-0.5
"""What a cycle that made the fit worse multiplies the next one's learning rate by."""


@dataclass(frozen=True)
class Convergence(Result):
    """Whether a fit went on until its tolerance was met.

    Attributes:
        met: whether it was.
        tolerance: in nats per datum; NaN if the rule is another one.
        gained: nats per datum, by the last ``steps`` steps; NaN where that is not known.
        steps: over which the gain is counted.
        rule: the rule, for a person.
    """

    met: bool
    tolerance: float
    gained: float
    steps: int
    rule: str

    def __str__(self) -> str:
        if self.met or math.isnan(self.gained):
            return self.rule
        return f"the last {self.steps} steps still gained {self.gained:.2g} nats per datum"


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
    progress: Report,
    seed: int,
) -> tuple[FitResult, Convergence]:
    """Fit a pair by SVI until a cycle of the learning rate gains less than a tolerance.

    In each of three cycles the learning rate falls from ``lr`` to zero along a cosine; each is
    twice as long as the one before. So the fit is compared where the steps' noise has died away,
    and what is compared is what twice the work gained. After a cycle that made the fit worse by
    more than the tolerance, or in which the loss turned infinite, the next one's learning rate is
    lower.

    Args:
        model, guide, x: as for :func:`~ppl_vae.fit_svi`; fitted in place.
        value: the objective of the pair as it stands, over all rows, in nats per datum, without
            noise of its own from call to call.
        tolerance: nats per datum.
        steps: in all, at most.
        batch_size: rows per step.
        lr: learning rate at the start of each cycle.
        progress: is told of the steps done in all.
        seed: of data order and draws; each cycle has its own.

    Returns:
        The fit as one, and whether the tolerance was met.

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
                progress=_later(progress, done),
            )  # fmt: skip
        except FloatingPointError:
            if cycle + 1 == len(lengths):
                raise
            lr *= SLOWER
            continue
        fits.append(fit)
        now = value()
        gained, last = (now - last if math.isfinite(last) else math.nan), now
        met = abs(gained) < tolerance
        if met:
            break
        if gained < -tolerance:
            lr *= SLOWER
    rule = f"a cycle twice as long as the one before gained less than {tolerance:g} nats per datum"
    convergence = Convergence(met, tolerance, gained, fits[-1].steps, rule)
    return _joined(fits, str(convergence)), convergence


def cycle_lengths(steps: int) -> list[int]:
    """Steps of each cycle: one, two and four parts, the rest with the last."""
    part = check_int("steps", steps) // (2**CYCLES - 1)
    if not part:
        return [steps]
    lengths = [part * 2**cycle for cycle in range(CYCLES)]
    return [*lengths[:-1], lengths[-1] + steps - sum(lengths)]


def _later(progress: Report, done: int) -> Report:
    def told(step: int, value: float) -> None:
        progress(done + step, value)

    return told


def _joined(fits: list[FitResult], stopped: str) -> FitResult:
    elapsed, begun = [], 0.0
    for fit in fits:
        elapsed.append(fit.elapsed + begun)
        begun += fit.seconds
    steps = sum(fit.steps for fit in fits)
    return replace(
        fits[-1],
        objective=torch.cat([fit.objective for fit in fits]),
        elapsed=torch.cat(elapsed),
        steps=steps,
        seconds=begun,
        stopped=f"after {steps} steps: {stopped}",
    )
