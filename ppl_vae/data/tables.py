"""Tables as people have them: what a file does not say is found, and what was found is noted."""

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
from sklearn.datasets import load_digits

from ppl_vae.core.validation import as_matrix
from ppl_vae.data.csv_sniffing import NUMBER, SAMPLE, TextTable, quoted

MARKERS = ("na", "n/a", "null", "none", "?", ".", "-", "missing")
DOUBTFUL_MARKERS = MARKERS[3:]
LABEL_NAMES = ("label", "labels", "class", "classes", "target", "species", "y_true", "category")
SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data", ".npy")
OTHER_FILES = dict.fromkeys((".xlsx", ".xls", ".ods"), "is a spreadsheet; save it as CSV") | {
    ".parquet": "is Parquet; write it with pandas.read_parquet(...).to_csv('x.csv', index=False)",
    ".npz": "may hold several arrays; save one: np.save('x.npy', np.load('x.npz')['its name'])",
}
DRESSED_NUMBER = r"[$€£¥+-]{0,2}\s?\d[\d,' ]*(?:[.,]\d*)?\s?[%$€£¥]?"  # 1,234.5 or $5 or 10 %


@dataclass(frozen=True)
class Table:
    """Numbers with the names that travel with them.

    Attributes:
        name: of the file; what messages call it.
        values: one row a datum; NaN marks a missing value.
        columns: D names; where the file has none, x<k> for the k-th column of the file.
        row_names: one per row, if the file has them.
        labels: one per row, text or numbers, if there is a label column.
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
        """How many entries are missing values."""
        return int(np.isnan(self.values).sum())

    def constant_columns(self) -> tuple[str, ...]:
        """Names of the columns whose observed entries all equal the first of them."""
        holes = np.isnan(self.values)
        first = self.values[holes.argmin(0), np.arange(len(self.columns))]
        constant = ((self.values == first) | holes).all(0) & ~holes.all(0)
        return tuple(name for name, yes in zip(self.columns, constant, strict=True) if yes)


def digits_table() -> Table:
    """scikit-learn's handwritten digits, each pixel in 0..1 (sixteenths), labelled 0..9."""
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
        label: name of the label column, or its number if there is no header; "none" if there is
            no such column.
        missing: what marks missing cells, text or numbers, *instead of* NA, N/A, null, none, ?, .,
            - and missing (in any case); an empty cell and NaN always do.
        image_shape: height and width, if rows are images; known for an (N, H, W) array.

    Raises:
        ValueError: if it is not one table of finite numbers and missing values; says where, what
            to do.
        TypeError: if an array's entries are not real numbers.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    markers = MARKERS if missing is None else [missing] if isinstance(missing, str) else missing
    holes = ("", "nan", *(marker.strip().casefold() for marker in markers))
    if _suffix(path) == ".npy":
        draft = _draft_of_array(path, holes, given=(header, delimiter))
    else:
        draft = _draft_of_text(path, header, delimiter, holes)
    if len(draft.cells) < 2:
        raise ValueError(f"{path} has a single row; it must have two or more, one per datum")
    row_names, (labels, label) = draft.take_row_names(label), draft.take_labels(label)
    values, shape = draft.matrix(), image_shape or draft.image_shape
    if shape and shape[0] * shape[1] != values.shape[1]:
        size = f"{shape[0]} x {shape[1]}"
        raise ValueError(f"{path}: {values.shape[1]} columns make no images of {size} pixels")
    names, notes = tuple(draft.numbers), tuple(draft.notes)
    return Table(path.name, values, names, row_names, labels, label, shape, notes)


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
class _TableBuilder:
    """Cells on their way to a table: their numbers, and ``odd``, words that are no numbers."""

    name: str
    cells: pd.DataFrame
    holes: Sequence[str]
    comma: bool = False
    headed: bool = False
    nameless: bool = False
    line_of: Callable[[int], int] = int
    image_shape: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.numbers: dict[str, np.ndarray] = {}
        self.odd: dict[str, pd.Series] = {}
        for key, cells in self.cells.items():
            self.numbers[str(key)], self.odd[str(key)] = _numbers(cells, self.holes, self.comma)

    def is_text(self, name: str) -> bool:
        """Whether it has more words than numbers, and they are not 1,234 or 10 %."""
        odd, observed = self.odd[name], int(np.isfinite(self.numbers[name]).sum())
        return len(odd) > observed and bool(odd.str.fullmatch(DRESSED_NUMBER).mean() <= 0.5)

    def is_whole(self, name: str) -> bool:
        """Whether it holds whole numbers and nothing else."""
        values = self.numbers[name]
        return bool(np.isfinite(values).all() and (values % 1 == 0).all())

    def find(self, label: str | None) -> str | None:
        """The column of that name, or of that number in a file without names."""
        if label is None or label.casefold() == "none":
            return None
        if not self.headed and label.isdecimal():
            label = f"x{int(label)}"
        if label in self.cells:
            return label
        raise ValueError(f"{self.name} has no column {label!r}; it has {quoted(self.cells)}")

    def take_row_names(self, label: str | None) -> tuple[str, ...] | None:
        """Row names from the first column, which then is no data, if it looks like them."""
        name = str(self.cells.columns[0])
        words, odd = self.cells[name].astype(str), len(self.odd[name]) > 0
        sure = self.nameless and (odd or (words.is_unique and self.is_whole(name)))
        if self.find(label) == name or not (sure or (words.is_unique and self.is_text(name))):
            return None
        del self.numbers[name]
        kind = "text" if odd else "whole numbers, all different, and no name"
        self.notes.append(f"the first column is taken as row names: it has {kind}")
        return tuple(words)

    def take_labels(self, label: str | None) -> tuple[tuple[Any, ...] | None, str | None]:
        """The labels and their column, which then is no data; None if there are none."""
        name = self.guessed_label() if label is None else self.find(label)
        if name is None:
            return None, None
        whole, values, odd = self.is_whole(name), self.numbers.pop(name), self.odd[name]
        if missing := int(np.isnan(values).sum()) - len(odd):
            raise ValueError(
                f"{self.name}: the label column {name!r} is empty in {missing} row(s); fill them "
                "or remove the rows; if they name a class, give as missing what else marks a "
                "missing value"
            )
        labels = self.cells[name] if len(odd) else values.astype(int) if whole else values
        return tuple(labels.tolist()), name

    def guessed_label(self) -> str | None:
        """The column that looks like labels."""
        text = [name for name in self.numbers if self.is_text(name)]
        named = [n for n in self.numbers if n.casefold() in LABEL_NAMES and self.is_whole(n)]
        if len(text) == 1 and not self.cells[text[0]].is_unique:
            note = f"column {text[0]!r} is taken as labels: it is text that repeats"
            kept = named
        elif text or not named or len(self.numbers) == 1:
            return None
        else:
            note = f"column {named[0]!r} is taken as labels for its name; label 'none' keeps it in"
            text, kept = named, named[1:]
        self.notes.append(note + f"; {quoted(kept)} is kept as data" * bool(kept))
        return text[0]

    def matrix(self) -> Float[np.ndarray, "N D"]:
        """What is left, as numbers and missing values."""
        self.refuse_words()
        words = [self.cells[n] for n in self.numbers if self.cells[n].dtype == object]
        doubtful = (cells[cells.str.casefold().isin(DOUBTFUL_MARKERS)] for cells in words)
        for word, times in Counter(word for cells in doubtful for word in cells).items():
            self.notes.append(f"cells written {word!r} are taken as missing: {times}")
        stack = np.column_stack(list(self.numbers.values()))
        return as_matrix(stack, name=self.name, dtype=torch.float64).numpy()

    def refuse_words(self) -> None:
        """Refuse words that are neither numbers nor missing values, and tables without numbers."""
        text = [name for name in self.numbers if self.is_text(name)]
        for name in self.numbers:
            if len(odd := self.odd[name]) and name not in text:
                rows = list(odd.drop_duplicates().index)[:3]
                seen = ", ".join(f"{odd[row]!r} (line {self.line_of(row)})" for row in rows)
                raise ValueError(
                    f"{self.name}: column {name!r}: {len(odd)} of {len(self.cells)} cells "
                    f"hold no number: {seen}; give missing {odd.iloc[0]!r} if that marks a "
                    "missing value, otherwise mend them"
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


def _numbers(
    cells: pd.Series, holes: Sequence[str], comma: bool
) -> tuple[Float[np.ndarray, "N"], pd.Series]:
    """Numbers (NaN elsewhere), and the words that are neither numbers nor missing values."""
    values, odd = cells, cells.head(0)
    if cells.dtype == object:
        plain = cells.str.replace(",", ".") if comma else cells
        found = pd.Series(pd.to_numeric(plain, errors="coerce"), index=cells.index).notna()
        values = plain.where(found, "nan")
        odd = cells.loc[~found & ~cells.str.casefold().isin(holes)]
    array = values.to_numpy().astype(np.float64)
    amounts = [float(hole) for hole in holes if re.fullmatch(NUMBER, hole)]
    return (np.where(np.isin(array, amounts), np.nan, array) if amounts else array), odd


def _draft_of_array(path: Path, holes: Sequence[str], given: tuple[Any, ...]) -> _TableBuilder:
    if given != (None, None):
        raise ValueError(f"{path} is an array: it has no header and no delimiter")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is no .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.names or array.ndim not in (2, 3):
        raise ValueError(
            f"{path} must hold one array of numbers, (N, D), one row a datum, or (N, H, W), "
            f"images; it has {getattr(array, 'dtype', 'several')} {np.shape(array)}"
        )
    rows = array.reshape(len(array), math.prod(array.shape[1:]))
    notes = []
    if rows.dtype == np.float16:
        notes = ["the numbers are of float16, which holds three to four digits; they are raised"]
        rows = rows.astype(np.float64)
    flat = as_matrix(rows, name=path.name, dtype=torch.float64).numpy()
    cells = pd.DataFrame(flat, columns=[f"x{k + 1}" for k in range(flat.shape[1])])
    shape = (array.shape[1], array.shape[2]) if array.ndim == 3 else None
    return _TableBuilder(path.name, cells, holes, image_shape=shape, notes=notes)


def _draft_of_text(
    path: Path, header: bool | None, delimiter: str | None, holes: Sequence[str]
) -> _TableBuilder:
    sheet = TextTable.of(path, delimiter, holes)
    width = sheet.width(header)
    first, *rest = (row for _, row in islice(sheet.rows(), SAMPLE))
    short = len(first) < width
    first = [""] * short + [re.sub(r"Unnamed: \d+", "", cell.strip()) for cell in first]
    if not rest and (header or not all(map(sheet.is_number, first))):
        raise ValueError(f"{path} has column names and no rows")
    found = short or (bool(rest) and sheet.has_header(first, rest))
    above = [] if header is False or found else sheet.names_above(width)
    headed = header is not False and (found or (header is True and not above))
    names = first if headed else above or [""] * width
    if header is None:
        sheet.note_header(first, headed, bool(above))
    cells = sheet.frame(sheet.distinct(names), headed)
    return _TableBuilder(
        path.name,
        cells,
        holes,
        comma=sheet.decimal == ",",
        headed=headed or bool(above),
        nameless=(headed or bool(above)) and not names[0],
        line_of=lambda row: sheet.line_of(row + headed),
        notes=sheet.notes,
    )
