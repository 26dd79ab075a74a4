"""What ``ppl-vae compare`` does."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ppl_vae.cli.applying import held_out_rows, warn_of_fitted_rows
from ppl_vae.cli.console import LOG, StageDisplay, log_notes
from ppl_vae.cli.options import Estimation, Output, TableFlags
from ppl_vae.cli.output import write_json, write_table
from ppl_vae.cli.reading import read_for_model
from ppl_vae.core.state import threads
from ppl_vae.core.text import counted
from ppl_vae.data.files.table_output import check_output
from ppl_vae.data.files.tables import Table
from ppl_vae.evaluation.marginal_likelihood.compare import compare as compare_estimates
from ppl_vae.fitted.folder import load_fitted
from ppl_vae.fitted.model import FittedModel, RowArray, observed_rows
from ppl_vae.report.terminal import print_line


def write_comparison(
    paths: Sequence[Path],
    flags: TableFlags,
    out: Path | None,
    estimation: Estimation,
    output: Output,
    *,
    held_out: bool,
) -> None:
    """Rank models by their mean log p of the same rows.

    Args:
        paths: the folders of the models, and the table at the end.
        flags: how the table is read; what is not given is as in the fit of the first model.
        out: a table to write, or None.
        estimation: the settings of the estimates of log p.
        output: whether JSON is written on standard output in place of the table, and whether an
            existing file of another kind is overwritten.
        held_out: whether only the rows that no fit used are scored.

    Raises:
        ValueError: if there are fewer than two models, or they cannot be compared.
    """
    *folders, path = paths
    if len(folders) < 2:
        raise ValueError("compare needs two or more folders of models, and a table at the end")
    if out is not None:
        check_output(out, inputs=paths, force=output.force)
    models = dict(zip(_names(folders), map(load_fitted, folders), strict=True))
    _check_same_columns(models)
    table = read_for_model(flags, path, next(iter(models.values())))
    log_notes(table.notes)
    values = {name: fitted.match(table) for name, fitted in models.items()}
    rows = _rows(models, table, values, held_out=held_out)
    estimates = {}
    with threads(1), StageDisplay().live() as display:
        for name, fitted in models.items():
            warn_of_fitted_rows(fitted, table, held_out=held_out)
            display.begin(f"computing log p of {counted(len(rows), 'row')} under {name}")
            estimates[name] = fitted.log_likelihood(
                values[name][rows],
                num_samples=estimation.num_samples,
                refine=estimation.refine,
                seed=estimation.seed,
            )
    found = compare_estimates(estimates)
    if output.as_json:
        write_json({"table": table.name} | found.to_dict())
    else:
        print_line(str(found))
    if out is not None:
        write_table(found.to_frame(), out, named=True)


def _names(folders: Sequence[Path]) -> list[str]:
    # The last part of each path, or the whole paths if these repeat.
    names = [folder.resolve().name for folder in folders]
    full = list(map(str, folders))
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"a model is given twice: {', '.join(full)}")
    return names if len(set(names)) == len(names) else full


def _check_same_columns(models: dict[str, FittedModel]) -> None:
    """Check that all models are densities of the same columns.

    Raises:
        ValueError: if not.
    """
    first, *others = models
    for other in others:
        one, two = models[first], models[other]
        if one.schema and two.schema and set(one.columns) != set(two.columns):
            raise ValueError(
                f"{first} and {other} model different columns, so that their log p cannot be "
                f"compared: {sorted(set(one.columns) ^ set(two.columns))[:5]}"
            )


def _rows(
    models: dict[str, FittedModel], table: Table, values: dict[str, RowArray], *, held_out: bool
) -> np.ndarray:
    # The rows that are scored, by their numbers from 0.
    found = np.flatnonzero(np.all(list(map(observed_rows, values.values())), axis=0))
    if held_out:
        for fitted in models.values():
            found = np.intersect1d(found, held_out_rows(fitted, table))
    if len(found) < 2:
        raise ValueError(f"{counted(len(found), 'row')} left to compare the models on")
    LOG.debug("rows compared: %s", len(found))
    return found
