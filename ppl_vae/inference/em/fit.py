"""Exact fits of PPCA and factor analysis: closed form, EM, PX-EM and variational EM.

All EM variants are one coordinate ascent on E_q[log p(x, z)] + H[q] with q a Gaussian of a family
for each datum. Complete data enter by their covariance alone
(:mod:`ppl_vae.inference.em.complete`); data with missing values are read in each iteration, block
by block (:mod:`ppl_vae.inference.em.missing`).
"""

import math
import time
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ppl_vae.core.results import FitResult
from ppl_vae.core.state import threads
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.data.column_stats import ColumnStats
from ppl_vae.data.row_blocks import RowBlocks, RowSource
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.inference.em.closed_form import best_parameters
from ppl_vae.inference.em.complete import CompleteDataEM, CompleteProblem
from ppl_vae.inference.em.missing import MissingDataEM, MissingDataProblem
from ppl_vae.inference.em.noise import Noise
from ppl_vae.inference.em.run import best_of, run_em
from ppl_vae.models.identifiability import describe_undetermined, undetermined_pairs
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.sufficient_statistics import SampleCovariance, missing_message, summarize

NOISE_FLOOR = 1e-6
FAR = 1e4
"""So many standard deviations from a column's mean no mean of a model is taken to start from."""


@threads(1)  # see summarize
def fit_closed_form(ppca: PPCA, x: RowSource) -> FitResult:
    """Set ppca to the maximum-likelihood solution.

    With l_1 >= ... the eigenvalues of the sample covariance over N and u_k its eigenvectors,
    sigma^2 is the mean of the D - K smallest and w_k = u_k sqrt(l_k - sigma^2).

    Args:
        ppca: with isotropic noise; fitted in place.
        x: complete data, (N, D): a matrix, a memory map, or an iterable of blocks of rows, which
            is read once.

    Warns:
        UserWarning: if the numbers of x or of the model are too coarse for a column.

    Raises:
        ValueError: if x has NaN, K >= the rank of the centred data, x has another width, or the
            noise is diagonal.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), equations 7 and 8.
    """
    began = time.perf_counter()
    if ppca.noise != "isotropic":
        raise ValueError(
            f"there is no closed form with noise={ppca.noise!r}, factor analysis; use fit_em"
        )
    blocks = RowBlocks(x, device=ppca.loc.device, rescale=True)
    columns, covariance = _statistics(ppca, blocks)
    covariance = _complete(columns, covariance)
    ppca.undetermined = None
    setting = CompleteProblem(covariance, Noise(None))
    unit_noise = torch.ones_like(covariance.mean)
    leading = covariance.leading(ppca.latent_dim, unit_noise)
    loadings, variance = best_parameters(leading, unit_noise, isotropic=True)
    point, unit = CompleteDataEM(setting, loadings, variance), blocks.unit
    scale = variance[0].sqrt()
    ppca.assign(loadings=loadings * unit, loc=covariance.mean * unit, noise_scale=scale * unit)
    seconds = time.perf_counter() - began
    return FitResult(
        algorithm="closed form",
        objective=point.log_likelihood.reshape(1),
        log_likelihood=point.log_likelihood.reshape(1),
        elapsed=torch.tensor([seconds]),
        steps=1,
        seconds=seconds,
        stopped="exact",
        notes=columns.notes() + point.notes(),
        converged=True,
        certificate=0.0,
    ).shifted(_shift(columns, unit), 0.0)


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
    """Fit ppca by EM, or by PX-EM, to what was observed of x.

    PX-EM lets the M-step choose z's covariance R too (with missing values also its mean eta), and
    folds them back: mu <- mu + W eta, W <- W chol(R). Both are monotone. On complete data with
    isotropic noise both end at the closed form from loadings in general position; EM's scale error
    contracts by 1 - 2 r (1 - r) with r = sigma^2 / l_i, PX-EM's by r^2; neither is faster than
    (l_{K+1} / l_K)^2 in the subspace. With diagonal noise PX-EM also lets each noise variance
    leap to where its own likelihood is highest, wherever that is no worse than the M-step: EM
    alone would near a vanishing one as 1 / t.

    EM stands still at saddle points, too, where an axis left out would explain more than one kept.
    So the end is certified: the objective is compared with that at the best parameters for the
    covariance of the data, for the expected one if cells are missing. With isotropic noise they
    are the closed form; in factor analysis, of up to 256 columns, a maximum of the profile
    likelihood that Newton's method finds. If they are better by more than 2 ``tol`` and rounding,
    EM goes on from them, and a note says so. ``converged`` says whether the end is certified,
    ``certificate`` how much better the best parameters are. On complete data with isotropic noise
    it is the distance to the global maximum; elsewhere there may be several maxima, of which
    ``starts`` can find a higher one.

    Args:
        ppca: where to start (complete data have no use for its ``loc``); fitted in place.
        x: (N, D): a matrix, a memory map, or an iterable of blocks of rows. NaN marks a missing
            value. Complete data are read once; with missing values they are read in each
            iteration, so that memory does not grow with N.
        mask: True where observed, of the shape of a matrix or memory map.
        accelerate: PX-EM rather than EM.
        noise_floor: diagonal noise: the least noise variance of a column, as a share of its
            variance. Columns that reach it (Heywood cases) are noted: without a floor the
            likelihood may have no maximum.
        tol: stop when the log-likelihood still to be gained falls below this many nats per datum.
        max_iterations: stop at the latest after so many.
        starts: from how many starts: the model as it is, and random ones. The end of the highest
            objective is kept, and a note says how far below it the others are.

    Warns:
        UserWarning: if the numbers of x or of the model are too coarse for a column.

    Raises:
        ValueError: if K >= the rank of the centred data, or what was observed turns out to leave
            no noise; if a row or column has nothing observed, or a column with a noise of its
            own is constant; if x has another width.
        FloatingPointError: if the likelihood is not finite where the model starts.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), appendix B.
        Rubin, Thayer: EM algorithms for ML factor analysis (1982).
        Liu, Rubin, Wu: Parameter expansion to accelerate EM: the PX-EM algorithm (1998).
    """
    return _ascended(
        ppca,
        x,
        mask,
        "PX-EM" if accelerate else "EM",
        prior_update="expand" if accelerate else "none",
        accelerated=accelerate, noise_floor=noise_floor, tol=tol, max_iterations=max_iterations,
        starts=starts,
    )  # fmt: skip


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
    """Fit ppca by EM with a restricted q_i per datum, each step in closed form.

    The optimal mean is the posterior's; the optimal variances are 1 / P_kk (diagonal), K / tr P
    (isotropic), 1 (unit), with P = I + W' Psi^-1 W. With diagonal q it stalls in the rotation of
    W: axes i and j contract by (s2 + sqrt(a_i a_j))^2 / (l_i l_j), a = l - s2. ``rotate`` expands
    z's covariance R as PX-EM does, and then turns Psi^-1/2 W = U s V' to U s, where the best
    diagonal q is exact; this is monotone too. With missing values no rotation makes it exact for
    every
    row: R is diagonal, and W is turned to where the bound is highest, by steps of Newton's that
    are taken where the bound keeps the promise of the M-step.

    Args:
        ppca: where to start; fitted in place.
        x, mask: as for :func:`fit_em`.
        covariance: the family of q, see :mod:`ppl_vae.guides.families`.
        rotate: by default for ``"diagonal"``, the only family that has a use for it.
        noise_floor, tol, max_iterations, starts: as in :func:`fit_em`; ``tol`` is of the bound.

    The end is certified as that of :func:`fit_em`, by the bound. Without rotation, the fit does
    not go on from the best parameters where all that is to be gained is a rotation.

    Raises:
        ValueError, FloatingPointError: as :func:`fit_em`; if ``rotate`` is set for another family.
    """
    check_option("covariance", covariance, COVARIANCES)
    if rotate and covariance != "diagonal":
        raise ValueError(
            f"rotate=True needs covariance='diagonal', got {covariance!r}: on principal axes only "
            "a diagonal q is exact, so elsewhere the step would not be monotone"
        )
    turn = covariance == "diagonal" if rotate is None else rotate
    return _ascended(
        ppca, x, mask, f"variational EM ({covariance}{', rotating' if turn else ''})",
        family=covariance, prior_update="rotate" if turn else "none",
        noise_floor=noise_floor, tol=tol, max_iterations=max_iterations, starts=starts,
    )  # fmt: skip


