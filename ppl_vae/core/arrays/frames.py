"""Data frames of any library as arrays.

Frames are those of pandas and xarray, of every library that ``narwhals`` reads (polars, pyarrow,
modin, ...), and what :func:`~ppl_vae.data.files.tables.read_table` returns. None of these
libraries is imported here unless a frame of it is given.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppl_vae.core.arrays.entries import REAL_KINDS, column_of_numbers, is_real, refuse_columns
from ppl_vae.core.arrays.frame_labels import (
    Labels,
    Name,
    NarwhalsLabels,
    PandasLabels,
    XarrayLabels,
)


class FrameReader(ABC):
    """Abstract: reads a frame of one library.

    Attributes:
        labels: the names of its columns and rows.
        shape: the numbers of rows and columns.
    """

    labels: Labels
    shape: tuple[int, int]

    @abstractmethod
    def column(self, position: int) -> np.ndarray:
        """The entries of a column; an array of objects if they are no numbers."""

    @abstractmethod
    def name(self, position: int) -> Name:
        """The name of a column in messages."""

    def matrix(self, positions: Sequence[int], *, name: str) -> np.ndarray:
        """Columns as a matrix of numbers, NaN where a value is missing.

        Args:
            positions: the positions of the columns.
            name: the name of the frame in messages.

        Raises:
            TypeError: naming the columns that hold no real numbers.
        """
        arrays, wrong = [], {}
        for position in positions:
            try:
                arrays.append(column_of_numbers(self.column(position)))
            except TypeError as error:
                wrong[self.name(position)] = str(error)
        if wrong:
            raise refuse_columns(wrong, name)
        dtype = np.result_type(*arrays) if arrays else np.float64
        matrix = np.empty((self.shape[0], len(arrays)), dtype)
        for column, array in enumerate(arrays):
            matrix[:, column] = array
        return matrix


class _PandasReader(FrameReader):
    def __init__(self, frame: Any) -> None:
        self._frame, self.shape = frame, frame.shape
        columns = tuple(map(canonical_name, frame.columns))
        self.labels = PandasLabels(columns, frame.index, frame.columns)

    def name(self, position: int) -> Name:
        return canonical_name(self._frame.columns[position])

    def matrix(self, positions: Sequence[int], *, name: str) -> np.ndarray:
        kinds = set(self._frame.dtypes)
        dtype = next(iter(kinds), None)
        if len(kinds) == 1 and is_real(dtype):
            return self._frame.to_numpy()[:, list(positions)]
        return super().matrix(positions, name=name)

    def column(self, position: int) -> np.ndarray:
        series = self._frame.iloc[:, position]
        if hasattr(series.dtype, "fill_value") and hasattr(series, "sparse"):
            series = series.sparse.to_dense()
        dtype = series.dtype
        if isinstance(dtype, np.dtype):
            return series.to_numpy()
        if getattr(dtype, "kind", "O") not in REAL_KINDS and "decimal" not in str(dtype):
            raise TypeError(f"{dtype} values")
        if str(dtype) == "category" or str(dtype).startswith("interval"):
            raise TypeError(f"{dtype} values")
        if not series.isna().any() and getattr(dtype, "kind", "") in "iub":
            return series.to_numpy(dtype=getattr(dtype, "numpy_dtype", None))
        single = str(dtype).lower().startswith(("float32", "float[", "float16", "halffloat["))
        return series.to_numpy(dtype="float32" if single else "float64", na_value=np.nan)


class _NarwhalsReader(FrameReader):
    def __init__(self, frame: Any) -> None:
        self._frame, self.shape = frame, frame.shape
        self.labels = NarwhalsLabels(tuple(frame.columns), frame.implementation.value)

    def name(self, position: int) -> Name:
        return self._frame.columns[position]

    def column(self, position: int) -> np.ndarray:
        import narwhals as nw

        series = self._frame.get_column(self.name(position))
        dtype = series.dtype
        if series.null_count() == len(series):
            return np.full(len(series), np.nan)
        if not (dtype.is_numeric() or dtype == nw.Boolean):
            raise TypeError(f"{dtype} values")
        if dtype.is_decimal():
            return series.cast(nw.Float64()).to_numpy()
        if series.is_null().any() and not dtype.is_float():
            series = series.cast(nw.Float64())
        return series.to_numpy()


class _DataArrayReader(FrameReader):
    def __init__(self, array: Any, name: str) -> None:
        if array.ndim != 2:
            raise ValueError(
                f"{name} must be 2-d, one flat row per datum; it is a DataArray of the dimensions "
                f"{dict(array.sizes)}. Stack those of a datum: {name}.stack(column=[...])"
            )
        self._array, self.shape = array, array.shape
        row, column = array.dims
        coords = {key: c for key, c in array.coords.items() if column not in c.dims}
        names = array.indexes.get(column)
        columns = None if names is None else tuple(map(canonical_name, names))
        self.labels = XarrayLabels(columns, (row, column), coords)

    def name(self, position: int) -> Name:
        columns = self.labels.columns
        return position if columns is None else columns[position]

    def column(self, position: int) -> np.ndarray:
        return np.asarray(self._array[:, position])

    def matrix(self, positions: Sequence[int], *, name: str) -> np.ndarray:
        if is_real(self._array.dtype):
            return np.asarray(self._array)[:, list(positions)]
        return super().matrix(positions, name=name)


class _DatasetReader(FrameReader):
    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._names = dataset, list(dataset.data_vars)
        dims = {variable.dims for variable in dataset.data_vars.values()}
        if len(dims) != 1 or len(next(iter(dims))) != 1:
            raise ValueError(
                f"{name} must be a Dataset of 1-d variables with one common dimension, its rows; "
                f"their dimensions are {sorted(map(str, dims))}"
            )
        (row,) = next(iter(dims))
        self.shape = (dataset.sizes[row], len(self._names))
        columns = tuple(map(canonical_name, self._names))
        self.labels = XarrayLabels(columns, (row, "column"), dataset.coords, is_dataset=True)

    def name(self, position: int) -> Name:
        return self._names[position]

    def column(self, position: int) -> np.ndarray:
        return np.asarray(self._dataset[self._names[position]])


def canonical_name(name: Any) -> Name:
    """A column's name as it is compared and saved: a string or a whole number."""
    if isinstance(name, str):
        return str(name)
    is_integer = isinstance(name, int | np.integer) and not isinstance(name, bool)
    return int(name) if is_integer else str(name)


