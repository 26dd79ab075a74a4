"""E- and M-steps of linear-Gaussian models on complete data, from the sample covariance alone.

q(z | x_n) = N(P^-1 W' Psi^-1 (x_n - mu), V), with P = I + W' Psi^-1 W the posterior's precision
and V the member of a family that is closest to its covariance. Sums over data are sums over the
rows of a factor F of the sample covariance, S = F'F, so that an iteration needs O(min(N, D) D K)
however many data there are. As with missing values, the M-step is a regression of the residuals
and gives what is to be added to the loadings: nothing large is subtracted from anything large,
however small the noise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.em.closed_form import conditioned, rotated
from ppl_vae.inference.em.noise import Noise
from ppl_vae.inference.em.state import EMState, Parameters, project_covariance
from ppl_vae.models.eigen import LeadingEigenpairs, product
from ppl_vae.models.linear_gaussian import LOG_2PI
from ppl_vae.models.sufficient_statistics import SampleCovariance


@dataclass(frozen=True)
class CompleteProblem:
    """What stays as it is.

    Attributes:
        covariance: S and the mean.
        noise: one variance or D.
        family: of q, see :mod:`ppl_vae.guides.families`.
        fold: ``"none"``: the M-step leaves z's prior alone; ``"expand"``: it chooses z's
            covariance R, folded into the loadings, W <- W chol(R); ``"rotate"``: this, and then
            the rotation that makes W' Psi^-1 W diagonal, where the best diagonal q is exact.
    """

    covariance: SampleCovariance
    noise: Noise
    family: str = "full"
    prior_update: str = "expand"


class CompleteDataEM(EMState):
    """A position on complete data.

    W is rotated where that saves digits, unless q is diagonal, when the bound depends on it.

    Attributes:
        posterior: V, (K, K).
        means: the mean over data of m m' with m the mean of q, (K, K).
        second: of m m' + V, (K, K).
        left: of r m' - W V with r = x - mu - W m, (D, K): what the loadings can still explain.
        squares: of r^2, (D,).
    """

    def __init__(self, setting: CompleteProblem, loadings: Tensor, variance: Tensor) -> None:
        self.setting, self.covariance = setting, setting.covariance
        self.noise, self.family = setting.noise, setting.family
        self.stalls = setting.family == "diagonal" and setting.prior_update == "none"
        loadings = loadings if self.family == "diagonal" else conditioned(loadings, variance)
        self.loadings, self.loc, self.variance = loadings, self.covariance.mean, variance
        weighted = loadings / variance[:, None]
        self.prior = torch.eye(loadings.shape[1]).to(loadings)
        precision = loadings.mT @ weighted + self.prior
        lower = torch.linalg.cholesky(precision)
        self.posterior = project_covariance(precision, setting.family)
        factor = self.covariance.factor
        mean = product(factor, torch.cholesky_solve(weighted.mT, lower).mT)
        residual = factor - product(mean, loadings.mT)
        self.squares = residual.square().sum(0)
        self.means = mean.mT @ mean
        self.second = self.means + self.posterior
        self.left = product(residual.mT, mean) - loadings @ self.posterior
        # -log p = 1/2 (D log 2 pi + log det C + tr(C^-1 S)), averaged over the data.
        log_det = variance.log().sum() + 2 * lower.diagonal().log().sum()
        quadratic = (self.squares / variance).sum() + self.means.trace()
        self.log_likelihood = -0.5 * (len(loadings) * LOG_2PI + log_det + quadratic)
        self.total = self.covariance.diagonal
        self.rounding = self.noise.rounding(self.total, self.squares, variance)
        self.bound = self._bound(*self._fit(torch.zeros_like(loadings)), self.prior)

    def at(self, *parameters: Tensor) -> "CompleteDataEM":
        """The position after an E-step at W and psi; mu is the sample mean."""
        loadings, _, variance = parameters
        return CompleteDataEM(self.setting, loadings, variance)

    def own_squares(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """The means over rows of r^2 and of w_d' V w_d."""
        return self.squares, (self.loadings * (self.loadings @ self.posterior)).sum(1)

    def factor(self) -> Float[Tensor, "R D"]:
        """F, with F'F the sample covariance."""
        return self.covariance.factor

    def leading(self) -> LeadingEigenpairs:
        """Of Psi^-1/2 S Psi^-1/2, S the sample covariance."""
        return self.covariance.leading(self.loadings.shape[1], self.variance.sqrt())

    def m_step(self) -> tuple[Float[Tensor, ""], Parameters]:
        """The regression of x on z, and the fold."""
        change = torch.cholesky_solve(self.left.mT, torch.linalg.cholesky(self.second)).mT
        squares, _ = self._fit(change)
        variance = self.noise.variance(squares, torch.ones_like(squares))
        loadings = self.loadings + change
        if self.setting.prior_update == "none":
            prior, folded = self.prior, loadings
        else:
            prior, folded = self.second, loadings @ torch.linalg.cholesky(self.second)
        if self.setting.prior_update == "rotate":
            folded = rotated(folded, variance)
        return self._bound(squares, variance, prior), (folded, self.loc, variance)

    def _fit(self, change: Float[Tensor, "D K"]) -> tuple[Float[Tensor, " D"], Tensor]:
        # The means of (x - mu - (W + change) z)^2, for a change that is zero or the M-step's.
        squares, spread = self.own_squares()
        return squares + spread - (self.left * change).sum(1), self.variance

    def _bound(self, squares: Tensor, variance: Tensor, prior: Tensor) -> Tensor:
        # E_q[log p(x, z)] + H[q] per datum, for z ~ N(0, prior).
        expected_x = -0.5 * (LOG_2PI + variance.log() + squares / variance).sum()
        lower = torch.linalg.cholesky(prior)
        second = torch.cholesky_solve(self.second, lower).trace()
        expected_z = -0.5 * (2 * lower.diagonal().log().sum() + second)
        entropy = 0.5 * (len(prior) + torch.logdet(self.posterior))
        return expected_x + expected_z + entropy
