"""E- and M-steps of linear-Gaussian models on data with missing values, block by block.

This is where missing values enter EM. The E-step conditions each row on its observed entries:
q_n = N(m_n, V_n), with m_n the posterior mean and V_n the covariance, of a given family, that is
closest to the posterior's. For EM and PX-EM it is the posterior's, for variational EM it is not.
The M-step regresses each column on (z, 1) over the rows in which the column is observed. It needs
sums over rows alone (``ExpectedStatistics``), so that blocks of rows add up. All of these but
the residuals are one matrix product with the patterns of missing values.

The regression is of the residuals at the current parameters, r_n = x_n - mu - W m_n, and returns
increments of the parameters. This avoids differences of large numbers, however small the noise is.
"""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Self
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.devices.accelerators import read_together
from ppl_vae.data.column_stats import ColumnStats
from ppl_vae.data.sources.row_blocks import RowBlock, RowBlocks
from ppl_vae.inference.em.closed_form import rotate_if_collinear
from ppl_vae.inference.em.expected_covariance import (
    expected_covariance_factor,
    expected_leading_eigenpairs,
)
from ppl_vae.inference.em.expected_statistics import ExpectedStatistics, SummedMoments
from ppl_vae.inference.em.noise import Noise
from ppl_vae.inference.em.normal_equations import solve_normal_equations
from ppl_vae.inference.em.state import EMState, LinearGaussianParameters
from ppl_vae.models.linear.eigen import LeadingEigenpairs, cholesky_factor
from ppl_vae.models.linear.linear_gaussian import LOG_2PI, MissingnessPatterns

MAX_ANGLE = math.pi / 8
"""The largest angle of one step of the rotation of W, in radians."""
NEGLIGIBLE_NOISE = (1e2 * torch.finfo(torch.float64).eps) ** 2
"""A noise variance below this share of the variance of the data consists of rounding errors."""


@dataclass(frozen=True)
class MStepRegression:
    """The regression of each column on (z, 1) over the rows in which the column is observed.

    Attributes:
        loadings: W*, (D, K).
        loc: mu*, (D,).
        squares: E (x - mu* - W* z)^2, summed over these rows, (D,).
        counts: the number of these rows, (D,).
    """

    loadings: Float[Tensor, "D K"]
    loc: Float[Tensor, " D"]
    squares: Float[Tensor, " D"]
    counts: Float[Tensor, " D"]

    @classmethod
    def of(cls, statistics: ExpectedStatistics, loadings: Tensor, loc: Tensor) -> Self:
        """The regression, from statistics at the parameters ``loadings`` and ``loc``."""
        moments = SummedMoments.unpack(statistics.by_column, loadings.shape[1])
        latent = (moments.covariance @ loadings[..., None])[..., 0]  # sum V w_d
        design = torch.cat([moments.mean, moments.num_rows[:, None]], 1)
        second_moment = moments.covariance + moments.mean_outer
        gram = torch.cat([second_moment, moments.mean[:, None]], 1)
        gram = torch.cat([gram, design[..., None]], 2)
        cross = statistics.residual - torch.nn.functional.pad(latent, (0, 1))
        change = solve_normal_equations(gram, cross)
        squares = statistics.squares + (loadings * latent).sum(1) - (cross * change).sum(1)
        return cls(loadings + change[:, :-1], loc + change[:, -1], squares, moments.num_rows)


@dataclass(frozen=True)
class MissingDataProblem:
    """The data, the noise model and the options of EM on data with missing values.

    Attributes:
        blocks: the data.
        columns: statistics of the columns.
        noise: the noise model, isotropic or diagonal.
        family: the family of q, see :mod:`ppl_vae.guides.families`.
        prior_update: ``"fixed"``: z's prior stays N(0, I) in the M-step; ``"expand"`` (PX-EM):
            the M-step also estimates z's mean eta and covariance R, which are then absorbed,
            mu <- mu* + W* eta, W <- W* chol(R); ``"rotate"``, for diagonal q: R is diagonal, so
            that q stays in its family, and W is then rotated towards the highest bound.
    """

    blocks: RowBlocks
    columns: ColumnStats
    noise: Noise
    family: str = "full"
    prior_update: str = "expand"
    _patterns: MutableMapping[RowBlock, MissingnessPatterns] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    def patterns_of(self, block: RowBlock) -> MissingnessPatterns:
        """The patterns of the observed columns of a block, which are found once."""
        like = self.columns.mean
        if block.observed is None:
            return MissingnessPatterns.complete(like)
        if block not in self._patterns:
            self._patterns[block] = MissingnessPatterns.distinct(block.observed, like)
        return self._patterns[block]


