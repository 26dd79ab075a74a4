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

MARKERS = ("na", "n/a", "null", "none", "?", ".", "-", "missing")
DOUBTFUL = MARKERS[3:]
LABEL_NAMES = ("label", "labels", "class", "classes", "target", "species", "y_true", "category")
# The commonest first: it wins a tie.
DELIMITERS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|", "space": " "}
SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data", ".npy")
OTHER_FILES = dict.fromkeys((".xlsx", ".xls", ".ods"), "is a spreadsheet; save it as CSV") | {
    ".parquet": "is Parquet; write it with pandas.read_parquet(...).to_csv('x.csv', index=False)",
    ".npz": "may hold several arrays; save one: np.save('x.npy', np.load('x.npz')['its name'])",
}
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
COMMA_NUMBER = r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?"
THOUSANDS = r"[+-]?[1-9]\d{0,2}(?:,\d{3})+"
DRESSED = r"[$€£¥+-]{0,2}\s?\d[\d,' ]*(?:[.,]\d*)?\s?[%$€£¥]?"  # 1,234.5 or $5 or 10 %
# pandas 3.1 reads numbers exactly without being asked to, and warns if it is.
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
    pixels, digit = map(np.asarray, load_digits(return_X_y=True))
    names = tuple(f"row {i}, column {j}" for i in range(8) for j in range(8))
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
        ValueError: if it is not one table of finite numbers and holes; says where, what to do.
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
        raise ValueError(f"{path} is an array: it has no header and no delimiter")
    if len(draft.cells) < 2:
        raise ValueError(f"{path} has a single row; it must have more, one a datum")
    row_names, (labels, label) = draft.take_row_names(label), draft.take_labels(label)
    values, shape = draft.matrix(), image_shape or draft.image_shape
    if shape and shape[0] * shape[1] != values.shape[1]:
        raise ValueError(f"{path} has {values.shape[1]} columns: no images of {shape}, row by row")
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
class _Draft:
    """Cells on their way to a table: their numbers, and ``odd``, words that are no numbers."""

    name: str
    cells: pd.DataFrame
    numbers: dict[str, np.ndarray]
    odd: dict[str, pd.Series]
    notes: list[str] = field(default_factory=list)
    headed: bool = False
    nameless: bool = False
    line_of: Callable[[int], int] = int
    image_shape: tuple[int, int] | None = None

    @classmethod
    def of(cls, name: str, cells: pd.DataFrame, holes: Sequence[str], **rest: Any) -> "_Draft":
        comma = rest.pop("comma", False)
        pairs = {str(key): _numbers(column, holes, comma) for key, column in cells.items()}
        numbers, odd = ({key: pair[k] for key, pair in pairs.items()} for k in (0, 1))
        return cls(name, cells, numbers, odd, **rest)

    def is_text(self, name: str) -> bool:
        """Whether it has more words than numbers, and they are not 1,234 or 10 %."""
        odd, observed = self.odd[name], np.isfinite(self.numbers[name]).sum()
        return len(odd) > observed and bool(odd.str.fullmatch(DRESSED_NUMBER).mean() <= 0.5)

    def is_whole(self, name: str) -> bool:
        values = self.numbers[name]
        return bool(np.isfinite(values).all() and (values % 1 == 0).all())

    def find(self, label: str | None) -> str | None:
        if label is None or label.casefold() == "none":
            return None
        if not self.headed and label.isdecimal():
            label = f"x{int(label)}"
        if label in self.cells:
            return label
        raise ValueError(f"{self.name} has no column {label!r}; it has {_some(self.cells)}")

    def take_row_names(self, label: str | None) -> tuple[str, ...] | None:
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
        name = self.guessed_label() if label is None else self.find(label)
        if name is None:
            return None, None
        whole, values, odd = self.is_whole(name), self.numbers.pop(name), self.odd[name]
        if missing := int(np.isnan(values).sum()) - len(odd):
            raise ValueError(
                f"{self.name}: the label column {name!r} has {missing} missing cells; fill them or "
                "remove their rows; if they name a class, give as missing what else marks a hole"
            )
        labels = self.cells[name] if len(odd) else values.astype(int) if whole else values
        return tuple(labels.tolist()), name

    def guessed_label(self) -> str | None:
        text = [name for name in self.numbers if self.is_text(name)]
        named = [n for n in self.numbers if n.casefold() in LABEL_NAMES and self.is_whole(n)]
        if len(text) == 1 and not self.cells[text[0]].is_unique:
            self.notes.append(f"column {text[0]!r} is taken as labels: it is text that repeats")
            return text[0]
        if text or not named or len(self.numbers) == 1:
            return None
        self.notes.append(
            f"column {named[0]!r} is taken as labels for its name; label 'none' keeps it as data"
        )
        return named[0]

    def matrix(self) -> Float[np.ndarray, "N D"]:
        self.refuse_words()
        for name, values in self.numbers.items():
            if self.cells[name].dtype == object:
                words = self.cells[name][np.isnan(values)]
                for word, times in (
                    words[words.str.casefold().isin(DOUBTFUL)].value_counts().items()
                ):
                    self.notes.append(
                        f"column {name!r}: {times} cells {word!r} are taken as missing"
                    )
        stack = np.column_stack(list(self.numbers.values()))
        return as_matrix(stack, name=self.name, dtype=torch.float64).numpy()

    def refuse_words(self) -> None:
        text = [name for name in self.numbers if self.is_text(name)]
        for name in self.numbers:
            if len(odd := self.odd[name]) and name not in text:
                first = odd.drop_duplicates()[:3].items()
                seen = ", ".join(f"{word!r} (line {self.line_of(row)})" for row, word in first)
                raise ValueError(
                    f"{self.name}: column {name!r} has {len(odd)} cells that are no numbers: {seen}; "
                    f"give missing {odd.iloc[0]!r} if that marks a missing value, or mend it"
                )
        if text or not self.numbers:
            raise ValueError(
                f"{self.name} has columns of text, {_some(text)}; choose one as label if it has "
                "classes, and remove the others or encode them as numbers"
            )


