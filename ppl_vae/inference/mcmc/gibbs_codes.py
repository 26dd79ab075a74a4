"""The latent variables of a Gibbs sampler, and the sums over data that depend on them."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.mcmc.wishart import bartlett_factor
from ppl_vae.models.bayesian_ppca import Parameters
from ppl_vae.models.integrated_likelihood import row_posterior
from ppl_vae.models.linear_gaussian import from_tril_vec
from ppl_vae.models.table_statistics import TableStatistics


class Codes(NamedTuple):
    """The latent variables of the transformed rows.

    Attributes:
        rows: z of each row, (C, M, K).
        spread: sums of z z' over the rows of zeros of each pattern that has some, (C, V, K, K).
    """

    rows: Float[Tensor, "C M K"]
    spread: Float[Tensor, "C V K K"]

    def second_moment(self) -> Float[Tensor, "C K K"]:
        """The sum of z z' over all rows."""
        return self.rows.mT @ self.rows + self.spread.sum(-3)

    def transform(self, g: Float[Tensor, "C K K"]) -> "Codes":
        """The codes g z."""
        spread = g.unsqueeze(1) @ self.spread @ g.mT.unsqueeze(1)
        return Codes(self.rows @ g.mT, spread)


def draw_codes(statistics: TableStatistics, parameters: Parameters) -> Codes:
    """z of each transformed row given the parameters."""
    posterior = row_posterior(
        statistics, parameters.loadings, parameters.loc, parameters.column_scale
    )
    tril, noise = posterior.tril, torch.randn_like(posterior.mean)
    if statistics.is_complete:
        noise = torch.linalg.solve_triangular(tril[:, 0].mT, noise.mT, upper=True).mT
    else:
        factors = tril[:, statistics.pattern].mT
        noise = torch.linalg.solve_triangular(factors, noise.unsqueeze(-1), upper=True)
        noise = noise.squeeze(-1)
    tril, freedom = tril[:, statistics.has_zero], statistics.num_zero[statistics.has_zero]
    wishart = bartlett_factor(freedom.expand(tril.shape[:2]), tril.shape[-1])
    factor = torch.linalg.solve_triangular(tril.mT, wishart, upper=True)
    return Codes(posterior.mean + noise, factor @ factor.mT)


def squared_residuals(
    statistics: TableStatistics, parameters: Parameters, codes: Codes
) -> Float[Tensor, "C D"]:
    """The sums over data of (x - mu - W z)^2, for each column."""
    loadings = parameters.loadings
    offset = (parameters.loc - statistics.mean).unsqueeze(-2) * statistics.weight[:, None]
    residual = statistics.rows - offset - codes.rows @ loadings.mT
    if not statistics.is_complete:
        residual = residual * statistics.observed[statistics.pattern]
    rows = loadings.unsqueeze(1)
    spread = ((rows @ codes.spread) * rows).sum(-1)
    spread = (spread * statistics.observed[statistics.has_zero]).sum(1)
    return residual.square().sum(-2) + spread


def moments(
    statistics: TableStatistics, design: Float[Tensor, "C M L"], codes: Codes
) -> Float[Tensor, "C _ L L"]:
    """The sums of (z, 1) (z, 1)' over the data in which each column is observed, L = K + 1; one
    matrix if all are.

    Args:
        statistics: of the data.
        design: (z, c) of each row.
        codes: the same z.
    """
    spread = torch.nn.functional.pad(codes.spread, (0, 1, 0, 1))
    if statistics.is_complete:
        return (design.mT @ design).unsqueeze(1) + spread.sum(1, keepdim=True)
    below, beside = torch.tril_indices(*spread.shape[-2:], device=design.device)
    products = design[..., below] * design[..., beside]
    sums = products.new_zeros(len(design), len(statistics.observed), len(below))
    sums.index_add_(1, statistics.pattern, products)
    sums[:, statistics.has_zero] += spread[..., below, beside]
    return from_tril_vec(statistics.observed.mT @ sums, design.shape[-1])
