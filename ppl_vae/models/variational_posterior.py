"""The mean-field posterior of Bayesian PPCA, as a guide."""

from typing import Any, NamedTuple, Self

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from pyro import poutine
from torch import Tensor

from ppl_vae.core.arrays.inputs import as_rows
from ppl_vae.core.config import configurable
from ppl_vae.core.program import Density
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.guides.guides import GaussianGuide
from ppl_vae.models.bayesian_ppca import BayesianPPCA, ParameterDraws
from ppl_vae.models.linear.linear_gaussian import MissingnessPatterns, from_tril_vec, tril_vec
from ppl_vae.models.linear.principal_axes import rowwise_product, tril_of_inverse
from ppl_vae.models.priors import InverseGammaScale


class ParameterMoments(NamedTuple):
    """The moments of q(W, mu) q(sigma) that q(z | x) depends on.

    Attributes:
        mean: the mean of the rows (w_d, mu_d), (D, K + 1).
        covariance: the covariance of these rows, (D, K + 1, K + 1).
        precision: the means of sigma_d^-2, (D,).
    """

    mean: Float[Tensor, "D L"]
    covariance: Float[Tensor, "D L L"]
    precision: Float[Tensor, " D"]

    def latent_posterior(
        self,
        rows: Float[Tensor, "M D"],
        weight: Float[Tensor, " M"] | float,
        patterns: MissingnessPatterns,
    ) -> tuple[Float[Tensor, "M K"], Float[Tensor, "U K K"]]:
        """The best q(z_m) = N(m_m, V_u) of rows x_m ~ N(W z_m + c_m mu, Psi), with c_m the weight.

        V_u^-1 = I + sum_d E[sigma_d^-2] E[w_d w_d'] and
        V_u^-1 m_m = sum_d E[sigma_d^-2] E[w_d (x_md - c_m mu_d)], sums over the observed columns
        of the pattern u of row m.

        Args:
            rows: x; missing values may hold any finite number.
            weight: c; 1 for data as they are.
            patterns: the missingness patterns of the rows.

        Returns:
            The means, and Cholesky factors of the covariances, one for each pattern.
        """
        loadings, loc = self.mean[:, :-1], self.mean[:, -1]
        size = loadings.shape[1]
        squares = self.covariance[:, :-1, :-1] + loadings[:, :, None] * loadings[:, None, :]
        sums = patterns.observed @ (self.precision[:, None] * tril_vec(squares))
        tril = tril_of_inverse(from_tril_vec(sums, size) + torch.eye(size).to(sums))
        shift = patterns.observed @ (self.precision[:, None] * self.covariance[:, :-1, -1])
        weight = torch.as_tensor(weight).to(rows).expand(len(rows))[:, None]
        offset = patterns.zero_missing(rows - weight * loc)
        score = offset @ (self.precision[:, None] * loadings)
        score = score - weight * patterns.gather_rows(shift)
        factors = patterns.gather_rows(tril)
        return rowwise_product(rowwise_product(score, factors), factors.mT), tril


