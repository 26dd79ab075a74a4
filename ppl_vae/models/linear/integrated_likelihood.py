"""The likelihood of probabilistic PCA and factor analysis, with z integrated out, per draw."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.data.sources.row_blocks import RowBlock, rows_per_block
from ppl_vae.models.linear.linear_gaussian import from_tril_vec
from ppl_vae.models.linear.table_statistics import TableStatistics

LOG_2PI = math.log(2 * math.pi)

Loadings: TypeAlias = Float[Tensor, "*S D K"]
"""W, for each draw of the parameters."""
Loc: TypeAlias = Float[Tensor, "*S D"]
"""mu, for each draw of the parameters."""
NoiseScale: TypeAlias = Float[Tensor, "*S"] | Float[Tensor, "*S D"]
"""sigma, for each draw of the parameters: one for all columns, or one for each."""


def integrated_log_likelihood(
    statistics: TableStatistics, loadings: Loadings, loc: Loc, noise_scale: NoiseScale
) -> Float[Tensor, "*S"]:
    """log p(x_1, ..., x_N | W, mu, sigma) for each draw of the parameters, in nats.

    The observed entries of x_n are N(mu, W W' + Psi). The cost is O(D^2 K) per draw and
    missingness pattern, for any number of data. It is differentiable, and its control flow does
    not depend on the parameters.

    Args:
        statistics: the statistics of the data.
        loadings, loc: W and mu.
        noise_scale: sigma, one for all columns or one for each; as many dimensions as ``loc``
            mean one for each.
    """
    return _blockwise(_log_likelihood, statistics, loadings, loc, noise_scale)


def row_log_likelihood(
    block: RowBlock, loadings: Loadings, loc: Loc, noise_scale: NoiseScale
) -> Float[Tensor, "*S B"]:
    """log p(x_n | W, mu, sigma) of each row and each draw of the parameters, in nats."""
    rows = TableStatistics.of_rows(block)
    return _blockwise(_row_log_likelihood, rows, loadings, loc, noise_scale)


def _blockwise(
    function: Callable[..., Tensor],
    statistics: TableStatistics,
    loadings: Tensor,
    loc: Tensor,
    noise_scale: Tensor,
) -> Tensor:
    # A function of statistics, W, mu and one sigma per column, for blocks of draws.
    shape, (data_dim, latent_dim) = loc.shape[:-1], loadings.shape[-2:]
    scale = noise_scale if noise_scale.dim() == loc.dim() else noise_scale.unsqueeze(-1)
    draws = (
        loadings.reshape(-1, data_dim, latent_dim),
        loc.reshape(-1, data_dim),
        scale.expand(loc.shape).reshape(-1, data_dim),
    )
    floats = len(statistics.rows) * (3 * data_dim + latent_dim**2)
    blocks = zip(*(part.split(rows_per_block(floats)) for part in draws), strict=True)
    values = torch.cat([function(statistics, *block) for block in blocks])
    return values.reshape((*shape, *values.shape[1:]))


class RowPosterior(NamedTuple):
    """p(z | row) of the rows of :class:`TableStatistics`, for each draw of the parameters.

    Attributes:
        mean: (S, M, K).
        tril: Cholesky factors of the precisions, one per pattern, (S, U, K, K).
        residual: Psi^-1/2 (row - c mu - W mean), zero where missing, (S, M, D).
    """

    mean: Float[Tensor, "S M K"]
    tril: Float[Tensor, "S U K K"]
    residual: Float[Tensor, "S M D"]

    @property
    def half_log_det(self) -> Float[Tensor, "S U"]:
        """1/2 log det of the precisions."""
        return self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def latent_precision_factors(
    statistics: TableStatistics, scaled: Float[Tensor, "S D K"]
) -> Float[Tensor, "S U K K"]:
    """Cholesky factors of the precisions I + A'A of z, over the observed columns of each pattern.

    Args:
        statistics: the statistics of the data.
        scaled: A = Psi^-1/2 W.
    """
    eye = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    if statistics.is_complete:
        return torch.linalg.cholesky(scaled.mT @ scaled + eye).unsqueeze(-3)
    below, beside = torch.tril_indices(*eye.shape, device=eye.device)
    products = statistics.observed @ (scaled[..., below] * scaled[..., beside])
    return torch.linalg.cholesky(from_tril_vec(products, len(eye)) + eye)


def row_posterior(
    statistics: TableStatistics,
    loadings: Float[Tensor, "S D K"],
    loc: Float[Tensor, "S D"],
    scale: Float[Tensor, "S D"],
) -> RowPosterior:
    """p(z | row) of each row, with A = Psi^-1/2 W: precision I + A'A over observed columns."""
    scaled = loadings / scale.unsqueeze(-1)
    offset = statistics.weight[:, None] * (loc - statistics.mean).unsqueeze(-2)
    rows = (statistics.rows - offset) / scale.unsqueeze(-2)
    tril = latent_precision_factors(statistics, scaled)
    if statistics.is_complete:
        mean = torch.cholesky_solve(scaled.mT @ rows.mT, tril[:, 0]).mT
        return RowPosterior(mean, tril, rows - mean @ scaled.mT)
    observed = statistics.observed[statistics.pattern]
    score = (rows * observed) @ scaled
    mean = torch.cholesky_solve(score.unsqueeze(-1), tril[:, statistics.pattern]).squeeze(-1)
    return RowPosterior(mean, tril, (rows - mean @ scaled.mT) * observed)


def _row_log_likelihood(
    statistics: TableStatistics, loadings: Tensor, loc: Tensor, scale: Tensor
) -> Float[Tensor, "S M"]:
    posterior = row_posterior(statistics, loadings, loc, scale)
    quadratic = posterior.residual.square().sum(-1) + posterior.mean.square().sum(-1)
    log_variances = (LOG_2PI + 2 * scale.log()) @ statistics.observed.mT
    constants = log_variances + 2 * posterior.half_log_det
    return -0.5 * (quadratic + constants[:, statistics.pattern])


def _log_likelihood(
    statistics: TableStatistics, loadings: Tensor, loc: Tensor, scale: Tensor
) -> Float[Tensor, " S"]:
    # The quadratic form of v ~ N(0, A A' + I) is |v - A m|^2 + |m|^2 with m the mean of z: it is
    # the minimum over m, so that errors of m enter squared.
    posterior = row_posterior(statistics, loadings, loc, scale)
    quadratic = posterior.residual.square().sum((-2, -1)) + posterior.mean.square().sum((-2, -1))
    log_variances = (LOG_2PI + 2 * scale.log()) @ statistics.columns.count
    return -0.5 * (quadratic + log_variances) - posterior.half_log_det @ statistics.counts
