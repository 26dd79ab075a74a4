"""The covariance of the completed data, expected given the observed entries.

With m_n and V_n the posterior mean and covariance of row n's code, the missing entries of the row
have mean mu + W m_n and covariance W V_n W' + Psi. The expectation of (x_n - mu) (x_n - mu)' is a
sum of outer products: of the completed row, of the columns of W V_n^1/2, and of those of Psi^1/2,
the latter two restricted to the missing entries.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.data.sources.row_blocks import RowBlock, RowBlocks
from ppl_vae.inference.em.state import LinearGaussianParameters
from ppl_vae.models.linear.eigen import (
    LeadingEigenpairs,
    leading_eigenpairs,
    right_singular_vectors,
)
from ppl_vae.models.linear.linear_gaussian import LatentPosterior, MissingnessPatterns

MAX_DENSE_COLUMNS = 256
"""For tables with more columns the covariance is compressed to some leading directions."""
OVERSAMPLING = 10
"""The number of directions beyond K in the subspace iteration."""


def expected_covariance_factor(
    blocks: RowBlocks, parameters: LinearGaussianParameters
) -> Float[Tensor, "R D"]:
    """F, with F'F the mean over rows of E[(x - mu) (x - mu)' | observed].

    Args:
        blocks: the table.
        parameters: W, mu and psi.
    """
    return _whitened_factor(blocks, parameters, None)[0] * parameters[2].sqrt()


def expected_leading_eigenpairs(
    blocks: RowBlocks, parameters: LinearGaussianParameters
) -> LeadingEigenpairs:
    """The leading eigenpairs of Psi^-1/2 S Psi^-1/2, S = F'F of
    :func:`expected_covariance_factor`.

    For tables with many columns they are those of its compression to a span of leading directions.

    Args:
        blocks: the table.
        parameters: W, mu and psi.
    """
    data_dim, latent_dim = parameters[0].shape
    basis = None
    if data_dim > MAX_DENSE_COLUMNS:
        basis = _leading_basis(blocks, parameters)
    factor, total = _whitened_factor(blocks, parameters, basis)
    values, axes, rest = leading_eigenpairs(*right_singular_vectors(factor), latent_dim)
    if basis is None:
        return values, axes, rest
    return values, basis @ axes, total - values.sum()


def _whitened_factor(
    blocks: RowBlocks, parameters: LinearGaussianParameters, basis: Tensor | None
) -> tuple[Float[Tensor, "R B"], Float[Tensor, ""]]:
    # F Psi^-1/2, with F'F = S, times the basis, by QR; and the sum of its squares without the
    # basis.
    _, loc, variance = parameters
    scale = variance.sqrt()
    factor, num_rows, total = None, 0, torch.zeros_like(loc[0])
    num_missing = torch.zeros_like(loc)
    for completed in _completed(blocks, parameters):
        num_rows += len(completed.centred)
        num_missing = num_missing + completed.num_missing
        rows = torch.cat([completed.centred, completed.latent_factors]) / scale
        total = total + rows.square().sum()
        rows = rows if basis is None else rows @ basis
        rows = rows if factor is None else torch.cat([factor, rows])
        factor = torch.linalg.qr(rows, mode="r").R
    if (processes := blocks.processes).size > 1:
        factor = loc.new_zeros(0, _width(loc, basis)) if factor is None else factor
        sums = torch.cat([num_missing, total[None], loc.new_full((1,), num_rows)])
        sums, factor = processes.sum(sums), processes.gather_rows(factor)
        num_missing, total, num_rows = sums[:-2], sums[-2], int(sums[-1])
    assert factor is not None
    noise = num_missing.sqrt().diag()
    noise = noise if basis is None else noise @ basis
    factor = torch.linalg.qr(torch.cat([factor, noise]), mode="r").R
    return factor / num_rows**0.5, (total + num_missing.sum()) / num_rows


def _width(loc: Tensor, basis: Tensor | None) -> int:
    return len(loc) if basis is None else basis.shape[1]


def _leading_basis(
    blocks: RowBlocks, parameters: LinearGaussianParameters
) -> Float[Tensor, "D B"]:
    # Orthonormal columns that span Psi^-1/2 W and leading directions of the completed rows, by two
    # steps of subspace iteration from random ones (Halko, Martinsson, Tropp: Finding structure
    # with randomness, 2011).
    loadings, _, variance = parameters
    data_dim, latent_dim = loadings.shape
    scale = variance.sqrt()
    normal = np.random.default_rng(0).normal(size=(data_dim, latent_dim + OVERSAMPLING))
    spanning = [loadings / scale[:, None]]
    directions = torch.from_numpy(normal).to(loadings)
    for _ in range(2):
        following = torch.zeros_like(directions)
        for completed in _completed(blocks, parameters):
            whitened = completed.centred / scale
            following += whitened.mT @ (whitened @ directions)
        directions = torch.linalg.qr(blocks.processes.sum(following)).Q
        spanning.append(directions)
    return torch.linalg.qr(torch.cat(spanning, 1)).Q


class _CompletedRows(NamedTuple):
    # The rows less mu, with expectations in place of missing entries; the columns of W V^1/2,
    # zero in observed entries, as rows; and the number of missing entries of each column.
    centred: Float[Tensor, "B D"]
    latent_factors: Float[Tensor, "Q D"]
    num_missing: Float[Tensor, " D"]


def _completed(
    blocks: RowBlocks, parameters: LinearGaussianParameters
) -> Iterator[_CompletedRows]:
    data_dim, latent_dim = parameters[0].shape
    for block in blocks.read(5 * data_dim * (2 + latent_dim)):
        yield _completed_rows(block, *parameters)


def _completed_rows(
    block: RowBlock, loadings: Tensor, loc: Tensor, variance: Tensor
) -> _CompletedRows:
    centred = block.values - loc
    if block.observed is None:
        return _CompletedRows(centred, centred[:0], torch.zeros_like(loc))
    patterns = MissingnessPatterns.distinct(block.observed, loc)
    posterior = LatentPosterior.of(block.values, patterns, loadings, loc, variance)
    centred = torch.where(block.observed, centred, posterior.mean @ loadings.mT)
    counts = patterns.sum_by_pattern(torch.ones_like(posterior.mean[:, :1]))
    factors = posterior.covariances.tril * counts[..., None].sqrt()
    latent_factors = (factors.mT @ loadings.mT) * (1 - patterns.observed)[:, None]
    num_missing = (~block.observed).sum(0).to(loc)
    return _CompletedRows(centred, latent_factors.reshape(-1, len(loc)), num_missing)
