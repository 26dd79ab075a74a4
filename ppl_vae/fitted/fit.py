"""Fitting a model to a table: rows are split, columns scaled, K selected, log p estimated."""

import math
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae import __version__
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.processes.ranks import Processes, single_process
from ppl_vae.core.results import plain
from ppl_vae.core.stage_callback import StageCallback, ignore_stages
from ppl_vae.core.state import threads
from ppl_vae.core.text import counted
from ppl_vae.data.column_scales import MIXED_COLUMNS
from ppl_vae.data.column_stats import ColumnStats
from ppl_vae.data.files.file_content import quoted
from ppl_vae.data.files.tables import Table
from ppl_vae.data.files.text_columns import option
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.data.units import Units, choose_scaling
from ppl_vae.evaluation.prediction.masked_cv import MAX_SELECTION_ROWS, select_by_masked_cv
from ppl_vae.fitted.held_out import evaluate_held_out
from ppl_vae.fitted.metadata import FitMetadata, digest_table
from ppl_vae.fitted.model import FittedModel, FittedProgram, observed_rows
from ppl_vae.fitted.networks import default_epochs, fit_networks
from ppl_vae.fitted.settings import FitSettings
from ppl_vae.inference.em.fit import fit_closed_form, fit_em
from ppl_vae.inference.em.noise import FLOOR_REACHED
from ppl_vae.inference.svi.progress import ProgressCallback
from ppl_vae.inference.variational_bayes.fit import fit_vb
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.linear.sufficient_statistics import summarize_table
from ppl_vae.models.ppca import PPCA

VALIDATION_SHARE = 0.1
MIN_TRAINING_ROWS = 3
NOTES_OF_COLUMNS = ("constant columns", FLOOR_REACHED)
"""Beginnings of the notes of fits that number columns."""


class RowSplit(NamedTuple):
    """Numbers of the rows of a table, ascending in each part."""

    train: Int[np.ndarray, " N"]
    val: Int[np.ndarray, " V"]
    held_out: Int[np.ndarray, " H"]


def split_rows(usable: Int[np.ndarray, " U"], settings: FitSettings) -> RowSplit:
    """Split rows at random into training, validation and held-out rows.

    Only models with networks have validation rows.

    Args:
        usable: the numbers of the rows with observed values.
        settings: the settings of the fit.

    Raises:
        ValueError: if too few rows remain for the fit.
    """
    order = np.random.default_rng(settings.seed).permutation(usable)
    num_held_out = max(2, round(settings.held_out * len(order))) if settings.held_out else 0
    num_val = 0
    if settings.has_networks:
        num_val = max(1, round(VALIDATION_SHARE * (len(order) - num_held_out)))
    if len(order) - num_held_out - num_val < MIN_TRAINING_ROWS:
        raise ValueError(_too_few(len(order), num_held_out, num_val))
    held_out, val, train = np.split(order, [num_held_out, num_held_out + num_val])
    return RowSplit(np.sort(train), np.sort(val), np.sort(held_out))


def _too_few(number: int, num_held_out: int, num_val: int) -> str:
    parts = [f"{counted(number, 'row')} with observed values"]
    parts += [f"{num_held_out} of them held out"] * (num_held_out > 0)
    parts += [f"{num_val} kept for validation"] * (num_val > 0)
    others = " others" if len(parts) > 1 else ""
    remedy = "; --held-out 0 fits all rows" if num_held_out else ""
    return (
        f"{', '.join(parts)}: too few for a fit, which needs {MIN_TRAINING_ROWS}{others}{remedy}"
    )


@dataclass(frozen=True)
class Fitting:
    """The data of a fit, in the units of the model.

    Attributes:
        x: training rows, float64; NaN marks a missing value.
        x_val: validation rows.
        latent_dim: K.
        settings: the settings of the fit.
        image_shape: height and width, if rows are images.
        checkpoint: a file to resume from, for models with networks.
        progress: whether to show the progress, or a callback.
    """

    x: Float[Tensor, "N D"]
    x_val: Float[Tensor, "V D"]
    latent_dim: int
    settings: FitSettings
    checkpoint: Path | None = None
    progress: bool | str | ProgressCallback = "auto"


