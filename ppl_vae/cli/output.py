"""The results of commands: tables by their suffix, and JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from ppl_vae.cli.console import LOG
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.results import plain
from ppl_vae.data.files.table_output import STANDARD_OUTPUT, write_frame


def write_json(content: dict[str, Any]) -> None:
    """Write JSON on standard output."""
    sys.stdout.write(json.dumps(plain(content), allow_nan=False, ensure_ascii=False) + "\n")


def write_table(
    frame: pd.DataFrame, target: Path, *, named: bool, point_zero: bool = True
) -> None:
    """Write a table to a file or to standard output.

    Args:
        frame: the table.
        target: the file; ``-`` is standard output.
        named: whether the index holds the names of the rows.
        point_zero: whether whole numbers are written with a decimal point.
    """
    if Processes.current().rank and target != STANDARD_OUTPUT:
        return  # rank 0 writes
    write_frame(frame, target, index=named, point_zero=point_zero)
    if target != STANDARD_OUTPUT:
        LOG.info("wrote %s", target)


def deliver(
    frame: pd.DataFrame,
    target: Path,
    metadata: dict[str, Any],
    *,
    named: bool,
    as_json: bool,
    point_zero: bool = True,
) -> None:
    """Write a table, and with ``--json`` its content on standard output in place of CSV.

    Args:
        frame: the table.
        target: the file; ``-`` is standard output.
        metadata: what JSON has beside the rows.
        named: whether the index holds the names of the rows.
        as_json: whether JSON is written.
        point_zero: whether whole numbers are written with a decimal point in text.
    """
    if named and frame.index.name is not None:
        frame = frame.rename_axis(_unused(str(frame.index.name), frame))
    if not (as_json and target == STANDARD_OUTPUT):
        write_table(frame, target, named=named, point_zero=point_zero)
    if as_json:
        write_json(metadata | {"rows": _records(frame, named)})


def _unused(name: str, frame: pd.DataFrame) -> str:
    # The index becomes a column, whose name must be none of the others.
    while name in frame.columns:
        name += "_"
    return name


def _records(frame: pd.DataFrame, named: bool) -> list[dict[str, Any]]:
    name = frame.index.name or _unused("row", frame)
    shown = frame.reset_index(names=name) if named else frame
    rows = shown.astype(object).where(shown.notna(), None)
    return [dict(zip(shown.columns, row, strict=True)) for row in rows.to_numpy().tolist()]
