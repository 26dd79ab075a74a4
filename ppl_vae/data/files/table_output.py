"""Writing tables: targets are checked before the work, and files are written whole or not."""

import csv
import errno
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from ppl_vae.core.files import atomic_file

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""What separates the cells of a text table, by the suffix."""
TABLE_SUFFIXES = (*SEPARATORS, ".parquet")
"""Suffixes of the tables that can be written."""
CELLS_AT_ONCE = 500_000
"""The number of cells that are made into text at a time."""
STANDARD_OUTPUT = Path("-")
"""The target that stands for standard output."""
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
FORMULA_STARTS = tuple("=+-@\t\r\n")
"""First characters of the text that a spreadsheet runs as a formula."""
SIGNATURES = {".parquet": (b"PAR1",), ".json": (b"{", b"["), ".html": (b"<",)}
"""How the content of a file begins, by its suffix, after a byte order mark and white space."""
NO_TEXT_TABLE = (b"PAR1", b"PK\3\4", b"{", b"<", b"%PDF", b"#!")
"""Beginnings of files that are no tables of text."""
INSPECTED_BYTES = 4096
"""How much of an existing file is inspected to recognise its kind."""


def check_output(
    target: Path,
    *,
    inputs: Sequence[Path],
    force: bool,
    suffixes: Sequence[str] = TABLE_SUFFIXES,
) -> None:
    """Check, before any work, that a file can be written without the loss of another one.

    Args:
        target: the file to be written; ``-`` stands for standard output and is always accepted.
        inputs: files and folders that the command reads; neither such a file nor a file in such a
            folder is ever overwritten, under any name.
        force: whether an existing file whose content is of another kind may be overwritten.
        suffixes: the suffixes that are written.

    Raises:
        ValueError: if the suffix is not among ``suffixes``; if the target is a folder, a device,
            a pipe, one of the inputs, a file that is protected from writing, or an existing file
            of another kind and ``force`` is False; if its folder does not exist or cannot be
            written to.
    """
    if target == STANDARD_OUTPUT:
        return
    suffix = target.suffix.lower()
    if suffix not in suffixes:
        raise ValueError(f"the output must end in {' or '.join(suffixes)}; got {target}")
    mode = _existing_mode(target)
    if mode is not None and stat.S_ISDIR(mode):
        raise ValueError(f"the output {target} is a folder; give a file in it")
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(f"the output {target} is a device or a pipe; - is standard output")
    for source in inputs:
        _refuse_input(target, source)
    if mode is not None and not force and not _is_of_kind(target, suffix):
        raise ValueError(
            f"the output {target} exists, and its content is not that of a {suffix} file; give "
            "another name, or --force to overwrite it"
        )
    _check_folder(target)


def _existing_mode(target: Path) -> int | None:
    # The mode of what the name leads to; None if there is nothing.
    try:
        return target.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = "is a loop of links" if error.errno == errno.ELOOP else f"is no file: {error}"
        raise ValueError(f"the output {target} {reason}") from error


def _refuse_input(target: Path, source: Path) -> None:
    """Refuse a target that is the source, or a file in it.

    Raises:
        ValueError: if it is.
    """
    if not target.exists() or not source.exists():
        same = os.path.realpath(target) == os.path.realpath(source)
    elif source.is_dir():
        same = any(folder.samefile(source) for folder in target.resolve().parents)
    else:
        same = target.samefile(source)
    if same:
        raise ValueError(
            f"the output {target} is an input, {source}, which would be overwritten; give "
            "another name"
        )


def _is_of_kind(path: Path, suffix: str) -> bool:
    # Whether the content of an existing file, if any, is what its suffix promises.
    with path.open("rb") as file:
        raw = file.read(INSPECTED_BYTES)
    start = raw.removeprefix(b"\xef\xbb\xbf").lstrip()
    if suffix in SIGNATURES:
        return not start or start.startswith(SIGNATURES[suffix])
    return b"\0" not in raw and not start.startswith(NO_TEXT_TABLE)


def _check_folder(target: Path) -> None:
    """Check that a file can be made in the folder of the target.

    Raises:
        ValueError: if not.
    """
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} for the output {target.name}")
    if target.exists() and not os.access(target, os.W_OK):
        raise ValueError(f"the output {target} exists and is protected from writing")
    try:
        with tempfile.TemporaryFile(dir=target.parent):  # has no name that a kill could leave
            pass
    except OSError as error:
        raise ValueError(f"the output {target} cannot be written: {error.strerror}") from error


def write_frame(
    frame: pd.DataFrame, target: Path, *, index: bool, point_zero: bool = True
) -> None:
    """Write a table as CSV, TSV or Parquet, by the suffix: whole, or not at all.

    Numbers are written with all digits, and missing values as empty cells. In CSV and TSV a text
    that begins with ``=``, ``+``, ``-``, ``@``, a tab or a line end and is no number gets an
    apostrophe before it, so that no spreadsheet runs it as a formula.

    Args:
        frame: the table.
        target: the file; ``-`` is standard output, as CSV.
        index: whether the index of the frame is written as the first column.
        point_zero: whether text has a decimal point in whole floating-point numbers, 1.0.

    Raises:
        ValueError: if the suffix is not .csv, .tsv or .parquet; if two columns of a Parquet file
            have the same name, or one has cells of several types.
    """
    if target == STANDARD_OUTPUT:
        sys.stdout.flush()
        for text in _texts(frame, ",", index=index, point_zero=point_zero):
            sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
        return
    suffix = target.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"the output must end in {' or '.join(TABLE_SUFFIXES)}; got {target}")
    with atomic_file(target) as partial, partial.open("wb") as file:
        if suffix == ".parquet":
            _write_parquet(frame, file, target, index)
        else:
            separator = SEPARATORS[suffix]
            for text in _texts(frame, separator, index=index, point_zero=point_zero):
                file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _write_parquet(frame: pd.DataFrame, file: BinaryIO, target: Path, index: bool) -> None:
    named = frame.rename(columns=str)
    if not named.columns.is_unique:
        repeated = sorted(set(named.columns[named.columns.duplicated()]))
        raise ValueError(f"{target}: column names of Parquet are distinct; repeated: {repeated}")
    try:
        named.to_parquet(file, index=index)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{target} cannot be written as Parquet: {error}") from error


def _texts(frame: pd.DataFrame, separator: str, *, index: bool, point_zero: bool) -> Iterator[str]:
    # The text in parts of some rows each, the first with the header.
    plain = _without_formulas(frame)
    # The writer quotes no carriage return in a cell, although readers take it as a line end.
    quoting = csv.QUOTE_NONNUMERIC if _has_returns(plain, index) else csv.QUOTE_MINIMAL
    size = max(1, CELLS_AT_ONCE // max(1, frame.shape[1]))
    for low in range(0, max(1, len(plain)), size):
        rows = plain.iloc[low : low + size]
        yield (rows if point_zero else _without_point_zero(rows)).to_csv(
            sep=separator, index=index, lineterminator="\n", quoting=quoting, header=low == 0
        )


def _has_returns(frame: pd.DataFrame, index: bool) -> bool:
    columns = [frame.iloc[:, k] for k, kind in enumerate(frame.dtypes) if not _has_no_text(kind)]
    parts = [*columns, frame.columns, *((frame.index, frame.index.names) if index else ())]
    return any(isinstance(cell, str) and "\r" in cell for part in parts for cell in part)


def _without_point_zero(frame: pd.DataFrame) -> pd.DataFrame:
    found = frame.copy(deep=False)
    for k, kind in enumerate(frame.dtypes):
        if kind.kind == "f":
            values = frame.iloc[:, k].tolist()
            texts = [None if v != v else repr(v).removesuffix(".0") for v in values]
            found.isetitem(k, pd.Series(texts, frame.index, dtype=object))
    return found


def _without_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with its texts, names of columns and index included, written as plain text."""
    plain = frame.copy(deep=False)
    for k, kind in enumerate(frame.dtypes):
        if not _has_no_text(kind):
            plain.isetitem(k, pd.Series(_plain_all(frame.iloc[:, k]), frame.index, dtype=object))
    plain.columns = pd.Index(_plain_all(frame.columns), dtype=object)
    if not _has_no_text(frame.index.dtype):
        plain.index = pd.Index(_plain_all(frame.index), dtype=object)
    plain.index.names = _plain_all(frame.index.names)
    return plain


def _has_no_text(kind: Any) -> bool:
    types = pd.api.types
    return (
        types.is_numeric_dtype(kind)
        or types.is_datetime64_any_dtype(kind)
        or types.is_timedelta64_dtype(kind)
    )


def _plain_all(cells: Iterable[object]) -> list[object]:
    return [_plain(cell) for cell in cells]


def _plain(cell: object) -> object:
    if not isinstance(cell, str) or not cell.startswith(FORMULA_STARTS) or NUMBER.fullmatch(cell):
        return cell
    return f"'{cell}"


def without_apostrophe(cell: str) -> str:
    """A text of a table without the apostrophe that :func:`write_frame` put before it."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA_STARTS) else cell
