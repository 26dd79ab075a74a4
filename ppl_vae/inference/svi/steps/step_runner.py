"""One training step: eagerly or recorded, by one process or by several that share a batch."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ppl_vae.capture.graph import CaptureError
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.inference.svi.batches.minibatch import MinibatchObjective
from ppl_vae.inference.svi.batches.schedule import Schedule
from ppl_vae.inference.svi.steps.capture_policy import StepPolicy
from ppl_vae.inference.svi.steps.distributed_step import Contribution, DistributedStep
from ppl_vae.inference.svi.steps.optimizer_step import OptimizerStep
from ppl_vae.inference.svi.steps.recorded_gradient import RecordedGradient

Value = TypeVar("Value")


class StepRunner:
    """Evaluates the objective of a batch, and then updates the parameters.

    Args:
        minibatch: the objective on minibatches.
        optimizer_step: the update of the parameters.
        schedule: the rows of each step.
        policy: whether steps run eagerly or recorded.
        processes: that share each batch.
    """

    def __init__(
        self,
        minibatch: MinibatchObjective,
        optimizer_step: OptimizerStep,
        schedule: Schedule,
        policy: StepPolicy,
        processes: Processes,
    ) -> None:
        self.minibatch, self.optimizer_step = minibatch, optimizer_step
        self.schedule, self.policy = schedule, policy
        self.distributed = DistributedStep(processes, optimizer_step)
        self.is_distributed = processes.size > 1
        self._update: Callable[[], None] = lambda: None

    def evaluate(self, rows: Tensor | None, step: int) -> Tensor | None:
        """The objective of these rows (None: all) in nats per datum.

        Args:
            rows: the rows of the batch.
            step: the number of the step, counted from 1.

        Returns:
            None if it cannot be evaluated because the parameters have diverged.
        """
        if self.is_distributed:
            return self._evaluate_distributed(rows, step)
        recorded = self._recorded(rows)
        try:
            value = self._guarded(lambda: (recorded or self.minibatch).value(rows, step), step)
        except CaptureError as error:
            self.policy.disable(error)
            return self.evaluate(rows, step)
        if value is None:
            return None
        if recorded is not None:
            self._update = partial(self.optimizer_step.update, rows)
        else:
            self._update = partial(self.optimizer_step.apply, value, rows)
        return value.detach()

    def update(self) -> None:
        """Update the parameters by the gradient of the objective that was evaluated last."""
        with self.minibatch.rounding():
            self._update()
        self._update = lambda: None  # which holds the graph

    def find_nonfinite_site(self, rows: Tensor | None) -> str:
        """Describe the first site whose log density is not finite, and its rank."""
        find = self.minibatch.find_nonfinite_site
        if self.is_distributed:
            return self.distributed.find_nonfinite_site(find, self.minibatch.all_rows(rows))
        return find(rows)

    def _evaluate_distributed(self, rows: Tensor | None, step: int) -> Tensor:
        batch = self.minibatch.all_rows(rows)

        def evaluate(own: Tensor) -> Contribution | None:
            recorded = self._recorded(rows)
            value = partial((recorded or self.minibatch).value, own, step)
            given = recorded is not None
            try:
                return self._guarded(
                    lambda: self.distributed.evaluate(value, has_gradient=given), step
                )
            except CaptureError as error:  # others go on with theirs, which gives the same
                self.policy.disable(error)
                return evaluate(own)

        whole = self.distributed.run(evaluate, batch)
        self._update = partial(self.distributed.apply, whole, rows)
        return whole.value

    def _recorded(self, rows: Tensor | None) -> RecordedGradient | None:
        """The recorded gradient, for batches of full size."""
        is_full = rows is None or len(rows) == self.schedule.batch_size
        recorded = self.policy.recorded if is_full else None
        self.policy.num_run += recorded is not None
        return recorded

    def _guarded(self, function: Callable[[], Value], step: int) -> Value | None:
        """The function's value; None if it fails because the parameters have diverged."""
        try:
            with self.minibatch.rounding():
                return function()
        except CaptureError:
            raise
        except (FloatingPointError, RuntimeError, ValueError) as error:
            # A factorization can fail on parameters that are finite but far too large.
            factorization = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
            overflow = isinstance(error, factorization) and step > 1
            if not overflow and all(t.isfinite().all() for t in self.optimizer_step.parameters):
                raise
            return None
