"""E- and M-steps of linear-Gaussian models on data with missing values, block by block.

The E-step gives each row q_n = N(m_n, V_n), with m_n the posterior's mean and V_n the member of a
family that is closest to its covariance: EM and PX-EM keep that itself, variational EM does not.
The M-step regresses each column on (z, 1) over the rows that have it. What that needs is sums over
rows (:class:`ExpectedStatistics`), so blocks of rows add up, and all of it but the residuals is
one matrix product with the patterns of missing values.

The regression is of what the last parameters left over, r_n = x_n - mu - W m_n, and gives what is
to be added to them: nothing large is subtracted from anything large, however small the noise.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.data.column_stats import ColumnStats
from ppl_vae.data.row_blocks import RowBlock, RowBlocks
from ppl_vae.inference.em.closed_form import conditioned
from ppl_vae.inference.em.expected_covariance import expected_factor, expected_leading
from ppl_vae.inference.em.noise import Noise
from ppl_vae.inference.em.state import EMState, Parameters, project_covariance
from ppl_vae.models.eigen import LeadingEigenpairs
from ppl_vae.models.linear_gaussian import (
    LOG_2PI,
    LatentPosterior,
    MissingnessPatterns,
    from_tril_vec,
    outer_tril,
    tril_vec,
)

LARGEST = math.pi / 8
"""Of a step of a rotation, in radians."""
VANISHED = (1e2 * torch.finfo(torch.float64).eps) ** 2
"""A noise variance of so small a part of the data's is made of rounding errors."""


@dataclass(frozen=True)
class ExpectedStatistics:
    """Sums over rows of what an M-step needs; m and V are mean and covariance of the row's q.

    With P = K (K + 1) / 2 the length of a symmetric matrix's lower triangle, the columns of
    ``by_column`` and ``overall`` are V (P), m m' (P), m (K) and 1.

    Attributes:
        by_column: over the rows that have the column, (D, 2 P + K + 1).
        overall: over all rows, (2 P + K + 1).
        residual: of r (m, 1)' over the rows that have the column, (D, K + 1).
        squares: of r^2 over the rows that have the column, (D,).
        scalars: of log p(x), of 1/2 log det V and of KL(q || p(z | x)), (3,).
        turning: for diagonal q, of P_ij / P_ii, P_jj / P_ii and P_ij^2 / P_ii^2 with P the
            posterior's precision, (3, K, K); zero for others.
    """

    by_column: Float[Tensor, "D Q"]
    overall: Float[Tensor, " Q"]
    residual: Float[Tensor, "D L"]
    squares: Float[Tensor, " D"]
    scalars: Float[Tensor, " 3"]
    turning: Float[Tensor, "3 K K"]

    @classmethod
    def of(
        cls, block: RowBlock, loadings: Tensor, loc: Tensor, variance: Tensor, family: str = "full"
    ) -> Self:
        """The sums over a block of rows, each with its q of the family."""
        seen = block.observed
        patterns = (
            MissingnessPatterns.complete(loc)
            if seen is None
            else MissingnessPatterns.shared(seen, loc)
        )
        found = LatentPosterior.of(block.values, patterns, loadings, loc, variance)
        one = torch.ones_like(found.mean[:, :1])
        counts = patterns.sum_by_pattern(one)
        covariance, half_log_det, kl = _closest(found, family)
        spread = tril_vec(covariance) * counts
        second = patterns.sum_by_pattern(outer_tril(found.mean, found.mean))
        stacked = torch.cat([spread, second, patterns.sum_by_pattern(found.mean), counts], 1)
        totals = torch.stack([half_log_det, kl]) @ counts[:, 0]
        return cls(
            by_column=patterns.observed.mT @ stacked,
            overall=stacked.sum(0),
            residual=found.residual.mT @ torch.cat([found.mean, one], 1),
            squares=found.residual.square().sum(0),
            scalars=torch.cat([found.log_likelihood().sum().reshape(1), totals]),
            turning=_turning(found.precision, counts * (family == "diagonal")),
        )

    def __add__(self, other: "ExpectedStatistics") -> "ExpectedStatistics":
        pairs = ((value, vars(other)[name]) for name, value in vars(self).items())
        return ExpectedStatistics(*(mine + its for mine, its in pairs))


def _closest(found: LatentPosterior, family: str) -> tuple[Tensor, Tensor, Tensor]:
    # V, 1/2 log det V and KL(q || p(z | x)), one a pattern.
    if family == "full":
        half_log_det = found.half_log_det
        return found.tril @ found.tril.mT, half_log_det, torch.zeros_like(half_log_det)
    covariance = project_covariance(found.precision, family)
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    half_log_det = variances.log().sum(-1) / 2
    history = (found.precision.diagonal(dim1=-2, dim2=-1) * variances).sum(-1)
    kl = found.half_log_det - half_log_det + (history - variances.shape[-1]) / 2
    return covariance, half_log_det, kl


