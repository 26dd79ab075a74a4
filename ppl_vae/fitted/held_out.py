"""The evaluation of a fitted model on rows that were not fitted."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from ppl_vae.core.results import Result
from ppl_vae.core.stats import standard_error
from ppl_vae.core.text import counted
from ppl_vae.fitted.metadata import HeldOut, plus_minus
from ppl_vae.fitted.model import FittedModel, RowArray

MAX_ROWS = 500
"""The largest number of held-out rows that are evaluated, where log p is estimated."""
NUM_SAMPLES, REFINE = 1000, 150
"""Draws per row, and steps of the optimization of each row's q before."""


@dataclass(frozen=True)
class ReconstructionError(Result):
    """The root mean square error of the reconstructions of rows.

    The mean is over the observed values of a row, and then over rows.

    Attributes:
        value: the error.
        error: its standard error over rows; NaN for a single row.
        rows: their number.
        unit: the unit of both.
    """

    value: float
    error: float
    rows: int
    unit: str

    @classmethod
    def of(cls, fitted: FittedModel, values: RowArray) -> Self:
        """The error of the reconstructions by a model.

        Args:
            fitted: the model.
            values: rows with an observed value each; NaN marks a missing value.
        """
        errors = (fitted.reconstruct(values).numpy() - values) / fitted.units.scale.numpy()
        squares = torch.from_numpy(np.nanmean(errors**2, axis=1))
        value = math.sqrt(float(squares.mean()))
        # The error of a root is that of its square, divided by twice the root.
        spread = float(standard_error(squares)) if len(squares) > 1 else math.nan
        error = spread / (2 * value) if value else 0.0
        return cls(value, error, len(values), fitted.error_unit)

    def held_out(self) -> HeldOut:
        """The error as that of held-out rows."""
        return HeldOut(
            rows=self.rows,
            scored=self.rows,
            measure="RMSE",
            value=self.value,
            error=self.error,
            method="reconstruction",
            unit=self.unit,
        )

    def __str__(self) -> str:
        return (
            f"reconstruction error {self.value:.4g}{plus_minus(self.error)}, root mean square in "
            f"{self.unit}, over {counted(self.rows, 'row')}"
        )


def evaluate_held_out(fitted: FittedModel, values: RowArray, seed: int) -> HeldOut | None:
    """The mean of log p over held-out rows, or the reconstruction error where there is none.

    Args:
        fitted: the model.
        values: the held-out rows, each with an observed value.
        seed: the seed of the draws.

    Returns:
        None if there are no such rows.
    """
    if not len(values):
        return None
    if not fitted.has_density:
        return ReconstructionError.of(fitted, values).held_out()
    estimated = fitted.metadata is not None and fitted.metadata.model in ("vae", "iwae")
    scored = values[:MAX_ROWS] if estimated else values
    found = fitted.log_likelihood(
        scored, num_samples=NUM_SAMPLES, refine=REFINE * estimated, seed=seed
    )
    return HeldOut(
        rows=len(values),
        scored=len(scored),
        measure="log p",
        value=found.mean,
        error=found.mean_error if len(scored) > 1 else math.nan,
        method=found.method,
        share_reliable=found.share_reliable,
    )
