"""What networks are given of x: numbers near zero and of order one, whatever the units of x."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ppl_vae.core.validation import check_option
from ppl_vae.data.column_stats import (
    CONSTANT_COLUMNS,
    LARGEST_RATIO,
    ColumnStats,
    may_be_grey_values,
)
from ppl_vae.data.row_blocks import RowBlock, RowBlocks
from ppl_vae.likelihoods.base import Likelihood

INPUTS = ("auto", "identity", "log1p", "standardized")
LISTED = 10
"""So many columns are named in a note or an error."""
MIXED_COLUMNS = "the columns of x have standard deviations from"
"""How the note on a fit to columns of mixed units begins."""
ROWS_FOR_NOTES = 10_000


class LogCounts(nn.Module):
    """log(1 + x) of counts: an encoder of counts up to thousands would overflow on x itself."""

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """log(1 + x)."""
        return x.log1p()


class Standardization(nn.Module):
    """(x - loc) / scale in each column; of counts (log(1 + x) - loc) / scale.

    It is the identity (of counts the logarithm) until it is told what the columns are like.

    Args:
        data_dim: D.
        log_counts: whether x holds counts.

    Attributes:
        loc, scale: of each column, (D,): buffers, so they are moved, saved and copied with the
            model, and no optimizer changes them.
        constant: columns that could not be standardised, and have scale 1, (D,).
    """

    loc: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]
    constant: Bool[Tensor, " D"]

    def __init__(self, data_dim: int, *, log_counts: bool = False) -> None:
        super().__init__()
        self.log_counts = log_counts
        self.register_buffer("loc", torch.zeros(data_dim))
        self.register_buffer("scale", torch.ones(data_dim))
        self.register_buffer("constant", torch.zeros(data_dim, dtype=torch.bool))

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """The standardised rows."""
        return ((x.log1p() if self.log_counts else x) - self.loc) / self.scale

    def notes(self) -> list[str]:
        """Which columns could not be standardised."""
        constant = self.constant.nonzero().flatten().tolist()
        if not constant:
            return []
        return [f"{CONSTANT_COLUMNS}, which are not standardised: {listed(constant)}"]


def listed(columns: list[int]) -> str:
    """The numbers of some columns for a sentence, of many only the first."""
    more = f", ... ({len(columns)} in all)" if len(columns) > LISTED else ""
    return ", ".join(map(str, columns[:LISTED])) + more


def make_inputs(
    inputs: str, likelihood: Likelihood, data_dim: int | None = None
) -> tuple[str, nn.Module | None]:
    """What stands between x and an encoder, and its name with ``"auto"`` resolved.

    =================  =============================================================
    ``"auto"``         ``"log1p"`` for likelihoods of counts, else ``"identity"``
    ``"identity"``     x itself
    ``"log1p"``        log(1 + x)
    ``"standardized"``  a :class:`Standardization`, which data have to fill
    =================  =============================================================

    Args:
        inputs: one of these.
        likelihood: of x.
        data_dim: D; without it nothing can be standardised.

    Raises:
        ValueError: if ``inputs`` is none of these.
    """
    check_option("inputs", inputs, INPUTS if data_dim else INPUTS[:-1])
    if inputs == "auto":
        inputs = "log1p" if likelihood.counts else "identity"
    if inputs == "standardized" and data_dim:
        return inputs, Standardization(data_dim, log_counts=likelihood.counts)
    return inputs, LogCounts() if inputs == "log1p" else None


def scale_notes(
    x: Float[Tensor, "N D"], mask: Bool[Tensor, "N D"] | None, advice: str
) -> list[str]:
    """A note if columns are of such scales that one step size cannot suit them all; else nothing.

    They are if their standard deviations differ by more than ten times, or the largest is not
    within 0.1..10, and x does not look like grey values. At most 10,000 rows are read.

    Args:
        x: the rows of a fit.
        mask: True where observed.
        advice: what would help.
    """
    rows = slice(None, None, -(-len(x) // ROWS_FOR_NOTES))
    x = x[rows].detach().double()
    x = x if mask is None else torch.where(mask[rows], x, torch.nan)
    mean = x.nanmean(0)
    deviations = (x - mean).square().nanmean(0).sqrt()
    varies = deviations > 1e-10 * mean.abs()  # False for columns without a value, too
    if not bool(varies.any()) or may_be_grey_values(x, varies):
        return []
    low, high = float(deviations[varies].min()), float(deviations[varies].max())
    if high <= LARGEST_RATIO * low and 1 / LARGEST_RATIO <= high <= LARGEST_RATIO:
        return []
    return [f"{MIXED_COLUMNS} {low:.3g} to {high:.3g}: {advice}"]


@dataclass(frozen=True)
class Start:
    """Where training begins on a table: what its columns are like, from one pass over its rows.

    Attributes:
        columns: of x.
        inputs: of what an encoder is given: of x, or of log(1 + x) for counts.
        means: of the likelihood's features, (E,).
        half: half an entry's share in each of them, (E,).
    """

    columns: ColumnStats
    inputs: ColumnStats
    means: Float[Tensor, " E"]
    half: Float[Tensor, " E"]

    @classmethod
    def of(cls, blocks: RowBlocks, likelihood: Likelihood) -> Self:
        """Read a table for a model with this likelihood.

        Raises:
            ValueError: if something observed is not in the likelihood's support; if a row or a
                column has nothing observed.
        """
        found: tuple[ColumnStats, ColumnStats] | None = None
        totals = counts = torch.zeros(())
        for block in blocks.read():
            likelihood.check(block.values, block.observed)
            new = _columns(block), _columns(_changed(block, torch.log1p, likelihood.counts))
            found = new if found is None else (found[0].merge(new[0]), found[1].merge(new[1]))
            features = _changed(block, likelihood.features)
            totals = totals.to(features.totals) + features.totals
            counts = counts.to(features.totals) + _count(features)
        assert found is not None
        start = cls(*found, totals / counts, 0.5 / counts)
        if bool((found[0].count > 0).all()):
            start.scales(found[0], torch.float64)
        found[0].check()
        return start

    def scales(self, columns: ColumnStats, dtype: torch.dtype) -> Float[Tensor, " D"]:
        """The standard deviation of each column, 1 for a constant one.

        Raises:
            ValueError: if the dtype cannot hold one.
        """
        scale = torch.where(columns.constant, 1.0, columns.variance.sqrt())
        held = scale.to(dtype)
        if wrong := (~(held.isfinite() & (held > 0))).nonzero().flatten().tolist():
            raise ValueError(
                f"the standard deviations of columns {wrong[:5]} of x are outside of what "
                f"{dtype} can hold; give the columns in other units, or x in float64"
            )
        return held


def _columns(block: RowBlock) -> ColumnStats:
    count = _count(block).clamp(min=1)
    mean = block.totals / count
    centred = block.values - mean
    if block.observed is not None:
        centred = centred * block.observed
    return ColumnStats.from_block(block, mean, centred.square().sum(0))


def _count(block: RowBlock) -> Float[Tensor, " D"]:
    if block.observed is None:
        return torch.full_like(block.totals, len(block.values))
    return block.observed.sum(0).to(block.totals)


def _changed(block: RowBlock, change: Callable[[Tensor], Tensor], wanted: bool = True) -> RowBlock:
    if not wanted:
        return block
    values, seen = change(block.values), block.observed
    if seen is not None:
        seen = seen.repeat_interleave(values.shape[1] // seen.shape[1], 1)
        values = torch.where(seen, values, 0.0)
    return RowBlock(values, seen, values.sum(0), block.resolution)