class MissingDataEM(EMState):
    """The state of EM on data with missing values; constructing it is one pass over the data.

    Attributes:
        statistics: the sums over rows, at the state's parameters.
        num_rows: N.

    Raises:
        ValueError: if the number of rows has changed; if the noise is too small relative to the
            loadings for float64.
    """

    def __init__(
        self, problem: MissingDataProblem, loadings: Tensor, loc: Tensor, variance: Tensor
    ) -> None:
        self.problem, self.noise, self.family = problem, problem.noise, problem.family
        self.needs_refinement = problem.family == "diagonal"
        self.stalls_in_rotation = self.needs_refinement and problem.prior_update == "fixed"
        loadings = loadings if self.needs_refinement else rotate_if_collinear(loadings, variance)
        self.processes = problem.blocks.processes
        self.parameters = LinearGaussianParameters(loadings, loc, variance).of_rank_zero(
            self.processes
        )
        with self.processes.together():
            own = self._statistics()
        self.statistics, self.num_rows = own.over_processes(self.processes), problem.columns.rows
        statistics = self.statistics
        log_likelihood = statistics.scalars[0] / self.num_rows
        bound = log_likelihood - statistics.scalars[2] / self.num_rows
        self.column_variance = problem.columns.variance
        squared_residual = statistics.squares / problem.columns.count
        rounding = self.noise.rounding(self.column_variance, squared_residual, variance)
        (num_read,) = self.read(bound, log_likelihood, rounding, statistics.overall[-1])
        if int(num_read) != self.num_rows:
            raise ValueError(
                f"x had {self.num_rows} rows when it was first read, and {int(num_read)} now; "
                "each time it is iterated over it must give the same blocks"
            )

    def _statistics(self) -> ExpectedStatistics:
        # The sums run over the rows of this process.
        data_dim, latent_dim = self.parameters.loadings.shape
        total = None
        for block in self.problem.blocks.read(4 * data_dim + 4 * latent_dim**2):
            try:
                patterns = self.problem.patterns_of(block)
                part = ExpectedStatistics.of(
                    block, patterns, *self.parameters, self.problem.family
                )
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                largest = self.parameters.loadings.abs().max()
                least = self.parameters.variance.min().sqrt()
                raise ValueError(
                    "the loadings are too large relative to the noise for float64 (the largest "
                    f"loading is {float(largest):.3g}, the smallest noise scale "
                    f"{float(least):.3g}); start from PPCA.like(x)"
                ) from error
            total = part if total is None else total + part
        return ExpectedStatistics.zero(self.parameters.loadings) if total is None else total

    def e_step(self, loadings: Tensor, loc: Tensor, variance: Tensor) -> "MissingDataEM":
        """The state after an E-step at W, mu and psi: one pass over the data."""
        return MissingDataEM(self.problem, loadings, loc, variance)

    def residual_moments(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """The means of r^2 and of w_d' V w_d over the rows in which the column is observed."""
        loadings = self.parameters.loadings
        moments = SummedMoments.unpack(self.statistics.by_column, loadings.shape[1])
        latent = (moments.covariance @ loadings[..., None])[..., 0]  # sum V w_d
        residual_variance = (loadings * latent).sum(1) / moments.num_rows
        return self.statistics.squares / moments.num_rows, residual_variance

    def covariance_factor(self) -> Float[Tensor, "R D"]:
        """F, with F'F the expected covariance of the completed data."""
        return expected_covariance_factor(self.problem.blocks, self.parameters)

    def leading_eigenpairs(self) -> LeadingEigenpairs:
        """The leading eigenpairs of Psi^-1/2 S Psi^-1/2, S that covariance."""
        return expected_leading_eigenpairs(self.problem.blocks, self.parameters)

    def m_step(self) -> tuple[Float[Tensor, ""], LinearGaussianParameters]:
        """The regressions, and the update of z's prior.

        Raises:
            ValueError: if the noise has vanished: the likelihood has no maximum.
        """
        latent_dim = self.parameters.loadings.shape[1]
        fit = MStepRegression.of(self.statistics, self.parameters.loadings, self.parameters.loc)
        variance = self.noise.variance(fit.squares, fit.counts)
        overall = self.statistics.overall / self.num_rows
        moments = SummedMoments.unpack(overall, latent_dim)
        second_moment = moments.covariance + moments.mean_outer
        loadings, loc, prior = fit.loadings, fit.loc, None
        if self.problem.prior_update != "fixed":
            prior = second_moment - torch.outer(moments.mean, moments.mean)
            if self.problem.prior_update == "rotate":
                prior = prior.diagonal().diag()
            loc = loc + loadings @ moments.mean
            loadings = loadings @ cholesky_factor(prior)
        bound = self._bound(fit, variance, second_moment.trace(), prior)
        bound = self.processes.broadcast(bound)  # on which all processes decide whether to stop
        bound, least, typical = read_together(
            bound, variance.min(), self.problem.columns.variance.mean()
        )
        self._check_noise(float(least), float(typical))
        return bound, LinearGaussianParameters(loadings, loc, variance)

    def accelerated_proposal(
        self, parameters: LinearGaussianParameters
    ) -> LinearGaussianParameters | None:
        """For rotating variational EM, W rotated by a Newton step in every plane at once.

        The bound depends on the rotation through -1/2 f, f = sum_n sum_k log (P_n)_kk. A rotation
        by t in the plane of axes i and j has f' = sum_n 2 P_ij (1 / P_ii - 1 / P_jj) and
        f'' = sum_n 2 (P_jj / P_ii + P_ii / P_jj - 2) - 4 P_ij^2 (1 / P_ii^2 + 1 / P_jj^2). No
        rotation makes the precisions of all rows diagonal.
        """
        if self.problem.prior_update != "rotate":
            return super().accelerated_proposal(parameters)
        share, ratio, square = self.statistics.rotation
        slope = 2 * (share - share.mT)
        curvature = 2 * (ratio + ratio.mT - 2 * self.num_rows) - 4 * (square + square.mT)
        angle = -slope / curvature.abs().clamp(min=1e-9 * self.num_rows)
        rotation = torch.linalg.matrix_exp(angle.clamp(-MAX_ANGLE, MAX_ANGLE).mT)
        return parameters._replace(loadings=parameters.loadings @ rotation)

    def _check_noise(self, least: float, typical: float) -> None:
        if not least > NEGLIGIBLE_NOISE * typical:
            latent_dim = self.parameters.loadings.shape[1]
            raise ValueError(
                f"latent_dim={latent_dim} leaves no noise, or too little for float64 "
                f"({least:.1g}, where the mean variance of a column is "
                f"{typical:.1g}): the observed entries of x lie in a subspace of this "
                "dimension, and the likelihood has no maximum; take a smaller latent_dim"
            )

    def _bound(
        self, fit: MStepRegression, variance: Tensor, second_moment: Tensor, prior: Tensor | None
    ) -> Tensor:
        # E_q[log p(x, z)] + H[q] per datum at the M-step's parameters, for z ~ N(eta, prior).
        expected_x = fit.counts * (LOG_2PI + variance.log()) + fit.squares / variance
        latent_dim = self.parameters.loadings.shape[1]
        entropy = self.statistics.scalars[1] / self.num_rows + 0.5 * latent_dim
        # At its maximum the quadratic form of the expanded prior is K.
        expected_z = second_moment if prior is None else torch.logdet(prior) + latent_dim
        return -0.5 * (expected_x.sum() / self.num_rows + expected_z) + entropy
