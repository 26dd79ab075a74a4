"""Sufficient statistics of tables for linear-Gaussian models, in float64, in one pass."""

from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.state import threads
from ppl_vae.core.validation import check_int
from ppl_vae.data.column_stats import ColumnStats, rank_message
from ppl_vae.data.sources.row_blocks import RowBlock, RowBlocks, RowSource
from ppl_vae.data.sources.row_pieces import centre
from ppl_vae.models.linear.eigen import (
    MAX_JACOBI_SIZE,
    LeadingEigenpairs,
    gram_factor,
    gram_matrix,
    leading_eigenpairs,
    product,
    right_singular_vectors,
    symmetric_eigen,
    triangular_factor,
)

MAX_QR_COST = 1e9
"""The largest N D^2 for which a factor of the scatter matrix is computed by QR decompositions."""
MIN_RELATIVE_REMAINDER = 1e-6
"""The smallest sum of remaining eigenvalues, relative to the largest eigenvalue and per column,
that is accurate when computed as a difference."""


class SampleCovariance:
    """Mean and covariance S over N (not N - 1) of complete data, and a factor F of it, S = F'F.

    A factor has twice the relative precision of S. F is the centred data over sqrt(N) if D > N;
    for tables of moderate size it comes from QR decompositions, and S itself is never formed; for
    large ones it is a Cholesky factor of S.

    Attributes:
        mean: (D,).
        diagonal: the diagonal of S, (D,).
        trace: the trace of S, ().
        data_dim: D.
        columns: statistics of each column.
    """

    def __init__(self, columns: ColumnStats, factor: Tensor | None, gram: Tensor | None) -> None:
        self.columns, self._factor, self._gram = columns, factor, gram
        self.mean, self.diagonal = columns.mean, columns.variance
        self.data_dim, self.trace = len(self.mean), self.diagonal.sum()

    @classmethod
    def of(cls, x: RowSource) -> Self:
        """The statistics of the rows of x, in one pass.

        Raises:
            ValueError: if x has NaN; see also :class:`~ppl_vae.data.sources.row_blocks.RowBlocks`.
        """
        columns, covariance = summarize_table(x if isinstance(x, RowBlocks) else RowBlocks(x))
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
            self._factor = gram_factor(self._gram)
        return self._factor

    def constant_columns(self) -> list[int]:
        """Which columns do not vary."""
        return self.columns.constant_columns()

    def eigh(self) -> tuple[Float[Tensor, " R"], Float[Tensor, "D R"]]:
        """Eigenvalues, largest first, and eigenvectors of S; R = min(N, D), all others are
        zero."""
        if self._gram is not None:
            values, vectors = symmetric_eigen(self._gram)
            return values.flip(0).clamp(min=0), vectors.flip(1)
        values, vectors = right_singular_vectors(self.factor)
        return values.square(), vectors

    def leading(self, number: int, scale: Float[Tensor, " D"]) -> LeadingEigenpairs:
        """The leading eigenpairs of S with its columns in units of ``scale``.

        For a large table they are computed from S itself, unless its rounding error would be
        noticeable in the sum of the remaining eigenvalues.
        """
        if self._gram is not None and self.data_dim > MAX_JACOBI_SIZE and number < self.data_dim:
            from scipy.linalg import eigh

            whitened = (self._gram / torch.outer(scale, scale)).cpu().numpy()
            first = self.data_dim - number
            values, axes = eigh(whitened, subset_by_index=[first, self.data_dim - 1])
            remainder = whitened.trace() - values.sum()
            if remainder > MIN_RELATIVE_REMAINDER * len(scale) * values[-1]:
                largest_first = values[::-1].copy(), axes[:, ::-1].copy()
                values, axes = (torch.from_numpy(part).to(scale) for part in largest_first)
                return values, axes, torch.as_tensor(remainder).to(scale)
        return leading_eigenpairs(*right_singular_vectors(self.factor / scale), number)

    def rank(self) -> int:
        """The numerical rank of the centred data, columns scaled to unit variance.

        Singular values that rounding of the entries could explain do not count.
        """
        deviation = self.diagonal.sqrt()
        varying = ~self.columns.constant
        factor = self.factor[:, varying] / deviation[varying]
        if not factor.numel():
            return 0
        values = torch.linalg.svdvals(factor)
        size = max(self.columns.rows, self.data_dim)
        least = float(values[0]) * size * torch.finfo(values.dtype).eps
        if self._gram is not None:  # S has half of the precision
            least = float(values[0]) * (size * torch.finfo(values.dtype).eps) ** 0.5
        return int((values > max(least, self.columns.rounding())).sum())

    @threads(1)
    def check_rank(self, latent_dim: int) -> None:
        """Check that PPCA with K latent dimensions is not singular on these data.

        Raises:
            ValueError: if K >= the rank of the centred data: the noise would be zero and the
                likelihood infinite.
        """
        check_int("latent_dim", latent_dim)
        rows, size = self.columns.rows, max(self.columns.rows, self.data_dim)
        if self._gram is not None and latent_dim < self.data_dim:
            # With K + 1 orthonormal columns q, l_{K+1} >= the least eigenvalue of q'Sq (Poincare).
            normal = np.random.default_rng(0).normal(size=(self.data_dim, latent_dim + 1))
            q = torch.linalg.qr(torch.from_numpy(normal).to(self._gram)).Q
            least = self.trace * size * torch.finfo(self.mean.dtype).eps
            if torch.linalg.eigvalsh(q.mT @ (self @ q))[0] > least:
                return
        if latent_dim >= (rank := self.rank()):
            raise ValueError(rank_message(latent_dim, str(rank), rows, self.data_dim))


