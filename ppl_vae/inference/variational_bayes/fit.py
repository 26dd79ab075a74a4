"""Variational Bayes in closed form: the public function."""

import time
from typing import Any

import pyro.distributions as dist
import torch

from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.state import seeded, threads
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.data.sources.row_blocks import RowSource
from ppl_vae.inference.mcmc.start import prior_notes, statistics_for
from ppl_vae.inference.variational_bayes.coordinate_ascent import CoordinateAscent
from ppl_vae.inference.variational_bayes.parameters import ConjugateUpdates, ParameterPosterior
from ppl_vae.inference.variational_bayes.result import (
    MIN_ACTIVE_SHARE,
    VBResult,
    active_share,
    guide_of,
    scale_moments,
)
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.linear.table_statistics import TableStatistics

NUM_POWER_ITERATIONS = 4
"""Subspace iterations for the initial loadings."""
MIN_INITIAL_VARIANCE = 1e-6
"""The smallest initial noise variance, as a share of the mode of its prior, and the smallest
initial squared length of a column of W, as a share of the noise variance."""


@threads(1)
def fit_vb(
    model: BayesianPPCA,
    x: RowSource | TableStatistics,
    *,
    mask: ArrayLike | None = None,
    rotate: bool = True,
    tol: float = 1e-8,
    max_iterations: int = 1000,
    seed: int | None = None,
) -> VBResult:
    """The mean-field posterior of Bayesian PPCA or factor analysis, by coordinate ascent.

    q(z) q(W, mu) q(sigma) q(relevance) maximizes a lower bound of the log evidence log p(x), each
    factor in closed form given the others, so that the bound never decreases. The table is read
    once; after that an iteration costs O(D^2 K + D K^3) for any number of complete rows. With
    missing values the cost grows with the number of distinct missingness patterns.

    The bound also depends on affine maps of z that leave W z + mu unchanged. ``rotate`` maximizes
    it over these maps in each iteration, in closed form; without it convergence is slow. Every
    third iteration starts from extrapolated parameters, unless that would lower the bound
    (SQUAREM).

    Under the ARD prior the maximum has columns of W that are orthogonal in units of their prior
    scales and sorted by strength, and columns that the data do not support are switched off
    (``active``); in large tables this takes a relevance prior with a small rate. Variances under
    q are too small, because its factors are independent; rotations of W that leave a normal prior
    unchanged are not part of q at all.

    Args:
        model: the priors; it is not changed.
        x: (N, D): a matrix, a memory map, or an iterable of blocks of rows; NaN marks a missing
            value. Also the :class:`~ppl_vae.models.linear.table_statistics.TableStatistics` of a
            table.
        mask: True where observed, of the shape of a matrix or memory map.
        rotate: whether to maximize the bound over affine maps of z.
        tol: stop when the bound still to be gained falls below this many nats per datum.
        max_iterations: the largest number of iterations.
        seed: the seed of the random directions from which the initial loadings are computed.

    Raises:
        TypeError: if the model is not a ``BayesianPPCA``.
        ValueError: if a prior is not conjugate; if x does not have ``model.data_dim`` columns; if
            K >= D; if a column has nothing observed.

    References:
        Bishop: Variational principal components (1999).
        Luttinen, Ilin: Transformations in variational Bayesian factor analysis to speed up
        learning (2010).
        Varadhan, Roland: Simple and globally convergent methods for accelerating the convergence
        of any EM algorithm (2008): SQUAREM.

    Example:
        >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> fit_vb(BayesianPPCA.like(x, 2, prior="ard"), x, seed=0).active.shape
        torch.Size([2])
    """
    start_time, processes = time.perf_counter(), Processes.current()
    with processes.together():
        _check_model(model)
        check_int("max_iterations", max_iterations)
    statistics = statistics_for(
        "fit_vb",
        model,
        x,
        mask,
        rotate=rotate,
        tol=tol,
        max_iterations=max_iterations,
        seed=seed,
    )
    updates = ConjugateUpdates.of(model, statistics.mean)
    ascent = CoordinateAscent(statistics, updates, rotate, start_time)
    stopped = ascent.run(
        _initial(statistics, updates, model, processes.common_seed(seed)), tol, max_iterations
    )
    return _result(model, ascent, stopped)


