"""Exact fits of PPCA and factor analysis: closed form, EM, PX-EM and variational EM.

All EM variants are one coordinate ascent on E_q[log p(x, z)] + H[q], with one Gaussian q of a
given family per datum. Complete data enter through their sample covariance alone
(``complete_data.py``); data with missing values are read in each iteration,
block by block (:mod:`ppl_vae.inference.em.missing_data`).
"""

import math
import time
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ppl_vae.core.arrays.inputs import learn_schema
from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.state import threads
from ppl_vae.core.text import counted
from ppl_vae.core.validation import ArrayLike
from ppl_vae.data.column_scales import isotropic_noise_notes
from ppl_vae.data.column_stats import ColumnStats
from ppl_vae.data.sources.row_blocks import RowBlocks, RowSource
from ppl_vae.inference.em.closed_form import best_parameters
from ppl_vae.inference.em.complete_data import CompleteDataEM, CompleteProblem
from ppl_vae.inference.em.missing_data import MissingDataEM, MissingDataProblem
from ppl_vae.inference.em.noise import Noise
from ppl_vae.inference.em.run import best_of_starts, run_em
from ppl_vae.inference.em.settings import EMSettings
from ppl_vae.inference.em.state import LinearGaussianParameters
from ppl_vae.models.linear.identifiability import describe_undetermined, undetermined_pairs
from ppl_vae.models.linear.sufficient_statistics import (
    SampleCovariance,
    missing_message,
    summarize_table,
)
from ppl_vae.models.ppca import PPCA

NOISE_FLOOR = 1e-6
"""The default smallest noise variance of a column, as a share of the column's variance."""
MAX_START_DISTANCE = 1e4
"""Initial means further than this many standard deviations from the data are reset."""


@threads(1)  # see summarize
def fit_closed_form(ppca: PPCA, x: RowSource) -> FitResult:
    """Set ppca to the maximum-likelihood solution, in closed form.

    With l_1 >= ... the eigenvalues of the sample covariance over N and u_k its eigenvectors,
    sigma^2 is the mean of the D - K smallest and w_k = u_k sqrt(l_k - sigma^2).

    Args:
        ppca: with isotropic noise; fitted in place.
        x: complete data, (N, D): a matrix, a memory map, or an iterable of blocks of rows, which
            is read once.

    Warns:
        UserWarning: if the precision of x or of the model is too low for a column.

    Raises:
        ValueError: if x has NaN, if K >= the rank of the centred data, if x does not have
            ``ppca.data_dim`` columns, or if the noise is diagonal.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), equations 7 and 8.
    """
    start_time, processes = time.perf_counter(), Processes.current()
    with processes.together():
        _check_ppca("fit_closed_form", ppca)
        if ppca.noise != "isotropic":
            raise ValueError(
                f"there is no closed form with noise={ppca.noise!r}, factor analysis; use fit_em"
            )
        blocks = _blocks(ppca, x, None, processes)
    processes.agree("fit_closed_form", ppca=_describe(ppca))
    columns, covariance = _summarize(ppca, blocks)
    if covariance is None:
        raise ValueError(missing_message(columns))
    ppca.undetermined = None
    unit_variance = torch.ones_like(covariance.mean)
    leading = covariance.leading(ppca.latent_dim, unit_variance)
    loadings, variance = best_parameters(leading, unit_variance, isotropic=True)
    state = CompleteDataEM(CompleteProblem(covariance, Noise(None)), loadings, variance)
    best = LinearGaussianParameters(loadings, covariance.mean, variance).of_rank_zero(processes)
    scale, unit = best.variance[0].sqrt(), blocks.unit
    ppca.assign(loadings=best.loadings * unit, loc=best.loc * unit, noise_scale=scale * unit)
    learn_schema(ppca, blocks.schema)
    seconds = time.perf_counter() - start_time
    return FitResult(
        algorithm="closed form",
        objective=state.log_likelihood.reshape(1),
        log_likelihood=state.log_likelihood.reshape(1),
        elapsed=torch.tensor([seconds]),
        steps=1,
        seconds=seconds,
        stopped="exact",
        notes=_data_notes(ppca, blocks, columns) + state.notes(),
        converged=True,
        certificate=0.0,
    ).shifted(_log_jacobian(columns, unit), 0.0)


