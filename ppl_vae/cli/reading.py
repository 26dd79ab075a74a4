"""Reading the tables of commands; those of a fitted model are read as the fitted table was."""

import shlex
from pathlib import Path

from ppl_vae.cli.console import LOG, StageDisplay
from ppl_vae.cli.options import TableFlags
from ppl_vae.data.files.tables import Table
from ppl_vae.fitted.folder import RUN
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


def read_for_model(flags: TableFlags, path: Path, folder: Path) -> Table:
    """Read a table for a fitted model.

    Options about the content of the table that are not given are those of the model's fit, so that
    the same markers are missing values, and the same columns are labels or left out; unless the
    table has no such columns. Of the table that was fitted, all options are those of the fit.

    Args:
        flags: the given options.
        path: the file of the table.
        folder: the folder of the model.

    Raises:
        ValueError, TypeError, OSError: as :func:`~ppl_vae.data.files.tables.read_table`.
    """
    given, run = flags.given(), folder / RUN
    fitted = Run.read(run) if run.is_file() else Run(None, {}, {})
    same = str(path.resolve()) == fitted.table
    added = {
        name: value
        for name, value in fitted.options.items()
        if (same or name in OF_CONTENT) and name not in given
    }
    if not added:
        return read_file(flags, path)
    try:
        table = read_file(TableFlags.from_given(given | added, run), path)
    except ValueError:
        return read_file(flags, path)
    options = " ".join(map(_as_option, added, added.values()))
    LOG.info("%s is read with %s, as the table that was fitted", table.name, options)
    return table


def _as_option(name: str, value: object) -> str:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-", 1)
    return f"{option} {shlex.quote(str(value))}"
