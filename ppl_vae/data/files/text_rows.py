"""The lines of a text file that make up a table, without titles, comments and footers."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ppl_vae.data.files.delimiters import SAMPLE_LINES
from ppl_vae.data.files.file_content import quoted
from ppl_vae.data.files.number_format import EXCEL_ERRORS

FOOTER = re.compile(r"(?:sources?|notes?|remarks?|data from|last updated)\b|[*†‡©]", re.IGNORECASE)
"""How lines below a table begin."""
CAPTION = re.compile(r"\w+: +\S")
"""How they begin in any language."""
LISTED_LINES = 5


class TextRow(NamedTuple):
    """A row: the number of its first line in the file, its text, and how many cells it has."""

    line: int
    text: str
    width: int
    empty: bool


def lines_text(numbers: Sequence[int]) -> str:
    """The numbers of lines, for a message: "line 3" or "lines 3, 5 and 2 others"."""
    shown = ", ".join(map(str, numbers[:LISTED_LINES]))
    rest = len(numbers) - LISTED_LINES
    others = f" and {rest} other{'s' * (rest > 1)}" if rest > 0 else ""
    return f"line{'s' * (len(numbers) > 1)} {shown}{others}"


def is_comment(line: str, comment: str | None) -> bool:
    """Whether a line is a comment: it begins with the given text, by default #."""
    if not line.startswith(comment or "#"):
        return False
    return comment is not None or not line.lower().startswith(EXCEL_ERRORS)