def missing_message(columns: ColumnStats) -> str:
    """The error message of methods that need complete data."""
    return (
        f"x has {columns.num_missing} missing entries, and this needs complete data; use fit_em, "
        "which takes missing values, or impute() them with a model fitted by it"
    )


# numpy computes the large products of complete data. Idle threads of one library spin for a while
# and slow down the other's, so torch, which does the small operations, uses one thread.
@threads(1)
def summarize_table(blocks: RowBlocks) -> tuple[ColumnStats, SampleCovariance | None]:
    """Column statistics and, if nothing is missing, the covariance of a table, in one pass.

    If the rows are divided among several processes, both are those of all rows.

    Raises:
        ValueError: as the readings of the table; if processes have different columns or dtypes.
        ProcessError: if the table of another process cannot be read.
    """
    with blocks.processes.together():
        columns, scatter = _summarize_rows(blocks)
    if blocks.processes.size > 1:
        columns, scatter = _over_processes(blocks, columns, scatter)
    assert columns is not None
    return columns, scatter.covariance(columns) if scatter.complete else None


def _summarize_rows(blocks: RowBlocks) -> tuple[ColumnStats | None, "_Scatter"]:
    # The sums run over the rows of this process, which may have none.
    columns, scatter = None, _Scatter(blocks.num_rows)
    buffer: Tensor | None = None
    for block in _joined(blocks):
        mean = _mean(block)
        if buffer is None or len(buffer) < len(block.values):
            buffer = torch.empty_like(block.values)  # the next blocks use it again
        centred = buffer[: len(block.values)]
        ends = centre(block.values, mean, out=centred)
        if block.observed is not None:
            scatter.complete = False
            centred *= block.observed
        rows, gap = len(block.values), None
        if columns is not None:
            gap = (mean - columns.mean) * (columns.rows * rows / (columns.rows + rows)) ** 0.5
        squares = scatter.add(centred, gap)
        found = ColumnStats.from_block(block, mean, squares, ends)
        columns = found if columns is None else columns.merge(found)
    return columns, scatter


def _over_processes(
    blocks: RowBlocks, columns: ColumnStats | None, scatter: "_Scatter"
) -> tuple[ColumnStats, "_Scatter"]:
    processes, width = blocks.processes, blocks.agree()
    unit = blocks.common_unit()
    with processes.together():
        if unit != blocks.unit:
            blocks.use_unit(unit)
            columns, scatter = _summarize_rows(blocks)
    like = torch.zeros(width, dtype=torch.float64, device=blocks.device)
    whole = ColumnStats.over_processes(columns, processes, like)
    gap = like if columns is None else (columns.mean - whole.mean) * columns.rows**0.5
    return whole, scatter.over_processes(processes, whole.rows, gap)


