"""Tables that are read in blocks of consecutive rows, since they may be larger than memory."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.validation import HALF_DTYPES, ArrayLike, as_matrix

BLOCK_NUMBERS = 2**18
"""The number of numbers of a block (1 MiB in float32)."""
SEQUENTIAL_NUMBERS = 2**21
"""The same for blocks of parts that must be read from their beginning."""
PIECE_NUMBERS = 2**17
"""The number of numbers of such blocks that are decoded and copied at a time (1 MiB in float64).
Each piece needs several temporary arrays, whose memory the C library keeps for a while."""


class BlockSource(ABC):
    """Abstract: a table whose rows are read in blocks.

    The rows are those of consecutive parts (the row groups of a file, the blocks of a list). A
    part can be read without those before it.

    Args:
        part_rows: the number of rows of each part.
        width: the number of columns, D.

    Attributes:
        num_rows: N.
        width: D.
        part_starts: the number of the first row of each part, and N.
        schema: the names of the columns, where they have names.
        sequential: whether a part must be read from its beginning.
        is_divided: whether blocks must not contain rows of two parts.
        shuffled: whether the rows may be drawn in another order than that of the source.
        repeatable: whether each reading gives the same rows.
        threaded: whether rows may be read in another thread.
        batch_size, drop_last: the batches that the user's source states.
        has_labels: whether labels came with the rows.

    Raises:
        ValueError: if the table is empty.
    """

    schema: TableSchema | None = None
    sequential = False
    is_divided = True
    shuffled = True
    repeatable = True
    threaded = True
    batch_size: int | None = None
    drop_last = False
    has_labels = False

    def __init__(self, part_rows: Sequence[int] | np.ndarray, width: int) -> None:
        sizes = np.asarray(part_rows, dtype=np.int64)
        self.part_starts = np.concatenate([[0], np.cumsum(sizes[sizes > 0])]).astype(np.int64)
        self.num_rows, self.width = int(self.part_starts[-1]), width
        if not self.num_rows * width:
            raise ValueError(f"x is empty: its shape is {(self.num_rows, width)}")

    @abstractmethod
    def read(self, low: int, high: int) -> Float[Tensor, "B D"]:
        """Rows on the CPU, of one part if the source is divided; NaN marks a missing value.

        Args:
            low, high: the numbers of the first row and of that after the last.
        """

    def release(self) -> None:
        """Release memory that belongs to what was read, if there is any beside the rows."""
        return

    @property
    def block_rows(self) -> int:
        """The largest number of rows of a block."""
        numbers = SEQUENTIAL_NUMBERS if self.sequential else BLOCK_NUMBERS
        return max(1, numbers // self.width)

    def blocks(
        self, low: int = 0, high: int | None = None, size: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Consecutive blocks of limited size.

        Args:
            low, high: the numbers of the first row and of that after the last; by default all.
            size: the largest number of rows of a block; by default :attr:`block_rows`.

        Yields:
            The number of the first row of a block, and that after its last.
        """
        high, size = self.num_rows if high is None else high, size or self.block_rows
        cuts = [low, high]
        if self.is_divided:
            first, last = np.searchsorted(self.part_starts, [low, high - 1], "right")
            cuts = [low, *self.part_starts[first:last].tolist(), high]
        for begin, end in pairwise(cuts):
            for start in range(begin, end, size):
                yield start, min(start + size, end)

    def notes(self) -> tuple[str, ...]:
        """Notes on what of the source is not used."""
        return ("labels that came with the rows of x were not used",) * self.has_labels


def uniform_parts(num_rows: int, size: int) -> np.ndarray:
    """The sizes of consecutive parts of ``size`` rows, the last of which may be smaller."""
    return np.diff(np.append(np.arange(0, num_rows, size), num_rows))


def as_block(
    values: ArrayLike,
    low: int,
    *,
    mask: ArrayLike | None = None,
    schema: TableSchema | None = None,
    width: int | None = None,
) -> Float[Tensor, "B D"]:
    """Rows of a source as a matrix; NaN marks a missing value.

    Args:
        values: a matrix of any kind.
        low: the number of its first row.
        mask: True where observed.
        schema: the schema of the frame that a model was fitted to.
        width: the number of columns of the rows before it.

    Raises:
        TypeError, ValueError: as :func:`~ppl_vae.core.validation.as_matrix`; if the width is
            another one.
    """
    if low and str(getattr(values, "dtype", "")).removeprefix("torch.") in _HALF:
        values = torch.as_tensor(values).float()  # a warning came with the first block
    name = f"x (its rows from {low} on)" if low else "x"
    block = as_matrix(values, name=name, mask=mask, schema=schema, check_finite=False)
    if width not in (None, block.shape[1]):
        raise ValueError(
            f"the rows of x must have the same number of columns; those from row {low} on have "
            f"{block.shape[1]}, those before them {width}"
        )
    return block.cpu()


_HALF = {str(dtype).removeprefix("torch.") for dtype in HALF_DTYPES}


class SequentialReader:
    """Consecutive rows from an iterator of blocks, which starts again only if it must.

    Args:
        start: a function of a row's number; returns an iterator of blocks, and the number of its
            first row, which is at most the row that is asked for.
    """

    def __init__(self, start: Callable[[int], tuple[Iterator[Tensor], int]]) -> None:
        self._start = start
        self._blocks: Iterator[Tensor] = iter(())
        self._row = -1
        self._left: Tensor | None = None

    def read(self, low: int, high: int) -> Float[Tensor, "B D"]:
        """The rows from ``low`` to ``high``.

        Raises:
            ValueError: if the iterator ends before.
        """
        if low != self._row:
            self._blocks, self._row = self._start(low)
            self._left = None
            self._take(low - self._row)
        taken = self._take(high - low)
        if self._row != high:
            last, self._row = self._row, -1
            raise ValueError(
                f"x ended after {last} rows, but had more when it was first read; a source must "
                "give the same number of rows each time"
            )
        return taken[0] if len(taken) == 1 else torch.cat(taken)

    def _take(self, number: int) -> list[Tensor]:
        taken: list[Tensor] = []
        while number > 0:
            block = next(self._blocks, None) if self._left is None else self._left
            if block is None:
                break
            rows, self._left = block[:number], None
            if len(rows) < len(block):
                self._left = block[number:]
            taken.append(rows)
            number, self._row = number - len(rows), self._row + len(rows)
        return taken


def rows_of(source: Any, low: int, high: int) -> Any:
    """Rows of an array or a frame of any library, by their places."""
    if hasattr(source, "iloc"):
        return source.iloc[low:high]
    if hasattr(source, "slice") and hasattr(source, "column_names"):  # pyarrow
        return source.slice(low, high - low)
    return source[low:high]


def as_host_array(values: Any) -> np.ndarray:
    """An array, or a tensor of any device, as an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
