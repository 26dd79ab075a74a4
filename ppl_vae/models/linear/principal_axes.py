"""Numerically stable covariances of z from precisions P = I + A'A.

A Cholesky factorization of P, with factor R, loses the relative precision max_k P_kk / R_kk^2,
which is about the condition number of P after its diagonal is scaled to one. On the principal axes
of A, where P is diagonal, nothing is lost, however different their lengths; on other axes up to
the square of A's condition number.

References:
    Demmel: On floating point errors in Cholesky (1989).
"""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_PRECISION_LOSS = 1e6
"""The largest factor of precision that a factorization may lose; float64 keeps ten digits then."""


@dataclass(frozen=True)
class PatternAxes:
    """The principal axes of the observed rows of A = Psi^-1/2 W, for each missingness pattern.

    Results are exact for any orthonormal axes, however inaccurate, so that the axes are
    constants in gradients.

    Attributes:
        axes: as columns, (U, K, K).
        scaled: A on these axes, zero for missing entries, (U, D, K).
        inverse: Cholesky factors of the covariances of z on these axes, (U, K, K).
    """

    axes: Float[Tensor, "U K K"]
    scaled: Float[Tensor, "U D K"]
    inverse: Float[Tensor, "U K K"]

    @classmethod
    def of(cls, scaled: Float[Tensor, "D K"], observed: Float[Tensor, "U D"]) -> Self:
        """The axes of these patterns.

        Args:
            scaled: A.
            observed: one in observed columns and zero in missing ones.

        Raises:
            torch.linalg.LinAlgError: if A is too large for the dtype.
        """
        rows = observed[..., None] * scaled
        finite = bool(rows.isfinite().all())  # a condition for computing singular values
        axes = principal_axes(rows if finite else torch.zeros_like(rows))
        rotated = rows @ axes
        precision = rotated.mT @ rotated + torch.eye(scaled.shape[1]).to(scaled)
        inverse, loss = inverse_factor(precision)
        if not finite or bool((loss > MAX_PRECISION_LOSS).any()):
            error = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
            raise error("loadings are too large relative to the noise scales")
        return cls(axes, rotated, inverse)

    @property
    def tril(self) -> Float[Tensor, "U K K"]:
        """Cholesky factors of the covariances of z on its original axes."""
        upper = torch.linalg.qr((self.axes @ self.inverse).mT).R
        sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
        return (sign[..., None] * upper).mT

    @property
    def half_log_det(self) -> Float[Tensor, " U"]:
        """1/2 log det of the covariances of z."""
        return half_log_det(self.inverse)

    def solve(
        self, index: Int[Tensor, " B"], offset: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B D"]]:
        """Posterior means of z, and residuals in units of the noise.

        Args:
            index: the pattern of each row.
            offset: x - mu of each row in units of the noise, zero for missing entries.
        """
        scaled, inverse = self.scaled[index], self.inverse[index]
        whitened = rowwise_product((offset[:, None] @ scaled)[:, 0], inverse)
        rotated = rowwise_product(whitened, inverse.mT)
        residual = offset - (scaled @ rotated[..., None])[..., 0]
        return (self.axes[index] @ rotated[..., None])[..., 0], residual


@torch.no_grad()
def principal_axes(scaled: Float[Tensor, "*U D K"]) -> Float[Tensor, "*U K K"]:
    """The right singular vectors of A as columns, that of the largest singular value first."""
    # The triangular factor has the same right singular vectors; the left ones of A are large.
    return torch.linalg.svd(torch.linalg.qr(scaled, mode="r").R).Vh.mT


def rowwise_product(
    rows: Float[Tensor, "B K"], matrices: Float[Tensor, "U K K"]
) -> Float[Tensor, "B K"]:
    """Each row times its own matrix, or all rows times the only matrix."""
    if len(matrices) == 1:
        return rows @ matrices[0]
    return (rows[:, None] @ matrices)[:, 0]


def half_log_det(tril: Float[Tensor, "U K K"]) -> Float[Tensor, " U"]:
    """1/2 log det of the covariances with these Cholesky factors."""
    return tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def tril_of_inverse(matrix: Float[Tensor, "*B K K"]) -> Float[Tensor, "*B K K"]:
    """The lower triangular L with L L' = matrix^-1, for a positive definite matrix.

    With J the exchange matrix and J matrix J = R R', L = (J R J)'^-1.

    Raises:
        torch.linalg.LinAlgError: if the matrix is not positive definite.
    """
    return _inverse_of(torch.linalg.cholesky(matrix.flip(-2, -1)))


def _inverse_of(factor: Float[Tensor, "*B K K"]) -> Float[Tensor, "*B K K"]:
    upper = factor.flip(-2, -1).mT
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(upper, eye, upper=False)


def inverse_factor(
    matrix: Float[Tensor, "U K K"],
) -> tuple[Float[Tensor, "U K K"], Float[Tensor, " U"]]:
    """The result of :func:`tril_of_inverse` and the factor of precision lost in computing it.

    The factor is max_k P_kk L_kk^2, where 1 / (P_kk L_kk^2) is the fraction of axis k that later
    axes do not explain. It is infinite if the factorization fails.
    """
    factor, info = torch.linalg.cholesky_ex(matrix.flip(-2, -1))
    tril = _inverse_of(factor)
    with torch.no_grad():
        diagonals = matrix.diagonal(dim1=-2, dim2=-1), tril.diagonal(dim1=-2, dim2=-1)
        loss = (diagonals[0] * diagonals[1].square()).amax(-1)
        return tril, torch.where((info == 0) & loss.isfinite(), loss, torch.inf)