def _some(names: Iterable[Any]) -> str:
    names = [repr(str(name)) for name in names]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _numbers(
    cells: pd.Series, holes: Sequence[str], comma: bool
) -> tuple[Float[np.ndarray, "N"], pd.Series]:
    """Numbers (NaN elsewhere), and the words that are neither numbers nor holes."""
    values, odd = cells, cells[:0]
    if cells.dtype == object:
        plain = cells.str.replace(",", ".") if comma else cells
        found = pd.to_numeric(plain, errors="coerce").notna()
        values, odd = plain.where(found, "nan"), cells[~found & ~cells.str.casefold().isin(holes)]
    amounts = [float(hole) for hole in holes if re.fullmatch(NUMBER, hole)]
    array = values.to_numpy().astype(np.float64)
    return (np.where(np.isin(array, amounts), np.nan, array) if amounts else array), odd


def _draft_of_array(path: Path, holes: Sequence[str]) -> _Draft:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is no .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.names or array.ndim not in (2, 3):
        raise ValueError(
            f"{path} must hold one array of numbers, (N, D), one row a datum, or (N, H, W), "
            f"images; it has {getattr(array, 'dtype', 'several')} {np.shape(array)}"
        )
    flat = as_matrix(array.reshape(len(array), -1), name=path.name, dtype=torch.float64).numpy()
    cells = pd.DataFrame(flat, columns=[f"x{k + 1}" for k in range(flat.shape[1])])
    shape = (array.shape[1], array.shape[2]) if array.ndim == 3 else None
    return _Draft.of(path.name, cells, holes, image_shape=shape)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    if raw.startswith(b"PK\3\4") or (b"\0" in raw and not wide):
        raise ValueError(f"{path} holds no text, whatever its name says; save the table as CSV")
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass
class _Sheet:
    """Lines that have cells, each with its number in the file."""

    lines: list[tuple[int, str]]
    delimiter: str
    holes: Sequence[str]

    def __post_init__(self) -> None:
        if self.delimiter == " ":
            self.lines = [(k, " ".join(line.split())) for k, line in self.lines]

    def rows(self, **options: Any) -> Any:
        texts = (line for _, line in self.lines)
        return csv.reader(texts, delimiter=self.delimiter, skipinitialspace=True, **options)

    def line_of(self, row: int) -> int:
        rows = self.rows()
        next(islice(rows, row, row), None)
        return self.lines[rows.line_num][0]

    def width(self, name: str) -> int:
        try:
            widths = [len(row) for row in self.rows(strict=True)]
        except csv.Error as error:
            raise ValueError(f"{name}: a quotation mark is not closed ({error})") from error
        width = Counter(widths[1:] or widths).most_common(1)[0][0]
        for row, found in enumerate(widths):
            if found != width and (row or found != width - 1):
                raise ValueError(
                    f"{name}: line {self.line_of(row)} has {found} cells where {width} are expected; "
                    "mend it, or give the delimiter"
                )
        return width

    def score(self) -> tuple[bool, int, float]:
        """How evenly its delimiter parts the lines, and how many numbers that makes."""
        first, *rest = self.rows()
        width, times = Counter(map(len, rest or [first])).most_common(1)[0]
        even = times + (len(first) in (width, width - 1))
        numbers = [self.is_number(cell) for row in rest for cell in row]
        return width > 1, even, float(np.mean(numbers or 0))

    def is_number(self, cell: str) -> bool:
        plain = cell if self.delimiter == "," else cell.replace(",", ".")
        return re.fullmatch(NUMBER, plain.strip()) is not None

    def has_header(self, first: list[str], rest: list[list[str]]) -> bool:
        """Words over numbers, nothing over row names, or the column numbers of pandas."""
        filled = [[c for c in column if not self.is_hole(c)] for column in zip(*rest, strict=True)]
        share = [np.mean([self.is_number(c) for c in column] or 0) for column in filled]
        over = [cell for cell, s in zip(first, share, strict=True) if s > 0.5]
        words = any(not (self.is_number(cell) or self.is_hole(cell)) for cell in over)
        names = first[not first[0] :]
        counted = (
            names == [str(k) for k in range(len(names))] and len(names) + 2 * (not first[0]) > 2
        )
        return words or counted or (not first[0] and bool(filled[0]) and share[0] == 0)

    def is_hole(self, cell: str) -> bool:
        return cell.strip().casefold() in self.holes

    def has_decimal_commas(self) -> bool:
        """Whether cells like 1,5 are there, some not like 1,500, and none like 1.5."""
        text = "\n".join(line for _, line in self.lines)
        cell = rf'(?:^|["{self.delimiter}])[ ]*(?:{{}})[ ]*(?=$|["{self.delimiter}])'
        points, commas = (
            re.search(cell.format(pattern), text, re.MULTILINE)
            for pattern in (
                r"[+-]?\d*\.\d+(?:[eE][+-]?\d+)?",
                rf"(?!{THOUSANDS}(?!\d)){COMMA_NUMBER}",
            )
        )
        return self.delimiter != "," and "," in text and commas is not None and points is None

    def frame(self, names: list[str], headed: bool, comma: bool) -> pd.DataFrame:
        """The cells: numbers where a column has nothing else, elsewhere stripped words."""
        plain = [word for word in PLAIN_HOLES if word.casefold() in self.holes]
        cells = pd.read_csv(
            io.StringIO("\n".join(line for _, line in self.lines)),
            sep=self.delimiter,
            header=None,
            skiprows=int(headed),
            dtype={0: str},
            keep_default_na=False,
            na_values={k: plain for k in range(1, len(names))},
            skipinitialspace=True,
            skip_blank_lines=False,
            low_memory=False,
            decimal="," if comma else ".",
            **EXACT,
        )
        columns = (cells[k] for k in cells)
        return pd.DataFrame(
            {
                name: cell if cell.dtype.kind in "iuf" else _stripped(cell)
                for name, cell in zip(names, columns, strict=True)
            }
        )


