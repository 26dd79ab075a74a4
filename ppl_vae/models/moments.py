"""Sufficient statistics of tables for linear-Gaussian models, in float64, in one pass."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.arguments import at_least
from ppl_vae.blocks import Block, RowBlocks, RowSource
from ppl_vae.state import threads

Leading: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Of a symmetric matrix the K largest eigenvalues (K,), their eigenvectors (D, K), and the sum of
the other eigenvalues ()."""
CONSTANT_COLUMNS = "constant columns"
"""How the note on columns that do not vary begins."""
QR_COST = 1e9
"""Up to so many N D^2 a factor of the scatter matrix is found by QR, which costs little then."""
JACOBI_SIZE = 256
"""Jacobi rotations, which cost more than other methods, find up to so many singular values."""
COARSE_SUM = 1e-6
"""A remainder of less than so much of the largest eigenvalue, per column, has lost its digits."""
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

    def rounding(self) -> float:
        """The largest singular value that rounding of the cells can have, columns of unit variance.

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
    """Mean and covariance S over N (not N - 1) of complete data, and a factor F of it, S = F'F.

    A factor has twice the digits of S: F is the centred data over sqrt(N) if D > N; of tables of
    moderate size it comes from QR decompositions, and S itself is never formed; of large ones it
    is a Cholesky factor of S.

    Attributes:
        mean: (D,).
        diagonal: of S, (D,).
        trace: of S, ().
        data_dim: D.
        columns: what each column holds.
    """

    def __init__(self, columns: Columns, factor: Tensor | None, gram: Tensor | None) -> None:
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
            return product(self._gram, other)
        return product(self.factor.mT, product(self.factor, other))

    @property
    def factor(self) -> Float[Tensor, "R D"]:
        """F, R = min(N, D)."""
        if self._factor is None:
            assert self._gram is not None
            self._factor = _factor_of(self._gram)
        return self._factor

    def constant_columns(self) -> list[int]:
        """Which columns do not vary."""
        return self.columns.constant_columns()

    def eigh(self) -> tuple[Float[Tensor, " R"], Float[Tensor, "D R"]]:
        """Eigenvalues, largest first, and eigenvectors of S; R = min(N, D), the rest are zero."""
        if self._gram is not None:
            values, vectors = _eigh(self._gram)
            return values.flip(0).clamp(min=0), vectors.flip(1)
        values, vectors = right_singular(self.factor)
        return values.square(), vectors

    def leading(self, number: int, scale: Float[Tensor, " D"]) -> Leading:
        """The largest eigenvalues of S with its columns in units of ``scale``, see :data:`Leading`.

        Of a large table from S itself, unless its rounding could be seen in what they leave.
        """
        if self._gram is not None and self.data_dim > JACOBI_SIZE and number < self.data_dim:
            from scipy.linalg import eigh

            whitened = (self._gram / torch.outer(scale, scale)).cpu().numpy()
            first = self.data_dim - number
            values, axes = eigh(whitened, subset_by_index=[first, self.data_dim - 1])
            rest = whitened.trace() - values.sum()
            if rest > COARSE_SUM * len(scale) * values[-1]:
                found = (torch.from_numpy(v).to(scale) for v in (values[::-1], axes[:, ::-1]))
                values, axes = found
                return values, axes, torch.as_tensor(rest).to(scale)
        return split_leading(*right_singular(self.factor / scale), number)

    def rank(self) -> int:
        """Of the centred data, each column in its own units: what is not rounding of its cells."""
        deviation = self.diagonal.sqrt()
        varying = ~self.columns.constant
        factor = self.factor[:, varying] / deviation[varying]
        if not factor.numel():
            return 0
        values = torch.linalg.svdvals(factor)
        size = max(self.columns.rows, self.data_dim)
        least = float(values[0]) * size * torch.finfo(values.dtype).eps
        if self._gram is not None:  # S has half of the digits
            least = float(values[0]) * (size * torch.finfo(values.dtype).eps) ** 0.5
        return int((values > max(least, self.columns.rounding())).sum())

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
    columns, scatter = None, _Scatter()
    buffer: Tensor | None = None
    for block in _joined(blocks):
        mean = _mean(block)
        buffer = _centred(block, mean, buffer)
        centred = buffer[: len(block.values)]
        squares = centred.square().sum(0)
        if block.seen is not None:
            scatter.complete = False
        found = Columns.of(block, mean, squares)
        if columns is None:
            columns = found
            scatter.add(centred)
            continue
        weight = columns.rows * found.rows / (columns.rows + found.rows)
        scatter.add(centred, (found.mean - columns.mean) * weight**0.5)
        columns = columns.merged(found)
    assert columns is not None
    return columns, scatter.covariance(columns) if scatter.complete else None


class _Scatter:
    """The scatter matrix of centred blocks as they come, or a factor of it.

    A factor, by QR, as long as that costs little; the matrix from then on.
    """

    def __init__(self) -> None:
        self.complete, self.rows = True, 0
        self.factor: Tensor | None = None
        self.gram: Tensor | None = None

    def add(self, centred: Float[Tensor, "B D"], gap: Tensor | None = None) -> None:
        """Add a block of rows, and the row that its mean's distance from the others' makes."""
        if not self.complete:
            return
        self.rows += len(centred)
        if self.gram is None and self.rows * centred.shape[1] ** 2 <= QR_COST:
            parts = [self.factor, centred, None if gap is None else gap[None]]
            rows = torch.cat([part for part in parts if part is not None])
            short = len(rows) <= rows.shape[1]
            self.factor = rows.clone() if short else torch.linalg.qr(rows, mode="r").R
            return
        if self.gram is None and self.rows < centred.shape[1]:  # no D x D matrix
            parts = [self.factor, centred, None if gap is None else gap[None]]
            self.factor = torch.cat([part for part in parts if part is not None])
            return
        own = _gram(centred)
        if gap is not None:
            own.addr_(gap, gap)
        for part in (self.gram, None if self.factor is None else _gram(self.factor)):
            own = own if part is None else own.add_(part)
        self.factor, self.gram = None, own

    def covariance(self, columns: Columns) -> SampleCovariance:
        """Of all rows."""
        factor = None if self.factor is None else self.factor / columns.rows**0.5
        gram = None if self.gram is None else self.gram.div_(columns.rows)
        return SampleCovariance(columns, factor, gram)


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
    return product(x.mT, x)


def product(a: Float[Tensor, "N D"], b: Float[Tensor, "D K"]) -> Float[Tensor, "N K"]:
    """A matrix product, on a CPU by numpy."""
    if a.device.type != "cpu":
        return a @ b
    return torch.from_numpy(a.numpy() @ b.numpy())


def _eigh(matrix: Float[Tensor, "D D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
    else:
        values, vectors = map(torch.from_numpy, np.linalg.eigh(matrix.numpy()))
    return values, vectors


def _factor_of(gram: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    # With the columns in units of their own, so that small ones keep their digits.
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    correlation = gram / torch.outer(scale, scale)
    upper, failed = torch.linalg.cholesky_ex(correlation, upper=True)
    if int(failed):
        values, vectors = _eigh(correlation)
        upper = values.clamp(min=0).sqrt()[:, None] * vectors.mT
    return upper * scale


def split_leading(
    singular: Float[Tensor, " Q"], axes: Float[Tensor, "D Q"], number: int
) -> Leading:
    """Singular values and vectors as eigenvalues: the first so many, and the sum of the others."""
    values = singular.square()
    lacking = max(0, number - len(values))
    kept = torch.nn.functional.pad(values[:number], (0, lacking))
    vectors = torch.nn.functional.pad(axes[:, :number], (0, lacking))
    return kept, vectors, values[number:].sum()


def right_singular(factor: Float[Tensor, "R D"]) -> tuple[Float[Tensor, " Q"], Float[Tensor, "D Q"]]:
    """Singular values, largest first, and right singular vectors; Q = min(R, D).

    By preconditioned one-sided Jacobi rotations where that is quick enough: of columns of
    different units it finds small singular values, and small entries of vectors, to as many
    digits as large ones.

    References:
        Drmac, Veselic: New fast and accurate Jacobi SVD algorithm (2008), of LAPACK's dgejsv.
    """
    if min(factor.shape) > JACOBI_SIZE:
        _, values, vectors = torch.linalg.svd(factor, full_matrices=False)
        return values, vectors.mT
    from scipy.linalg.lapack import dgejsv

    matrix, wide = factor.cpu().numpy(), factor.shape[0] < factor.shape[1]
    values, left, right, scaling, _, failed = dgejsv(matrix.T if wide else matrix, joba=1)
    if failed:
        raise FloatingPointError(f"LAPACK's dgejsv did not converge (info={failed})")
    values = values * (scaling[0] / scaling[1])
    vectors = left if wide else right
    return torch.from_numpy(values).to(factor), torch.from_numpy(vectors).to(factor)
