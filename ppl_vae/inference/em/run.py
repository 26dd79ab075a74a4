"""M- and E-steps in turn, to an end that is certified.

Gains that shrink say where an ascent is heading, but not near a saddle point: there they shrink
too, before they grow again. So where little seems left to gain, the bound is compared with that at
the best parameters for the covariance of the data. If that is higher, the ascent goes on from
these parameters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ppl_vae.core.results import FitResult
from ppl_vae.inference.em.history import WITHIN_ROUNDING, EMHistory, after
from ppl_vae.inference.em.state import FINE, EMState

RESTARTED = "EM stood still short of the best parameters"
"""How the note on restarts begins."""
NOT_CONVERGED = "not converged"
"""How the note on a fit that did not end at a maximum begins."""
STOOD_STILL = "because an iteration gains less than rounding"


@dataclass
class EMRun:
    """An ascent: where it stands, and what it has seen.

    Attributes:
        position: where it stands.
        trace: of the objective.
        tol: what may be left to gain at its end, in nats per datum.
        max_iterations: at most so many.
        left: by how much the bound was below that at the best parameters for the covariance of
            the data when this was last computed, in nats per datum.
        gained: by each restart, in nats per datum.
    """

    state: EMState
    history: EMHistory
    tol: float
    max_iterations: int
    left: float = math.nan
    gained: tuple[float, ...] = ()
    converged: bool = False
    _since: int = 0
    _tol: float = math.inf

    def run(self) -> str:
        """Iterate to the end; why it is one."""
        self._tol, stopped = self.tol, ""
        while not stopped:
            fell = self._advance()
            rest = self._tol if self.state.final else 0.0
            limits = self.max_iterations, min(self.state.rounding, FINE)
            reason = self.history.why_stop(rest, *limits, since=self._since)
            if fell and reason != after(self.max_iterations):
                reason = WITHIN_ROUNDING
            stopped = self._checked(reason) if reason else ""
        return stopped

    def _advance(self) -> bool:
        # Whether rounding would lower the bound, in which case the position stays as it is.
        before = self.state
        after_m, following = before.step()
        slack = min(max(before.rounding, following.rounding), FINE)
        fell = not bool(following.bound >= before.bound - slack)
        self.history.add(before.bound, before.log_likelihood)
        self.state = before if fell else following
        self.history.add(before.bound if fell else after_m, self.state.log_likelihood)
        return fell

    def _checked(self, reason: str) -> str:
        # Why to stop, given why the iterations may be over; or an empty string.
        state = self.state
        allowed = 2 * max(self.tol, state.rounding)
        self.left, gain, other = state.certified(allowed)
        if reason == after(self.max_iterations):
            return reason
        if self.left <= allowed:
            self.converged = True
            if reason == WITHIN_ROUNDING:
                return reason
            return f"converged: under {max(self.tol, self.left):.2g} nats per datum to gain"
        if self.history.iterations + 1 >= self.max_iterations:
            return after(self.max_iterations)
        if gain > allowed:
            self._restart(other, gain)
            return ""
        if reason == WITHIN_ROUNDING:
            return STOOD_STILL
        self._tol /= 4
        return ""

    def _restart(self, other: EMState, gain: float) -> None:
        # Entered as an iteration whose M-step leaves the bound as it is.
        self.gained += (gain,)
        self.history.add(self.state.bound, self.state.log_likelihood)
        self.history.add(self.state.bound, other.log_likelihood)
        self.state = other
        self._since, self._tol = self.history.iterations, self.tol

    def notes(self) -> tuple[str, ...]:
        """What a person should know of this ascent."""
        notes: tuple[str, ...] = ()
        if self.gained:
            times = "once" if len(self.gained) == 1 else f"{len(self.gained)} times"
            gained = ", ".join(f"{gain:.2g}" for gain in self.gained)
            notes = (
                f"{RESTARTED} for the covariance of the data, as at a saddle point, {times}, and "
                f"went on from these (they gained {gained} nats per datum)",
            )
        if not self.converged:
            gain = (
                self.history.bounds[-1] - self.history.bounds[max(-3, -len(self.history.bounds))]
            )
            why = f"the last iteration still gained {gain:.2g} nats per datum"
            if self.left > 2 * max(self.tol, self.state.rounding):
                why = f"the objective is at least {self.left:.2g} nats per datum below its maximum"
            notes += (f"{NOT_CONVERGED}: {why}",)
        return notes + self.state.notes()


def run_em(
    start: Callable[[], EMState],
    name: str,
    *,
    tol: float,
    max_iterations: int,
    notes: tuple[str, ...],
    began: float,
) -> tuple[EMState, FitResult]:
    """Where an ascent ends, and how it went.

    Args:
        start: makes the first position.
        name: of the algorithm.
        tol: stop when less is to be gained, in nats per datum.
        max_iterations: stop at the latest after so many.
        notes: on the data.
        began: when, by ``time.perf_counter``.

    Raises:
        FloatingPointError: if the first position has no finite likelihood.
    """
    state = start()
    if not bool(state.bound.isfinite() & state.log_likelihood.isfinite()):
        raise FloatingPointError(
            f"the log-likelihood of x is {float(state.log_likelihood)} where {name} starts: "
            "squares leave the range of float64 there; start from PPCA.like(x), or rescale the "
            "columns that are largest or smallest"
        )
    ascent = EMRun(state, EMHistory(began), tol, max_iterations)
    stopped = ascent.run()
    notes = notes + ascent.state.noise.notes(ascent.state.variance) + ascent.notes()
    found = ascent.history.result(
        name, stopped, notes, converged=ascent.converged, certificate=max(ascent.left, 0.0)
    )
    return ascent.state, found


def best_of(ends: list[tuple[EMState, FitResult]]) -> tuple[EMState, FitResult]:
    """The end with the highest objective, with a note on how far below it others ended."""
    objectives = [float(found.objective[-1]) for _, found in ends]
    top = max(range(len(ends)), key=objectives.__getitem__)
    state, found = ends[top]
    if len(ends) == 1:
        return state, found
    short = sorted(objectives[top] - value for value in objectives)
    lower = sum(gap > 10 * FINE for gap in short)
    note = f"{len(ends)} starts end within {short[-1]:.1g} nats per datum of each other"
    if lower:
        note = (
            f"{lower} of {len(ends)} starts end at lower maxima, up to {short[-1]:.2g} nats per "
            "datum below this one"
        )
    seconds = sum(found.seconds for _, found in ends)
    return state, replace(found, notes=(*found.notes, note), seconds=seconds)