def _stripped(cells: pd.Series) -> pd.Series:
    return cells.astype(object).where(cells.notna(), "").map(str).astype(object).str.strip()


def _draft_of_text(
    path: Path, header: bool | None, delimiter: str | None, holes: Sequence[str]
) -> _Draft:
    texts = enumerate(_read_text(path).split("\n"), 1)
    lines = [(number, line) for number, line in texts if line.strip(" ")]
    comments = list(takewhile(lambda numbered: numbered[1].startswith("#"), lines))
    if len(comments) == len(lines):
        raise ValueError(f"{path} is empty: no line has cells")
    lines = lines[len(comments) :]
    sheet = _Sheet(lines, _delimiter(lines, delimiter, holes), holes)
    width = sheet.width(path.name, header)
    first, *rest = islice(sheet.rows(), SAMPLE)
    first = [""] * (width - len(first)) + first
    if not rest and (header or not all(map(sheet.is_number, first))):
        raise ValueError(f"{path} has column names and no rows")
    headed = (bool(rest) and sheet.has_header(first, rest)) if header is None else header
    above = sheet.names_above(comments, width) if header is not False and not headed else []
    comma = sheet.has_decimal_commas()
    notes = sheet.notes(comments, comma)
    if above:
        notes.append(f"the column names are those of the comment in line {comments[-1][0]}")
    elif header is None and not headed:
        notes.append(f"line {lines[0][0]} is taken as data: it has no words over numbers")
    elif header is None and any(map(sheet.is_number, first)):
        notes.append(f"line {lines[0][0]} is taken as column names, though it has numbers")
    names = above or (first if headed else [""] * width)
    cells = sheet.frame(_distinct(names, notes), headed, comma)
    return _Draft.of(
        path.name,
        cells,
        holes,
        comma=comma,
        notes=notes,
        headed=headed or bool(above),
        nameless=(headed or bool(above)) and not names[0].strip(),
        line_of=lambda row: sheet.line_of(row + headed),
    )
