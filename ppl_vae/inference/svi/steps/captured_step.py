"""Captured and compiled steps of SVI, several per call."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ppl_vae.capture.compiled import CompiledFunction
from ppl_vae.capture.functional_optim import functional_optimizer, optimizer_state
from ppl_vae.capture.functional_step import FunctionalStep, StepInputs, StepState, TrainState
from ppl_vae.capture.graph import CaptureError, CompilationError
from ppl_vae.inference.svi.batches.minibatch import MinibatchObjective
from ppl_vae.inference.svi.steps.optimizer_step import OptimizerStep


class CapturedSteps:
    """Several steps per call as compiled code, on the state of an :class:`OptimizerStep`.

    Args:
        minibatch: the objective, as it is evaluated eagerly.
        optimizer_step: the update, as it is made eagerly.
        named: the parameters by name.
        unroll: steps per call.
        compiled: see :class:`ppl_vae.capture.compiled.CompiledFunction`.
        waits: whether the first call waits until another process has compiled the steps.
        options: options of the compiler.
        autotune_matmul: whether to use the faster of two BLAS libraries, see
            :mod:`ppl_vae.capture.matmul`.

    Raises:
        CaptureError: if the step is no pure function of tensors, or the optimizer has no
            functional counterpart.
    """

    def __init__(
        self,
        minibatch: MinibatchObjective,
        optimizer_step: OptimizerStep,
        named: dict[str, Tensor],
        unroll: int,
        *,
        compiled: bool | str = True,
        waits: bool = False,
        options: dict[str, Any] | None = None,
        autotune_matmul: bool = False,
    ) -> None:
        self.minibatch, self.optimizer_step, self.unroll = minibatch, optimizer_step, unroll
        functional = functional_optimizer(optimizer_step.optimizer)
        modules = minibatch.pair.modules
        self._train_state = TrainState(modules, named, functional)
        per_datum = optimizer_step.per_datum
        tables = {id(table) for table in per_datum.tables}
        step = FunctionalStep(
            loss=self._loss,
            train_state=self._train_state,
            tables=frozenset(
                k for k, p in enumerate(self._train_state.parameters) if id(p) in tables
            ),
            table_rate=per_datum.rate,
            grad_clip=optimizer_step.grad_clip,
        )
        self._prepared, self._waits = False, waits
        # The state after each step is stored, instead of computed again where later steps use it:
        # a moment is computed from two tensors, its last value and the gradient.
        options = {"realize_reads_threshold": 1} | (options or {})
        self.run = CompiledFunction(
            step.capture,
            compiled=compiled,
            options=options,
            precision=minibatch.precision,
            autotune_matmul=autotune_matmul,
        )

    def _loss(self, common: list[Tensor], per_step: list[Tensor], beta: Tensor) -> Tensor:
        return -self.minibatch.traced_value(common, per_step, beta)

    def run_steps(self, rows: Sequence[Tensor | None], start: int) -> Tensor:
        """Make one step for each batch of rows; the parameters are updated in place.

        Args:
            rows: the rows of each step, all of one size; None is all rows.
            start: the number of steps made before.

        Returns:
            The objective at each step in nats per datum, (steps,). On a CPU nothing is updated
            if one of them is not finite; a GPU is not waited for.

        Raises:
            CaptureError: at the first call, if the step cannot be captured or compiled.
        """
        opt_states, state, num_steps, inputs = self._arguments(rows, start)
        if self._waits:
            self.run.start(state, inputs)
            self.run.finish()
            self._waits = False
            if self.run.failure is not None:
                raise self.run.failure
        after, losses = self.run(state, inputs)
        if losses.device.type != "cpu" or bool(losses.isfinite().all()):
            self._train_state.write(opt_states, after, num_steps + len(rows))
            self.optimizer_step.advance_scheduler(len(rows))
        return -losses

    def start(self, rows: Tensor | None, start: int) -> None:
        """Record the steps, and let another process compile them, if it is to.

        Args:
            rows: the rows of one step.
            start: the number of steps made before.

        Raises:
            CaptureError: if the step cannot be captured.
        """
        _, state, _, inputs = self._arguments([rows] * self.unroll, start)
        self.run.start(state, inputs)

    def _arguments(
        self, rows: Sequence[Tensor | None], start: int
    ) -> tuple[list[Any], StepState, int, StepInputs]:
        optimizer, train_state = self.optimizer_step.optimizer, self._train_state
        opt_states = [
            optimizer_state(optimizer, p, train_state.optimizer) for p in train_state.parameters
        ]
        try:
            if not self._prepared:
                self.minibatch.prepare_tracing(rows[0])
                self._prepared = True
        except ValueError as error:
            raise CaptureError(str(error)) from error
        try:
            state, num_steps = train_state.read(opt_states)
            inputs = self._inputs(rows, start, num_steps)
        except ValueError as error:  # of the optimizer, without which the gradient can be recorded
            raise CompilationError(str(error)) from error
        return opt_states, state, num_steps, inputs

    def _inputs(self, rows: Sequence[Tensor | None], start: int, num_steps: int) -> StepInputs:
        steps = range(start + 1, start + len(rows) + 1)
        return StepInputs(
            frozen=self._train_state.frozen_parameters(),
            common=self.minibatch.common_tensors,
            steps=self._train_state.inputs_of(
                per_step=[self.minibatch.step_tensors(each) for each in rows],
                num_steps=num_steps,
                rates=self.optimizer_step.learning_rates(len(rows)),
                betas=[self.minibatch.objective.kl_weight(step) for step in steps],
            ),
        )
