"""The evaluation of a fitted model on rows that were not fitted."""

import math

import numpy as np
import torch

from ppl_vae.fitted.model import FittedModel, Rows
from ppl_vae.fitted.record import HeldOut

MAX_ROWS = 500
"""The largest number of held-out rows that are evaluated, where log p is estimated."""
DRAWS, REFINE = 1000, 150
"""Draws per row, and steps of the optimization of each row's q before."""


def evaluate_held_out(fitted: FittedModel, values: Rows, seed: int) -> HeldOut | None:
    """The mean of log p over held-out rows, or the reconstruction error where there is none.

    Args:
        fitted: the model.
        values: the held-out rows, each with an observed value.
        seed: of the draws.

    Returns:
        None if there are no such rows.
    """
    if not len(values):
        return None
    if not fitted.has_density:
        return _reconstruction_error(fitted, values)
    estimated = fitted.record is not None and fitted.record.model in ("vae", "iwae")
    scored = values[:MAX_ROWS] if estimated else values
    found = fitted.log_likelihood(scored, draws=DRAWS, refine=REFINE * estimated, seed=seed)
    return HeldOut(
        rows=len(values),
        scored=len(scored),
        measure="log p",
        value=found.mean,
        error=found.mean_error if len(scored) > 1 else math.nan,
        method=found.method,
        share_reliable=found.share_reliable,
    )


def _reconstruction_error(fitted: FittedModel, values: Rows) -> HeldOut:
    errors = (fitted.reconstruct(values) - torch.from_numpy(np.array(values))) / fitted.units.scale
    squares = np.nanmean(errors.square().numpy(), axis=1)
    value = math.sqrt(float(squares.mean()))
    spread = float(squares.std(ddof=1)) if len(squares) > 1 else math.nan
    return HeldOut(
        rows=len(values),
        scored=len(values),
        measure="RMSE",
        value=value,
        error=spread / math.sqrt(len(squares)) / (2 * value) if value else 0.0,
        method="reconstruction",
    )
