"""The order in which a fit draws the rows of a source: by blocks, and at random within groups."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ppl_vae.data.sources.block_source import BlockSource

GROUP_NUMBERS = 2**23
"""The number of numbers of a group of blocks, whose rows are shuffled together (32 MiB in
float32)."""


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Blocks of rows that are in memory together.

    Attributes:
        starts, stops: the numbers of the first row of each block, and of that after the last.
        seed: the seed of the order of its rows; None is that of the blocks.
    """

    starts: Int[np.ndarray, " P"]
    stops: Int[np.ndarray, " P"]
    seed: int | None = None

    @cached_property
    def offsets(self) -> Int[np.ndarray, " Q"]:
        """The places of the blocks in the group, and the number of its rows."""
        return np.concatenate([[0], np.cumsum(self.stops - self.starts)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def rows(self) -> Int[Tensor, " R"]:
        """The numbers of its rows, in the order in which they are drawn."""
        places = np.repeat(self.starts - self.offsets[:-1], self.stops - self.starts)
        rows = torch.from_numpy(places + np.arange(len(self)))
        if self.seed is None:
            return rows
        generator = torch.Generator().manual_seed(self.seed)
        return rows[torch.randperm(len(rows), generator=generator)]

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        order = np.argsort(self.starts)
        arrays = self.starts[order], self.stops[order], self.offsets[:-1][order]
        starts, stops, offsets = map(torch.from_numpy, arrays)
        return starts, stops, offsets

    def places(self, rows: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The places of rows in the group; -1 for those that are not in it."""
        starts, stops, offsets = self._sorted
        block = (torch.searchsorted(starts, rows, right=True) - 1).clamp(min=0)
        found = (rows >= starts[block]) & (rows < stops[block])
        return torch.where(found, offsets[block] + rows - starts[block], -1)


class RowOrder:
    """The order of the rows of a source in each epoch.

    The parts of the source are permuted; consecutive blocks of these form groups of limited size,
    whose rows are permuted. Both follow from a seed alone. Where the source does not allow
    another order, it is that of the source.

    Args:
        source: the source.
    """

    def __init__(self, source: BlockSource) -> None:
        self.num_rows, self.shuffled = source.num_rows, source.shuffled
        self._source = source
        self._group_rows = max(1, GROUP_NUMBERS // source.width)

    def __repr__(self) -> str:
        kind = "shuffled" if self.shuffled else "in order"
        source = self._source
        parts = hashlib.sha256(source.part_starts.tobytes()).hexdigest()[:8]
        sizes = f"blocks of {source.block_rows} rows, groups of {self._group_rows}"
        return f"{kind}, {sizes}, parts {parts}"

    def groups(self, seed: int | None) -> Iterator[RowGroup]:
        """The groups of an epoch; in the order of the source if the seed is None."""
        starts = self._source.part_starts
        parts, base = np.arange(len(starts) - 1), None
        if seed is not None and self.shuffled:
            generator = torch.Generator().manual_seed(seed)
            parts = torch.randperm(len(parts), generator=generator).numpy()
            base = int(torch.randint(2**62, (), generator=generator))
        taken: list[tuple[int, int]] = []
        size, number = 0, 0
        step = min(self._source.block_rows, self._group_rows)
        ranges = (
            self._source.blocks(int(starts[part]), int(starts[part + 1]), step) for part in parts
        )
        for low, high in chain.from_iterable(ranges):
            if taken and size + high - low > self._group_rows:
                yield _group(taken, base, number)
                taken, size, number = [], 0, number + 1
            taken.append((low, high))
            size += high - low
        yield _group(taken, base, number)

    def group_of(self, row: int) -> RowGroup:
        """The group of a row if all rows are read in the order of the source."""
        low = row // self._group_rows * self._group_rows
        high = min(low + self._group_rows, self.num_rows)
        return _group(list(self._source.blocks(low, high)), None, 0)

    def whole(self) -> RowGroup:
        """All rows as one group."""
        return _group(list(self._source.blocks()), None, 0)

    def batches(
        self,
        seed: int,
        sizes: Iterable[int],
        place: int = 0,
        announce: Callable[[RowGroup], None] = lambda group: None,
    ) -> Iterator[Int[Tensor, " B"]]:
        """The rows of consecutive batches of an epoch.

        Args:
            seed: the seed of the epoch.
            sizes: the sizes of the batches.
            place: the place in the order at which the first of them begins.
            announce: is called with each group before its first row is drawn, when the group
                before it begins.
        """
        groups = _announced(self._groups_from(seed, place), announce)
        start, left = next(groups)
        left = left[place - start :]
        for size in sizes:
            while len(left) < size:
                left = torch.cat([left, next(groups)[1]])
            yield left[:size]
            left = left[size:]

    def _groups_from(self, seed: int, place: int) -> Iterator[tuple[int, RowGroup]]:
        # The groups from that which holds a place of the order on, each with its first place.
        start = 0
        for group in self.groups(seed):
            if start + len(group) > place:
                yield start, group
            start += len(group)


def _announced(
    groups: Iterator[tuple[int, RowGroup]], announce: Callable[[RowGroup], None]
) -> Iterator[tuple[int, Tensor]]:
    following = next(groups, None)
    if following is not None:
        announce(following[1])
    while following is not None:
        (start, group), following = following, next(groups, None)
        if following is not None:
            announce(following[1])
        yield start, group.rows


def _group(blocks: list[tuple[int, int]], base: int | None, number: int) -> RowGroup:
    starts, stops = np.array(blocks, dtype=np.int64).T
    return RowGroup(starts, stops, None if base is None else base + number)
