"""Covariances of z from precisions P = I + A'A, and the axes on which that loses no digits.

A Cholesky factorization of P loses the digits of max_k P_kk / R_kk^2, with R the factor, which is
about the condition of P after its diagonal is scaled to one. On the principal axes of A, where P
is diagonal, nothing is lost, however different their lengths; on other axes as much as the square
of A's condition.

References:
    Demmel: On floating point errors in Cholesky (1989).
"""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_LOST = 1e6
"""The factor of its precision a Cholesky factorization may lose: ten digits of float64 stay."""


@dataclass(frozen=True)
class OwnAxes:
    """Patterns on the principal axes of what they observe of A = Psi^-1/2 W.

    The axes only have to be orthonormal for the results to be exact, whatever their own error, so
    that they count as constants in a gradient.

    Attributes:
        axes: columns, (U, K, K).
        roots: A on these axes, zero where missing, (U, D, K).
        inverse: lower factors of the covariances of z on these axes, (U, K, K).
    """

    axes: Float[Tensor, "U K K"]
    roots: Float[Tensor, "U D K"]
    inverse: Float[Tensor, "U K K"]

    @classmethod
    def of(cls, roots: Float[Tensor, "D K"], seen: Float[Tensor, "U D"]) -> Self:
        """The axes of these patterns.

        Raises:
            torch.linalg.LinAlgError: if A is too large for the dtype.
        """
        observed = seen[..., None] * roots
        finite = bool(observed.isfinite().all())  # which the singular values have to be
        axes = principal_axes(observed if finite else torch.zeros_like(observed))
        turned = observed @ axes
        precision = turned.mT @ turned + torch.eye(roots.shape[1]).to(roots)
        inverse, lost = inverse_factor(precision)
        if not finite or bool((lost > MOST_LOST).any()):
            error = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
            raise error("loadings are too large beside the noise scales")
        return cls(axes, turned, inverse)

    @property
    def tril(self) -> Float[Tensor, "U K K"]:
        """Lower factors of the covariances of z on the axes that z has."""
        upper = torch.linalg.qr((self.axes @ self.inverse).mT).R
        sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
        return (sign[..., None] * upper).mT

    @property
    def half_log_det(self) -> Float[Tensor, " U"]:
        """1/2 log det of the covariances of z."""
        return half_log_det(self.inverse)

    def solve(
        self, which: Int[Tensor, " B"], offset: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B D"]]:
        """Means of z, and residuals, of rows of these patterns; both in units of the noise."""
        roots, inverse = self.roots[which], self.inverse[which]
        along = times((offset[:, None] @ roots)[:, 0], inverse)
        own = times(along, inverse.mT)
        residual = offset - (roots @ own[..., None])[..., 0]
        return (self.axes[which] @ own[..., None])[..., 0], residual


@torch.no_grad()
def principal_axes(roots: Float[Tensor, "*U D K"]) -> Float[Tensor, "*U K K"]:
    """The right singular vectors of A as columns, the longest axis first."""
    # Of the triangle, since the other factor of a tall matrix would be as large as itself.
    return torch.linalg.svd(torch.linalg.qr(roots, mode="r").R).Vh.mT


def times(rows: Float[Tensor, "B K"], matrices: Float[Tensor, "U K K"]) -> Float[Tensor, "B K"]:
    """Each row times its matrix, or all times the only one."""
    if len(matrices) == 1:
        return rows @ matrices[0]
    return (rows[:, None] @ matrices)[:, 0]


def half_log_det(tril: Float[Tensor, "U K K"]) -> Float[Tensor, " U"]:
    """1/2 log det of the covariances with these lower factors."""
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
    """As :func:`tril_of_inverse`, and the factor of precision that was lost: infinite for failure.

    It is max_k P_kk L_kk^2: of axis k, 1 / (P_kk L_kk^2) is what later axes do not explain.
    """
    factor, info = torch.linalg.cholesky_ex(matrix.flip(-2, -1))
    tril = _inverse_of(factor)
    with torch.no_grad():
        diagonals = matrix.diagonal(dim1=-2, dim2=-1), tril.diagonal(dim1=-2, dim2=-1)
        lost = (diagonals[0] * diagonals[1].square()).amax(-1)
        return tril, torch.where((info == 0) & lost.isfinite(), lost, torch.inf)
