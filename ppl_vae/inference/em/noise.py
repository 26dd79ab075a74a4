"""Noise variances of linear-Gaussian models: one for all columns, or one per column."""

from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.data.column_stats import ColumnStats
from ppl_vae.models.ppca import PPCA

PerColumn: TypeAlias = Float[Tensor, " D"]
"""One number for each column."""
FLOOR_REACHED = "noise at its floor"
"""The beginning of the note that lists columns without noise of their own (Heywood cases)."""


@dataclass(frozen=True)
class Noise:
    """The M-step of the noise variances: how they follow from squared residuals.

    Attributes:
        min_variance: the smallest noise variance of each column, (D,); None for isotropic noise,
            one variance for all columns.
        accelerated: whether noise variances may be updated beyond the M-step, by
            :meth:`accelerate`.
    """

    min_variance: PerColumn | None
    accelerated: bool = False

    @classmethod
    def of(
        cls, ppca: PPCA, columns: ColumnStats, relative_floor: float, *, accelerated: bool = False
    ) -> Self:
        """The noise of a model, with floors relative to the variances of the columns.

        Raises:
            ValueError: if the floor is not within (0, 1).
        """
        if not 0 < relative_floor < 1:
            raise ValueError(
                "noise_floor must lie between 0 and 1, as a share of a column's variance; got "
                f"{relative_floor}"
            )
        if ppca.noise == "isotropic":
            return cls(None)
        return cls(relative_floor * columns.variance, accelerated)

    def variance(self, squares: PerColumn, counts: PerColumn) -> PerColumn:
        """The variances psi that maximize -1/2 sum_d (counts log psi + squares / psi)."""
        if self.min_variance is None:
            return (squares.sum() / counts.sum()).expand(len(squares))
        return torch.maximum(squares / counts, self.min_variance)

    def accelerate(
        self, variance: PerColumn, squared_residual: PerColumn, residual_variance: PerColumn
    ) -> PerColumn:
        """Each noise variance at the maximum of log p in it alone, the others held fixed.

        With C the covariance of x, a = (C^-1)_dd and b = (C^-1 S C^-1)_dd, log p changes by
        -1/2 (log(1 + a t) - b t / (1 + a t)) as psi_d changes by t, and has its maximum at
        t = (b - a) / a^2. With r = x - mu - W m, a = u / psi and b = E r^2 / psi^2, where
        u = 1 - w_d' V w_d / psi is the share of psi that z does not explain: t is EM's step,
        E r^2 - u psi, divided by u^2. EM is slow where u is small (towards a floor it converges
        as 1 / t). With missing values a and b are means over the rows that observe the column.

        Args:
            variance: psi.
            squared_residual: the mean of r^2.
            residual_variance: the mean of w_d' V w_d, with V the covariance of z given the row.
        """
        assert self.min_variance is not None
        eps = torch.finfo(variance.dtype).eps
        noise_share = (1 - residual_variance / variance).clamp(min=eps)
        change = (squared_residual - noise_share * variance) / noise_share.square()
        return torch.maximum(variance + change, self.min_variance)

    def rounding(
        self, column_variance: PerColumn, squared_residual: PerColumn, variance: PerColumn
    ) -> Float[Tensor, ""]:
        """The largest change of log p by rounding, in nats per datum.

        The residual r = x - mu - W m has an error of the size of eps |x| and contributes
        r^2 / psi.

        Args:
            column_variance: the variance of each column.
            squared_residual: the mean of r^2.
            variance: psi.
        """
        eps = torch.finfo(column_variance.dtype).eps
        error = 2 * eps * column_variance.sqrt()
        squares = ((2 * squared_residual.sqrt() + error) * error / variance).sum()
        return squares + 4 * eps * len(column_variance)

    def scale(self, variance: PerColumn) -> Tensor:
        """The ``noise_scale`` of the model for these variances."""
        return (variance[0] if self.min_variance is None else variance).sqrt()

    def notes(self, variance: PerColumn) -> tuple[str, ...]:
        """A note on the columns whose noise variance has reached its floor."""
        if self.min_variance is None or not (reached := variance <= self.min_variance).any():
            return ()
        columns = ", ".join(map(str, reached.nonzero().flatten().tolist()))
        return (f"{FLOOR_REACHED} (Heywood cases): {columns}",)
