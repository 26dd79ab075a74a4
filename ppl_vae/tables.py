"""Tables as people have them: what a file does not say is found, and what was found is noted."""

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.datasets import load_digits

from ppl_vae.arguments import as_matrix

DOUBTFUL_MARKERS = ("none", "?", ".", "-", "missing")
MARKERS = ("na", "n/a", "null", *DOUBTFUL_MARKERS)
LABEL_NAMES = ("label", "labels", "class", "classes", "target", "species", "y_true", "category")
# The commonest first: it wins a tie.
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe", " ": "space"}
SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data", ".npy")
OTHER_FILES = dict.fromkeys((".xlsx", ".xls", ".ods"), "is a spreadsheet; save it as CSV") | {
    ".parquet": "is Parquet; write it with pandas.read_parquet(...).to_csv('x.csv', index=False)",
    ".npz": "may hold several arrays; save one: np.save('x.npy', np.load('x.npz')['its name'])",
}
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
COMMA_NUMBER = r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?"
THOUSANDS = r"[+-]?[1-9]\d{0,2}(?:,\d{3})+"
DRESSED_NUMBER = r"[$€£¥+-]{0,2}\s?\d[\d,' ]*(?:[.,]\d*)?\s?[%$€£¥]?"  # 1,234.5 or $5 or 10 %
# Since 3.1 pandas reads numbers exactly without being asked to, and warns if it is.
OLD_PANDAS = tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1)
EXACT: dict[str, Any] = {"float_precision": "round_trip"} if OLD_PANDAS else {}


@dataclass(frozen=True)
class Table:
    """Numbers with the names that travel with them.

    Attributes:
        name: of the file; what messages call it.
        values: one row a datum; NaN marks a hole.
        columns: D names; where the file has none, x<k> for the k-th column of the file.
        row_names: one a row, if the file has them.
        labels: one a row, text or numbers, if there is a label column.
        label: that column's name.
        image_shape: height and width, for rows that are images.
        notes: what was found by looking, for a person to check.
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
        """How many entries are holes."""
        return int(np.isnan(self.values).sum())

    def constant_columns(self) -> tuple[str, ...]:
        """Names of the columns whose observed entries all equal the first of them."""
        holes = np.isnan(self.values)
        first = self.values[holes.argmin(0), np.arange(len(self.columns))]
        constant = ((self.values == first) | holes).all(0) & ~holes.all(0)
        return tuple(name for name, yes in zip(self.columns, constant, strict=True) if yes)


def digits_table() -> Table:
    """scikit-learn's handwritten digits, each pixel in 0..1 (sixteenths), labelled 0..9."""
    pixels, classes = map(np.asarray, load_digits(return_X_y=True))
    names = tuple(f"row {i}, column {j}" for i in range(8) for j in range(8))
    return Table(
        "digits / 16", pixels / 16, names, None, tuple(classes.tolist()), "digit", (8, 8)
    )


