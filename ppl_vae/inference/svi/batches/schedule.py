"""The schedule of a stochastic fit: how many steps, and which rows each of them uses."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppl_vae.core.validation import check_int
from ppl_vae.data.sources.row_order import RowGroup, RowOrder


@dataclass(frozen=True)
class Schedule:
    """The number of steps, and the rows of each.

    Attributes:
        num_data: N.
        batch_size: rows per step. The rows that remain at the end of an epoch form a smaller
            batch; a single remaining row joins the batch before it, since batch normalisation
            needs two.
        num_steps: total number of steps.
        refresh: whether the data are transformed again in each epoch.
        drop_last: whether the remaining rows are left out instead.
        order: the order of rows that are read in blocks; None permutes all rows in each epoch.
    """

    num_data: int
    batch_size: int
    num_steps: int
    refresh: bool = False
    drop_last: bool = False
    order: RowOrder | None = None

    @classmethod
    def of(
        cls,
        num_data: int,
        batch_size: int | None,
        epochs: int | None,
        steps: int | None,
        *,
        refresh: bool = False,
        drop_last: bool = False,
        order: RowOrder | None = None,
    ) -> "Schedule":
        """Build a schedule from the arguments of a fit.

        Args:
            num_data: N.
            batch_size: rows per step; None is all.
            epochs, steps: the length of the fit; exactly one of them.
            refresh, drop_last, order: see the attributes.

        Raises:
            ValueError: if not exactly one length is given, or a batch is larger than the data.
        """
        size = num_data if batch_size is None else check_int("batch_size", batch_size)
        if size > num_data:
            raise ValueError(f"batch_size={size} is larger than the data, {num_data} rows")
        if (epochs is None) == (steps is None):
            raise ValueError(f"give exactly one of epochs and steps; got {epochs=} and {steps=}")
        if num_data - size == 1 < size and not drop_last:
            size = num_data  # one batch, which includes the single remaining row
        schedule = cls(num_data, size, 1, refresh, drop_last, order)
        if epochs is not None:
            steps = check_int("epochs", epochs) * schedule.steps_per_epoch
        num_steps = check_int("steps", steps)  # pyright: ignore[reportArgumentType]
        return replace(schedule, num_steps=num_steps)

    @property
    def remainder(self) -> int:
        """Rows of an epoch that do not fill a batch."""
        return self.num_data % self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the data."""
        smaller = self.remainder > 1 and not self.drop_last
        return self.num_data // self.batch_size + smaller

    @property
    def validation_interval(self) -> int:
        """Steps between evaluations of validation data: whole epochs of at least 25 steps."""
        return math.ceil(25 / self.steps_per_epoch) * self.steps_per_epoch

    @property
    def chunk(self) -> int:
        """Steps that use the same data without an evaluation between them."""
        return self.steps_per_epoch if self.refresh else self.validation_interval

    @property
    def full_batches(self) -> int:
        """Consecutive batches of ``batch_size`` rows, at most :attr:`chunk`."""
        if not self.remainder or self.drop_last:
            return self.chunk
        return self.num_data // self.batch_size - (self.remainder == 1)

    def batches(
        self,
        order_seed: int,
        start: int = 0,
        device: torch.device | str = "cpu",
        announce: Callable[[RowGroup], None] = lambda group: None,
    ) -> Iterator[Tensor | None]:
        """The row indices of each step from ``start`` on; None is all rows.

        The order is a new permutation in each epoch, drawn on ``device`` by a separate generator;
        that of rows that are read in blocks is on the CPU, and ``announce`` is called with the
        groups that will be drawn.
        """
        if self.order is not None:
            yield from self._ordered_batches(self.order, order_seed, start, announce)
            return
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

    def _ordered_batches(
        self,
        order: RowOrder,
        order_seed: int,
        start: int,
        announce: Callable[[RowGroup], None],
    ) -> Iterator[Tensor]:
        last = self.batch_size
        if self.remainder and not self.drop_last:
            last = self.remainder if self.remainder > 1 else self.batch_size + 1
        step = start
        while step < self.num_steps:
            epoch, done = divmod(step, self.steps_per_epoch)
            sizes = [self.batch_size] * (self.steps_per_epoch - done - 1) + [last]
            sizes = sizes[: self.num_steps - step]
            yield from order.batches(order_seed + epoch, sizes, done * self.batch_size, announce)
            step += len(sizes)

    def _split(self, order: Tensor) -> Sequence[Tensor]:
        batches = order.split(self.batch_size)[: self.steps_per_epoch]
        if self.remainder != 1 or self.drop_last:
            return batches
        return *batches[:-1], order[(len(batches) - 1) * self.batch_size :]

    def _order(self, seed: int, device: torch.device | str) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randperm(self.num_data, generator=generator, device=device)

    def num_never_drawn(self, order_seed: int, device: torch.device | str = "cpu") -> int:
        """The number of rows that are in no batch of any step, with ``drop_last``."""
        if self.order is not None:
            return self._num_left_out(self.order, order_seed)
        unused = torch.ones(self.num_data, dtype=torch.bool, device=device)
        for epoch, start in enumerate(range(0, self.num_steps, self.steps_per_epoch)):
            drawn = min(self.steps_per_epoch, self.num_steps - start) * self.batch_size
            unused[self._order(order_seed + epoch, device)[:drawn]] = False
            if not bool(unused.any()):
                return 0
        return int(unused.sum())

    def _num_left_out(self, order: RowOrder, order_seed: int) -> int:
        # The rows left out of an epoch are few, so those left out of all epochs are found from
        # them alone.
        epochs, rest = divmod(self.num_steps, self.steps_per_epoch)
        if not epochs:
            return self.num_data - rest * self.batch_size
        place = self.num_data - self.remainder
        left: set[int] = set()
        for epoch in range(epochs):
            rows = next(order.batches(order_seed + epoch, [self.remainder], place))
            left = set(rows.tolist()) if not epoch else left & set(rows.tolist())
        if rest and left:
            sizes = [self.batch_size] * rest
            for rows in order.batches(order_seed + epochs, sizes):
                left -= set(rows.tolist())
        return len(left)


def epoch_generator(
    order_seed: int, epoch: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator for the data of an epoch, independent of that of the order of its rows."""
    seeding = torch.Generator().manual_seed(order_seed + epoch)
    seed = int(torch.randint(2**62, (), generator=seeding))
    return torch.Generator(device).manual_seed(seed)
