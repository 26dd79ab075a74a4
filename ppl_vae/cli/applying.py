"""What the commands do that apply a fitted model to a table."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ppl_vae.cli.console import LOG, StageDisplay, log_notes
from ppl_vae.cli.options import Estimation, FullEstimation, ModelAndTable, Output, TableFlags
from ppl_vae.cli.output import deliver, write_json
from ppl_vae.cli.reading import read_for_model
from ppl_vae.core.files import write_atomically
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.state import threads
from ppl_vae.core.text import counted
from ppl_vae.core.validation import check_int
from ppl_vae.data.files.table_output import TABLE_SUFFIXES, check_output
from ppl_vae.data.files.tables import Table
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.fitted.evaluation import Evaluation
from ppl_vae.fitted.folder import load_fitted
from ppl_vae.fitted.held_out import ReconstructionError
from ppl_vae.fitted.metadata import digest_table
from ppl_vae.fitted.model import FittedModel, observed_rows
from ppl_vae.report.terminal import print_line

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Task:
    """A model, a table, and where the result goes.

    Attributes:
        applied: the model's folder, the table's file, and where the result goes; ``-`` is
            standard output.
        flags: how the table is read.
    """

    applied: ModelAndTable
    flags: TableFlags

    def check(self, *suffixes: str) -> None:
        """Check, before any work, that the result can be written.

        Raises:
            ValueError: if not.
        """
        inputs, force = [self.applied.model, self.applied.table], self.applied.force
        check_output(
            self.applied.out, inputs=inputs, force=force, suffixes=suffixes or TABLE_SUFFIXES
        )

    @cached_property
    def fitted(self) -> FittedModel:
        """The model."""
        return load_fitted(self.applied.model)

    @cached_property
    def rows(self) -> "TableRows":
        """The rows of the table to which the model is applied."""
        table = read_for_model(self.flags, self.applied.table, self.fitted)
        log_notes(table.notes)
        return TableRows.of(self.fitted, table, held_out=self.applied.held_out)

    def compute(self, what: str, function: Callable[[np.ndarray], Returned]) -> Returned:
        """Apply a function to the rows that have an observed value, and show that it runs."""
        observed = self.rows.observed
        with threads(1), StageDisplay().live() as display:
            display.begin(f"{what} {counted(int(observed.sum()), 'row')}")
            return function(self.rows.values[observed])

    def deliver(self, columns: dict[str, Any], **metadata: Any) -> None:
        """Write a table with one row for each row, or JSON that has the metadata in addition."""
        rows = self.rows
        deliver(
            rows.frame(columns),
            self.applied.out,
            {"model": self.fitted.describe(), "table": rows.table.name, **metadata},
            named=rows.index is not None,
            as_json=self.applied.as_json,
        )


@dataclass(frozen=True)
class TableRows:
    """Rows of a table in the order of a model's columns.

    Attributes:
        table: the table.
        values: (N, D); NaN marks a missing value.
        index: the row names, if the table has them.
        numbers: the number of each row in the table, from 1.
    """

    table: Table
    values: np.ndarray
    index: pd.Index | None
    numbers: np.ndarray

    @classmethod
    def of(cls, fitted: FittedModel, table: Table, *, held_out: bool) -> "TableRows":
        """The rows, matched with the model's columns.

        Raises:
            ValueError: if columns are missing; with ``held_out``, if the table is not the one
                that was fitted, or no rows were held out.
        """
        values = fitted.match(table)
        if fitted.schema is None or not table.has_names:
            log_notes(("columns are matched by position, since they have no names",))
        rows = held_out_rows(fitted, table) if held_out else np.arange(len(values))
        index = None if table.row_index is None else table.row_index[rows]
        return cls(table, values[rows], index, rows + 1)

    @cached_property
    def observed(self) -> np.ndarray:
        """Which rows have an observed value; the others are reported."""
        found = observed_rows(self.values)
        if empty := int((~found).sum()):
            LOG.warning("note: %s with nothing observed: left empty", counted(empty, "row"))
        if empty == len(found):
            raise ValueError(f"{self.table.name} has no row with an observed value")
        return found

    def frame(self, columns: dict[str, Any]) -> pd.DataFrame:
        """A table with one row for each of these rows, under their names."""
        return pd.DataFrame(columns, index=self.index)


def held_out_rows(fitted: FittedModel, table: Table) -> np.ndarray:
    """The numbers of the rows that the fit held out, from 0.

    Raises:
        ValueError: if the table is not the one that was fitted, or no rows were held out.
    """
    if fitted.metadata is None:
        raise ValueError(f"--held-out: {fitted.name} has no metadata of its fit")
    if fitted.metadata.table_digest != digest_table(table):
        raise ValueError(
            f"--held-out: {table.name} is not the table that {fitted.name} was fitted to, "
            f"{fitted.metadata.table}, with its options of reading"
        )
    rows = np.array(fitted.metadata.held_out_rows, dtype=int)
    if not len(rows):
        raise ValueError(f"--held-out: the fit of {fitted.name} held out no rows")
    return rows


def expand(values: Tensor, rows: np.ndarray) -> np.ndarray:
    """Values of some rows as those of all, with NaN elsewhere."""
    found = np.full((len(rows), *values.shape[1:]), np.nan)
    found[rows] = values.detach().double().cpu().numpy()
    return found


def warn_of_fitted_rows(fitted: FittedModel, table: Table, *, held_out: bool) -> None:
    """Log a note if the model was fitted to rows of the table that is evaluated."""
    metadata = fitted.metadata
    if metadata is None or held_out or metadata.table_digest != digest_table(table):
        return
    LOG.warning(
        "note: %s was fitted to %s of this table, on which log p is too high; --held-out leaves "
        "them out",
        fitted.name,
        counted(len(metadata.train_rows) + len(metadata.val_rows), "row"),
    )


def write_scores(task: Task, estimation: Estimation) -> None:
    """Write log p of each row."""
    task.check()
    fitted, rows = task.fitted, task.rows
    found = task.compute(
        "computing log p of",
        partial(
            fitted.log_likelihood,
            num_samples=estimation.num_samples,
            refine=estimation.refine,
            seed=estimation.seed,
        ),
    )
    observed = rows.observed
    reliable = np.full(len(observed), None, dtype=object)
    reliable[observed] = found.reliable.tolist()
    warn_of_fitted_rows(fitted, rows.table, held_out=task.applied.held_out)
    verdict = "; ".join(line.strip() for line in str(found).splitlines())
    LOG.info("%s on %s: %s", fitted.describe(), rows.table.name, verdict)
    columns = {
        "log_p": expand(found.value, observed),
        "standard_error": expand(found.standard_error, observed),
        "reliable": pd.array(reliable, dtype="boolean"),
    }
    task.deliver(
        columns,
        mean=found.mean,
        mean_error=found.mean_error,
        share_reliable=found.share_reliable,
        method=found.method,
        verdict=str(found),
    )


def write_codes(task: Task) -> None:
    """Write the codes of each row."""
    task.check()
    mean, sd = task.compute("computing the codes of", task.fitted.codes)
    observed = task.rows.observed
    columns = {f"z{k + 1}": v for k, v in enumerate(expand(mean, observed).T)}
    if sd is not None:
        columns |= {f"z{k + 1} sd": v for k, v in enumerate(expand(sd, observed).T)}
    task.deliver(columns)


def write_reconstructions(task: Task) -> None:
    """Write the reconstruction of each row."""
    task.check()
    fitted, rows = task.fitted, task.rows
    values = expand(task.compute("reconstructing", fitted.reconstruct), rows.observed)
    error = ReconstructionError.of(fitted, rows.values[rows.observed])
    LOG.info("%s", error)
    columns = dict(zip(fitted.columns, values.T, strict=True))
    task.deliver(columns, rmse=error.value, rmse_error=error.error, unit=error.unit)


def write_samples(model: Path, rows: int, out: Path, output: Output, *, seed: int) -> None:
    """Write draws from a model."""
    check_int("--rows", rows)
    check_output(out, inputs=[model], force=output.force)
    fitted = load_fitted(model)
    with threads(1), torch.no_grad(), StageDisplay().live() as display:
        display.begin(f"drawing {counted(rows, 'row')} from {fitted.name}")
        found = fitted.sample(rows, seed=seed).numpy(force=True)
    frame = pd.DataFrame(found, columns=pd.Index(fitted.columns))
    deliver(frame, out, {"model": fitted.describe()}, named=False, as_json=output.as_json)


def write_evaluation(task: Task, estimation: FullEstimation) -> None:
    """Evaluate a model on a table, and write every number."""
    check_int("--rows", estimation.rows)
    check_int("--annealed", estimation.annealed, 0)
    annealing = Annealing(estimation.num_temperatures)
    task.check(".json")
    fitted, data = task.fitted, task.rows
    warn_of_fitted_rows(fitted, data.table, held_out=task.applied.held_out)
    values = data.values[data.observed][: estimation.rows]
    with threads(1), StageDisplay().live() as display:
        LOG.info("evaluating %s on %s", fitted.name, counted(len(values), "row"))
        found = Evaluation.of(
            fitted,
            values,
            data.table.name,
            num_samples=estimation.num_samples,
            refine=estimation.refine,
            annealed=estimation.annealed,
            annealing=annealing,
            seed=estimation.seed,
            on_stage=display.begin,
        )
    content = found.to_dict()
    if task.applied.as_json:
        write_json(content)
    else:
        for text in found.sentences():
            print_line(text)
    if Processes.current().rank == 0:
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_atomically(task.applied.out, text.encode())
    (LOG.info if task.applied.as_json else _print)("wrote %s", task.applied.out)


def _print(text: str, *values: object) -> None:
    print_line(text % values)