def _turning(
    precision: Float[Tensor, "U K K"], counts: Float[Tensor, "U 1"]
) -> Float[Tensor, "3 K K"]:
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    share = precision / diagonal[..., None]
    ratio = diagonal[:, None] / diagonal[..., None]
    return torch.stack([(part * counts[..., None]).sum(0) for part in (share, ratio, share**2)])


@dataclass(frozen=True)
class MStepRegression:
    """Each column on (z, 1) over the rows that have it.

    Attributes:
        loadings: W*, (D, K).
        loc: mu*, (D,).
        squares: of the residuals, E (x - mu* - W* z)^2 summed over those rows, (D,).
        counts: these rows, (D,).
    """

    loadings: Float[Tensor, "D K"]
    loc: Float[Tensor, " D"]
    squares: Float[Tensor, " D"]
    counts: Float[Tensor, " D"]

    @classmethod
    def of(cls, sums: ExpectedStatistics, loadings: Tensor, loc: Tensor) -> Self:
        """From the sums at the parameters ``loadings`` and ``loc``."""
        spread, means, mean, counts = split(sums.by_column, loadings.shape[1])
        along = (spread @ loadings[..., None])[..., 0]  # sum V w_d
        ones = torch.cat([mean, counts[:, None]], 1)
        second = torch.cat([torch.cat([spread + means, mean[:, None]], 1), ones[..., None]], 2)
        left = sums.residual - torch.nn.functional.pad(along, (0, 1))
        change = torch.linalg.solve(second, left)
        squares = sums.squares + (loadings * along).sum(1) - (left * change).sum(1)
        return cls(loadings + change[:, :-1], loc + change[:, -1], squares, counts)


def split(sums: Float[Tensor, "*B Q"], latent_dim: int) -> tuple[Tensor, ...]:
    """Sums of V (*B, K, K), m m' (*B, K, K), m (*B, K) and 1 (*B) from a row of
    :class:`ExpectedStatistics`."""
    size = latent_dim * (latent_dim + 1) // 2
    spread, means, mean, count = sums.split([size, size, latent_dim, 1], -1)
    return from_tril_vec(spread, latent_dim), from_tril_vec(means, latent_dim), mean, count[..., 0]


@dataclass(frozen=True)
class MissingDataProblem:
    """What stays as it is.

    Attributes:
        blocks: the data.
        columns: what each holds.
        noise: one variance or D.
        family: of q, see :mod:`ppl_vae.guides.families`.
        fold: ``"none"``: the M-step leaves z's prior alone; ``"expand"``, PX-EM: it chooses z's
            mean eta and covariance R too, and folds them back, mu <- mu* + W* eta,
            W <- W* chol(R); ``"rotate"``, for diagonal q: R is diagonal, as the family is kept by
            no other, and W is then turned towards the rotation with the highest bound.
    """

    blocks: RowBlocks
    columns: ColumnStats
    noise: Noise
    family: str = "full"
    prior_update: str = "expand"


