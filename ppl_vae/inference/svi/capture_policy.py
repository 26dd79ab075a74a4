"""Decides whether training steps run eagerly, recorded or captured, and how many per call."""

from collections.abc import Callable, Sequence

from ppl_vae.capture.graph import CaptureError
from ppl_vae.capture.policy import CapturePolicy, seconds_per_call
from ppl_vae.inference.svi.captured_step import CapturedSteps
from ppl_vae.inference.svi.recorded_gradient import RecordedGradient
from ppl_vae.inference.svi.schedule import Schedule

MAX_UNROLL = 8
"""The largest number of steps per call: more steps save little and take longer to compile."""


def captured_fraction(schedule: Schedule) -> float:
    """The fraction of steps that run captured if steps are captured.

    Batches of another size run eagerly, and so do steps that do not fill a call.
    """
    all_full = schedule.full_batches == schedule.chunk
    period = schedule.chunk if all_full else schedule.steps_per_epoch
    unroll = best_unroll(schedule)
    return schedule.full_batches // unroll * unroll / period


class StepPolicy(CapturePolicy):
    """Decides how steps run, and makes what runs them.

    Args:
        mode: as for :class:`ppl_vae.capture.policy.CapturePolicy`.
        make_recorded: creates the recorded gradient.
        make_captured: creates the captured steps for a number of steps per call.
        schedule: the schedule of the fit.
        shared: whether several processes share each batch, and exchange gradients: then captured
            steps are compiled gradients.

    Attributes:
        recorded: the recorded gradient, once it is enabled.
        captured: the captured steps, once they are enabled.
    """

    def __init__(
        self,
        mode: bool | str,
        make_recorded: Callable[..., RecordedGradient],
        make_captured: Callable[[int], CapturedSteps],
        schedule: Schedule,
        *,
        shared: bool = False,
    ) -> None:
        super().__init__(mode, "the training step")
        self.schedule, self._shared = schedule, shared
        self._make_recorded, self._make_captured = make_recorded, make_captured
        self.recorded: RecordedGradient | None = None
        self.captured: CapturedSteps | None = None
        if mode is not False:
            self.reason = "eager: the fit ended before its steps were timed"

    @property
    def unroll(self) -> int:
        """Steps per call."""
        return 1 if self.captured is None else self.captured.unroll

    def update(self, num_steps: int, elapsed: Sequence[float]) -> None:
        """Decide once enough steps are measured.

        Args:
            num_steps: steps made so far.
            elapsed: seconds since the start at which each of them was read.
        """
        if self.recorded is not None or self.captured is not None or num_steps < 1:
            return
        if self.mode in (True, "recorded"):
            self.enable(self.mode, "as requested")
        elif self.mode == "auto" and (seconds := seconds_per_call(elapsed)) > 0:  # or NaN
            left = self.schedule.num_steps - num_steps
            self.decide(left, seconds, captured_fraction(self.schedule))

    def resume(self, mode: bool | str, reason: str) -> None:
        """Continue with a checkpoint's decision, unless another one is requested.

        Args:
            mode, reason: those of the policy when the checkpoint was written.
        """
        if self.mode in (True, "recorded"):
            self.enable(self.mode, "as requested")
        elif self.mode == "auto" and mode in (True, "recorded"):
            self.enable(mode, "as before the checkpoint")
        elif self.mode == "auto" and mode is False:
            self.mode, prefix = False, "eager: as before the checkpoint: "
            self.reason = prefix + reason.removeprefix(prefix).removeprefix("eager: ")

    def enable(self, mode: bool | str, reason: str) -> None:
        """Run recorded or captured steps from now on.

        Args:
            mode: ``"recorded"``, or True for captured steps.
            reason: why.
        """
        self.mode = mode
        try:
            if mode == "recorded":
                self.recorded = self._make_recorded()
                self.reason = f"recorded: {reason}"
            elif self._shared:
                self.recorded = self._make_recorded(compiled=True)
                self.reason = f"captured, the gradient of each step: {reason}"
            else:
                self.captured = self._make_captured(best_unroll(self.schedule))
                self.reason = f"captured, {self.captured.unroll} steps per call: {reason}"
        except CaptureError as error:
            self.disable(error)

    def disable(self, error: CaptureError) -> None:
        """Run eager or recorded steps from now on, with one warning."""
        self.captured, self.recorded = None, None
        super().disable(error)
        if self.mode == "recorded":
            self.recorded = self._make_recorded()


def best_unroll(schedule: Schedule) -> int:
    """The number of steps per call with the least total time.

    The cost of a call is that of its steps plus about half a captured step, and an eager step,
    which is needed for those that do not fill a call, costs three captured ones.
    """
    length = min(schedule.full_batches, schedule.num_steps)

    def cost(unroll: int) -> float:
        calls, rest = divmod(length, unroll)
        return calls * (unroll + 0.5) + 3 * rest

    return min(range(1, MAX_UNROLL + 1), key=cost)
