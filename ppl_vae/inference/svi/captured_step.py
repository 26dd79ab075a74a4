"""Steps of SVI captured as compiled tensor code, several a call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_vae.capture.compiled import Compiled
from ppl_vae.capture.functional_optim import functional_optimizer, optimizer_state
from ppl_vae.capture.functional_step import Inputs, Step, TrainState, to_device
from ppl_vae.capture.graph import CaptureError
from ppl_vae.core.program import modules_of
from ppl_vae.inference.svi.minibatch import MinibatchObjective, OptimizerStep


class Captured:
    """Several steps per call as compiled tensor code, on the state of an :class:`OptimizerStep`.

    Args:
        batch, update: the two halves of a step, as they run eagerly.
        named: the parameters by name.
        unroll: steps per call.
        compiled: whether to compile what is recorded; without, it is slow, and the same.
        options: of the compiler.

    Raises:
        CaptureError: if the step is no pure function of tensors, or the optimizer has no rule.
    """

    def __init__(
        self,
        batch: MinibatchObjective,
        update: OptimizerStep,
        named: dict[str, Tensor],
        unroll: int,
        *,
        compiled: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.batch, self.update, self.unroll = batch, update, unroll
        rule = functional_optimizer(update.optimizer)
        if isinstance(rule, str):
            raise CaptureError(rule)
        self._trained = TrainState(modules_of(batch.model, batch.guide), named, rule)
        tables = {id(table) for table in update.tables.tables}
        self._step = Step(
            loss=self._loss,
            trained=self._trained,
            tables=frozenset(k for k, p in enumerate(self._trained.parameters) if id(p) in tables),
            table_rate=update.tables.rate,
            grad_clip=update.grad_clip,
        )
        self._prepared = False
        # The state after each step is kept, not reckoned anew where the next ones need it.
        options = {"realize_reads_threshold": 2} | (options or {})
        self._run = Compiled(
            self._step.record,
            compiled=compiled,
            options=options,
            precision=batch.precision,
        )

    def _loss(self, whole: list[Tensor], each: list[Tensor], beta: Tensor) -> Tensor:
        return -self.batch.recorded_value(whole, each, beta)

    def accelerate(self, rows: Sequence[Tensor | None], start: int) -> Tensor:
        """Do as many steps as there are batches of rows; the parameters change in place.

        Args:
            rows: of each step, all of one size; None is all rows.
            start: steps done before.

        Returns:
            The objective at each step, in nats per datum. On a CPU, if one is not finite, nothing
            changed; a GPU is not waited for.

        Raises:
            CaptureError: at the first call, if the step cannot be recorded or compiled.
        """
        optimizer, trained = self.update.optimizer, self._trained
        states = [optimizer_state(optimizer, p, trained.rule) for p in trained.parameters]
        try:
            if not self._prepared:
                self.batch.prepare(rows[0])
                self._prepared = True
            state, count = trained.read(states)
            inputs = self._inputs(rows, start)
        except ValueError as error:
            raise CaptureError(str(error)) from error
        after, losses = self._run(state, inputs)
        if losses.device.type != "cpu" or bool(losses.isfinite().all()):
            trained.write(states, after, count + len(rows))
            self.update.advance(len(rows))
        return -losses

    def _inputs(self, rows: Sequence[Tensor | None], start: int) -> Inputs:
        x, mask = self.batch.x, self.batch.mask
        whole = [x] if mask is None else [x, mask]
        each = [] if rows[0] is None else [torch.stack([r for r in rows if r is not None])]
        steps = range(start + 1, start + len(rows) + 1)
        beta = [self.batch.objective.weight(step) for step in steps]
        lr, like = self.update.learning_rates(len(rows)), self._trained.parameters[0]
        return Inputs(
            self._trained.fixed(), whole, each, to_device(lr, like), to_device(beta, like)
        )
