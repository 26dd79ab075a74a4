"""Decides from measured times whether calls run eagerly, recorded or compiled.

A call is a step of an optimizer, or the evaluation of a function on one batch. *Eager* calls run
the programs by Pyro's handlers. *Recorded* ones run the tensor operations of an eager call, with
the same numbers. *Compiled* ones run code that was compiled from these operations.
"""

import math
import warnings
from collections.abc import Sequence

from ppl_vae.capture.compile_worker import measured_time
from ppl_vae.capture.graph import CaptureError, CompilationError
from ppl_vae.core.devices.mapped_constants import map_constants

UNTIMED_CALLS = 5
"""Eager calls at the start that are excluded from the measurement."""
MIN_TIMED_CALLS = 20
"""Eager calls to measure before the decision."""
COMPILING_PER_RECORDING = 30.0
"""The time that compiling takes relative to recording, which is measured: 15 to 30 on two cores
with an empty cache of the compiler, 2 with a full one."""
BACKGROUND_DELAY = 2.0
"""How many times longer it takes in the background, by a process of low priority. Both are used
until the time has been measured on this machine, see
:func:`ppl_vae.capture.compile_worker.measured_time`."""
BACKGROUND_MARGIN = 1.5
"""How many times longer than the compiler recorded work must last. While it compiles, steps take
up to an eighth longer; the rest then takes about a third less time. Both are equal at 1.4."""
COMPILED_SPEEDUP = 1.5
"""Assumed ratio of the times of recorded and compiled calls, a lower bound in most cases."""
RECORDING_CALLS = 150
"""Assumed cost of recording a call, in eager calls of at most ``SMALL_CALL``."""
SMALL_CALL = 0.01
"""Seconds above which arithmetic, and not the programs, is assumed to take the time of a call."""
RECORDED_SPEEDUP = 1.6
"""Assumed ratio of the times of eager and recorded calls, if these are small."""
CAPTURES = (True, False, "auto", "recorded")


def is_worth_compiling(
    seconds_left: float, recording_seconds: float, *, in_background: bool
) -> bool:
    """Decide whether compiling saves more time than it costs.

    Args:
        seconds_left: remaining seconds of recorded work that compiled code could do.
        recording_seconds: the time that recording took, by which that of compiling is estimated.
        in_background: whether another process compiles, which costs little here, but is useful
            only if it ends long before the work does. Otherwise the work waits.
    """
    if in_background:
        return seconds_left > BACKGROUND_MARGIN * background_seconds(recording_seconds)
    saved = seconds_left * (1 - 1 / COMPILED_SPEEDUP)
    return saved > COMPILING_PER_RECORDING * recording_seconds


def background_seconds(recording_seconds: float) -> float:
    """The time that another process needs to compile what was recorded in this time.

    It is estimated by the last one that was measured on this machine, if there is one.
    """
    measured = measured_time()
    if measured is None:
        measured = BACKGROUND_DELAY * COMPILING_PER_RECORDING
    return measured * recording_seconds


def is_worth_recording(num_calls_left: int, seconds_per_call: float) -> bool:
    """Decide whether recorded calls save more time than recording them costs.

    Args:
        num_calls_left: calls that can be recorded.
        seconds_per_call: the mean seconds of eager calls.
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
        map_constants()
        self.mode, self.called = check_capture(mode), called
        self._undecided, self._start = mode == "auto", 0
        self.reason = "eager: too few calls were made to measure them"
        if mode is False:
            self.reason = "eager: as requested"
        elif mode in (True, "recorded"):
            self.reason = f"{_NAMES[mode]}: as requested"

    def update(self, num_calls_left: int, elapsed: Sequence[float], fraction: float = 1.0) -> None:
        """Decide how the remaining calls run, once enough calls are measured.

        Args:
            num_calls_left: the number of remaining calls.
            elapsed: the seconds since the start at which each call ended.
            fraction: the part of the remaining calls that can be captured.
        """
        if not self._undecided or len(elapsed) < self._start + UNTIMED_CALLS + MIN_TIMED_CALLS:
            return
        if math.isnan(seconds := seconds_per_call(elapsed[self._start :])):
            return
        seconds_left = seconds * num_calls_left
        if self.mode == "recorded":
            self._undecided = False
            self.consider_compiling(seconds_left * fraction)
            return
        estimate = f"about {seconds_left:.1f} s of eager work were left"
        if is_worth_recording(int(num_calls_left * fraction), seconds):
            self._start = len(elapsed)
            self.enable("recorded", estimate)
        else:
            self.mode, self._undecided = False, False
            self.reason = f"eager: {estimate}, too little to pay for recording"

    def consider_compiling(self, seconds_left: float) -> None:
        """Decide whether calls are compiled.

        Args:
            seconds_left: the remaining seconds of recorded work that compiled code could do.
        """
        raise NotImplementedError

    def enable(self, mode: bool | str, reason: str) -> None:
        """Run recorded or compiled calls from now on.

        Args:
            mode: ``"recorded"``, or True for compiled calls.
            reason: why.
        """
        self.mode, self.reason = mode, f"{_NAMES[mode]}: {reason}"

    def disable(self, error: CaptureError) -> None:
        """Run eager calls from now on, or recorded ones if only the compiler failed; warn once."""
        self._undecided = False
        if isinstance(error, CompilationError):
            self.mode, done, verb = "recorded", "compiled", "runs as it was recorded"
        else:
            self.mode, done, verb = False, "captured", "runs eagerly"
        self.reason = f"{self.mode or 'eager'}: it could not be {done}: {error}"
        warnings.warn(f"{self.called} could not be {done}, so it {verb}: {error}", stacklevel=2)


_NAMES = {True: "compiled", "recorded": "recorded"}
