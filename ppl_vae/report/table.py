"""The lineage's table on a terminal."""

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ppl_vae.lineage.metrics import Row
from ppl_vae.lineage.table import Column, shown_columns

MAX_TEXT_WIDTH = 110


def lineage_table(rows: Sequence[Row], *, width: int = 160, pending: str = "") -> Table:
    """The rows as a table.

    Args:
        rows: of the lineage.
        width: of the terminal, in characters. If the table with all columns is wider, it has the
            essential columns only.
        pending: the name of a stage that is being fitted, shown as the last row.
    """
    table = _table(rows, shown_columns(rows), pending)
    unlimited = Console(width=1000)
    if Measurement.get(unlimited, unlimited.options, table).maximum <= width:
        return table
    return _table(rows, shown_columns(rows, only_essential=True), pending)


def _table(rows: Sequence[Row], columns: Sequence[Column], pending: str) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    if pending:
        table.add_row(Text(pending, style="dim"), Text("...", style="dim"))
    return table


def wrap(text: str, width: int) -> str:
    """Wrap a paragraph to the width of a terminal, and to at most 110 characters."""
    return "\n".join(textwrap.wrap(text, min(width, MAX_TEXT_WIDTH), break_on_hyphens=False))