def read_table(
    path: str | Path,
    *,
    header: bool | None = None,
    delimiter: str | None = None,
    label: str | None = None,
    missing: Sequence[str] | None = None,
    image_shape: tuple[int, int] | None = None,
) -> Table:
    """A table from text (``.csv .tsv .txt .dat .data``, also ``.gz``) or from a ``.npy`` file.

    What is not given is found, and noted where that was a guess. Header: the first line, if it has
    words over numbers, an empty cell over row names, one name fewer than there are columns (R), or
    0, 1, 2, ... (pandas); or a ``#`` line above. Row names: the first column, if it is text and
    nameless or all different, or nameless whole numbers, all different. Labels: the one text
    column left, if values repeat, or whole numbers named class, label, target or the like. Decimal
    commas: if no comma separates cells and no number has a point.

    Args:
        path: the file.
        header: whether the first line (after ``#`` lines) has the names.
        delimiter: one character or its name: comma, tab, semicolon, pipe, space (white space).
        label: name of the label column, or its number if there is no header; "none": there is no
            such column.
        missing: what marks missing cells, text or numbers, *instead of* NA, N/A, null, none, ?, .,
            - and missing (in any case); an empty cell and NaN always do.
        image_shape: height and width, if rows are images; known for a (N, H, W) array.

    Raises:
        ValueError: if this is not one table of finite numbers and holes; says where and what to do.
        TypeError: if an array's entries are not real numbers.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    markers = MARKERS if missing is None else [missing] if isinstance(missing, str) else missing
    holes = ("", "nan", *(marker.strip().casefold() for marker in markers))
    if _suffix(path) != ".npy":
        draft = _draft_of_text(path, header, delimiter, holes)
    elif header is None and delimiter is None:
        draft = _draft_of_array(path, holes)
    else:
        raise ValueError(f"{path} is an array: it has no header and no delimiter to give")
    if len(draft.cells) < 2:
        raise ValueError(f"{path} has a single row; it must have two or more, one a datum")
    row_names, labels = draft.take_row_names(label), draft.take_labels(label)
    return draft.table(row_names, labels, image_shape or draft.image_shape)


def _suffix(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file in it")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in SUFFIXES and not path.name.lower().endswith(".npy.gz"):
        return suffix
    advice = "must end in .csv, .tsv, .txt, .dat or .data (all also with .gz), or in .npy"
    raise ValueError(f"{path} {OTHER_FILES.get(suffix, advice)}")


@dataclass
class _Draft:
    """Cells on their way to a table: their numbers, and ``odd``, words that are no numbers."""

    name: str
    cells: pd.DataFrame
    holes: tuple[str, ...]
    headed: bool = False
    nameless: bool = False
    line_of: Callable[[int], int] = int
    image_shape: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    odd: dict[str, pd.Series] = field(default_factory=dict)

    def find_numbers(self, comma: bool = False) -> "_Draft":
        amounts = [float(hole) for hole in self.holes if re.fullmatch(NUMBER, hole)]
        for name, cells in self.cells.items():
            values, odd = _numbers(cells, self.holes, comma)
            if amounts:
                values = np.where(np.isin(values, amounts), np.nan, values)
            self.numbers[str(name)], self.odd[str(name)] = values, odd
        return self

    def accept_decimal_commas(self, delimiter: str) -> None:
        before = self.odd.copy()
        cells = [odd for odd in before.values() if _mostly(odd, COMMA_NUMBER)]
        if not cells:
            return
        self.find_numbers(comma=True)
        worse = any(len(self.odd[name]) > len(odd) for name, odd in before.items())
        if worse or delimiter == "," or all(_mostly(odd, THOUSANDS, 1) for odd in cells):
            raise ValueError(
                f"{self.name} has numbers with commas ({cells[0].iloc[0]!r}, line "
                f"{self.line_of(cells[0].index[0])}), which may part decimals or thousands; write "
                "all numbers with a decimal point and nothing else"
            )
        self.notes.append(f"commas in numbers ({cells[0].iloc[0]!r}) are taken as decimal commas")

    def is_text(self, name: str) -> bool:
        observed = np.isfinite(self.numbers[name]).sum()
        return len(self.odd[name]) > observed and not _mostly(self.odd[name], DRESSED_NUMBER)

    def is_whole(self, name: str) -> bool:
        values = self.numbers[name]
        return bool(np.isfinite(values).all() and (values % 1 == 0).all())

    def find(self, label: str | None) -> str | None:
        """The column of that name, or of that number in a file without names."""
        if label is None or label.casefold() == "none":
            return None
        if not self.headed and label.isdecimal():
            label = f"x{int(label)}"
        if label not in self.cells:
            raise ValueError(f"{self.name} has no column {label!r}; it has {_some(self.cells)}")
        return label

    def take_row_names(self, label: str | None) -> tuple[str, ...] | None:
        name = str(self.cells.columns[0])
        words, text = self.cells[name].astype(str), self.is_text(name)
        different, odd = words.is_unique, len(self.odd[name]) > 0
        named = (odd or (self.is_whole(name) and different)) if self.nameless else False
        if self.find(label) == name or not (named or (text and different)):
            return None
        del self.numbers[name]
        kind = "text" if odd else "whole numbers, all different, without a name"
        self.notes.append(f"the first column ({name}) is taken as row names: it has {kind}")
        return tuple(words)

    def take_labels(self, label: str | None) -> tuple[str | None, tuple[Any, ...] | None]:
        name = self.guessed_label() if label is None else self.find(label)
        if name is None:
            return None, None
        values, odd = self.numbers.pop(name), self.odd[name]
        if missing := int(np.isnan(values).sum()) - len(odd):
            raise ValueError(
                f"{self.name}: the label column {name!r} has {missing} missing cells; fill them or "
                "remove those rows. If they name a class, say with missing what else marks a hole"
            )
        whole = values.astype(int) if not len(odd) and self.is_whole else values
        return name, tuple(self.cells[name] if len(odd) else whole.tolist())

    def guessed_label(self) -> str | None:
        text = [name for name in self.numbers if self.is_text(name)]
        named = [n for n in self.numbers if n.casefold() in LABEL_NAMES and self.is_whole(n)]
        if len(text) == 1 and not self.cells[text[0]].is_unique:
            self.notes.append(f"column {text[0]!r} is taken as labels: it is text that repeats")
            return text[0]
        if text or not named or len(self.numbers) == 1:
            return None
        self.notes.append(
            f"column {named[0]!r} is taken as labels, for its name; label 'none' keeps it as data"
        )
        return named[0]

    def table(
        self,
        row_names: tuple[str, ...] | None,
        labels: tuple[str | None, tuple[Any, ...] | None],
        image_shape: tuple[int, int] | None,
    ) -> Table:
        self.refuse_words()
        for name in self.numbers: ...
