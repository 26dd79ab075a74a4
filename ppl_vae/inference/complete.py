"""E- and M-steps of linear-Gaussian models on complete data, from the sample covariance alone.

q(z | x_n) = N(P^-1 W' Psi^-1 (x_n - mu), V), with P = I + W' Psi^-1 W the posterior's precision
and V the member of a family that is closest to its covariance. With S the sample covariance an
iteration needs S Psi^-1 W alone, O(D^2 K) however many data there are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.position import Noise, Parameters, Position, restricted_covariance
from ppl_vae.models.linear_gaussian import LOG_2PI
from ppl_vae.models.moments import SampleCovariance


@dataclass(frozen=True)
class Setting:
    """What stays as it is.

    Attributes:
        covariance: S and the mean.
        noise: one variance or D.
        family: of q, see :mod:`ppl_vae.families`.
        fold: ``"none"``: the M-step leaves z's prior alone; ``"expand"``: it chooses z's
            covariance R, folded into the loadings, W <- W chol(R); ``"rotate"``: this, and then
            the rotation that makes W' Psi^-1 W diagonal, where the best diagonal q is exact.
    """

    covariance: SampleCovariance
    noise: Noise
    family: str = "full"
    fold: str = "expand"


class CompletePosition(Position):
    """A position on complete data.

    Attributes:
        posterior: V, (K, K).
        cross: the mean over data of (x - mu) m' with m the mean of q, (D, K).
        means: the mean over data of m m', (K, K).
        second: of m m' + V, (K, K).
    """

    def __init__(self, setting: Setting, loadings: Tensor, variance: Tensor) -> None:
        self.setting, self.covariance, self.noise = setting, setting.covariance, setting.noise
        self.loadings, self.loc, self.variance = loadings, self.covariance.mean, variance
        weighted = loadings / variance[:, None]
        self.prior = torch.eye(loadings.shape[1]).to(loadings)
        precision = loadings.mT @ weighted + self.prior
        self.posterior = restricted_covariance(precision, setting.family)
        self.cross = torch.linalg.solve(precision, (self.covariance @ weighted).mT).mT
        means = torch.linalg.solve(precision, weighted.mT @ self.cross)
        self.means = (means + means.mT) / 2
        self.second = self.means + self.posterior
        # -log p = 1/2 (D log 2 pi + log det C + tr(C^-1 S)), averaged over the data.
        trace = (self.covariance.diagonal / variance).sum()
        log_det = variance.log().sum() + torch.logdet(precision)
        quadratic = trace - (weighted * self.cross).sum()
        self.log_likelihood = -0.5 * (len(loadings) * LOG_2PI + log_det + quadratic)
        self.rounding = 1e-15 * (1 + float(trace)) * len(loadings)
        self.bound = self._bound(loadings, variance, self.prior)

    def at(self, *parameters: Tensor) -> "CompletePosition":
        """The position after an E-step at W and psi; mu is the sample mean."""
        loadings, _, variance = parameters
        return CompletePosition(self.setting, loadings, variance)

    def own_squares(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """The means over rows of r^2 and of w_d' V w_d."""
        fit = (self.loadings * (self.loadings @ self.means - 2 * self.cross)).sum(1)
        spread = (self.loadings * (self.loadings @ self.posterior)).sum(1)
        return self.covariance.diagonal + fit, spread

    def maximized(self) -> tuple[Float[Tensor, ""], Parameters]:
        """The regression of x on z, and the fold."""
        loadings = torch.linalg.solve(self.second, self.cross.mT).mT
        squares = self.covariance.diagonal - (loadings * self.cross).sum(1)
        variance = self.noise.variance(squares, torch.ones_like(squares))
        if self.setting.fold == "none":
            prior, folded = self.prior, loadings
        else:
            prior, folded = self.second, loadings @ torch.linalg.cholesky(self.second)
        if self.setting.fold == "rotate":
            scale = variance.sqrt()[:, None]
            u, s, _ = torch.linalg.svd(folded / scale, full_matrices=False)
            folded = scale * u * s
        return self._bound(loadings, variance, prior), (folded, self.loc, variance)

    def _bound(self, loadings: Tensor, variance: Tensor, prior: Tensor) -> Tensor:
        # E_q[log p(x, z)] + H[q] a datum, for z ~ N(0, prior).
        fit = (loadings * (loadings @ self.second - 2 * self.cross)).sum(1)
        squares = ((self.covariance.diagonal + fit) / variance).sum()
        expected_x = -0.5 * (len(loadings) * LOG_2PI + variance.log().sum() + squares)
        second = torch.linalg.solve(prior, self.second).trace()
        expected_z = -0.5 * (torch.logdet(prior) + second)
        entropy = 0.5 * (loadings.shape[1] + torch.logdet(self.posterior))
        return expected_x + expected_z + entropy