def _ascended(
    ppca: PPCA,
    x: RowSource,
    mask: ArrayLike | None,
    name: str,
    *,
    family: str = "full",
    prior_update: str,
    accelerated: bool = False,
    noise_floor: float,
    tol: float,
    max_iterations: int,
    starts: int,
) -> FitResult:
    began = time.perf_counter()
    check_int("max_iterations", max_iterations)
    check_int("starts", starts)
    blocks = RowBlocks(x, mask, device=ppca.loc.device, rescale=True)
    with threads(1):  # see summarize
        columns, covariance = _statistics(ppca, blocks)
        noise = Noise.of(ppca, columns, noise_floor, accelerated=accelerated)
    pairs = undetermined_pairs(blocks, ppca.latent_dim) if covariance is None else None
    known = columns.notes() + describe_undetermined(pairs, ppca.latent_dim)
    missing = MissingDataProblem(blocks, columns, noise, family, prior_update)
    ends = []
    for number in range(starts):
        loadings, loc, variance, notes = _start(ppca, columns, noise, blocks.unit, number)
        start = partial(MissingDataEM, missing, loadings, loc, variance)
        if covariance is not None:
            setting, notes = CompleteProblem(covariance, noise, family, prior_update), ()
            start = partial(CompleteDataEM, setting, loadings, variance)
        with threads(1 if covariance is not None else torch.get_num_threads()):
            ends.append(
                run_em(
                    start, name, tol=tol, max_iterations=max_iterations,
                    notes=known + notes, began=time.perf_counter() if number else began,
                )
            )  # fmt: skip
    state, found = best_of(ends)
    ppca.undetermined = None if pairs is None else pairs.to(ppca.loc.device)
    scale, unit = noise.scale(state.variance), blocks.unit
    ppca.assign(loadings=state.loadings * unit, loc=state.loc * unit, noise_scale=scale * unit)
    return found.shifted(_shift(columns, unit), 0.0)


