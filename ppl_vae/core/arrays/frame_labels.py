"""Names of the rows and columns of data, with which results become frames of the same library."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

Frame: TypeAlias = Any
"""A data frame of any library; also a series, for one number per row."""
Name: TypeAlias = Hashable


@dataclass(frozen=True)
class Labels(ABC):
    """Abstract: names of columns and rows, with which results are made into frames.

    Attributes:
        columns: the names of the columns; None if they are only numbered.
    """

    columns: tuple[Name, ...] | None

    @property
    @abstractmethod
    def library(self) -> str:
        """The library of the frame."""

    @property
    def row_names(self) -> Any:
        """The names of the rows; None if they are only numbered."""
        return None

    @abstractmethod
    def frame(self, values: np.ndarray, columns: Sequence[Name] | None) -> Frame:
        """A frame of the same rows; ``columns`` None: those that the frame itself had."""

    @abstractmethod
    def frame_of_columns(self, columns: Mapping[str, np.ndarray]) -> Frame:
        """Several numbers per row, as columns of their own dtypes."""

    @abstractmethod
    def series(self, values: np.ndarray, name: str) -> Frame:
        """One number per row."""

    @abstractmethod
    def take(self, rows: np.ndarray) -> "Labels":
        """The labels of these rows."""


@dataclass(frozen=True)
class PandasLabels(Labels):
    """Labels of a pandas frame.

    Attributes:
        index: the index of the rows; None if they are only numbered.
        own_columns: the frame's own index of its columns.
    """

    index: Any = None
    own_columns: Any = None

    @property
    def library(self) -> str:
        """``"pandas"``."""
        return "pandas"

    @property
    def row_names(self) -> Any:
        """The index."""
        return self.index

    def frame(self, values: np.ndarray, columns: Sequence[Name] | None) -> Frame:
        """A ``pandas.DataFrame``."""
        import pandas as pd

        return pd.DataFrame(values, index=self.index, columns=self._index_of(columns))

    def _index_of(self, columns: Sequence[Name] | None) -> Any:
        own = self.own_columns
        if columns is None or own is None or tuple(columns) == self.columns:
            return own if own is not None or columns is None else list(columns)
        if self.columns is None or len(set(self.columns)) < len(self.columns):
            return list(columns)
        position_of = {name: position for position, name in enumerate(self.columns)}
        known = all(name in position_of for name in columns)
        return own[[position_of[name] for name in columns]] if known else list(columns)

    def frame_of_columns(self, columns: Mapping[str, np.ndarray]) -> Frame:
        """A ``pandas.DataFrame``."""
        import pandas as pd

        return pd.DataFrame(dict(columns), index=self.index)

    def series(self, values: np.ndarray, name: str) -> Frame:
        """A ``pandas.Series``."""
        import pandas as pd

        return pd.Series(values, index=self.index, name=name)

    def take(self, rows: np.ndarray) -> Labels:
        """The labels of these rows."""
        return replace(self, index=rows if self.index is None else self.index[rows])


@dataclass(frozen=True)
class NarwhalsLabels(Labels):
    """Labels of a frame of another library, which has no index.

    Attributes:
        backend: the name of the library, as narwhals spells it.
    """

    backend: str = "polars"

    @property
    def library(self) -> str:
        """The name of the library."""
        return self.backend

    def frame(self, values: np.ndarray, columns: Sequence[Name] | None) -> Frame:
        """A frame of the library."""
        names = map(str, columns or self.columns or range(values.shape[1]))
        return self.frame_of_columns(dict(zip(names, values.T, strict=True)))

    def frame_of_columns(self, columns: Mapping[str, np.ndarray]) -> Frame:
        """A frame of the library."""
        import narwhals as nw

        arrays = {name: np.ascontiguousarray(v) for name, v in columns.items()}
        series = {name: self._series(array, name) for name, array in arrays.items()}
        return nw.from_dict(series).to_native()

    def series(self, values: np.ndarray, name: str) -> Frame:
        """A series of the library."""
        return self._series(values, name).to_native()

    def _series(self, values: np.ndarray, name: str) -> Any:
        import narwhals as nw

        backend: Any = self.backend
        return nw.new_series(name, values, backend=backend)

    def take(self, rows: np.ndarray) -> Labels:
        """The same labels, since rows have no names."""
        return self


@dataclass(frozen=True)
class XarrayLabels(Labels):
    """Labels of a 2-d ``xarray.DataArray``, or of a ``Dataset`` of 1-d variables.

    Attributes:
        dims: the names of the dimensions of rows and of columns.
        rows: the coordinates along the rows.
        is_dataset: whether columns are the variables of a ``Dataset``.
    """

    dims: tuple[Hashable, Hashable] = ("row", "column")
    rows: Any = None
    is_dataset: bool = False

    @property
    def library(self) -> str:
        """The library and the class."""
        return "xarray.Dataset" if self.is_dataset else "xarray.DataArray"

    @property
    def row_names(self) -> Any:
        """The coordinate along the rows, if there is one."""
        names = (self.rows or {}).get(self.dims[0])
        return None if names is None else names.values

    def frame(self, values: np.ndarray, columns: Sequence[Name] | None) -> Frame:
        """A ``DataArray`` or a ``Dataset``, as the data were."""
        import xarray as xr

        row, column = self.dims
        is_data = columns is None or set(columns) <= set(self.columns or ())
        names = list(columns or self.columns or ()) or None
        if self.is_dataset:
            return self.frame_of_columns(dict(zip(names or (), values.T, strict=True)))
        coords = dict(self.rows or {})
        if names is not None:
            column = column if is_data else "code"
            coords[column] = names
        return xr.DataArray(values, dims=(row, column), coords=coords)

    def frame_of_columns(self, columns: Mapping[Any, np.ndarray]) -> Frame:
        """A ``Dataset``."""
        import xarray as xr

        row = self.dims[0]
        return xr.Dataset({name: (row, v) for name, v in columns.items()}, coords=self.rows)

    def series(self, values: np.ndarray, name: str) -> Frame:
        """A 1-d ``DataArray``."""
        import xarray as xr

        return xr.DataArray(values, dims=(self.dims[0],), coords=self.rows, name=name)

    def take(self, rows: np.ndarray) -> Labels:
        """The labels of these rows."""
        coords = {} if self.rows is None else self.rows
        taken = {
            name: coord.isel({self.dims[0]: rows}) if self.dims[0] in coord.dims else coord
            for name, coord in coords.items()
        }
        return replace(self, rows=taken)


def empty_labels(library: str, columns: tuple[Name, ...]) -> Labels:
    """Labels of a frame of a library with numbered rows."""
    if library == "pandas":
        return PandasLabels(columns)
    if library.startswith("xarray"):
        return XarrayLabels(columns, is_dataset=library == "xarray.Dataset")
    return NarwhalsLabels(columns, library)
