"""Text tables: lines, cells, names of columns, and how their numbers are written."""

import io
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, NamedTuple

import pandas as pd

from ppl_vae.core.validation import check_int
from ppl_vae.data.files.column_names import NameRows, distinct_names
from ppl_vae.data.files.delimiters import (
    SAMPLE_LINES,
    announced_delimiter,
    delimiter_character,
    delimiter_name,
    detect_delimiter,
)
from ppl_vae.data.files.number_format import TRUTH, detect_number_format
from ppl_vae.data.files.raw_table import RawTable
from ppl_vae.data.files.table_output import without_apostrophe
from ppl_vae.data.files.text_rows import TextRows, is_comment, lines_text

PANDAS_MARKERS = ("", "nan", "NaN", "NAN", "NA", "N/A", "null", "NULL")
"""Spellings of missing cells that pandas is asked to parse itself, which is faster."""
# From version 3.1 on pandas parses numbers exactly by default, and warns about the argument.
_INEXACT_PANDAS = tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1)
_EXACT_FLOATS: dict[str, Any] = {"float_precision": "round_trip"} if _INEXACT_PANDAS else {}


@dataclass(frozen=True)
class TextFormat:
    """The stated properties of the format of a text table; None where they are to be detected.

    Attributes:
        header, delimiter, decimal, thousands, skip_rows, comment: as in
            :func:`~ppl_vae.data.files.tables.read_table`.
        na_markers: casefolded texts that mark a missing cell.
    """

    na_markers: Sequence[str]
    header: bool | None = None
    delimiter: str | None = None
    decimal: str | None = None
    thousands: str | None = None
    skip_rows: int = 0
    comment: str | None = None


class Layout(NamedTuple):
    """The columns of a text table, and where its data begin.

    Attributes:
        names: the names of the columns.
        start: the first row of data.
        texts: the columns, by position, whose cells are kept as texts.
        has_names: whether the file has names of columns.
        first_unnamed: whether the first column has none, where the others have.
    """

    names: list[str]
    start: int
    texts: set[int]
    has_names: bool
    first_unnamed: bool


def strip_cells(cells: pd.Series) -> pd.Series:
    """The cells as texts without white space around them; missing ones are empty."""
    words = cells.astype(object).where(cells.notna(), "")
    return pd.Series([str(word).strip() for word in words], dtype=object)