def fit_table(
    table: Table,
    settings: FitSettings | None = None,
    *,
    checkpoint: Path | None = None,
    progress: bool | str | ProgressCallback = "auto",
    on_stage: StageCallback = ignore_stages,
    name: str = "the model",
) -> FittedModel:
    """Fit a model to a table, and estimate its log p on held-out rows.

    Args:
        table: the table; rows with nothing observed are left out, with a note.
        settings: the settings of the fit; by default those of :class:`FitSettings`.
        checkpoint: a file that a model with networks is resumed from, if it exists, and that is
            written during its fit.
        progress: as for :func:`ppl_vae.fit_svi`.
        on_stage: a callback that receives a sentence before each stage.
        name: the name of the model, for messages.

    Raises:
        ValueError: if the table or the settings cannot be used; columns are named.
        FloatingPointError: if the fit diverges.
    """
    settings = settings or FitSettings()
    selects = settings.latent_dim is None and settings.likelihood == "gaussian"
    if selects or not settings.has_networks:
        table.check_several_columns()
    with threads(settings.threads):
        usable = observed_rows(table.values)
        rows = split_rows(np.flatnonzero(usable), settings)
        train = torch.from_numpy(table.values[rows.train])
        units, scaling, notes = _choose_units(table, train, settings)
        notes += _notes_on_rows(usable)
        x, x_val = (units.apply(torch.from_numpy(table.values[part])) for part in rows[:2])
        latent_dim, reason = _choose_latent_dim(x, settings, on_stage)
        problem = Fitting(x, x_val, latent_dim, settings, checkpoint, progress)
        text = f"fitting {settings.model} with K = {latent_dim} to {counted(len(x), 'row')}"
        on_stage(text, _num_steps(problem))
        program, history = fit_program(problem)
        program.schema = TableSchema(table.columns, "pandas") if table.has_names else None
        history = _in_units_of_table(history, units, x, x_val)
        fitted = FittedModel(
            program, _record(table, rows, units, scaling, settings, history), name
        )
        notes += (*reason, *named_notes(history.notes, table.columns))
        if len(rows.held_out):
            on_stage("evaluating the held-out rows")
        held_out = evaluate_held_out(fitted, table.values[rows.held_out], settings.seed)
    assert fitted.metadata is not None
    metadata = replace(fitted.metadata, notes=notes, held_out=held_out)
    return replace(fitted, metadata=metadata)


def fit_program(problem: Fitting) -> tuple[FittedProgram, FitResult]:
    """Fit the program that the settings name to the rows of the problem.

    Raises:
        ValueError: if the rows cannot be modelled by it.
        FloatingPointError: if the fit diverges.
    """
    settings, x = problem.settings, problem.x
    if settings.has_networks:
        return fit_networks(
            x,
            problem.x_val,
            problem.latent_dim,
            settings,
            checkpoint=problem.checkpoint,
            progress=problem.progress,
        )
    has_closed_form = settings.noise == "isotropic" and not bool(x.isnan().any())
    x = x[Processes.current().share(len(x))]
    if settings.model.startswith("bayesian"):
        model = BayesianPPCA.like(x, problem.latent_dim, noise=settings.noise, prior="ard")
        found = fit_vb(model, x, seed=settings.seed)
        return found.guide, FitResult.from_dict(found.to_dict())
    ppca = PPCA.like(x, problem.latent_dim, noise=settings.noise, seed=settings.seed)
    if has_closed_form:
        return ppca, fit_closed_form(ppca, x)
    return ppca, fit_em(ppca, x, starts=settings.starts)


def _num_steps(problem: Fitting) -> int:
    # The largest number of steps of the fit; 0 if it is not known.
    settings, rows = problem.settings, len(problem.x)
    if not settings.has_networks:
        return 0
    epochs = settings.epochs or default_epochs(rows, settings.batch_size)
    return epochs * math.ceil(rows / settings.batch_size)


def _choose_units(
    table: Table, train: Tensor, settings: FitSettings
) -> tuple[Units, str, tuple[str, ...]]:
    # Units, the name of the scaling, and notes; discrete data keep their units.
    statistics, _ = summarize_table(RowBlocks(train))
    _check_columns(table, statistics, settings)
    if settings.likelihood != "gaussian":
        return Units.none(train), "none", ()
    scaling = choose_scaling(train, statistics, settings.scale, image_shape=table.image_shape)
    return scaling.units, scaling.applied, (scaling.note,) if scaling.note else ()


