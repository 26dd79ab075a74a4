"""The columns of a table that are read, by their names."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import pandas as pd

from ppl_vae.data.files.file_content import quoted
from ppl_vae.data.files.raw_table import RawTable


class ColumnError(ValueError):
    """A file cannot be read with the given columns, or with all of its columns.

    Attributes:
        columns: the names of all columns of the file.
    """

    def __init__(self, message: str, raw: RawTable) -> None:
        super().__init__(message)
        self.columns = tuple(map(str, raw.cells))


def find_column(raw: RawTable, name: str) -> str:
    """The column of this name, or of this number in a file without names.

    Raises:
        ColumnError: if there is none.
    """
    if not raw.has_names and name.isdecimal():
        name = f"x{int(name)}"
    if name in raw.cells:
        return name
    similar = get_close_matches(name, map(str, raw.cells), n=3)
    hint = f"; did you mean {quoted(similar)}?" if similar else ""
    raise ColumnError(f"{raw.name} has no column {name!r}; it has {quoted(raw.cells)}{hint}", raw)


def select_columns(
    raw: RawTable,
    columns: Sequence[str] | None,
    drop: Sequence[str],
    needed: Iterable[str],
) -> tuple[pd.DataFrame, list[str] | None]:
    """The cells without the dropped columns, and the names of the chosen ones.

    Args:
        raw: the cells of a file.
        columns: names of the columns that are kept; None for all.
        drop: names of the columns that are left out.
        needed: names of columns that are used otherwise, and cannot be dropped.

    Raises:
        ValueError: if there is no such column, or a column is both chosen and left out.
    """
    left_out = [find_column(raw, name) for name in drop]
    chosen = None if columns is None else [find_column(raw, name) for name in columns]
    if chosen is not None and (not chosen or len(set(chosen)) < len(chosen)):
        raise ValueError(
            f"columns must be distinct names, at least one; got {list(columns or ())}"
        )
    if both := set(left_out) & {*(chosen or ()), *needed}:
        raise ValueError(f"columns that are dropped cannot be used as well: {quoted(both)}")
    cells = raw.cells.drop(columns=left_out)
    if chosen is not None:
        kept = {*chosen, *needed, *cells.columns[:1]}  # the first may have row names
        cells = cells.loc[:, [name in kept for name in cells.columns]]
    return cells, chosen
