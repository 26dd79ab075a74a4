"""Probabilistic PCA, the model in which every quantity is known exactly."""

import copy
import math
from typing import Any, Self, cast

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from pyro.nn import PyroParam, pyro_method
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.arguments import ArrayLike, as_matrix, at_least
from ppl_vae.models.moments import SampleCovariance
from ppl_vae.program import Program, as_rows, count_rows, data_plate
from ppl_vae.state import seeded


class PPCA(Program):
    """Probabilistic PCA: z ~ N(0, I_K), x | z ~ N(W z + mu, sigma^2 I_D).

    Marginally x ~ N(mu, W W' + sigma^2 I), and z | x ~ N(M^-1 W'(x - mu), sigma^2 M^-1) with
    M = W'W + sigma^2 I. ``model`` is the Pyro program; everything else is exact.

    Args:
        data_dim: D.
        latent_dim: K.
        seed: of the random loadings to start from.

    Attributes:
        loadings: W, (D, K).
        loc: mu, (D,).
        noise_scale: sigma, ().

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999).

    Example:
        >>> ppca = PPCA(data_dim=5, latent_dim=2, seed=0)
        >>> x = ppca.sample(100, seed=0)
        >>> ppca.log_likelihood(x).shape
        torch.Size([100])
    """

    noise_scale: Tensor

    def __init__(self, data_dim: int, latent_dim: int, *, seed: int | None = None) -> None:
        super().__init__()
        self.data_dim = at_least("data_dim", data_dim)
        self.latent_dim = at_least("latent_dim", latent_dim)
        with seeded(seed):
            self.loadings = nn.Parameter(torch.randn(data_dim, latent_dim) / math.sqrt(latent_dim))
        self.loc = nn.Parameter(torch.zeros(data_dim))
        self.noise_scale = cast(Any, PyroParam(torch.tensor(1.0), constraints.positive))

    @classmethod
    def like(cls, x: ArrayLike, latent_dim: int, *, seed: int | None = None) -> Self:
        """A model of x's shape, dtype and device: its mean, and half of its variance as noise.

        Raises:
            ValueError: if x has NaN, or K >= the rank of the centred data.
        """
        x = as_matrix(x)
        covariance = SampleCovariance.of(x)
        covariance.check_rank(latent_dim)
        ppca = cls(x.shape[1], latent_dim, seed=seed).to(x)
        scale = (covariance.trace / ppca.data_dim / 2).sqrt()
        return ppca.assign(
            loadings=ppca.loadings.detach() * scale.to(x), loc=covariance.mean, noise_scale=scale
        )

    @classmethod
    def from_parameters(cls, loadings: Tensor, loc: Tensor, noise_scale: Tensor | float) -> Self:
        """The model with these parameters, in the dtype and on the device of ``loadings``."""
        ppca = cls(*loadings.shape, seed=0).to(loadings)
        return ppca.assign(loadings=loadings, loc=loc, noise_scale=noise_scale)

    @torch.no_grad()
    def assign(
        self,
        *,
        loadings: Float[Tensor, "D K"] | None = None,
        loc: Float[Tensor, " D"] | None = None,
        noise_scale: Float[Tensor, ""] | float | None = None,
    ) -> Self:
        """Set parameters in place (the parameter objects stay the same); returns the model."""
        for name, value in (("loadings", loadings), ("loc", loc)):
            if value is None:
                continue
            parameter = getattr(self, name)
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{name} must have shape {tuple(parameter.shape)}; it has {tuple(value.shape)}"
                )
            parameter.copy_(value)
        if noise_scale is not None:
            scale = torch.as_tensor(noise_scale, dtype=torch.float64).to(self.loc)
            if not scale > 0:
                raise ValueError(f"noise_scale must be positive; got {scale.item()}")
            self.noise_scale_unconstrained.copy_(scale.log())
        return self

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"data_dim": self.data_dim, "latent_dim": self.latent_dim}

    @pyro_method
    def model(
        self,
        x: ArrayLike | None = None,
        *,
        mask: Bool[Tensor, "B D"] | None = None,
        index: Int[Tensor, " B"] | None = None,
        num_data: int | None = None,
        observe: bool = True,
    ) -> Tensor:
        """The generative model as a Pyro program, under the package's contract."""
        x = None if x is None else as_rows(x, self.loc, self.data_dim)
        rows = count_rows(x, num_data)
        with data_plate(rows, index=index, num_data=num_data, device=self.loc.device):
            prior = dist.Normal(self.loc.new_zeros(self.latent_dim), 1.0).to_event(1)
            z = pyro.sample("z", prior).to(self.loc.dtype)
            likelihood = dist.Normal(z @ self.loadings.mT + self.loc, self.noise_scale)
            if mask is not None and x is not None:
                # NaN under a mask would still poison the gradient.
                x, likelihood = torch.where(mask, x, 0.0), likelihood.mask(mask)
            return pyro.sample("x", likelihood.to_event(1), obs=x if observe else None)

    def marginal(self) -> dist.LowRankMultivariateNormal:
        """p(x), event shape (D,)."""
        variance = self.noise_scale.square().expand(self.data_dim)
        return dist.LowRankMultivariateNormal(self.loc, self.loadings, variance)

    def posterior(self, x: Float[Tensor, "N D"] | ArrayLike) -> dist.MultivariateNormal:
        """p(z | x), exact: batch shape (N,), event shape (K,).

        Raises:
            ValueError: if x has another width, or NaN.
        """
        x, tril, mean = self._solve(x)
        return dist.MultivariateNormal(mean, scale_tril=self.noise_scale * tril)

    def log_likelihood(self, x: Float[Tensor, "N D"] | ArrayLike) -> Float[Tensor, " N"]:
        """log p(x_n), exact, in nats a datum; by Woodbury, O(D K) a row.

        The quadratic form is |x - mu - W m|^2 / sigma^2 + |m|^2 with m the posterior mean, which
        stays accurate where the noise is small.
        """
        x, tril, mean = self._solve(x)
        sigma = self.noise_scale
        residual = (x - self.loc - mean @ self.loadings.mT).square().sum(-1)
        quadratic = residual / sigma.square() + mean.square().sum(-1)
        # log det C = (D - K) log sigma^2 + log det M, and tril tril' = M^-1.
        half_log_det = (
            self.data_dim - self.latent_dim
        ) * sigma.log() - tril.diagonal().log().sum()
        return -0.5 * (self.data_dim * math.log(2 * math.pi) + quadratic) - half_log_det

    def _complete(self, x: ArrayLike) -> Tensor:
        if not am_i_wrapped():  # inside a program the data were checked at its boundary
            x = as_matrix(x)
            if num_missing := int(x.isnan().sum()):
                raise ValueError(
                    f"x has {num_missing} missing entries, and this needs complete rows; drop or "
                    "fill them first"
                )
        return as_rows(x, self.loc, self.data_dim)

    def _solve(self, x: ArrayLike) -> tuple[Tensor, Tensor, Tensor]:
        # x as rows, the lower factor of M^-1, and the posterior means.
        x = self._complete(x)
        precision = self.loadings.mT @ self.loadings
        precision = precision + self.noise_scale.square() * torch.eye(self.latent_dim).to(
            precision
        )
        tril = tril_of_inverse(precision)
        return x, tril, (x - self.loc) @ self.loadings @ tril @ tril.mT

    @torch.no_grad()
    def sample(self, num_samples: int, *, seed: int | None = None) -> Float[Tensor, "S D"]:
        """Draws from p(x)."""
        with seeded(seed):
            return self.marginal().sample(torch.Size([at_least("num_samples", num_samples)]))

    def reconstruct(self, x: ArrayLike, *, shrink: bool = True) -> Float[Tensor, "N D"]:
        """W m + mu with m the posterior mean; ``shrink=False`` is PCA's rank-K projection."""
        if shrink:
            return self._solve(x)[2] @ self.loadings.mT + self.loc
        axes = torch.linalg.qr(self.loadings).Q
        return (self._complete(x) - self.loc) @ axes @ axes.mT + self.loc

    @torch.no_grad()
    def canonical(self) -> Self:
        """A copy whose columns stand on the principal axes, longest first.

        W is only determined up to a rotation W R; with W = U s V' this is U s, each column's
        largest entry positive. The marginal is the same.
        """
        u, s, _ = torch.linalg.svd(self.loadings, full_matrices=False)
        largest = u.abs().argmax(0, keepdim=True)
        return copy.deepcopy(self).assign(loadings=u * s * u.gather(0, largest).sign())


def tril_of_inverse(matrix: Float[Tensor, "*B K K"]) -> Float[Tensor, "*B K K"]:
    """The lower triangular L with L L' = matrix^-1, for a positive definite matrix.

    With J the exchange matrix and J matrix J = R R', L = (J R J)'^-1.
    """
    reversed_factor = torch.linalg.cholesky(matrix.flip(-2, -1))
    upper_inverse = reversed_factor.flip(-2, -1).mT
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(upper_inverse, eye, upper=False)
