"""Decides from measured times whether steps are recorded or compiled, and how many per call."""

import math
import warnings
from collections.abc import Callable, Sequence

from ppl_vae.capture.graph import CaptureError
from ppl_vae.inference.svi.captured_step import CapturedSteps
from ppl_vae.inference.svi.recorded_gradient import RecordedGradient
from ppl_vae.inference.svi.schedule import Schedule

MAX_UNROLL = 8
"""The largest number of steps per call: more steps save little and take longer to compile."""
UNTIMED_STEPS = 5
"""Eager steps at the start that are excluded from the measurement."""
MIN_TIMED_STEPS = 20
"""Eager steps to measure before the decision."""
COMPILE_SECONDS = 50.0
"""Assumed seconds for capturing and compiling, those of a cold start on two cores."""
ASSUMED_SPEEDUP = 2.0
"""Assumed ratio of the times of eager and captured steps, a lower bound in most cases."""
RECORDING_STEPS = 150
"""Assumed cost of recording a step, in eager steps of at most ``SMALL_STEP``."""
SMALL_STEP = 0.01
"""Seconds above which arithmetic, and not the programs, is assumed to take the time of a step."""
RECORDED_SPEEDUP = 1.6
"""Assumed ratio of the times of eager and recorded steps, if these are small."""
CAPTURES = (True, False, "auto", "recorded")


def is_worth_compiling(seconds_left: float, fraction: float = 1.0) -> tuple[bool, str]:
    """Decide whether compiling saves more time than it costs.

    Args:
        seconds_left: remaining seconds of eager work.
        fraction: the part of that work that compiled code could do.

    Returns:
        The decision, and a text that states what was compared.
    """
    saved = seconds_left * fraction * (1 - 1 / ASSUMED_SPEEDUP)
    worth = saved > COMPILE_SECONDS
    return worth, (
        f"about {seconds_left:.1f} s of eager work were left, of which compiled code, assumed to "
        f"be {ASSUMED_SPEEDUP:g} times as fast, would save {saved:.1f} s: "
        f"{'' if worth else 'no '}more than the {COMPILE_SECONDS:.0f} s that compiling is assumed "
        "to cost"
    )


def is_worth_recording(num_steps_left: int, seconds_per_step: float) -> bool:
    """Decide whether recorded steps save more time than recording them costs.

    Args:
        num_steps_left: steps that can be recorded.
        seconds_per_step: of eager steps.
    """
    small = min(seconds_per_step, SMALL_STEP)
    saved = num_steps_left * small * (1 - 1 / RECORDED_SPEEDUP)
    return saved > RECORDING_STEPS * small + 2 * seconds_per_step


def captured_fraction(schedule: Schedule) -> float:
    """The fraction of steps that run captured if steps are captured.

    Batches of another size run eagerly, and so do steps that do not fill a call.
    """
    all_full = schedule.full_batches == schedule.chunk
    period = schedule.chunk if all_full else schedule.steps_per_epoch
    unroll = best_unroll(schedule)
    return schedule.full_batches // unroll * unroll / period


def check_capture(capture: bool | str) -> bool | str:
    """Check the argument ``capture`` and return it.

    Raises:
        ValueError: if it is none of True, False, "auto", "recorded".
    """
    if capture not in CAPTURES:
        raise ValueError(f"capture must be one of {CAPTURES}; got {capture!r}")
    return capture


class CapturePolicy:
    """Decides whether steps run eagerly, recorded or captured, and keeps the reason.

    Args:
        mode: False, ``"recorded"``, True, or ``"auto"``, which decides by measured times.
        make_recorded: creates the recorded gradient.
        make_captured: creates the captured steps for a number of steps per call.
        schedule: the schedule of the fit.
        shared: whether several processes share each batch, and exchange gradients: then captured
            steps are compiled gradients.

    Attributes:
        recorded: the recorded gradient, once it is enabled.
        captured: the captured steps, once they are enabled.
        reason: how steps run and why, as text.
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
        self.mode, self.schedule, self._shared = check_capture(mode), schedule, shared
        self._make_recorded, self._make_captured = make_recorded, make_captured
        self.recorded: RecordedGradient | None = None
        self.captured: CapturedSteps | None = None
        self.reason = "eager: the fit ended before its steps were timed"
        if mode is False:
            self.reason = "eager: as requested"

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
        elif self.mode == "auto":
            seconds = _seconds_per_step(elapsed)
            if not math.isnan(seconds):
                self._decide(self.schedule.num_steps - num_steps, seconds)

    def _decide(self, num_steps_left: int, seconds: float) -> None:
        fraction = captured_fraction(self.schedule)
        worth, comparison = is_worth_compiling(seconds * num_steps_left, fraction)
        if worth:
            self.enable(True, comparison)
        elif is_worth_recording(int(num_steps_left * fraction), seconds):
            self.enable("recorded", comparison)
        else:
            self.mode, self.reason = False, f"eager: {comparison}"

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
        """Run eager steps from now on, with one warning."""
        self.captured, self.recorded, self.mode = None, None, False
        self.reason = f"eager: the step could not be captured: {error}"
        warnings.warn(
            f"the training step could not be captured, so it runs eagerly: {error}", stacklevel=2
        )


def _seconds_per_step(elapsed: Sequence[float]) -> float:
    """The mean time of a step; NaN if there are too few.

    On a GPU several steps are read together and have equal times.
    """
    if len(elapsed) <= UNTIMED_STEPS:
        return math.nan
    start = elapsed[UNTIMED_STEPS - 1]
    num_timed = sum(time > start for time in elapsed)
    return (elapsed[-1] - start) / num_timed if num_timed >= MIN_TIMED_STEPS else math.nan


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
