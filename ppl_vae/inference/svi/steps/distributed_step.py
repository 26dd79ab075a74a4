"""Steps of SVI whose batches several processes share: one message between gradient and update.

Each process evaluates the objective on its share of the rows of a batch, as a subsample of the
plate over data. The objective in nats per datum is the mean over rows, so the gradient of the
batch is the mean of the gradients of the shares, weighted by their numbers of rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ppl_vae.core.arrays.digest import tensor_digest
from ppl_vae.core.errors import ProcessError
from ppl_vae.core.processes.ranks import Processes, describe_error
from ppl_vae.core.processes.shared_memory import WeightedSum
from ppl_vae.core.state import seed_generators
from ppl_vae.inference.svi.batches.minibatch import FINITE
from ppl_vae.inference.svi.steps.optimizer_step import OptimizerStep


class Contribution(NamedTuple):
    """What a process contributes to a step, or what all of them do together.

    Attributes:
        value: the objective in nats per datum, ().
        gradients: the gradients of minus the objective, for each parameter; None where it has
            none.
        changes: the changes of the buffers, by the evaluation of the objective, by their
            positions.
    """

    value: Tensor
    gradients: list[Tensor | None]
    changes: dict[int, Tensor]

    def with_value(self, value: float) -> "Contribution":
        """The same with another value."""
        return self._replace(value=torch.full_like(self.value, value))


class DistributedStep:
    """The exchange of gradients between evaluation and update.

    All gradients, and the changes of buffers such as the means of batch normalisation, are one
    message. Of per-datum parameters it holds the rows of the batch only. Which buffers change is
    found in the first step after each :meth:`check_same_parameters`.

    Args:
        processes: the processes.
        optimizer_step: the update.
    """

    def __init__(self, processes: Processes, optimizer_step: OptimizerStep) -> None:
        self.processes, self.optimizer_step = processes, optimizer_step
        self._sum, self._dtype = WeightedSum(processes), torch.float32
        for parameter in optimizer_step.parameters:
            self._dtype = torch.promote_types(self._dtype, parameter.dtype)
        self._changing: list[int] | None = None

    def share(self, rows: Int[Tensor, " B"]) -> tuple[Int[Tensor, " b"], float]:
        """This process's rows of a batch, which may be none, and their fraction of it."""
        own = rows[self.processes.share(len(rows))]
        return own, len(own) / len(rows)

    def run(
        self,
        evaluate: Callable[[Int[Tensor, " b"]], Contribution | None],
        rows: Int[Tensor, " B"],
    ) -> Contribution:
        """The contributions of all processes to a step.

        Args:
            evaluate: evaluates this process's rows; None if parameters have diverged.
            rows: the rows of the whole batch.

        Raises:
            ProcessError: if another process has an error.
            Exception: the error of this process itself.
        """
        own, fraction = self.share(rows)
        contribution, failure = self.no_rows(), None
        if len(own):
            try:
                contribution = evaluate(own) or contribution.with_value(math.nan)
            except Exception as error:  # raised on all processes by the exchange
                failure = error
        return self.exchange(contribution, rows, fraction, failure)

    def find_nonfinite_site(
        self, find: Callable[[Int[Tensor, " b"]], str], rows: Int[Tensor, " B"]
    ) -> str:
        """A description of the first site whose log density is not finite, and its rank.

        Args:
            find: describes the site for this process's rows.
            rows: the rows of the whole batch.
        """
        own, _ = self.share(rows)
        site = find(own) if len(own) else FINITE
        texts = self.processes.gather_text("" if site == FINITE else site)
        ranks = [rank for rank, text in enumerate(texts) if text]
        return f"{texts[ranks[0]]}, on rank {ranks[0]}" if ranks else FINITE

    def evaluate(self, value: Callable[[], Tensor], *, has_gradient: bool = False) -> Contribution:
        """The objective of this process's rows, with its gradient.

        Args:
            value: evaluates the objective.
            has_gradient: whether it also stores the gradient in the parameters.
        """
        step = self.optimizer_step
        before = [buffer.detach().clone() for buffer in step.buffers]
        step.optimizer.zero_grad(set_to_none=True)
        objective = value()
        if not has_gradient:
            (-objective).backward()
        changes = {k: _change(before[k], step.buffers[k]) for k in self._in_message}
        for buffer, old in zip(step.buffers, before, strict=True):
            buffer.copy_(old)
        return Contribution(objective.detach(), [p.grad for p in step.parameters], changes)

    def no_rows(self) -> Contribution:
        """The contribution of a process without rows."""
        step = self.optimizer_step
        value = torch.zeros((), device=step.parameters[0].device)
        changes = {k: torch.zeros_like(step.buffers[k]) for k in self._in_message}
        return Contribution(value, [None for _ in step.parameters], changes)

    @property
    def _in_message(self) -> Sequence[int]:
        return (
            range(len(self.optimizer_step.buffers)) if self._changing is None else self._changing
        )

    def exchange(
        self,
        own: Contribution,
        rows: Int[Tensor, " B"],
        fraction: float,
        error: BaseException | None = None,
    ) -> Contribution:
        """The contributions of all processes, on each of them.

        Args:
            own: that of this process.
            rows: the rows of the whole batch.
            fraction: the fraction of this process's rows among them.
            error: that the evaluation raised on this process.

        Raises:
            ProcessError: if another process has an error.
            Exception: the error of this process itself.
        """
        parameters = self.optimizer_step.parameters
        given = [g is not None for g in own.gradients]
        # Weights of processes that have rows are positive, so that sums of these are positive
        # where any process has failed, or has a gradient.
        failed_and_given = own.value.new_tensor([error is not None, *given])
        gradients = list(map(self._part, parameters, own.gradients, [rows] * len(parameters)))
        parts = [own.value, *gradients, *own.changes.values()]
        total = self._sum([failed_and_given, *parts], fraction, self._dtype)
        failed, *counts = total[: len(failed_and_given)].tolist()
        if failed:
            texts = self.processes.gather_text("" if error is None else describe_error(error))
            if error is not None:
                raise error
            self.processes.raise_failure(texts)
        split = total[len(failed_and_given) :].split([part.numel() for part in parts])
        value, *found = (new.reshape(p.shape) for new, p in zip(split, parts, strict=True))
        gradients, changes = found[: len(parameters)], found[len(parameters) :]
        changes = dict(zip(own.changes, changes, strict=True))
        self._changing = [k for k, change in changes.items() if bool((change != 0).any())]
        return Contribution(
            value,
            [
                self._whole(parameter, part, rows) if count else None
                for parameter, part, count in zip(parameters, gradients, counts, strict=True)
            ],
            changes,
        )

    def apply(self, whole: Contribution, rows: Int[Tensor, " B"] | None) -> None:
        """Update buffers and parameters.

        Args:
            whole: the contributions of all processes.
            rows: the rows of the whole batch; None is all rows.
        """
        step = self.optimizer_step
        for k, change in whole.changes.items():
            add_change(step.buffers[k], change)
        for parameter, gradient in zip(step.parameters, whole.gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter)
        step.update(rows)

    def check_same_parameters(self, num_steps: int) -> None:
        """Check that all processes have the same parameters.

        Raises:
            ProcessError: naming the first rank with others.
        """
        if self.processes.size == 1:
            return
        self._changing = None
        first, *others = self.processes.gather_text(tensor_digest(self.optimizer_step.state))
        for rank, other in enumerate(others, 1):
            if other != first:
                raise ProcessError(
                    f"after step {num_steps} the parameters of rank {rank} differ from those of "
                    "rank 0: their updates are not the same; all processes need processors and "
                    "libraries of one kind"
                )

    def seed_own_draws(self, seed: int, num_steps: int) -> None:
        """Let processes draw independently, in a way that a resumed fit repeats."""
        if self.processes.size > 1:
            own = self.processes.own_seed(seed, num_steps)
            assert own is not None
            seed_generators(own)

    def of_rank_zero(self, numbers: list[float]) -> list[float]:
        """The numbers that rank 0 has."""
        return self.processes.broadcast(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def _is_per_datum(self, parameter: Tensor) -> bool:
        return any(parameter is table for table in self.optimizer_step.per_datum.tables)

    def _part(self, parameter: Tensor, gradient: Tensor | None, rows: Tensor) -> Tensor:
        # The message has this part of a gradient.
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        return gradient[rows] if self._is_per_datum(parameter) else gradient

    def _whole(self, parameter: Tensor, part: Tensor, rows: Tensor) -> Tensor:
        if not self._is_per_datum(parameter):
            return part
        return torch.zeros_like(parameter).index_copy(0, rows, part.to(parameter))


def _change(before: Tensor, after: Tensor) -> Tensor:
    # The change of a buffer is zero where it stays NaN, as a scale that is not known yet.
    change = after.detach().double() - before.double()
    return torch.where(before.isnan() & after.isnan(), 0.0, change)


def add_change(buffer: Tensor, change: Tensor) -> None:
    """Add a change to a buffer, in place; entries without a change keep their bits."""
    changed = buffer.double() + change.to(buffer.device)
    if not buffer.is_floating_point():
        changed = changed.round()
    buffer.copy_(torch.where(change == 0, buffer, changed.to(buffer.dtype)))
