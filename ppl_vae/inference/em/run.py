"""The iterations of EM, with a certificate of the maximum.

Gains that shrink indicate a limit, except near a saddle point, where they shrink before they grow
again. Therefore the bound is compared, near convergence, with the bound at the best
parameters for the covariance of the data. If that is higher, EM restarts from these parameters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ppl_vae.core.fit_result import FitResult
from ppl_vae.inference.em.history import WITHIN_ROUNDING, EMHistory, iteration_limit
from ppl_vae.inference.em.state import NEGLIGIBLE, EMState

RESTARTED = "EM stalled short of the best parameters"
"""The beginning of the note on restarts."""
NOT_CONVERGED = "not converged"
"""The beginning of the note on a fit that did not end at a maximum."""
STALLED = "because an iteration gains less than rounding"
"""The reason to stop where the gap cannot be closed, for it lies in the rotation of W."""


@dataclass
class EMRun:
    """EM iterations from an initial state, with their history.

    Attributes:
        state: the current state.
        history: the objective so far.
        tol: the gain that may remain at the end, in nats per datum.
        max_iterations: the largest number of iterations.
        gap: how far the bound was below that at the best parameters for the covariance of the
            data when this was last computed, in nats per datum.
        restart_gains: the gain of each restart, in nats per datum.
        converged: whether the end is certified.
    """

    state: EMState
    history: EMHistory
    tol: float
    max_iterations: int
    gap: float = math.nan
    restart_gains: tuple[float, ...] = ()
    converged: bool = False
    _last_restart: int = 0
    _working_tol: float = math.inf

    def run(self) -> str:
        """Iterate to the end.

        Returns:
            The reason to stop.
        """
        self._working_tol, stopped = self.tol, ""
        while not stopped:
            decreased = self._iterate()
            tol = self._working_tol if self.state.can_extrapolate else 0.0
            rounding = min(self.state.rounding, NEGLIGIBLE)
            reason = self.history.stop_reason(
                tol, self.max_iterations, rounding, since=self._last_restart
            )
            if decreased and reason != iteration_limit(self.max_iterations):
                reason = WITHIN_ROUNDING
            stopped = self._certify(reason) if reason else ""
        return stopped

    def _iterate(self) -> bool:
        # Whether rounding would lower the bound, in which case the state is kept.
        before = self.state
        after_m_step, following = before.step()
        slack = min(max(before.rounding, following.rounding), NEGLIGIBLE)
        decreased = not bool(following.bound >= before.bound - slack)
        self.history.add(before.bound, before.log_likelihood)
        self.state = before if decreased else following
        bound = before.bound if decreased else after_m_step
        self.history.add(bound, self.state.log_likelihood)
        return decreased

    def _certify(self, reason: str) -> str:
        # The final reason to stop, given that of the stopping rule; empty to continue.
        state = self.state
        tolerance = 2 * max(self.tol, state.rounding)
        certificate = state.certify(tolerance)
        self.gap = certificate.gap
        if reason == iteration_limit(self.max_iterations):
            return reason
        if self.gap <= tolerance:
            self.converged = True
            if reason == WITHIN_ROUNDING:
                return reason
            return f"converged: under {max(self.tol, self.gap):.2g} nats per datum to gain"
        if self.history.iterations + 1 >= self.max_iterations:
            return iteration_limit(self.max_iterations)
        if certificate.restart_gain > tolerance:
            self._restart(certificate.state, certificate.restart_gain)
            return ""
        if reason == WITHIN_ROUNDING:
            return STALLED
        self._working_tol /= 4
        return ""

    def _restart(self, best: EMState, gain: float) -> None:
        # The history gets an iteration whose M-step leaves the bound unchanged.
        self.restart_gains += (gain,)
        self.history.add(self.state.bound, self.state.log_likelihood)
        self.history.add(self.state.bound, best.log_likelihood)
        self.state = best
        self._last_restart, self._working_tol = self.history.iterations, self.tol

    def notes(self) -> tuple[str, ...]:
        """Caveats on this run: restarts, a lack of convergence, and rounding errors."""
        notes: tuple[str, ...] = ()
        # Smaller gains are of the size of the tolerance and of rounding errors.
        notable = [gain for gain in self.restart_gains if gain > max(self.tol, 10 * NEGLIGIBLE)]
        if notable:
            times = "once" if len(notable) == 1 else f"{len(notable)} times"
            gains = ", ".join(f"{gain:.2g}" for gain in notable)
            notes = (
                f"{RESTARTED} for the covariance of the data, as at a saddle point, {times}, and "
                f"was restarted from these (a gain of {gains} nats per datum)",
            )
        if not self.converged:
            reason = f"the last iteration still gained {self.history.last_gain:.2g} nats per datum"
            if self.gap > 2 * max(self.tol, self.state.rounding):
                reason = (
                    f"the objective is at least {self.gap:.2g} nats per datum below its maximum"
                )
            notes += (f"{NOT_CONVERGED}: {reason}",)
        return notes + self.state.notes()


def run_em(
    start: Callable[[], EMState],
    algorithm: str,
    *,
    tol: float,
    max_iterations: int,
    notes: tuple[str, ...],
    start_time: float,
) -> tuple[EMState, FitResult]:
    """The final state of EM, and the result of the fit.

    Args:
        start: makes the initial state.
        algorithm: its name.
        tol: stop when the gain that remains is smaller, in nats per datum.
        max_iterations: the largest number of iterations.
        notes: caveats on the data.
        start_time: when the fit started, by ``time.perf_counter``.

    Raises:
        FloatingPointError: if the initial state has no finite likelihood.
    """
    state = start()
    if not bool(state.bound.isfinite() & state.log_likelihood.isfinite()):
        raise FloatingPointError(
            f"the log-likelihood of x is {float(state.log_likelihood)} where {algorithm} starts: "
            "squares leave the range of float64 there; start from PPCA.like(x), or rescale the "
            "columns that are largest or smallest"
        )
    run = EMRun(state, EMHistory(start_time), tol, max_iterations)
    stopped = run.run()
    notes = notes + run.state.noise.notes(run.state.parameters.variance) + run.notes()
    result = run.history.result(
        algorithm, stopped, notes, converged=run.converged, certificate=max(run.gap, 0.0)
    )
    return run.state, result


def best_of_starts(fits: list[tuple[EMState, FitResult]]) -> tuple[EMState, FitResult]:
    """The fit with the highest objective, with a note on how much lower the others ended."""
    objectives = [float(result.objective[-1]) for _, result in fits]
    best = max(range(len(fits)), key=objectives.__getitem__)
    state, result = fits[best]
    if len(fits) == 1:
        return state, result
    shortfalls = sorted(objectives[best] - value for value in objectives)
    num_lower = sum(shortfall > 10 * NEGLIGIBLE for shortfall in shortfalls)
    note = f"{len(fits)} starts end within {shortfalls[-1]:.1g} nats per datum of each other"
    if num_lower:
        note = (
            f"{num_lower} of {len(fits)} starts end at lower maxima, up to {shortfalls[-1]:.2g} "
            "nats per datum below this one"
        )
    seconds = sum(result.seconds for _, result in fits)
    return state, replace(result, notes=(*result.notes, note), seconds=seconds)
