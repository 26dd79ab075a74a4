"""p(z | x) and log p(x) of x | z ~ N(W z + mu, diag(psi)), z ~ N(0, I), for rows with holes.

Of row n only the observed columns count: with P_n = I + sum_d s_nd w_d w_d' / psi_d (s_nd is 1
where seen, 0 in a hole), z | x_n ~ N(P_n^-1 W' Psi^-1 (s_n * (x_n - mu)), P_n^-1). All P_n are one
matrix product of the (N, D) pattern of holes with the (D, K (K + 1) / 2) distinct entries of
w_d w_d' / psi_d. Rows that share a pattern share P_n; complete rows are the case of one pattern.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def packed(matrices: Float[Tensor, "*B K K"]) -> Float[Tensor, "*B P"]:
    """The lower triangles of symmetric matrices, P = K (K + 1) / 2."""
    rows, columns = _triangle(matrices.shape[-1], matrices.device)
    return matrices[..., rows, columns]


def outer(first: Float[Tensor, "B K"], second: Float[Tensor, "B K"]) -> Float[Tensor, "B P"]:
    """The lower triangles of the products a_b a_b' of one row each, up to a factor a row."""
    rows, columns = _triangle(first.shape[-1], first.device)
    return first[:, rows] * second[:, columns]


def unpacked(entries: Float[Tensor, "*B P"], size: int) -> Float[Tensor, "*B K K"]:
    """The symmetric matrices of lower triangles."""
    rows, columns = _triangle(size, entries.device)
    where = torch.zeros(size, size, dtype=torch.long, device=entries.device)
    where[rows, columns] = where[columns, rows] = torch.arange(len(rows), device=entries.device)
    return entries[..., where]


def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(size, size, device=device)
    return rows, columns


@dataclass(frozen=True)
class Patterns:
    """Which columns each row has.

    Attributes:
        seen: the distinct patterns, one in a column that is there and zero in a hole, (U, D).
        which: the pattern of each row, (B,); None if each row has its own, or all the same.
        cells: the pattern of each row, (B, D); None if nothing is missing.
    """

    seen: Float[Tensor, "U D"]
    which: Int[Tensor, " B"] | None
    cells: Bool[Tensor, "B D"] | None

    @classmethod
    def complete(cls, like: Float[Tensor, " D"]) -> Self:
        """Nothing is missing, in rows of this width, dtype and device."""
        return cls(torch.ones_like(like)[None], None, None)

    @classmethod
    def each(cls, cells: Bool[Tensor, "B D"], like: Tensor) -> Self:
        """One pattern a row, in the dtype of ``like``."""
        return cls(cells.to(like), None, cells)

    @classmethod
    def shared(cls, cells: Bool[Tensor, "B D"], like: Tensor) -> Self:
        """Rows with the same pattern put together."""
        bits = np.packbits(cells.cpu().numpy(), axis=1)
        keys = bits.view(np.dtype((np.void, bits.shape[1]))).ravel()
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        if len(first) == len(cells):
            return cls.each(cells, like)
        distinct = cells[torch.from_numpy(first).to(cells.device)].to(like)
        return cls(distinct, torch.from_numpy(which.reshape(-1)).to(cells.device), cells)

    def spread(self, values: Float[Tensor, "U ..."]) -> Tensor:
        """Values a pattern as values a row, or one for all."""
        return values if self.which is None else values[self.which]

    def collect(self, values: Float[Tensor, "B ..."]) -> Tensor:
        """Values a row summed over the rows of each pattern."""
        if self.which is not None:
            sums = values.new_zeros(len(self.seen), *values.shape[1:])
            return sums.index_add_(0, self.which, values)
        return values if len(values) == len(self.seen) else values.sum(0, keepdim=True)

    def masked(self, values: Float[Tensor, "B D"]) -> Tensor:
        """Values with zeros in the holes."""
        if self.cells is None:
            return values
        # A product takes half the time of a selection.
        if self.which is None:
            return values * self.seen
        return torch.where(self.cells, values, 0.0)