@dataclass
class TextRows:
    """The rows of a text file.

    Attributes:
        name: name of the file; messages refer to it.
        lines: number and text of the lines from the first with cells on.
        delimiter: the character between cells.
        is_number: whether a cell is a number.
        has_names: whether a row, before some others, has the names of their columns.
        header: whether the first row has the names of the columns; None if that is not given.
        notes: which lines were left out, for the user to check.
        width: the number of cells of a row.
        rows: the rows of the table; the first may have one cell fewer.
    """

    name: str
    lines: Sequence[tuple[int, str]]
    delimiter: str
    is_number: Callable[[str], bool]
    has_names: Callable[[Sequence[str], Sequence[Sequence[str]]], bool]
    header: bool | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = list(self._parse())
        self._drop_blank()
        self.width = self._usual_width()
        self._cut_empty_ends()
        self._drop_comments()
        self._drop_titles()
        self._drop_footers()
        self._check_widths()
        if self.width > 1:
            self._drop("empty rows are left out", lambda row: row.empty)
        if not self.rows:
            raise ValueError(f"{self.name} is empty: no line has cells")

    def cells(self, row: TextRow) -> list[str]:
        """The cells of a row."""
        lines = (line + "\n" for line in row.text.split("\n"))
        return next(csv.reader(lines, delimiter=self.delimiter, skipinitialspace=True), [])

    def _parse(self) -> Iterator[TextRow]:
        texts = [line for _, line in self.lines]
        if self.delimiter == " ":
            texts = [" ".join(line.split()) for line in texts]
        reader = csv.reader(
            (line + "\n" for line in texts),
            delimiter=self.delimiter,
            skipinitialspace=True,
            strict=True,
        )
        start = 0
        try:
            for cells in reader:
                stop = reader.line_num
                text = texts[start] if stop == start + 1 else "\n".join(texts[start:stop])
                yield TextRow(self.lines[start][0], text, len(cells), not any(cells))
                start = stop
        except csv.Error as error:
            number = self.lines[min(start, len(self.lines) - 1)][0]
            if "field larger" in str(error):
                raise ValueError(
                    f"{self.name}: a cell in line {number} has more than "
                    f"{csv.field_size_limit():,} characters; shorten it, or leave its column out "
                    "of the file. A quotation mark that is not closed makes such a cell, too"
                ) from error
            raise ValueError(
                f"{self.name}: fix the quotation marks in line {number} ({error})"
            ) from error

    def _drop(self, what: str, condition: Callable[[TextRow], bool]) -> None:
        dropped = [row for row in self.rows if condition(row)]
        if dropped:
            self.rows = [row for row in self.rows if not condition(row)]
            self.notes.append(f"{what}: {lines_text([row.line for row in dropped])}")

    def _drop_blank(self) -> None:
        while not self.rows[-1].text.strip(" "):
            self.rows.pop()
        self._drop("blank lines are skipped", lambda row: not row.text.strip(" "))

    def _usual_width(self) -> int:
        every = Counter(row.width for row in self.rows)
        below = Counter(row.width for row in self.rows[1:]) or every
        return max(below, key=lambda width: (below[width], every[width], width))

    def _cut_empty_ends(self) -> None:
        """Cut delimiters at the ends of lines, after which there is nothing."""
        cut = []
        for k, row in enumerate(self.rows):
            if row.width > self.width and not any((cells := self.cells(row))[self.width :]):
                text = _join(cells[: self.width], self.delimiter)
                self.rows[k] = row._replace(text=text, width=self.width)
                cut.append(row.line)
        if cut:
            self.notes.append(f"delimiters after the last column are left out: {lines_text(cut)}")
        short = self.rows[0].width == self.width - 1
        if short and all(row.text.rstrip(" ").endswith(self.delimiter) for row in self.rows[1:]):
            header = self.rows[0]
            self.rows[0] = header._replace(text=header.text + self.delimiter, width=self.width)

    def _words_only(self, row: TextRow) -> bool:
        cells = self.cells(row)
        return any(cells) and not any(map(self.is_number, cells))

    def _is_alone(self, row: TextRow) -> bool:
        """Whether a row has a single cell, of text."""
        cells = self.cells(row)
        filled = [cell for cell in cells if cell]
        return len(filled) == 1 and bool(cells[0]) and not self.is_number(filled[0])

    def _drop_comments(self) -> None:
        def condition(row: TextRow) -> bool:
            return is_comment(row.text, None) and self._words_only(row) and row is not self.rows[0]

        self._drop("comments are left out", condition)

    def _drop_titles(self) -> None:
        """Drop the lines above the first row of the usual width, if they are words."""
        rows, width = self.rows, self.width
        first = next((k for k, row in enumerate(rows) if row.width == width), 0)
        if first and rows[first - 1].width == width - 1 and self._names_all_but_first(first):
            first -= 1
        apart = first > 0 and (self._is_apart(first) or self._words_only(rows[first]))
        for row in rows[:first]:
            if not (self._is_alone(row) or (apart and self._words_only(row))):
                self._raise_ragged(row)
        while first + 2 < len(rows) and self._is_title(rows[first], rows[first + 1]):
            first += 1
        if first:
            texts = quoted(row.text[:60] for row in rows[:first])
            where = lines_text([row.line for row in rows[:first]])
            self.notes.append(f"{where} above the table left out: {texts}")
            self.rows = rows[first:]

    def _is_title(self, row: TextRow, following: TextRow) -> bool:
        """Whether a row of the usual width is a title over the names of the columns."""
        if self.width == 1 or not self._is_alone(row):
            return False
        names = [name for name in self.cells(following) if name]
        if self._words_only(following):
            return len(names) > 1 and len(set(names)) == len(names)
        return self.width > 2 and len(names) >= self.width - 1

    def _names_all_but_first(self, first: int) -> bool:
        """Whether the row before names all columns except the row names, as R writes it."""
        header, row = self.cells(self.rows[first - 1]), self.cells(self.rows[first])
        if self.header is False or not all(header) or self._is_apart(first):
            return False
        below = [self.cells(other) for other in self.rows[first + 1 : first + SAMPLE_LINES]]
        below = [cells for cells in below if len(cells) == self.width]
        words = not all(map(self.is_number, header))
        stated = bool(self.header) and words
        if self._words_only(self.rows[first]) or (not stated and self.has_names(row, below)):
            return False  # it is a title above the names
        numbered = words and row[0].isdecimal() and row[-1].strip() != ""
        return numbered or not self.is_number(row[0])

    def _drop_footers(self) -> None:
        """Drop the lines below the last row of the usual width, if they are words."""
        kept = len(self.rows)
        while kept > 2 and self._is_footer(kept - 1):
            kept -= 1
        if kept < len(self.rows):
            dropped = self.rows[kept:]
            texts = quoted(row.text[:60] for row in dropped)
            where = lines_text([row.line for row in dropped])
            self.notes.append(f"{where} below the table left out: {texts}")
            self.rows = self.rows[:kept]

    def _is_footer(self, k: int) -> bool:
        row = self.rows[k]
        marked = FOOTER.match(row.text.lstrip(' "')) is not None or self._is_caption(row)
        if row.width == self.width:
            return marked and self.width > 1 and self._is_alone(row)
        words = not self.is_number(self.cells(row)[0])
        return self._words_only(row) or (words and (marked or self._is_apart(k)))

    def _is_caption(self, row: TextRow) -> bool:
        """Whether the first cell is a word, a colon and a text, as no cell below the header is."""
        others = (self.cells(other)[:1] for other in self.rows[1 : 1 + SAMPLE_LINES])
        names = [cell for cells in others for cell in cells if cell != self.cells(row)[0]]
        return CAPTION.match(self.cells(row)[0]) is not None and not any(map(CAPTION.match, names))

    def _is_apart(self, k: int) -> bool:
        """Whether lines were left out between a row and the one before."""
        before = self.rows[k - 1]
        return self.rows[k].line > before.line + 1 + before.text.count("\n")

    def _check_widths(self) -> None:
        for k, row in enumerate(self.rows):
            short = k == 0 and row.width == self.width - 1 and len(self.rows) > 1
            if row.width != self.width and not (short and self._names_all_but_first(1)):
                self._raise_ragged(row)

    def _raise_ragged(self, row: TextRow) -> None:
        raise ValueError(
            f"{self.name}: line {row.line} has {row.width} cell(s) where {self.width} are "
            "expected; fix the line, or give delimiter, skip_rows or comment"
        )


def _join(cells: Sequence[str], delimiter: str) -> str:
    quote = ('"', delimiter, "\n")
    texts = (
        '"' + cell.replace('"', '""') + '"' if any(q in cell for q in quote) else cell
        for cell in cells
    )
    return delimiter.join(texts)
