"""Whether a fit captures its steps, and how many a call: decided from what is measured."""

import math
import warnings
from collections.abc import Callable, Sequence

from ppl_vae.capture.graph import CaptureError
from ppl_vae.inference.svi.captured_step import Captured
from ppl_vae.inference.svi.schedule import Schedule

LARGEST_UNROLL = 8
"""Steps per call at most: more save little and compile longer."""
FIRST_STEPS = 5
"""Eager steps that are not timed."""
TIMED_STEPS = 20
"""Eager steps that are, at least."""
COMPILE_SECONDS = 50.0
"""What recording and compiling takes, as far as can be known before: a cold start on two cores."""
SPEEDUP = 2.0
"""How much faster captured steps are at least taken to be."""


def weighed(seconds_left: float, share: float = 1.0) -> tuple[bool, str]:
    """Whether compiling saves more time than it takes, and what was compared, in words.

    Args:
        seconds_left: of eager work, if nothing is compiled.
        share: of that work that compiled code could do.
    """
    saved = seconds_left * share * (1 - 1 / SPEEDUP)
    pays = saved > COMPILE_SECONDS
    return pays, (
        f"about {seconds_left:.1f} s of eager work were left, of which compiled code, taken to be "
        f"{SPEEDUP:g} times as fast, would save {saved:.1f} s: {'' if pays else 'no '}more than "
        f"the {COMPILE_SECONDS:.0f} s that compiling is taken to cost"
    )


def captured_share(schedule: Schedule) -> float:
    """The share of steps that run captured, if steps do: batches of another size do not, nor do
    steps that fill no call.
    """
    same_size = schedule.in_a_row == schedule.together
    period = schedule.together if same_size else schedule.steps_per_epoch
    unroll = best_unroll(schedule)
    return schedule.in_a_row // unroll * unroll / period


def check_capture(capture: bool | str) -> bool | str:
    """The argument ``capture``.

    Raises:
        ValueError: if it is none of True, False, "auto".
    """
    if capture not in (True, False, "auto"):
        raise ValueError(f"capture must be one of True, False, 'auto'; got {capture!r}")
    return capture


class CapturePolicy:
    """Which path a fit takes, and why.

    Args:
        wanted: ``"auto"``, True or False.
        make: makes the fast path for so many steps per call.
        schedule: of the fit.

    Attributes:
        captured: the fast path, once it is taken.
        why: the path and the reason, for a person.
    """

    def __init__(
        self, wanted: bool | str, make: Callable[[int], Captured], schedule: Schedule
    ) -> None:
        self.wanted, self.make, self.schedule = check_capture(wanted), make, schedule
        self.captured: Captured | None = None
        self.why = "eager: the fit was over before its steps were timed"
        if wanted is False:
            self.why = "eager: as asked"

    @property
    def unroll(self) -> int:
        """Steps per call."""
        return 1 if self.captured is None else self.captured.unroll

    def look(self, done: int, elapsed: Sequence[float]) -> None:
        """Decide, once enough is known: after ``done`` steps at these times."""
        if self.wanted is True and self.captured is None and done >= 1:
            self.take("as asked")
        elif self.wanted == "auto":
            eager = _seconds_a_step(elapsed)
            left = eager * (self.schedule.num_steps - done)
            if math.isnan(left):
                return
            pays, compared = weighed(left, captured_share(self.schedule))
            if pays:
                self.take(compared)
            else:
                self.wanted, self.why = False, f"eager: {compared}"

    def resume(self, wanted: bool | str, why: str) -> None:
        """Go on along a checkpoint's path, unless the other one is asked for."""
        if self.wanted is True or (wanted is True and self.wanted == "auto"):
            self.take("as before the checkpoint" if wanted is True else "as asked")
        elif self.wanted == "auto" and wanted is False:
            self.wanted, before = False, "eager: as before the checkpoint: "
            self.why = before + why.removeprefix(before).removeprefix("eager: ")

    def take(self, reason: str) -> None:
        """Take the fast path."""
        self.wanted = True
        try:
            self.captured = self.make(best_unroll(self.schedule))
            self.why = f"captured, {self.captured.unroll} steps per call: {reason}"
        except CaptureError as error:
            self.refuse(error)

    def refuse(self, error: CaptureError) -> None:
        """Go on eagerly, and say why, once."""
        self.captured, self.wanted = None, False
        self.why = f"eager: the step could not be captured: {error}"
        warnings.warn(
            f"the training step could not be captured, so it runs eagerly: {error}", stacklevel=2
        )


def _seconds_a_step(elapsed: Sequence[float]) -> float:
    """From the times at which steps were read, several together on a GPU; NaN if too few were."""
    if len(elapsed) <= FIRST_STEPS:
        return math.nan
    start = elapsed[FIRST_STEPS - 1]
    timed = sum(time > start for time in elapsed)
    return (elapsed[-1] - start) / timed if timed >= TIMED_STEPS else math.nan


def best_unroll(schedule: Schedule) -> int:
    """How many steps per call cost least: so many come together between odd batches and looks.

    In units of a captured step, its call costs about a half more and an eager step three.
    """
    length = min(schedule.in_a_row, schedule.num_steps)

    def cost(unroll: int) -> float:
        calls, rest = divmod(length, unroll)
        return calls * (unroll + 0.5) + 3 * rest

    return min(range(1, LARGEST_UNROLL + 1), key=cost)