@dataclass(frozen=True)
class Solution:
    """The posterior of each row.

    Attributes:
        patterns: of the rows.
        mean: of z, (B, K).
        tril: lower factors of the covariances of z, one a pattern, (U, K, K).
        precision: P, the inverse of these covariances, (U, K, K).
        residual: x - mu - W mean, zero in the holes, (B, D).
        variance: psi, (D,).
    """

    patterns: Patterns
    mean: Float[Tensor, "B K"]
    tril: Float[Tensor, "U K K"]
    precision: Float[Tensor, "U K K"]
    residual: Float[Tensor, "B D"]
    variance: Float[Tensor, " D"]

    @classmethod
    def of(
        cls, x: Tensor, patterns: Patterns, loadings: Tensor, loc: Tensor, variance: Tensor
    ) -> Self:
        """The posterior of the rows of x; its holes may hold any finite number."""
        weighted = loadings / variance[:, None]
        precision = unpacked(patterns.seen @ outer(loadings, weighted), loadings.shape[1])
        precision = precision + torch.eye(loadings.shape[1]).to(precision)
        tril = tril_of_inverse(precision)
        offset = patterns.masked(x - loc)
        factors = patterns.spread(tril)
        mean = _times(_times(offset @ weighted, factors), factors.mT)
        residual = patterns.masked(offset - mean @ loadings.mT)
        return cls(patterns, mean, tril, precision, residual, variance)

    @property
    def half_log_det(self) -> Float[Tensor, " U"]:
        """1/2 log det of the covariance of z, one a pattern."""
        return self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_likelihood(self) -> Float[Tensor, " B"]:
        """log p of what was observed, in nats a datum.

        The quadratic form is r' Psi^-1 r + |m|^2 with r the residual and m the posterior mean,
        which stays accurate where the noise is small.
        """
        quadratic = (self.residual.square() / self.variance).sum(1) + self.mean.square().sum(1)
        constant = self.patterns.seen @ (LOG_2PI + self.variance.log()) - 2 * self.half_log_det
        return -0.5 * (quadratic + self.patterns.spread(constant))

    def predict(
        self, loadings: Float[Tensor, "D K"], loc: Float[Tensor, " D"], num_samples: int
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"], Float[Tensor, "S B D"]]:
        """All cells anew, given what was observed of their rows: mean, sd, and joint draws."""
        along = (loadings @ self.tril).square().sum(-1)  # the variance of w_d' z
        sd = self.patterns.spread((along + self.variance).sqrt()).expand_as(self.residual)
        shape = num_samples, len(self.mean), sum(loadings.shape)
        z, noise = (
            torch.randn(*shape, dtype=loadings.dtype).to(loadings).split(loadings.shape[::-1], -1)
        )
        z = self.mean + (self.patterns.spread(self.tril) @ z.unsqueeze(-1)).squeeze(-1)
        draws = z @ loadings.mT + loc + noise * self.variance.sqrt()
        return self.mean @ loadings.mT + loc, sd, draws


def _times(rows: Float[Tensor, "B K"], matrices: Float[Tensor, "U K K"]) -> Float[Tensor, "B K"]:
    # Each row times its matrix, or all times the only one.
    if len(matrices) == 1:
        return rows @ matrices[0]
    return (rows[:, None] @ matrices)[:, 0]


def tril_of_inverse(matrix: Float[Tensor, "*B K K"]) -> Float[Tensor, "*B K K"]:
    """The lower triangular L with L L' = matrix^-1, for a positive definite matrix.

    With J the exchange matrix and J matrix J = R R', L = (J R J)'^-1.
    """
    reversed_factor = torch.linalg.cholesky(matrix.flip(-2, -1))
    upper_inverse = reversed_factor.flip(-2, -1).mT
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(upper_inverse, eye, upper=False)
