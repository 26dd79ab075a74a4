"""Memory maps, arrays, and lists and iterables of blocks as sources of rows."""

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.validation import ArrayLike, as_mask
from ppl_vae.data.sources.block_source import (
    BLOCK_NUMBERS,
    BlockSource,
    SequentialReader,
    as_block,
    as_host_array,
    rows_of,
    uniform_parts,
)


class ArraySource(BlockSource):
    """A memory map, or an array or tensor in memory.

    Pages of a memory map are released after use.

    Args:
        x: the table, (N, D).
        mask: True where observed, of x's shape.

    Raises:
        ValueError: if x is not 2-d or empty; if the mask has another shape.
    """

    is_divided = False

    def __init__(self, x: np.ndarray | Tensor, mask: ArrayLike | None = None) -> None:
        if x.ndim != 2:
            shape = tuple(x.shape)
            raise ValueError(f"x must be 2-d, one flat row per datum; it has shape {shape}")
        size = max(1, BLOCK_NUMBERS // max(1, x.shape[1]))
        super().__init__(uniform_parts(x.shape[0], size), x.shape[1])
        self._x, self._mask = x, mask
        if mask is not None and not isinstance(mask, np.ndarray):
            self._mask = as_mask(mask, tuple(x.shape)).cpu().numpy()
        elif mask is not None and mask.shape != tuple(x.shape):
            as_mask(mask, tuple(x.shape))

    def read(self, low: int, high: int) -> Tensor:
        """Rows on the CPU; see :meth:`.BlockSource.read`."""
        values, mask = self._x[low:high], self._mask
        if isinstance(values, np.ndarray):
            values = np.array(values)  # a copy, of which no page is the map's
        return as_block(values, low, mask=None if mask is None else np.array(mask[low:high]))

    def release(self) -> None:
        """Release the pages of memory maps that were read."""
        for mapped in (self._x, self._mask):
            release_pages(mapped)


class ListSource(BlockSource):
    """A list of blocks of rows: arrays, memory maps, tensors or frames.

    Args:
        blocks: the blocks, each with a shape.
        mask: True where observed, for all rows; or a list of masks, one per block.
        schema: the schema of the frame that a model was fitted to.

    Raises:
        ValueError: if the blocks have different widths.
    """

    def __init__(
        self,
        blocks: Sequence[Any],
        mask: ArrayLike | None = None,
        schema: TableSchema | None = None,
    ) -> None:
        self._blocks, self.schema = list(blocks), schema or TableSchema.of(blocks)
        shapes = [tuple(block.shape) for block in blocks]
        width = shapes[0][1] if self.schema is None else len(self.schema.names)
        widths = {shape[1] for shape in shapes}
        if self.schema is None and len(widths) > 1:
            raise ValueError(
                f"the blocks of x must have the same width; they have {sorted(widths)} columns"
            )
        super().__init__([shape[0] for shape in shapes], width)
        self._blocks = [block for block in self._blocks if block.shape[0]]
        if isinstance(mask, list | tuple):
            mask = torch.cat([torch.as_tensor(as_host_array(part)) for part in mask])
        shape = (self.num_rows, width)
        self._mask = None if mask is None else as_mask(mask, shape, schema=self.schema).cpu()

    def read(self, low: int, high: int) -> Tensor:
        """Rows on the CPU; see :meth:`.BlockSource.read`."""
        number = int(np.searchsorted(self.part_starts, low, "right")) - 1
        start = int(self.part_starts[number])
        values = rows_of(self._blocks[number], low - start, high - start)
        if isinstance(values, np.memmap):
            values = np.array(values)
        mask = None if self._mask is None else self._mask[low:high]
        return as_block(values, low, mask=mask, schema=self.schema, width=self.width)

    def release(self) -> None:
        """Release the pages of memory maps that were read."""
        for block in self._blocks:
            release_pages(block)


class IterableSource(BlockSource):
    """An iterable that gives rows each time it is iterated over, in an order of its own.

    It is read once when it is opened, to count the rows.

    Args:
        start: makes an iterator of blocks from the first row on.
        schema: the names of the columns, where they have names.

    Raises:
        ValueError: if it has no rows, or rows of different widths.
    """

    sequential, shuffled, threaded = True, False, False

    def __init__(
        self, start: Callable[[], Iterator[Tensor]], schema: TableSchema | None = None
    ) -> None:
        num_rows, width, first = 0, 0, None
        for block in start():
            first = block if first is None else first
            num_rows, width = num_rows + len(block), block.shape[1]
        super().__init__([num_rows], width)
        self._reader = SequentialReader(lambda row: (start(), 0))
        self.schema = schema
        assert first is not None
        self.repeatable = same_rows(first, self.read(0, len(first)))

    def read(self, low: int, high: int) -> Tensor:
        """Rows on the CPU; see :meth:`.BlockSource.read`."""
        return self._reader.read(low, high)


def same_rows(first: Tensor, second: Tensor) -> bool:
    """Whether two readings gave the same numbers."""
    return first.shape == second.shape and torch.equal(
        first.nan_to_num(nan=0.5), second.nan_to_num(nan=0.5)
    )


def matrix_blocks(x: Iterable[Any], schema: TableSchema | None) -> Iterator[Tensor]:
    """The blocks of an iterable of matrices, as tensors."""
    low, width = 0, None
    for block in x:
        schema = schema or TableSchema.of(block)
        rows = as_block(block, low, schema=schema, width=width)
        low, width = low + len(rows), rows.shape[1]
        yield rows


def release_pages(mapped: Any) -> None:
    """Release the pages of a memory map, which stay resident until the system reclaims them.

    Those of a copy-on-write map hold changes of the user, and are kept.
    """
    if isinstance(mapped, np.memmap) and mapped.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        owner: Any = mapped
        owner._mmap.madvise(mmap.MADV_DONTNEED)
