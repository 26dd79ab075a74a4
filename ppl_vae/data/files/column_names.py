"""The names of the columns of a text table: whether the first row has them, and their units."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

Cells = Sequence[str]
NAMES_OF_ROW_NAMES = (
    *("case", "city", "code", "compound", "country", "date", "day", "file", "gene", "id", "index"),
    *("individual", "item", "key", "metabolite", "month", "name", "names", "patient", "protein"),
    *("region", "sample", "samples", "site", "species", "state", "station", "subject", "taxon"),
    *("time", "variable", "year"),
)
"""Names of a column of row names, which no row has as its own name."""
YEARS = (1500, 2200)
AXIS_LENGTH = 4
"""The least number of column names from which the steps between numbers are informative."""


class NameRows:
    """Whether the first rows of a table have the names of its columns.

    Args:
        first: the cells of the first row.
        rest: the cells of some rows below.
        is_number, is_missing: what a cell is.
        to_number: the number that a cell holds, NaN if it holds none.
    """

    def __init__(
        self,
        first: Cells,
        rest: Sequence[Cells],
        is_number: Callable[[str], bool],
        is_missing: Callable[[str], bool],
        to_number: Callable[[str], float],
    ) -> None:
        self.first, self.rest = first, rest
        self.is_number, self.is_missing, self.to_number = is_number, is_missing, to_number

    def _shares(self, rows: Sequence[Cells]) -> tuple[list[list[str]], list[float]]:
        """The observed cells of each column, and the share of them that are numbers."""
        observed = [
            [c for c in cells if not self.is_missing(c)] for cells in zip(*rows, strict=True)
        ]
        shares = [float(np.mean([self.is_number(c) for c in cells] or 0)) for cells in observed]
        return observed, shares

    def has_names(self) -> bool:
        """Whether the first row holds column names.

        It does if it has words over numbers, an empty cell or the usual name of such a column
        over row names, numbers that run evenly as years do where those below do not, or the
        column numbers 0, 1, 2, ... that pandas writes.
        """
        if not self.rest:
            return False
        first = self.first
        observed, share = self._shares(self.rest)
        over = [cell for cell, s in zip(first, share, strict=True) if s > 0.5]
        if any(not (self.is_number(cell) or self.is_missing(cell)) for cell in over):
            return True
        named = share[0] == 0 and bool(observed[0]) and not self.is_number(first[0])
        if named and first[0].strip().casefold() in NAMES_OF_ROW_NAMES:
            return True
        counted = [str(k) for k in range(len(first))]
        if first[0]:
            return (len(first) > 2 and list(first) == counted) or self._has_axis(share, named)
        counts = list(first[1:]) in (counted[:-1], counted[1:])
        return bool(observed[0]) and (counts or share[0] == 0)

    def _has_axis(self, share: Sequence[float], named: bool) -> bool:
        """Whether numbers over columns of numbers are years, times or wavelengths."""
        columns = [k for k, s in enumerate(share) if s > 0.5]
        axis = np.array([self.to_number(self.first[k]) for k in columns])
        rows = [[self.to_number(row[k]) for k in columns] for row in self.rest]
        if len(axis) < 2 or not _runs(axis):
            return False
        below = np.array(rows)
        if _are_years(axis) and not any(map(_are_years, below)):
            return True
        if np.mean([_runs(row) for row in below]) >= 0.5:
            return False
        low, high = np.nanmin(below, axis=0), np.nanmax(below, axis=0)
        outside = bool(((axis < low) | (axis > high)).all())
        fractions = bool(np.nanmean(below % 1 != 0) > 0.5) and bool((axis % 1 == 0).all())
        if len(axis) < AXIS_LENGTH:
            return (named and fractions) or (len(axis) > 2 and _is_even(axis) and outside)
        return named or _is_even(axis)

    def num_unit_rows(self) -> int:
        """The number of rows below the first that have units, or further names, over numbers."""
        count, rest = 0, self.rest
        while len(rest) > 1 and self._are_units(rest[0], rest[1:]):
            count, rest = count + 1, rest[1:]
        return count

    def _are_units(self, row: Cells, below: Sequence[Cells]) -> bool:
        _, share = self._shares(below)
        over = [cell.strip() for cell, s in zip(row, share, strict=True) if s > 0.5]
        words = [cell for cell in over if not (self.is_number(cell) or self.is_missing(cell))]
        if not words or any(map(self.is_number, over)):
            return False
        bracketed = all(cell[0] + cell[-1] in ("()", "[]") for cell in words)
        return bracketed or (len(words) >= 2 and 2 * len(words) >= len(over))


def distinct_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Distinct names for all columns, and notes on those that were changed.

    Columns without a name are called x1, x2, ...; repeated names get a suffix.
    """
    names, notes = [name or f"x{k}" for k, name in enumerate(names, 1)], []
    taken, previous = set(names), set()
    for k, name in enumerate(names):
        if name in previous:
            fresh = (f"{name}.{i}" for i in range(1, len(names) + 1))
            names[k] = next(other for other in fresh if other not in taken)
            notes.append(f"column name {name!r} is repeated; renamed to {names[k]!r}")
        taken.add(names[k])
        previous.add(names[k])
    return names, notes


def _runs(values: Float[np.ndarray, "K"]) -> bool:
    """Whether numbers increase, or decrease, from each to the next."""
    steps = np.diff(values)
    return len(steps) > 0 and bool((steps > 0).all() or (steps < 0).all())


def _is_even(values: Float[np.ndarray, "K"]) -> bool:
    return bool(np.allclose(np.diff(values), values[1] - values[0], rtol=1e-3))


def _are_years(values: Float[np.ndarray, "K"]) -> bool:
    return bool(((values % 1 == 0) & (values >= YEARS[0]) & (values <= YEARS[1])).all())