def _check_columns(table: Table, statistics: ColumnStats, settings: FitSettings) -> None:
    """Check that each column can be modelled.

    Raises:
        ValueError: naming the columns that cannot.
    """
    empty = [table.columns[k] for k in (statistics.count == 0).nonzero().flatten().tolist()]
    if empty:
        raise ValueError(
            f"the rows that are fitted have nothing observed in the columns {quoted(empty)}; "
            f"leave them out in addition to others ({option('drop', empty)}), or choose another "
            "--seed if other rows have values"
        )
    constant = [table.columns[k] for k in statistics.constant_columns()]
    if len(constant) == len(table.columns):
        raise ValueError("every column is constant in the rows that are fitted")
    needs_variance = not settings.has_networks and settings.model != "ppca"
    if constant and needs_variance:
        raise ValueError(
            f"the columns {quoted(constant)} are constant in the rows that are fitted, and "
            f"--model {settings.model} cannot have them: leave them out in addition to others "
            f"({option('drop', constant)}), or use --model ppca"
        )


def _notes_on_rows(usable: np.ndarray) -> tuple[str, ...]:
    empty = int((~usable).sum())
    return (f"{counted(empty, 'row')} with nothing observed left out of the fit",) * (empty > 0)


def _choose_latent_dim(
    x: Tensor, settings: FitSettings, on_stage: StageCallback
) -> tuple[int, tuple[str, ...]]:
    if settings.latent_dim is not None:
        return settings.latent_dim, ()
    if settings.likelihood != "gaussian":
        width = x.shape[1]
        return max(1, min(10, width // 2)), ("K is half the number of columns, at most 10",)
    rows = min(len(x), MAX_SELECTION_ROWS)
    on_stage(f"selecting K on masked entries of {counted(rows, 'row')}")
    try:
        with single_process():  # each process computes the same
            search = select_by_masked_cv(
                x, noises=[settings.noise], max_rows=rows, seed=settings.seed
            )
    except ValueError as error:
        raise ValueError(f"K could not be selected ({error}); give --latent-dim") from error
    best = search.best
    score = float(search.log_density[best])
    return search.latent_dim[best], (
        f"K = {search.latent_dim[best]} was selected among {list(search.latent_dim)} by the "
        f"likelihood of {counted(search.num_masked, 'masked entry')} ({score:.3f} nats per entry, "
        "in the units of the fit)",
    )


def _in_units_of_table(history: FitResult, units: Units, x: Tensor, x_val: Tensor) -> FitResult:
    # Log densities of the training and of the validation rows, in the units of the table.
    means = [float(units.log_jacobian(part).mean()) if len(part) else 0.0 for part in (x, x_val)]
    return history.shifted(*means)


def named_notes(notes: tuple[str, ...], columns: tuple[str, ...]) -> tuple[str, ...]:
    """The notes of a fit with the names of columns in place of their numbers.

    That on columns of mixed units is left out, since the choice of the units has one of its own.
    """
    found = []
    for note in notes:
        if note.startswith(MIXED_COLUMNS):
            continue
        start, _, numbers = note.rpartition(": ")
        if start.startswith(NOTES_OF_COLUMNS) and re.fullmatch(r"\d+(, \d+)*", numbers):
            note = f"{start}: {', '.join(columns[int(n)] for n in numbers.split(', '))}"
        found.append(note)
    return tuple(found)


def _record(
    table: Table,
    rows: RowSplit,
    units: Units,
    scaling: str,
    settings: FitSettings,
    history: FitResult,
) -> FitMetadata:
    return FitMetadata(
        model=settings.model,
        table=table.name,
        table_digest=digest_table(table),
        columns=table.columns,
        loc=units.loc.double(),
        scale=units.scale.double(),
        scaling=scaling,
        train_rows=tuple(rows.train.tolist()),
        val_rows=tuple(rows.val.tolist()),
        held_out_rows=tuple(rows.held_out.tolist()),
        image_shape=table.image_shape,
        settings=plain(settings.to_plain()),
        versions={"ppl_vae": __version__}
        | {name: version(name) for name in ("torch", "pyro-ppl", "numpy")},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        history=history,
        held_out=None,
        index=table.index,
    )
