"""The page of a fitted model."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from ppl_vae.core.text import counted
from ppl_vae.data.files.tables import Table
from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.fitted.metadata import FitMetadata
from ppl_vae.fitted.model import FittedModel, observed_rows
from ppl_vae.fitted.model_card import LIMITS, model_title
from ppl_vae.lineage.latent_means import LatentMeans
from ppl_vae.models.ppca import PPCA
from ppl_vae.plots.axes import SIZE, image_grid_size
from ppl_vae.plots.fits import loadings_size, plot_history, plot_loadings
from ppl_vae.plots.images import plot_reconstructions, plot_samples
from ppl_vae.plots.latent_spaces import MEANS_SIZE, plot_latent_means
from ppl_vae.report.figures import ReportFigure
from ppl_vae.report.html import Page

NUM_ROWS = 8
"""The number of rows that are drawn and reconstructed."""
MAX_POINTS = 5000
"""The largest number of rows whose codes are drawn."""
MAX_COLUMNS = 40
"""The largest number of columns whose units are listed."""
NO_METADATA = (
    "The folder holds a program without the metadata of its fit, which ppl-vae fit writes: how it "
    "was fitted, and log p of held-out rows, are not known. It is applied in its own units."
)
DATA, FIT = "Rows of the model and of the data", "The fit"


def fit_page(fitted: FittedModel, table: Table | None = None, *, seed: int = 0) -> Page:
    """The page of a fitted model.

    Args:
        fitted: the model.
        table: rows that are reconstructed and encoded, in the units of the model's table.
        seed: the seed of the samples.

    Raises:
        ValueError: if the columns of the table are not those of the model.
    """
    metadata, width = fitted.metadata, counted(fitted.data_dim, "column")
    return Page(
        title=fitted.describe() if metadata is None else model_title(fitted),
        subtitle=width if metadata is None else f"{width}, {_rows(metadata)}",
        verdict=[NO_METADATA] if metadata is None else [*_verdict(metadata)],
        tables=[_columns(fitted)],
        figures=[
            *(() if metadata is None else _figures_of_fit(metadata)),
            *_figures_of_model(fitted, seed),
            *_figures_of_rows(fitted, table),
        ],
        run=[("model", fitted.describe())] if metadata is None else _run(fitted, metadata),
        notes=() if metadata is None else metadata.notes,
    )


def _rows(metadata: FitMetadata) -> str:
    train, val, held_out = map(
        len, (metadata.train_rows, metadata.val_rows, metadata.held_out_rows)
    )
    stopping = f", {val} for early stopping" if val else ""
    return f"{counted(train, 'row')} fitted{stopping}, {held_out} held out"


def _verdict(metadata: FitMetadata) -> Iterator[str]:
    held_out = str(metadata.held_out or "no rows were held out, so log p of new rows is not known")
    yield f"{held_out[0].upper()}{held_out[1:]}."
    history = metadata.history
    yield f"{history.algorithm}: {counted(history.steps, 'step')}, {history.stopped}."
    if history.converged is False:
        yield "The fit did not meet its tolerance."
    yield LIMITS.get(metadata.model, "")


def _columns(
    fitted: FittedModel,
) -> tuple[str, tuple[str, ...], list[tuple[str, ...]], str]:
    units = fitted.units
    scale = units.scale.expand(fitted.data_dim)
    header: tuple[str, ...] = ("column", "shift", "scale")
    rows = [
        (name, f"{shift:.5g}", f"{unit:.5g}")
        for name, shift, unit in zip(
            fitted.columns, units.loc.tolist(), scale.tolist(), strict=True
        )
    ]
    if isinstance(fitted.program, PPCA):
        header = (*header, "noise sd")
        noise = (fitted.program.noise_scale.detach().expand(fitted.data_dim) * scale).tolist()
        rows = [(*row, f"{sd:.4g}") for row, sd in zip(rows, noise, strict=True)]
    legend = "The model is applied to (x - shift) / scale; results are in the units of the table."
    if len(rows) > MAX_COLUMNS:
        legend += f" The first {MAX_COLUMNS} of {len(rows)} columns are listed."
        if fitted.metadata is not None:
            legend += " fit.json in the model's folder has the units of all."
    return "Columns", header, rows[:MAX_COLUMNS], legend


def _figures_of_fit(metadata: FitMetadata) -> Iterator[ReportFigure]:
    if bool(metadata.history.objective.isfinite().all()) and metadata.history.steps > 1:
        yield ReportFigure(
            "objective",
            "The objective during the fit, in the units of the table. "
            f"{_execution(metadata.history.execution)}",
            SIZE,
            partial(plot_history, metadata.history),
            FIT,
        )


def _figures_of_model(fitted: FittedModel, seed: int) -> Iterator[ReportFigure]:
    if isinstance(fitted.program, PPCA):
        canonical = fitted.program.canonical()
        loadings = canonical.loadings.detach().double()
        variances = loadings.square().sum(1) + canonical.noise_scale.detach().double().square()
        loadings = loadings / variances.sqrt()[:, None]
        yield ReportFigure(
            "loadings",
            "How strongly each column depends on each latent dimension.",
            loadings_size(fitted.columns),
            partial(plot_loadings, loadings, fitted.columns),
            FIT,
        )
    if fitted.can_sample:
        drawn = fitted.sample(NUM_ROWS, seed=seed)[None]
        numbers = [str(k + 1) for k in range(NUM_ROWS)]
        grid = _grid(fitted, drawn, ["model"], numbers)
        caption = "Rows drawn from the model, noise included."
        yield ReportFigure(
            "samples", caption, image_grid_size(grid), partial(plot_samples, grid), DATA
        )


def _execution(execution: str) -> str:
    return f"Steps: {execution}." if execution else ""


def _grid(
    fitted: FittedModel,
    values: torch.Tensor,
    rows: list[str],
    columns: list[str],
) -> ImageGrid:
    # Two rows with the mean and the standard deviation of the fitted ones, for the scale.
    units = fitted.units
    ends = torch.stack([units.loc - units.scale, units.loc + units.scale])
    shape = None if fitted.metadata is None else fitted.metadata.image_shape
    image_shape = None if shape is None else (shape[0], shape[1])
    reference = ends if image_shape is None else values.flatten(0, 1)
    return ImageGrid.of(values, rows, columns, reference, image_shape, fitted.columns)


def _figures_of_rows(fitted: FittedModel, table: Table | None) -> Iterator[ReportFigure]:
    if table is None:
        return
    values = fitted.match(table)
    usable = np.flatnonzero(observed_rows(values))
    chosen = usable[np.linspace(0, len(usable) - 1, min(len(usable), NUM_ROWS)).astype(int)]
    rows = torch.from_numpy(values[chosen])
    pair = torch.stack([rows, fitted.reconstruct(values[chosen])])
    names = [str(k) for k in chosen]
    grid = _grid(fitted, pair, ["original", "reconstruction"], names)
    yield ReportFigure(
        "reconstructions",
        f"Rows {', '.join(names)} of {table.name} (the first is 0), and their reconstructions.",
        image_grid_size(grid),
        partial(plot_reconstructions, grid, heading="Reconstructions"),
        DATA,
    )
    if fitted.latent_dim < 2:
        return
    shown = usable[np.linspace(0, len(usable) - 1, min(len(usable), MAX_POINTS)).astype(int)]
    labels = None if table.labels is None else tuple(table.labels[k] for k in shown)
    codes = fitted.codes(values[shown])[0][:, :2]
    means = LatentMeans(codes, labels, table.label or "class", "dimensions 1 and 2")
    yield ReportFigure(
        "codes",
        f"Means of z given each row of {table.name}, in the first two latent dimensions."
        + (f" Colours and markers: {table.label}, which was not fitted." if labels else ""),
        MEANS_SIZE,
        partial(plot_latent_means, means, name="z"),
        DATA,
    )


def _run(fitted: FittedModel, metadata: FitMetadata) -> list[tuple[str, str]]:
    settings: Mapping[str, Any] = metadata.settings
    history = metadata.history
    return [
        ("model", fitted.describe()),
        ("data", metadata.table),
        ("rows", _rows(metadata)),
        ("settings", ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in settings.items())),
        ("scaling", metadata.scaling),
        ("seconds", f"{history.seconds:.2f}; {history.execution or 'exact'}"),
        ("date", metadata.date),
        ("versions", ", ".join(f"{name} {value}" for name, value in metadata.versions.items())),
    ]
