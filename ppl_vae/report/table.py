"""The lineage's table on a terminal."""

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ppl_vae.lineage.metrics import StageMetrics
from ppl_vae.lineage.table import Column, shown_columns

MAX_TEXT_WIDTH = 110


def lineage_table(rows: Sequence[StageMetrics], *, width: int = 160, pending: str = "") -> Table:
    """The rows as a table.

    Args:
        rows: the rows of the lineage.
        width: the width of the terminal, in characters. If the table with all columns is wider, it
            has the essential columns only.
        pending: the name of a stage that is being fitted, shown as the last row.
    """
    return _table(rows, _fitting_columns(rows, width), pending)


def omitted_columns(rows: Sequence[StageMetrics], width: int) -> str:
    """A sentence that names the columns that :func:`lineage_table` leaves out; "" if none."""
    fitting = {column.title for column in _fitting_columns(rows, width)}
    omitted = [column.title for column in shown_columns(rows) if column.title not in fitting]
    if not omitted:
        return ""
    return f"Columns left out at this width, which the report has: {', '.join(omitted)}."


def _fitting_columns(rows: Sequence[StageMetrics], width: int) -> Sequence[Column]:
    # All columns, or the essential ones if the table with all is wider.
    columns, unlimited = shown_columns(rows), Console(width=1000)
    table = _table(rows, columns, "")
    if Measurement.get(unlimited, unlimited.options, table).maximum <= width:
        return columns
    return shown_columns(rows, only_essential=True)


def _table(rows: Sequence[StageMetrics], columns: Sequence[Column], pending: str) -> Table:
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
