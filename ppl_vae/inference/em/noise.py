"""Noise variances of linear-Gaussian models: one for all columns, or one for each."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.data.column_stats import ColumnStats
from ppl_vae.models.ppca import PPCA

FLOOR_REACHED = "noise at its floor"
"""How the note on columns without noise of their own (Heywood cases) begins."""


@dataclass(frozen=True)
class Noise:
    """How noise variances follow from squared residuals.

    Attributes:
        floors: the least variance of each column's own noise, (D,); None if the noise is
            isotropic, one variance for all.
        leaping: whether variances may leap, where the M-step would crawl.
    """

    min_variance: Float[Tensor, " D"] | None
    accelerated: bool = False

    @classmethod
    def of(
        cls, ppca: PPCA, columns: ColumnStats, relative_floor: float, *, accelerated: bool = False
    ) -> Self:
        """A model's, with floors relative to the variances of the columns.

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

    def variance(
        self, squares: Float[Tensor, " D"], counts: Float[Tensor, " D"]
    ) -> Float[Tensor, " D"]:
        """The variances, psi, that maximise -1/2 sum_d (counts log psi + squares / psi)."""
        if self.min_variance is None:
            return (squares.sum() / counts.sum()).expand(len(squares))
        return torch.maximum(squares / counts, self.min_variance)

    def accelerate(
        self,
        variance: Float[Tensor, " D"],
        residual: Float[Tensor, " D"],
        spread: Float[Tensor, " D"],
    ) -> Float[Tensor, " D"]:
        """Each variance to where log p is highest in it alone, the others as they are.

        With C the covariance of x, a = (C^-1)_dd and b = (C^-1 S C^-1)_dd, log p changes by
        -1/2 (log(1 + a t) - b t / (1 + a t)) as psi_d changes by t, and is highest at
        t = (b - a) / a^2. With r = x - mu - W m, a = u / psi and b = E r^2 / psi^2, where
        u = 1 - w_d' V w_d / psi is the share of psi that z does not take: t is EM's step,
        E r^2 - u psi, over u^2, and EM crawls where u is small (as towards a floor, at 1 / t).
        With missing values a and b are means over the rows that have the column.

        Args:
            variance: psi.
            residual: the mean of r^2.
            spread: the mean of w_d' V w_d, with V the covariance of z given the row.
        """
        assert self.min_variance is not None
        own = (1 - spread / variance).clamp(min=torch.finfo(variance.dtype).eps)
        leapt = variance + (residual - own * variance) / own.square()
        return torch.maximum(leapt, self.min_variance)

    def rounding(
        self,
        total: Float[Tensor, " D"],
        residual: Float[Tensor, " D"],
        variance: Float[Tensor, " D"],
    ) -> float:
        """By how much rounding may move log p, in nats per datum.

        r = x - mu - W m has an error of the size of eps |x|, and counts as r^2 / psi.

        Args:
            total: the variance of each column.
            residual: the mean of r^2.
            variance: psi.
        """
        eps = torch.finfo(total.dtype).eps
        error = 2 * eps * total.sqrt()
        squares = ((2 * residual.sqrt() + error) * error / variance).sum()
        return float(squares) + 4 * eps * len(total)

    def scale(self, variance: Float[Tensor, " D"]) -> Tensor:
        """The model's ``noise_scale`` for these variances."""
        return (variance[0] if self.min_variance is None else variance).sqrt()

    def notes(self, variance: Float[Tensor, " D"]) -> tuple[str, ...]:
        """Which columns have reached their floors."""
        if self.min_variance is None or not (reached := variance <= self.min_variance).any():
            return ()
        listed = ", ".join(map(str, reached.nonzero().flatten().tolist()))
        return (f"{FLOOR_REACHED} (Heywood cases): {listed}",)
