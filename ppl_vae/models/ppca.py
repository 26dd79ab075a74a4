"""Probabilistic PCA and factor analysis, in which every quantity is known exactly."""

import math
from typing import Any, Self, cast

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.core.config import configurable
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.program import Density
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.data.sources.row_blocks import RowBlocks, RowSource
from ppl_vae.likelihoods.base import Mask, RowTensor, row_density
from ppl_vae.models.latent_variable_model import Codes, standard_normal
from ppl_vae.models.linear.linear_gaussian_model import LinearGaussianModel
from ppl_vae.models.linear.sufficient_statistics import summarize_table

NOISES = ("isotropic", "diagonal")


class PPCA(LinearGaussianModel):
    """Probabilistic PCA: z ~ N(0, I_K), x | z ~ N(W z + mu, Psi), Psi = sigma^2 I_D.

    With ``noise="diagonal"`` it is factor analysis: Psi = diag(sigma_1^2, ..., sigma_D^2).
    Marginally x ~ N(mu, W W' + Psi), and z | x ~ N(P^-1 W' Psi^-1 (x - mu), P^-1) with
    P = I + W' Psi^-1 W. ``model`` is the Pyro program; all other quantities are exact and take
    missing values, which are integrated out. Exact quantities are computed in float64 for any
    dtype of the model and of x, and returned in the model's dtype.

    Args:
        data_dim: D.
        latent_dim: K.
        noise: ``"isotropic"`` or ``"diagonal"``.
        seed: the seed of the random initial loadings.

    Attributes:
        loadings: W, (D, K).
        loc: mu, (D,).
        noise_scale: sigma, (), or (D,) if the noise is diagonal. A number or a tensor may be
            assigned to it, as by :meth:`assign`.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999).
        Rubin, Thayer: EM algorithms for ML factor analysis (1982).

    Example:
        >>> ppca = PPCA(data_dim=5, latent_dim=2, seed=0)
        >>> x = ppca.sample(100, seed=0)
        >>> ppca.log_likelihood(x).shape
        torch.Size([100])
    """

    @configurable
    def __init__(
        self, data_dim: int, latent_dim: int, *, noise: str = "isotropic", seed: int | None = None
    ) -> None:
        super().__init__()
        self.data_dim = check_int("data_dim", data_dim)
        self.latent_dim = check_int("latent_dim", latent_dim)
        self.noise = check_option("noise", noise, NOISES)
        with seeded(seed):
            self.loadings = nn.Parameter(torch.randn(data_dim, latent_dim) / math.sqrt(latent_dim))
        self.loc = nn.Parameter(torch.zeros(data_dim))
        scale = torch.ones(() if noise == "isotropic" else (data_dim,))
        self.noise_scale = cast(Any, PyroParam(scale, constraints.positive))

    @classmethod
    def like(
        cls,
        x: RowSource,
        latent_dim: int,
        *,
        noise: str = "isotropic",
        mask: ArrayLike | None = None,
        seed: int | None = None,
    ) -> Self:
        """A model of x's width, dtype and device, with x's mean and half of its variance as noise.

        Args:
            x: a matrix, a memory map, or an iterable of blocks of rows; NaN marks a missing value.
            latent_dim: K.
            noise: ``"isotropic"`` or ``"diagonal"``.
            mask: True where observed.
            seed: the seed of the random loadings.

        Raises:
            ValueError: if K >= the rank of the centred data (with missing values, its upper bound
                from the numbers of rows and columns); if a row or column has nothing observed; if
                a column is constant and ``noise="diagonal"``.
        """
        processes = Processes.current()
        with processes.together():
            blocks = RowBlocks(x, mask, rescale=True, processes=processes)
        columns, covariance = summarize_table(blocks)
        (covariance or columns).check_rank(latent_dim)
        columns.check(diagonal=noise == "diagonal")
        ppca = cls(len(columns.mean), latent_dim, noise=noise, seed=processes.common_seed(seed))
        ppca = ppca.to(device=columns.mean.device, dtype=blocks.dtype)
        ppca.schema = blocks.schema
        variance = columns.variance if noise == "diagonal" else columns.variance.mean()
        scale = (variance / 2).sqrt() * blocks.unit
        return ppca.assign(
            loadings=ppca.loadings.detach() * scale.reshape(-1, 1).to(ppca.loc),
            loc=columns.mean * blocks.unit,
            noise_scale=scale,
        )

    @classmethod
    def from_parameters(cls, loadings: Tensor, loc: Tensor, noise_scale: Tensor | float) -> Self:
        """The model with these parameters, in the dtype and on the device of ``loadings``.

        The noise is diagonal if ``noise_scale`` is a vector.
        """
        is_vector = isinstance(noise_scale, Tensor) and noise_scale.dim() > 0
        noise = "diagonal" if is_vector else "isotropic"
        ppca = cls(*loadings.shape, noise=noise, seed=0).to(loadings)
        return ppca.assign(loadings=loadings, loc=loc, noise_scale=noise_scale)

    def __setattr__(self, name: str, value: Any) -> None:
        # Pyro would let a number replace the parameter, and accept a scale that is not positive.
        is_set = "noise_scale_unconstrained" in self.__dict__.get("_parameters", {})
        if name == "noise_scale" and is_set and not isinstance(value, PyroParam | PyroSample):
            self.assign(noise_scale=value)
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def assign(
        self,
        *,
        loadings: Float[Tensor, "D K"] | None = None,
        loc: Float[Tensor, " D"] | None = None,
        noise_scale: Float[Tensor, "*D"] | float | None = None,
    ) -> Self:
        """Set parameters in place (the parameter objects stay the same); returns the model.

        Raises:
            ValueError: if one has another shape (a scalar noise scale is also accepted for
                diagonal noise), or a noise scale is not positive.
        """
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
            parameter = self.noise_scale_unconstrained
            if scale.shape not in (parameter.shape, torch.Size()):
                raise ValueError(
                    f"noise_scale must have shape {tuple(parameter.shape)}; "
                    f"it has {tuple(scale.shape)}"
                )
            if not (scale > 0).all():
                raise ValueError(f"noise_scale must be positive; got {scale.min().item()}")
            parameter.copy_(scale.log())
        return self

    def prior(self) -> Density:
        """N(0, I_K)."""
        return standard_normal(self.latent_dim, self.loc)

    def conditional(
        self, z: Codes, x: RowTensor | None = None, mask: Mask | None = None, observe: bool = False
    ) -> Density:
        """N(W z + mu, Psi), event shape (D,), with its gradient; ``x`` and ``observe`` are unused.

        Args: see :class:`~ppl_vae.models.latent_variable_model.LatentVariableModel`.
        """
        return row_density(dist.Normal(z @ self.loadings.mT + self.loc, self.noise_scale), mask)
