"""Excel's workbooks, whose cells are read as the text of a CSV file."""

import csv
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ppl_vae.data.files.file_content import check_file, check_size, named_damage, quoted
from ppl_vae.data.files.typed_tables import FLOAT_BYTES, library


def workbook_text(path: Path, max_bytes: int) -> tuple[str, list[str]]:
    """The cells of the first sheet of an Excel workbook as CSV, a line per row, and notes.

    Raises:
        FileNotFoundError: if there is no file.
        ModuleNotFoundError: if openpyxl is not installed.
        ValueError: if it is not a workbook, or too large; if formulas have no stored values.
    """
    check_file(path, max_bytes)
    with named_damage(f"{path} is not an Excel workbook (.xlsx)"):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        check_size(f"the content of {path}", size, max_bytes)
        openpyxl = library("openpyxl", extra="excel")
        values, formulas = (_sheets(openpyxl, path, stored) for stored in (True, False))
    filled = [
        name for name, rows in values.items() if any(c is not None for row in rows for c in row)
    ]
    if not filled:
        raise ValueError(f"{path} is empty: no sheet has cells")
    notes = []
    if len(filled) > 1:
        notes.append(f"of {len(filled)} sheets {filled[0]!r} is read, not {quoted(filled[1:])}")
    _check_formulas(path, values[filled[0]], formulas[filled[0]])
    rows = [_without_empty_end(row) for row in values[filled[0]]]
    width = max(map(len, rows))
    check_size(f"the table of {path}", sum(map(bool, rows)) * width * FLOAT_BYTES, max_bytes)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    for row in rows:  # an empty row is a blank line
        padded = (*row, *[None] * (width - len(row))) if row else ()
        writer.writerow([_cell_text(cell) for cell in padded])
    return lines.getvalue(), notes


def _without_empty_end(row: Sequence[Any]) -> Sequence[Any]:
    filled = [k for k, cell in enumerate(row, 1) if cell is not None]
    return row[: filled[-1]] if filled else ()


def _sheets(openpyxl: ModuleType, path: Path, stored: bool) -> dict[str, list[Sequence[Any]]]:
    """The cells of all sheets, with the stored values of formulas or the formulas themselves."""
    book = openpyxl.load_workbook(path, read_only=True, data_only=stored)
    found = {}
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # what the file states of its size may be wrong
        found[sheet.title] = list(sheet.iter_rows(values_only=True))
    book.close()
    return found


def _check_formulas(
    path: Path, values: Sequence[Sequence[Any]], formulas: Sequence[Sequence[Any]]
) -> None:
    for k, (row, written) in enumerate(zip(values, formulas, strict=True), 1):
        for value, formula in zip(row, written, strict=False):
            if value is None and isinstance(formula, str) and formula.startswith("="):
                raise ValueError(
                    f"{path}: the formula {formula!r} in line {k} has no stored value; open the "
                    "workbook in a spreadsheet program and save it"
                )


def _cell_text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).upper()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return " ".join(str(cell).splitlines())
