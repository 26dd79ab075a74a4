"""Standardization of encoder inputs, and the statistics that initialize a VAE."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ppl_vae.core.validation import check_option
from ppl_vae.data.column_stats import CONSTANT_COLUMNS, ColumnStats
from ppl_vae.data.sources.row_blocks import RowBlock, RowBlocks
from ppl_vae.likelihoods.base import Likelihood

INPUTS = ("auto", "identity", "log1p", "standardized")
MAX_COLUMNS_LISTED = 10
"""The largest number of columns that a note names."""


class LogCounts(nn.Module):
    """log(1 + x) of counts: an encoder of counts in the thousands would overflow on x itself."""

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """log(1 + x)."""
        return x.log1p()


class Standardization(nn.Module):
    """(x - loc) / scale in each column; for counts (log(1 + x) - loc) / scale.

    It is the identity (for counts the logarithm) until ``loc`` and ``scale`` are set from data.

    Args:
        data_dim: D.
        log_counts: whether x holds counts.

    Attributes:
        loc, scale: the location and the scale of each column, (D,); buffers, so they are moved,
            saved and copied with the model, and no optimizer changes them.
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
        """A note on columns that could not be standardised; empty if there are none."""
        constant = self.constant.nonzero().flatten().tolist()
        if not constant:
            return []
        return [f"{CONSTANT_COLUMNS}, which are not standardised: {_format_columns(constant)}"]


def _format_columns(columns: list[int]) -> str:
    shown = ", ".join(map(str, columns[:MAX_COLUMNS_LISTED]))
    if len(columns) > MAX_COLUMNS_LISTED:
        return f"{shown}, ... ({len(columns)} in all)"
    return shown


def encoder_inputs(
    inputs: str, likelihood: Likelihood, data_dim: int | None = None
) -> nn.Module | None:
    """The transformation between x and an encoder; None for the identity.

    =================  =============================================================
    ``"auto"``         ``"log1p"`` for likelihoods of counts, else ``"identity"``
    ``"identity"``     x itself
    ``"log1p"``        log(1 + x)
    ``"standardized"``  a :class:`Standardization`, whose buffers are set from data
    =================  =============================================================

    Args:
        inputs: one of these.
        likelihood: the likelihood of x.
        data_dim: D; without it ``"standardized"`` is not an option.

    Raises:
        ValueError: if ``inputs`` is none of these.
    """
    check_option("inputs", inputs, INPUTS if data_dim else INPUTS[:-1])
    if inputs == "standardized" and data_dim:
        return Standardization(data_dim, log_counts=likelihood.counts)
    if inputs == "log1p" or (inputs == "auto" and likelihood.counts):
        return LogCounts()
    return None


@dataclass(frozen=True)
class InitialStatistics:
    """Statistics of a table from which training starts, computed in one pass over its rows.

    Attributes:
        columns: the columns of x.
        inputs: the statistics of the encoder's inputs, which are x, or log(1 + x) for counts.
        means: the means of the likelihood's features, (E,).
        half: half an entry's share in each of these means, (E,).
    """

    columns: ColumnStats
    inputs: ColumnStats
    means: Float[Tensor, " E"]
    half: Float[Tensor, " E"]

    @classmethod
    def of(cls, blocks: RowBlocks, likelihood: Likelihood) -> Self:
        """The statistics of a table for a model with this likelihood.

        Raises:
            ValueError: if an observed entry is not in the likelihood's support; if a row or a
                column has nothing observed.
        """
        found: tuple[ColumnStats, ColumnStats] | None = None
        totals = counts = torch.zeros(())
        for block in blocks.read():
            likelihood.check(block.values, block.observed)
            inputs = _mapped(block, torch.log1p) if likelihood.counts else block
            new = _column_stats(block), _column_stats(inputs)
            found = new if found is None else (found[0].merge(new[0]), found[1].merge(new[1]))
            features = _mapped(block, likelihood.features)
            totals = totals.to(features.totals) + features.totals
            counts = counts.to(features.totals) + _count(features)
        assert found is not None
        statistics = cls(*found, totals / counts, 0.5 / counts)
        if bool((found[0].count > 0).all()):
            statistics.scales(found[0], torch.float64)
        found[0].check()
        return statistics

    def scales(self, columns: ColumnStats, dtype: torch.dtype) -> Float[Tensor, " D"]:
        """The standard deviation of each column, 1 for a constant one.

        Raises:
            ValueError: if the dtype cannot represent one.
        """
        scale = torch.where(columns.constant, 1.0, columns.variance.sqrt())
        converted = scale.to(dtype)
        valid = converted.isfinite() & (converted > 0)
        if wrong := (~valid).nonzero().flatten().tolist():
            raise ValueError(
                f"the standard deviations of columns {wrong[:5]} of x are outside the range of "
                f"{dtype}; give the columns in other units, or x in float64"
            )
        return converted


def _column_stats(block: RowBlock) -> ColumnStats:
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


def _mapped(block: RowBlock, function: Callable[[Tensor], Tensor]) -> RowBlock:
    values, observed = function(block.values), block.observed
    if observed is not None:
        observed = observed.repeat_interleave(values.shape[1] // observed.shape[1], 1)
        values = torch.where(observed, values, 0.0)
    return RowBlock(values, observed, values.sum(0), block.resolution)
