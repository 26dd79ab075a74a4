"""The roles of a table's columns: row names, labels, and the numbers that are modelled."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ppl_vae.data.files.column_checks import MAX_EXACT, check_magnitudes, describe_columns
from ppl_vae.data.files.column_selection import ColumnError
from ppl_vae.data.files.file_content import quoted
from ppl_vae.data.files.number_format import EXCEL_ERRORS, TRUTH
from ppl_vae.data.files.raw_table import PLAIN_NUMBERS, RawTable
from ppl_vae.data.files.text_columns import (
    FORMATTED_NUMBER,
    NA_MARKERS,
    TextColumns,
    has_dates,
    option,
)

NOTED_MARKERS = (*NA_MARKERS[3:], *EXCEL_ERRORS)
"""Markers that may mean something else, so that a note counts them."""
LABEL_NAMES = ("label", "labels", "class", "classes", "target", "species", "y_true", "category")
"""Column names that suggest class labels."""
MAX_CLASSES = 50
"""The largest number of distinct whole numbers that become labels for the name of their column."""
TRANSPOSED_ROWS = 1000
"""The number of rows that are transposed at once: few enough for a processor's cache."""


def _transposed(columns: Float[np.ndarray, "D N"]) -> Float[np.ndarray, "N D"]:
    """The rows of a table in one block of memory, given its columns."""
    rows = np.empty(columns.shape[::-1])
    for start in range(0, len(rows), TRANSPOSED_ROWS):
        part = slice(start, start + TRANSPOSED_ROWS)
        rows[part] = columns[:, part].T
    return rows