class _Scatter:
    """The scatter matrix of centred blocks, accumulated block by block, or a factor of it.

    It is a factor, by QR, if that costs little; if the number of rows is unknown, as long as it
    costs little, and the matrix from then on.

    Args:
        expected: the number of rows that will be added, if it is known.
    """

    def __init__(self, expected: int | None = None) -> None:
        self.complete, self.rows, self.expected = True, 0, expected or 0
        self.factor: Tensor | None = None
        self.gram: Tensor | None = None

    def add(
        self, centred: Float[Tensor, "B D"], gap: Float[Tensor, " D"] | None
    ) -> Float[Tensor, " D"]:
        """Add a block of rows, and the scaled gap between its mean and that of earlier rows.

        Returns:
            The sums of the squares of the block's columns.
        """
        if not self.complete:
            return centred.square().sum(0)
        self.rows += len(centred)
        largest = max(self.rows, self.expected)
        if self.gram is None and largest * centred.shape[1] ** 2 <= MAX_QR_COST:
            rows = self._stack(centred, gap)
            short = len(rows) <= rows.shape[1]
            self.factor = rows.clone() if short else triangular_factor(rows)
            return centred.square().sum(0)
        if self.gram is None and largest < centred.shape[1]:  # no D x D matrix
            self.factor = self._stack(centred, gap)
            return centred.square().sum(0)
        own = gram_matrix(centred)
        squares = own.diagonal().clone()
        if gap is not None:
            own.addr_(gap, gap)
        for part in (self.gram, None if self.factor is None else gram_matrix(self.factor)):
            own = own if part is None else own.add_(part)
        self.factor, self.gram = None, own
        return squares

    def _stack(self, centred: Tensor, gap: Tensor | None) -> Float[Tensor, "R D"]:
        parts = [self.factor, centred, None if gap is None else gap[None]]
        return torch.cat([part for part in parts if part is not None])

    def over_processes(
        self, processes: Processes, num_rows: int, gap: Float[Tensor, " D"]
    ) -> "_Scatter":
        """The scatter matrix, or a factor of it, of the rows of all processes.

        Args:
            processes: the processes.
            num_rows: N.
            gap: the mean of this process's rows less that of all, times the square root of their
                number.
        """
        whole = _Scatter()
        incomplete = processes.sum(torch.tensor([0.0 if self.complete else 1.0]))
        whole.complete, whole.rows = not bool(incomplete), num_rows
        if not whole.complete:
            return whole
        rows = gap[None] if self.factor is None else torch.cat([self.factor, gap[None]])
        if num_rows * len(gap) ** 2 <= MAX_QR_COST or num_rows < len(gap):
            rows = processes.gather_rows(rows)
            short = len(rows) <= len(gap)
            whole.factor = rows if short else triangular_factor(rows)
            return whole
        own = gram_matrix(rows)
        whole.gram = processes.sum(own if self.gram is None else own.add_(self.gram))
        return whole

    def covariance(self, columns: ColumnStats) -> SampleCovariance:
        """The covariance of all rows added so far."""
        factor = None if self.factor is None else self.factor / columns.rows**0.5
        gram = None if self.gram is None else self.gram.div_(columns.rows)
        return SampleCovariance(columns, factor, gram)


def _joined(blocks: RowBlocks) -> Iterator[RowBlock]:
    # Blocks of at least D rows, except for the last: many small blocks would each need a D x D
    # matrix, which a block of fewer than D rows does not.
    waiting: list[RowBlock] = []
    for block in blocks.read(keep=False):
        waiting.append(block)
        if sum(len(one.values) for one in waiting) >= block.values.shape[1]:
            yield RowBlock.concatenate(waiting)
            waiting = []
    if waiting:
        yield RowBlock.concatenate(waiting)


def _mean(block: RowBlock) -> Float[Tensor, " D"]:
    count = len(block.values) if block.observed is None else block.observed.sum(0).clamp(min=1)
    return block.totals / count