class VBPosterior(GaussianGuide):
    """The mean-field posterior q(z) q(W, mu) q(sigma) q(relevance) of Bayesian PPCA, as a guide.

    Its sites outside the plate over data are those of
    :class:`~ppl_vae.models.bayesian_ppca.BayesianPPCA`: the rows (w_d, mu_d) are independent and
    normal, with w_d and mu_d correlated, sigma^-2 is gamma-distributed, as are the relevances
    under the ARD prior. In the plate, q(z_n) is normal and depends on x_n through moments of the
    parameters' posterior, so that it is amortized: it applies to new data as well.
    :func:`~ppl_vae.inference.variational_bayes.fit.fit_vb` makes it.

    Args:
        model: the model of whose parameters it is the posterior; it is not kept. If z is
            integrated out in it, the guide has no site ``z``.

    Attributes:
        row_mean: means of the rows (w_d, mu_d), (D, K + 1).
        row_tril: Cholesky factors of their covariances, (D, K + 1, K + 1).
        noise_concentration, noise_rate: the concentration and the rate of the gamma distribution
            of sigma^-2, () or (D,).
        relevance_concentration, relevance_rate: the concentrations and the rates of the gamma
            distributions of the relevances, (K,).

    References:
        Bishop: Variational principal components (1999).
    """

    row_mean: Tensor
    row_tril: Tensor
    noise_concentration: Tensor
    noise_rate: Tensor
    relevance_concentration: Tensor
    relevance_rate: Tensor

    @configurable
    def __init__(self, model: BayesianPPCA) -> None:
        super().__init__()
        self.data_dim, self.latent_dim = model.data_dim, model.latent_dim
        self.prior, self.marginal = model.prior, model.marginal
        data_dim, size = model.data_dim, model.latent_dim + 1
        self.register_buffer("row_mean", torch.zeros(data_dim, size))
        self.register_buffer("row_tril", torch.eye(size).repeat(data_dim, 1, 1))
        self.register_buffer("noise_concentration", torch.ones(model.noise_prior.shape))
        self.register_buffer("noise_rate", torch.ones(model.noise_prior.shape))
        if model.prior == "ard":
            self.register_buffer("relevance_concentration", torch.ones(model.latent_dim))
            self.register_buffer("relevance_rate", torch.ones(model.latent_dim))

    @torch.no_grad()
    def assign(
        self,
        *,
        row_mean: Float[Tensor, "D L"],
        row_tril: Float[Tensor, "D L L"],
        noise: dist.Gamma,
        relevance: dist.Gamma | None,
    ) -> Self:
        """Set the distributions in place; returns the guide.

        Args:
            row_mean, row_tril: the attributes of these names.
            noise: the distribution of sigma^-2.
            relevance: the distribution of the relevances; None without ARD.
        """
        self.row_mean.copy_(row_mean)
        self.row_tril.copy_(row_tril)
        self.noise_concentration.copy_(noise.concentration)
        self.noise_rate.copy_(noise.rate)
        if relevance is not None:
            self.relevance_concentration.copy_(relevance.concentration)
            self.relevance_rate.copy_(relevance.rate)
        return self

    def sample_parameters(self) -> ParameterDraws:
        """Draw the parameters, as sites of the program that calls it.

        mu is drawn from its distribution given W, row by row.
        """
        relevance = None
        if self.prior == "ard":
            gamma = dist.Gamma(self.relevance_concentration, self.relevance_rate)
            relevance = pyro.sample("relevance", gamma.to_event(1))
        mean, tril = self.row_mean[:, :-1], self.row_tril[:, :-1, :-1]
        rows = dist.MultivariateNormal(mean, scale_tril=tril)
        loadings = pyro.sample("loadings", rows.to_event(1))
        # With L = row_tril, mu_d given w_d is N(E mu_d + l' (w_d - E w_d), L_KK^2): l' is the last
        # row of L times the inverse of its leading block.
        last = self.row_tril[:, -1, :-1, None]
        slope = torch.linalg.solve_triangular(tril.mT, last, upper=True)[..., 0]
        conditional_mean = self.row_mean[:, -1] + ((loadings - mean) * slope).sum(-1)
        loc = dist.Normal(conditional_mean, self.row_tril[:, -1, -1]).to_event(1)
        scale = InverseGammaScale(self.noise_concentration, self.noise_rate)
        return ParameterDraws(
            loadings,
            pyro.sample("loc", loc),
            pyro.sample("noise_scale", scale.to_event(self.noise_rate.dim())),
            relevance,
        )

    def draw_parameters(self, num_samples: int, *, seed: int | None = None) -> ParameterDraws:
        """Independent draws of the parameters, with a leading dimension of this length."""
        check_int("num_samples", num_samples)
        draws = pyro.plate("draws", num_samples)
        with torch.no_grad(), seeded(seed), poutine.block(), draws:
            return self.sample_parameters()

    def moments(self) -> ParameterMoments:
        """The moments of the parameters that q(z | x) depends on."""
        precision = self.noise_concentration / self.noise_rate
        covariance = self.row_tril @ self.row_tril.mT
        return ParameterMoments(self.row_mean, covariance, precision.expand(self.data_dim))

    def distribution(
        self, x: ArrayLike, index: Tensor | None = None, mask: Tensor | None = None
    ) -> Density:
        """q(z | x) from the observed entries of x; ``index`` is not used."""
        rows = as_rows(x, self.row_mean, self.data_dim, self.schema)
        if mask is None:
            patterns = MissingnessPatterns.complete(self.row_mean[:, 0])
        else:
            patterns = MissingnessPatterns.each(mask, rows)
        mean, tril = self.moments().latent_posterior(rows, 1.0, patterns)
        return dist.MultivariateNormal(mean, scale_tril=patterns.gather_rows(tril))

    def forward(
        self,
        x: ArrayLike | None = None,
        *,
        mask: Bool[Tensor, "B D"] | None = None,
        index: Int[Tensor, " B"] | None = None,
        num_data: int | None = None,
        **_: Any,
    ) -> Any:
        """The guide as a Pyro program.

        Raises:
            ValueError: if x is not given, unless the model is marginal.
        """
        parameters = self.sample_parameters()
        if self.marginal:
            return parameters
        if x is None:
            raise ValueError("the guide needs x, on which q(z | x) depends; give x")
        super().forward(x, mask=mask, index=index, num_data=num_data)
        return parameters
