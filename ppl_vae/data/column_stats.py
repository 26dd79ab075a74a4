"""Statistics of the columns of a table, in float64, from one pass over its rows."""

import warnings
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.validation import check_int
from ppl_vae.data.sources.row_blocks import RowBlock

CONSTANT_COLUMNS = "constant columns"
"""First words of the note on columns that do not vary."""
COARSE_SPACING = 1e-2
"""Spacing of floating-point numbers, in standard deviations of a column, above which it warns."""
LARGEST_RATIO = 10.0
"""Ratio of the standard deviations of columns above which they are considered in mixed units."""


@dataclass(frozen=True)
class ColumnMoments:
    """Moments of the observed entries of each column.

    Attributes:
        count: number of observed entries, (D,).
        mean: their mean, (D,).
        scatter: their sum of squared deviations from the mean, (D,).
    """

    count: Float[Tensor, " D"]
    mean: Float[Tensor, " D"]
    scatter: Float[Tensor, " D"]

    @property
    def variance(self) -> Float[Tensor, " D"]:
        """Variances of the observed entries, normalised by their number, (D,)."""
        return self.scatter / self.count

    def _merged_moments(self, other: "ColumnMoments") -> tuple[Tensor, Tensor, Tensor]:
        # Chan, Golub, LeVeque (1979): no cancellation.
        count = self.count + other.count
        share, gap = other.count / count.clamp(min=1), other.mean - self.mean
        scatter = self.scatter + other.scatter + gap.square() * self.count * share
        return count, self.mean + gap * share, scatter


