"""The columns of the frame that a model was fitted to, and those of later frames."""

import warnings
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch import Tensor

from ppl_vae.core.arrays.frame_labels import Labels, empty_labels
from ppl_vae.core.arrays.frames import read_frame


@dataclass(frozen=True)
class TableSchema:
    """The names of a table's columns, and the library of the frame that it was.

    Attributes:
        names: the names of the columns, strings or whole numbers.
        library: such as ``"pandas"``, ``"polars"`` or ``"xarray.Dataset"``.
    """

    names: tuple[Hashable, ...]
    library: str

    @classmethod
    def of(cls, x: Any) -> "TableSchema | None":
        """The schema of a frame with named columns; None for anything else.

        Args:
            x: any data; of a list of blocks, the first one is read.
        """
        if isinstance(x, list | tuple) and x:
            return cls.of(x[0])
        reader = read_frame(x)
        if reader is None or reader.labels.columns is None:
            return None
        return cls(reader.labels.columns, reader.labels.library)

    def positions(
        self, names: tuple[Hashable, ...] | None, *, name: str = "x"
    ) -> list[int] | None:
        """The places of these columns in a table, matched by name; None if all are in order.

        Args:
            names: the names of the table's columns; None, for an array, matches by position.
            name: the name of the table in messages.

        Warns:
            UserWarning: naming columns of the table that are left out.

        Raises:
            ValueError: if the table lacks columns, or has one of them more than once.
        """
        if names is None or names == self.names or self._one_is_numbered(names):
            return None
        number = Counter(names)
        if absent := [column for column in self.names if not number[column]]:
            raise ValueError(
                f"{name} lacks {len(absent)} of the {len(self.names)} columns that the model was "
                f"fitted to: {_listed(absent)}; it has {_listed(list(names))}. Add them (NaN "
                "where a value is missing), or pass data without column names, whose columns are "
                "matched by position"
            )
        if repeated := [column for column in self.names if number[column] > 1]:
            raise ValueError(
                f"{name} has several columns of one name, {_listed(repeated)}, so that they "
                "cannot be matched to those that the model was fitted to; rename them"
            )
        known = set(self.names)
        if extra := [column for column in names if column not in known]:
            warnings.warn(
                f"{name} has columns that the model was not fitted to, which are left out: "
                f"{_listed(extra)}",
                stacklevel=4,
            )
        position_of = {column: position for position, column in enumerate(names)}
        return [position_of[column] for column in self.names]

    def _one_is_numbered(self, names: tuple[Hashable, ...]) -> bool:
        # Columns numbered from zero have no names of their own, and are matched by position.
        numbered = any(found == tuple(range(len(found))) for found in (names, self.names))
        return numbered and not set(names) & set(self.names)

    def frame(self, values: Tensor) -> Any:
        """Rows of such a table as a frame of the library, with numbered rows."""
        return empty_labels(self.library, self.names).frame(_as_array(values), self.names)

    def to_json(self) -> dict[str, Any]:
        """The schema in a form that JSON holds."""
        return {"names": list(self.names), "library": self.library}

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: if the content is no schema.
        """
        found = content if isinstance(content, dict) else {}
        names: Any = found.get("names")
        library: Any = found.get("library")
        valid = isinstance(names, list) and isinstance(library, str)
        if not valid or not all(isinstance(each, str | int) for each in names):
            raise ValueError(f"this is no schema of a table: {content!r:.80}")
        return cls(tuple(names), library)


@dataclass(frozen=True)
class RowLabels:
    """The labels of rows of data that results are returned with, as frames.

    Without labels, as for arrays, results are tensors.

    Attributes:
        frame_labels: the labels of the frame; None for an array.
        columns: the columns in the order of the model; None if they are only numbered.
    """

    frame_labels: Labels | None = None
    columns: tuple[Hashable, ...] | None = None

    @classmethod
    def of(cls, x: Any, schema: TableSchema | None = None) -> Self:
        """The labels of data.

        Args:
            x: any data.
            schema: the schema of the frame that the model was fitted to, if any.
        """
        reader = read_frame(x)
        if reader is None:
            return cls()
        own = reader.labels.columns
        return cls(reader.labels, own if own is None or schema is None else schema.names)

    @property
    def row_names(self) -> Any:
        """The names of the rows; None if they are only numbered, or for an array."""
        return None if self.frame_labels is None else self.frame_labels.row_names

    def data(self, values: Tensor | np.ndarray) -> Any:
        """Values of the columns of the data, (N, D)."""
        if self.frame_labels is None:
            return values
        return self.frame_labels.frame(_as_array(values), self.columns)

    def codes(self, values: Tensor, prefix: str = "z") -> Any:
        """Values of K numbered columns, (N, K), named z1, ..., zK."""
        if self.frame_labels is None:
            return values
        names = tuple(f"{prefix}{k + 1}" for k in range(values.shape[1]))
        return self.frame_labels.frame(_as_array(values), names)

    def rows(self, values: Tensor, name: str) -> Any:
        """One number per row, (N,)."""
        if self.frame_labels is None:
            return values
        return self.frame_labels.series(_as_array(values), name)

    def named(self, columns: dict[str, np.ndarray]) -> Any:
        """Several numbers per row, as a frame with these columns."""
        if self.frame_labels is None:
            raise ValueError("rows of arrays have no labels")
        return self.frame_labels.frame_of_columns(columns)

    def take(self, rows: Tensor) -> "RowLabels":
        """The labels of some rows."""
        if self.frame_labels is None:
            return self
        return RowLabels(self.frame_labels.take(rows.cpu().numpy()), self.columns)


def _as_array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _listed(names: list[Hashable]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