def read_frame(x: Any, *, name: str = "x") -> FrameReader | None:
    """The reader of a data frame; None if x is none.

    Args:
        x: anything.
        name: its name in messages.

    Raises:
        TypeError: if x is a lazy frame.
        ValueError: if x is an xarray object that is no table; if columns of a frame that is not of
            pandas have the same name.
    """
    kinds = {(c.__module__.partition(".")[0], c.__name__) for c in type(x).__mro__}
    if ("pandas", "DataFrame") in kinds:
        return _PandasReader(x)
    if ("ppl_vae", "Table") in kinds:
        return _PandasReader(_frame_of_table(x))
    if ("xarray", "DataArray") in kinds:
        return _DataArrayReader(x, name)
    if ("xarray", "Dataset") in kinds:
        return _DatasetReader(x, name)
    if isinstance(x, np.ndarray | list | tuple) or type(x).__module__.partition(".")[0] == "torch":
        return None
    return _read_by_narwhals(x, name)


def _frame_of_table(table: Any) -> Any:
    # The values that read_table found, without labels, under the names of rows and columns.
    columns = list(table.columns) if table.has_names else None
    pandas: Any = importlib.import_module("pandas")
    return pandas.DataFrame(table.values, columns=columns, index=table.row_index)


def _read_by_narwhals(x: Any, name: str) -> FrameReader | None:
    import narwhals as nw

    if type(x).__module__.partition(".")[0] == "pyarrow" and type(x).__name__ == "RecordBatch":
        x = importlib.import_module("pyarrow").Table.from_batches([x])
    try:
        frame: Any = nw.from_native(x, pass_through=True)
    except nw.exceptions.DuplicateError as error:
        reason = " ".join(str(error).split())
        text = f"{name} has several columns of one name; rename them: {reason}"
        raise ValueError(text) from error
    if isinstance(frame, nw.LazyFrame):
        raise TypeError(
            f"{name} is a lazy frame, {type(x).__name__}; pass {name}.collect(), or with dask "
            f"{name}.compute()"
        )
    return _NarwhalsReader(frame) if isinstance(frame, nw.DataFrame) else None
