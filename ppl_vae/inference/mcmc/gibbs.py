"""Gibbs sampling of PPCA's parameters from the sufficient statistics of the data.

A sweep draws z given the parameters, and then relevance, sigma and (W, mu) given z. The
conditionals depend on z through sums over data only. An orthogonal transformation of the rows of
one missingness pattern leaves these sums, so z is drawn for the transformed rows of
:class:`~ppl_vae.models.linear.table_statistics.TableStatistics`: for rows of zeros z is N(0,
P^-1), and their sum of z z' is Wishart. So a sweep over complete data costs O(D^2 K), for any
number of data.

Between the two, moves along transformations of the latent space that leave the likelihood as it
is (:mod:`ppl_vae.inference.mcmc.gibbs_moves`) make successive draws nearly independent. With
diagonal noise, or with many latent dimensions, moves of the noise with z integrated out
(:mod:`ppl_vae.inference.mcmc.gibbs_noise`) do so.
"""

import time
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.state import seeded, threads
from ppl_vae.core.validation import ArrayLike
from ppl_vae.data.sources.row_blocks import RowSource
from ppl_vae.inference.mcmc.gibbs_moves import LatentMoves
from ppl_vae.inference.mcmc.gibbs_noise import ColumnMoves, MarginalMove, NoiseMove
from ppl_vae.inference.mcmc.gibbs_priors import ConjugatePriors
from ppl_vae.inference.mcmc.gibbs_sums import CodeSampler, CodeSums
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.inference.mcmc.settings import DEFAULT_SETTINGS, ChainSettings
from ppl_vae.inference.mcmc.start import overdispersed_start, prior_notes, statistics_for
from ppl_vae.inference.mcmc.wishart import draw_normal, draw_normals_of_one_gram
from ppl_vae.inference.svi.progress import progress_bar
from ppl_vae.models.bayesian_ppca import BayesianPPCA, ParameterDraws
from ppl_vae.models.linear.integrated_likelihood import integrated_log_likelihood
from ppl_vae.models.linear.table_statistics import TableStatistics

REPORT_EVERY = 50
"""Sweeps between reports of the progress."""
ONE_GRAM_SIZE = 4000
"""D (K + 1)^2 from which one eigendecomposition is faster than D Cholesky factorizations."""


@dataclass(frozen=True)
class GibbsSampler:
    """Sweeps of several chains at once.

    Attributes:
        statistics: the sufficient statistics of the data; with a leading dimension of ``rows``,
            those of one table for each chain, all of one mask.
        priors: the priors of the parameters.
        expand: whether to move along transformations of the latent space, and in the noise with z
            integrated out.
    """

    statistics: TableStatistics
    priors: ConjugatePriors
    expand: bool = True

    @cached_property
    def codes(self) -> CodeSampler:
        """The sampler of z given the parameters."""
        return CodeSampler(self.statistics, self.priors.latent_dim)

    @cached_property
    def moves(self) -> LatentMoves:
        """The moves along transformations of the latent space."""
        data_dim = self.statistics.rows.shape[-1]
        return LatentMoves(self.priors, self.statistics.num_data, data_dim)

    @cached_property
    def noise_move(self) -> MarginalMove | None:
        """The move of the noise with z integrated out, if it makes draws much less dependent."""
        if self.priors.has_diagonal_noise:
            return ColumnMoves(self.codes, self.priors)
        few = self.statistics.rows.shape[-1] < 2 * self.priors.latent_dim
        return NoiseMove(self.codes, self.priors) if few else None

    @cached_property
    def _columns_share_a_gram(self) -> bool:
        # Whether the regressions of all columns follow from one eigendecomposition, which costs
        # more than their own factorizations if they are few.
        size = self.statistics.rows.shape[-1] * (self.priors.latent_dim + 1) ** 2
        return (
            self.statistics.is_complete
            and self.priors.has_shared_precision
            and size >= ONE_GRAM_SIZE
        )

    def sweep(self, parameters: ParameterDraws) -> tuple[ParameterDraws, Float[Tensor, " C"]]:
        """The next state of each chain, and whether its proposal was accepted."""
        sums = self.codes.draw(parameters)
        accepted = torch.zeros(len(parameters.loc))
        if self.expand:
            parameters, g, accepted = self.moves.move(parameters, sums.total)
            sums = sums.transform(g)
        parameters = self._draw_loadings(self._draw_scales(parameters, sums), sums)
        if self.expand and self.noise_move is not None:
            parameters = self.noise_move.move(parameters)
        return parameters, accepted

    def _draw_scales(self, parameters: ParameterDraws, sums: CodeSums) -> ParameterDraws:
        statistics, priors = self.statistics, self.priors
        offset = (parameters.loc - statistics.mean).unsqueeze(-1)
        coefficients = torch.cat([parameters.loadings, offset], -1)
        squares = sums.squared_residuals(self.codes.squares, coefficients)
        return parameters._replace(
            relevance=priors.draw_relevance(parameters.loadings),
            noise_scale=priors.draw_noise_scale(squares, statistics.columns.count),
        )

    def _draw_loadings(self, parameters: ParameterDraws, sums: CodeSums) -> ParameterDraws:
        # The regression of each column on (z, 1), with mu relative to the mean of the data.
        mean, priors = self.statistics.mean, self.priors
        precision = parameters.column_scale.square().reciprocal()
        score = sums.cross * precision.unsqueeze(-1)
        score[..., -1] += priors.loc_precision * (priors.loc_mean - mean)
        if self._columns_share_a_gram:
            shared, prior_weight = (
                priors.shared_precision(parameters.relevance),
                priors.loadings_precision[:, 0],
            )
            solution = draw_normals_of_one_gram(sums.total, shared, precision, prior_weight, score)
        else:
            matrix = sums.gram * precision[..., None, None]
            matrix.diagonal(dim1=-2, dim2=-1).add_(priors.row_precision(parameters.relevance))
            solution = draw_normal(matrix, score)
        return parameters._replace(loadings=solution[..., :-1], loc=solution[..., -1] + mean)


