"""What each column of a table holds, in float64, in one pass."""

import warnings
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.validation import check_int
from ppl_vae.data.row_blocks import Block

CONSTANT_COLUMNS = "constant columns"
"""How the note on columns that do not vary begins."""
COARSE = 1e-2
"""Numbers further apart than this many standard deviations are too coarse for their column."""


@dataclass(frozen=True)
class ColumnStats:
    """What each column holds where it was observed; blocks of rows are merged pairwise.

    Attributes:
        rows: N.
        count: observed cells, (D,).
        mean: of these, (D,).
        scatter: the sum of their squared deviations from the mean, (D,).
        first: one of them, (D,).
        constant: whether they are all the same, (D,); by comparison, as rounding gives a constant
            column a variance.
        resolution: the relative spacing of the numbers as they came.
    """

    rows: int
    count: Float[Tensor, " D"]
    mean: Float[Tensor, " D"]
    scatter: Float[Tensor, " D"]
    first: Float[Tensor, " D"]
    constant: Bool[Tensor, " D"]
    resolution: float

    @classmethod
    def of(cls, block: Block, mean: Tensor, scatter: Tensor) -> Self:
        """The columns of a block, of given observed means and scatters."""
        count, first = torch.full_like(mean, len(block.values)), block.values[0]
        if block.seen is not None:
            count = block.seen.sum(0).to(mean)
            first = block.values[block.seen.int().argmax(0), range(len(mean))]
        constant = scatter <= count * (1e-10 * mean).square()  # only these need to be looked at
        same = block.values[:, constant] == first[constant]
        if block.seen is not None:
            same |= ~block.seen[:, constant]
        constant[constant.clone()] = same.all(0)
        return cls(len(block.values), count, mean, scatter, first, constant, block.resolution)

    def merged(self, other: "ColumnStats") -> "ColumnStats":
        """These rows and those together (Chan, Golub, LeVeque 1979: no cancellation)."""
        count = self.count + other.count
        share, gap = other.count / count.clamp(min=1), other.mean - self.mean
        both = (self.count > 0) & (other.count > 0)
        return ColumnStats(
            rows=self.rows + other.rows,
            count=count,
            mean=self.mean + gap * share,
            scatter=self.scatter + other.scatter + gap.square() * self.count * share,
            first=torch.where(self.count > 0, self.first, other.first),
            constant=self.constant & other.constant & (~both | (self.first == other.first)),
            resolution=max(self.resolution, other.resolution),
        )

    @property
    def variance(self) -> Float[Tensor, " D"]:
        """Of the observed cells, over their number."""
        return self.scatter / self.count

    @property
    def centre(self) -> Float[Tensor, " D"]:
        """The mean; of a constant column its value, which rounding would miss."""
        return torch.where(self.constant, self.first, self.mean)

    @property
    def num_missing(self) -> int:
        """How many cells are missing values."""
        return int(self.rows * len(self.count) - self.count.sum())

    def constant_columns(self) -> list[int]:
        """Which columns do not vary."""
        return self.constant.nonzero().flatten().tolist()

    def notes(self) -> tuple[str, ...]:
        """What a person should know of the columns."""
        constant = ", ".join(map(str, self.constant_columns()))
        return (f"{CONSTANT_COLUMNS}: {constant}",) if constant else ()

    def check(self, *, diagonal: bool = False, resolution: float = 0.0) -> None:
        """Check that each column can be modelled.

        Args:
            diagonal: whether each column is to have a noise variance of its own.
            resolution: the relative spacing of the model's numbers.

        Warns:
            UserWarning: if the numbers (the data's or the model's) are too coarse for a column.

        Raises:
            ValueError: if a column has nothing observed; if one with a noise variance of its own
                is constant.
        """
        if empty := (self.count == 0).nonzero().flatten().tolist():
            raise ValueError(f"x has columns with nothing observed: {empty[:5]}; drop them")
        if diagonal and (constant := self.constant_columns()):
            raise ValueError(
                f"x has constant columns: {constant[:5]}; with a noise variance of their own "
                "theirs would be zero. Drop them, or take noise='isotropic'"
            )
        self._check_resolution(max(self.resolution, resolution))

    def rank(self) -> int:
        """The largest rank of the centred data that so many rows and columns allow."""
        return max(0, min(len(self.count), self.rows - 1))

    def rounding(self) -> float:
        """The largest singular value that rounding of cells can have, columns of unit variance.

        A cell is rounded by up to half of the spacing of numbers around it.
        """
        varying = ~self.constant
        share = (self.mean.abs() / self.variance.sqrt())[varying] + 1
        return float(share.max()) * self.resolution * (1 + (len(share) / self.rows) ** 0.5) / 2

    def check_rank(self, latent_dim: int) -> None:
        """Check that K is smaller than the largest rank that these many rows and columns allow.

        Raises:
            ValueError: if it is not.
        """
        rank = self.rank()
        if check_int("latent_dim", latent_dim) >= rank:
            raise ValueError(too_many(latent_dim, f"at most {rank}", self.rows, len(self.count)))

    def _check_resolution(self, resolution: float) -> None:
        deviation = self.variance.sqrt()
        spacing = resolution * self.mean.abs()
        coarse = (spacing > COARSE * deviation) & ~self.constant
        if coarse.any():
            worst = int((spacing / deviation).where(coarse, 0).argmax())
            warnings.warn(
                f"column {worst} has mean {float(self.mean[worst]):.3g} and standard deviation "
                f"{float(deviation[worst]):.3g}, where the numbers of x or of the model are "
                f"{float(spacing[worst]):.2g} apart; give x and model in float64, or subtract a "
                f"constant from the column ({int(coarse.sum())} such columns)",
                stacklevel=4,
            )


def too_many(latent_dim: int, rank: str, rows: int, data_dim: int) -> str:
    """What to say of a K that is not smaller than the rank."""
    return (
        f"latent_dim must be smaller than the rank of the centred data, {rank} (x has shape "
        f"{(rows, data_dim)}): the noise would be zero; got {latent_dim}"
    )
