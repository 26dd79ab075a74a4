"""Exact fits of PPCA and factor analysis: closed form, EM, PX-EM and variational EM.

All EM variants are one coordinate ascent on E_q[log p(x, z)] + H[q] with q a Gaussian of a family
for each datum. Complete data enter by their covariance alone (:mod:`ppl_vae.inference.complete`);
data with holes are read in each iteration, block by block (:mod:`ppl_vae.inference.missing`).
"""

import time
from functools import partial

import torch
from torch import Tensor

from ppl_vae.arguments import ArrayLike, at_least, choose_option
from ppl_vae.blocks import RowBlocks, RowSource
from ppl_vae.families import COVARIANCES
from ppl_vae.inference.complete import CompletePosition, Setting
from ppl_vae.inference.missing import HoledPosition, Holes
from ppl_vae.inference.position import Noise, ascend
from ppl_vae.models.identifiability import described, undetermined_pairs
from ppl_vae.models.moments import Columns, SampleCovariance, missing_message, summarize
from ppl_vae.models.ppca import PPCA
from ppl_vae.results import FitResult
from ppl_vae.state import threads

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
    columns, covariance = _statistics(ppca, RowBlocks(x, device=ppca.loc.device))
    covariance = _complete(columns, covariance)
    values, vectors = covariance.eigh()
    k = ppca.latent_dim
    variance = values[k:].sum() / (ppca.data_dim - k)
    loadings = vectors[:, :k] * (values[:k] - variance).sqrt()
    ppca.assign(loadings=loadings, loc=covariance.mean, noise_scale=variance.sqrt())
    ppca.undetermined = None
    setting = Setting(covariance, Noise(None))
    point = CompletePosition(setting, loadings, variance.expand(ppca.data_dim))
    seconds = time.perf_counter() - began
    return FitResult(
        algorithm="closed form",
        objective=point.log_likelihood.reshape(1),
        log_likelihood=point.log_likelihood.reshape(1),
        elapsed=torch.tensor([seconds]),
        steps=1,
        seconds=seconds,
        stopped="exact",
        notes=columns.notes(),
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
) -> FitResult:
    """Fit ppca by EM, or by PX-EM, to what was observed of x.

    PX-EM lets the M-step choose z's covariance R too (with holes also its mean eta), and folds
    them back: mu <- mu + W eta, W <- W chol(R). Both are monotone. On complete data with
    isotropic noise both end at the closed form from loadings in general position; EM's scale error
    contracts by 1 - 2 r (1 - r) with r = sigma^2 / l_i, PX-EM's by r^2; neither is faster than
    (l_{K+1} / l_K)^2 in the subspace. With diagonal noise PX-EM also lets each noise variance
    leap to where its own likelihood is highest, wherever that is no worse than the M-step: EM
    alone would near a vanishing one as 1 / t.

    Args:
        ppca: where to start (complete data have no use for its ``loc``); fitted in place.
        x: (N, D): a matrix, a memory map, or an iterable of blocks of rows. NaN is a hole.
            Complete data are read once; with holes they are read in each iteration, so that
            memory does not grow with N.
        mask: True where observed, of the shape of a matrix or memory map.
        accelerate: PX-EM rather than EM.
        noise_floor: diagonal noise: the least noise variance of a column, as a share of its
            variance. Columns that reach it (Heywood cases) are noted: without a floor the
            likelihood may have no maximum.
        tol: stop when the log-likelihood still to be gained, extrapolated from the last three
            iterations, falls below this many nats a datum.
        max_iterations: stop at the latest after so many.

    Warns:
        UserWarning: if the numbers of x or of the model are too coarse for a column.

    Raises:
        ValueError: if K >= the rank of the centred data, or what was observed turns out to leave
            no noise; if a row or column has nothing observed, or a column with a noise of its
            own is constant; if x has another width.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), appendix B.
        Rubin, Thayer: EM algorithms for ML factor analysis (1982).
        Liu, Rubin, Wu: Parameter expansion to accelerate EM: the PX-EM algorithm (1998).
    """
    return _ascended(
        ppca, x, mask, "PX-EM" if accelerate else "EM", fold="expand" if accelerate else "none",
        leaping=accelerate, noise_floor=noise_floor, tol=tol, max_iterations=max_iterations,
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
) -> FitResult:
    """Fit ppca by EM with a restricted q_i a datum, each step in closed form.

    The optimal mean is the posterior's; the optimal variances are 1 / P_kk (diagonal), K / tr P
    (isotropic), 1 (unit), with P = I + W' Psi^-1 W. With diagonal q it stalls in the rotation of
    W: axes i and j contract by (s2 + sqrt(a_i a_j))^2 / (l_i l_j), a = l - s2. ``rotate`` expands
    z's covariance R as PX-EM does, and then turns Psi^-1/2 W = U s V' to U s, where the best
    diagonal q is exact; this is monotone too. With holes no rotation makes it exact for every
    row: R is diagonal, and W is turned to where the bound is highest, by steps of Newton's that
    are taken where the bound keeps the promise of the M-step.

    Args:
        ppca: where to start; fitted in place.
        x, mask: as for :func:`fit_em`.
        covariance: the family of q, see :mod:`ppl_vae.families`.
        rotate: by default for ``"diagonal"``, the only family that has a use for it.
        noise_floor, tol, max_iterations: as in :func:`fit_em`; ``tol`` is of the bound.

    Raises:
        ValueError: as :func:`fit_em`; if ``rotate`` is set for another family.
    """
    choose_option("covariance", covariance, COVARIANCES)
    if rotate and covariance != "diagonal":
        raise ValueError(
            f"rotate=True needs covariance='diagonal', got {covariance!r}: on principal axes only "
            "a diagonal q is exact, so elsewhere the step would not be monotone"
        )
    turn = covariance == "diagonal" if rotate is None else rotate
    return _ascended(
        ppca, x, mask, f"variational EM ({covariance}{', rotating' if turn else ''})",
        family=covariance, fold="rotate" if turn else "none",
        noise_floor=noise_floor, tol=tol, max_iterations=max_iterations,
    )  # fmt: skip


