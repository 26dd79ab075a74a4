"""Texts of messages and printed results: numbers with their nouns, and lists."""

import csv
import io
from collections.abc import Iterable

IRREGULAR_PLURALS = {"axis": "axes", "class": "classes", "entry": "entries"}


def counted(number: int, noun: str) -> str:
    """A number and the noun that agrees with it: "1 data point", "3 axes", "2 held-out rows".

    Args:
        number: at least zero.
        noun: in the singular; its last word is the one that changes.
    """
    if number == 1:
        return f"1 {noun}"
    start, space, last = noun.rpartition(" ")
    return f"{number} {start}{space}{IRREGULAR_PLURALS.get(last, f'{last}s')}"


def short_number(value: float) -> str:
    """A number with three decimals, or with three significant digits from one thousand on."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def listed(text: str) -> list[str]:
    """The parts of a list that is written as a row of CSV: quotation marks enclose commas."""
    return [part.strip() for part in next(csv.reader([text]), [])]


def as_row(parts: Iterable[str]) -> str:
    """A list as a row of CSV, which :func:`listed` reads."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(parts)
    return line.getvalue()
