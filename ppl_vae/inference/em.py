"""Exact fits of PPCA to complete data: closed form, EM, PX-EM and variational EM.

All EM variants are one coordinate ascent on E_q[log p(x, z)] + H[q] with q a Gaussian of a family:
q(z | x_n) = N(M^-1 W'(x_n - mu), V), V the family's member that is closest to the posterior. With
S the sample covariance they need S W alone, O(D^2 K) an iteration however many data there are.
"""

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.arguments import ArrayLike, as_matrix, at_least, choose_option
from ppl_vae.guides import COVARIANCES
from ppl_vae.models.moments import CONSTANT_COLUMNS, SampleCovariance
from ppl_vae.models.ppca import PPCA
from ppl_vae.results import FitResult

LOG_2PI = math.log(2 * math.pi)


def fit_closed_form(ppca: PPCA, x: ArrayLike) -> FitResult:
    """Set ppca to the maximum-likelihood solution.

    With l_1 >= ... the eigenvalues of the sample covariance over N and u_k its eigenvectors,
    sigma^2 is the mean of the D - K smallest and w_k = u_k sqrt(l_k - sigma^2).

    Args:
        ppca: fitted in place.
        x: complete data, (N, D).

    Raises:
        ValueError: if x has NaN, K >= the rank of the centred data, or x has another width.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), equations 7 and 8.
    """
    start = time.perf_counter()
    covariance = _statistics(ppca, x)
    values, vectors = covariance.eigh()
    k = ppca.latent_dim
    variance = values[k:].sum() / (ppca.data_dim - k)
    loadings = vectors[:, :k] * (values[:k] - variance).sqrt()
    ppca.assign(loadings=loadings, loc=covariance.mean, noise_scale=variance.sqrt())
    point = _Point.at(covariance, loadings, variance)
    seconds = time.perf_counter() - start
    return FitResult(
        algorithm="closed form",
        objective=point.log_likelihood.reshape(1),
        log_likelihood=point.log_likelihood.reshape(1),
        elapsed=torch.tensor([seconds]),
        steps=1,
        seconds=seconds,
        stopped="exact",
        notes=_notes(covariance),
    )


def fit_em(
    ppca: PPCA,
    x: ArrayLike,
    *,
    accelerate: bool = True,
    tol: float = 1e-9,
    max_iterations: int = 10_000,
) -> FitResult:
    """Fit ppca to complete data by EM, or by PX-EM.

    PX-EM lets the M-step choose z's covariance R too, and folds it back: W <- W chol(R). Both
    are monotone and end at the closed form from loadings in general position. EM's scale error
    contracts by 1 - 2 r (1 - r) with r = sigma^2 / l_i, PX-EM's by r^2; neither is faster than
    (l_{K+1} / l_K)^2 in the subspace.

    Args:
        ppca: where to start; fitted in place.
        x: complete data, (N, D).
        accelerate: PX-EM rather than EM.
        tol: stop when the log-likelihood still to be gained, extrapolated from the last three
            iterations, falls below this many nats a datum.
        max_iterations: stop at the latest after so many.

    Raises:
        ValueError: as :func:`fit_closed_form`.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), appendix B.
        Liu, Rubin, Wu: Parameter expansion to accelerate EM: the PX-EM algorithm (1998).
    """
    fold = "expand" if accelerate else "none"
    name = "PX-EM" if accelerate else "EM"
    return _coordinate_ascent(ppca, x, name, "full", fold, tol, max_iterations)


