"""Columns with cells that are neither numbers nor missing, and what to do about them."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from ppl_vae.core.text import as_row
from ppl_vae.data.files.file_content import quoted
from ppl_vae.data.files.number_format import ALWAYS_MISSING
from ppl_vae.data.files.raw_table import RawTable
from ppl_vae.data.files.text_tables import PANDAS_MARKERS

NA_MARKERS = ("na", "n/a", "null", "none", "?", ".", "-", "missing")
"""Texts that mark a missing cell by default, in any case."""
MAX_MARKERS = 5
"""The largest number of distinct texts among numbers that may all mark missing values."""
FEW = 0.05
"""The share of cells up to which texts may be typing errors."""
MAX_DROPPED = 20
"""The largest number of columns that are named as left out where fewer are kept."""
SHOWN = 3
"""The number of cells of a column, and of such columns, that a message shows."""
UNIT = r"(?:[%‰$€£¥°]|\s[A-Za-zµμ°%/]{1,5}\d?)"
_GROUPS = r"(?:\d{1,3}(?:[.,'’_ \u00a0\u202f]\d{3})+|\d[\d,'’_ \u00a0\u202f]*)"
FORMATTED_NUMBER = rf"[<>≤≥~≈]?\s?[$€£¥+−-]{{0,2}}\s?{_GROUPS}(?:[.,]\d*)?\s?{UNIT}?[*†‡]*"
"""Numbers with separators or units, which are refused: 1,234.5 or $5 or 10 % or <0.1."""
AMBIGUOUS_COMMA = r"[+−-]?[1-9]\d{0,2},\d{3}"
"""Numbers whose comma separates decimals or thousands."""
DATE = (
    r"(?:\d{4}[-/.]\d{1,2}(?:[-/.]\d{1,2})?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}"
    r"|\d{1,2}[- ][A-Za-z]{3,9}[- ]\d{2,4})(?:[ T]\d{1,2}:\d{2}.*)?|\d{1,2}:\d{2}(?::\d{2}.*)?"
)


def has_dates(words: pd.Series) -> bool:
    """Whether most of some texts are dates."""
    return bool(words.str.fullmatch(DATE).mean() > 0.5)


def option(name: str, values: Iterable[str]) -> str:
    """An option of the command line whose value is a list, as it is typed."""
    return f"--{name} {shlex.quote(as_row(values))}"


@dataclass(frozen=True)
class TextColumns:
    """The columns of a table with cells that are neither numbers nor missing.

    Attributes:
        raw: the content of the file.
        words: these cells, by column.
        text: the columns that have no numbers, or few.
        numbers: the names of all columns that would be modelled, these included.
        cells: the cells of all columns that were not left out.
        chosen: whether the columns were chosen by name.
        na_markers: casefolded texts that mark a missing cell.
    """

    raw: RawTable
    words: Mapping[str, pd.Series]
    text: Sequence[str]
    numbers: Sequence[str]
    cells: pd.DataFrame
    chosen: bool
    na_markers: Sequence[str]

    def message(self) -> str:
        """What is wrong, and the options of the command line with which the table is read."""
        parts = [self._texts()] if self.text else []
        mixed = [name for name in self.words if name not in self.text]
        parts += [self._mixed(name) for name in mixed[:SHOWN]]
        if len(mixed) > SHOWN:
            parts.append(f"the same of {len(mixed) - SHOWN} other columns")
        options = " ".join(self._options())
        command = f"; on the command line: {options}" if options else ""
        return f"{self.raw.name}: {'; '.join(parts)}{command}"

    def _texts(self) -> str:
        dates = [name for name in self.text if has_dates(self.words[name])]
        noun = f" (of dates: {quoted(dates)})" if dates else ""
        return (
            f"columns of text, {quoted(self.text)}{noun}: choose one as label if it has classes, "
            "or as index if it names the rows, and drop the others or encode them as numbers"
        )

    def _mixed(self, name: str) -> str:
        words = self.words[name]
        rows = list(words.drop_duplicates().index)[:SHOWN]
        shown = ", ".join(f"{words[row]!r} ({self.raw.place(row)})" for row in rows)
        count = f"{len(words)} of {len(self.cells)} cells are not numbers: {shown}"
        return f"column {name!r}: {count}; {self._remedy(name)}"

    def _remedy(self, name: str) -> str:
        words = self.words[name]
        if self._has_ambiguous_commas(name):
            return "give thousands ',' or decimal ',' for what their comma separates"
        if not self._has_markers(name):
            return "drop the column, or correct the cells"
        usual = [word for word in words.unique() if word.casefold() in NA_MARKERS]
        if usual:
            return (
                "the given markers of missing values replace the usual ones: give missing "
                f"{quoted(usual)} in addition"
            )
        return (
            f"give missing {words.iloc[0]!r} if that marks a missing value, otherwise correct "
            "them or remove the lines"
        )

    def _has_ambiguous_commas(self, name: str) -> bool:
        return re.fullmatch(AMBIGUOUS_COMMA, self.words[name].iloc[0]) is not None

    def _has_markers(self, name: str) -> bool:
        """Whether texts among numbers may mark missing values, or be typing errors.

        Identifiers, which are not, are many distinct texts, or have letters and digits.
        """
        words, num_rows = self.words[name], len(self.cells)
        if words.nunique() > max(MAX_MARKERS, FEW * num_rows):
            return False
        both = words.str.contains(r"\d") & words.str.contains(r"[^\W\d_]")
        return bool((both & ~words.str.fullmatch(FORMATTED_NUMBER)).sum() <= FEW * num_rows)

    def _options(self) -> Iterator[str]:
        """Options that leave out and mark what cannot be read as numbers."""
        mixed = [name for name in self.words if name not in self.text]
        commas = [name for name in mixed if self._has_ambiguous_commas(name)]
        marked = [name for name in mixed if name not in commas and self._has_markers(name)]
        dropped = {*self.words} - {*commas, *marked}
        kept = [name for name in self.numbers if name not in dropped]
        if dropped and kept and (self.chosen or len(dropped) > max(MAX_DROPPED, len(kept))):
            yield option("columns", kept)
        elif dropped:
            before = [str(name) for name in self.raw.cells if name not in self.cells]
            yield option("drop", [*before, *(name for name in self.words if name in dropped)])
        if marked:
            found = dict.fromkeys(word for name in marked for word in self.words[name])
            yield option("missing", [*self._markers(kept), *found])
        if commas:
            yield "--thousands , (or --decimal ,)"

    def _markers(self, names: Sequence[str]) -> list[str]:
        # Those that were given, or the usual ones that occur in these columns.
        markers = [mark for mark in self.na_markers if mark not in ALWAYS_MISSING]
        if tuple(markers) != NA_MARKERS:
            return markers
        columns = [self.cells[name] for name in names]
        texts = [column for column in columns if column.dtype == object]
        found = {word for column in texts for word in column.str.casefold().unique()}
        if any(column.dtype != object and column.isna().any() for column in columns):
            found |= {word.casefold() for word in PANDAS_MARKERS}  # any of them
        return [mark for mark in markers if mark in found]
