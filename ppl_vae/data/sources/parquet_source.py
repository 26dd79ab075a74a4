"""Parquet files and folders of them as sources of rows."""

import bisect
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.data.sources.block_source import (
    PIECE_NUMBERS,
    BlockSource,
    SequentialReader,
    as_block,
)

SUFFIXES = (".parquet", ".pq")
"""Names of Parquet files end so."""
BUFFER_BYTES = 2**16
"""The number of bytes of a column that are read from the file at a time."""


def is_parquet(x: Any) -> bool:
    """Whether x is a Parquet file, a folder with such files, or a dataset of pyarrow."""
    if isinstance(x, str | Path):
        path = Path(x)
        return path.suffix.lower() in SUFFIXES or path.is_dir()
    kind = type(x)
    return kind.__module__.startswith("pyarrow._dataset") and hasattr(x, "get_fragments")


class ParquetSource(BlockSource):
    """The rows of a Parquet file, of all such files of a folder in the order of their names, or of
    a dataset of pyarrow.

    A part is a row group, which is read from its beginning.

    Args:
        x: the file, folder or dataset.
        schema: the schema of the frame that a model was fitted to, to which columns are matched by
            name.

    Warns:
        UserWarning: naming columns that the model was not fitted to, which are left out.

    Raises:
        ImportError: if pyarrow is not installed.
        TypeError: naming the columns that hold no numbers.
        ValueError: if there is no such file, or files have different columns.
    """

    sequential = True

    def __init__(self, x: Any, schema: TableSchema | None = None) -> None:
        self._parquet, self._paths = import_parquet(), parquet_paths(x)
        self._columns: list[str] = []
        self._groups: list[tuple[str, int]] = []
        sizes = []
        for path in self._paths:
            with self._open(path) as file:
                self._match(file, path, schema)
                for group in range(file.num_row_groups):
                    self._groups.append((path, group))
                    sizes.append(file.metadata.row_group(group).num_rows)
        self._groups = [group for group, size in zip(self._groups, sizes, strict=True) if size]
        self.schema = schema or TableSchema(tuple(self._columns), "pyarrow")
        super().__init__(sizes, len(self._columns))
        self._reader = SequentialReader(self._start)

    def _open(self, path: str) -> Any:
        return self._parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)

    def _match(self, file: Any, path: str, schema: TableSchema | None) -> None:
        names = _column_names(file.schema_arrow)
        if not self._columns:
            positions = None if schema is None else schema.positions(names)
            taken = names if positions is None else [names[place] for place in positions]
            self._columns = list(taken)
        if absent := [name for name in self._columns if name not in names]:
            raise ValueError(
                f"the files of x must have the same columns; {path} lacks {absent[:5]}, which "
                f"{self._paths[0]} has"
            )

    def read(self, low: int, high: int) -> Tensor:
        """Rows on the CPU; see :meth:`.BlockSource.read`."""
        return self._reader.read(low, high)

    def _start(self, low: int) -> tuple[Iterator[Tensor], int]:
        number = bisect.bisect_right(self.part_starts.tolist(), low) - 1
        return self._blocks(number), int(self.part_starts[number])

    def _blocks(self, number: int) -> Iterator[Tensor]:
        for part in range(number, len(self._groups)):
            path, group = self._groups[part]
            row = int(self.part_starts[part])
            with self._open(path) as file:
                batches = file.iter_batches(
                    max(1, PIECE_NUMBERS // self.width),
                    row_groups=[group],
                    columns=self._columns,
                    use_threads=False,
                )
                for batch in batches:
                    # A file gives its columns in an order of its own.
                    values = _values(batch.select(self._columns))
                    yield as_block(values, row, width=len(self._columns))
                    row += batch.num_rows


def _values(batch: Any) -> Any:
    # Columns of floats as an array, in less time than a frame of any types takes.
    if not {str(kind) for kind in batch.schema.types} <= {"float", "double"}:
        return batch
    columns = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
    return np.stack(columns, axis=1)


def _column_names(schema: Any) -> tuple[str, ...]:
    # Without the index that pandas stores as columns.
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    return tuple(name for name in schema.names if name not in index)


def parquet_paths(x: Any) -> list[str]:
    """The files of a source, in order.

    Raises:
        ValueError: if there are none.
    """
    if not isinstance(x, str | Path):
        found = list(x.files)
    elif Path(x).is_dir():
        parts = sorted(path for path in Path(x).rglob("*") if path.suffix.lower() in SUFFIXES)
        found = [str(path) for path in parts]
    else:
        found = [str(x)]
        if not Path(x).is_file():
            raise ValueError(f"x is the name of a file that does not exist: {str(x)!r}")
    if not found:
        raise ValueError(
            f"x is the folder {str(x)!r}, which has no Parquet files (*.parquet, *.pq); read "
            "other files by ppl_vae.read_table"
        )
    return found


def import_parquet() -> Any:
    """The module of pyarrow that reads Parquet.

    Raises:
        ImportError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            "Parquet files are read by pyarrow, which is not installed: pip install pyarrow"
        ) from error
