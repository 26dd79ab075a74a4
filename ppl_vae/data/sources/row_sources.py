"""Which data are read in blocks, and by which source."""

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ppl_vae.core.arrays.frames import read_frame
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.validation import ArrayLike, is_block_list
from ppl_vae.data.sources.array_source import (
    ArraySource,
    IterableSource,
    ListSource,
    matrix_blocks,
)
from ppl_vae.data.sources.block_source import BlockSource
from ppl_vae.data.sources.dataset_source import dataset_source, loader_source
from ppl_vae.data.sources.parquet_source import ParquetSource, is_parquet


def row_source(
    x: Any,
    mask: ArrayLike | None = None,
    *,
    schema: TableSchema | None = None,
    name: str = "x",
) -> BlockSource | None:
    """The source that reads x in blocks; None if x is a matrix in memory.

    Args:
        x: a memory map; a Parquet file, a folder of them, or a dataset of pyarrow; a list of
            blocks of rows; a ``Dataset`` or ``DataLoader`` of torch; an iterable of blocks that
            restarts each time it is iterated over; or anything else.
        mask: True where observed; for memory maps and lists of blocks.
        schema: the schema of the frame that a model was fitted to.
        name: the name of x in messages.

    Raises:
        ValueError: if a mask is given for another source; if x is an iterator, which can be read
            only once.
        TypeError, ValueError: as the sources.
    """
    try:
        return _row_source(x, mask, schema)
    except (TypeError, ValueError) as error:
        if name == "x":
            raise
        raise type(error)(f"{name}: {error}") from error


def _row_source(x: Any, mask: ArrayLike | None, schema: TableSchema | None) -> BlockSource | None:
    if isinstance(x, np.memmap):
        return ArraySource(x, mask)
    if is_block_list(x):
        return ListSource(x, mask, schema)
    source = None
    if isinstance(x, BlockSource):
        source = x
    elif is_parquet(x):
        source = ParquetSource(x, schema)
    elif isinstance(x, DataLoader):
        source = loader_source(x)
    elif isinstance(x, Dataset):
        source = dataset_source(x)
    elif not is_matrix(x):
        source = _iterable_source(x, schema)
    if source is not None and mask is not None:
        refuse_mask()
    return source


def _iterable_source(x: Iterable[Any], schema: TableSchema | None) -> IterableSource:
    refuse_iterator(x)
    schema = schema or TableSchema.of(next(iter(x), None))
    return IterableSource(lambda: matrix_blocks(x, schema), schema)


def is_source(x: Any) -> bool:
    """Whether x is not in memory, but read in blocks: a memory map, Parquet files, a dataset."""
    return isinstance(x, BlockSource | np.memmap | DataLoader | Dataset) or is_parquet(x)


def is_matrix(x: Any) -> bool:
    """Whether x is a matrix, of any kind, rather than blocks of one."""
    if isinstance(x, list | tuple):  # of rows; or of blocks
        return not is_block_list(x)
    if isinstance(x, str | bytes | Mapping | Set):
        return True
    known = isinstance(x, Tensor) or hasattr(x, "toarray") or hasattr(x, "__array__")
    return known or not isinstance(x, Iterable) or read_frame(x) is not None


def refuse_iterator(x: Iterable[Any]) -> None:
    """Refuse what can be iterated over only once.

    Raises:
        ValueError: stating what to pass instead.
    """
    if isinstance(x, Iterator) or iter(x) is iter(x):
        raise ValueError(
            "x is an iterator, which can be read only once, but its rows are read several times; "
            "give a list of blocks, or an object whose __iter__ restarts"
        )


def refuse_mask() -> None:
    """Refuse a mask of blocks.

    Raises:
        ValueError: stating how blocks mark missing values.
    """
    raise ValueError(
        "mask requires a matrix or a memory map; blocks of an iterable mark missing values by "
        "NaN, and a Dataset or DataLoader may yield (rows, mask)"
    )
