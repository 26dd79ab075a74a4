"""p(z | x) and log p(x) of x | z ~ N(W z + mu, diag(psi)), z ~ N(0, I), with missing values.

Of row n only the observed columns count: with P_n = I + sum_d s_nd w_d w_d' / psi_d (s_nd is 1
where observed, 0 where missing), z | x_n ~ N(P_n^-1 W' Psi^-1 (s_n * (x_n - mu)), P_n^-1). All P_n
are one matrix product of the (N, D) pattern of observed cells with the (D, K (K + 1) / 2) distinct
entries of w_d w_d' / psi_d. Rows that share a pattern share P_n; complete rows have one pattern.

Loadings enter as A = Psi^-1/2 W, so that no noise variance is squared twice and tables of any unit
neither overflow nor underflow; where a Cholesky factorization of P would lose too many digits,
:mod:`ppl_vae.models.principal_axes` does without it.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ppl_vae.data.row_blocks import rows_per_block
from ppl_vae.models.principal_axes import (
    MOST_LOST,
    OwnAxes,
    half_log_det,
    inverse_factor,
    times,
    tril_of_inverse,
)

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
class MissingnessPatterns:
    """Which columns each row has.

    Attributes:
        seen: the distinct patterns, one in a column that is there and zero in a missing value, (U,
            D).
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

    def spread(self, values: Shaped[Tensor, "U ..."]) -> Tensor:
        """Values a pattern as values per row, or one for all."""
        return values if self.which is None else values[self.which]

    def collect(self, values: Float[Tensor, "B ..."]) -> Tensor:
        """Values per row summed over the rows of each pattern."""
        if self.which is not None:
            sums = values.new_zeros(len(self.seen), *values.shape[1:])
            return sums.index_add_(0, self.which, values)
        return values if len(values) == len(self.seen) else values.sum(0, keepdim=True)

    def masked(self, values: Float[Tensor, "B D"]) -> Tensor:
        """Values with zeros in place of missing values."""
        if self.cells is None:
            return values
        # A product takes half the time of a selection.
        if self.which is None:
            return values * self.seen
        return torch.where(self.cells, values, 0.0)


