"""What ``ppl-vae report`` does."""

import json
from pathlib import Path

from ppl_vae.cli.console import LOG, StageDisplay, log_notes
from ppl_vae.cli.options import TableFlags
from ppl_vae.cli.reading import read_for_model
from ppl_vae.core.files import write_atomically
from ppl_vae.core.state import threads
from ppl_vae.data.files.table_output import check_output
from ppl_vae.data.files.tables import Table
from ppl_vae.fitted.evaluation import Evaluation
from ppl_vae.fitted.folder import load_fitted
from ppl_vae.report.evaluation_page import evaluation_page
from ppl_vae.report.fit_page import fit_page
from ppl_vae.report.html import Page


def write_page(
    source: Path,
    table: Path | None,
    flags: TableFlags,
    out: Path,
    *,
    seed: int,
    force: bool,
) -> None:
    """Write the page of a fit or of an evaluation.

    Args:
        source: the folder of a model, or the file of an evaluation.
        table: rows for the page of a model, or None.
        flags: how the table is read.
        out: the page.
        seed: the seed of the samples that are drawn.
        force: whether an existing file of another kind is overwritten.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if it holds something else.
    """
    inputs = [source] if table is None else [source, table]
    check_output(out, inputs=inputs, force=force, suffixes=(".html",))
    if table is not None and not source.is_dir():
        raise ValueError(f"a table goes with the folder of a model, and {source} is none")
    rows = None if table is None else read_for_model(flags, table, source)
    log_notes(() if rows is None else rows.notes)
    with threads(1), StageDisplay().live() as display:
        display.begin(f"drawing the page of {source}")
        page = _page(source, rows, seed)
        write_atomically(out, page.render().encode())
    LOG.info("wrote %s", out)


def _page(source: Path, rows: Table | None, seed: int) -> Page:
    if source.is_dir():
        return fit_page(load_fitted(source), rows, seed=seed)
    if not source.exists():
        raise FileNotFoundError(f"there is no folder or file {source}")
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        found = Evaluation.from_dict(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{source} is no evaluation that ppl-vae evaluate wrote: {error}"
        ) from error
    return evaluation_page(found)
