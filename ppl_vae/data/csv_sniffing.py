"""Text files parsed into rows of cells: encoding, delimiter, column names and decimal commas."""

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

PANDAS_MARKERS = ("", "nan", "NaN", "NAN", "NA", "N/A", "null", "NULL")
"""Spellings of missing cells that pandas is asked to parse itself, which is faster."""
DELIMITERS = {"tab": "\t", "semicolon": ";", "pipe": "|", "comma": ",", "space": " "}
"""Names of the delimiters that are detected."""
SAMPLE_LINES = 51
"""Number of lines, the header included, that guesses about a file are based on."""
SNIFFED_CHARACTERS, SNIFFED_LINES = 30_000, 5
"""Size of the sample that the delimiter is detected in, and the least number of its lines."""
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
POINT_NUMBER = r"[+-]?\d*\.\d+(?:[eE][+-]?\d+)?"
COMMA_NUMBER = POINT_NUMBER.replace(r"\.", ",")
THOUSANDS_NUMBER = r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?!\d)"
# From version 3.1 on pandas parses numbers exactly by default, and warns about the argument.
_INEXACT_PANDAS = tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1)
_EXACT_FLOATS: dict[str, Any] = {"float_precision": "round_trip"} if _INEXACT_PANDAS else {}


def quoted(names: Iterable[Any]) -> str:
    """The first ten names in quotation marks, separated by commas."""
    names = [repr(str(name)) for name in names]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def detect_delimiter(lines: Sequence[str]) -> str:
    """The delimiter of the first lines of a table, as detected by clevercsv.

    A table of a single column has none; a tab is returned then.

    References:
        van den Burg, Nazabal, Sutton: Wrangling messy CSV files by detecting row and type
        patterns (2019).
    """
    from clevercsv import Sniffer
    from clevercsv.exceptions import NoDetectionResult

    sample, size = [], 0
    for line in lines[:SAMPLE_LINES]:
        if len(sample) >= SNIFFED_LINES and size + len(line) > SNIFFED_CHARACTERS:
            break
        sample.append(line)
        size += len(line)
    try:
        dialect = Sniffer().sniff("\n".join(sample), delimiters=list(DELIMITERS.values()))
    except NoDetectionResult:
        return "\t"
    return (dialect.delimiter if dialect else "") or "\t"


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    if raw.startswith(b"PK\3\4") or (b"\0" in raw and not wide):
        raise ValueError(f"{path} is not a text file, despite its name; save the table as CSV")
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _strip_cells(cells: pd.Series) -> pd.Series:
    words = cells.astype(object).where(cells.notna(), "")
    return pd.Series([str(word).strip() for word in words], dtype=object)


