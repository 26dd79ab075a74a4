"""Decides whether training steps run eagerly, recorded or compiled, and how many per call."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ppl_vae.capture.graph import CaptureError
from ppl_vae.capture.policy import CapturePolicy, is_worth_compiling
from ppl_vae.core.text import counted
from ppl_vae.inference.svi.batches.schedule import Schedule
from ppl_vae.inference.svi.steps.captured_step import CapturedSteps
from ppl_vae.inference.svi.steps.recorded_gradient import RecordedGradient

MAX_UNROLL = 8
"""The largest number of steps per call: more steps save little and take longer to compile."""


def compiled_fraction(schedule: Schedule) -> float:
    """The fraction of steps that run compiled if steps are.

    Batches of another size run eagerly, and so do steps that do not fill a call.
    """
    all_full = schedule.full_batches == schedule.chunk
    period = schedule.chunk if all_full else schedule.steps_per_epoch
    unroll = best_unroll(schedule)
    return schedule.full_batches // unroll * unroll / period


class StepPolicy(CapturePolicy):
    """Decides how steps run, and makes what runs them.

    A fit with ``"auto"`` begins with eager steps, goes on with recorded ones if they pay, and
    while these run, another process compiles one step per call and then several, each of which
    takes over when it is ready.

    Args:
        mode: as for :class:`ppl_vae.capture.policy.CapturePolicy`.
        make_recorded: creates the recorded gradient.
        make_compiled: creates the compiled steps for a number of steps per call.
        schedule: the schedule of the fit.
        distributed: whether several processes share each batch, and exchange gradients: then
            compiled steps are compiled gradients.
        in_background: whether another process can compile the steps. Otherwise the fit waits.

    Attributes:
        recorded: the recorded gradient, once it is enabled.
        compiled: the compiled steps, once they are enabled.
        num_run: the number of steps that ran recorded or compiled.
        pending: the steps that are being compiled, or None.
    """

    def __init__(
        self,
        mode: bool | str,
        make_recorded: Callable[..., RecordedGradient],
        make_compiled: Callable[..., CapturedSteps],
        schedule: Schedule,
        *,
        distributed: bool = False,
        in_background: bool = False,
    ) -> None:
        super().__init__(mode, "the training step")
        self.schedule = schedule
        self._distributed, self._in_background = distributed, in_background
        self._make_recorded, self._make_compiled = make_recorded, make_compiled
        self.recorded: RecordedGradient | None = None
        self.compiled: CapturedSteps | None = None
        self.num_run = 0
        self.pending: CapturedSteps | None = None
        self._next_batch: tuple[Tensor | None, int] = None, 0
        self._compiled_in_background = False
        if mode is not False:
            self.reason = "eager: the fit ended before its steps were timed"

    @property
    def unroll(self) -> int:
        """Steps per call."""
        return 1 if self.compiled is None else self.compiled.unroll

    @property
    def content(self) -> list[Any]:
        """What a checkpoint holds of the policy."""
        return [self.mode, self.reason, self.unroll, self._compiled_in_background]

    def observe(self, num_steps: int, elapsed: Sequence[float], rows: Tensor | None) -> None:
        """Decide how the following steps run.

        Args:
            num_steps: steps made so far.
            elapsed: seconds since the start at which each of them was read.
            rows: the rows of a batch of full size.
        """
        self._next_batch = rows, num_steps
        if self.pending is not None:
            if self.pending.run.is_ready:
                self._take_over(self.pending)
        elif self.recorded is None and self.compiled is None and self.mode in (True, "recorded"):
            self.enable(self.mode, "as requested")
        else:
            left = self.schedule.num_steps - num_steps
            self.update(left, elapsed, compiled_fraction(self.schedule))

    @property
    def execution(self) -> str:
        """How the steps ran, and why."""
        if self.num_run or self.mode not in (True, "recorded"):
            return self.reason
        steps = counted(self.unroll, "full-size step")
        return f"eager: after the first step no call of {steps} was left ({self.reason})"

    def consider_compiling(self, seconds_left: float) -> None:
        """Begin to compile if that is worth its time; see the base class."""
        self._seconds_left, self._decided_at = seconds_left, time.perf_counter()
        if self.recorded is None:
            return
        recording = self.recorded.run.recording_seconds
        if not is_worth_compiling(seconds_left, recording, in_background=self._in_background):
            return
        if self._in_background:
            self._compile_in_background(1)
        else:
            self.enable(True, f"about {seconds_left:.1f} s of recorded work were left")

    def _compile_in_background(self, unroll: int) -> None:
        try:
            pending = self._make_compiled(unroll, compiled="background")
            pending.start(*self._next_batch)
        except CaptureError as error:
            self.reason += f"; it could not be compiled: {error}"
            return
        self.pending = pending

    def _take_over(self, pending: CapturedSteps) -> None:
        self.pending = None
        pending.run.finish()
        if pending.run.failure is not None:
            self.reason += f"; {pending.run.failure}"
            return
        self.compiled, self.mode, self._compiled_in_background = pending, True, True
        compilation, (_, num_steps) = pending.run.compilation, self._next_batch
        seconds = 0.0 if compilation is None else compilation.seconds
        steps = counted(pending.unroll, "step")
        self.reason = (
            f"compiled, {steps} per call from step {num_steps + 1} on: compiled in the background "
            f"in {seconds:.0f} s"
        )
        unroll = best_unroll(self.schedule)
        left = self._seconds_left - (time.perf_counter() - self._decided_at)
        if unroll > pending.unroll and left > 2 * unroll * seconds:
            self._compile_in_background(unroll)

    def resume(self, mode: bool | str, reason: str, unroll: int, in_background: bool) -> None:
        """Continue with a checkpoint's decision, unless another one is requested.

        Args:
            mode, reason, unroll, in_background: the :attr:`content` of the checkpoint.
        """
        self.num_run = int(mode in (True, "recorded"))  # steps before the checkpoint
        if self.mode in (True, "recorded"):
            self.enable(self.mode, "as requested", unroll if mode is True else None)
        elif self.mode == "auto" and mode is True and in_background and self._in_background:
            # Other steps would differ from those before in rounding, so the fit waits for these.
            self._undecided, self._compiled_in_background = False, True
            self.enable(
                True, "as before the checkpoint", unroll, compiled="background", waits=True
            )
        elif self.mode == "auto" and mode in (True, "recorded"):
            self._undecided = mode == "recorded"
            self.enable(mode, "as before the checkpoint")
        elif self.mode == "auto" and mode is False:
            self.mode, self._undecided = False, False
            prefix = "eager: as before the checkpoint: "
            self.reason = prefix + reason.removeprefix(prefix).removeprefix("eager: ")

    def enable(
        self, mode: bool | str, reason: str, unroll: int | None = None, **options: Any
    ) -> None:
        """Run recorded or compiled steps from now on.

        Args:
            mode: ``"recorded"``, or True for compiled steps.
            reason: why.
            unroll: steps per call; by default the best number.
            options: the options of the compiled steps.
        """
        self.mode = mode
        try:
            if mode == "recorded":
                self.recorded = self._make_recorded()
                self.reason = f"recorded: {reason}"
            elif self._distributed:
                self.recorded = self._make_recorded(compiled=True)
                self.reason = f"compiled, the gradient of each step: {reason}"
            else:
                unroll = unroll or best_unroll(self.schedule, self._next_batch[1])
                self.compiled = self._make_compiled(unroll, **options)
                self.reason = f"compiled, {counted(unroll, 'step')} per call: {reason}"
        except CaptureError as error:
            self.disable(error)

    def disable(self, error: CaptureError) -> None:
        """Run eager or recorded steps from now on, with one warning."""
        self.close()
        self.compiled, self.recorded = None, None
        super().disable(error)
        if self.mode == "recorded":
            self.recorded = self._make_recorded()

    def close(self) -> None:
        """Abandon what is being compiled."""
        if self.pending is not None:
            self.pending.run.abandon()
        self.pending = None


def best_unroll(schedule: Schedule, num_steps: int = 0) -> int:
    """The number of steps per call with the least total time, after ``num_steps`` steps.

    The cost of a call is that of its steps plus about half a compiled step, and an eager step,
    which is needed for those that do not fill a call, costs three compiled ones.
    """
    length = min(schedule.full_batches, schedule.num_steps - num_steps)

    def cost(unroll: int) -> float:
        calls, rest = divmod(length, unroll)
        return calls * (unroll + 0.5) + 3 * rest

    return min(range(1, MAX_UNROLL + 1), key=cost)