def variational_em(
    ppca: PPCA,
    x: ArrayLike,
    *,
    covariance: str = "diagonal",
    rotate: bool | None = None,
    tol: float = 1e-9,
    max_iterations: int = 10_000,
) -> FitResult:
    """Fit ppca to complete data by EM with a restricted q_i a datum, each step in closed form.

    The optimal mean is the posterior's; the optimal variances are sigma^2 / M_kk (diagonal),
    sigma^2 K / tr M (isotropic), 1 (unit). With diagonal q it stalls in the rotation of W: axes
    i and j contract by (s2 + sqrt(a_i a_j))^2 / (l_i l_j), a = l - s2. ``rotate`` expands z's
    covariance R as PX-EM does, and then turns W = U s V' to U s, where the best diagonal q is
    exact; this is monotone too.

    Args:
        ppca: where to start; fitted in place.
        x: complete data, (N, D).
        covariance: the family of q, see :mod:`ppl_vae.guides`.
        rotate: by default for ``"diagonal"``, the only family that has a use for it.
        tol, max_iterations: as in :func:`fit_em`; ``tol`` is of the bound.

    Raises:
        ValueError: as :func:`fit_closed_form`; if ``rotate`` is set for another family.
    """
    choose_option("covariance", covariance, COVARIANCES)
    if rotate and covariance != "diagonal":
        raise ValueError(
            f"rotate=True needs covariance='diagonal', got {covariance!r}: on principal axes only "
            "a diagonal q is exact, so elsewhere the step would not be monotone"
        )
    turn = covariance == "diagonal" if rotate is None else rotate
    fold = "rotate" if turn else "none"
    name = f"variational EM ({covariance}{', rotating' if turn else ''})"
    return _coordinate_ascent(ppca, x, name, covariance, fold, tol, max_iterations)


def _statistics(ppca: PPCA, x: ArrayLike) -> SampleCovariance:
    # Sums are in float64 whatever the model's dtype, on the model's device.
    covariance = SampleCovariance.of(as_matrix(x).to(ppca.loc.device))
    if covariance.data_dim != ppca.data_dim:
        raise ValueError(
            f"x has {covariance.data_dim} columns, the model data_dim={ppca.data_dim}"
        )
    covariance.check_rank(ppca.latent_dim)
    return covariance


def _notes(covariance: SampleCovariance) -> tuple[str, ...]:
    constant = covariance.constant_columns()
    return (f"{CONSTANT_COLUMNS}: {', '.join(map(str, constant))}",) if constant else ()


@dataclass(frozen=True)
class _Point:
    """Parameters, and what an iteration needs of the data there."""

    loadings: Float[Tensor, "D K"]
    variance: Float[Tensor, ""]
    precision: Float[Tensor, "K K"]  # M
    product: Float[Tensor, "D K"]  # S W
    trace: Float[Tensor, ""]  # tr S

    @classmethod
    def at(cls, covariance: SampleCovariance, loadings: Tensor, variance: Tensor) -> "_Point":
        eye = torch.eye(loadings.shape[1]).to(loadings)
        precision = loadings.mT @ loadings + variance * eye
        return cls(loadings, variance, precision, covariance @ loadings, covariance.trace)

    @property
    def log_likelihood(self) -> Tensor:
        """log p(x) averaged over the data: -1/2 (D log 2 pi + log det C + tr(C^-1 S))."""
        d, k = self.loadings.shape
        log_det = (d - k) * self.variance.log() + torch.logdet(self.precision)
        explained = torch.linalg.solve(self.precision, self.loadings.mT @ self.product).trace()
        return -0.5 * (d * LOG_2PI + log_det + (self.trace - explained) / self.variance)


@dataclass(frozen=True)
class _Expectation:
    """An E-step: q's covariance, and averages over the data of what the M-step needs."""

    posterior: Float[Tensor, "K K"]  # V
    cross: Float[Tensor, "D K"]  # mean of (x - mu) m'
    second: Float[Tensor, "K K"]  # R, mean of m m' + V

    @classmethod
    def at(cls, point: _Point, covariance: str) -> "_Expectation":
        cross = torch.linalg.solve(point.precision, point.product.mT).mT
        means = torch.linalg.solve(point.precision, point.loadings.mT @ cross)
        posterior = _restricted_covariance(point.precision / point.variance, covariance)
        return cls(posterior, cross, (means + means.mT) / 2 + posterior)

    def maximize(self, trace: Tensor) -> tuple[Tensor, Tensor]:
        """The regression of x on z: loadings and noise variance."""
        loadings = torch.linalg.solve(self.second, self.cross.mT).mT
        return loadings, (trace - (loadings * self.cross).sum()) / len(loadings)

    def bound(self, loadings: Tensor, variance: Tensor, trace: Tensor, prior: Tensor) -> Tensor:
        """E_q[log p(x, z)] + H[q] a datum, for z ~ N(0, prior)."""
        d, k = loadings.shape
        fit = (loadings * (loadings @ self.second - 2 * self.cross)).sum()
        expected_x = -0.5 * (d * (LOG_2PI + variance.log()) + (trace + fit) / variance)
        second = torch.linalg.solve(prior, self.second).trace()
        expected_z = -0.5 * (torch.logdet(prior) + second)
        return expected_x + expected_z + 0.5 * (k + torch.logdet(self.posterior))


