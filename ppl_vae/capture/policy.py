"""Decides from measured times whether calls run eagerly, recorded or compiled.

A call is a step of an optimizer, or the evaluation of a function on one batch. *Eager* calls run
the programs by Pyro's handlers. *Recorded* ones run the tensor operations of an eager call, with
the same numbers. *Compiled* ones run code that was compiled from these operations.
"""

import math
import warnings
from collections.abc import Sequence

from ppl_vae.capture.graph import CaptureError, CompilationError

UNTIMED_CALLS = 5
"""Eager calls at the start that are excluded from the measurement."""
MIN_TIMED_CALLS = 20
"""Eager calls to measure before the decision."""
COMPILE_SECONDS = 50.0
"""Assumed seconds for capturing and compiling, those of a cold start on two cores."""
ASSUMED_SPEEDUP = 2.0
"""Assumed ratio of the times of eager and compiled calls, a lower bound in most cases."""
RECORDING_CALLS = 150
"""Assumed cost of recording a call, in eager calls of at most ``SMALL_CALL``."""
SMALL_CALL = 0.01
"""Seconds above which arithmetic, and not the programs, is assumed to take the time of a call."""
RECORDED_SPEEDUP = 1.6
"""Assumed ratio of the times of eager and recorded calls, if these are small."""
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


def is_worth_recording(num_calls_left: int, seconds_per_call: float) -> bool:
    """Decide whether recorded calls save more time than recording them costs.

    Args:
        num_calls_left: calls that can be recorded.
        seconds_per_call: of eager calls.
    """
    small = min(seconds_per_call, SMALL_CALL)
    saved = num_calls_left * small * (1 - 1 / RECORDED_SPEEDUP)
    return saved > RECORDING_CALLS * small + 2 * seconds_per_call


def seconds_per_call(elapsed: Sequence[float]) -> float:
    """The mean time of a call; NaN if there are too few.

    Args:
        elapsed: the seconds since the start at which each call ended. On an accelerator several
            are read together, and have equal times.
    """
    if len(elapsed) <= UNTIMED_CALLS:
        return math.nan
    start = elapsed[UNTIMED_CALLS - 1]
    num_timed = sum(time > start for time in elapsed)
    return (elapsed[-1] - start) / num_timed if num_timed >= MIN_TIMED_CALLS else math.nan


def check_capture(capture: bool | str) -> bool | str:
    """Check the argument ``capture`` and return it.

    Raises:
        ValueError: if it is none of True, False, "auto", "recorded".
    """
    if capture not in CAPTURES:
        raise ValueError(f"capture must be one of {CAPTURES}; got {capture!r}")
    return capture


class CapturePolicy:
    """Decides how calls run, and keeps the reason.

    Args:
        mode: False, ``"recorded"``, True for compiled calls, or ``"auto"``, which decides by
            measured times.
        called: what is called, for messages: the evaluation, the training step.

    Attributes:
        mode: how calls run: False, ``"recorded"`` or True; ``"auto"`` as long as eager calls are
            measured.
        reason: how calls run and why, as text.
    """

    def __init__(self, mode: bool | str, called: str = "the evaluation") -> None:
        self.mode, self.called = check_capture(mode), called
        self.reason = "eager: too few calls were made to measure them"
        if mode is False:
            self.reason = "eager: as requested"
        elif mode in (True, "recorded"):
            self.reason = f"{_NAMES[mode]}: as requested"

    def decide(self, num_calls_left: int, seconds: float, fraction: float = 1.0) -> None:
        """Decide how the remaining calls run.

        Args:
            num_calls_left: the number of remaining calls.
            seconds: of an eager call.
            fraction: the part of the remaining calls that can be captured.
        """
        worth, comparison = is_worth_compiling(seconds * num_calls_left, fraction)
        if worth:
            self.enable(True, comparison)
        elif is_worth_recording(int(num_calls_left * fraction), seconds):
            self.enable("recorded", comparison)
        else:
            self.mode, self.reason = False, f"eager: {comparison}"

    def enable(self, mode: bool | str, reason: str) -> None:
        """Run recorded or compiled calls from now on.

        Args:
            mode: ``"recorded"``, or True for compiled calls.
            reason: why.
        """
        self.mode, self.reason = mode, f"{_NAMES[mode]}: {reason}"

    def disable(self, error: CaptureError) -> None:
        """Run eager calls from now on, or recorded ones if only the compiler failed; warn once."""
        if isinstance(error, CompilationError):
            self.mode, done, verb = "recorded", "compiled", "runs as it was recorded"
        else:
            self.mode, done, verb = False, "captured", "runs eagerly"
        self.reason = f"{self.mode or 'eager'}: it could not be {done}: {error}"
        warnings.warn(f"{self.called} could not be {done}, so it {verb}: {error}", stacklevel=2)


_NAMES = {True: "captured", "recorded": "recorded"}
