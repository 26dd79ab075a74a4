"""Moves of a Gibbs sampler in the noise, with z integrated out.

Where the data hardly distinguish the noise of a column from a factor of its own, w_d and sigma_d^2
given z change by little: z determines what is noise. With z integrated out, and given the
parameters of the other columns, x_d is a regression on the mean m of z given the other columns,

    x_d | x_-d ~ N(mu_d + w_d' m, v),   v = sigma_d^2 + w_d' V w_d,

with V the covariance of z given the other columns. The likelihood depends on w_d and v only, so
that variance moves between sigma_d^2 and w_d' V w_d freely. Two moves leave the posterior
invariant; each chooses among the current value and proposals, with probabilities proportional to
the ratios of target and proposal densities:

* w_d given v: the target is normal but for the prior of sigma_d^2 = v - w_d' V w_d, and the
  proposals lie on an ellipse through the current value and a draw of that normal distribution
  (Murray, Adams, MacKay 2010).
* v given w_d: proposals are from the inverse gamma distribution that v has if w_d is zero.

Isotropic noise depends on z the more, the smaller D - K is. Given W its
likelihood with z integrated out is a product over the principal axes of W W', and the proposals
are from the distribution that the other D - K directions give it.

Missing values are drawn first, given the parameters.

References:
    Murray, Adams, MacKay: Elliptical slice sampling (2010).
    Liu, Wong, Kong: Covariance structure of the Gibbs sampler (1994).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.inference.mcmc.gibbs_priors import ConjugatePriors
from ppl_vae.inference.mcmc.gibbs_sums import CodeSampler
from ppl_vae.inference.mcmc.wishart import standard_gamma
from ppl_vae.models.bayesian_ppca import ParameterDraws

NUM_PROPOSALS = 16
"""Values among which a move chooses, the current one included."""
COLUMNS_PER_SWEEP = 8
"""The largest number of columns that are moved in a sweep; they are chosen at random."""


class _Regression(NamedTuple):
    """x_d on m over the data: sums of m m', of x_d m and of x_d^2, and V.

    Attributes:
        gram: (C, K, K).
        cross: (C, K).
        squares: (C,).
        covariance: V, (C, K, K).
    """

    gram: Float[Tensor, "C K K"]
    cross: Float[Tensor, "C K"]
    squares: Float[Tensor, " C"]
    covariance: Float[Tensor, "C K K"]

    @classmethod
    def of(
        cls, parameters: ParameterDraws, scatter: Float[Tensor, "C D D"], d: int
    ) -> "_Regression":
        scaled = parameters.loadings / parameters.noise_scale.unsqueeze(-1)
        scaled[:, d] = 0.0
        precision = scaled.mT @ scaled
        precision.diagonal(dim1=-2, dim2=-1).add_(1.0)
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        means = (scaled / parameters.noise_scale.unsqueeze(-1)) @ covariance  # m = means' x
        sums = scatter @ means
        return cls(means.mT @ sums, sums[:, d], scatter[:, d, d], covariance)

    def communality(self, loadings: Float[Tensor, "C P K"]) -> Float[Tensor, "C P"]:
        """w' V w of several w."""
        return ((loadings @ self.covariance) * loadings).sum(-1)

    def residual(self, loadings: Float[Tensor, "C K"]) -> Float[Tensor, " C"]:
        """The sum over data of (x_d - w' m)^2."""
        fitted = (loadings.unsqueeze(-2) @ self.gram).squeeze(-2)
        return self.squares - (loadings * (2 * self.cross - fitted)).sum(-1)


@dataclass(frozen=True)
class MarginalMove:
    """A move of parameters with z integrated out.

    Attributes:
        codes: the codes of the table.
        priors: the priors of the parameters.
    """

    codes: CodeSampler
    priors: ConjugatePriors

    def move(self, parameters: ParameterDraws) -> ParameterDraws:
        """The parameters of each chain after the move."""
        raise NotImplementedError


