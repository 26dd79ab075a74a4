"""What ``ppl-vae report`` does."""

import json
from pathlib import Path

from ppl_vae.cli.console import LOG, StageDisplay, log_notes
from ppl_vae.core.files import write_whole
from ppl_vae.core.state import threads
from ppl_vae.data.table_options import TableOptions
from ppl_vae.data.table_output import check_output
from ppl_vae.fitted.folder import load_fitted
from ppl_vae.report.evaluation import Evaluation
from ppl_vae.report.evaluation_page import evaluation_page
from ppl_vae.report.fit_page import fit_page
from ppl_vae.report.html import Page


def report(
    source: Path,
    table: Path | None,
    options: TableOptions,
    out: Path,
    *,
    seed: int,
    force: bool,
) -> None:
    """Write the page of a fit or of an evaluation.

    Args:
        source: the folder of a model, or the file of an evaluation.
        table: rows for the page of a model, or None.
        options: of reading the table.
        out: the page.
        seed: of the samples that are drawn.
        force: whether an existing file of another kind is overwritten.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if it holds something else.
    """
    inputs = [source] if table is None else [source, table]
    check_output(out, inputs=inputs, force=force, suffixes=(".html",))
    with threads(1), StageDisplay().live() as display:
        display.begin(f"drawing the page of {source}")
        page = _page(source, table, options, seed)
        write_whole(out, page.render().encode())
    LOG.info("wrote %s", out)


def _page(source: Path, table: Path | None, options: TableOptions, seed: int) -> Page:
    if source.is_dir():
        rows = None if table is None else options.read(table)
        log_notes(() if rows is None else rows.notes)
        return fit_page(load_fitted(source), rows, seed=seed)
    if not source.exists():
        raise FileNotFoundError(f"there is no folder or file {source}")
    if table is not None:
        raise ValueError("the page of an evaluation takes no table")
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        found = Evaluation.from_dict(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{source} is no evaluation that ppl-vae evaluate wrote: {error}"
        ) from error
    return evaluation_page(found)
