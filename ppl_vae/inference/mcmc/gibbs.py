"""Gibbs sampling of PPCA's parameters from the sufficient statistics of the data.

A sweep draws z given the parameters, and then relevance, sigma and (W, mu) given z. The
conditionals depend on z through sums over data only. An orthogonal transformation of the rows of
one missingness pattern leaves these sums, so z is drawn for the transformed rows of
:class:`~ppl_vae.models.table_statistics.TableStatistics`: for rows of zeros z is N(0, P^-1), and
their sum of z z' is Wishart. So a sweep over complete data costs O(D^2 K), for any number of data.

Between the two, moves along transformations of the latent space that leave the likelihood as it
is (:mod:`ppl_vae.inference.mcmc.gibbs_moves`) make successive draws nearly independent.
"""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.state import seeded, threads
from ppl_vae.core.validation import ArrayLike
from ppl_vae.data.row_blocks import RowSource
from ppl_vae.inference.mcmc.gibbs_codes import (
    Codes,
    draw_codes,
    moments,
    squared_residuals,
)
from ppl_vae.inference.mcmc.gibbs_moves import expand_codes, rotate_codes, translate_codes
from ppl_vae.inference.mcmc.gibbs_priors import ConjugatePriors
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.inference.mcmc.settings import DEFAULT_SETTINGS, ChainSettings
from ppl_vae.inference.mcmc.start import overdispersed_start, prior_notes, statistics_for
from ppl_vae.inference.svi.progress import progress_bar
from ppl_vae.models.bayesian_ppca import BayesianPPCA, Parameters
from ppl_vae.models.integrated_likelihood import integrated_log_likelihood
from ppl_vae.models.table_statistics import TableStatistics

REPORT_EVERY = 50
"""Sweeps between reports of the progress."""


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
            if self.priors.relevance is not None:
                loadings, codes = rotate_codes(self.priors, loadings, codes)
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


def sample_gibbs(
    model: BayesianPPCA,
    x: RowSource,
    mask: ArrayLike | None = None,
    settings: ChainSettings = DEFAULT_SETTINGS,
    *,
    expand: bool = True,
) -> PosteriorSamples:
    """Draws of the posterior of W, mu, sigma and relevance under conjugate priors.

    With diagonal noise chains mix slowly where the data hardly distinguish the noise of a column
    from a factor of its own; the verdict on the draws says so, and NUTS is the alternative.

    Args:
        model: with conjugate priors.
        x: a matrix, a memory map, or an iterable of blocks of rows, read once if it is complete;
            NaN marks a missing value.
        mask: True where observed.
        settings: of the chains; an iteration is a sweep over the parameters.
        expand: whether to move along transformations of the latent space, which makes successive
            draws less dependent.

    Raises:
        ValueError: if a prior is not conjugate; if x has another width than the model, or a column
            with nothing observed; if latent_dim is not smaller than data_dim.

    References:
        Liu, Sabatti: Generalised Gibbs sampler and multigrid Monte Carlo for Bayesian computation
        (2000).
    """
    start = time.perf_counter()
    priors = ConjugatePriors.of(model)
    statistics = statistics_for(model, x, mask)
    sampler = GibbsSampler(statistics, priors, expand and statistics.num_data > model.latent_dim)
    with torch.no_grad(), threads(1), seeded(settings.seed):
        parameters = overdispersed_start(model, statistics.columns, settings.chains)
        draws, acceptance = _run(sampler, parameters, settings)
    return PosteriorSamples(
        draws=draws,
        sampler="Gibbs",
        seconds=time.perf_counter() - start,
        num_data=statistics.num_data,
        acceptance=acceptance if sampler.expand else None,
        notes=statistics.notes() + prior_notes(model, statistics.columns),
        model=model,
    )


def _run(
    sampler: GibbsSampler,
    parameters: Parameters,
    settings: ChainSettings,
) -> tuple[dict[str, Tensor], float]:
    # The kept draws by site, (chains, S, ...), and the mean acceptance probability.
    draws: dict[str, Tensor] = {}
    accepted, warmup, num_samples = 0.0, settings.warmup, settings.num_samples
    with progress_bar(warmup + num_samples, settings.progress, "Gibbs") as report:
        for number in range(-warmup, num_samples):
            parameters, moved = sampler.sweep(parameters)
            if number % REPORT_EVERY == 0:
                report(number + warmup, _log_likelihood(sampler.statistics, parameters))
            if number < 0:
                continue
            accepted += float(moved.mean()) / num_samples
            for name, value in parameters.sites().items():
                if not number:
                    shape = (len(value), num_samples, *value.shape[1:])
                    draws[name] = torch.empty(shape).to(value)
                draws[name][:, number] = value
    return draws, accepted


def _log_likelihood(statistics: TableStatistics, parameters: Parameters) -> float:
    # The mean over chains, per datum.
    loadings, loc, scale, _ = parameters
    log_p = integrated_log_likelihood(statistics, loadings, loc, scale)
    return float(log_p.mean()) / statistics.num_data
