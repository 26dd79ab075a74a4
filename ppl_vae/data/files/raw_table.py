"""What the readers of all kinds of files return, before the roles of the columns are known."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd

from ppl_vae.data.files.number_format import NumberFormat

HALF_PRECISION = "the numbers are float16, with three to four digits; they are cast to float64"
"""The note on numbers of half precision."""
PLAIN_NUMBERS = NumberFormat()
"""Numbers with a decimal point."""


def row_place(row: int) -> str:
    """Where a row stands in a file that has no lines."""
    return f"row {row + 1}"


@dataclass(frozen=True)
class RawTable:
    """The cells of a file.

    Attributes:
        name: name of the file; messages refer to it.
        cells: one column of numbers or of stripped texts per column, under distinct names.
        number_format: how numbers are written in the texts.
        has_names: whether the file has names of columns.
        first_unnamed: whether the first column has none, where the others have.
        place: where a row stands in the file, for messages.
        row_names: the names of rows, in a file that keeps them apart.
        index: the name of these names, if they have one.
        image_shape: height and width, where rows are images.
        notes: what was detected.
    """

    name: str
    cells: pd.DataFrame
    number_format: NumberFormat = PLAIN_NUMBERS
    has_names: bool = True
    first_unnamed: bool = False
    place: Callable[[int], str] = row_place
    row_names: tuple[str, ...] | None = None
    index: str | None = None
    image_shape: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)
