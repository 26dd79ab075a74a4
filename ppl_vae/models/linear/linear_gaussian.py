"""p(z | x) and log p(x) of x | z ~ N(W z + mu, diag(psi)), z ~ N(0, I), with missing values.

Only the observed columns of row n enter: with P_n = I + sum_d s_nd w_d w_d' / psi_d (s_nd is 1 if
observed and 0 if missing), z | x_n ~ N(P_n^-1 W' Psi^-1 (s_n * (x_n - mu)), P_n^-1). All P_n are
one matrix product of the (N, D) matrix of observed indicators with the (D, K (K + 1) / 2) distinct
entries of w_d w_d' / psi_d. Rows with the same missingness pattern share P_n.

Loadings enter as A = Psi^-1/2 W, so that no noise variance is squared twice and tables in any
units neither overflow nor underflow. If a Cholesky factorization of P would lose too many digits,
``ppl_vae.models.linear.principal_axes`` computes the posterior without it.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ppl_vae.data.sources.row_blocks import rows_per_block
from ppl_vae.models.linear.principal_axes import (
    MAX_PRECISION_LOSS,
    PatternAxes,
    half_log_det,
    inverse_factor,
    rowwise_product,
    tril_of_inverse,
)

LOG_2PI = math.log(2 * math.pi)


def tril_vec(matrices: Float[Tensor, "*B K K"]) -> Float[Tensor, "*B P"]:
    """The lower triangles of symmetric matrices as vectors, P = K (K + 1) / 2."""
    rows, columns = _tril_indices(matrices.shape[-1], matrices.device)
    return matrices[..., rows, columns]


def outer_tril(first: Float[Tensor, "B K"], second: Float[Tensor, "B K"]) -> Float[Tensor, "B P"]:
    """The lower triangles of the outer products of corresponding rows, a_b c_b', as vectors."""
    rows, columns = _tril_indices(first.shape[-1], first.device)
    return first[:, rows] * second[:, columns]


def from_tril_vec(vectors: Float[Tensor, "*B P"], size: int) -> Float[Tensor, "*B K K"]:
    """The symmetric matrices with these lower triangles."""
    rows, columns = _tril_indices(size, vectors.device)
    where = torch.zeros(size, size, dtype=torch.long, device=vectors.device)
    where[rows, columns] = where[columns, rows] = torch.arange(len(rows), device=vectors.device)
    return vectors[..., where]


