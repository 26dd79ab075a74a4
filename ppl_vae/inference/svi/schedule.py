"""The schedule of a stochastic fit: how many steps, and which rows each of them uses."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppl_vae.core.validation import check_int


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
    """

    num_data: int
    batch_size: int
    num_steps: int
    refresh: bool = False
    drop_last: bool = False

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
    ) -> "Schedule":
        """Build a schedule from the arguments of a fit.

        Args:
            num_data: N.
            batch_size: rows per step; None is all.
            epochs, steps: the length of the fit; exactly one of them.
            refresh, drop_last: see the attributes.

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
        schedule = cls(num_data, size, 1, refresh, drop_last)
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
        self, order_seed: int, start: int = 0, device: torch.device | str = "cpu"
    ) -> Iterator[Tensor | None]:
        """The row indices of each step from ``start`` on; None is all rows.

        The order is a new permutation in each epoch, drawn on ``device`` by a separate generator.
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
        if self.remainder != 1 or self.drop_last:
            return batches
        return *batches[:-1], order[(len(batches) - 1) * self.batch_size :]

    def _order(self, seed: int, device: torch.device | str) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randperm(self.num_data, generator=generator, device=device)

    def num_never_drawn(self, order_seed: int, device: torch.device | str = "cpu") -> int:
        """The number of rows that are in no batch of any step, with ``drop_last``."""
        unused = torch.ones(self.num_data, dtype=torch.bool, device=device)
        for epoch, start in enumerate(range(0, self.num_steps, self.steps_per_epoch)):
            drawn = min(self.steps_per_epoch, self.num_steps - start) * self.batch_size
            unused[self._order(order_seed + epoch, device)[:drawn]] = False
            if not bool(unused.any()):
                return 0
        return int(unused.sum())


def epoch_generator(
    order_seed: int, epoch: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator for the data of an epoch, independent of that of the order of its rows."""
    seeding = torch.Generator().manual_seed(order_seed + epoch)
    seed = int(torch.randint(2**62, (), generator=seeding))
    return torch.Generator(device).manual_seed(seed)
