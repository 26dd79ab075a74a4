"""Notes on columns of mixed units, for models whose fit depends on the units."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.data.column_stats import LARGEST_RATIO, ColumnStats, may_be_grey_values

MIXED_COLUMNS = "the columns of x have standard deviations from"
"""The beginning of the note on a fit to columns of mixed units."""
ISOTROPIC_ADVICE = (
    "isotropic noise has one variance for all columns, so that the fit depends on their units. "
    "Unless they share one unit, standardise them, or use noise='diagonal' (factor analysis)"
)
"""What the note on a fit with isotropic noise recommends."""
MAX_ROWS_CHECKED = 10_000
"""The largest number of rows, evenly spaced, from which the note is computed."""


def scale_notes(
    x: Float[Tensor, "N D"], mask: Bool[Tensor, "N D"] | None, advice: str
) -> list[str]:
    """A note if the columns' scales differ too much for one step size; empty otherwise.

    They do if their standard deviations differ by more than a factor of ten, or the largest is
    not within 0.1..10, and x does not resemble grey values. At most 10,000 rows are read.

    Args:
        x: the rows of a fit.
        mask: True where observed.
        advice: what the note recommends.
    """
    rows = slice(None, None, -(-len(x) // MAX_ROWS_CHECKED))
    x = x[rows].detach().double()
    x = x if mask is None else torch.where(mask[rows], x, torch.nan)
    mean = x.nanmean(0)
    deviations = (x - mean).square().nanmean(0).sqrt()
    varies = deviations > 1e-10 * mean.abs()  # False for columns without a value, too
    known = x.nan_to_num(nan=0.0)
    if not bool(varies.any()) or may_be_grey_values(known.amin(0), known.amax(0), varies):
        return []
    low, high = float(deviations[varies].min()), float(deviations[varies].max())
    if high <= LARGEST_RATIO * low and 1 / LARGEST_RATIO <= high <= LARGEST_RATIO:
        return []
    return [f"{MIXED_COLUMNS} {low:.3g} to {high:.3g}: {advice}"]


def isotropic_noise_notes(columns: ColumnStats, unit: float = 1.0) -> tuple[str, ...]:
    """A note if one noise variance for all columns is inadequate; empty otherwise.

    It is if the standard deviations of the columns differ by more than a factor of ten, and the
    data do not resemble grey values. A common scale of all columns does not matter.

    Args:
        columns: statistics of the columns of a fit.
        unit: what the data were divided by.
    """
    varies = ~columns.constant & (columns.count > 0)
    if not bool(varies.any()) or may_be_grey_values(columns.low, columns.high, varies):
        return ()
    deviations = columns.variance[varies].sqrt() * unit
    low, high = map(float, deviations.aminmax())
    if high <= LARGEST_RATIO * low:
        return ()
    return (f"{MIXED_COLUMNS} {low:.3g} to {high:.3g}: {ISOTROPIC_ADVICE}",)
