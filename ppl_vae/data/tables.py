"""Reading tables from files; unspecified details of the format are detected, and noted."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from ppl_vae.core.validation import as_matrix
from ppl_vae.data.csv_sniffing import SAMPLE_LINES, TextTable, parse_numbers, quoted

NA_MARKERS = ("na", "n/a", "null", "none", "?", ".", "-", "missing")
"""Texts that mark a missing cell by default, in any case."""
AMBIGUOUS_MARKERS = NA_MARKERS[3:]
"""Markers that may mean something else, so that a note counts them."""
LABEL_NAMES = ("label", "labels", "class", "classes", "target", "species", "y_true", "category")
"""Column names that suggest class labels."""
SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data", ".npy")
CONVERSION_ADVICE = dict.fromkeys(
    (".xlsx", ".xls", ".ods"), "is a spreadsheet; save it as CSV"
) | {
    ".parquet": "is Parquet; write it with pandas.read_parquet(...).to_csv('x.csv', index=False)",
    ".npz": "may hold several arrays; save one: np.save('x.npy', np.load('x.npz')['its name'])",
}
"""How to convert a file of an unsupported kind, by its suffix."""
MAX_BYTES = 2**30
"""The largest size of a file's content, decompressed, that is read by default."""
FORMATTED_NUMBER = r"[$€£¥+-]{0,2}\s?\d[\d,' ]*(?:[.,]\d*)?\s?[%$€£¥]?"
"""Numbers with separators or units, which are refused: 1,234.5 or $5 or 10 %."""


@dataclass(frozen=True)
class Table:
    """A numeric table with its row names, column names and labels.

    Attributes:
        name: name of the file; messages refer to it.
        values: (N, D), one row per datum; NaN marks a missing value.
        columns: D names; where the file has none, x<k> for the k-th column of the file.
        row_names: one per row, if the file has them.
        labels: one per row, text or numbers, if there is a label column.
        label: name of the label column.
        image_shape: height and width, for rows that are images.
        notes: what was detected rather than given, for the user to check.
    """

    name: str
    values: Float[np.ndarray, "N D"]
    columns: tuple[str, ...]
    row_names: tuple[str, ...] | None = None
    labels: tuple[Any, ...] | None = None
    label: str | None = None
    image_shape: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_missing(self) -> int:
        """The number of missing values."""
        return int(np.isnan(self.values).sum())

    def to_frame(self) -> pd.DataFrame:
        """The values under the names of their columns, with the labels as the last column.

        The index has the row names, if the file has them.
        """
        frame = pd.DataFrame(self.values, columns=list(self.columns), index=self.row_names)
        if self.labels is not None:
            frame.insert(len(self.columns), self.label or "label", list(self.labels), True)
        return frame

    def constant_columns(self) -> tuple[str, ...]:
        """Names of the columns whose observed entries are all equal."""
        missing = np.isnan(self.values)
        first = self.values[missing.argmin(0), np.arange(len(self.columns))]
        constant = ((self.values == first) | missing).all(0) & ~missing.all(0)
        return tuple(name for name, yes in zip(self.columns, constant, strict=True) if yes)


def digits_table() -> Table:
    """scikit-learn's handwritten digits, each pixel in 0..1 (sixteenths), labelled 0..9."""
    from sklearn.datasets import load_digits

    pixels, digit = map(np.asarray, load_digits(return_X_y=True))
    names = tuple(f"r{i}c{j}" for i in range(8) for j in range(8))
    return Table("digits / 16", pixels / 16, names, None, tuple(digit.tolist()), "digit", (8, 8))


