"""The E-step of linear-Gaussian models: the sums over rows that an M-step needs."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.processes.ranks import Processes
from ppl_vae.data.sources.row_blocks import RowBlock
from ppl_vae.guides.families import projected_covariance
from ppl_vae.models.linear.linear_gaussian import (
    LatentPosterior,
    MissingnessPatterns,
    PatternCovariances,
    from_tril_vec,
    outer_tril,
    tril_vec,
)


@dataclass(frozen=True)
class ExpectedStatistics:
    """The sums over rows that an M-step needs; m and V are mean and covariance of the row's q.

    With P = K (K + 1) / 2 the length of a symmetric matrix's lower triangle, the columns of
    ``by_column`` and ``overall`` are V (P), m m' (P), m (K) and 1.

    Attributes:
        by_column: sums over the rows in which the column is observed, (D, 2 P + K + 1).
        overall: sums over all rows, (2 P + K + 1).
        residual: sums of r (m, 1)' over the rows in which the column is observed, (D, K + 1).
        squares: sums of r^2 over the rows in which the column is observed, (D,).
        scalars: sums of log p(x), of 1/2 log det V and of KL(q || p(z | x)), (3,).
        rotation: for diagonal q, sums of P_ij / P_ii, P_jj / P_ii and P_ij^2 / P_ii^2 with P the
            posterior precision, (3, K, K); zero for other families.
    """

    by_column: Float[Tensor, "D Q"]
    overall: Float[Tensor, " Q"]
    residual: Float[Tensor, "D L"]
    squares: Float[Tensor, " D"]
    scalars: Float[Tensor, " 3"]
    rotation: Float[Tensor, "3 K K"]

    def __add__(self, other: "ExpectedStatistics") -> "ExpectedStatistics":
        pairs = ((value, vars(other)[name]) for name, value in vars(self).items())
        return ExpectedStatistics(*(mine + its for mine, its in pairs))

    @classmethod
    def zero(cls, loadings: Float[Tensor, "D K"]) -> Self:
        """The sums over no rows."""
        data_dim, latent_dim = loadings.shape
        size = latent_dim * (latent_dim + 1) + latent_dim + 1
        shapes = (
            (data_dim, size),
            (size,),
            (data_dim, latent_dim + 1),
            (data_dim,),
            (3,),
            (3, latent_dim, latent_dim),
        )
        return cls(*(loadings.new_zeros(shape) for shape in shapes))

    def over_processes(self, processes: Processes) -> "ExpectedStatistics":
        """The sums over the rows of all processes, in one message."""
        parts = list(vars(self).values())
        total = processes.sum(torch.cat([part.reshape(-1) for part in parts]))
        split = total.split([part.numel() for part in parts])
        return ExpectedStatistics(
            *(new.reshape(part.shape) for new, part in zip(split, parts, strict=True))
        )

    @classmethod
    def of(
        cls,
        block: RowBlock,
        patterns: MissingnessPatterns,
        loadings: Tensor,
        loc: Tensor,
        variance: Tensor,
        family: str = "full",
    ) -> Self:
        """The E-step: the sums over a block of rows, each with its q of the family.

        Args:
            block: the rows.
            patterns: the patterns of their observed columns.
            loadings, loc, variance: W, mu and psi.
            family: the family of q.
        """
        posterior = LatentPosterior.of(block.values, patterns, loadings, loc, variance)
        one = torch.ones_like(posterior.mean[:, :1])
        counts = patterns.sum_by_pattern(one)
        covariance, half_log_det, kl = _best_covariance(posterior.covariances, family)
        covariances = tril_vec(covariance) * counts
        mean_outer = patterns.sum_by_pattern(outer_tril(posterior.mean, posterior.mean))
        means = patterns.sum_by_pattern(posterior.mean)
        stacked = torch.cat([covariances, mean_outer, means, counts], 1)
        totals = torch.stack([half_log_det, kl]) @ counts[:, 0]
        return cls(
            by_column=patterns.observed.mT @ stacked,
            overall=stacked.sum(0),
            residual=posterior.residual.mT @ torch.cat([posterior.mean, one], 1),
            squares=posterior.residual.square().sum(0),
            scalars=torch.cat([posterior.log_likelihood().sum().reshape(1), totals]),
            rotation=_rotation_sums(
                posterior.covariances.precision, counts * (family == "diagonal")
            ),
        )


class SummedMoments(NamedTuple):
    """Sums over rows of moments of q.

    Attributes:
        covariance: the sum of V, (*B, K, K).
        mean_outer: the sum of m m', (*B, K, K).
        mean: the sum of m, (*B, K).
        num_rows: the number of rows, (*B).
    """

    covariance: Float[Tensor, "*B K K"]
    mean_outer: Float[Tensor, "*B K K"]
    mean: Float[Tensor, "*B K"]
    num_rows: Float[Tensor, "*B"]

    @classmethod
    def unpack(cls, sums: Float[Tensor, "*B Q"], latent_dim: int) -> Self:
        """The moments in a row of ``by_column``, or in ``overall``."""
        size = latent_dim * (latent_dim + 1) // 2
        covariance, mean_outer, mean, num_rows = sums.split([size, size, latent_dim, 1], -1)
        return cls(
            from_tril_vec(covariance, latent_dim),
            from_tril_vec(mean_outer, latent_dim),
            mean,
            num_rows[..., 0],
        )


def _best_covariance(exact: PatternCovariances, family: str) -> tuple[Tensor, Tensor, Tensor]:
    # V, 1/2 log det V and KL(q || p(z | x)) of each pattern.
    if family == "full":
        no_kl = torch.zeros_like(exact.half_log_det)
        return exact.tril @ exact.tril.mT, exact.half_log_det, no_kl
    covariance = projected_covariance(exact.precision, family)
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    half_log_det = variances.log().sum(-1) / 2
    trace = (exact.precision.diagonal(dim1=-2, dim2=-1) * variances).sum(-1)
    kl = exact.half_log_det - half_log_det + (trace - variances.shape[-1]) / 2
    return covariance, half_log_det, kl


def _rotation_sums(
    precision: Float[Tensor, "U K K"], counts: Float[Tensor, "U 1"]
) -> Float[Tensor, "3 K K"]:
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    share = precision / diagonal[..., None]
    ratio = diagonal[:, None] / diagonal[..., None]
    return torch.stack([(part * counts[..., None]).sum(0) for part in (share, ratio, share**2)])
