"""The covariance of all cells of a table with missing values, expected given the observed ones.

With m_n and V_n the posterior mean and covariance of row n's code, its missing cells have mean
mu + W m_n and covariance W V_n W' + Psi. The expectation of (x_n - mu) (x_n - mu)' is a sum of
outer products: of the completed row, of the columns of W V_n^1/2, and of those of Psi^1/2, the
latter two in the missing cells alone.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.data.row_blocks import RowBlocks
from ppl_vae.models.eigen import LeadingEigenpairs, leading_eigenpairs, right_singular_vectors
from ppl_vae.models.linear_gaussian import LatentPosterior, MissingnessPatterns

DENSE = 256
"""For tables of more columns the covariance is compressed to some leading directions."""
MORE = 10
"""So many directions are followed beside K."""


def expected_factor(
    blocks: RowBlocks,
    loadings: Float[Tensor, "D K"],
    loc: Float[Tensor, " D"],
    variance: Float[Tensor, " D"],
) -> Float[Tensor, "R D"]:
    """F, with F'F the mean over rows of E[(x - mu) (x - mu)' | observed].

    Args:
        blocks: the table.
        loadings, loc, variance: W, mu and psi.
    """
    return _whitened_factor(blocks, loadings, loc, variance, None)[0] * variance.sqrt()


def expected_leading(
    blocks: RowBlocks,
    loadings: Float[Tensor, "D K"],
    loc: Float[Tensor, " D"],
    variance: Float[Tensor, " D"],
) -> LeadingEigenpairs:
    """The leading eigenvalues of Psi^-1/2 S Psi^-1/2, with S = F'F of :func:`expected_factor`.

    Of a table of many columns they are those of its compression to a span of leading directions.

    Args:
        blocks: the table.
        loadings, loc, variance: W, mu and psi.
    """
    data_dim, latent_dim = loadings.shape
    basis = None
    if data_dim > DENSE:
        basis = _leading_basis(blocks, loadings, loc, variance)
    factor, total = _whitened_factor(blocks, loadings, loc, variance, basis)
    values, axes, rest = leading_eigenpairs(*right_singular_vectors(factor), latent_dim)
    if basis is None:
        return values, axes, rest
    return values, basis @ axes, total - values.sum()


def _whitened_factor(
    blocks: RowBlocks, loadings: Tensor, loc: Tensor, variance: Tensor, basis: Tensor | None
) -> tuple[Float[Tensor, "R B"], Float[Tensor, ""]]:
    # F Psi^-1/2, with F'F = S and the basis multiplied to it, by QR; and the sum of its squares
    # without the basis.
    scale = variance.sqrt()
    factor, rows, total = None, 0, torch.zeros_like(loc[0])
    hidden = torch.zeros_like(loc)
    for completed, spread, missing in _rows(blocks, loadings, loc, variance):
        rows, hidden = rows + len(completed), hidden + missing
        parts = torch.cat([completed, spread]) / scale
        total = total + parts.square().sum()
        parts = parts if basis is None else parts @ basis
        parts = parts if factor is None else torch.cat([factor, parts])
        factor = torch.linalg.qr(parts, mode="r").R
    assert factor is not None
    noise = hidden.sqrt().diag()
    noise = noise if basis is None else noise @ basis
    factor = torch.linalg.qr(torch.cat([factor, noise]), mode="r").R
    return factor / rows**0.5, (total + hidden.sum()) / rows


def _leading_basis(
    blocks: RowBlocks, loadings: Tensor, loc: Tensor, variance: Tensor
) -> Float[Tensor, "D B"]:
    # Orthonormal columns that span Psi^-1/2 W and leading directions of the completed rows, by two
    # steps of subspace iteration from random ones (Halko, Martinsson, Tropp: Finding structure
    # with randomness, 2011).
    data_dim, latent_dim = loadings.shape
    scale = variance.sqrt()
    normal = np.random.default_rng(0).normal(size=(data_dim, latent_dim + MORE))
    found = [loadings / scale[:, None]]
    directions = torch.from_numpy(normal).to(loadings)
    for _ in range(2):
        following = torch.zeros_like(directions)
        for completed, _, _ in _rows(blocks, loadings, loc, variance):
            whitened = completed / scale
            following += whitened.mT @ (whitened @ directions)
        directions = torch.linalg.qr(following).Q
        found.append(directions)
    return torch.linalg.qr(torch.cat(found, 1)).Q


def _rows(
    blocks: RowBlocks, loadings: Tensor, loc: Tensor, variance: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    # Completed rows less mu; the columns of W V^1/2 in missing cells, as rows; missing cells.
    data_dim, latent_dim = loadings.shape
    for block in blocks.read(5 * data_dim * (2 + latent_dim)):
        patterns = MissingnessPatterns.complete(loc)
        if block.observed is not None:
            patterns = MissingnessPatterns.shared(block.observed, loc)
        found = LatentPosterior.of(block.values, patterns, loadings, loc, variance)
        completed, missing = block.values - loc, torch.zeros_like(loc)
        spread = completed[:0]
        if block.observed is not None:
            completed = torch.where(block.observed, completed, found.mean @ loadings.mT)
            missing = (~block.observed).sum(0).to(loc)
            counts = patterns.sum_by_pattern(torch.ones_like(found.mean[:, :1]))
            factors = found.tril * counts[..., None].sqrt()
            absent = 1 - patterns.observed
            spread = (factors.mT @ loadings.mT) * absent[:, None]
            spread = spread.reshape(-1, data_dim)
        yield completed, spread, missing
