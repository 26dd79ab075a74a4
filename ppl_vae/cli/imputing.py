"""What ``ppl-vae impute`` does."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ppl_vae.cli.applying import TableRows
from ppl_vae.cli.console import LOG, StageDisplay
from ppl_vae.cli.options import ImputationFlags, Output, TableFlags
from ppl_vae.cli.output import deliver
from ppl_vae.cli.reading import read_file, read_for_model
from ppl_vae.core.imputed import Imputation
from ppl_vae.core.processes.ranks import single_process
from ppl_vae.core.state import threads
from ppl_vae.core.text import counted
from ppl_vae.core.validation import check_int, check_option
from ppl_vae.data.files.table_output import STANDARD_OUTPUT, check_output
from ppl_vae.data.files.tables import Table
from ppl_vae.data.units import SCALES
from ppl_vae.fitted.filled_table import FilledTable, filled_frame
from ppl_vae.fitted.folder import load_fitted
from ppl_vae.fitted.model import FittedModel
from ppl_vae.models.ppca import NOISES
from ppl_vae.report.terminal import print_line

REFINE = 300
"""Steps of the optimization of each row's q, where values are imputed by a VAE."""


def write_filled_table(
    paths: Sequence[Path],
    flags: TableFlags,
    out: Path,
    output: Output,
    settings: ImputationFlags,
    *,
    seed: int,
) -> None:
    """Fill the missing values of a table, by a fitted model or by one that is fitted to it.

    Args:
        paths: the table; before it, the folder of a model.
        flags: how the table is read.
        out: the file to write; ``-`` is standard output.
        output: whether JSON is written on standard output, and whether an existing file of another
            kind is overwritten.
        settings: as for :meth:`~ppl_vae.fitted.filled_table.FilledTable.of`.
        seed: the seed of all draws.

    Raises:
        ValueError: arguments or data that cannot be used.
    """
    check_int("--starts", settings.starts)
    check_option("--scale", settings.scale, SCALES)
    if settings.noise is not None:
        check_option("noise", settings.noise, NOISES)
    if len(paths) > 2:
        raise ValueError(f"impute takes a table, or a model and a table; got {len(paths)} paths")
    *folders, path = paths
    if folders and settings != ImputationFlags():
        raise ValueError(
            "--latent-dim, --noise, --starts, --scale and --parameter-uncertainty are of a fit to "
            f"the table; the model in {folders[0]} has been fitted"
        )
    check_output(out, inputs=paths, force=output.force)
    silent = output.as_json or out == STANDARD_OUTPUT
    fitted = load_fitted(folders[0]) if folders else None
    table = read_for_model(flags, path, fitted) if fitted else read_file(flags, path)
    _report([f"{table.description}, seed {seed}", *_notes(table.notes)], silent)
    with threads(1), StageDisplay().live() as display:
        if fitted is not None:
            display.begin(f"imputing by the model in {fitted.name}")
            table, imputation, sentences = _by_model(fitted, table, seed)
        else:
            with single_process():  # each process computes the same
                filled = FilledTable.of(
                    table,
                    settings.latent_dim,
                    settings.noise,
                    seed=seed,
                    starts=settings.starts,
                    scale=settings.scale,
                    parameter_uncertainty=settings.parameter_uncertainty,
                    on_stage=display.begin,
                )
            imputation, sentences = filled.imputation, _sentences(filled)
    _report(sentences, silent)
    frame = filled_frame(table, imputation)
    metadata = {"table": table.name, "uncertainty": imputation.uncertainty()}
    named = table.row_names is not None
    deliver(frame, out, metadata, named=named, as_json=output.as_json, point_zero=False)


def _sentences(filled: FilledTable) -> list[str]:
    search = [str(filled.search)] if filled.search else []
    if search and filled.scaling.units.per_column:
        search.append("  (of standardised columns)")
    return [*search, *filled.sentences(), *_notes(filled.notes())]


def _notes(notes: Sequence[str]) -> list[str]:
    return [f"note: {note}" for note in notes]


def _report(sentences: Sequence[str], silent: bool) -> None:
    # On standard output, unless that holds the results.
    for text in sentences:
        if silent:
            LOG.info("%s", text)
        else:
            print_line(text)


def _by_model(fitted: FittedModel, table: Table, seed: int) -> tuple[Table, Imputation, list[str]]:
    rows = TableRows.of(fitted, table, held_out=False)
    found = fitted.impute(rows.values, refine=REFINE, seed=seed)
    missing = int(np.isnan(rows.values).sum())
    matched = Table(
        table.name,
        rows.values,
        table.columns if fitted.schema is None else fitted.columns,
        table.row_names,
        table.labels,
        table.label,
        index=table.index,
    )
    sentences = [f"imputed {counted(missing, 'value')} by {fitted.describe()}"]
    sentences += [" ".join(found.uncertainty())] if missing else []
    return matched, found, sentences + _notes(found.notes)