def _check_model(model: Any) -> None:
    if not isinstance(model, BayesianPPCA):
        raise TypeError(
            f"fit_vb fits BayesianPPCA; model is a {type(model).__name__}. Use fit_svi, or "
            "sample_posterior"
        )
    if names := model.not_conjugate():
        raise ValueError(
            f"fit_vb needs conjugate priors, and {', '.join(names)} of the model "
            f"{'is' if len(names) == 1 else 'are'} not (see BayesianPPCA.not_conjugate); use "
            'sample_posterior(model, x, sampler="nuts"), or fit_svi, which take any priors'
        )


@torch.no_grad()
def _initial(
    statistics: TableStatistics, updates: ConjugateUpdates, model: BayesianPPCA, seed: int | None
) -> ParameterPosterior:
    # Half of the variance is noise, as in PPCA.like, and W has the leading principal axes of the
    # data in units of the noise, from subspace iteration. Missing entries count as zero.
    columns, shape = statistics.columns, (model.data_dim, model.latent_dim)
    variance = columns.variance if model.noise == "diagonal" else columns.variance.mean()
    concentration, rate = updates.priors.noise
    mode = rate / (concentration + 1)
    variance = torch.maximum(variance / 2, MIN_INITIAL_VARIANCE * mode)
    scaled = statistics.rows / variance.sqrt() / statistics.num_data**0.5
    with seeded(seed):
        axes = torch.randn(shape, dtype=torch.float64).to(scaled)
    for _ in range(NUM_POWER_ITERATIONS):
        axes = torch.linalg.qr(scaled.mT @ (scaled @ axes)).Q
    scores = scaled @ axes
    values, rotation = torch.linalg.eigh(scores.mT @ scores)
    lengths = values.clamp(min=MIN_INITIAL_VARIANCE).sqrt()
    loadings = variance.sqrt().reshape(-1, 1) * (axes @ rotation * lengths).flip(1)
    mean = torch.nn.functional.pad(loadings, (0, 1))
    tril = mean.new_zeros(*mean.shape, mean.shape[1])
    noise = dist.Gamma(torch.ones_like(variance), variance)
    return updates.update_relevance(ParameterPosterior(mean, tril, noise, None))


def _result(model: BayesianPPCA, ascent: CoordinateAscent, stopped: str) -> VBResult:
    statistics = ascent.statistics
    posterior, centre = ascent.state.posterior.with_positive_columns(), statistics.mean
    sd = posterior.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    noise_scale, noise_scale_sd = scale_moments(posterior.noise)
    relevance, share = posterior.relevance, active_share(posterior, ascent.updates)
    return VBResult(
        algorithm=f"variational Bayes{', rotating' if ascent.rotate else ''}",
        objective=torch.tensor(ascent.bounds, dtype=torch.float64),
        elapsed=torch.tensor(ascent.elapsed, dtype=torch.float64),
        steps=len(ascent.bounds),
        seconds=ascent.elapsed[-1],
        stopped=stopped,
        notes=_notes(model, ascent),
        converged=ascent.converged,
        guide=guide_of(model, posterior, centre),
        num_data=statistics.num_data,
        loadings=posterior.mean[:, :-1],
        loadings_sd=sd[:, :-1],
        loc=posterior.mean[:, -1] + centre,
        loc_sd=sd[:, -1],
        noise_scale=noise_scale,
        noise_scale_sd=noise_scale_sd,
        relevance=None if relevance is None else relevance.mean,
        relevance_sd=None if relevance is None else relevance.stddev,
        active_share=share,
        active=share >= MIN_ACTIVE_SHARE,
    )


def _notes(model: BayesianPPCA, ascent: CoordinateAscent) -> tuple[str, ...]:
    statistics = ascent.statistics
    notes = statistics.notes() + prior_notes(model, statistics.columns)
    if not ascent.converged:
        gain = ascent.bounds[-1] - ascent.bounds[max(-2, -len(ascent.bounds))]
        notes += (
            f"not converged: the last iteration still gained {gain:.2g} nats per datum; raise "
            "max_iterations",
        )
    return notes
