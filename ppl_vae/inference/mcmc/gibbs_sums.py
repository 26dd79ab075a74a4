"""The latent variables of a Gibbs sampler, through the sums over data that depend on them."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.mcmc.wishart import bartlett_factor, half_degrees
from ppl_vae.models.bayesian_ppca import ParameterDraws
from ppl_vae.models.linear.integrated_likelihood import latent_precision_factors
from ppl_vae.models.linear.linear_gaussian import from_tril_vec
from ppl_vae.models.linear.table_statistics import TableStatistics


class CodeSums(NamedTuple):
    """Sums over data of products with v = (z, 1), a vector of length L = K + 1.

    Attributes:
        total: the sum of v v' over all data, (C, L, L).
        gram: the sum of v v' over the data in which a column is observed, (C, D, L, L), or (C, 1,
            L, L) if all columns are.
        cross: the sum of (x_d - mean_d) v over the same data, (C, D, L).
    """

    total: Float[Tensor, "C L L"]
    gram: Float[Tensor, "C _ L L"]
    cross: Float[Tensor, "C D L"]

    def transform(self, g: Float[Tensor, "C L L"]) -> "CodeSums":
        """The sums of g v in place of v."""
        total = g @ self.total @ g.mT
        if self.gram.shape[1] == 1:
            gram = total.unsqueeze(1)
        else:
            gram = g.unsqueeze(1) @ self.gram @ g.mT.unsqueeze(1)
        return CodeSums(total, gram, self.cross @ g.mT)

    def squared_residuals(
        self, squares: Float[Tensor, "*C D"], coefficients: Float[Tensor, "C D L"]
    ) -> Float[Tensor, "C D"]:
        """The sums over data of (x_d - mean_d - theta_d' v)^2, for each column.

        Rounding makes an error of about 1e-16 of the sum of squares of the column.

        Args:
            squares: the sums of (x_d - mean_d)^2.
            coefficients: theta = [W, mu - mean], (D, K + 1).
        """
        if self.gram.shape[1] == 1:
            fitted = coefficients @ self.gram[:, 0]
        else:
            fitted = (coefficients.unsqueeze(-2) @ self.gram).squeeze(-2)
        explained = (coefficients * (2 * self.cross - fitted)).sum(-1)
        return (squares - explained).clamp_min(0.0)


@dataclass(frozen=True)
class CodeSampler:
    """Draws of the latent variables of a table's transformed rows.

    Attributes:
        statistics: the statistics of the table.
        latent_dim: K.
    """

    statistics: TableStatistics
    latent_dim: int

    @cached_property
    def squares(self) -> Float[Tensor, "*C D"]:
        """The sums of (x_d - mean_d)^2."""
        return self.statistics.rows.square().sum(-2)

    @cached_property
    def _zero_degrees(self) -> Float[Tensor, "V K"]:
        freedom = self.statistics.num_zero[self.statistics.has_zero]
        return half_degrees(freedom, self.latent_dim)

    @cached_property
    def _below(self) -> Tensor:
        # These are the row and column indices of the lower triangle of v v'.
        return torch.tril_indices(
            self.latent_dim + 1, self.latent_dim + 1, device=self.statistics.rows.device
        )

    def draw(self, parameters: ParameterDraws) -> CodeSums:
        """The sums with z drawn from p(z | x, parameters), for each chain."""
        z, factor = self.draw_rows(parameters)
        weight = self.statistics.weight[:, None].expand(*z.shape[:-1], 1)
        design = torch.cat([z, weight], -1)
        spread = torch.nn.functional.pad(factor @ factor.mT, (0, 1, 0, 1))
        return self._sums(design, spread)

    def draw_rows(
        self, parameters: ParameterDraws
    ) -> tuple[Float[Tensor, "C M K"], Float[Tensor, "C V K K"]]:
        """z of each transformed row, and for the rows of zeros of each pattern that has some a
        factor F with F F' the sum of z z'."""
        scale = parameters.column_scale.unsqueeze(-1)
        scaled = parameters.loadings / scale
        tril = latent_precision_factors(self.statistics, scaled)
        eye = torch.eye(self.latent_dim, dtype=scaled.dtype, device=scaled.device)
        inverse = torch.linalg.solve_triangular(tril, eye.expand_as(tril), upper=False)
        z = self._draw_rows(parameters, scaled / scale, inverse)
        return z, self._draw_factor(inverse)

    def _draw_rows(
        self,
        parameters: ParameterDraws,
        weighted: Float[Tensor, "C D K"],
        inverse: Float[Tensor, "C U K K"],
    ) -> Float[Tensor, "C M K"]:
        # With P = L L' the precision of z and s the score, z = L'^-1 (L^-1 s + e).
        statistics = self.statistics
        offset = (parameters.loc - statistics.mean).unsqueeze(-2)
        weight, score = statistics.weight[:, None], statistics.rows @ weighted
        if statistics.is_complete:
            score = score - weight * (offset @ weighted)
            return (score @ inverse[:, 0].mT + torch.randn_like(score)) @ inverse[:, 0]
        means = (statistics.observed * offset) @ weighted
        score = score - weight * means[:, statistics.pattern]
        inverse = inverse[:, statistics.pattern]
        half = (inverse @ score.unsqueeze(-1)).squeeze(-1) + torch.randn_like(score)
        return (half.unsqueeze(-2) @ inverse).squeeze(-2)

    def _draw_factor(self, inverse: Float[Tensor, "C U K K"]) -> Float[Tensor, "C V K K"]:
        # For rows of zeros z is N(0, P^-1), and the sum of z z' is Wishart.
        degrees = self._zero_degrees.expand(len(inverse), *self._zero_degrees.shape)
        if len(self.statistics.observed) > 1:
            inverse = inverse[:, self.statistics.has_zero]
        return inverse[:, : degrees.shape[1]].mT @ bartlett_factor(degrees)

    def _sums(self, design: Float[Tensor, "C M L"], spread: Float[Tensor, "C V L L"]) -> CodeSums:
        statistics = self.statistics
        cross = statistics.rows.mT @ design
        total = design.mT @ design + spread.sum(1)
        if statistics.is_complete:
            return CodeSums(total, total.unsqueeze(1), cross)
        below, beside = self._below
        products = design[..., below] * design[..., beside]
        sums = products.new_zeros(len(design), len(statistics.observed), len(below))
        sums.index_add_(1, statistics.pattern, products)
        sums[:, statistics.has_zero] += spread[..., below, beside]
        gram = from_tril_vec(statistics.observed.mT @ sums, design.shape[-1])
        return CodeSums(total, gram, cross)

    def scatter(self, parameters: ParameterDraws) -> Float[Tensor, "C D D"]:
        """The sum of (x - mu) (x - mu)' over data, with missing values drawn given the others."""
        statistics = self.statistics
        offset = (parameters.loc - statistics.mean).unsqueeze(-2) * statistics.weight[:, None]
        rows = statistics.rows - offset
        if statistics.is_complete:
            return rows.mT @ rows
        z, factor = self.draw_rows(parameters)
        scale = parameters.column_scale.unsqueeze(-2)
        drawn = z @ parameters.loadings.mT + scale * torch.randn_like(rows)
        rows = torch.where(statistics.observed[statistics.pattern] > 0, rows, drawn)
        return rows.mT @ rows + self._zero_rows(parameters, factor)

    def _zero_rows(
        self, parameters: ParameterDraws, factor: Float[Tensor, "C V K K"]
    ) -> Float[Tensor, "C D D"] | float:
        # The missing values x = W z + e of n rows of zeros: with Z'Z = F F' and e independent of
        # it, X'X = (F'W' + G)' (F'W' + G) + a Wishart matrix with n - K degrees of freedom, G and
        # the latter in units of the noise.
        statistics = self.statistics
        hidden = 1 - statistics.observed[statistics.has_zero]
        some = hidden.any(-1)
        hidden, factor = hidden[some].unsqueeze(-2), factor[:, some]
        if not len(hidden):
            return 0.0
        scale = parameters.column_scale[:, None, None]
        mean = factor.mT @ parameters.loadings.mT.unsqueeze(1)
        rows = (mean + scale * torch.randn_like(mean)) * hidden
        freedom = statistics.num_zero[statistics.has_zero][some] - factor.shape[-1]
        degrees = half_degrees(freedom, hidden.shape[-1]).expand(len(rows), -1, -1)
        noise = bartlett_factor(degrees).mT * scale * hidden
        return (rows.mT @ rows + noise.mT @ noise).sum(1)
