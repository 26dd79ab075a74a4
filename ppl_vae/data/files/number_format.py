"""Numbers as people and programs write them: 1.234,5 and 1 000, 1.5D+00, signs of all kinds."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Float

SPACES = " \u00a0\u2007\u2009\u202f"
"""The space and those that do not break a line, which separate thousands."""
SEPARATORS = f"{SPACES}'\u2019_"
"""Characters that can only separate thousands."""
MINUS_SIGNS = "\u2212\u2012\u2013\ufe63\uff0d"
"""The minus sign, dashes and variants of the hyphen, which stand before negative numbers."""
INVISIBLE = "\u200b\u200e\u200f\u2060\ufeff"
"""Characters without width, which come with text copied from pages."""
EXPONENT = r"(?:[eEdD][+-]?\d+)?"
SIGN = f"[+{MINUS_SIGNS}-]?"
EXCEL_ERRORS = (
    *("#n/a", "#div/0!", "#value!", "#ref!", "#name?", "#num!", "#null!", "#spill!", "#calc!"),
    *("#getting_data", "#field!", "#blocked!", "#connect!", "#unknown!", "#busy!", "#nv"),
)
"""What a spreadsheet writes into a cell whose value is not defined."""
ALWAYS_MISSING = ("", "nan", *EXCEL_ERRORS)
"""Cells that are missing whatever marks missing values, casefolded."""
QUOTED = r'"([^"\n]*)"'
QUOTED_COMMA = r'"[^"\n]*\d,\d[^"\n]*"'
"""Cells in quotation marks; those that may be numbers with commas."""
TRUTH = {"true": 1.0, "false": 0.0}
"""Truth values as programs write them, casefolded, and the numbers that they are read as."""
FLAGS = re.ASCII
SAMPLE_CHARACTERS = 1_000_000
"""How much of a text without commas in its cells is searched for points between thousands."""


def _grouped(separators: str) -> str:
    """The pattern of digits in groups of three, and at least two groups."""
    return rf"\d{{1,3}}(?:[{re.escape(separators)}]\d{{3}})+"


# In the order of the text: what shows which character separates decimals, and which thousands.
_WHOLE = rf"(?:{_grouped(SEPARATORS)}|\d+)"
_COMMA_THOUSANDS = rf"{SIGN}[1-9]\d{{0,2}}(?:,\d{{3}})+(?![\d.])"
_POINT_THOUSANDS = rf"{SIGN}[1-9]\d{{0,2}}(?:\.\d{{3}})+(?![\d,])"
DECIMAL_COMMA = rf"(?!{_COMMA_THOUSANDS}){SIGN}(?:{_grouped('.')}|{_WHOLE})?,\d+{EXPONENT}"
DECIMAL_POINT = rf"(?!{_POINT_THOUSANDS}){SIGN}(?:{_grouped(',')}|{_WHOLE})?\.\d+{EXPONENT}"
MILLIONS_BY_COMMA = rf"{SIGN}[1-9]\d{{0,2}}(?:,\d{{3}}){{2,}}|{SIGN}{_grouped(',')}\.\d+{EXPONENT}"
MILLIONS_BY_POINT = rf"{SIGN}[1-9]\d{{0,2}}(?:\.\d{{3}}){{2,}}|{SIGN}{_grouped('.')},\d+{EXPONENT}"


@dataclass(frozen=True)
class NumberFormat:
    """How numbers are written in a file.

    Attributes:
        decimal: the decimal separator.
        thousands: what may separate groups of three digits, any of these characters.
    """

    decimal: str = "."
    thousands: str = SEPARATORS

    @property
    def pattern(self) -> str:
        """The regular expression of a number, in this format."""
        mark = re.escape(self.decimal)
        groups = rf"\d{{1,3}}(?P<t>[{re.escape(self.thousands)}])\d{{3}}(?:(?P=t)\d{{3}})*"
        return rf"{SIGN}(?:(?:{groups}|\d+)(?:{mark}\d*)?|{mark}\d+){EXPONENT}"

    def is_number(self, cell: str) -> bool:
        """Whether a cell is a number."""
        return self._expression.fullmatch(cell.strip().strip(INVISIBLE)) is not None

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        return re.compile(self.pattern, FLAGS)

    @property
    def _plain(self) -> dict[int, str | None]:
        """What each character of a number is replaced by, before Python reads it."""
        table: dict[int, str | None] = dict.fromkeys(map(ord, self.thousands))
        table |= dict.fromkeys(map(ord, MINUS_SIGNS), "-") | {ord("D"): "e", ord("d"): "e"}
        return table | {ord(self.decimal): "."}

    def to_float(self, cell: str) -> float:
        """The number that a cell holds, NaN if it holds none."""
        plain = cell.strip().strip(INVISIBLE)
        return float(plain.translate(self._plain)) if self.is_number(plain) else float("nan")

    def to_floats(self, cells: pd.Series) -> Float[np.ndarray, "N"]:
        """The numbers that the cells hold, NaN elsewhere."""
        plain = cells
        if any(character in "".join(cells) for character in INVISIBLE):
            plain = pd.Series([cell.strip(INVISIBLE).strip() for cell in cells], dtype=object)
        numeric = plain.str.fullmatch(self.pattern, flags=FLAGS).to_numpy(dtype=bool)
        table = self._plain
        found = np.full(len(cells), np.nan)
        found[numeric] = [float(cell.translate(table)) for cell in plain[numeric]]
        return found

    def notes(self, cells: Iterable[str]) -> Iterator[str]:
        """Notes on the unusual ways in which these cells, all numbers, are written."""
        groups = f"[{re.escape(self.thousands)}]"
        kinds = {
            f"[{INVISIBLE}]": "without the invisible characters in them",
            f"[{MINUS_SIGNS}]": "as negative numbers",
            "[dD]": "with the exponent after D",
            rf"\d{groups}\d": "without the separators of their thousands",
        }
        text = "\n".join(cells)
        for pattern, reading in kinds.items():
            if special := re.findall(f"^.*{pattern}.*$", text, re.MULTILINE):
                yield f"cells like {special[0]!r} are read {reading}: {len(special)}"


def detect_number_format(
    text: str, delimiter: str, decimal: str | None, thousands: str | None
) -> tuple[NumberFormat, list[str]]:
    """The format of the numbers in a text, and notes on what was detected.

    Commas are decimal commas if some cell is a number only then and none is a number only
    with a decimal point, and conversely for points as separators of thousands.

    Args:
        text: the rows of a table.
        delimiter: what separates the cells.
        decimal, thousands: the separators, where they are given.

    Raises:
        ValueError: if a given separator is not one character, or both are the same.
    """
    for name, character in (("decimal", decimal), ("thousands", thousands)):
        if character is not None and (len(character) != 1 or character.isalnum()):
            raise ValueError(
                f"{name} must be one character, such as a comma or a point; got {character!r}"
            )
    if decimal is not None and decimal == thousands:
        raise ValueError(f"decimal and thousands must differ; both are {decimal!r}")
    if thousands is not None:
        swapped = {",": ".", ".": ","}
        return NumberFormat(decimal or swapped.get(thousands, "."), thousands), []
    if decimal is not None:
        other = {",": ".", ".": ","}.get(decimal, "")
        return NumberFormat(decimal, SEPARATORS + other), []
    return _format_of_cells(text, delimiter)


def _format_of_cells(text: str, delimiter: str) -> tuple[NumberFormat, list[str]]:
    commas = "," in text if delimiter != "," else '"' in text and re.search(QUOTED_COMMA, text)
    if not commas and not re.search(r"\d\.\d{3}\.\d{3}", text[:SAMPLE_CHARACTERS]):
        return NumberFormat(), _note_on_points(text, delimiter)
    if delimiter == ",":
        text, delimiter = _one_per_line(text), "\n"
    comma = first_cell(DECIMAL_COMMA, text, delimiter)
    point = first_cell(DECIMAL_POINT, text, delimiter)
    comma_groups = first_cell(MILLIONS_BY_COMMA, text, delimiter)
    if comma and not point and not comma_groups:
        return NumberFormat(",", SEPARATORS + "."), [f"decimal commas detected, as in {comma}"]
    point_groups = first_cell(MILLIONS_BY_POINT, text, delimiter)
    if comma_groups and not comma and not point_groups:
        note = f"commas are read as separators of thousands, as in {comma_groups}"
        return NumberFormat(".", SEPARATORS + ","), [note]
    if point_groups and not point and not comma_groups:
        note = f"points are read as separators of thousands, as in {point_groups}"
        return NumberFormat(",", SEPARATORS + "."), [note]
    return NumberFormat(), []


def _note_on_points(text: str, delimiter: str) -> list[str]:
    """A note where points separate groups of three digits only, as separators of thousands do."""
    if delimiter == "," or "." not in text or first_cell(DECIMAL_POINT, text, delimiter):
        return []
    found = first_cell(_POINT_THOUSANDS, text, delimiter)
    note = f"points are read as decimal points, as in {found}; thousands '.' reads them otherwise"
    return [note] if found else []


def first_cell(pattern: str, text: str, delimiter: str) -> str | None:
    """The first cell of this pattern."""
    edge = re.escape(delimiter)
    found = re.search(f'(?:^|["{edge}]) *({pattern}) *(?=["{edge}]|$)', text, re.MULTILINE | FLAGS)
    return None if found is None else found[1]


def _one_per_line(text: str) -> str:
    """The cells of a text with commas between them: first those in quotation marks."""
    quoted = re.findall(QUOTED, text)
    return "\n".join([*quoted, re.sub(QUOTED, "", text).replace(",", "\n")])