@dataclass
class TextTable:
    """The non-empty lines of a text file with their line numbers, and how to parse them.

    Attributes:
        name: name of the file; messages refer to it.
        lines: line number and text of each line with cells.
        delimiter: the character between cells.
        na_markers: casefolded texts that mark a missing cell.
        comments: the ``#`` lines above the table.
        decimal: the decimal separator, ``"."`` or ``","``.
        notes: what was detected, for the user to check.
    """

    name: str
    lines: list[tuple[int, str]]
    delimiter: str
    na_markers: Sequence[str]
    comments: list[tuple[int, str]] = field(default_factory=list)
    decimal: str = "."
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.delimiter == " ":
            self.lines = [(number, " ".join(line.split())) for number, line in self.lines]

    @classmethod
    def from_file(
        cls, path: Path, delimiter: str | None, na_markers: Sequence[str]
    ) -> "TextTable":
        """Read a file; what is detected is added to the notes.

        Args:
            path: the file.
            delimiter: a character or the name of one; None to detect it.
            na_markers: casefolded texts that mark a missing cell.

        Raises:
            ValueError: if the file is not text or has no lines with cells; if the delimiter is
                longer than one character.
        """
        texts = enumerate(_read_text(path).split("\n"), 1)
        lines = [(number, line) for number, line in texts if line.strip(" ")]
        comments = list(takewhile(lambda numbered: numbered[1].startswith("#"), lines))
        if len(comments) == len(lines):
            raise ValueError(f"{path} is empty: no line has cells")
        lines = lines[len(comments) :]
        character = DELIMITERS.get(delimiter or "", delimiter)
        if character is None:
            character = detect_delimiter([line for _, line in lines[:SAMPLE_LINES]])
        elif len(character) != 1:
            raise ValueError(f"delimiter must be one character or one of {quoted(DELIMITERS)}")
        table = cls(path.name, lines, character, na_markers, comments)
        table.add_line_notes(delimiter)
        table.detect_decimal_comma()
        return table

    def rows(self, **options: Any) -> Iterator[tuple[int, list[str]]]:
        """Iterate over the rows: the number of the first line of each, and its cells."""
        texts = (line + "\n" for _, line in self.lines)
        reader = csv.reader(texts, delimiter=self.delimiter, skipinitialspace=True, **options)
        start = 0
        try:
            for row in reader:
                yield self.lines[start][0], row
                start = reader.line_num
        except csv.Error as error:
            number = self.lines[start][0]
            raise ValueError(
                f"{self.name}: fix the quotation marks in line {number} ({error})"
            ) from error

    def line_number(self, row: int) -> int:
        """The number of the line in which a row begins."""
        return next(islice(self.rows(), row, None))[0]

    def is_number(self, cell: str) -> bool:
        """Whether a cell is a number."""
        plain = cell if self.delimiter == "," else cell.replace(",", ".")
        return re.fullmatch(NUMBER, plain.strip()) is not None

    def is_missing(self, cell: str) -> bool:
        """Whether a cell marks a missing value."""
        return cell.strip().casefold() in self.na_markers

    def num_columns(self, header: bool | None) -> int:
        """The number of cells per line, the same for all lines.

        The first line may have one cell fewer: R writes no name over the row names.

        Raises:
            ValueError: if another line has more or fewer cells.
        """
        widths = [len(row) for _, row in self.rows(strict=True)]
        width = Counter(widths[1:] or widths).most_common(1)[0][0]
        wrong = [k for k, found in enumerate(widths) if found != width]
        short = wrong[:1] == [0] and widths[0] == width - 1 and header is not False
        if short and self.has_unnamed_row_names():
            del wrong[0]
        if wrong:
            raise ValueError(
                f"{self.name}: line {self.line_number(wrong[0])} has {widths[wrong[0]]} cell(s) "
                f"where {width} are expected; fix the line or pass delimiter="
            )
        return width

    def has_unnamed_row_names(self) -> bool:
        """Whether the first line names all columns except the row names below it."""
        (_, first), (_, second) = islice(self.rows(), 2)
        words = not all(map(self.is_number, first))
        numbered = words and second[0].isdecimal() and second[-1].strip() != ""
        return numbered or not self.is_number(second[0])

    def has_header(self, first: list[str], rest: list[list[str]]) -> bool:
        """Whether the first row holds column names.

        It does if it has words over numbers, an empty cell over row names, or the column numbers
        0, 1, 2, ... that pandas writes.

        Args:
            first: the cells of the first row.
            rest: the cells of the rows below.
        """
        observed = [
            [c for c in cells if not self.is_missing(c)] for cells in zip(*rest, strict=True)
        ]
        share = [np.mean([self.is_number(c) for c in cells] or 0) for cells in observed]
        over = [cell for cell, s in zip(first, share, strict=True) if s > 0.5]
        words = any(not (self.is_number(cell) or self.is_missing(cell)) for cell in over)
        if first[0]:
            return words or (len(first) > 2 and first == [str(k) for k in range(len(first))])
        counted = [str(k) for k in range(len(first))]
        counts = first[1:] in (counted[:-1], counted[1:])
        return words or (bool(observed[0]) and (counts or bool(share[0] == 0)))

    def comment_names(self, num_columns: int) -> list[str]:
        """The column names in the last comment line; empty if their number does not fit."""
        text = self.comments[-1][1][1:].strip() if self.comments else ""
        if not text:
            return []
        candidates = (text.split(self.delimiter), text.split())
        return next(
            (
                [name.strip() for name in names]
                for names in candidates
                if len(names) == num_columns
            ),
            [],
        )

    def distinct_names(self, names: list[str]) -> list[str]:
        """Distinct names for all columns: x1, x2, ... for empty ones, and a suffix for repeats."""
        names = [name or f"x{k}" for k, name in enumerate(names, 1)]
        taken, previous = set(names), set()
        for k, name in enumerate(names):
            if name in previous:
                fresh = (f"{name}.{i}" for i in range(1, len(names) + 1))
                names[k] = next(other for other in fresh if other not in taken)
                self.notes.append(f"column name {name!r} is repeated; renamed to {names[k]!r}")
            taken.add(names[k])
            previous.add(names[k])
        return names

    def add_line_notes(self, delimiter: str | None) -> None:
        """Add notes on the detected delimiter and on skipped lines."""
        if delimiter is None and self.delimiter not in ",\t":
            kind = next(name for name, d in DELIMITERS.items() if d == self.delimiter)
            self.notes.append(f"delimiter detected: {kind}")
        if blank := self.lines[-1][0] - self.lines[0][0] + 1 - len(self.lines):
            self.notes.append(f"blank lines between the rows are skipped: {blank}")
        if self.comments:
            self.notes.append(f"lines with # above the table are skipped: {len(self.comments)}")

    def add_header_note(self, first: list[str], has_header: bool, in_comment: bool) -> None:
        """Add a note on where the column names were found, unless that is obvious."""
        line = f"line {self.lines[0][0]} is used as"
        if in_comment:
            self.notes.append(f"column names are read from line {self.comments[-1][0]}, after #")
        elif not has_header:
            self.notes.append(f"{line} data, not as column names: it has no words over numbers")
        elif any(map(self.is_number, first)):
            self.notes.append(f"{line} column names, although it has numbers")

    def detect_decimal_comma(self) -> None:
        """Detect decimal commas (1,5), excluding thousands separators (1,500).

        Numbers with a decimal point (1.5) anywhere in the file rule them out.
        """
        if self.delimiter == "," or not any("," in line for _, line in self.lines):
            return
        text = "\n".join(line for _, line in self.lines)
        edge = f'["{re.escape(self.delimiter)}]'
        points, commas = (
            re.search(f"(?:^|{edge}) *({cell}) *(?={edge}|$)", text, re.MULTILINE)
            for cell in (POINT_NUMBER, f"(?!{THOUSANDS_NUMBER}){COMMA_NUMBER}")
        )
        if commas and not points:
            self.decimal = ","
            self.notes.append(f"decimal commas detected, as in {commas[1]}")

    def to_frame(self, names: list[str], has_header: bool) -> pd.DataFrame:
        """The cells: numbers in purely numeric columns, stripped text in the others."""
        markers = [word for word in PANDAS_MARKERS if word.casefold() in self.na_markers]
        cells = pd.read_csv(
            io.StringIO("\n".join(line for _, line in self.lines)),
            sep=self.delimiter,
            header=None,
            skiprows=int(has_header),
            dtype={0: str},
            keep_default_na=False,
            na_values={k: markers for k in range(1, len(names))},
            skipinitialspace=True,
            skip_blank_lines=False,
            low_memory=False,
            decimal=self.decimal,
            **_EXACT_FLOATS,
        )
        columns = zip(names, (cells[k] for k in cells), strict=True)
        return pd.DataFrame(
            {name: c if c.dtype.kind in "iuf" else _strip_cells(c) for name, c in columns}
        )


def parse_numbers(
    cells: pd.Series, na_markers: Sequence[str], decimal_comma: bool
) -> tuple[Float[np.ndarray, "N"], pd.Series]:
    """Numbers (NaN elsewhere), and the cells that are neither numbers nor missing."""
    values, words = cells, cells.head(0)
    if cells.dtype == object:
        plain = cells.str.replace(",", ".") if decimal_comma else cells
        numeric = pd.Series(pd.to_numeric(plain, errors="coerce"), index=cells.index).notna()
        values = plain.where(numeric, "nan")
        words = cells.loc[~numeric & ~cells.str.casefold().isin(na_markers)]
    array = values.to_numpy().astype(np.float64)
    numbers = [float(marker) for marker in na_markers if re.fullmatch(NUMBER, marker)]
    return (np.where(np.isin(array, numbers), np.nan, array) if numbers else array), words