class MissingDataEM(EMState):
    """A position on data with missing values; making one is one pass over them.

    Raises:
        ValueError: if the rows are not as many as they were; if the noise is too small beside the
            loadings for float64.
    """

    def __init__(
        self, holes: MissingDataProblem, loadings: Tensor, loc: Tensor, variance: Tensor
    ) -> None:
        self.holes, self.noise, self.family = holes, holes.noise, holes.family
        self.needs_steps = holes.family == "diagonal"
        self.stalls = self.needs_steps and holes.prior_update == "none"
        loadings = loadings if self.needs_steps else conditioned(loadings, variance)
        self.loadings, self.loc, self.variance = loadings, loc, variance
        self.sums, self.rows = self._summed(), holes.columns.rows
        sums = self.sums
        if int(sums.overall[-1]) != self.rows:
            raise ValueError(
                f"x had {self.rows} rows when it was first read, and {int(sums.overall[-1])} now; "
                "each time it is iterated over it must give the same blocks"
            )
        self.log_likelihood = sums.scalars[0] / self.rows
        self.bound = self.log_likelihood - sums.scalars[2] / self.rows
        counts = holes.columns.count
        self.total = holes.columns.variance
        self.rounding = self.noise.rounding(self.total, sums.squares / counts, variance)

    def _summed(self) -> ExpectedStatistics:
        data_dim, latent_dim = self.loadings.shape
        sums = None
        for block in self.holes.blocks.read(4 * data_dim + 4 * latent_dim**2):
            try:
                parameters = self.loadings, self.loc, self.variance
                found = ExpectedStatistics.of(block, *parameters, self.holes.family)
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                largest, least = self.loadings.abs().max(), self.variance.min().sqrt()
                raise ValueError(
                    "the loadings are too large beside the noise to reckon with in float64 (the "
                    f"largest loading is {float(largest):.3g}, the smallest noise scale "
                    f"{float(least):.3g}); start from PPCA.like(x)"
                ) from error
            sums = found if sums is None else sums + found
        assert sums is not None
        return sums

    def at(self, *parameters: Tensor) -> "MissingDataEM":
        """The position after an E-step at W, mu and psi: one pass over the data."""
        return MissingDataEM(self.holes, *parameters)

    def own_squares(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """The means of r^2 and of w_d' V w_d over the rows that have the column."""
        spread, _, _, counts = split(self.sums.by_column, self.loadings.shape[1])
        along = (self.loadings * (spread @ self.loadings[..., None])[..., 0]).sum(1)
        return self.sums.squares / counts, along / counts

    def factor(self) -> Float[Tensor, "R D"]:
        """F, with F'F the expected covariance of the rows given what was observed."""
        return expected_factor(self.holes.blocks, self.loadings, self.loc, self.variance)

    def leading(self) -> LeadingEigenpairs:
        """Of Psi^-1/2 S Psi^-1/2, S that covariance."""
        return expected_leading(self.holes.blocks, self.loadings, self.loc, self.variance)

    def m_step(self) -> tuple[Float[Tensor, ""], Parameters]:
        """The regressions, and the fold.

        Raises:
            ValueError: if the noise has vanished: the likelihood has no maximum.
        """
        fit = MStepRegression.of(self.sums, self.loadings, self.loc)
        variance = self.noise.variance(fit.squares, fit.counts)
        self._check_noise(variance)
        spread, means, mean, _ = split(self.sums.overall / self.rows, self.loadings.shape[1])
        loadings, loc, prior = fit.loadings, fit.loc, None
        if self.holes.prior_update != "none":
            prior = spread + means - torch.outer(mean, mean)
            prior = prior if self.holes.prior_update == "expand" else prior.diagonal().diag()
            loc, loadings = loc + loadings @ mean, loadings @ torch.linalg.cholesky(prior)
        after = self._bound(fit, variance, (spread + means).trace(), prior)
        return after, (loadings, loc, variance)

    def accelerated_proposal(self, parameters: Parameters) -> Parameters | None:
        """For rotating variational EM, W turned by a step of Newton's in every plane at once.

        The bound depends on the rotation by -1/2 f, f = sum_n sum_k log (P_n)_kk. A turn by t in
        the plane of axes i and j has f' = sum_n 2 P_ij (1 / P_ii - 1 / P_jj) and
        f'' = sum_n 2 (P_jj / P_ii + P_ii / P_jj - 2) - 4 P_ij^2 (1 / P_ii^2 + 1 / P_jj^2). No
        rotation makes every row's precision diagonal.
        """
        if self.holes.prior_update != "rotate":
            return super().accelerated_proposal(parameters)
        loadings, loc, variance = parameters
        share, ratio, square = self.sums.turning
        slope = 2 * (share - share.mT)
        curvature = 2 * (ratio + ratio.mT - 2 * self.rows) - 4 * (square + square.mT)
        turn = (-slope / curvature.abs().clamp(min=1e-9 * self.rows)).clamp(-LARGEST, LARGEST)
        return loadings @ torch.linalg.matrix_exp(turn.mT), loc, variance

    def _check_noise(self, variance: Tensor) -> None:
        usual = self.holes.columns.variance.mean()
        if not bool((variance > VANISHED * usual).all()):
            raise ValueError(
                f"latent_dim={self.loadings.shape[1]} leaves no noise, or too little for float64 "
                f"({float(variance.min()):.1g} beside a column variance of {float(usual):.1g}): "
                "what was observed of x lies in so many dimensions, and the likelihood has no "
                "maximum; take a smaller latent_dim"
            )

    def _bound(
        self, fit: MStepRegression, variance: Tensor, second: Tensor, prior: Tensor | None
    ) -> Tensor:
        # E_q[log p(x, z)] + H[q] a datum at the M-step's parameters, for z ~ N(eta, prior).
        expected_x = fit.counts * (LOG_2PI + variance.log()) + fit.squares / variance
        entropy = self.sums.scalars[1] / self.rows + 0.5 * self.loadings.shape[1]
        # At its own maximum the expanded prior's quadratic form is K.
        against = second if prior is None else torch.logdet(prior) + self.loadings.shape[1]
        return -0.5 * (expected_x.sum() / self.rows + against) + entropy
