"""Rows at the end of a table that may summarise the rows above: totals, means and others."""

import re
from collections.abc import Iterator, Sequence

import pandas as pd

from ppl_vae.data.files.file_content import quoted
from ppl_vae.data.files.raw_table import RawTable

SUMMARY = re.compile(
    r"(?:(?:grand|sub|overall)[ -]?)?(?:totals?|sums?|means?|averages?|avg|median|"
    r"st\.?d(?:ev)?\.?|sd|minimum|maximum|min|max|count|n|"
    r"summe|gesamt(?:summe)?|insgesamt|mittel(?:wert)?|durchschnitt|"
    r"totale|totaux|somme|moyenne|somma|media|suma|promedio|soma|média|totaal|gemiddelde)"
    r"\s?:?",
    re.IGNORECASE,
)
"""The names of such rows in English, German, French, Italian, Spanish, Portuguese and Dutch."""
MAX_SUMMARIES = 8
"""The largest number of rows that are taken for summaries."""


def summary_note(raw: RawTable) -> Iterator[str]:
    """A note on the last rows of a table, if only they are named like summaries of the others."""
    for names in _names(raw):
        found = 0
        while found <= MAX_SUMMARIES and found < len(names) and _is_summary(names[-1 - found]):
            found += 1
        above = names[: len(names) - found]
        if not 0 < found <= min(MAX_SUMMARIES, len(above) // 2) or any(map(_is_summary, above)):
            continue
        places = ", ".join(raw.place(row) for row in range(len(above), len(names)))
        verb, rows = ("summarises", "the row") if found == 1 else ("summarise", "the rows")
        yield (
            f"{places}, {quoted(names[len(above) :])}, {'is' if found == 1 else 'are'} kept as "
            f"data; remove {rows} from the file if {'it' if found == 1 else 'they'} {verb} the "
            "others"
        )
        return


def _names(raw: RawTable) -> Iterator[Sequence[str]]:
    """The names of rows, and each column of texts whose last cell is the name of a summary."""
    if raw.row_names:
        yield raw.row_names
    for column in raw.cells:
        cells = raw.cells[column]
        if cells.dtype == object and len(cells) and _is_summary(cells.iloc[-1]):
            yield pd.Series(cells).astype(str).tolist()


def _is_summary(name: object) -> bool:
    return isinstance(name, str) and SUMMARY.fullmatch(name.strip()) is not None
