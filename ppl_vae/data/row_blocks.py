"""Tables as blocks of rows: matrices, memory maps and iterables of blocks, missing values
included."""

import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.validation import (
    ArrayLike,
    as_mask,
    as_matrix,
    check_rows_observed,
    observed_mask,
)

RowSource: TypeAlias = Any
"""A matrix of any kind, a ``numpy.memmap``, or an iterable of matrices: blocks of rows."""

WORKING_NUMBERS = 2**23
"""How many numbers a step of the work may hold at once, beside data and result: 64 MiB of them."""

SMALLEST = 1e-60
"""Tables whose largest number is below this, or above its inverse, are worked on rescaled."""


def rows_at_once(numbers_a_row: int) -> int:
    """How many rows to work on at once, if each needs so many numbers."""
    return max(1, WORKING_NUMBERS // numbers_a_row)


@dataclass(frozen=True)
class Block:
    """Some rows of a table, in float64.

    Attributes:
        values: (B, D), zero in the missing values.
        seen: which cells are there; None if all are.
        totals: the sums of the columns, (D,).
        resolution: the relative spacing of the numbers as they came.
    """

    values: Float[Tensor, "B D"]
    seen: Bool[Tensor, "B D"] | None
    totals: Float[Tensor, " D"]
    resolution: float

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "B D"],
        mask: ArrayLike | None,
        device: Any,
        name: str = "x",
        unit: float = 1.0,
    ) -> "Block":
        """The rows of x, divided by ``unit``.

        Raises:
            ValueError: if x has infinite entries.
        """
        values = x.detach().to(device=device, dtype=torch.float64)
        values = values if unit == 1 else values / unit
        resolution = torch.finfo(x.dtype).eps
        totals = values.sum(0)
        if mask is None and bool(totals.isfinite().all()):
            return cls(values, None, totals, resolution)
        as_matrix(values, name=name)
        seen = observed_mask(values, mask, name=name)
        if seen is not None:
            values = torch.where(seen, values, 0.0)
        return cls(values, seen, values.sum(0), resolution)

    @classmethod
    def joined(cls, blocks: "list[Block]") -> "Block":
        """Several blocks as one."""
        if len(blocks) == 1:
            return blocks[0]
        complete = all(block.seen is None for block in blocks)
        seen = [torch.ones_like(b.values).bool() if b.seen is None else b.seen for b in blocks]
        return cls(
            torch.cat([block.values for block in blocks]),
            None if complete else torch.cat(seen),
            torch.stack([block.totals for block in blocks]).sum(0),
            max(block.resolution for block in blocks),
        )