class ColumnMoves(MarginalMove):
    """Moves of the parameters of single columns, several in turn, under diagonal noise."""

    def move(self, parameters: ParameterDraws) -> ParameterDraws:
        """The parameters after moves of some columns, chosen at random."""
        scatter = self.codes.scatter(parameters)
        parameters = parameters._replace(
            loadings=parameters.loadings.clone(), noise_scale=parameters.noise_scale.clone()
        )
        prior_precision = self.priors.row_precision(parameters.relevance)[..., :-1]
        for d in torch.randperm(scatter.shape[-1])[:COLUMNS_PER_SWEEP].tolist():
            regression = _Regression.of(parameters, scatter, d)
            loadings, variance = self._move_loadings(
                regression,
                parameters.loadings[:, d],
                parameters.noise_scale[:, d].square(),
                prior_precision[..., d, :],
                d,
            )
            variance = self._move_variance(regression, loadings, variance, d)
            parameters.loadings[:, d] = loadings
            parameters.noise_scale[:, d] = variance.sqrt()
        return parameters

    def _move_loadings(
        self,
        regression: _Regression,
        loadings: Float[Tensor, "C K"],
        variance: Float[Tensor, " C"],
        prior_precision: Float[Tensor, "#C K"] | Float[Tensor, " K"],
        d: int,
    ) -> tuple[Float[Tensor, "C K"], Float[Tensor, " C"]]:
        # w_d, and sigma_d^2 such that v stays.
        total = variance + regression.communality(loadings.unsqueeze(1)).squeeze(1)
        precision = regression.gram / total[:, None, None]
        precision.diagonal(dim1=-2, dim2=-1).add_(prior_precision)
        tril = torch.linalg.cholesky(precision)
        score = (regression.cross / total[:, None]).unsqueeze(-1)
        mean = torch.cholesky_solve(score, tril).mT
        other = torch.linalg.solve_triangular(tril.mT, torch.randn_like(score), upper=True).mT
        angle = 2 * math.pi * torch.rand(len(total), NUM_PROPOSALS - 1, 1).to(total)
        here = loadings.unsqueeze(1)
        trials = mean + (here - mean) * angle.cos() + other * angle.sin()
        variances = total[:, None] - regression.communality(trials)
        trials = torch.cat([here, trials], 1)
        variances = torch.cat([variance[:, None], variances], 1)
        chosen = choose(self._log_prior(variances, d))
        index = chosen[..., None].expand(-1, 1, loadings.shape[-1])
        return trials.gather(1, index).squeeze(1), variances.gather(1, chosen).squeeze(1)

    def _move_variance(
        self,
        regression: _Regression,
        loadings: Float[Tensor, "C K"],
        variance: Float[Tensor, " C"],
        d: int,
    ) -> Float[Tensor, " C"]:
        concentration, rate = (part[d] for part in self.priors.noise)
        communality = regression.communality(loadings.unsqueeze(1))
        residual = regression.residual(loadings).clamp_min(0.0)
        num_data = self.codes.statistics.num_data
        shape = (concentration + num_data / 2).expand(len(loadings), NUM_PROPOSALS - 1)
        totals = (rate + residual[:, None] / 2) / standard_gamma(shape)
        totals = torch.cat([variance[:, None] + communality, totals], 1)
        variances = totals - communality
        variances[:, 0] = variance
        proposed = -(concentration + 1) * totals.log() - rate / totals
        chosen = choose(self._log_prior(variances, d) - proposed)
        return variances.gather(1, chosen).squeeze(1)

    def _log_prior(self, variance: Float[Tensor, "C P"], d: int) -> Float[Tensor, "C P"]:
        # The log density of sigma_d^2 up to a constant; minus infinity if it is not positive.
        concentration, rate = (part[d] for part in self.priors.noise)
        positive = variance > 0
        variance = variance.where(positive, 1.0)
        log_p = -(concentration + 1) * variance.log() - rate / variance
        return log_p.where(positive, -math.inf)


class NoiseMove(MarginalMove):
    """A move of isotropic noise: sigma is chosen among the current value and proposals."""

    def move(self, parameters: ParameterDraws) -> ParameterDraws:
        """The parameters with another sigma."""
        loadings, (concentration, rate) = parameters.loadings, self.priors.noise
        scatter, num_data = self.codes.scatter(parameters), self.codes.statistics.num_data
        eigenvalues, axes = torch.linalg.eigh(loadings.mT @ loadings)
        eigenvalues = eigenvalues.clamp_min(torch.finfo(eigenvalues.dtype).tiny)
        axes = loadings @ axes
        along = ((scatter @ axes) * axes).sum(-2) / eigenvalues
        beside = (scatter.diagonal(dim1=-2, dim2=-1).sum(-1) - along.sum(-1)).clamp_min(0.0)
        others = loadings.shape[-2] - loadings.shape[-1]
        shape = (concentration + num_data * others / 2).expand(len(loadings), NUM_PROPOSALS - 1)
        proposed = (rate + beside[:, None] / 2) / standard_gamma(shape)
        variance = parameters.noise_scale.square()[:, None]
        variances = torch.cat([variance, proposed], 1)
        totals = eigenvalues.unsqueeze(1) + variances.unsqueeze(-1)
        terms = num_data * totals.log() + along.unsqueeze(1) / totals
        chosen = choose(-terms.sum(-1) / 2)
        return parameters._replace(noise_scale=variances.gather(1, chosen).squeeze(1).sqrt())


def choose(log_weights: Float[Tensor, "C P"]) -> Int[Tensor, "C 1"]:
    """An index with probabilities proportional to the weights, by Gumbel's method."""
    gumbel = -torch.empty_like(log_weights).exponential_().log()
    return (log_weights + gumbel).argmax(-1, keepdim=True)
