"""Steps of SVI recorded and compiled, several a call, and the decision whether that pays."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_vae.inference.recording import (
    Inputs,
    NotRecordable,
    State,
    Step,
    buffers_of,
    first_line,
    run_recorded,
    stored_constraints,
)
from ppl_vae.inference.rules import read_slots, rule_of, write_slots
from ppl_vae.inference.steps import Batch, Update
from ppl_vae.inference.training import Schedule
from ppl_vae.program import modules_of
from ppl_vae.state import probing

LARGEST_UNROLL = 8
"""Steps a call at most: more save little and compile longer."""
MEASURED = (5, 25)
"""The eager steps that are timed, after the first few."""
COMPILE_SECONDS = 50.0
"""What recording and compiling takes, as far as can be known before: a cold start on two cores."""
SPEEDUP = 2.0
"""How much faster captured steps are at least taken to be."""


class Captured:
    """Several steps a call as compiled tensor code, on the state of an :class:`Update`.

    Args:
        batch, update: the two halves of a step, as they run eagerly.
        named: the parameters by name.
        unroll: steps a call.
        compiled: whether to compile what is recorded; without, it is slow, and the same.
        options: of the compiler.

    Raises:
        NotRecordable: if the step is no pure function of tensors, or the optimizer has no rule.
    """

    def __init__(
        self,
        batch: Batch,
        update: Update,
        named: dict[str, Tensor],
        unroll: int,
        *,
        compiled: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.batch, self.update, self.unroll = batch, update, unroll
        self._modules = modules_of(batch.model, batch.guide)
        rule = rule_of(update.optimizer)
        if isinstance(rule, str):
            raise NotRecordable(rule)
        self._rule = rule
        held = {id(p) for module in self._modules for p in module.parameters()}
        stored = [name for name, p in named.items() if id(p) not in held]
        self._parameters = [p for name, p in named.items() if name not in stored]
        self._parameters += [named[name] for name in stored]
        self._buffers = buffers_of(self._modules)
        tables = {id(table) for table in update.tables.tables}
        self._step = Step(
            loss=self._loss,
            modules=self._modules,
            stored=stored_constraints(stored),
            parameters=self._parameters,
            rule=rule,
            tables=frozenset(k for k, p in enumerate(self._parameters) if id(p) in tables),
            grad_clip=update.grad_clip,
        )
        self._compiled, self._options = compiled, options
        self._run: Callable[..., Any] | None = None

    def _loss(self, whole: list[Tensor], each: list[Tensor], beta: Tensor) -> Tensor:
        return -self.batch.recorded_value(whole, each, beta)

    def leap(self, rows: Sequence[Tensor | None], start: int) -> Tensor:
        """Do as many steps as there are batches of rows; the parameters change in place.

        Args:
            rows: of each step, all of one size; None is all rows.
            start: steps done before.

        Returns:
            The objective at each step, in nats a datum. If one is not finite, nothing changed.

        Raises:
            NotRecordable: at the first call, if the step cannot be recorded or compiled.
        """
        try:
            state, inputs = self._state(), self._inputs(rows, start)
        except ValueError as error:
            raise NotRecordable(str(error)) from error
        if self._run is None:
            self._run = self._first(state, inputs)
        after, losses = run_recorded(self._run, state, inputs)
        if bool(losses.isfinite().all()):
            self._keep(after, len(rows))
        return -losses

    def _first(self, state: State, inputs: Inputs) -> Callable[..., Any]:
        with probing(self.batch.model, self.batch.guide):
            recorded = self._step.record(state, inputs)
            if not self._compiled:
                return recorded
            how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": self._options}
            try:
                with warnings.catch_warnings():  # the compiler's own, which nobody can act on
                    warnings.simplefilter("ignore")
                    compiled = torch.compile(recorded, **how)
                    run_recorded(compiled, state, inputs)
            except Exception as error:  # no compiler, or one that fails
                raise NotRecordable(f"it cannot be compiled ({first_line(error)})") from error
        return compiled

    def _state(self) -> State:
        slots, count = read_slots(self.update.optimizer, self._rule, self._parameters)
        like = self._parameters[0]
        parameters = [parameter.detach() for parameter in self._parameters]
        steps = torch.tensor(float(count), dtype=like.dtype, device=like.device)
        return State(parameters, slots, steps, list(self._buffers))

    def _inputs(self, rows: Sequence[Tensor | None], start: int) -> Inputs:
        x, mask = self.batch.x, self.batch.mask
        whole = [x] if mask is None else [x, mask]
        each = [] if rows[0] is None else [torch.stack([r for r in rows if r is not None])]
        steps = range(start + 1, start + len(rows) + 1)
        beta = [self.batch.objective.weight(step) for step in steps]
        place = {"dtype": self._parameters[0].dtype, "device": x.device}
        lr = self.update.learning_rates(len(rows))
        return Inputs(whole, each, torch.tensor(lr, **place), torch.tensor(beta, **place))

    @torch.no_grad()
    def _keep(self, after: State, steps: int) -> None:
        # By swapping what the tensors hold: copies would cost as much as the steps save.
        for parameter, value in zip(self._parameters, after.parameters, strict=True):
            parameter.data = value
        for buffer, value in zip(self._buffers, after.buffers, strict=True):
            buffer.copy_(value)
        count = int(after.count)
        write_slots(self.update.optimizer, self._rule, self._parameters, after.slots, count)
        self.update.advance(steps)


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
        if wanted not in (True, False, "auto"):
            raise ValueError(f"capture must be one of True, False, 'auto'; got {wanted!r}")
        self.wanted, self.make, self.schedule = wanted, make, schedule
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
        elif self.wanted == "auto" and done >= MEASURED[1]:
            start, end = MEASURED
            eager = (elapsed[end - 1] - elapsed[start - 1]) / (end - start)
            left = eager * (self.schedule.num_steps - done)
            if left * (1 - 1 / SPEEDUP) > COMPILE_SECONDS:
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


def best_unroll(schedule: Schedule) -> int:
    """How many steps a call cost least: so many come together between odd batches and looks.

    In units of a captured step, its call costs about a half more and an eager step three.
    """
    length = schedule.check_every
    if schedule.num_data % schedule.batch_size:
        length = schedule.num_data // schedule.batch_size
    length = min(length, schedule.num_steps)

    def cost(unroll: int) -> float:
        calls, rest = divmod(length, unroll)
        return calls * (unroll + 0.5) + 3 * rest

    return min(range(1, LARGEST_UNROLL + 1), key=cost)
