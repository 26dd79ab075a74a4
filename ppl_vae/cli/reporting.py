"""What ``ppl-vae report`` does."""

import json
from functools import partial
from pathlib import Path

from ppl_vae.cli.console import LOG, StageDisplay, log_notes
from ppl_vae.cli.options import TableFlags
from ppl_vae.cli.reading import read_for_model
from ppl_vae.core.files import read_regular, write_atomically
from ppl_vae.core.state import threads
from ppl_vae.data.files.table_output import check_output
from ppl_vae.fitted.evaluation import Evaluation
from ppl_vae.fitted.folder import load_fitted
from ppl_vae.report.evaluation_page import evaluation_page
from ppl_vae.report.fit_page import fit_page


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
    found = load_fitted(source) if source.is_dir() else _evaluation(source)
    if isinstance(found, Evaluation):
        if table is not None:
            raise ValueError(f"a table goes with the folder of a model, and {source} is none")
        page = partial(evaluation_page, found)
    else:
        rows = None if table is None else read_for_model(flags, table, found)
        log_notes(() if rows is None else rows.notes)
        page = partial(fit_page, found, rows, seed=seed)
    with threads(1), StageDisplay().live() as display:
        display.begin(f"writing the page of {source}")
        write_atomically(out, page().render().encode())
    LOG.info("wrote %s", out)


def _evaluation(source: Path) -> Evaluation:
    """The evaluation in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    if not source.exists():
        raise FileNotFoundError(f"there is no folder or file {source}")
    try:
        return Evaluation.from_dict(json.loads(read_regular(source)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{source} is no evaluation that ppl-vae evaluate wrote: {error}"
        ) from error
