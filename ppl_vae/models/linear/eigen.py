"""Matrix products, eigenvalues and singular values for linear-Gaussian models."""

from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LeadingEigenpairs: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""The K largest eigenvalues of a symmetric matrix (K,), their eigenvectors (D, K), and the sum of
the other eigenvalues ()."""
CACHED_QR_ROWS = 16
"""Rows per column of the blocks whose QR decompositions are fast."""
MAX_JACOBI_SIZE = 256
"""The largest number of singular values computed by Jacobi rotations, which cost more than other
methods."""


def gram_matrix(x: Float[Tensor, "N D"]) -> Float[Tensor, "D D"]:
    """X'X; numpy detects that it is symmetric and takes half the time."""
    return product(x.mT, x)


def product(a: Float[Tensor, "N D"], b: Float[Tensor, "D K"]) -> Float[Tensor, "N K"]:
    """A matrix product, computed by numpy on a CPU."""
    if a.device.type != "cpu":
        return a @ b
    return torch.from_numpy(a.numpy() @ b.numpy())


def symmetric_eigen(
    matrix: Float[Tensor, "D D"],
) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Eigenvalues in ascending order, and eigenvectors; computed by numpy on a CPU."""
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
    else:
        values, vectors = map(torch.from_numpy, np.linalg.eigh(matrix.numpy()))
    return values, vectors


def cholesky_factor(matrix: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """The lower Cholesky factor of a positive definite matrix.

    On an accelerator, which is not waited for, the factor of another matrix is NaN.

    Raises:
        torch.linalg.LinAlgError: on a CPU, if the matrix is not positive definite.
    """
    if matrix.device.type == "cpu":
        return torch.linalg.cholesky(matrix)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where(failed == 0, lower, torch.nan)


def triangular_factor(rows: Float[Tensor, "R D"]) -> Float[Tensor, "_ D"]:
    """R of a QR decomposition, R'R = X'X, with min(R, D) rows.

    Of many rows, blocks that stay in a processor's cache are decomposed first, and then their
    triangular factors: the same precision in less time (Demmel et al.: Communication-optimal
    parallel and sequential QR and LU factorizations (2012)).
    """
    width = rows.shape[1]
    size = CACHED_QR_ROWS * width
    whole = len(rows) // size * size
    if whole > size:
        blocks = rows[:whole].reshape(-1, size, width)
        factors = torch.linalg.qr(blocks, mode="r").R.reshape(-1, width)
        rows = torch.cat([factors, rows[whole:]])
    return torch.linalg.qr(rows, mode="r").R


def gram_factor(gram: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """A factor F of a positive semidefinite matrix F'F.

    Columns are first scaled to unit length, so that small ones keep their precision.
    """
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    correlation = gram / torch.outer(scale, scale)
    upper, failed = torch.linalg.cholesky_ex(correlation, upper=True)
    if int(failed):
        values, vectors = symmetric_eigen(correlation)
        upper = values.clamp(min=0).sqrt()[:, None] * vectors.mT
    return upper * scale


def leading_eigenpairs(
    singular: Float[Tensor, " Q"], axes: Float[Tensor, "D Q"], number: int
) -> LeadingEigenpairs:
    """The leading eigenpairs of A'A, and the sum of its other eigenvalues.

    Args:
        singular: the singular values of A, largest first.
        axes: its right singular vectors.
        number: K, how many pairs to return; eigenvalues beyond the Q known ones are zero.
    """
    values = singular.square()
    padding = max(0, number - len(values))
    kept = torch.nn.functional.pad(values[:number], (0, padding))
    vectors = torch.nn.functional.pad(axes[:, :number], (0, padding))
    return kept, vectors, values[number:].sum()


def right_singular_vectors(
    factor: Float[Tensor, "R D"],
) -> tuple[Float[Tensor, " Q"], Float[Tensor, "D Q"]]:
    """Singular values, largest first, and right singular vectors; Q = min(R, D).

    Small matrices are decomposed by preconditioned one-sided Jacobi rotations, which compute small
    singular values, and small entries of vectors, with the same relative precision as large ones,
    even for columns in different units.

    References:
        Drmac, Veselic: New fast and accurate Jacobi SVD algorithm (2008), LAPACK's dgejsv.
    """
    if min(factor.shape) > MAX_JACOBI_SIZE:
        _, values, vectors = torch.linalg.svd(factor, full_matrices=False)
        return values, vectors.mT
    from scipy.linalg import lapack

    jacobi: Any = lapack.dgejsv  # pyright: ignore[reportAttributeAccessIssue]
    matrix, wide = factor.cpu().numpy(), factor.shape[0] < factor.shape[1]
    values, left, right, scaling, _, failed = jacobi(matrix.T if wide else matrix, joba=1)
    if failed:
        raise FloatingPointError(f"LAPACK's dgejsv did not converge (info={failed})")
    values = values * (scaling[0] / scaling[1])
    vectors = left if wide else right
    return torch.from_numpy(values).to(factor), torch.from_numpy(vectors).to(factor)