@dataclass(frozen=True)
class ColumnStats(ColumnMoments):
    """Statistics of the observed entries of each column; those of blocks are merged pairwise.

    Attributes:
        count, mean, scatter: their moments, see :class:`ColumnMoments`.
        rows: N.
        first: one of them, (D,).
        constant: whether they are all equal, (D,); found by comparison, since rounding gives a
            constant column a variance.
        low, high: the smallest and the largest of zero and the observed entries, (D,).
        resolution: machine epsilon of the dtype in which the data were given.
    """

    rows: int
    first: Float[Tensor, " D"]
    constant: Bool[Tensor, " D"]
    low: Float[Tensor, " D"]
    high: Float[Tensor, " D"]
    resolution: float

    @classmethod
    def from_block(
        cls,
        block: RowBlock,
        mean: Tensor,
        scatter: Tensor,
        ends: tuple[Tensor, Tensor] | None = None,
    ) -> Self:
        """Statistics of a block.

        Args:
            block: the rows.
            mean, scatter: means and scatters of the observed entries, (D,).
            ends: the smallest and the largest values, (D,), if they are known.
        """
        count, first = torch.full_like(mean, len(block.values)), block.values[0]
        if block.observed is not None:
            count = block.observed.sum(0).to(mean)
            first = block.values[block.observed.int().argmax(0), range(len(mean))]
        constant = scatter <= count * (1e-10 * mean).square()  # candidates for a comparison
        same = block.values[:, constant] == first[constant]
        if block.observed is not None:
            same |= ~block.observed[:, constant]
        constant[constant.clone()] = same.all(0)
        low, high = ends or (block.values.amin(0), block.values.amax(0))
        low, high = low.clamp(max=0), high.clamp(min=0)
        rows = len(block.values)
        return cls(count, mean, scatter, rows, first, constant, low, high, block.resolution)

    def merge(self, other: "ColumnStats") -> "ColumnStats":
        """Statistics of the rows of both."""
        both = (self.count > 0) & (other.count > 0)
        return ColumnStats(
            *self._merged_moments(other),
            rows=self.rows + other.rows,
            first=torch.where(self.count > 0, self.first, other.first),
            constant=self.constant & other.constant & (~both | (self.first == other.first)),
            low=torch.minimum(self.low, other.low),
            high=torch.maximum(self.high, other.high),
            resolution=max(self.resolution, other.resolution),
        )

    @staticmethod
    def over_processes(
        own: "ColumnStats | None", processes: Processes, like: Float[Tensor, " D"]
    ) -> "ColumnStats":
        """Statistics of the rows of all processes.

        Args:
            own: those of this process; None if it has no rows.
            processes: the processes.
            like: a tensor of the same shape, dtype and device.

        Raises:
            ValueError: if no process has rows.
        """
        moments, numbers = like.new_zeros(7, len(like)), like.new_zeros(1, 2)
        if own is not None:
            parts = (own.count, own.mean, own.scatter, own.first, own.constant.to(like))
            moments = torch.stack([*parts, own.low, own.high])
            numbers[0, 0], numbers[0, 1] = own.rows, own.resolution
        parts, numbers = processes.gather(moments), processes.gather_rows(numbers)
        found: ColumnStats | None = None
        for part, rows in zip(parts, numbers[:, 0], strict=True):
            if not int(rows):
                continue
            count, mean, scatter, first, constant, low, high = part
            new = ColumnStats(
                count,
                mean,
                scatter,
                int(rows),
                first,
                constant.bool(),
                low,
                high,
                float(numbers[:, 1].max()),
            )
            found = new if found is None else found.merge(new)
        if found is None:
            raise ValueError("x has no observed value in any row of any process")
        return found

    @property
    def centre(self) -> Float[Tensor, " D"]:
        """Means, (D,); the exact value of a constant column, which its mean may miss by
        rounding."""
        return torch.where(self.constant, self.first, self.mean)

    @property
    def num_missing(self) -> int:
        """The number of missing values."""
        return int(self.rows * len(self.count) - self.count.sum())

    def constant_columns(self) -> list[int]:
        """Indices of the columns that do not vary."""
        return self.constant.nonzero().flatten().tolist()

    def notes(self) -> tuple[str, ...]:
        """Notes on constant columns for reports."""
        constant = ", ".join(map(str, self.constant_columns()))
        return (f"{CONSTANT_COLUMNS}: {constant}",) if constant else ()

    def check(self, *, diagonal: bool = False, resolution: float = 0.0) -> None:
        """Check that each column can be modelled.

        Args:
            diagonal: whether the model has one noise variance per column.
            resolution: machine epsilon of the model's dtype.

        Warns:
            UserWarning: if the dtype of the data or of the model is too coarse for a column.

        Raises:
            ValueError: if a column has no observed values; if it is constant and has its own
                noise variance.
        """
        if empty := (self.count == 0).nonzero().flatten().tolist():
            raise ValueError(f"x has columns with nothing observed: {empty[:5]}; drop them")
        if diagonal and (constant := self.constant_columns()):
            raise ValueError(
                f"x has constant columns: {constant[:5]}; their noise variances would be zero. "
                "Drop them, or use noise='isotropic'"
            )
        self._check_resolution(max(self.resolution, resolution))

    def rank(self) -> int:
        """The largest possible rank of the centred data, min(D, N - 1) with D varying columns."""
        return max(0, min(int((~self.constant).sum()), self.rows - 1))

    def rounding(self) -> float:
        """Bound on the singular values of rounding errors, for columns scaled to unit variance.

        An entry is rounded by at most half the spacing of floating-point numbers around it.
        """
        varying = ~self.constant
        share = (self.mean.abs() / self.variance.sqrt())[varying] + 1
        return float(share.max()) * self.resolution * (1 + (len(share) / self.rows) ** 0.5) / 2

    def check_rank(self, latent_dim: int) -> None:
        """Check that K is smaller than the largest possible rank of the centred data.

        Raises:
            ValueError: if it is not.
        """
        rank = self.rank()
        if check_int("latent_dim", latent_dim) >= rank:
            raise ValueError(
                rank_message(latent_dim, f"at most {rank}", self.rows, len(self.count))
            )

    def _check_resolution(self, resolution: float) -> None:
        deviation = self.variance.sqrt()
        spacing = resolution * self.mean.abs()
        coarse = (spacing > COARSE_SPACING * deviation) & ~self.constant
        if coarse.any():
            worst = int((spacing / deviation).where(coarse, 0).argmax())
            warnings.warn(
                f"column {worst} has mean {float(self.mean[worst]):.3g} and standard deviation "
                f"{float(deviation[worst]):.3g}, where the floating-point numbers "
                f"of x or of the model are {float(spacing[worst]):.2g} apart; give x and model in "
                f"float64, or subtract a constant from the column ({int(coarse.sum())} such "
                "columns)",
                stacklevel=4,
            )


def may_be_grey_values(
    low: Float[Tensor, " D"], high: Float[Tensor, " D"], varies: Bool[Tensor, " D"]
) -> bool:
    """Whether data may be grey values, which share one unit even if their columns vary
    differently.

    All values lie in 0..1, and at least half of the varying columns exceed one half somewhere.

    Args:
        low, high: the smallest and the largest value of each column.
        varies: which columns are not constant.
    """
    if bool(((low < 0) | (high > 1)).any()):
        return False
    return bool((high[varies] > 0.5).double().mean() >= 0.5)


def rank_message(latent_dim: int, rank: str, rows: int, data_dim: int) -> str:
    """The error message for a K that is not smaller than the rank."""
    return (
        f"latent_dim must be smaller than the rank of the centred data, {rank} (x has shape "
        f"{(rows, data_dim)}): the noise would be zero; got {latent_dim}"
    )
