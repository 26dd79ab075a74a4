"""Reading the tables of commands; those of a fitted model are read as the fitted table was."""

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ppl_vae.cli.console import LOG, StageDisplay
from ppl_vae.cli.options import TableFlags
from ppl_vae.core.text import as_row, listed
from ppl_vae.data.files.column_selection import ColumnError
from ppl_vae.data.files.file_content import quoted
from ppl_vae.data.files.tables import Table
from ppl_vae.fitted.folder import RUN
from ppl_vae.fitted.model import FittedModel
from ppl_vae.fitted.settings import Run

LARGE_FILE = 5_000_000
"""The size in bytes from which on the reading of a file is shown."""
OF_CONTENT = ("columns", "drop", "index", "label", "missing")
"""The options that are about the content of a table, and not about the format of its file."""


def read_file(flags: TableFlags, path: Path) -> Table:
    """Read a table; the reading of a large file is a stage of the command.

    Raises:
        ValueError, TypeError, OSError: as :func:`~ppl_vae.data.files.tables.read_table`.
    """
    options = flags.options()
    with StageDisplay().live() as display:
        if path.is_file() and path.stat().st_size > LARGE_FILE:
            display.begin(f"reading {path}")
        return options.read(path)


def read_for_model(flags: TableFlags, path: Path, fitted: FittedModel) -> Table:
    """Read a table for a fitted model.

    Options about the content of the table that are not given are those of the model's fit, so that
    the same markers are missing values, and the same columns are labels or left out, as far as the
    table has such columns. Of the table that was fitted, all options are those of the fit. The
    column of row names of the fit is one here, too. If columns that the model does not have cannot
    be read as numbers, all such columns are left out, and a note names them.

    Args:
        flags: the given options.
        path: the file of the table.
        fitted: the model.

    Raises:
        ValueError, TypeError, OSError: as :func:`~ppl_vae.data.files.tables.read_table`.
    """
    given, run = flags.given(), Path(fitted.name) / RUN
    options = _options_of_fit(given, path, run)
    try:
        table = read_file(TableFlags.from_given(given | options, run), path)
    except ColumnError as error:
        narrowed = _of_columns(options, error.columns)
        if "columns" not in given | narrowed:
            narrowed |= _columns_of_model(fitted, given | narrowed, error.columns)
        if narrowed == options:
            raise
        options = narrowed
        table = read_file(TableFlags.from_given(given | options, run), path)
    if "index" not in given and _has_row_names_as_data(table, fitted):
        assert fitted.metadata is not None
        options["index"] = fitted.metadata.index
        table = read_file(TableFlags.from_given(given | options, run), path)
    if options:
        shown = " ".join(map(_as_option, options, options.values()))
        LOG.info("%s is read with %s, as the table that was fitted", table.name, shown)
    return table


def _options_of_fit(given: Mapping[str, Any], path: Path, run: Path) -> dict[str, Any]:
    """The options of the fit that hold for a table, unless they are given."""
    fitted = Run.read(run) if run.is_file() else Run(None, {}, {})
    same = str(path.resolve()) == fitted.table
    return {
        name: value
        for name, value in fitted.options.items()
        if (same or name in OF_CONTENT) and name not in given
    }


def _of_columns(options: Mapping[str, Any], columns: Collection[str]) -> dict[str, Any]:
    """The options without the names of columns that a table does not have."""
    found = dict(options)
    for name in ("columns", "drop"):
        if name in found:
            found[name] = as_row([part for part in listed(found[name]) if part in columns])
    for name in ("label", "index"):
        if name in found and found[name] != "none" and found[name] not in columns:
            found[name] = ""
    return {name: value for name, value in found.items() if value != ""}


def _columns_of_model(
    fitted: FittedModel, options: Mapping[str, Any], columns: Collection[str]
) -> dict[str, str]:
    """The option that leaves out the columns that the model does not have."""
    if fitted.schema is None or not set(fitted.columns) <= set(columns):
        return {}
    used = {*fitted.columns, *listed(options.get("drop", ""))}
    used |= {options.get("label"), options.get("index")}
    others = [name for name in columns if name not in used]
    LOG.warning("note: columns that the model does not have are left out: %s", quoted(others))
    return {"columns": as_row(fitted.columns)}


def _has_row_names_as_data(table: Table, fitted: FittedModel) -> bool:
    """Whether the column of row names of a fit is a column of numbers of this table."""
    name = fitted.metadata and fitted.metadata.index
    return name is not None and name in table.columns and name not in fitted.columns


def _as_option(name: str, value: object) -> str:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-", 1)
    return f"{option} {shlex.quote(str(value))}"