def _blocks(ppca: PPCA, x: RowSource, mask: ArrayLike | None, processes: Processes) -> RowBlocks:
    # Sums are in float64 for any dtype of the model, on the model's device.
    return RowBlocks(
        x, mask, device=ppca.loc.device, rescale=True, schema=ppca.schema, processes=processes
    )


def _describe(ppca: PPCA) -> str:
    place = f"{ppca.loc.dtype}".removeprefix("torch.")
    return f"PPCA({ppca.data_dim}, {ppca.latent_dim}, noise={ppca.noise!r}) of {place}"


def _check_ppca(name: str, ppca: PPCA) -> None:
    if not isinstance(ppca, PPCA):
        raise TypeError(
            f"{name} fits PPCA and factor analysis; ppca is a {type(ppca).__name__}. Use fit_svi"
        )


def fit_em(
    ppca: PPCA,
    x: RowSource,
    *,
    mask: ArrayLike | None = None,
    accelerate: bool = True,
    noise_floor: float = NOISE_FLOOR,
    tol: float = 1e-9,
    max_iterations: int = 10_000,
    starts: int = 1,
) -> FitResult:
    """Fit ppca by EM, or by PX-EM, to the observed entries of x.

    In PX-EM the M-step also estimates z's covariance R (with missing values also its mean eta) and
    absorbs them: mu <- mu + W eta, W <- W chol(R). Both algorithms are monotone. On complete data
    with isotropic noise both converge to the closed form from loadings in general position. The
    error in the scale of an axis contracts by 1 - 2 r (1 - r) with r = sigma^2 / l_i in EM, by r^2
    in PX-EM; neither is faster than (l_{K+1} / l_K)^2 in the subspace. With diagonal noise PX-EM
    also sets each noise variance to the maximum of the likelihood in it alone, wherever that is no
    worse than the M-step; EM alone approaches a vanishing noise variance as 1 / t.

    EM also stalls at saddle points, where an axis left out would explain more than one of those
    in the model. Therefore the end is certified: the objective is compared with that at the best
    parameters for the covariance of the data, or for the expected covariance if values are
    missing. With isotropic noise these have a closed form; in factor analysis, of up to 256
    columns, they are a maximum of the profile likelihood found by Newton's method. If they are
    better by more than 2 ``tol`` and rounding, EM restarts from them, and a note reports it.
    ``converged`` is True if the end is certified, and ``certificate`` is the amount by which the
    best parameters are better. On complete data with isotropic noise it is the distance to the
    global maximum; otherwise there may be several maxima, and ``starts`` can find a higher one.

    Args:
        ppca: the initial model (its ``loc`` is not used with complete data); fitted in place.
        x: (N, D): a matrix, a memory map, or an iterable of blocks of rows. NaN marks a missing
            value. Complete data are read once; with missing values they are read in each
            iteration, so that memory does not grow with N.
        mask: True where observed, of the shape of a matrix or memory map.
        accelerate: PX-EM rather than EM.
        noise_floor: for diagonal noise, the smallest noise variance of a column, as a share of
            the column's variance. Columns that reach it (Heywood cases) are noted: without a floor
            the likelihood may have no maximum.
        tol: stop when the log-likelihood still to be gained falls below this many nats per datum.
        max_iterations: the largest number of iterations.
        starts: the number of starts: the given model, and random ones. The fit with the highest
            objective is kept, and a note reports how much lower the others ended.

    Warns:
        UserWarning: if the precision of x or of the model is too low for a column.

    Raises:
        ValueError: if K >= the rank of the centred data, or if the fit shows that the observed
            entries leave no noise; if a row or column has no observed entry; if a column with a
            noise variance of its own is constant; if x does not have ``ppca.data_dim`` columns.
        FloatingPointError: if the likelihood of the initial model is not finite.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), appendix B.
        Rubin, Thayer: EM algorithms for ML factor analysis (1982).
        Liu, Rubin, Wu: Parameter expansion to accelerate EM: the PX-EM algorithm (1998).
    """
    prior_update, algorithm = ("expand", "PX-EM") if accelerate else ("fixed", "EM")
    settings = EMSettings("full", prior_update, tol, max_iterations, starts, noise_floor)
    return _fit("fit_em", ppca, x, mask, algorithm, settings)