class TextTable:
    """A text in rows of cells; what is detected is added to the notes.

    Args:
        text: the content of the file.
        name: its name, for messages.
        given: the stated properties of its format.
        notes: the notes of its encoding.

    Raises:
        ValueError: if no line has cells, or lines differ in the number of their cells.
    """

    def __init__(self, text: str, name: str, given: TextFormat, notes: Sequence[str]) -> None:
        self.name, self.given, self.notes = name, given, list(notes)
        lines = self._lines_with_cells(text)
        self.delimiter = delimiter = self._delimiter(lines)
        body = text if len(lines) == text.count("\n") + 1 else "\n".join(t for _, t in lines)
        self.format, notes = detect_number_format(body, delimiter, given.decimal, given.thousands)
        self.notes.extend(notes)
        self.table = TextRows(
            name, lines, delimiter, self.is_number, self._has_names, given.header, self.notes
        )

    def _lines_with_cells(self, text: str) -> list[tuple[int, str]]:
        """The numbered lines from the first with cells on, and without given comments."""
        given = self.given
        check_int("skip_rows", given.skip_rows, 0)
        if given.comment is not None and not given.comment.strip():
            raise ValueError(f"comment must be a text, such as % or //; got {given.comment!r}")
        lines = list(enumerate(text.split("\n"), 1))[given.skip_rows :]
        start = next((k for k, (_, line) in enumerate(lines) if line.strip(" ")), len(lines))
        lines = lines[start:]
        self.announced = announced_delimiter(lines[0][1]) if lines else None
        if self.announced is not None:
            self.notes.append(f"line {lines[0][0]} gives the delimiter, {lines[0][1]!r}")
            lines = lines[1:]
        if given.comment is not None:
            left_out = [n for n, line in lines if is_comment(line, given.comment)]
            lines = [(n, line) for n, line in lines if not is_comment(line, given.comment)]
            if left_out:
                self.notes.append(f"comments are left out: {lines_text(left_out)}")
        above = takewhile(lambda nl: not nl[1].strip(" ") or is_comment(nl[1], None), lines)
        above = list(above)
        self.comments = [(n, line) for n, line in above if line.strip(" ")]
        if len(above) == len(lines):
            raise ValueError(f"{self.name} is empty: no line has cells")
        if self.comments:
            self.notes.append(f"lines with # above the table are skipped: {len(self.comments)}")
        return lines[len(above) :]

    def _delimiter(self, lines: Sequence[tuple[int, str]]) -> str:
        character = delimiter_character(self.given.delimiter) or self.announced
        if character is None:
            full = (line for _, line in lines[: 2 * SAMPLE_LINES] if line.strip(" "))
            character = detect_delimiter(list(islice(full, SAMPLE_LINES)))
            if character not in ",\t":
                self.notes.append(f"delimiter detected: {delimiter_name(character)}")
        return character

    def is_number(self, cell: str) -> bool:
        """Whether a cell is a number, with a decimal comma too where that separates no cells."""
        plain = cell if self.delimiter == "," else cell.replace(",", ".")
        return self.format.is_number(cell) or self.format.is_number(plain)

    def is_value(self, cell: str) -> bool:
        """Whether a cell is a number or a truth value."""
        return self.is_number(cell) or cell.strip().casefold() in TRUTH

    def is_missing(self, cell: str) -> bool:
        """Whether a cell marks a missing value."""
        return cell.strip().casefold() in self.given.na_markers

    def _name_rows(self, first: Sequence[str], rest: Sequence[Sequence[str]]) -> NameRows:
        return NameRows(first, rest, self.is_value, self.is_missing, self.format.to_float)

    def _has_names(self, first: Sequence[str], rest: Sequence[Sequence[str]]) -> bool:
        return self._name_rows(first, rest).has_names()

    def to_raw_table(self, text_columns: Collection[str]) -> RawTable:
        """The cells under the names of their columns.

        Args:
            text_columns: names, or numbers from 1 on, of columns whose cells are kept as texts.

        Raises:
            ValueError: if there are names of columns, and no rows.
        """
        layout = self.layout(text_columns)
        rows = self.table.rows[layout.start :]
        lines = [row.line for row in rows]
        text = io.StringIO("\n".join(row.text for row in rows))
        cells = self.to_frame(text, layout)
        return self.raw_table(cells, layout, lambda row: f"line {lines[row]}")

    def raw_table(
        self, cells: pd.DataFrame, layout: "Layout", place: Callable[[int], str]
    ) -> RawTable:
        """The table of these cells.

        Args:
            cells: as :meth:`to_frame` returns them.
            layout: the layout of the columns.
            place: where a row stands in the file.
        """
        return RawTable(
            self.name,
            cells,
            number_format=self.format,
            has_names=layout.has_names,
            first_unnamed=layout.first_unnamed,
            place=place,
            notes=self.notes,
        )

    def layout(self, text_columns: Collection[str]) -> "Layout":
        """The names of the columns and the first row of data; what is detected is noted.

        Args:
            text_columns: as for :meth:`to_raw_table`.

        Raises:
            ValueError: if there are names of columns, and no rows.
        """
        rows, width = self.table.rows, self.table.width
        first, *rest = (self.table.cells(row) for row in rows[:SAMPLE_LINES])
        short = len(first) < width
        first = [re.sub(r"Unnamed: \d+", "", cell.strip()) for cell in first]
        first = ["", *first] if short else first
        header = self.given.header
        if not rest:
            self._check_only_row(first)
        top = self._name_rows(first, rest)
        detected = header is not False and (short or top.has_names())
        comment = [] if header is False or detected else self._comment_names(width)
        has_header = header is not False and (detected or (header is True and not comment))
        names = first if has_header else comment or [""] * width
        if header is None:
            self._add_header_note(first, has_header, bool(comment))
        start = self._first_row_of_data(top) if has_header else 0
        has_names = has_header or bool(comment)
        names, renamed = distinct_names([without_apostrophe(name) for name in names])
        self.notes.extend(renamed)
        unnamed = has_names and not (first if has_header else comment)[0]
        texts = {k for k, name in enumerate(names) if name in text_columns}
        if not has_names:
            texts |= {k for k in range(width) if str(k + 1) in text_columns}
        below = [cells[0] for cells in rest[max(start - 1, 0) :]]
        if unnamed or not all(self.is_number(c) or self.is_missing(c) for c in below):
            texts.add(0)  # which may have row names such as 001
        return Layout(names, start, texts, has_names, unnamed)

    def _check_only_row(self, cells: Sequence[str]) -> None:
        header = self.given.header
        if header or not all(map(self.is_number, cells)):
            raise ValueError(f"{self.name} has column names and no rows")
        if header is None:
            raise ValueError(
                f"{self.name} has a single row, of {len(cells)} numbers; data have one row per "
                "datum: write one number per line if these are data of one column, or give header "
                "False if they are one datum"
            )

    def _first_row_of_data(self, top: NameRows) -> int:
        units = top.num_unit_rows()
        for row, cells in zip(self.table.rows[1 : 1 + units], top.rest, strict=False):
            shown = ", ".join(cell for cell in cells[:10] if cell)
            self.notes.append(f"line {row.line} left out: it has units or names, {shown!r}")
        return 1 + units

    def _comment_names(self, width: int) -> list[str]:
        """The column names in the last comment line; empty if their number does not fit."""
        text = self.comments[-1][1][1:].strip() if self.comments else ""
        candidates = (text.split(self.delimiter), text.split()) if text else ()
        fitting = (names for names in candidates if len(names) == width)
        return [name.strip() for name in next(fitting, [])]

    def _add_header_note(self, first: Sequence[str], has_header: bool, in_comment: bool) -> None:
        """Add a note on where the column names were found, unless that is obvious."""
        line = f"line {self.table.rows[0].line} is used as"
        if in_comment:
            self.notes.append(f"column names are read from line {self.comments[-1][0]}, after #")
        elif not has_header:
            self.notes.append(f"{line} data, not as column names: it has no words over numbers")
        elif any(map(self.is_number, first)):
            self.notes.append(f"{line} column names, although it has numbers")

    def to_frame(self, rows: io.StringIO | io.BytesIO, layout: "Layout") -> pd.DataFrame:
        """The cells: numbers in purely numeric columns, stripped text in the others.

        Args:
            rows: a file with the rows of data, and nothing else.
            layout: the layout of the columns.
        """
        names, texts = layout.names, layout.texts
        markers = [word for word in PANDAS_MARKERS if word.casefold() in self.given.na_markers]
        cells = pd.read_csv(
            rows,
            sep=self.delimiter,
            header=None,
            names=range(len(names)),
            dtype=dict.fromkeys(texts, str),
            keep_default_na=False,
            na_values={k: markers for k in range(len(names)) if k not in texts},
            skipinitialspace=True,
            skip_blank_lines=False,
            low_memory=False,
            decimal=self.format.decimal,
            **_EXACT_FLOATS,
        )
        cells.columns = names
        for k, kind in enumerate(cells.dtypes):
            if kind.kind not in "iuf":
                plain = map(without_apostrophe, strip_cells(cells.iloc[:, k]))
                cells.isetitem(k, pd.Series(list(plain), dtype=object))
        return cells
