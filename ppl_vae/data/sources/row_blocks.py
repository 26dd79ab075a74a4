"""Tables read in blocks of rows: matrices, memory maps and iterables of blocks.

NaN or a mask marks missing values.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_vae.core.arrays.magnitude import MAX_MAGNITUDE, check_magnitude
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.processes.ranks import SINGLE, Processes
from ppl_vae.core.text import counted
from ppl_vae.core.validation import (
    ArrayLike,
    as_matrix,
    is_block_list,
    observed_mask,
)
from ppl_vae.data.sources.block_source import BlockSource
from ppl_vae.data.sources.row_pieces import is_copy, to_float64
from ppl_vae.data.sources.row_sources import is_matrix, is_source, refuse_mask, row_source
from ppl_vae.data.sources.table_unit import unit_of

RowSource: TypeAlias = Any
"""A matrix of any kind, an iterable of matrices, which are blocks of rows, or what
:func:`~ppl_vae.data.sources.row_sources.row_source` reads in blocks: a ``numpy.memmap``, Parquet
files, a ``Dataset`` or ``DataLoader`` of torch."""

WORKING_FLOATS = 2**23
"""Number of floats that a computation may hold at once in addition to data and result (64 MiB)."""


def rows_per_block(floats_per_row: int) -> int:
    """Number of rows to process at once, given the floats that each row needs."""
    return max(1, WORKING_FLOATS // floats_per_row)


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Some rows of a table, in float64.

    Attributes:
        values: (B, D), zero in the missing values.
        observed: which entries are observed; None if all are.
        totals: the sums of the columns, (D,).
        resolution: machine epsilon of the dtype in which the data were given.
    """

    values: Float[Tensor, "B D"]
    observed: Bool[Tensor, "B D"] | None
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
        memory: Tensor | None = None,
    ) -> "RowBlock":
        """Make a block of the rows of x, divided by ``unit``; ``memory`` may hold its values.

        Raises:
            ValueError: if x has infinite entries.
        """
        values, totals = to_float64(x, device, unit, memory)
        resolution = torch.finfo(x.dtype).eps
        if mask is None and bool((totals.abs() <= MAX_MAGNITUDE).all()):
            return cls(values, None, totals, resolution)
        values = as_matrix(values, name=name, mask=mask)
        observed = observed_mask(values)
        if observed is not None:
            values = torch.where(observed, values, 0.0)
        totals = values.sum(0)
        if not bool((totals.abs() <= MAX_MAGNITUDE).all()):
            check_magnitude(values, name=name)
        return cls(values, observed, totals, resolution)

    def without_empty_rows(self) -> tuple["RowBlock", Int[Tensor, " E"]]:
        """The rows with an observed entry, and the numbers of the others."""
        if self.observed is None or bool((some := self.observed.any(1)).all()):
            return self, torch.empty(0, dtype=torch.int64)
        values, observed = self.values[some], self.observed[some]
        complete = bool(observed.all())
        observed = None if complete else observed
        kept = RowBlock(values, observed, values.sum(0), self.resolution)
        return kept, (~some).nonzero().flatten()

    @classmethod
    def concatenate(cls, blocks: "list[RowBlock]") -> "RowBlock":
        """Concatenate blocks into one."""
        if len(blocks) == 1:
            return blocks[0]
        complete = all(block.observed is None for block in blocks)
        observed = [
            torch.ones_like(block.values).bool() if block.observed is None else block.observed
            for block in blocks
        ]
        return cls(
            torch.cat([block.values for block in blocks]),
            None if complete else torch.cat(observed),
            torch.stack([block.totals for block in blocks]).sum(0),
            max(block.resolution for block in blocks),
        )