def variational_em(
    ppca: PPCA,
    x: RowSource,
    *,
    mask: ArrayLike | None = None,
    covariance: str = "diagonal",
    rotate: bool | None = None,
    noise_floor: float = NOISE_FLOOR,
    tol: float = 1e-9,
    max_iterations: int = 10_000,
    starts: int = 1,
) -> FitResult:
    """Fit ppca by EM with q restricted to a family, one q_i per datum; each step in closed form.

    The optimal mean is the posterior's. The optimal variances are 1 / P_kk (diagonal), K / tr P
    (isotropic), 1 (unit), with P = I + W' Psi^-1 W. With diagonal q the algorithm stalls in the
    rotation of W: axes i and j contract by (s2 + sqrt(a_i a_j))^2 / (l_i l_j), a = l - s2. With
    ``rotate`` the M-step estimates z's covariance R as in PX-EM, and then rotates
    Psi^-1/2 W = U s V' to U s, where the best diagonal q is exact; this is monotone too. With
    missing values no rotation makes it exact for every row. There R is diagonal, and W is rotated
    towards the highest bound by Newton steps, each accepted if its bound is at least that of the
    M-step.

    The end is certified as in :func:`fit_em`, by the bound. Without ``rotate`` the fit does not
    restart from the best parameters where these differ by a rotation alone.

    Args:
        ppca: the initial model; fitted in place.
        x, mask: as for :func:`fit_em`.
        covariance: the family of q, see :mod:`ppl_vae.guides.families`.
        rotate: by default True for ``"diagonal"``, the only family whose bound depends on the
            rotation, and False for others.
        noise_floor, tol, max_iterations, starts: as in :func:`fit_em`; ``tol`` refers to the
            bound.

    Raises:
        ValueError, FloatingPointError: as :func:`fit_em`; if ``rotate`` is set for another family.
    """
    rotates = covariance == "diagonal" if rotate is None else rotate
    algorithm = f"variational EM ({covariance}{', rotating' if rotates else ''})"
    prior_update = "rotate" if rotates else "fixed"
    settings = EMSettings(covariance, prior_update, tol, max_iterations, starts, noise_floor)
    return _fit("variational_em", ppca, x, mask, algorithm, settings)