def _tril_indices(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(size, size, device=device)
    return rows, columns


@dataclass(frozen=True)
class MissingnessPatterns:
    """The distinct patterns of observed columns in a block of rows.

    Attributes:
        observed: the distinct patterns, one in observed columns and zero in missing ones, (U, D).
        index: the pattern of each row, (B,); None if each row has its own, or all share one.
        mask: True where observed, (B, D); None if nothing is missing.
    """

    observed: Float[Tensor, "U D"]
    index: Int[Tensor, " B"] | None
    mask: Bool[Tensor, "B D"] | None

    @classmethod
    def complete(cls, like: Float[Tensor, " D"]) -> Self:
        """The pattern of complete rows of this width, dtype and device."""
        return cls(torch.ones_like(like)[None], None, None)

    @classmethod
    def each(cls, mask: Bool[Tensor, "B D"], like: Tensor) -> Self:
        """A pattern of its own for each row, in the dtype of ``like``."""
        return cls(mask.to(like), None, mask)

    @classmethod
    def distinct(cls, mask: Bool[Tensor, "B D"], like: Tensor) -> Self:
        """The distinct patterns, each shared by the rows that have it."""
        bits = np.packbits(mask.cpu().numpy(), axis=1)
        keys = bits.view(np.dtype((np.void, bits.shape[1]))).ravel()
        _, first, index = np.unique(keys, return_index=True, return_inverse=True)
        if len(first) == len(mask):
            return cls.each(mask, like)
        distinct = mask[torch.from_numpy(first).to(mask.device)].to(like)
        return cls(distinct, torch.from_numpy(index.reshape(-1)).to(mask.device), mask)

    def gather_rows(self, values: Shaped[Tensor, "U ..."]) -> Tensor:
        """Values per pattern as values per row; one value if all rows share a pattern."""
        return values if self.index is None else values[self.index]

    def sum_by_pattern(self, values: Float[Tensor, "B ..."]) -> Tensor:
        """Values per row summed over the rows of each pattern."""
        if self.index is not None:
            sums = values.new_zeros(len(self.observed), *values.shape[1:])
            return sums.index_add_(0, self.index, values)
        return values if len(values) == len(self.observed) else values.sum(0, keepdim=True)

    def zero_missing(self, values: Float[Tensor, "B D"]) -> Tensor:
        """Values with zeros for missing entries."""
        if self.mask is None:
            return values
        # A product takes half the time of a selection.
        if self.index is None:
            return values * self.observed
        return torch.where(self.mask, values, 0.0)


@dataclass(frozen=True)
class PatternCovariances:
    """The covariance of z given the observed entries, one per missingness pattern.

    Attributes:
        tril: its Cholesky factors, (U, K, K).
        precision: P, its inverses, (U, K, K).
        half_log_det: 1/2 log det of it, (U,).
    """

    tril: Float[Tensor, "U K K"]
    precision: Float[Tensor, "U K K"]
    half_log_det: Float[Tensor, " U"]

    @classmethod
    def of(cls, tril: Float[Tensor, "U K K"], precision: Float[Tensor, "U K K"]) -> Self:
        """The covariances with these Cholesky factors and inverses."""
        return cls(tril, precision, half_log_det(tril))


@dataclass(frozen=True)
class LatentPosterior:
    """The posterior p(z | x) of each row.

    Attributes:
        patterns: the patterns of the rows.
        mean: the mean of z, (B, K).
        covariances: the covariances of z, one per pattern.
        residual: x - mu - W mean, zero for missing entries, (B, D).
        scale: the noise standard deviations, (D,).
    """

    patterns: MissingnessPatterns
    mean: Float[Tensor, "B K"]
    covariances: PatternCovariances
    residual: Float[Tensor, "B D"]
    scale: Float[Tensor, " D"]

    @classmethod
    def of(
        cls,
        x: Tensor,
        patterns: MissingnessPatterns,
        loadings: Tensor,
        loc: Tensor,
        variance: Tensor,
    ) -> Self:
        """The same as :meth:`with_scale`, from the noise variances psi."""
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
        check_precision: bool = True,
    ) -> Self:
        """The posterior of the rows of x, whose missing entries may hold any finite number.

        Args:
            x: the rows.
            patterns: their missingness patterns.
            loadings, loc: W and mu.
            scale: the noise standard deviations.
            check_precision: whether to check how much precision the Cholesky factorization loses,
                and to compute patterns that lose too much on their principal axes. It must be
                False in a recorded program, whose control flow must not depend on values.

        Raises:
            torch.linalg.LinAlgError: if W'Psi^-1 W is too large for the dtype.
        """
        scaled = loadings / scale[:, None]
        size = scaled.shape[1]
        eye = torch.eye(size, dtype=scaled.dtype, device=scaled.device)
        precision = from_tril_vec(patterns.observed @ outer_tril(scaled, scaled), size) + eye
        offset, shared = patterns.zero_missing(x - loc), (patterns, precision, loadings, scale)
        if not check_precision:
            return cls._from_factors(offset, tril_of_inverse(precision), *shared)
        tril, loss = inverse_factor(precision)
        if not bool((inaccurate := loss > MAX_PRECISION_LOSS).any()):
            return cls._from_factors(offset, tril, *shared)
        # The factors of inaccurate patterns are replaced; until then they must be finite.
        tril, _ = inverse_factor(torch.where(inaccurate[:, None, None], eye, precision))
        plain = cls._from_factors(offset, tril, *shared)
        return plain._with_pattern_axes(inaccurate, offset, scaled)

    @classmethod
    def _from_factors(
        cls,
        offset: Tensor,
        tril: Tensor,
        patterns: MissingnessPatterns,
        precision: Tensor,
        loadings: Tensor,
        scale: Tensor,
    ) -> Self:
        factors = patterns.gather_rows(tril)
        weighted = loadings / scale[:, None] / scale[:, None]
        mean = rowwise_product(rowwise_product(offset @ weighted, factors), factors.mT)
        residual = patterns.zero_missing(offset - mean @ loadings.mT)
        covariances = PatternCovariances.of(tril, precision)
        return cls(patterns, mean, covariances, residual, scale)

    def _with_pattern_axes(
        self,
        inaccurate: Bool[Tensor, " U"],
        offset: Float[Tensor, "B D"],
        scaled: Float[Tensor, "D K"],
    ) -> Self:
        # Recomputes the rows of inaccurate patterns in batches, on axes of each pattern's own.
        numbers = torch.arange(len(inaccurate), device=inaccurate.device)
        rows = torch.arange(len(self.mean), device=inaccurate.device)
        pattern = self.patterns.gather_rows(numbers).expand(len(rows))
        mean, residual = self.mean, self.residual
        tril, half = self.covariances.tril, self.covariances.half_log_det
        batch_size = rows_per_block(4 * scaled.numel())
        for chosen in inaccurate.nonzero().flatten().split(batch_size):
            axes = PatternAxes.of(scaled, self.patterns.observed[chosen])
            tril = tril.index_copy(0, chosen, axes.tril)
            half = half.index_copy(0, chosen, axes.half_log_det)
            place = torch.full_like(numbers, -1).index_copy(0, chosen, numbers[: len(chosen)])
            for batch in rows[place[pattern] >= 0].split(batch_size):
                solved = axes.solve(place[pattern[batch]], offset[batch] / self.scale)
                mean = mean.index_copy(0, batch, solved[0])
                residual = residual.index_copy(0, batch, solved[1] * self.scale)
        covariances = replace(self.covariances, tril=tril, half_log_det=half)
        return replace(self, mean=mean, residual=residual, covariances=covariances)

    @property
    def variance(self) -> Float[Tensor, " D"]:
        """The noise variances psi."""
        return self.scale.square()

    def log_likelihood(self) -> Float[Tensor, " B"]:
        """log p of the observed entries, in nats per datum.

        The quadratic form is r' Psi^-1 r + |m|^2 with r the residual and m the posterior mean,
        which is accurate even if the noise is small.
        """
        quadratic = (self.residual / self.scale).square().sum(1) + self.mean.square().sum(1)
        log_variances = LOG_2PI + 2 * self.scale.log()
        constant = self.patterns.observed @ log_variances - 2 * self.covariances.half_log_det
        return -0.5 * (quadratic + self.patterns.gather_rows(constant))

    def predict(
        self, loadings: Float[Tensor, "D K"], loc: Float[Tensor, " D"], num_samples: int
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"], Float[Tensor, "S B D"]]:
        """The predictive distribution of all entries given the observed ones of their rows.

        Returns:
            Its mean, its standard deviation, and joint draws for each row.
        """
        # The variance of w_d' z in units of the noise variance.
        tril = self.covariances.tril
        explained = ((loadings / self.scale[:, None]) @ tril).square().sum(-1)
        sd = self.patterns.gather_rows(self.scale * (explained + 1).sqrt())
        sd = sd.expand_as(self.residual)
        shape = num_samples, len(self.mean), sum(loadings.shape)
        z, noise = (
            torch.randn(*shape, dtype=loadings.dtype).to(loadings).split(loadings.shape[::-1], -1)
        )
        z = self.mean + (self.patterns.gather_rows(tril) @ z.unsqueeze(-1)).squeeze(-1)
        draws = z @ loadings.mT + loc + noise * self.scale
        return self.mean @ loadings.mT + loc, sd, draws
