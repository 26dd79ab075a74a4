"""The posterior of the parameters: updates in closed form, and its divergence from the prior."""

from dataclasses import dataclass, replace
from typing import Self

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.inference.mcmc.gibbs_priors import ConjugatePriors
from ppl_vae.inference.variational_bayes.latent_moments import LatentMoments
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.linear.principal_axes import tril_of_inverse
from ppl_vae.models.variational_posterior import ParameterMoments


@dataclass(frozen=True)
class ParameterPosterior:
    """q(W, mu) q(sigma) q(relevance).

    Attributes:
        mean: the mean of the rows (w_d, mu_d), (D, L) with L = K + 1; mu relative to the means of
            the columns of the data.
        tril: Cholesky factors of the covariances of these rows, (D, L, L).
        noise: the distribution of sigma^-2, batch shape () or (D,).
        relevance: that of the relevances, batch shape (K,); None without ARD.
    """

    mean: Float[Tensor, "D L"]
    tril: Float[Tensor, "D L L"]
    noise: dist.Gamma
    relevance: dist.Gamma | None

    @property
    def covariance(self) -> Float[Tensor, "D L L"]:
        """Covariances of the rows."""
        return self.tril @ self.tril.mT

    @property
    def second_moment(self) -> Float[Tensor, "D L L"]:
        """E (w_d, mu_d) (w_d, mu_d)'."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def moments(self) -> ParameterMoments:
        """What q(z) depends on."""
        precision = self.noise.mean.expand(len(self.mean))
        return ParameterMoments(self.mean, self.covariance, precision)

    @property
    def expected_relevance(self) -> Float[Tensor, " K"]:
        """E[relevance]; ones without ARD."""
        if self.relevance is None:
            return torch.ones_like(self.mean[0, :-1])
        return self.relevance.mean

    def transformed(self, inverse: Float[Tensor, "L L"]) -> "ParameterPosterior":
        """The posterior of the rows after (z, 1) -> U (z, 1), given U^-1: rows times U^-1."""
        upper = torch.linalg.qr(self.tril.mT @ inverse, mode="r").R
        sign = upper.diagonal(dim1=-2, dim2=-1).sign()
        return replace(self, mean=self.mean @ inverse, tril=(sign[..., None] * upper).mT)

    def with_positive_columns(self) -> "ParameterPosterior":
        """The posterior after changes of the signs of z_k that make the entry of w_k whose mean
        is largest positive."""
        loadings = self.mean[:, :-1]
        largest = loadings.abs().argmax(0, keepdim=True)
        sign = torch.where(loadings.gather(0, largest)[0] < 0, -1.0, 1.0).to(loadings)
        return self.transformed(torch.nn.functional.pad(sign, (0, 1), value=1.0).diag())


@dataclass(frozen=True)
class ConjugateUpdates:
    """The updates of the factors of the posterior under conjugate priors.

    Attributes:
        priors: those of the model; that of mu is relative to the means of the columns of the data.
    """

    priors: ConjugatePriors

    @classmethod
    def of(cls, model: BayesianPPCA, centre: Float[Tensor, " D"]) -> Self:
        """The updates under the priors of a model, for data relative to ``centre``."""
        priors = ConjugatePriors.of(model)
        return cls(replace(priors, loc_mean=priors.loc_mean - centre))

    def update_rows(
        self, posterior: ParameterPosterior, latents: LatentMoments
    ) -> ParameterPosterior:
        """The best q(W, mu), given all other factors."""
        relevance = posterior.expected_relevance
        loadings = relevance / self.priors.loadings_scale.square()[:, None]
        prior_precision = torch.cat([loadings, self.priors.loc_scale.pow(-2)[:, None]], 1)
        noise = posterior.noise.mean.expand(len(self.priors.loc_mean))
        precision = torch.diag_embed(prior_precision) + noise[:, None, None] * latents.gram
        score = noise[:, None] * latents.cross
        score[:, -1] += self.priors.loc_mean * prior_precision[:, -1]
        tril = tril_of_inverse(precision)
        mean = (tril @ (tril.mT @ score[:, :, None]))[..., 0]
        return replace(posterior, mean=mean, tril=tril)

    def update_noise(
        self, posterior: ParameterPosterior, squares: Float[Tensor, " D"], counts: Tensor
    ) -> ParameterPosterior:
        """The best q(sigma), given E (x - w'z - mu)^2 and the numbers of terms in these sums."""
        concentration, rate = self.priors.noise
        if not concentration.dim():
            squares, counts = squares.sum(), counts.sum()
        noise = dist.Gamma(concentration + counts / 2, rate + squares / 2)
        return replace(posterior, noise=noise)

    def scaled_squares(self, posterior: ParameterPosterior) -> Float[Tensor, "K K"]:
        """The sum over rows of W of E w w' / s^2."""
        squares = posterior.second_moment[:, :-1, :-1]
        return (squares / self.priors.loadings_scale.square()[:, None, None]).sum(0)

    def update_relevance(self, posterior: ParameterPosterior) -> ParameterPosterior:
        """The best q(relevance), given q(W)."""
        if self.priors.relevance is None:
            return posterior
        concentration, rate = self.priors.relevance
        concentration = concentration + len(self.priors.loc_mean) / 2
        rate = rate + self.scaled_squares(posterior).diagonal() / 2
        return replace(posterior, relevance=dist.Gamma(concentration, rate))

    def divergence(self, posterior: ParameterPosterior) -> Float[Tensor, ""]:
        """KL(q(W, mu, sigma, relevance) || p), in nats."""
        total = kl_divergence(posterior.noise, dist.Gamma(*self.priors.noise)).sum()
        log_relevance = torch.zeros_like(posterior.mean[0, :-1])
        if posterior.relevance is not None and self.priors.relevance is not None:
            prior = dist.Gamma(*self.priors.relevance)
            total = total + kl_divergence(posterior.relevance, prior).sum()
            log_relevance = expected_log(posterior.relevance)
        rows, size = posterior.mean.shape
        squares = self.scaled_squares(posterior).diagonal()
        deviation = (posterior.mean[:, -1] - self.priors.loc_mean).square()
        deviation = deviation + posterior.covariance[:, -1, -1]
        quadratic = posterior.expected_relevance @ squares
        quadratic = quadratic + (deviation / self.priors.loc_scale.square()).sum()
        log_det = (
            2 * ((size - 1) * self.priors.loadings_scale.log() + self.priors.loc_scale.log()).sum()
        )
        log_det = log_det - rows * log_relevance.sum()
        own = 2 * posterior.tril.diagonal(dim1=-2, dim2=-1).log().sum()
        return total + 0.5 * (quadratic + log_det - own - rows * size)


def expected_log(gamma: dist.Gamma) -> Tensor:
    """E log of a gamma-distributed variable."""
    return gamma.concentration.digamma() - gamma.rate.log()
