"""Whether a fit captures its steps, and how many a call: decided from what is measured."""

import math
import warnings
from collections.abc import Callable, Sequence

from ppl_vae.inference.capture import Captured
from ppl_vae.inference.recording import NotRecordable
from ppl_vae.inference.training import Schedule

LARGEST_UNROLL = 8
"""Steps a call at most: more save little and compile longer."""
FIRST_STEPS = 5
"""Eager steps that are not timed."""
TIMED_STEPS = 20
"""Eager steps that are, at least."""
COMPILE_SECONDS = 50.0
"""What recording and compiling takes, as far as can be known before: a cold start on two cores."""
SPEEDUP = 2.0
"""How much faster captured steps are at least taken to be."""


def pays(seconds_left: float) -> bool:
    """Whether so many seconds of eager work are worth compiling for."""
    return seconds_left * (1 - 1 / SPEEDUP) > COMPILE_SECONDS


def check_capture(capture: bool | str) -> bool | str:
    """The argument ``capture``.

    Raises:
        ValueError: if it is none of True, False, "auto".
    """
    if capture not in (True, False, "auto"):
        raise ValueError(f"capture must be one of True, False, 'auto'; got {capture!r}")
    return capture


class Choice:
    """Which path a fit takes, and why.

    Args:
        wanted: ``"auto"``, True or False.
        make: makes the fast path for so many steps a call.
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
        """Steps a call."""
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
            if pays(left):
                self.take(f"{left:.0f} s of eager steps were left")
            else:
                self.wanted = False
                self.why = (
                    f"eager: {left:.1f} s of steps were left, too few to earn back "
                    f"{COMPILE_SECONDS:.0f} s of compiling"
                )

    def take(self, reason: str) -> None:
        """Take the fast path."""
        self.wanted = True
        try:
            self.captured = self.make(best_unroll(self.schedule))
            self.why = f"captured, {self.captured.unroll} steps a call: {reason}"
        except NotRecordable as error:
            self.refuse(error)

    def refuse(self, error: NotRecordable) -> None:
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
    """How many steps a call cost least: so many come together between odd batches and looks.

    In units of a captured step, its call costs about a half more and an eager step three.
    """
    length = schedule.together
    if schedule.num_data % schedule.batch_size:
        length = schedule.num_data // schedule.batch_size
    length = min(length, schedule.num_steps)

    def cost(unroll: int) -> float:
        calls, rest = divmod(length, unroll)
        return calls * (unroll + 0.5) + 3 * rest

    return min(range(1, LARGEST_UNROLL + 1), key=cost)