def _fit(
    function: str,
    ppca: PPCA,
    x: RowSource,
    mask: ArrayLike | None,
    algorithm: str,
    settings: EMSettings,
) -> FitResult:
    start_time, processes = time.perf_counter(), Processes.current()
    with processes.together():
        _check_ppca(function, ppca)
        settings.check()
        blocks = _blocks(ppca, x, mask, processes)
    processes.agree(function, ppca=_describe(ppca), **vars(settings))
    with threads(1):  # see summarize
        columns, covariance = _summarize(ppca, blocks)
        noise = Noise.of(ppca, columns, settings.noise_floor, accelerated=settings.accelerated)
    pairs = undetermined_pairs(blocks, ppca.latent_dim) if covariance is None else None
    data_notes = _data_notes(ppca, blocks, columns) + describe_undetermined(pairs, ppca.latent_dim)
    fits = []
    for number in range(settings.starts):
        loadings, loc, variance, notes = _initial(ppca, columns, noise, blocks.unit, number)
        if covariance is None:
            missing = MissingDataProblem(
                blocks, columns, noise, settings.family, settings.prior_update
            )
            start = partial(MissingDataEM, missing, loadings, loc, variance)
        else:
            notes = ()
            complete = CompleteProblem(covariance, noise, settings.family, settings.prior_update)
            start = partial(CompleteDataEM, complete, loadings, variance)
        with threads(1 if covariance is not None else torch.get_num_threads()):
            fit = run_em(
                start,
                algorithm,
                tol=settings.tol,
                max_iterations=settings.max_iterations,
                notes=data_notes + notes,
                start_time=time.perf_counter() if number else start_time,
            )
        fits.append(fit)
    state, result = best_of_starts(fits)
    ppca.undetermined = None if pairs is None else pairs.to(ppca.loc.device)
    (loadings, loc, variance), unit = state.parameters.of_rank_zero(processes), blocks.unit
    scale = noise.scale(variance)
    ppca.assign(loadings=loadings * unit, loc=loc * unit, noise_scale=scale * unit)
    learn_schema(ppca, blocks.schema)
    return result.shifted(_log_jacobian(columns, unit), 0.0)


def _summarize(ppca: PPCA, blocks: RowBlocks) -> tuple[ColumnStats, SampleCovariance | None]:
    columns, covariance = summarize_table(blocks)
    if len(columns.mean) != ppca.data_dim:
        raise ValueError(f"x has {len(columns.mean)} columns, the model data_dim={ppca.data_dim}")
    (covariance or columns).check_rank(ppca.latent_dim)
    resolution = torch.finfo(ppca.loc.dtype).eps
    columns.check(diagonal=ppca.noise == "diagonal", resolution=resolution)
    return columns, covariance


def _data_notes(ppca: PPCA, blocks: RowBlocks, columns: ColumnStats) -> tuple[str, ...]:
    # Notes on rows left out, on constant columns and on columns of mixed units.
    notes = blocks.notes() + columns.notes()
    if ppca.noise == "isotropic":
        notes += isotropic_noise_notes(columns, blocks.unit)
    return notes


def _log_jacobian(columns: ColumnStats, unit: float) -> float:
    # The difference, in nats per datum, of log p of x and log p of x / unit.
    num_observed = int(columns.count.sum()) if unit != 1 else 0
    return -math.log(unit) * num_observed / columns.rows


def _initial(
    ppca: PPCA, columns: ColumnStats, noise: Noise, unit: float, number: int
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    # Loadings, mean and noise variances, and a note on means that were too far from the data:
    # those of the model for the first start, random ones for the others.
    loadings, loc, scale = (
        parameter.detach().to(columns.mean) / unit
        for parameter in (ppca.loadings, ppca.loc, ppca.noise_scale)
    )
    if number:
        loadings, loc, scale = _random_initial(columns, noise, loadings.shape[1], number)
    variance = scale.square().expand(len(loc))
    if noise.min_variance is not None:
        variance = torch.maximum(variance, noise.min_variance)
    far = (loc - columns.mean).square() > MAX_START_DISTANCE**2 * columns.variance.max()
    if not bool(far.any()):
        return loadings, loc, variance, ()
    note = (
        f"the initial mean of {counted(int(far.sum()), 'column')} was far from any data and was "
        "set to the mean of the data"
    )
    return loadings, torch.where(far, columns.mean, loc), variance, (note,)


def _random_initial(
    columns: ColumnStats, noise: Noise, latent_dim: int, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    # As in PPCA.like, half of the variance is noise.
    variance = columns.variance.mean() if noise.min_variance is None else columns.variance
    scale = (variance / 2).sqrt()
    normal = np.random.default_rng(number).normal(size=(len(columns.mean), latent_dim))
    loadings = torch.from_numpy(normal / latent_dim**0.5).to(columns.mean)
    return loadings * scale.reshape(-1, 1), columns.mean, scale
