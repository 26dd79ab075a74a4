"""Columns that may be no measurements: identifiers, times; and marks of missing values."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from ppl_vae.core.arrays.magnitude import MAX_MAGNITUDE
from ppl_vae.core.text import counted
from ppl_vae.data.files.file_content import quoted

IDENTIFIER = re.compile(
    r"(?:.*[_ .-])?(?:id|ids|index|idx|key|nr|no|row|number|#)|.*[a-z]I[Dd]s?|ID|Id"
)
MAX_EXACT, MAX_INT64 = 2**53, 2**64
"""The whole numbers up to the first are exact in double precision; those up to the second can be
stored."""
COUNTED_ROWS = 10
"""The least number of rows that are recognised as counted by a column."""
EPOCH = (9e8, 2.2e9)
"""Seconds since 1970 from 1998 to 2039."""
EPOCH_UNITS = {1: "seconds", 10**3: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}
DAY = ((1900, 2100), (1, 12), (1, 31))
"""The ranges of year, month and day, in numbers such as 20240131."""
FAR = 3
"""How many times the range of all other values separates a value that is far from them."""
FAR_FOR_A_MARK = 0.25
"""The same, for values such as -999, which usually mark missing ones."""
USUAL_MARK = re.compile(r"-?9{2,}(?:\.9+)?|-32768|-2147483648|-?1e\+\d\d")
SAMPLE = 100
"""The number of values that are checked first."""
MIN_OTHERS = 3
"""The least number of distinct other values that have a range."""


def check_magnitudes(
    name: str,
    columns: Sequence[str],
    values: Float[np.ndarray, "D N"],
    place: Callable[[int], str],
) -> None:
    """Check that all values, of one column each, are finite and can be squared.

    Raises:
        ValueError: naming the first column and place.
    """
    flat = values.reshape(-1)
    if np.fmin.reduce(flat) >= -MAX_MAGNITUDE and np.fmax.reduce(flat) <= MAX_MAGNITUDE:
        return
    wrong = np.abs(values) > MAX_MAGNITUDE
    if not wrong.any():  # all are missing
        return
    infinite = int(np.isinf(values).sum())
    rows, found = np.nonzero((np.isinf(values) if infinite else wrong).T)
    where = f"column {columns[found[0]]!r}, {place(int(rows[0]))}"
    if infinite:
        raise ValueError(
            f"{name} has {counted(infinite, 'infinite entry')}, the first in {where}; correct "
            "them, or give what marks missing values as missing"
        )
    value = repr(float(values[found[0], rows[0]])).removesuffix(".0")
    raise ValueError(
        f"{name} has {counted(len(rows), 'entry')} beyond {MAX_MAGNITUDE:g} in magnitude, whose "
        f"squares are no finite numbers, the first {value} in {where}; rescale the column, or "
        f"give missing {value!r} if that marks a missing value"
    )


def describe_columns(
    columns: Sequence[str], values: Float[np.ndarray, "D N"], place: Callable[[int], str]
) -> Iterator[str]:
    """Notes on columns that may be no measurements, and on values that may mark missing ones."""
    kinds: dict[str, list[str]] = defaultdict(list)
    observed = [column[~np.isnan(column)] for column in values]
    for name, column in zip(columns, observed, strict=True):
        if kind := _kind(name, column, values.shape[1]):
            kinds[kind].append(name)
    for kind, names in kinds.items():
        yield (
            f"{quoted(names)}: {kind}, modelled like any column; drop leaves a column out, and "
            "index makes it the row names (on the command line --drop and --index)"
        )
    yield from _describe_markers(columns, values, observed, place)


def _kind(name: str, values: Float[np.ndarray, "M"], num_rows: int) -> str | None:
    """What a column may be instead of measurements."""
    if len(values) < MIN_OTHERS or not _are_whole(values):
        return _epoch(values) if len(values) >= MIN_OTHERS else None
    steps = np.diff(values)
    complete = len(values) == num_rows
    if complete and IDENTIFIER.fullmatch(name) and len(np.unique(values)) == num_rows:
        return "distinct whole numbers, like identifiers"
    if complete and num_rows >= COUNTED_ROWS and values[0] in (0, 1) and (steps == 1).all():
        return "the numbers of the rows, like identifiers"
    parts = (values // 10_000, values // 100 % 100, values % 100)
    if all(((low <= p) & (p <= high)).all() for p, (low, high) in zip(parts, DAY, strict=True)):
        return "whole numbers like dates (year, month, day)"
    if epoch := _epoch(values):
        return epoch
    long = MAX_EXACT <= np.median(np.abs(values)) <= MAX_INT64
    return "whole numbers of 16 digits or more, the last of which are lost" if long else None


def _are_whole(values: Float[np.ndarray, "M"]) -> bool:
    # The first values decide for most columns.
    return all((part % 1 == 0).all() for part in (values[:SAMPLE], values))


def _epoch(values: Float[np.ndarray, "M"]) -> str | None:
    ends = float(values.min()), float(values.max())
    for factor, unit in EPOCH_UNITS.items():
        low, high = ends[0] / factor, ends[1] / factor
        if EPOCH[0] <= low < high <= EPOCH[1]:
            first, last = (np.datetime64(int(s), "s").astype("datetime64[D]") for s in (low, high))
            return f"values like times in {unit} since 1970 ({first} to {last})"
    return None


def _describe_markers(
    columns: Sequence[str],
    values: Float[np.ndarray, "D N"],
    observed: Sequence[Float[np.ndarray, "M"]],
    place: Callable[[int], str],
) -> Iterator[str]:
    """Notes on values that repeat far from the other values of their columns."""
    found: dict[float, list[tuple[int, int]]] = defaultdict(list)
    for k, column in enumerate(values):
        for value in sorted(_far_values(observed[k])):
            rows = np.flatnonzero(column == value)
            found[value].extend((int(row), k) for row in rows)
    for value, cells in found.items():
        if len(cells) < 2:
            continue
        names = list(dict.fromkeys(columns[k] for _, k in cells))
        written = repr(value).removesuffix(".0")
        yield (
            f"{written} occurs {len(cells)} times in {quoted(names)}, first in "
            f"{place(cells[0][0])}, far from the other values; give missing '{written}' (on "
            f"the command line --missing {written}) if it marks a missing value, with the other "
            "markers of the file, or drop the column"
        )


def _far_values(values: Float[np.ndarray, "M"]) -> set[float]:
    """The smallest and the largest value, where they are far from all others."""
    if not len(values):
        return set()
    low, high = float(values.min()), float(values.max())
    inner = values[(values > low) & (values < high)]
    if not len(inner):
        return set()
    first, last = float(inner.min()), float(inner.max())
    # Both ends may be marks, as -999 and 1e20 are.
    pairs = ((low, first, high), (high, low, last), (low, first, last), (high, first, last))
    far = [_is_far(value, start, end) for value, start, end in pairs]
    if not any(far):
        return set()
    others = len(np.unique(inner)) + np.array([1, 1, 0, 0])
    enough = (others >= MIN_OTHERS).tolist()
    return {pair[0] for pair, yes, known in zip(pairs, far, enough, strict=True) if yes and known}


def _is_far(value: float, first: float, last: float) -> bool:
    """Whether a value is far from others, which lie between two numbers."""
    usual = USUAL_MARK.fullmatch(f"{value:g}") is not None
    if usual and value < 0 <= first:
        return True
    gap = first - value if value < first else value - last
    return gap > (FAR_FOR_A_MARK if usual else FAR) * (last - first)