def _statistics(ppca: PPCA, blocks: RowBlocks) -> tuple[ColumnStats, SampleCovariance | None]:
    # Sums are in float64 whatever the model's dtype, on the model's device.
    columns, covariance = summarize(blocks)
    if len(columns.mean) != ppca.data_dim:
        raise ValueError(f"x has {len(columns.mean)} columns, the model data_dim={ppca.data_dim}")
    (covariance or columns).check_rank(ppca.latent_dim)
    resolution = torch.finfo(ppca.loc.dtype).eps
    columns.check(diagonal=ppca.noise == "diagonal", resolution=resolution)
    return columns, covariance


def _complete(columns: ColumnStats, covariance: SampleCovariance | None) -> SampleCovariance:
    if covariance is None:
        raise ValueError(missing_message(columns))
    return covariance


def _shift(columns: ColumnStats, unit: float) -> float:
    # From log p per datum in units of so much of x to that in the units of x.
    cells = int(columns.count.sum()) if unit != 1 else 0
    return -math.log(unit) * cells / columns.rows


def _start(
    ppca: PPCA, columns: ColumnStats, noise: Noise, unit: float, number: int
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    # Loadings, mean and noise variances, and a note on means that were too far off to start from:
    # those of the model; from the second start on random ones.
    loadings, loc, scale = (
        parameter.detach().to(columns.mean) / unit
        for parameter in (ppca.loadings, ppca.loc, ppca.noise_scale)
    )
    if number:
        loadings, loc, scale = _random_start(columns, noise, loadings.shape[1], number)
    variance = scale.square().expand(len(loc))
    variance = (
        variance if noise.min_variance is None else torch.maximum(variance, noise.min_variance)
    )
    far = (loc - columns.mean).square() > FAR**2 * columns.variance.max()
    moved = f"the mean of {int(far.sum())} columns was far from any data: started from the data's"
    return loadings, torch.where(far, columns.mean, loc), variance, (moved,) * bool(far.any())


def _random_start(
    columns: ColumnStats, noise: Noise, latent_dim: int, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    # As PPCA.like: half of the variance is noise.
    variance = columns.variance.mean() if noise.min_variance is None else columns.variance
    scale = (variance / 2).sqrt()
    normal = np.random.default_rng(number).normal(size=(len(columns.mean), latent_dim))
    loadings = torch.from_numpy(normal / latent_dim**0.5).to(columns.mean)
    return loadings * scale.reshape(-1, 1), columns.mean, scale
