"""What is known about a fit, beside the program itself."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.results import Result
from ppl_vae.core.text import counted
from ppl_vae.data.files.tables import Table
from ppl_vae.data.units import Units
from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE


def digest_table(table: Table) -> str:
    """A checksum of the names of the columns and of the values of a table."""
    found = hashlib.sha256("\0".join(table.columns).encode("utf-8", "surrogatepass"))
    found.update(np.ascontiguousarray(table.values, dtype="<f8").tobytes())
    return found.hexdigest()


def plus_minus(error: float) -> str:
    """A standard error as it follows its value; empty if it is NaN."""
    return "" if error != error else f" ± {error:.3g}"


@dataclass(frozen=True)
class HeldOut(Result):
    """How well a fitted model predicts rows that were not fitted.

    Attributes:
        rows: their number.
        scored: the number of these that were evaluated.
        measure: ``"log p"``, in nats per datum, or ``"RMSE"``, the root mean square error of
            reconstructions, for models without log p.
        value: the mean of log p, or the error.
        error: its standard error over rows; NaN for a single row.
        method: how log p was computed.
        share_reliable: the share of reliable estimates; 1 for exact values.
        unit: the unit of the value and of its error.
    """

    rows: int
    scored: int
    measure: str
    value: float
    error: float
    method: str
    share_reliable: float = 1.0
    unit: str = "nats per datum"

    def __str__(self) -> str:
        if self.measure == "RMSE":
            return (
                f"held-out reconstruction error {self.value:.4g}{plus_minus(self.error)}, root "
                f"mean square in {self.unit}, over {counted(self.scored, 'row')}"
            )
        bound = "at least " if self.share_reliable < FEW_RELIABLE else ""
        return (
            f"held-out log p {bound}{self.value:.4f}{plus_minus(self.error)} {self.unit} over "
            f"{counted(self.scored, 'row')} ({self.verdict})"
        )

    @property
    def verdict(self) -> str:
        """Whether log p can be trusted, in a few words."""
        if self.method == "exact":
            return "exact"
        if self.share_reliable < FEW_RELIABLE:
            share = f"{self.share_reliable:.0%}"
            return f"NOT reliable, a lower bound: {share} of the estimates are reliable"
        return f"{self.method}, {self.share_reliable:.0%} of the estimates reliable"


@dataclass(frozen=True)
class FitMetadata(Result):
    """The metadata of a fit to a table.

    Attributes:
        model: its name, one of ``ppl_vae.fitted.names.MODEL_NAMES``.
        table: the name of the file.
        table_digest: the checksum of its content.
        columns: the names of the modelled columns, (D,).
        loc, scale: what columns are shifted and divided by before the model is applied.
        scaling: ``"standardize"`` if each column has a scale of its own, else ``"none"``.
        train_rows, val_rows, held_out_rows: numbers of rows in the table, from 0; validation rows
            decide when a fit with networks stops.
        image_shape: height and width, for rows that are images.
        settings: the settings of the fit, see :class:`~ppl_vae.fitted.settings.FitSettings`.
        versions: the versions of the libraries.
        date: the date of the fit.
        history: the result of the fit; its objective is in the units of the table.
        held_out: the evaluation on the held-out rows; None if there are none.
        notes: caveats.
        index: the name of the column of row names; None if there is none.
        program_digest: a checksum of the program's parameters.
    """

    model: str
    table: str
    table_digest: str
    columns: tuple[str, ...]
    loc: Float[Tensor, " D"]
    scale: Float[Tensor, "*D"]
    scaling: str
    train_rows: tuple[int, ...]
    val_rows: tuple[int, ...]
    held_out_rows: tuple[int, ...]
    image_shape: tuple[int, ...] | None
    settings: dict[str, str]
    versions: dict[str, str]
    date: str
    history: FitResult
    held_out: HeldOut | None
    notes: tuple[str, ...] = field(default=())
    index: str | None = None
    program_digest: str = ""

    @property
    def units(self) -> Units:
        """The units in which the model was fitted."""
        return Units(self.loc, self.scale)