def _restricted_covariance(precision: Tensor, covariance: str) -> Tensor:
    """The covariance of the family's Gaussian closest to N(m, precision^-1), in KL(q || p)."""
    eye = torch.eye(len(precision)).to(precision)
    if covariance == "full":
        return torch.linalg.inv(precision)
    diagonal = precision.diagonal()
    return {
        "unit": eye,
        "isotropic": eye / diagonal.mean(),
        "diagonal": torch.diag(1 / diagonal),
    }[covariance]


def _fold(loadings: Tensor, second: Tensor, fold: str) -> tuple[Tensor, Tensor]:
    """The M-step's prior covariance of z, and the loadings with that prior folded into them."""
    if fold == "none":
        return loadings, torch.eye(len(second)).to(second)
    folded = loadings @ torch.linalg.cholesky(second)
    if fold == "rotate":
        u, s, _ = torch.linalg.svd(folded, full_matrices=False)
        folded = u * s
    return folded, second


def _coordinate_ascent(
    ppca: PPCA,
    x: ArrayLike,
    name: str,
    covariance: str,
    fold: str,
    tol: float,
    max_iterations: int,
) -> FitResult:
    start = time.perf_counter()
    statistics = _statistics(ppca, x)
    at_least("max_iterations", max_iterations)
    loadings = ppca.loadings.detach().to(statistics.mean)
    variance = ppca.noise_scale.detach().to(statistics.mean).square()
    point = _Point.at(statistics, loadings, variance)
    trace, stopped = _Trace(start), ""
    while not stopped:
        expectation = _Expectation.at(point, covariance)
        eye = torch.eye(ppca.latent_dim).to(point.precision)
        after_e = expectation.bound(point.loadings, point.variance, point.trace, eye)
        loadings, variance = expectation.maximize(point.trace)
        folded, prior = _fold(loadings, expectation.second, fold)
        after_m = expectation.bound(loadings, variance, point.trace, prior)
        before, point = point, _Point.at(statistics, folded, variance)
        trace.add(after_e, before.log_likelihood)
        trace.add(after_m, point.log_likelihood)
        stopped = trace.why_stop(tol, max_iterations, point)
    ppca.assign(loadings=point.loadings, loc=statistics.mean, noise_scale=point.variance.sqrt())
    return trace.result(name, stopped, _notes(statistics))


class _Trace:
    """What the iterations gave, and whether they should go on."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.bounds: list[float] = []
        self.log_likelihoods: list[float] = []
        self.elapsed: list[float] = []

    def add(self, bound: Tensor, log_likelihood: Tensor) -> None:
        self.bounds.append(float(bound))
        self.log_likelihoods.append(float(log_likelihood))
        self.elapsed.append(time.perf_counter() - self.start)

    def why_stop(self, tol: float, max_iterations: int, at: _Point) -> str:
        """Why to stop here, or an empty string.

        Gains g_t that shrink by a ratio r leave g_t r / (1 - r) to be gained.
        """
        if len(self.bounds) >= 2 * max_iterations:
            return f"after max_iterations={max_iterations}"
        if len(self.bounds) < 6:
            return ""
        first, second, third = self.bounds[-5], self.bounds[-3], self.bounds[-1]
        gain, ratio = third - second, (third - second) / max(second - first, 1e-300)
        rounding = 1e-15 * (1 + float(at.trace / at.variance)) * len(at.loadings)
        if abs(gain) <= rounding:
            return "converged to rounding"
        if gain >= 0 and ratio < 1 and gain * ratio / (1 - ratio) < tol:
            return f"converged: under {tol:g} nats a datum to gain"
        return ""

    def result(self, name: str, stopped: str, notes: tuple[str, ...]) -> FitResult:
        return FitResult(
            algorithm=name,
            objective=torch.tensor(self.bounds, dtype=torch.float64),
            log_likelihood=torch.tensor(self.log_likelihoods, dtype=torch.float64),
            elapsed=torch.tensor(self.elapsed, dtype=torch.float64),
            steps=len(self.bounds) // 2,
            seconds=time.perf_counter() - self.start,
            stopped=stopped,
            notes=notes,
        )