@dataclass
class ColumnRoles:
    """The cells of a file, of which row names, labels and the matrix of numbers are made.

    Attributes:
        raw: what the file holds.
        cells: the columns that are used.
        na_markers: casefolded texts that mark a missing cell.
        numbers: the columns as numbers, NaN elsewhere.
        words: the cells of each column that are neither numbers nor missing.
        texts: the columns whose cells are texts in the file.
        truth: those of them that have truth values.
    """

    raw: RawTable
    cells: pd.DataFrame
    na_markers: Sequence[str]
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    words: dict[str, pd.Series] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)
    truth: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.notes = list(self.raw.notes)
        self.marks = self._numeric_markers()
        self.words = dict.fromkeys(map(str, self.cells), pd.Series(dtype=object))
        for key, cells in self.cells.items():
            self._parse(str(key), cells)

    def _numeric_markers(self) -> list[float]:
        """The numbers that mark missing cells, with a decimal point or as the file has them."""
        formats = (PLAIN_NUMBERS, self.raw.number_format)
        found = {kind: [m for m in self.na_markers if kind.is_number(m)] for kind in formats}
        texts = ((kind, pd.Series(markers, dtype=object)) for kind, markers in found.items())
        return [value for kind, markers in texts for value in kind.to_floats(markers)]

    def _parse(self, name: str, cells: pd.Series) -> None:
        """The numbers of a column (NaN elsewhere), and its other cells."""
        marks = np.array(self.marks)
        if cells.dtype != object:
            # Numbers of single precision differ from the marker in double precision.
            marks = marks.astype(np.float32) if cells.dtype == np.float32 else marks
            array = cells.to_numpy(dtype=np.float64)
        else:
            self.texts.add(name)
            array = self.raw.number_format.to_floats(cells)
            lower = cells.str.casefold()
            worded = np.isnan(array) & ~lower.isin(self.na_markers).to_numpy()
            if worded.any() and np.isnan(array).all() and lower[worded].isin(list(TRUTH)).all():
                self.truth.add(name)
                array = lower.map(TRUTH).to_numpy(dtype=np.float64)
            else:
                self.words[name] = pd.Series(cells[worded])
        marked = np.isin(array, marks) if len(marks) else np.zeros(1, dtype=bool)
        self.numbers[name] = np.where(marked, np.nan, array) if marked.any() else array

    def is_text(self, name: str) -> bool:
        """Whether a column has more words than numbers, and not formatted numbers like 10 %."""
        words, observed = self.words[name], int((~np.isnan(self.numbers[name])).sum())
        return len(words) > observed and bool(words.str.fullmatch(FORMATTED_NUMBER).mean() <= 0.5)

    def is_integer(self, name: str) -> bool:
        """Whether a column is complete and has whole numbers only, which are exact."""
        values = self.numbers[name]
        return bool((np.abs(values) <= MAX_EXACT).all() and (values % 1 == 0).all())

    def pop_row_names(
        self, index: str | None, label: str | None
    ) -> tuple[tuple[str, ...] | None, str | None]:
        """Remove the column of row names; return them and its name, None if there is none.

        Args:
            index: the given column; "none" if there is none; None to use the first column if it
                holds row names.
            label: the given label column, which does not hold row names.
        """
        if index == "none":
            return None, None
        if index is not None:
            return self._pop_texts(index)
        if self.raw.row_names is not None:
            return self.raw.row_names, self.raw.index
        if not self.numbers:
            return None, None
        name = str(self.cells.columns[0])
        if label == name or not self._names_rows(name):
            return None, None
        text = self.is_text(name)
        reason = "text" if text else "distinct whole numbers and no name"
        self.notes.append(f"the first column is used as row names: it has {reason}")
        return self._pop_texts(name)

    def _names_rows(self, name: str) -> bool:
        """Whether a first column has names of the rows: texts, or whole numbers if it has none."""
        unnamed = self._is_unnamed(name)
        if self.is_text(name):
            return unnamed or self.cells[name].astype(str).is_unique
        return unnamed and self.is_integer(name) and self.cells[name].astype(str).is_unique

    def _is_unnamed(self, name: str) -> bool:
        return self.raw.first_unnamed and name == str(self.raw.cells.columns[0])

    def _pop_texts(self, name: str) -> tuple[tuple[str, ...], str | None]:
        del self.numbers[name]
        own_name = self.raw.has_names and not self._is_unnamed(name)
        return tuple(self.cells[name].astype(str)), name if own_name else None

    def pop_labels(self, label: str | None) -> tuple[tuple[Any, ...] | None, str | None]:
        """Remove the label column from the data; return labels and name, None if there is none.

        Raises:
            ValueError: if labels are missing.
        """
        name = self._guess_label() if label is None else None if label == "none" else label
        if name is None or name not in self.numbers:
            return None, None
        integer, values, words = self.is_integer(name), self.numbers.pop(name), self.words[name]
        if missing := int(np.isnan(values).sum()) - len(words):
            rows = np.flatnonzero(np.isnan(values) & ~self.cells.index.isin(words.index))
            raise ValueError(
                f"{self.raw.name}: the label column {name!r} is empty in {missing} row(s), as in "
                f"{self.raw.place(int(rows[0]))}; fill them, remove the rows, or leave the column "
                f"out (on the command line {option('drop', [name])}); if a marker of missing "
                "values is the name of a class, give other markers as missing"
            )
        texts = len(words) > 0 or name in self.truth
        labels = self.cells[name] if texts else values.astype(int) if integer else values
        return tuple(labels.tolist()), name

    def _guess_label(self) -> str | None:
        """The column that is likely to hold labels; None if there is none."""
        text = [name for name in self.numbers if self.is_text(name)]
        if text and not np.isnan(self.numbers[text[0]]).all():
            return None  # words among numbers may mark missing values
        if text and 2 * len(self.words[text[0]]) < len(self.cells):
            return None  # remarks on some rows
        if any(has_dates(self.words[name]) for name in text):
            return None
        called = [n for n in self.numbers if n.casefold() in LABEL_NAMES and self.is_integer(n)]
        named = [name for name in called if self._has_classes(name)]
        if called and not named:
            self.notes.append(f"{quoted(called)} is kept as data; label makes it the labels")
        if len(text) == 1 and not self.cells[text[0]].is_unique:
            note = f"column {text[0]!r} is used as labels: it is text that repeats"
            label, kept = text[0], named
        elif text or not named or len(self.numbers) == 1:
            return None
        else:
            note = f"column {named[0]!r} is used as labels for its name; label 'none' keeps it"
            label, kept = named[0], named[1:]
        if kept:
            note += f"; {quoted(kept)} is kept as data"
        self.notes.append(note)
        return label

    def _has_classes(self, name: str) -> bool:
        return len(np.unique(self.numbers[name])) <= MAX_CLASSES

    def to_matrix(
        self, chosen: Collection[str] | None, keep_empty: bool
    ) -> tuple[Float[np.ndarray, "N D"], tuple[str, ...]]:
        """The remaining columns as numbers, NaN where a value is missing, and their names.

        Args:
            chosen: the names of the columns that are kept, in their order; None for all.
            keep_empty: whether columns without observed values are kept.

        Raises:
            ValueError: if a column has cells that are neither numbers nor missing.
        """
        if chosen is not None:
            self.numbers = {n: self.numbers[n] for n in chosen if n in self.numbers}
        self.check_numeric(chosen=chosen is not None)
        if not keep_empty:
            self._drop_empty_columns()
        self.notes.extend(self._notes_on_cells())
        names = tuple(self.numbers)
        columns = np.stack(list(self.numbers.values()))
        check_magnitudes(self.raw.name, names, columns, self.raw.place)
        self.notes.extend(describe_columns(names, columns, self.raw.place))
        return _transposed(columns), names

    def _drop_empty_columns(self) -> None:
        empty = [name for name, values in self.numbers.items() if np.isnan(values).all()]
        if empty and len(empty) < len(self.numbers):
            self.notes.append(f"columns without any value are left out: {quoted(empty)}")
            for name in empty:
                del self.numbers[name]

    def _notes_on_cells(self) -> Iterator[str]:
        """What was read otherwise than it is written: markers, truth values, formatted numbers."""
        truth = [name for name in self.numbers if name in self.truth]
        if truth:
            yield f"TRUE and FALSE are read as 1 and 0 in {quoted(truth)}"
        texts = {name: self.cells[name] for name in self.numbers if name in self.texts}
        if not texts:
            return
        noted = [word for word in NOTED_MARKERS if word in self.na_markers]
        found = (cells[cells.str.casefold().isin(noted)] for cells in texts.values())
        for word, times in Counter(word for cells in found for word in cells).items():
            yield f"cells {word!r} are read as missing values: {times}"
        numeric = (cells[~np.isnan(self.numbers[n])] for n, cells in texts.items())
        yield from self.raw.number_format.notes(cell for cells in numeric for cell in cells)

    def check_numeric(self, *, chosen: bool) -> None:
        """Check that every remaining column is numeric, and that there is one.

        Args:
            chosen: whether the columns were chosen by name.

        Raises:
            ColumnError: if a column is not.
            ValueError: if there is none.
        """
        if not self.numbers:
            raise ValueError(
                f"{self.raw.name} has no column of numbers besides row names and labels; if it "
                "should, give header, delimiter or label"
            )
        words = {name: self.words[name] for name in self.numbers if len(self.words[name])}
        if not words:
            return
        mixed = [n for n in words if not np.isnan(self.numbers[n]).all() or not self.is_text(n)]
        text = [name for name in words if name not in mixed]
        found = TextColumns(
            self.raw, words, text, list(self.numbers), self.cells, chosen, self.na_markers
        )
        raise ColumnError(found.message(), self.raw)