def _ascended(
    ppca: PPCA,
    x: RowSource,
    mask: ArrayLike | None,
    name: str,
    *,
    family: str = "full",
    fold: str,
    leaping: bool = False,
    noise_floor: float,
    tol: float,
    max_iterations: int,
) -> FitResult:
    began = time.perf_counter()
    at_least("max_iterations", max_iterations)
    blocks, told = RowBlocks(x, mask, device=ppca.loc.device), {"tol": tol, "began": began}
    climb = partial(ascend, ppca=ppca, name=name, max_iterations=max_iterations, **told)
    with threads(1):  # see summarize
        columns, covariance = _statistics(ppca, blocks)
        noise = Noise.of(ppca, columns, noise_floor, leaping=leaping)
        loadings, loc, variance, moved = _start(ppca, columns, noise)
        if covariance is not None:
            setting = Setting(covariance, noise, family, fold)
            start = partial(CompletePosition, setting, loadings, variance)
            ppca.undetermined = None
            return climb(start, notes=columns.notes())
    pairs = undetermined_pairs(blocks, ppca.latent_dim)
    holes = Holes(blocks, columns, noise, family, fold)
    start = partial(HoledPosition, holes, loadings, loc, variance)
    found = climb(start, notes=columns.notes() + moved + described(pairs, ppca.latent_dim))
    ppca.undetermined = None if pairs is None else pairs.to(ppca.loc.device)
    return found


def _statistics(ppca: PPCA, blocks: RowBlocks) -> tuple[Columns, SampleCovariance | None]:
    # Sums are in float64 whatever the model's dtype, on the model's device.
    columns, covariance = summarize(blocks)
    if len(columns.mean) != ppca.data_dim:
        raise ValueError(f"x has {len(columns.mean)} columns, the model data_dim={ppca.data_dim}")
    (covariance or columns).check_rank(ppca.latent_dim)
    resolution = torch.finfo(ppca.loc.dtype).eps
    columns.check(diagonal=ppca.noise == "diagonal", resolution=resolution)
    return columns, covariance


def _complete(columns: Columns, covariance: SampleCovariance | None) -> SampleCovariance:
    if covariance is None:
        raise ValueError(missing_message(columns))
    return covariance


def _start(
    ppca: PPCA, columns: Columns, noise: Noise
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    # Loadings, mean and noise variances, and a note on means that were too far off to start from.
    loadings, loc, scale = (
        parameter.detach().to(columns.mean)
        for parameter in (ppca.loadings, ppca.loc, ppca.noise_scale)
    )
    variance = scale.square().expand(len(loc))
    variance = variance if noise.floors is None else torch.maximum(variance, noise.floors)
    far = (loc - columns.mean).square() > FAR**2 * columns.variance.max()
    moved = f"the mean of {int(far.sum())} columns was far from any data: started from the data's"
    return loadings, torch.where(far, columns.mean, loc), variance, (moved,) * bool(far.any())
