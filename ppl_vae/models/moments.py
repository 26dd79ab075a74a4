"""Sufficient statistics of tables for linear-Gaussian models, in float64, in one pass."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.arguments import at_least
from ppl_vae.blocks import Block, RowBlocks, RowSource
from ppl_vae.state import threads

CONSTANT_COLUMNS = "constant columns"
"""How the note on columns that do not vary begins."""
COARSE = 1e-2
"""Numbers further apart than this many standard deviations are too coarse for their column."""


@dataclass(frozen=True)
class Columns:
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

    def merged(self, other: "Columns") -> "Columns":
        """These rows and those together (Chan, Golub, LeVeque 1979: no cancellation)."""
        count = self.count + other.count
        share, gap = other.count / count.clamp(min=1), other.mean - self.mean
        both = (self.count > 0) & (other.count > 0)
        return Columns(
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
        """How many cells are holes."""
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

    def check_rank(self, latent_dim: int) -> None:
        """Check that K is smaller than the largest rank that these many rows and columns allow.

        Raises:
            ValueError: if it is not.
        """
        rank = self.rank()
        if at_least("latent_dim", latent_dim) >= rank:
            raise ValueError(_too_many(latent_dim, f"at most {rank}", self.rows, len(self.count)))

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


class SampleCovariance:
    """Mean and covariance over N (not N - 1) of complete data, without a D x D matrix if D > N.

    Attributes:
        mean: (D,).
        diagonal: of the covariance S, (D,).
        trace: of S, ().
        data_dim: D.
        columns: what each column holds.
    """

    def __init__(self, columns: Columns, factor: Tensor, gram: Tensor | None) -> None:
        self.columns, self._factor, self._gram = columns, factor, gram
        self.mean, self.diagonal = columns.mean, columns.variance
        self.data_dim, self.trace = len(self.mean), self.diagonal.sum()

    @classmethod
    def of(cls, x: RowSource) -> Self:
        """The statistics of the rows of x, one pass.

        Raises:
            ValueError: if x has NaN; and as :class:`~ppl_vae.blocks.RowBlocks`.
        """
        columns, covariance = summarize(RowBlocks(x))
        if covariance is None:
            raise ValueError(missing_message(columns))
        return cls(columns, covariance._factor, covariance._gram)

    def __matmul__(self, other: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        if self._gram is not None:
            return _product(self._gram, other)
        return _product(self._factor.mT, _product(self._factor, other))

    def constant_columns(self) -> list[int]:
        """Which columns do not vary."""
        return self.columns.constant_columns()

    def eigh(self) -> tuple[Float[Tensor, " R"], Float[Tensor, "D R"]]:
        """Eigenvalues, largest first, and eigenvectors of S; R = min(N, D), the rest are zero."""
        if self._gram is not None:
            values, vectors = _eigh(self._gram)
            return values.flip(0).clamp(min=0), vectors.flip(1)
        values, vectors = _eigh(_product(self._factor, self._factor.mT))
        values = values.flip(0).clamp(min=0)
        back = self._factor.mT @ vectors.flip(1)
        return values, back / back.norm(dim=0).clamp(min=torch.finfo(back.dtype).tiny)

    def rank(self) -> int:
        """Of the centred data: how many eigenvalues are more than rounding makes of zero."""
        values, size = self.eigh()[0], max(self.columns.rows, self.data_dim)
        return int((values > values[0] * size * torch.finfo(values.dtype).eps).sum())

    @threads(1)
    def check_rank(self, latent_dim: int) -> None:
        """Check that PPCA with K latent dimensions is not singular on these data.

        Raises:
            ValueError: if K >= the rank of the centred data: the noise would be zero and the
                likelihood infinite.
        """
        at_least("latent_dim", latent_dim)
        rows, size = self.columns.rows, max(self.columns.rows, self.data_dim)
        if self._gram is not None and latent_dim < self.data_dim:
            # With K + 1 orthonormal columns q, l_{K+1} >= the least eigenvalue of q'Sq (Poincare).
            normal = np.random.default_rng(0).normal(size=(self.data_dim, latent_dim + 1))
            q = torch.linalg.qr(torch.from_numpy(normal).to(self._gram)).Q
            least = self.trace * size * torch.finfo(self.mean.dtype).eps
            if torch.linalg.eigvalsh(q.mT @ (self @ q))[0] > least:
                return
        if latent_dim >= (rank := self.rank()):
            raise ValueError(_too_many(latent_dim, str(rank), rows, self.data_dim))


def missing_message(columns: Columns) -> str:
    """What to say where holes cannot be taken."""
    return (
        f"x has {columns.num_missing} missing entries, and this needs complete data; use fit_em, "
        "which takes holes, or impute() them with a model fitted so"
    )


def _too_many(latent_dim: int, rank: str, rows: int, data_dim: int) -> str:
    return (
        f"latent_dim must be smaller than the rank of the centred data, {rank} (x has shape "
        f"{(rows, data_dim)}): the noise would be zero; got {latent_dim}"
    )


# Large products of complete data are numpy's. Idle threads of one library keep turning for a while
# and hold up the other's, so torch, which has the small work, does without.
@threads(1)
def summarize(blocks: RowBlocks) -> tuple[Columns, SampleCovariance | None]:
    """Columns and, if nothing is missing, the covariance of a table; one pass over its blocks."""
    columns, gram, factor, complete = None, None, torch.zeros(0), True
    buffer: Tensor | None = None
    for block in _joined(blocks):
        rows, mean = len(block.values), _mean(block)
        buffer = _centred(block, mean, buffer)
        centred = buffer[:rows]
        complete = complete and block.seen is None
        tall = rows >= len(mean) or gram is not None
        own = _gram(centred) if complete and tall else None
        scatter = centred.square().sum(0) if own is None else own.diagonal().clone()
        found = Columns.of(block, mean, scatter)
        if columns is None:
            columns, gram = found, own
            factor = centred / rows**0.5 if gram is None else factor
            continue
        gap, before = found.mean - columns.mean, columns.rows
        columns = columns.merged(found)
        if own is not None and gram is not None:
            gram.add_(own)
            gram.addr_(gap, gap, alpha=before * rows / (before + rows))
    assert columns is not None
    if not complete:
        return columns, None
    return columns, SampleCovariance(
        columns, factor, None if gram is None else gram.div_(columns.rows)
    )


def _joined(blocks: RowBlocks) -> Iterator[Block]:
    # Blocks of D rows or more, but for the last: fewer rows need no D x D matrix, and many small
    # blocks would each cost one.
    waiting: list[Block] = []
    for block in blocks.read():
        waiting.append(block)
        if sum(len(one.values) for one in waiting) >= block.values.shape[1]:
            yield Block.joined(waiting)
            waiting = []
    if waiting:
        yield Block.joined(waiting)


def _mean(block: Block) -> Float[Tensor, " D"]:
    count = len(block.values) if block.seen is None else block.seen.sum(0).clamp(min=1)
    return block.totals / count


def _centred(
    block: Block, mean: Float[Tensor, " D"], buffer: Float[Tensor, "_ D"] | None
) -> Float[Tensor, "_ D"]:
    # In the memory of the block before, which need not be got anew from the system.
    if buffer is None or len(buffer) < len(block.values):
        buffer = torch.empty_like(block.values)
    centred = torch.sub(block.values, mean, out=buffer[: len(block.values)])
    if block.seen is not None:
        centred *= block.seen
    return buffer


def _gram(x: Float[Tensor, "N D"]) -> Float[Tensor, "D D"]:
    """X'X; numpy knows that it is symmetric and takes half the time."""
    return _product(x.mT, x)


def _product(a: Float[Tensor, "N D"], b: Float[Tensor, "D K"]) -> Float[Tensor, "N K"]:
    if a.device.type != "cpu":
        return a @ b
    return torch.from_numpy(a.numpy() @ b.numpy())


def _eigh(matrix: Float[Tensor, "D D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
    else:
        values, vectors = map(torch.from_numpy, np.linalg.eigh(matrix.numpy()))
    return values, vectors
