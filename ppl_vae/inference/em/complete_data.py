"""E- and M-steps of linear-Gaussian models on complete data, from the sample covariance alone.

q(z | x_n) = N(P^-1 W' Psi^-1 (x_n - mu), V), with P = I + W' Psi^-1 W the posterior precision and
V the covariance, of a given family, that is closest to P^-1. Sums over data are sums over the rows
of a factor F of the sample covariance, S = F'F, so that an iteration costs O(min(N, D) D K)
for any N. As with missing values, the M-step regresses the residuals and returns increments of
the loadings. This avoids differences of large numbers, however small the noise is.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.guides.families import projected_covariance
from ppl_vae.inference.em.closed_form import rotate_if_collinear, rotate_to_principal_axes
from ppl_vae.inference.em.noise import Noise
from ppl_vae.inference.em.state import EMState, LinearGaussianParameters
from ppl_vae.models.linear.eigen import LeadingEigenpairs, cholesky_factor, product
from ppl_vae.models.linear.linear_gaussian import LOG_2PI
from ppl_vae.models.linear.sufficient_statistics import SampleCovariance


@dataclass(frozen=True)
class CompleteProblem:
    """The data, the noise model and the options of EM on complete data.

    Attributes:
        covariance: the sample covariance S and the mean.
        noise: the noise model, isotropic or diagonal.
        family: the family of q, see :mod:`ppl_vae.guides.families`.
        prior_update: ``"fixed"``: z's prior stays N(0, I) in the M-step; ``"expand"`` (PX-EM):
            the M-step also estimates z's covariance R, which is then absorbed in the loadings,
            W <- W chol(R); ``"rotate"``: the same, followed by the rotation that makes
            W' Psi^-1 W diagonal, where the best diagonal q is exact.
    """

    covariance: SampleCovariance
    noise: Noise
    family: str = "full"
    prior_update: str = "expand"


class CompleteDataEM(EMState):
    """The state of EM on complete data.

    W is rotated where that avoids a loss of digits, unless q is diagonal, because the bound then
    depends on the rotation.

    Attributes:
        posterior_covariance: V, (K, K).
        mean_outer: the mean over data of m m' with m the mean of q, (K, K).
        second_moment: the mean over data of m m' + V, (K, K).
        residual_cross: the mean over data of r m' - W V with r = x - mu - W m, (D, K): the
            covariance with z that the loadings do not yet explain.
        squared_residual: the mean over data of r^2, (D,).
    """

    def __init__(self, problem: CompleteProblem, loadings: Tensor, variance: Tensor) -> None:
        self.problem, self.covariance = problem, problem.covariance
        self.noise, self.family = problem.noise, problem.family
        diagonal = self.family == "diagonal"
        self.stalls_in_rotation = diagonal and problem.prior_update == "fixed"
        loadings = loadings if diagonal else rotate_if_collinear(loadings, variance)
        self.parameters = LinearGaussianParameters(loadings, self.covariance.mean, variance)
        weighted = loadings / variance[:, None]
        self.prior = torch.eye(loadings.shape[1], dtype=loadings.dtype, device=loadings.device)
        precision = loadings.mT @ weighted + self.prior
        lower = cholesky_factor(precision)
        self.posterior_covariance = projected_covariance(precision, problem.family)
        factor = self.covariance.factor
        mean = product(factor, torch.cholesky_solve(weighted.mT, lower).mT)
        residual = factor - product(mean, loadings.mT)
        self.squared_residual = residual.square().sum(0)
        self.mean_outer = mean.mT @ mean
        self.second_moment = self.mean_outer + self.posterior_covariance
        self.residual_cross = product(residual.mT, mean) - loadings @ self.posterior_covariance
        # -log p = 1/2 (D log 2 pi + log det C + tr(C^-1 S)), averaged over the data.
        log_det = variance.log().sum() + 2 * lower.diagonal().log().sum()
        quadratic = (self.squared_residual / variance).sum() + self.mean_outer.trace()
        log_likelihood = -0.5 * (len(loadings) * LOG_2PI + log_det + quadratic)
        self.column_variance = self.covariance.diagonal
        rounding = self.noise.rounding(self.column_variance, self.squared_residual, variance)
        squares = self._expected_squares(torch.zeros_like(loadings))
        self.read(self._bound(squares, variance, self.prior), log_likelihood, rounding)

    def e_step(self, loadings: Tensor, loc: Tensor, variance: Tensor) -> "CompleteDataEM":
        """The state after an E-step at W and psi; mu is the sample mean."""
        return CompleteDataEM(self.problem, loadings, variance)

    def residual_moments(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """The means over rows of r^2 and of w_d' V w_d."""
        loadings = self.parameters.loadings
        residual_variance = (loadings * (loadings @ self.posterior_covariance)).sum(1)
        return self.squared_residual, residual_variance

    def covariance_factor(self) -> Float[Tensor, "R D"]:
        """F, with F'F the sample covariance."""
        return self.covariance.factor

    def leading_eigenpairs(self) -> LeadingEigenpairs:
        """The leading eigenpairs of Psi^-1/2 S Psi^-1/2, S the sample covariance."""
        loadings, _, variance = self.parameters
        return self.covariance.leading(loadings.shape[1], variance.sqrt())

    def m_step(self) -> tuple[Float[Tensor, ""], LinearGaussianParameters]:
        """The regression of x on z, and the update of z's prior."""
        cholesky = cholesky_factor(self.second_moment)
        change = torch.cholesky_solve(self.residual_cross.mT, cholesky).mT
        squares = self._expected_squares(change)
        variance = self.noise.variance(squares, torch.ones_like(squares))
        loadings, prior = self.parameters.loadings + change, self.prior
        if self.problem.prior_update != "fixed":
            prior, loadings = self.second_moment, loadings @ cholesky
        if self.problem.prior_update == "rotate":
            loadings = rotate_to_principal_axes(loadings, variance)
        parameters = LinearGaussianParameters(loadings, self.parameters.loc, variance)
        return self._bound(squares, variance, prior), parameters

    def _expected_squares(self, change: Float[Tensor, "D K"]) -> Float[Tensor, " D"]:
        # The means of (x - mu - (W + change) z)^2, for a change of zero or that of the M-step.
        squared_residual, residual_variance = self.residual_moments()
        return squared_residual + residual_variance - (self.residual_cross * change).sum(1)

    def _bound(self, squares: Tensor, variance: Tensor, prior: Tensor) -> Tensor:
        # E_q[log p(x, z)] + H[q] per datum, for z ~ N(0, prior).
        expected_x = -0.5 * (LOG_2PI + variance.log() + squares / variance).sum()
        lower = cholesky_factor(prior)
        second_moment = torch.cholesky_solve(self.second_moment, lower).trace()
        expected_z = -0.5 * (2 * lower.diagonal().log().sum() + second_moment)
        entropy = 0.5 * (len(prior) + torch.logdet(self.posterior_covariance))
        return expected_x + expected_z + entropy
