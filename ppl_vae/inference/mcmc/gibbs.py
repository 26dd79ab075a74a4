"""Gibbs sampling of PPCA's parameters from the sufficient statistics of the data.

A sweep draws z given the parameters, and then relevance, sigma and (W, mu) given z. The
conditionals depend on z through sums over data only. An orthogonal transformation of the rows of
one missingness pattern leaves these sums, so z is drawn for the transformed rows of
:class:`~ppl_vae.models.table_statistics.TableStatistics`: for rows of zeros z is N(0, P^-1), and
their sum of z z' is Wishart. So a sweep over complete data costs O(D^2 K), for any number of data.

Between the two, moves along transformations of the latent space that leave the likelihood as it
is (:mod:`ppl_vae.inference.mcmc.gibbs_moves`) make successive draws nearly independent.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.mcmc.gibbs_codes import (
    Codes,
    draw_codes,
    moments,
    squared_residuals,
)
from ppl_vae.inference.mcmc.gibbs_moves import expand_codes, translate_codes
from ppl_vae.inference.mcmc.gibbs_priors import ConjugatePriors
from ppl_vae.models.bayesian_ppca import Parameters
from ppl_vae.models.table_statistics import TableStatistics


@dataclass(frozen=True)
class GibbsSampler:
    """Sweeps of several chains at once.

    Attributes:
        statistics: of the data; with a leading dimension of ``rows``, those of one table for each
            chain, all of one mask.
        priors: of the parameters.
        expand: whether to move along transformations of the latent space.
    """

    statistics: TableStatistics
    priors: ConjugatePriors
    expand: bool = True

    def sweep(self, parameters: Parameters) -> tuple[Parameters, Float[Tensor, " C"]]:
        """The next state of each chain, and whether its proposal was accepted."""
        codes = draw_codes(self.statistics, parameters)
        accepted = torch.zeros(len(parameters.loc))
        if self.expand:
            loc, codes = translate_codes(self.statistics, self.priors, parameters, codes)
            loadings, codes, accepted = expand_codes(
                self.statistics, self.priors, parameters.loadings, codes
            )
            parameters = parameters._replace(loadings=loadings, loc=loc)
        parameters = self._draw_scales(parameters, codes)
        return self._draw_loadings(parameters, codes), accepted

    def _draw_scales(self, parameters: Parameters, codes: Codes) -> Parameters:
        statistics, priors = self.statistics, self.priors
        squares = squared_residuals(statistics, parameters, codes)
        return parameters._replace(
            relevance=priors.draw_relevance(parameters.loadings),
            noise_scale=priors.draw_noise_scale(squares, statistics.columns.count),
        )

    def _draw_loadings(self, parameters: Parameters, codes: Codes) -> Parameters:
        # The regression of each column on (z, 1), with mu relative to the mean of the data.
        statistics, (mean, strength) = self.statistics, self.priors.regression(parameters)
        weight = statistics.weight[:, None].expand(*codes.rows.shape[:-1], 1)
        design = torch.cat([codes.rows, weight], -1)
        variance = parameters.column_scale.square().unsqueeze(-1)
        precision = moments(statistics, design, codes) / variance.unsqueeze(-1)
        precision = precision + torch.diag_embed(strength)
        score = statistics.rows.mT @ design / variance
        score[..., -1] += strength[..., -1] * (mean - statistics.mean)
        tril = torch.linalg.cholesky(precision)
        noise = tril @ torch.randn_like(score).unsqueeze(-1)
        solution = torch.cholesky_solve(score.unsqueeze(-1) + noise, tril).squeeze(-1)
        loadings, loc = solution[..., :-1], solution[..., -1] + statistics.mean
        return parameters._replace(loadings=loadings, loc=loc)
