"""Text files as rows of cells: encoding, delimiter, column names, decimal commas."""

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

PLAIN_HOLES = ("", "nan", "NaN", "NAN", "NA", "N/A", "null", "NULL")
# The earlier wins a tie: commas and spaces stand within cells, too.
DELIMITERS = {"tab": "\t", "semicolon": ";", "pipe": "|", "comma": ",", "space": " "}
SAMPLE = 51
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
POINT_NUMBER = r"[+-]?\d*\.\d+(?:[eE][+-]?\d+)?"
COMMA_NUMBER = POINT_NUMBER.replace(r"\.", ",")
THOUSANDS = r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?!\d)"
# pandas 3.1 reads numbers exactly without being asked to, and warns if it is.
OLD_PANDAS = tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1)
EXACT: dict[str, Any] = {"float_precision": "round_trip"} if OLD_PANDAS else {}


def quoted(names: Iterable[Any]) -> str:
    """The first ten of them, in quotation marks."""
    names = [repr(str(name)) for name in names]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


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


def _stripped(cells: pd.Series) -> pd.Series:
    words = cells.astype(object).where(cells.notna(), "")
    return pd.Series([str(word).strip() for word in words], dtype=object)


@dataclass
class TextTable:
    """The lines of a text file that have cells, each with its number."""

    name: str
    lines: list[tuple[int, str]]
    delimiter: str
    holes: Sequence[str]
    comments: list[tuple[int, str]] = field(default_factory=list)
    decimal: str = "."
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.delimiter == " ":
            self.lines = [(number, " ".join(line.split())) for number, line in self.lines]

    @classmethod
    def of(cls, path: Path, delimiter: str | None, holes: Sequence[str]) -> "TextTable":
        """The sheet in a file; what is found is added to its notes.

        Raises:
            ValueError: if the file holds no text or no lines with cells.
        """
        texts = enumerate(_read_text(path).split("\n"), 1)
        lines = [(number, line) for number, line in texts if line.strip(" ")]
        comments = list(takewhile(lambda numbered: numbered[1].startswith("#"), lines))
        if len(comments) == len(lines):
            raise ValueError(f"{path} is empty: no line has cells")
        lines = lines[len(comments) :]
        given = DELIMITERS.get(delimiter or "", delimiter)
        if given is None:
            start = [cls(path.name, lines[:SAMPLE], d, holes) for d in DELIMITERS.values()]
            given = max(start, key=cls.score).delimiter
        elif len(given) != 1:
            raise ValueError(f"delimiter must be one character or one of {quoted(DELIMITERS)}")
        sheet = cls(path.name, lines, given, holes, comments)
        sheet.note_lines(delimiter)
        sheet.find_decimal_commas()
        return sheet

    def score(self) -> tuple[bool, float, float]:
        """How evenly its delimiter parts the lines, and how many numbers that makes."""
        first, *rest = (row for _, row in self.rows())
        width, times = Counter(map(len, rest or [first])).most_common(1)[0]
        even = times + {width: 1.0, width - 1: 0.5}.get(len(first), 0.0)
        numbers = [self.is_number(cell) or self.is_hole(cell) for row in rest for cell in row]
        return width > 1, even, float(np.mean(numbers or 0))

    def rows(self, **options: Any) -> Iterator[tuple[int, list[str]]]:
        """The cells of each row, and the number of its first line."""
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
                f"{self.name}: mend the quotation marks in line {number} ({error})"
            ) from error

    def line_of(self, row: int) -> int:
        """The line of the file in which that row begins."""
        return next(islice(self.rows(), row, None))[0]

    def is_number(self, cell: str) -> bool:
        """Whether it reads as a number."""
        plain = cell if self.delimiter == "," else cell.replace(",", ".")
        return re.fullmatch(NUMBER, plain.strip()) is not None

    def is_hole(self, cell: str) -> bool:
        """Whether it marks a missing value."""
        return cell.strip().casefold() in self.holes

    def width(self, header: bool | None) -> int:
        """Cells a line; the first may have one fewer, as R writes names over row names."""
        widths = [len(row) for _, row in self.rows(strict=True)]
        width = Counter(widths[1:] or widths).most_common(1)[0][0]
        wrong = [k for k, found in enumerate(widths) if found != width]
        if wrong[:1] == [0] and widths[0] == width - 1 and header is not False and self.is_short():
            del wrong[0]
        if wrong:
            raise ValueError(
                f"{self.name}: line {self.line_of(wrong[0])} has {widths[wrong[0]]} cell(s) where "
                f"{width} are expected; mend it, or give the delimiter"
            )
        return width

    def is_short(self) -> bool:
        """Whether the first line names all columns but that of the row names below it."""
        (_, first), (_, second) = islice(self.rows(), 2)
        words = not all(map(self.is_number, first))
        numbered = words and second[0].isdecimal() and second[-1].strip() != ""
        return numbered or not self.is_number(second[0])

    def has_header(self, first: list[str], rest: list[list[str]]) -> bool:
        """Words over numbers, nothing over row names, or the column numbers of pandas."""
        filled = [[c for c in cells if not self.is_hole(c)] for cells in zip(*rest, strict=True)]
        share = [np.mean([self.is_number(c) for c in cells] or 0) for cells in filled]
        over = [cell for cell, s in zip(first, share, strict=True) if s > 0.5]
        words = any(not (self.is_number(cell) or self.is_hole(cell)) for cell in over)
        if first[0]:
            return words or (len(first) > 2 and first == [str(k) for k in range(len(first))])
        counted = [str(k) for k in range(len(first))]
        counts = first[1:] in (counted[:-1], counted[1:])
        return words or (bool(filled[0]) and (counts or bool(share[0] == 0)))

    def names_above(self, width: int) -> list[str]:
        """The names in the last comment, if there are as many as columns."""
        text = self.comments[-1][1][1:].strip() if self.comments else ""
        parted = (text.split(self.delimiter), text.split())
        fitting = ([name.strip() for name in names] for names in parted if len(names) == width)
        return next(fitting, []) if text else []

    def distinct(self, names: list[str]) -> list[str]:
        """Names for all columns; of equal ones, the second gets .1."""
        names = [name or f"x{k}" for k, name in enumerate(names, 1)]
        taken, seen = set(names), set()
        for k, name in enumerate(names):
            if name in seen:
                fresh = (f"{name}.{i}" for i in range(1, len(names) + 1))
                names[k] = next(other for other in fresh if other not in taken)
                self.notes.append(f"column name {name!r} occurs again, as {names[k]!r} here")
            taken.add(names[k])
            seen.add(names[k])
        return names

    def note_lines(self, delimiter: str | None) -> None:
        """Notes on the delimiter found and the lines left out."""
        if delimiter is None and self.delimiter not in ",\t":
            kind = next(name for name, d in DELIMITERS.items() if d == self.delimiter)
            self.notes.append(f"cells are taken to be separated by: {kind}")
        if blank := self.lines[-1][0] - self.lines[0][0] + 1 - len(self.lines):
            self.notes.append(f"blank lines between the rows are skipped: {blank}")
        if self.comments:
            self.notes.append(f"lines with # above the table are skipped: {len(self.comments)}")

    def note_header(self, first: list[str], headed: bool, above: bool) -> None:
        """Notes on how the column names were found."""
        line = f"line {self.lines[0][0]} is taken as"
        if above:
            self.notes.append(f"the names in line {self.comments[-1][0]}, after #, are taken")
        elif not headed:
            self.notes.append(f"{line} data, not as column names: it has no words over numbers")
        elif any(map(self.is_number, first)):
            self.notes.append(f"{line} column names, although it has numbers")

    def find_decimal_commas(self) -> None:
        """Whether cells like 1,5 are there, some of them unlike 1,500, and none like 1.5."""
        if self.delimiter == "," or not any("," in line for _, line in self.lines):
            return
        text = "\n".join(line for _, line in self.lines)
        edge = f'["{re.escape(self.delimiter)}]'
        points, commas = (
            re.search(f"(?:^|{edge}) *({cell}) *(?={edge}|$)", text, re.MULTILINE)
            for cell in (POINT_NUMBER, f"(?!{THOUSANDS}){COMMA_NUMBER}")
        )
        if commas and not points:
            self.decimal = ","
            self.notes.append(f"commas in numbers such as {commas[1]} are taken as decimal commas")

    def frame(self, names: list[str], headed: bool) -> pd.DataFrame:
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
            decimal=self.decimal,
            **EXACT,
        )
        columns = zip(names, (cells[k] for k in cells), strict=True)
        return pd.DataFrame({n: c if c.dtype.kind in "iuf" else _stripped(c) for n, c in columns})
