"""The posterior of the parameters: updates in closed form, and its divergence from the prior."""

from dataclasses import dataclass, replace
from typing import Self

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.inference.variational_bayes.latent_moments import LatentMoments
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.principal_axes import tril_of_inverse
from ppl_vae.models.priors import ParameterPrior
from ppl_vae.models.variational_posterior import ParameterMoments


@dataclass(frozen=True)
class ParameterPosterior:
    """q(W, mu) q(sigma) q(relevance).

    Attributes:
        mean: of the rows (w_d, mu_d), (D, L) with L = K + 1; mu relative to the means of the
            columns of the data.
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
class ConjugatePrior:
    """The conjugate prior of :class:`~ppl_vae.models.bayesian_ppca.BayesianPPCA`, in float64.

    Attributes:
        loadings_scale: s, with w_dk ~ N(0, s_d^2 / relevance_k), (D,).
        loc_mean: of mu, relative to the means of the columns of the data, (D,).
        loc_scale: (D,).
        noise: the prior of sigma^-2, batch shape () or (D,).
        relevance: that of the relevances, batch shape (K,); None without ARD.
    """

    loadings_scale: Float[Tensor, " D"]
    loc_mean: Float[Tensor, " D"]
    loc_scale: Float[Tensor, " D"]
    noise: dist.Gamma
    relevance: dist.Gamma | None

    @classmethod
    def of(cls, model: BayesianPPCA, centre: Float[Tensor, " D"]) -> Self:
        """The priors of a model, for data relative to ``centre``."""
        relevance = model.relevance_prior
        loc = model.loc_prior
        return cls(
            loadings_scale=_values(model.loadings_prior, "scale")[:, 0],
            loc_mean=_values(loc, "loc") - centre,
            loc_scale=_values(loc, "scale"),
            noise=_gamma(model.noise_prior),
            relevance=None if relevance is None else _gamma(relevance),
        )

    def update_rows(
        self, posterior: ParameterPosterior, latents: LatentMoments
    ) -> ParameterPosterior:
        """The best q(W, mu), given all other factors."""
        relevance = posterior.expected_relevance
        loadings = relevance / self.loadings_scale.square()[:, None]
        prior_precision = torch.cat([loadings, self.loc_scale.pow(-2)[:, None]], 1)
        noise = posterior.noise.mean.expand(len(self.loc_mean))
        precision = torch.diag_embed(prior_precision) + noise[:, None, None] * latents.gram
        score = noise[:, None] * latents.cross
        score[:, -1] += self.loc_mean * prior_precision[:, -1]
        tril = tril_of_inverse(precision)
        mean = (tril @ (tril.mT @ score[:, :, None]))[..., 0]
        return replace(posterior, mean=mean, tril=tril)

    def update_noise(
        self, posterior: ParameterPosterior, squares: Float[Tensor, " D"], counts: Tensor
    ) -> ParameterPosterior:
        """The best q(sigma), given E (x - w'z - mu)^2 and the numbers of terms in these sums."""
        if not self.noise.batch_shape:
            squares, counts = squares.sum(), counts.sum()
        noise = dist.Gamma(self.noise.concentration + counts / 2, self.noise.rate + squares / 2)
        return replace(posterior, noise=noise)

    def scaled_squares(self, posterior: ParameterPosterior) -> Float[Tensor, "K K"]:
        """The sum over rows of W of E w w' / s^2."""
        squares = posterior.second_moment[:, :-1, :-1]
        return (squares / self.loadings_scale.square()[:, None, None]).sum(0)

    def update_relevance(self, posterior: ParameterPosterior) -> ParameterPosterior:
        """The best q(relevance), given q(W)."""
        if self.relevance is None:
            return posterior
        concentration = self.relevance.concentration + len(self.loc_mean) / 2
        rate = self.relevance.rate + self.scaled_squares(posterior).diagonal() / 2
        return replace(posterior, relevance=dist.Gamma(concentration, rate))

    def divergence(self, posterior: ParameterPosterior) -> Float[Tensor, ""]:
        """KL(q(W, mu, sigma, relevance) || p), in nats."""
        total = kl_divergence(posterior.noise, self.noise).sum()
        log_relevance = torch.zeros_like(posterior.mean[0, :-1])
        if posterior.relevance is not None:
            total = total + kl_divergence(posterior.relevance, self.relevance).sum()
            log_relevance = expected_log(posterior.relevance)
        rows, size = posterior.mean.shape
        squares = self.scaled_squares(posterior).diagonal()
        deviation = (posterior.mean[:, -1] - self.loc_mean).square()
        deviation = deviation + posterior.covariance[:, -1, -1]
        quadratic = posterior.expected_relevance @ squares
        quadratic = quadratic + (deviation / self.loc_scale.square()).sum()
        log_det = 2 * ((size - 1) * self.loadings_scale.log() + self.loc_scale.log()).sum()
        log_det = log_det - rows * log_relevance.sum()
        own = 2 * posterior.tril.diagonal(dim1=-2, dim2=-1).log().sum()
        return total + 0.5 * (quadratic + log_det - own - rows * size)


def expected_log(gamma: dist.Gamma) -> Tensor:
    """E log of a gamma-distributed variable."""
    return gamma.concentration.digamma() - gamma.rate.log()


def _values(prior: ParameterPrior, name: str) -> Tensor:
    return prior.get_buffer(name).double().expand(prior.shape)


def _gamma(prior: ParameterPrior) -> dist.Gamma:
    return dist.Gamma(_values(prior, "concentration"), _values(prior, "rate"))