@dataclass(frozen=True)
class LatentPosterior:
    """The posterior of each row.

    Attributes:
        patterns: of the rows.
        mean: of z, (B, K).
        tril: lower factors of the covariances of z, one per pattern, (U, K, K).
        precision: P, the inverse of these covariances, (U, K, K).
        residual: x - mu - W mean, zero where missing, (B, D).
        scale: the square root of psi, (D,).
        half_log_det: 1/2 log det of the covariance of z, one per pattern, (U,).
    """

    patterns: MissingnessPatterns
    mean: Float[Tensor, "B K"]
    tril: Float[Tensor, "U K K"]
    precision: Float[Tensor, "U K K"]
    residual: Float[Tensor, "B D"]
    scale: Float[Tensor, " D"]
    half_log_det: Float[Tensor, " U"]

    @classmethod
    def of(
        cls,
        x: Tensor,
        patterns: MissingnessPatterns,
        loadings: Tensor,
        loc: Tensor,
        variance: Tensor,
    ) -> Self:
        """As :meth:`with_scale`, from the noise variances psi."""
        return cls.with_scale(x, patterns, loadings, loc, variance.sqrt())

    @classmethod
    def with_scale(
        cls,
        x: Float[Tensor, "B D"],
        patterns: MissingnessPatterns,
        loadings: Float[Tensor, "D K"],
        loc: Float[Tensor, " D"],
        scale: Float[Tensor, " D"],
        *,
        look: bool = True,
    ) -> Self:
        """The posterior of the rows of x; where they are missing they may hold any finite number.

        Args:
            x: the rows.
            patterns: which of their cells are observed.
            loadings, loc: W and mu.
            scale: standard deviations of the noise.
            look: whether to look at the precision that is lost, and to solve patterns on their own
                principal axes where it is too much. A recorded program cannot: what is done there
                must not depend on values.

        Raises:
            torch.linalg.LinAlgError: if W'Psi^-1 W is too large for the dtype.
        """
        roots = loadings / scale[:, None]
        eye = torch.eye(roots.shape[1]).to(roots)
        precision = unpacked(patterns.seen @ outer(roots, roots), roots.shape[1]) + eye
        offset, given = patterns.masked(x - loc), (patterns, precision, loadings, scale)
        if not look:
            return cls._plain(offset, tril_of_inverse(precision), *given)
        tril, lost = inverse_factor(precision)
        if not bool((poor := lost > MOST_LOST).any()):
            return cls._plain(offset, tril, *given)
        # The factors of poor patterns are replaced; until then they must be finite.
        tril, _ = inverse_factor(torch.where(poor[:, None, None], eye, precision))
        return cls._plain(offset, tril, *given)._on_own_axes(poor, offset, roots)

    @classmethod
    def _plain(
        cls,
        offset: Tensor,
        tril: Tensor,
        patterns: MissingnessPatterns,
        precision: Tensor,
        loadings: Tensor,
        scale: Tensor,
    ) -> Self:
        factors = patterns.spread(tril)
        weighted = loadings / scale[:, None] / scale[:, None]
        mean = times(times(offset @ weighted, factors), factors.mT)
        residual = patterns.masked(offset - mean @ loadings.mT)
        return cls(patterns, mean, tril, precision, residual, scale, half_log_det(tril))

    def _on_own_axes(
        self, poor: Bool[Tensor, " U"], offset: Float[Tensor, "B D"], roots: Float[Tensor, "D K"]
    ) -> Self:
        # Rows of poor patterns anew, piece by piece: each has loadings on axes of its own.
        which = torch.arange(len(poor), device=poor.device)
        rows = torch.arange(len(self.mean), device=poor.device)
        own = self.patterns.spread(which).expand(len(rows))
        mean, residual, tril, half = self.mean, self.residual, self.tril, self.half_log_det
        for chosen in poor.nonzero().flatten().split(rows_per_block(4 * roots.numel())):
            axes = OwnAxes.of(roots, self.patterns.seen[chosen])
            tril = tril.index_copy(0, chosen, axes.tril)
            half = half.index_copy(0, chosen, axes.half_log_det)
            place = torch.full_like(which, -1).index_copy(0, chosen, which[: len(chosen)])
            theirs = rows[place[own] >= 0]
            for some in theirs.split(rows_per_block(4 * roots.numel())):
                found = axes.solve(place[own[some]], offset[some] / self.scale)
                mean = mean.index_copy(0, some, found[0])
                residual = residual.index_copy(0, some, found[1] * self.scale)
        return replace(self, mean=mean, residual=residual, tril=tril, half_log_det=half)

    @property
    def variance(self) -> Float[Tensor, " D"]:
        """The noise variances psi."""
        return self.scale.square()

    def log_likelihood(self) -> Float[Tensor, " B"]:
        """log p of what was observed, in nats per datum.

        The quadratic form is r' Psi^-1 r + |m|^2 with r the residual and m the posterior mean,
        which stays accurate where the noise is small.
        """
        quadratic = (self.residual / self.scale).square().sum(1) + self.mean.square().sum(1)
        constant = self.patterns.seen @ (LOG_2PI + 2 * self.scale.log()) - 2 * self.half_log_det
        return -0.5 * (quadratic + self.patterns.spread(constant))

    def predict(
        self, loadings: Float[Tensor, "D K"], loc: Float[Tensor, " D"], num_samples: int
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"], Float[Tensor, "S B D"]]:
        """All cells anew, given what was observed of their rows: mean, sd, and joint draws."""
        # The variance of w_d' z, that of the noise being one.
        along = ((loadings / self.scale[:, None]) @ self.tril).square().sum(-1)
        sd = self.patterns.spread(self.scale * (along + 1).sqrt()).expand_as(self.residual)
        shape = num_samples, len(self.mean), sum(loadings.shape)
        z, noise = (
            torch.randn(*shape, dtype=loadings.dtype).to(loadings).split(loadings.shape[::-1], -1)
        )
        z = self.mean + (self.patterns.spread(self.tril) @ z.unsqueeze(-1)).squeeze(-1)
        draws = z @ loadings.mT + loc + noise * self.scale
        return self.mean @ loadings.mT + loc, sd, draws