def sample_gibbs(
    model: BayesianPPCA,
    x: RowSource,
    mask: ArrayLike | None = None,
    settings: ChainSettings = DEFAULT_SETTINGS,
    *,
    expand: bool = True,
) -> PosteriorSamples:
    """Draws of the posterior of W, mu, sigma and relevance under conjugate priors.

    With diagonal noise and too many latent dimensions for the loadings to be determined, chains
    mix more slowly; the verdict on the draws says so.

    Args:
        model: with conjugate priors.
        x: a matrix, a memory map, or an iterable of blocks of rows, read once if it is complete;
            NaN marks a missing value.
        mask: True where observed.
        settings: the settings of the chains; an iteration is a sweep over the parameters.
        expand: whether to move along transformations of the latent space, and in the noise with z
            integrated out, which makes successive draws less dependent.

    Raises:
        ValueError: if a prior is not conjugate; if x has another width than the model, or a column
            with nothing observed; if latent_dim is not smaller than data_dim.

    References:
        Liu, Sabatti: Generalised Gibbs sampler and multigrid Monte Carlo for Bayesian computation
        (2000).
    """
    start = time.perf_counter()
    processes, seed = Processes.current(), settings.seed
    with processes.together():
        priors = ConjugatePriors.of(model)
    statistics = statistics_for(
        "sample_posterior", model, x, mask, sampler="gibbs", **settings.same_everywhere
    )
    sampler = GibbsSampler(statistics, priors, expand and statistics.num_data > model.latent_dim)
    with torch.no_grad(), threads(1), seeded(processes.common_seed(seed)):
        parameters = overdispersed_start(model, statistics.columns, settings.chains)
        draws, acceptance = _run(sampler, parameters, settings)
    return PosteriorSamples(
        draws={name: processes.broadcast(value) for name, value in draws.items()},
        sampler="Gibbs",
        seconds=time.perf_counter() - start,
        num_data=statistics.num_data,
        acceptance=acceptance if sampler.expand else None,
        notes=statistics.notes() + prior_notes(model, statistics.columns),
        model=model,
    )


def _run(
    sampler: GibbsSampler,
    parameters: ParameterDraws,
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


def _log_likelihood(statistics: TableStatistics, parameters: ParameterDraws) -> float:
    # The mean over chains, per datum.
    loadings, loc, scale, _ = parameters
    log_p = integrated_log_likelihood(statistics, loadings, loc, scale)
    return float(log_p.mean()) / statistics.num_data
