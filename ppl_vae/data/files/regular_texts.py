"""Large text tables with one row on each line, which are parsed at once.

The first lines show the delimiter, the names of the columns and how numbers are written. If all
other lines are rows of the same kind, which is checked by counting characters, pandas parses the
bytes of the file; otherwise the lines are read one by one, by
:class:`~ppl_vae.data.files.text_tables.TextTable`. Both give the same table.
"""

import io
import re
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from ppl_vae.data.files.number_format import DECIMAL_POINT, first_cell
from ppl_vae.data.files.raw_table import RawTable
from ppl_vae.data.files.text_encoding import decode_text
from ppl_vae.data.files.text_rows import TextRow
from ppl_vae.data.files.text_tables import TextFormat, TextTable

MIN_BYTES = 2**20
"""The size from which on a text is read in this way."""
HEAD_LINES = 200
"""The number of lines, after those that are skipped, that show the format."""
WRITTEN_NUMBER = re.compile(r"[.,]\d")
"""What a text has that may decide how numbers are written."""


def regular_table(
    content: bytes, name: str, given: TextFormat, text_columns: Collection[str]
) -> RawTable | None:
    """The table of a large text whose lines are all rows alike; None if it is none.

    Args:
        content: the content of the file.
        name: its name, for messages.
        given: what the user stated about its format.
        text_columns: names, or numbers from 1 on, of columns whose cells are kept as texts.
    """
    if len(content) < MIN_BYTES or not _has_plain_lines(content):
        return None
    lines = HEAD_LINES + max(given.skip_rows, 0)
    end = _offset_of_line(content, lines)
    if end is None:
        return None
    try:
        return _table(content, content[:end], lines, name, given, text_columns)
    except (ValueError, OverflowError):  # which the reader of lines explains
        return None


def _table(
    content: bytes,
    beginning: bytes,
    lines: int,
    name: str,
    given: TextFormat,
    text_columns: Collection[str],
) -> RawTable | None:
    """The table, given the beginning of the content, with this number of lines.

    Raises:
        ValueError, OverflowError: if pandas cannot parse a line.
    """
    text, notes = decode_text(beginning, name, None)
    head = TextTable(text.removesuffix("\n"), name, given, notes)
    layout = head.layout(text_columns)
    rows = head.table.rows[layout.start :]
    if not _fills(rows, lines) or not _decides_format(head, text, content):
        return None
    start = _offset_of_line(content, rows[0].line - 1)
    if start is None or _has_quotes_or_comments(content, start):
        return None
    file = io.BytesIO(content)
    file.seek(start)
    cells = head.to_frame(file, layout)
    if not _has_rows_only(cells) or _has_short_rows(content, start, head.delimiter, cells):
        return None
    first = rows[0].line
    return head.raw_table(cells, layout, lambda row: f"line {first + row}")


def _has_plain_lines(content: bytes) -> bool:
    """Whether lines end in a line feed, which may follow a carriage return, and bytes are text."""
    if b"\0" in content:
        return False
    return b"\r" not in content or content.count(b"\r") == content.count(b"\r\n")


def _offset_of_line(content: bytes, number: int) -> int | None:
    """Where the line of this number, from 0 on, begins; None if there is none."""
    offset = 0
    for _ in range(number):
        offset = content.find(b"\n", offset) + 1
        if not offset:
            return None
    return offset


def _fills(rows: Sequence[TextRow], last: int) -> bool:
    """Whether each line from the first of these rows to the last one is one of them."""
    return len(rows) > 1 and [row.line for row in rows] == [*range(rows[0].line, last + 1)]


def _decides_format(head: TextTable, text: str, content: bytes) -> bool:
    """Whether the first lines show how numbers are written, unless others contradict."""
    if head.delimiter == " " or head.given.comment is not None:
        return False
    fixed = head.given.decimal or head.given.thousands
    if fixed or head.delimiter == "," or head.format.decimal == "," or b"." not in content:
        return True
    return first_cell(DECIMAL_POINT, text, head.delimiter) is not None


def _has_quotes_or_comments(content: bytes, start: int) -> bool:
    return content.find(b'"', start) >= 0 or content.find(b"#", start) >= 0


def _has_short_rows(content: bytes, start: int, delimiter: str, cells: pd.DataFrame) -> bool:
    """Whether a row has fewer cells than there are columns; pandas adds missing ones at its end.

    Longer rows are errors of pandas.
    """
    last = cells.iloc[:, -1]
    if not ((last == "") if last.dtype == object else last.isna()).any():
        return False
    return content.count(delimiter.encode(), start) != len(cells) * (cells.shape[1] - 1)


def _has_rows_only(cells: pd.DataFrame) -> bool:
    """Whether no row is empty, the last is no footer, and no text may be a number."""
    empty = np.ones(len(cells), dtype=bool)
    filled_at_end = 0
    for _, column in cells.items():
        missing = (column == "").to_numpy() if column.dtype == object else column.isna().to_numpy()
        empty &= missing
        filled_at_end += not missing[-1]
        if column.dtype == object and WRITTEN_NUMBER.search("\n".join(column.unique())):
            return False
    return not empty.any() and (filled_at_end > 1 or cells.shape[1] == 1)
