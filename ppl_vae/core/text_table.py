"""Texts and tables, for a terminal and for a notebook."""

import html
from collections.abc import Sequence


def render(
    rows: Sequence[Sequence[str]],
    header: Sequence[str] = (),
    *,
    indent: str = "",
    text_columns: int = 1,
) -> str:
    """Lines of text with aligned columns, two spaces apart, without spaces at their ends.

    Args:
        rows: the cells, as many in each row.
        header: a title per column; without it there is no line of titles.
        indent: is put before each line.
        text_columns: the first columns that are aligned on the left; the others hold numbers and
            are aligned on the right.
    """
    lines = [header, *rows] if header else list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        (
            indent
            + "  ".join(
                cell.ljust(width) if index < text_columns else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        ).rstrip()
        for line in lines
    )


def preformatted_html(text: str) -> str:
    """A text as it is, in HTML: its lines and spaces are kept."""
    return f"<pre>{html.escape(text)}</pre>"


def render_html(
    rows: Sequence[Sequence[str]], header: Sequence[str], *, text_columns: int = 1
) -> str:
    """The same table in HTML, its cells escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        aligned = ("left" if index < text_columns else "right" for index in range(len(cells)))
        return "".join(
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(cells, aligned, strict=True)
        )

    body = "\n".join(f"<tr>{line(cells, 'td')}</tr>" for cells in rows)
    head = f"<thead><tr>{line(header, 'th')}</tr></thead>"
    return f"<table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table>"
