"""Around the steps of a stochastic fit: schedule, data order, early stopping, per-datum tables."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ppl_vae.core.validation import check_int


@dataclass(frozen=True)
class Schedule:
    """How many steps, on which rows.

    Attributes:
        num_data: N.
        batch_size: rows per step. The rows that an epoch leaves over make a smaller last batch; a
            single row joins the batch before it, since batch normalisation needs two.
        num_steps: in all.
        anew: whether each epoch has data of its own.
        drop_last: whether the rows left over are dropped instead, other ones in each epoch.
    """

    num_data: int
    batch_size: int
    num_steps: int
    anew: bool = False
    drop_last: bool = False

    @classmethod
    def of(
        cls,
        num_data: int,
        batch_size: int | None,
        epochs: int | None,
        steps: int | None,
        *,
        anew: bool = False,
        drop_last: bool = False,
    ) -> "Schedule":
        """From the arguments of a fit, of which exactly one of ``epochs`` and ``steps`` is given.

        Raises:
            ValueError: if not exactly one is given, or a batch is larger than the data.
        """
        size = num_data if batch_size is None else check_int("batch_size", batch_size)
        if size > num_data:
            raise ValueError(f"batch_size={size} is larger than the data, {num_data} rows")
        if (epochs is None) == (steps is None):
            raise ValueError(f"give exactly one of epochs and steps; got {epochs=} and {steps=}")
        if num_data - size == 1 < size and not drop_last:
            size = num_data  # one batch, and the single row with it
        schedule = cls(num_data, size, 1, anew, drop_last)
        if epochs is not None:
            steps = check_int("epochs", epochs) * schedule.steps_per_epoch
        num_steps = check_int("steps", steps)  # pyright: ignore[reportArgumentType]
        return replace(schedule, num_steps=num_steps)

    @property
    def left_over(self) -> int:
        """Rows of an epoch that fill no batch."""
        return self.num_data % self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the data."""
        smaller = self.left_over > 1 and not self.drop_last
        return self.num_data // self.batch_size + smaller

    @property
    def in_a_row(self) -> int:
        """Batches of ``batch_size`` rows without one of another size between them, at most
        :attr:`together`.
        """
        if not self.left_over or self.drop_last:
            return self.together
        return self.num_data // self.batch_size - (self.left_over == 1)

    @property
    def check_every(self) -> int:
        """Steps between looks at validation data: an epoch, but not fewer than 25."""
        return math.ceil(25 / self.steps_per_epoch) * self.steps_per_epoch

    @property
    def together(self) -> int:
        """Steps that see the same data and have no look between them, counted from the start."""
        return self.steps_per_epoch if self.anew else self.check_every

    def batches(
        self, order_seed: int, start: int = 0, device: torch.device | str = "cpu"
    ) -> Iterator[Tensor | None]:
        """The rows of each step from ``start`` on, a new order every epoch; None is all rows.

        The order is drawn on ``device``, by a generator of its own.
        """
        if self.batch_size == self.num_data:
            yield from (None for _ in range(start, self.num_steps))
            return
        step = start
        while step < self.num_steps:
            epoch, done = divmod(step, self.steps_per_epoch)
            order = self._order(order_seed + epoch, device)
            for rows in self._split(order)[done : done + self.num_steps - step]:
                yield rows
                step += 1

    def _split(self, order: Tensor) -> Sequence[Tensor]:
        batches = order.split(self.batch_size)[: self.steps_per_epoch]
        if self.left_over != 1 or self.drop_last:
            return batches
        return *batches[:-1], order[(len(batches) - 1) * self.batch_size :]

    def _order(self, seed: int, device: torch.device | str) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randperm(self.num_data, generator=generator, device=device)

    def never_drawn(self, order_seed: int, device: torch.device | str = "cpu") -> int:
        """How many rows are in no batch of any step, where ``drop_last`` drops some."""
        waiting = torch.ones(self.num_data, dtype=torch.bool, device=device)
        for epoch, start in enumerate(range(0, self.num_steps, self.steps_per_epoch)):
            drawn = min(self.steps_per_epoch, self.num_steps - start) * self.batch_size
            waiting[self._order(order_seed + epoch, device)[:drawn]] = False
            if not bool(waiting.any()):
                return 0
        return int(waiting.sum())


def epoch_generator(
    order_seed: int, epoch: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """For what is drawn at the start of an epoch; not the stream that its order is drawn from."""
    chosen = torch.Generator().manual_seed(order_seed + epoch)
    seed = int(torch.randint(2**62, (), generator=chosen))
    return torch.Generator(device).manual_seed(seed)


class Snapshot:
    """Copies of tensors, to put back in place."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.values = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the tensors the values they had."""
        for tensor, value in zip(self.tensors, self.values, strict=True):
            tensor.copy_(value)


@dataclass
class EarlyStopping:
    """Keeps the state with the best validation value, and says when to stop waiting for a better.

    Attributes:
        patience: looks without a better value before stopping; None never stops.
        best: the best state so far.
        values, steps: what was seen, and after how many steps.
        waited: looks since the best.
    """

    patience: int | None
    best: Snapshot | None = None
    values: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    waited: int = 0

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return self.patience is not None and self.waited >= self.patience

    def look(self, step: int, value: float, state: Sequence[Tensor]) -> bool:
        """Note a validation value; whether to stop."""
        better = not self.values or value > max(self.values)
        self.values.append(value)
        self.steps.append(step)
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best = Snapshot(state)
        return self.over


FARTHEST = 10.0
"""A row of a per-datum table moves at most so many times as far as another parameter."""


def table_rate(optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> float:
    """By how much the moves of a per-datum table's rows are multiplied.

    A row is drawn once in N / B steps only, with N / B times the gradient that the whole data
    would give it. SGD makes up for the rarity by that gradient; Adam and its kin divide by the
    size of the gradient, and so would let the rows learn N / B times more slowly than all other
    parameters. Their moves are multiplied by N / B, up to a bound: a row that jumps farther at
    each visit than its posterior is wide does not settle.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return 1.0
    return min(float(steps_per_epoch), FARTHEST)


class PerDatumUpdate:
    """Lets an optimizer move only some rows of per-datum tables, its state for them included.

    Without it an optimizer with momentum moves q_i of data that are not in the batch.

    Args:
        optimizer: of all parameters.
        tables: those with a row per datum.
        rate: by how much the moves of their rows are multiplied, see :func:`table_rate`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, tables: Sequence[nn.Parameter], rate: float = 1.0
    ) -> None:
        self.optimizer, self.tables, self.rate = optimizer, tables, rate

    def step(self, rows: Tensor | None) -> None:
        """One step of the optimizer; of the tables, only ``rows`` (None: all) change."""
        if rows is None or not self.tables:
            self.optimizer.step()
            return
        before = [(t, key, v.detach().clone()) for t, key, v in self._tensors()]
        self.optimizer.step()
        known = {(id(table), key): value for table, key, value in before}
        with torch.no_grad():
            for table, key, value in self._tensors():
                old = known.get((id(table), key), torch.zeros_like(value))
                changed = value[rows].clone()
                if not key:
                    changed = torch.lerp(old[rows], changed, self.rate)
                value.copy_(old)
                value[rows] = changed

    def _tensors(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        for table in self.tables:
            yield table, "", table
            for key, value in self.optimizer.state.get(table, {}).items():
                if isinstance(value, Tensor) and value.shape == table.shape:
                    yield table, key, value
