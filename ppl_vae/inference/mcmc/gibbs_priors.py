"""Conjugate priors of probabilistic PCA as tensors, and the draws of parameters given codes."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.inference.mcmc.wishart import standard_gamma
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.priors import ParameterPrior


@dataclass(frozen=True)
class ConjugatePriors:
    """The priors W_dk ~ N(0, s_d^2 / relevance_k), mu_d ~ N(m_d, c_d^2),
    sigma^2 ~ InverseGamma(a, b), relevance_k ~ Gamma(e_k, f_k).

    Attributes:
        latent_dim: K.
        loadings_scale: s, (D,).
        loc_mean: m, (D,).
        loc_scale: c, (D,).
        noise: a and b, () each, or (D,) each for diagonal noise.
        relevance: e and f, (K,) each; None without the ARD prior, and relevance_k is 1.
    """

    latent_dim: int
    loadings_scale: Float[Tensor, " D"]
    loc_mean: Float[Tensor, " D"]
    loc_scale: Float[Tensor, " D"]
    noise: tuple[Tensor, Tensor]
    relevance: tuple[Tensor, Tensor] | None

    @property
    def has_diagonal_noise(self) -> bool:
        """Whether each column has a sigma of its own."""
        return self.noise[0].dim() > 0

    @cached_property
    def loc_precision(self) -> Float[Tensor, " D"]:
        """1 / c^2."""
        return self.loc_scale**-2

    @cached_property
    def loadings_precision(self) -> Float[Tensor, "D 1"]:
        """1 / s^2."""
        return self.loadings_scale[:, None] ** -2

    @classmethod
    def of(cls, model: BayesianPPCA) -> Self:
        """The priors of a model, in float64.

        Raises:
            ValueError: if one of them is not conjugate.
        """
        if wrong := model.not_conjugate():
            raise ValueError(
                f"Gibbs sampling needs conjugate priors, and {', '.join(wrong)} of the model "
                f"{'is' if len(wrong) == 1 else 'are'} not (see BayesianPPCA.not_conjugate); use "
                "sampler='nuts', which takes any prior, or a normal prior with mean zero and one "
                "scale per row for the loadings, a normal one for loc, InverseGammaScale for "
                "noise and a gamma one for relevance"
            )
        loadings, loc = model.loadings_prior, model.loc_prior
        noise, relevance = model.noise_prior, model.relevance_prior
        gamma = ("concentration", "rate")
        return cls(
            model.latent_dim,
            _wide(loadings, "scale")[:, 0],
            _wide(loc, "loc"),
            _wide(loc, "scale"),
            (_wide(noise, gamma[0]), _wide(noise, gamma[1])),
            None
            if relevance is None
            else (_wide(relevance, gamma[0]), _wide(relevance, gamma[1])),
        )

    def log_loadings(self, loadings: Float[Tensor, "C D K"]) -> Float[Tensor, " C"]:
        """log p(W) up to a constant, the relevance integrated out."""
        squares = self._half_squares(loadings)
        if self.relevance is None:
            return -squares.sum(-1)
        concentration, rate = self.relevance
        return -((concentration + loadings.shape[-2] / 2) * (rate + squares).log()).sum(-1)

    def gram(self, loadings: Float[Tensor, "C D K"]) -> Float[Tensor, "C K K"]:
        """W' diag(1 / s^2) W."""
        return loadings.mT @ (loadings * self.loadings_precision)

    def log_column(
        self, squares: Float[Tensor, "C L P"], columns: Int[Tensor, " L"], data_dim: int
    ) -> Float[Tensor, "C L P"]:
        """log p of columns of W under the ARD prior up to a constant, given the diagonal elements
        of :meth:`gram`."""
        assert self.relevance is not None
        concentration, rate = (part[columns, None] for part in self.relevance)
        return -(concentration + data_dim / 2) * (rate + squares / 2).log()

    def _half_squares(self, loadings: Float[Tensor, "C D K"]) -> Float[Tensor, "C K"]:
        return (loadings.square() * self.loadings_precision).sum(-2) / 2

    def row_precision(
        self, relevance: Float[Tensor, "C K"] | None
    ) -> Float[Tensor, "D L"] | Float[Tensor, "C D L"]:
        """The prior precisions of the L = K + 1 elements of (w_d, mu_d), given relevance."""
        if relevance is None:
            return self._prior_precision
        ones = torch.nn.functional.pad(relevance, (0, 1), value=1.0)
        return self._prior_precision * ones.unsqueeze(-2)

    def shared_precision(
        self, relevance: Float[Tensor, "C K"] | None
    ) -> Float[Tensor, " L"] | Float[Tensor, "C L"]:
        """The prior precisions of (w_d, mu_d) in units of 1 / s_d^2, given relevance, if
        :attr:`has_shared_precision`."""
        if relevance is None:
            return self._shared_prior_precision
        ratio = self._shared_prior_precision[-1:].expand(len(relevance), 1)
        return torch.cat([relevance, ratio], -1)

    @cached_property
    def has_shared_precision(self) -> bool:
        """Whether the c_d are proportional to the s_d, so that columns share a precision."""
        ratio = self.loc_precision / self.loadings_precision[:, 0]
        return bool(((ratio / ratio[0]).log().abs() < 1e-6).all())

    @cached_property
    def _shared_prior_precision(self) -> Float[Tensor, " L"]:
        ratio = self.loc_precision / self.loadings_precision[:, 0]
        return torch.cat([ratio.new_ones(self.latent_dim), ratio[:1]])

    @cached_property
    def _prior_precision(self) -> Float[Tensor, "D L"]:
        loadings = self.loadings_precision.expand(-1, self.latent_dim)
        return torch.cat([loadings, self.loc_precision[:, None]], 1)

    def draw_relevance(self, loadings: Float[Tensor, "C D K"]) -> Float[Tensor, "C K"] | None:
        """relevance given W."""
        if self.relevance is None:
            return None
        concentration, rate = self.relevance
        squares = self._half_squares(loadings)
        shape = (concentration + loadings.shape[-2] / 2).expand_as(squares)
        return standard_gamma(shape) / (rate + squares)

    def draw_noise_scale(
        self, squares: Float[Tensor, "C D"], counts: Float[Tensor, " D"]
    ) -> Float[Tensor, "C"] | Float[Tensor, "C D"]:
        """sigma given sums of squared residuals of each column, and their numbers."""
        concentration, rate = self.noise
        if not self.has_diagonal_noise:
            squares, counts = squares.sum(-1), counts.sum()
        shape = (concentration + counts / 2).expand_as(squares)
        return ((rate + squares / 2) / standard_gamma(shape)).sqrt()


def _wide(prior: ParameterPrior, name: str) -> Tensor:
    # A parameter of a prior, for each element of what it is a prior of.
    return prior.get_buffer(name).double().expand(prior.shape)