class RowBlocks:
    """A table of any size, read block by block in float64, as often as asked.

    A memory map is read in pieces, of which none stays in memory; so is any iterable that starts
    anew each time it is iterated over (a list of arrays, an object with ``__iter__``). A generator
    can be read once: enough for complete data, too little for data with missing values.

    Args:
        x: the table; NaN marks a missing value.
        mask: True where observed, of the shape of a matrix or memory map; blocks of an iterable
            mark missing values with NaN.
        device: of the blocks; x's own by default.
        rescale: whether blocks are divided by a power of two where the squares of x would leave
            the range of float64, which changes no digit.

    Attributes:
        dtype: of the numbers as they came, the finest of those read so far.
        unit: by what blocks are divided, 1 for all usual tables; known once a block was read.

    Raises:
        TypeError, ValueError: as :func:`~ppl_vae.core.validation.as_matrix`; if a mask is given
            for an iterable.
    """

    def __init__(
        self,
        x: RowSource,
        mask: ArrayLike | None = None,
        *,
        device: torch.device | None = None,
        rescale: bool = False,
    ) -> None:
        self._source, self._mask, self._device = x, mask, device
        self._read, self.dtype = False, torch.float16
        self.unit, self._unit_known = 1.0, not rescale
        if isinstance(x, np.memmap):
            if x.ndim != 2:
                raise ValueError(f"x must be 2-d, one flat row a datum; it has shape {x.shape}")
            if mask is not None and np.shape(mask) != x.shape:
                as_mask(mask, x.shape)
        elif _is_matrix(x):
            self._source = x = as_matrix(x, check_finite=False)
            self._mask = None if mask is None else as_mask(mask, tuple(x.shape))
        elif mask is not None:
            raise ValueError(
                "mask goes with a matrix or a memory map; blocks of an iterable mark missing "
                "values by NaN"
            )

    def read(self, numbers_a_row: int | None = None) -> Iterator[Block]:
        """The rows in order, in blocks small enough for so many working numbers per row (or 3 D).

        Raises:
            ValueError: if there are no blocks, or of several widths; if a row has nothing
                observed; if x is an iterator that has been read before.
        """
        width, start = None, 0
        for name, x, mask in self._pieces(numbers_a_row):
            width, self.dtype = width or x.shape[1], torch.promote_types(self.dtype, x.dtype)
            if x.shape[1] != width:
                raise ValueError(
                    f"the blocks of x must have one width; {name} has {x.shape[1]} columns, "
                    f"those before it {width}"
                )
            if not self._unit_known:
                self.unit, self._unit_known = _unit_of(x, mask), True
            size = rows_at_once(numbers_a_row or 3 * width)
            for low in range(0, len(x), size):
                rows = slice(low, low + size)
                part = None if mask is None else mask[rows]
                try:
                    block = Block.of(x[rows], part, self._device, name, self.unit)
                except ValueError:
                    as_matrix(x, name=name)  # counts the infinite entries of all of x
                    raise
                if block.seen is not None:
                    check_rows_observed(block.seen, first=start)
                start += len(block.values)
                yield block
        if width is None:
            raise ValueError(
                "x holds no blocks of rows; an iterator that was read before, as by PPCA.like, is "
                "empty: give a list of blocks, or an object whose __iter__ starts anew"
            )

    def _pieces(self, numbers_a_row: int | None) -> Iterator[tuple[str, Tensor, Any]]:
        x = self._source
        if isinstance(x, Tensor):
            yield "x", x, self._mask
        elif isinstance(x, np.memmap):
            yield from self._mapped(x, rows_at_once(numbers_a_row or 3 * x.shape[1]))
        else:
            for number, block in enumerate(self._anew(x)):
                name = f"block {number} of x"
                yield name, as_matrix(block, name=name, check_finite=False), None

    def _mapped(self, x: np.memmap, size: int) -> Iterator[tuple[str, Tensor, Any]]:
        if not x.size:
            raise ValueError(f"x is empty: its shape is {x.shape}")
        for low in range(0, len(x), size):
            rows = slice(low, low + size)
            name = f"x (its rows from {low} on)"
            mask = None if self._mask is None else np.array(self._mask[rows])
            yield name, as_matrix(np.array(x[rows]), name=name, check_finite=False), mask
            for mapped in (x, self._mask):
                _release(mapped)

    def _anew(self, x: Iterable[Any]) -> Iterator[Any]:
        blocks = iter(x)
        if blocks is x and self._read:
            raise ValueError(
                "x is an iterator, which can be read once, and with missing values it is read in "
                "each iteration; give a list of blocks, or an object whose __iter__ starts anew"
            )
        self._read = True
        return blocks


def _unit_of(x: Float[Tensor, "B D"], mask: ArrayLike | None) -> float:
    # The power of two next to the largest number, if squares of such numbers, summed over many
    # rows, could overflow or lose digits; else 1.
    values = x.detach()
    if mask is None and bool((ends := torch.stack(values.aminmax())).isfinite().all()):
        largest = float(ends.abs().max())  # one pass, where nothing is missing
    else:
        sizes = values.double().abs()
        if mask is not None:
            sizes = torch.where(torch.as_tensor(mask, device=sizes.device), sizes, 0.0)
        largest = float(sizes.where(sizes.isfinite(), 0.0).max())
    if largest == 0 or SMALLEST < largest < 1 / SMALLEST:
        return 1.0
    return math.ldexp(1.0, max(min(math.frexp(largest)[1], 1000), -1000))


def _is_matrix(x: Any) -> bool:
    if isinstance(x, list | tuple):  # of rows; or of blocks
        return not (x and getattr(x[0], "ndim", 0) == 2)
    known = isinstance(x, Tensor) or hasattr(x, "select_dtypes") or hasattr(x, "__array__")
    return known or not isinstance(x, Iterable)


def _release(mapped: Any) -> None:
    # What was read of a map stays resident until the system wants the memory back. The pages of a
    # copy-on-write map hold what the user has changed: they stay.
    owner: Any = mapped
    if isinstance(mapped, np.memmap) and mapped.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        owner._mmap.madvise(mmap.MADV_DONTNEED)