def read_table(
    path: str | Path,
    *,
    header: bool | None = None,
    delimiter: str | None = None,
    label: str | None = None,
    missing: Sequence[str] | None = None,
    image_shape: tuple[int, int] | None = None,
    encoding: str | None = None,
    decimal: str | None = None,
    thousands: str | None = None,
    skip_rows: int = 0,
    comment: str | None = None,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    index: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Table:
    """Read a table from text (``.csv .tsv .txt .dat .data``, also ``.gz``) or a ``.npy`` file.

    What is not given is detected, and noted where the detection is a guess:

    * The delimiter is detected by clevercsv.
    * The first line is a header if it has words over numbers, an empty cell over row names, one
      name fewer than there are columns (R), or 0, 1, 2, ... (pandas). Names may also stand in the
      last ``#`` line above the table.
    * The first column holds row names if it is text and has no name or distinct values, or if it
      has no name and distinct whole numbers.
    * Labels are the only other text column, if its values repeat, or a column of whole numbers
      whose name is class, label, target or the like.
    * Commas are decimal commas if they do not separate cells and no number has a point.

    Args:
        path: the file.
        header: whether the first line (after ``#`` lines) has the column names.
        delimiter: one character or its name: comma, tab, semicolon, pipe, space (white space).
        label: name of the label column, or its number if there is no header; "none" if there is
            no such column.
        missing: texts or numbers that mark missing cells, *instead of* NA, N/A, null, none, ?, .,
            - and missing (in any case); an empty cell and NaN always do.
        image_shape: height and width, if rows are images; known for an (N, H, W) array.

    Raises:
        ValueError: if the file is not one table of finite numbers and missing values; the message
            gives the place and a remedy.
        TypeError: if an array's entries are not real numbers.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    given = NA_MARKERS if missing is None else [missing] if isinstance(missing, str) else missing
    na_markers = ("", "nan", *(marker.strip().casefold() for marker in given))
    if _supported_suffix(path) == ".npy":
        if header is not None or delimiter is not None:
            raise ValueError(f"{path} is an array: it has no header and no delimiter")
        builder = _builder_from_array(path, na_markers)
    else:
        builder = _builder_from_text(path, header, delimiter, na_markers)
    if len(builder.cells) < 2:
        raise ValueError(f"{path} has a single row; it must have two or more, one per datum")
    row_names = builder.pop_row_names(label)
    labels, label = builder.pop_labels(label)
    values, shape = builder.to_matrix(), image_shape or builder.image_shape
    if shape and shape[0] * shape[1] != values.shape[1]:
        size = f"{shape[0]} x {shape[1]}"
        raise ValueError(f"{path}: {values.shape[1]} columns make no images of {size} pixels")
    names, notes = tuple(builder.numbers), tuple(builder.notes)
    return Table(path.name, values, names, row_names, labels, label, shape, notes)


def _supported_suffix(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file in it")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in SUFFIXES and not path.name.lower().endswith(".npy.gz"):
        return suffix
    advice = "must end in .csv, .tsv, .txt, .dat or .data (all also with .gz), or in .npy"
    raise ValueError(f"{path} {CONVERSION_ADVICE.get(suffix, advice)}")


@dataclass
class _TableBuilder:
    """The cells of a file, of which row names, labels and the matrix of numbers are made.

    Attributes:
        numbers: the columns as numbers, NaN elsewhere.
        words: the cells of each column that are neither numbers nor missing.
    """

    name: str
    cells: pd.DataFrame
    na_markers: Sequence[str]
    decimal_comma: bool = False
    has_names: bool = False
    first_unnamed: bool = False
    line_number: Callable[[int], int] = int
    image_shape: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.numbers: dict[str, np.ndarray] = {}
        self.words: dict[str, pd.Series] = {}
        for key, cells in self.cells.items():
            self.numbers[str(key)], self.words[str(key)] = parse_numbers(
                cells, self.na_markers, self.decimal_comma
            )

    def is_text(self, name: str) -> bool:
        """Whether a column has more words than numbers, and not formatted numbers like 10 %."""
        words, observed = self.words[name], int(np.isfinite(self.numbers[name]).sum())
        return len(words) > observed and bool(words.str.fullmatch(FORMATTED_NUMBER).mean() <= 0.5)

    def is_integer(self, name: str) -> bool:
        """Whether a column is complete and has whole numbers only."""
        values = self.numbers[name]
        return bool(np.isfinite(values).all() and (values % 1 == 0).all())

    def find_column(self, label: str | None) -> str | None:
        """The column of this name, or of this number in a file without names.

        Raises:
            ValueError: if there is none.
        """
        if label is None or label.casefold() == "none":
            return None
        if not self.has_names and label.isdecimal():
            label = f"x{int(label)}"
        if label in self.cells:
            return label
        raise ValueError(f"{self.name} has no column {label!r}; it has {quoted(self.cells)}")

    def pop_row_names(self, label: str | None) -> tuple[str, ...] | None:
        """Remove the first column from the data if it holds row names, and return them.

        Args:
            label: the given label column, which does not hold row names.
        """
        name = str(self.cells.columns[0])
        texts, has_words = self.cells[name].astype(str), len(self.words[name]) > 0
        index = self.first_unnamed and (has_words or (texts.is_unique and self.is_integer(name)))
        named = texts.is_unique and self.is_text(name)
        if self.find_column(label) == name or not (index or named):
            return None
        del self.numbers[name]
        reason = "text" if has_words else "distinct whole numbers and no name"
        self.notes.append(f"the first column is used as row names: it has {reason}")
        return tuple(texts)

    def pop_labels(self, label: str | None) -> tuple[tuple[Any, ...] | None, str | None]:
        """Remove the label column from the data; return labels and name, None if there is none.

        Raises:
            ValueError: if there is no column of the given name, or labels are missing.
        """
        name = self.guess_label() if label is None else self.find_column(label)
        if name is None:
            return None, None
        integer, values, words = self.is_integer(name), self.numbers.pop(name), self.words[name]
        if missing := int(np.isnan(values).sum()) - len(words):
            raise ValueError(
                f"{self.name}: the label column {name!r} is empty in {missing} row(s); fill them "
                "or remove the rows; if a marker of missing values is the name of a class, give "
                "other markers as missing"
            )
        labels = self.cells[name] if len(words) else values.astype(int) if integer else values
        return tuple(labels.tolist()), name

    def guess_label(self) -> str | None:
        """The column that is likely to hold labels; None if there is none."""
        text = [name for name in self.numbers if self.is_text(name)]
        named = [n for n in self.numbers if n.casefold() in LABEL_NAMES and self.is_integer(n)]
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

    def to_matrix(self) -> Float[np.ndarray, "N D"]:
        """The remaining columns as numbers, NaN where a value is missing.

        Raises:
            ValueError: if a column has cells that are neither numbers nor missing.
        """
        self.check_numeric()
        texts = [self.cells[n] for n in self.numbers if self.cells[n].dtype == object]
        ambiguous = (cells[cells.str.casefold().isin(AMBIGUOUS_MARKERS)] for cells in texts)
        for word, times in Counter(word for cells in ambiguous for word in cells).items():
            self.notes.append(f"cells {word!r} are read as missing values: {times}")
        stack = np.column_stack(list(self.numbers.values()))
        return as_matrix(stack, name=self.name, dtype=torch.float64).numpy()

    def check_numeric(self) -> None:
        """Check that every remaining column is numeric, and that there is one.

        Raises:
            ValueError: if not.
        """
        text = [name for name in self.numbers if self.is_text(name)]
        for name in self.numbers:
            if len(words := self.words[name]) and name not in text:
                rows = list(words.drop_duplicates().index)[:3]
                shown = ", ".join(f"{words[r]!r} (line {self.line_number(r)})" for r in rows)
                raise ValueError(
                    f"{self.name}: column {name!r}: {len(words)} of {len(self.cells)} cells "
                    f"are not numbers: {shown}; give missing {words.iloc[0]!r} if that marks a "
                    "missing value, otherwise correct them"
                )
        if text:
            raise ValueError(
                f"{self.name} has columns of text, {quoted(text)}; choose one as label if it has "
                "classes, and remove the others or encode them as numbers"
            )
        if not self.numbers:
            raise ValueError(
                f"{self.name} has no column of numbers besides row names and labels; if it "
                "should, give header, delimiter or label"
            )


def _builder_from_array(path: Path, na_markers: Sequence[str]) -> _TableBuilder:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.names or array.ndim not in (2, 3):
        raise ValueError(
            f"{path} must hold one array of numbers, (N, D), one row per datum, or (N, H, W), "
            f"images; it has {getattr(array, 'dtype', 'several')} {np.shape(array)}"
        )
    rows = array.reshape(len(array), math.prod(array.shape[1:]))
    notes = []
    if rows.dtype == np.float16:
        notes = ["the numbers are float16, with three to four digits; they are cast to float64"]
        rows = rows.astype(np.float64)
    flat = as_matrix(rows, name=path.name, dtype=torch.float64).numpy()
    cells = pd.DataFrame(flat, columns=[f"x{k + 1}" for k in range(flat.shape[1])])
    shape = (array.shape[1], array.shape[2]) if array.ndim == 3 else None
    return _TableBuilder(path.name, cells, na_markers, image_shape=shape, notes=notes)


def _builder_from_text(
    path: Path, header: bool | None, delimiter: str | None, na_markers: Sequence[str]
) -> _TableBuilder:
    table = TextTable.from_file(path, delimiter, na_markers)
    width = table.num_columns(header)
    first, *rest = (row for _, row in islice(table.rows(), SAMPLE_LINES))
    short = len(first) < width
    first = [re.sub(r"Unnamed: \d+", "", cell.strip()) for cell in first]
    first = ["", *first] if short else first
    if not rest and (header or not all(map(table.is_number, first))):
        raise ValueError(f"{path} has column names and no rows")
    detected = short or (bool(rest) and table.has_header(first, rest))
    comment = [] if header is False or detected else table.comment_names(width)
    has_header = header is not False and (detected or (header is True and not comment))
    names = first if has_header else comment or [""] * width
    if header is None:
        table.add_header_note(first, has_header, bool(comment))
    has_names = has_header or bool(comment)
    return _TableBuilder(
        path.name,
        table.to_frame(table.distinct_names(names), has_header),
        na_markers,
        decimal_comma=table.decimal == ",",
        has_names=has_names,
        first_unnamed=has_names and not names[0],
        line_number=lambda row: table.line_number(row + has_header),
        notes=table.notes,
    )
