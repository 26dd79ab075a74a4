"""The data that the likelihood of a linear-Gaussian model depends on, in few rows.

Rows of one missingness pattern enter the likelihood of N(mu, W W' + Psi) through their number,
mean and scatter matrix only. An orthogonal transformation of the rows leaves all three: it turns
n rows X into sqrt(n) times their mean, at most D rows F with F'F the scatter matrix, and rows of
zeros. A table of any length with U patterns becomes at most U (D + 1) rows.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.processes.ranks import SINGLE, Processes
from ppl_vae.core.validation import ArrayLike
from ppl_vae.data.column_stats import ColumnStats
from ppl_vae.data.sources.row_blocks import RowBlock, RowBlocks, RowSource
from ppl_vae.models.linear.linear_gaussian import MissingnessPatterns
from ppl_vae.models.linear.sufficient_statistics import summarize_table


@dataclass(frozen=True)
class TableStatistics:
    """Sufficient statistics of a table for linear-Gaussian models, as transformed rows.

    Row m of the transformed table belongs to pattern u = ``pattern[m]`` and has a weight c_m:
    given the parameters, its latent variable and its values are those of a datum with mean
    c_m mu in place of mu. The means have c_m = sqrt(n_u), all other rows zero. ``num_zero[u]``
    further rows are zero and have weight zero.

    Attributes:
        num_data: N.
        columns: statistics of each column.
        mean: the means of the columns, (D,); ``rows`` are relative to it.
        rows: the transformed rows, zero where missing, (M, D), float64.
        weight: c, (M,).
        pattern: the pattern of each row, (M,).
        observed: the patterns, one in observed columns and zero in missing ones, (U, D).
        counts: the number of data of each pattern, n_u, (U,).
        num_zero: the number of further rows of each pattern, zero or more than 2 D, (U,).
        row_notes: on rows with nothing observed, which were left out.
    """

    num_data: int
    columns: ColumnStats
    mean: Float[Tensor, " D"]
    rows: Float[Tensor, "*S M D"]
    weight: Float[Tensor, " M"]
    pattern: Int[Tensor, " M"]
    observed: Float[Tensor, "U D"]
    counts: Float[Tensor, " U"]
    num_zero: Float[Tensor, " U"]
    row_notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        x: RowSource,
        mask: ArrayLike | None = None,
        device: torch.device | None = None,
        schema: TableSchema | None = None,
        processes: Processes = SINGLE,
    ) -> Self:
        """The statistics of the rows of x, in one pass, or in two if values are missing.

        Args:
            x: a matrix, a memory map, or an iterable of blocks of rows; NaN marks a missing value.
            mask: True where observed.
            device: the device of the statistics; that of x by default.
            schema: the schema of the frame that a model was fitted to.
            processes: among which the rows of the whole table are divided.

        Raises:
            ValueError: if a column has nothing observed; as
                :class:`~ppl_vae.data.sources.row_blocks.RowBlocks`.
        """
        with processes.together():
            blocks = RowBlocks(x, mask, device=device, schema=schema, processes=processes)
        columns, covariance = summarize_table(blocks)
        columns.check()
        if covariance is not None:
            factor = covariance.factor * columns.rows**0.5
            groups = [_Group(columns.rows, torch.zeros_like(columns.mean), factor)]
            patterns = torch.ones_like(columns.mean)[None]
        else:
            patterns, groups = _groups(blocks, columns.mean)
        statistics = cls._of_groups(columns, groups, patterns)
        return replace(statistics, row_notes=blocks.notes())

    def notes(self) -> tuple[str, ...]:
        """A note on rows that were left out, if any."""
        return self.row_notes

    @classmethod
    def of_rows(cls, block: RowBlock) -> Self:
        """The rows themselves, not transformed, each with weight one."""
        centred = block.values
        observed = torch.ones_like(centred).bool() if block.observed is None else block.observed
        patterns = MissingnessPatterns.distinct(observed, centred)
        index = patterns.gather_rows(torch.arange(len(patterns.observed), device=centred.device))
        mean = torch.zeros_like(block.totals)
        return cls(
            num_data=len(centred),
            columns=ColumnStats.from_block(block, mean, centred.square().sum(0)),
            mean=mean,
            rows=centred,
            weight=torch.ones_like(centred[:, 0]),
            pattern=index,
            observed=patterns.observed,
            counts=index.bincount().to(centred),
            num_zero=torch.zeros_like(patterns.observed[:, 0]),
        )

    @classmethod
    def _of_groups(cls, columns: ColumnStats, groups: "list[_Group]", observed: Tensor) -> Self:
        parts = [
            group.transformed(pattern) for group, pattern in zip(groups, observed, strict=True)
        ]
        lengths = torch.tensor([len(part) for part in parts], device=observed.device)
        weight = torch.zeros(int(lengths.sum())).to(observed)
        counts = torch.tensor([float(group.num_data) for group in groups]).to(observed)
        weight[lengths.cumsum(0) - lengths] = counts.sqrt()
        return cls(
            num_data=columns.rows,
            columns=columns,
            mean=columns.mean,
            rows=torch.cat(parts),
            weight=weight,
            pattern=torch.arange(len(groups), device=observed.device).repeat_interleave(lengths),
            observed=observed,
            counts=counts,
            num_zero=counts - lengths,
        )

    @cached_property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        return len(self.observed) == 1 and bool(self.observed.all())

    @cached_property
    def has_zero(self) -> Bool[Tensor, " U"]:
        """Which patterns have further rows, of zeros."""
        return self.num_zero > 0

    @property
    def scatter(self) -> Float[Tensor, "D D"]:
        """The sum of (x_n - mean) (x_n - mean)' over complete data.

        Raises:
            ValueError: if values are missing.
        """
        if not self.is_complete:
            raise ValueError(
                f"x has {self.columns.num_missing} missing entries, and a scatter matrix needs "
                "complete data; use integrated_log_likelihood, which takes missing values"
            )
        return self.rows.mT @ self.rows


class _Group(NamedTuple):
    # Data of one pattern: their number, mean, and a factor F of their scatter matrix F'F.
    num_data: int
    mean: Float[Tensor, " D"]
    factor: Float[Tensor, "R D"]

    @classmethod
    def of(cls, rows: Float[Tensor, "B D"]) -> "_Group":
        mean = rows.mean(0)
        return cls(len(rows), mean, _short(rows - mean, len(rows) - 1))

    def merge(self, other: "_Group") -> "_Group":
        num_data = self.num_data + other.num_data
        gap, share = other.mean - self.mean, other.num_data / num_data
        shift = gap * (self.num_data * share) ** 0.5
        factor = torch.cat([self.factor, other.factor, shift[None]])
        return _Group(num_data, self.mean + gap * share, _short(factor, num_data - 1))

    def transformed(self, observed: Shaped[Tensor, " D"]) -> Float[Tensor, "R D"]:
        # sqrt(n) times the mean; the factor in at most n - 1 rows; if only a few of the n rows are
        # left, which are zero, those too. The triangular factor of the observed columns is the
        # same for any division into blocks.
        columns = observed.bool()
        short = torch.linalg.qr(_short(self.factor[:, columns], self.num_data - 1), mode="r").R
        signs = torch.where(short.diagonal() < 0, -1.0, 1.0).to(short)
        factor = short.new_zeros(len(short), len(columns))
        factor[:, columns] = short * signs[:, None]
        rows = torch.cat([self.mean[None] * self.num_data**0.5, factor])
        num_zero = self.num_data - len(rows)
        few = num_zero <= 2 * rows.shape[1]
        return torch.cat([rows, rows.new_zeros(num_zero if few else 0, rows.shape[1])])


def _short(factor: Float[Tensor, "R D"], rank: int) -> Float[Tensor, "Q D"]:
    # F in at most D rows and at most as many as its rank.
    if len(factor) <= min(rank, factor.shape[1]):
        return factor
    _, values, axes = torch.linalg.svd(factor, full_matrices=False)
    return (values[:, None] * axes)[:rank]


def _groups(
    blocks: RowBlocks, centre: Float[Tensor, " D"]
) -> tuple[Bool[Tensor, "U D"] | Float[Tensor, "U D"], list[_Group]]:
    # The data by pattern, relative to a centre.
    groups = _Groups()
    for block in blocks.read():
        observed = block.observed
        if observed is None:
            observed = torch.ones_like(block.values).bool()
        values = torch.where(observed, block.values - centre, 0.0)
        distinct = MissingnessPatterns.distinct(observed, values)
        index = distinct.gather_rows(torch.arange(len(distinct.observed), device=values.device))
        order = index.expand(len(values)).argsort(stable=True)
        sizes = index.expand(len(values)).bincount().tolist()
        for pattern, rows in zip(distinct.observed, values[order].split(sizes), strict=True):
            groups.add(pattern, _Group.of(rows))
    if blocks.processes.size > 1:
        groups = groups.over_processes(blocks.processes, centre)
    keys = sorted(groups.found)  # the order of the blocks does not matter
    patterns = torch.stack([groups.patterns[key] for key in keys])
    return patterns, [groups.found[key] for key in keys]


class _Groups:
    """Data of several patterns; those of one pattern are merged."""

    def __init__(self) -> None:
        self.found: dict[bytes, _Group] = {}
        self.patterns: dict[bytes, Tensor] = {}

    def add(self, pattern: Tensor, group: _Group) -> None:
        """Add data of a pattern."""
        key = pattern.bool().cpu().numpy().tobytes()
        self.found[key] = self.found[key].merge(group) if key in self.found else group
        self.patterns[key] = pattern

    def over_processes(self, processes: Processes, like: Float[Tensor, " D"]) -> "_Groups":
        """The data of all processes; for each pattern its number of data, its mean and factor."""
        none, groups = like.new_zeros(0, len(like)), list(self.found.values())
        numbers = [[group.num_data, len(group.factor)] for group in groups]
        gathered = [
            processes.gather(part)
            for part in (
                torch.tensor(numbers, dtype=torch.int64).reshape(-1, 2),
                torch.stack([none.sum(0), *(p.to(like) for p in self.patterns.values())])[1:],
                torch.stack([none.sum(0), *(group.mean for group in groups)])[1:],
                torch.cat([none, *(group.factor for group in groups)]),
            )
        ]
        whole = _Groups()
        for sizes, patterns, means, factors in zip(*gathered, strict=True):
            split = factors.split(sizes[:, 1].tolist())
            for size, pattern, mean, factor in zip(sizes, patterns, means, split, strict=True):
                whole.add(pattern, _Group(int(size[0]), mean, factor))
        return whole
