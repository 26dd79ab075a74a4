"""Tables in files with types of their own: Parquet, Feather and annotated data (.h5ad)."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pandas as pd

from ppl_vae.data.files.column_names import distinct_names
from ppl_vae.data.files.file_content import check_file, check_size, named_damage, quoted
from ppl_vae.data.files.raw_table import HALF_PRECISION, RawTable
from ppl_vae.data.files.text_tables import strip_cells

FLOAT_BYTES = 8
"""The size of a value in a table that is read."""


def parquet_table(path: Path, max_bytes: int) -> RawTable:
    """The table of a Parquet file; the index of pandas, if any, has the row names.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is not such a file, or too large; if a column has neither numbers,
            truth values, texts nor times.
    """
    check_file(path, max_bytes)
    parquet = library("pyarrow.parquet")
    message = f"{path} is not a Parquet file of a table"
    with named_damage(message), parquet.ParquetFile(path) as file:
        cells = file.metadata.num_rows * file.metadata.num_columns
        check_size(f"the table of {path}", cells * FLOAT_BYTES, max_bytes)
        frame = file.read().to_pandas()
    return _frame_table(frame, path)


def feather_table(path: Path, max_bytes: int) -> RawTable:
    """The table of a Feather file; otherwise as :func:`parquet_table`."""
    check_file(path, max_bytes)
    arrow = library("pyarrow")
    message = f"{path} is not a Feather file of a table"
    with named_damage(message), arrow.memory_map(str(path)) as source:
        batches = list(_arrow_batches(arrow.ipc.open_file(source), path, max_bytes))
        frame = arrow.Table.from_batches(batches).to_pandas()
    return _frame_table(frame, path)


def _arrow_batches(reader: Any, path: Path, max_bytes: int) -> Iterator[Any]:
    size = 0
    for k in range(reader.num_record_batches):
        batch = reader.get_batch(k)
        size += batch.nbytes
        check_size(f"the table of {path}", size, max_bytes)
        yield batch


def h5ad_table(path: Path, label: str | None, max_bytes: int) -> RawTable:
    """The matrix X of an .h5ad file, with its observations as rows and its variables as columns.

    Args:
        path: the file.
        label: the column of ``obs`` that has the labels, if any; the others are left out.
        max_bytes: the largest size of the file, and of the matrix.

    Raises:
        FileNotFoundError: if there is no file.
        ModuleNotFoundError: if anndata is not installed.
        ValueError: if it is not such a file, or too large.
    """
    check_file(path, max_bytes)
    anndata = library("anndata", extra="h5ad")
    with named_damage(f"{path} is not an .h5ad file of annotated data"):
        with h5py.File(path) as file:
            size = _size_of_datasets(file)
        check_size(f"the content of {path}", size, max_bytes)
        data = anndata.read_h5ad(path)
        matrix = data.X
    if matrix is None:
        raise ValueError(f"{path} has no matrix X")
    names, notes = distinct_names([str(name) for name in data.var_names])
    num_rows, width = matrix.shape
    check_size(f"the matrix of {path}", num_rows * width * FLOAT_BYTES, max_bytes)
    if hasattr(matrix, "toarray"):
        notes.append(f"the matrix is sparse, and is read as {num_rows} x {width} numbers")
        matrix = matrix.toarray()
    cells = pd.DataFrame(np.asarray(matrix, dtype=np.float64), columns=names)
    if label in data.obs:
        cells[label] = strip_cells(data.obs[label].reset_index(drop=True))
    if left_out := [name for name in data.obs.columns if name != label]:
        notes.append(f"columns of obs are left out: {quoted(left_out)}; label takes one of them")
    names_of_rows, index = tuple(map(str, data.obs_names)), _index_name(data.obs_names)
    return RawTable(path.name, cells, row_names=names_of_rows, index=index, notes=notes)


def _size_of_datasets(file: Any) -> int:
    sizes = []
    file.visititems(lambda _, item: sizes.append(getattr(item, "nbytes", 0)))
    return sum(sizes)


def library(name: str, extra: str | None = None) -> ModuleType:
    """A library that reads a kind of file.

    Raises:
        ModuleNotFoundError: if it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        wanted = name if extra is None else f"'ppl_vae[{extra}]'"
        raise ModuleNotFoundError(
            f"files of this kind are read by {name}, which is not installed: pip install {wanted}"
        ) from error


def _frame_table(frame: pd.DataFrame, path: Path) -> RawTable:
    names, notes = distinct_names([str(name).strip() for name in frame.columns])
    if not len(frame) or not names:
        raise ValueError(f"{path} is empty: it has {len(frame)} rows and {len(names)} columns")
    columns = {name: _column(frame.iloc[:, k], path, name) for k, name in enumerate(names)}
    plain = isinstance(frame.index, pd.RangeIndex) and frame.index.name is None
    row_names = None if plain else tuple(map(_index_text, frame.index))
    if row_names is not None:
        notes.append("the index of the file is used as row names")
    if np.dtype(np.float16) in frame.dtypes.to_list():
        notes.append(HALF_PRECISION)
    cells = pd.DataFrame(columns)
    index = _index_name(frame.index)
    return RawTable(path.name, cells, row_names=row_names, index=index, notes=notes)


def _index_name(index: pd.Index) -> str | None:
    names = [str(name) for name in index.names if name is not None]
    return ", ".join(names) or None


def _index_text(entry: Any) -> str:
    return ", ".join(map(str, entry)) if isinstance(entry, tuple) else str(entry)


def _column(cells: pd.Series, path: Path, name: str) -> pd.Series:
    """Numbers as they are, or texts.

    Raises:
        ValueError: if the cells are lists, structures or bytes.
    """
    cells = cells.reset_index(drop=True)
    kind = cells.dtype.kind if isinstance(cells.dtype, np.dtype) else "O"
    if kind in "iuf":
        return cells
    observed = cells[cells.notna()]
    if any(isinstance(cell, list | dict | tuple | bytes | np.ndarray) for cell in observed[:100]):
        raise ValueError(
            f"{path}: column {name!r} has lists, structures or bytes; leave it out of the file or "
            "make it columns of numbers"
        )
    return strip_cells(cells)