class RowBlocks:
    """A table of any size, read block by block in float64, as often as needed.

    Rows with nothing observed, on which no likelihood depends, are left out, and counted.

    A memory map is read in pieces that are released after use; so are Parquet files, datasets and
    data loaders of torch, and any iterable that restarts each time it is iterated over (a list of
    arrays, an object with ``__iter__``). A generator can be read only once, which is enough for
    complete data but not with missing values.

    Args:
        x: the table; NaN marks a missing value.
        mask: True where observed, of the shape of a matrix or memory map; blocks of an iterable
            mark missing values with NaN.
        device: device of the blocks; that of x by default.
        rescale: whether blocks are divided by a power of two, which is exact, if the squares of x
            would leave the range of float64.
        schema: the schema of the frame that a model was fitted to, to which columns of frames are
            matched.
        keep_empty_rows: whether rows with nothing observed are kept.
        processes: among which the rows of the whole table are divided; x holds those of this one,
            which may be none.

    Attributes:
        width: the number of columns; known once a block was read, or None.
        empty_rows: the numbers of the rows that the last reading left out.
        schema: the given one, or else that of the frame that was read.
        dtype: the finest dtype of the data read so far.
        unit: the divisor of the blocks, 1 for all usual tables; known once a block was read.

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
        schema: TableSchema | None = None,
        keep_empty_rows: bool = False,
        processes: Processes = SINGLE,
    ) -> None:
        self.processes, self._may_be_empty = processes, processes.size > 1
        self.width: int | None = None
        self.schema = TableSchema.of(x) if schema is None else schema
        self._keep_empty_rows = keep_empty_rows
        self.empty_rows: list[int] = []
        self._source: Any = x
        self._device = device
        self._read, self.dtype = False, torch.float16
        self.unit, self._unit_known = 1.0, not rescale
        self._only: RowBlock | None = None
        has_rows = not (self._may_be_empty and _is_empty(x))
        readable = is_source(x) and has_rows
        source = row_source(x, mask, schema=self.schema) if readable else None
        if source is not None:
            self._source, self.schema = source, self.schema or source.schema
        elif is_matrix(x) or not has_rows or (is_block_list(x) and mask is not None):
            self._source = as_matrix(
                x, mask=mask, schema=self.schema, check_finite=False, allow_no_rows=not has_rows
            )
        elif mask is not None:
            refuse_mask()

    def read(self, floats_per_row: int | None = None, *, keep: bool = True) -> Iterator[RowBlock]:
        """Iterate over the rows in order, in blocks of limited size; one alone is made once.

        Args:
            floats_per_row: number of floats that the computation needs per row, 3 D by default.
            keep: whether blocks may be kept; else those of D rows or more share their memory.

        Raises:
            ValueError: if there are no blocks, or blocks of different widths; if nothing at all
                is observed; if x is an iterator that has been read before.
        """
        if self._only is not None and self._is_one_block(floats_per_row):
            yield self._only
            return
        width, start, self.empty_rows, memory = None, 0, [], None
        for name, x in self._pieces(floats_per_row):
            width, self.dtype = width or x.shape[1], torch.promote_types(self.dtype, x.dtype)
            self.width = width
            if x.shape[1] != width:
                raise ValueError(
                    f"the blocks of x must have the same width; {name} has {x.shape[1]} columns, "
                    f"those before it {width}"
                )
            if not self._unit_known and len(x):
                self.unit, self._unit_known = unit_of(x), True
            size = rows_per_block(floats_per_row or 3 * width)
            for low in range(0, len(x), size):
                rows = slice(low, low + size)
                block = self._block(x, rows, name, memory)
                num_rows = len(block.values)
                if not keep and num_rows >= width and is_copy(block.values, x[rows]):
                    memory = block.values
                if not self._keep_empty_rows:
                    block, empty = block.without_empty_rows()
                    self.empty_rows += [start + row for row in empty.tolist()]
                start += num_rows
                if len(block.values):
                    self._only = block if self._is_one_block(floats_per_row) else None
                    yield block
        if self._may_be_empty:
            return
        if width is None:
            raise ValueError(
                "x has no blocks of rows; an iterator that was read before, as by PPCA.like, is "
                "empty: give a list of blocks, or an object whose __iter__ restarts"
            )
        if len(self.empty_rows) == start:
            raise ValueError(f"x has no observed value in any of its {counted(start, 'row')}")

    def _block(self, x: Tensor, rows: slice, name: str, memory: Tensor | None) -> RowBlock:
        place = None if len(x[rows]) < x.shape[1] else memory
        try:
            return RowBlock.of(x[rows], None, self._device, name, self.unit, place)
        except ValueError:
            as_matrix(x, name=name)  # counts the infinite entries of all of x
            raise

    def notes(self) -> tuple[str, ...]:
        """A note on the rows that the last reading left out, if any, on each process."""
        texts = self.processes.gather_text("\n".join(empty_rows_dropped_note(self.empty_rows)))
        if self.processes.size == 1:
            return tuple(filter(None, texts))
        return tuple(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)

    @property
    def device(self) -> torch.device | None:
        """The device of the blocks, as given or that of a tensor x; None if x decides it later."""
        given = self._source.device if isinstance(self._source, Tensor) else None
        return torch.device(self._device) if self._device is not None else given

    @property
    def num_rows(self) -> int | None:
        """The number of rows if it is known before they are read."""
        if isinstance(self._source, BlockSource):
            return self._source.num_rows
        return len(self._source) if isinstance(self._source, Tensor) else None

    def agree(self) -> int:
        """Check that all processes have the same columns and dtype; returns the number of columns.

        Raises:
            ValueError: naming the rank that has others; if no process has any.
        """
        found: dict[str, Any] = {} if self.schema is None else {"names": self.schema.names}
        if self.width is not None:  # else this process has no block
            found |= {"columns": self.width, "dtype": self.dtype}
        known = self.processes.agree("x", **found)
        if "columns" not in known:
            raise ValueError("x has no blocks of rows on any process")
        self.width = int(known["columns"])
        self.dtype = getattr(torch, known["dtype"].removeprefix("torch."))
        return self.width

    def common_unit(self) -> float:
        """The largest unit of a process that has rows."""
        own = self.unit if self._unit_known else 0.0
        found = max(map(float, self.processes.gather(torch.tensor([own], dtype=torch.float64))))
        return found or self.unit

    def use_unit(self, unit: float) -> None:
        """Divide blocks by a given unit from the next reading on."""
        self.unit, self._unit_known, self._only = unit, True, None

    def _is_one_block(self, floats_per_row: int | None) -> bool:
        x = self._source
        return isinstance(x, Tensor) and len(x) <= rows_per_block(floats_per_row or 3 * x.shape[1])

    def _pieces(self, floats_per_row: int | None) -> Iterator[tuple[str, Tensor]]:
        x = self._source
        if isinstance(x, Tensor):
            yield "x", x
        elif isinstance(x, BlockSource):
            for low, high in x.blocks(size=rows_per_block(floats_per_row or 3 * x.width)):
                yield f"x (its rows from {low} on)", x.read(low, high)
                x.release()
        else:
            for number, block in enumerate(self._restart(x)):
                name = f"block {number} of x"
                schema = self.schema = self.schema or TableSchema.of(block)
                yield name, as_matrix(block, name=name, schema=schema, check_finite=False)

    def _restart(self, x: Iterable[Any]) -> Iterator[Any]:
        blocks = iter(x)
        if blocks is x and self._read:
            raise ValueError(
                "x is an iterator, which can be read only once, but missing values require "
                "reading it in each iteration; give a list of blocks, or an object whose __iter__ "
                "restarts"
            )
        self._read = True
        return blocks


def _is_empty(x: Any) -> bool:
    return tuple(getattr(x, "shape", ()))[:1] == (0,)


def empty_rows_dropped_note(rows: Sequence[int]) -> tuple[str, ...]:
    """A note on rows with nothing observed that were left out; empty if there are none."""
    if not rows:
        return ()
    listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    verb = "was" if len(rows) == 1 else "were"
    return (f"{counted(len(rows), 'row')} with nothing observed {verb} left out: {listed}",)
