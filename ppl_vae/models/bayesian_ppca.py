"""Probabilistic PCA and factor analysis with priors on their parameters."""

from typing import NamedTuple, Self

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.config import ConstructorCall, configurable
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.program import Density
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.data.sources.row_blocks import RowBlocks, RowSource
from ppl_vae.likelihoods.base import row_density
from ppl_vae.models.latent_variable_model import RowDensity, RowProgram, standard_normal
from ppl_vae.models.linear.observed_gaussian import ObservedGaussian
from ppl_vae.models.linear.sufficient_statistics import summarize_table
from ppl_vae.models.ppca import NOISES, PPCA
from ppl_vae.models.priors import InverseGammaScale, ParameterPrior

LOADINGS_PRIORS = ("normal", "ard")


class ParameterDraws(NamedTuple):
    """Draws of the parameters; leading dimensions are those of the draws.

    Attributes:
        loadings: W, ``(*S, D, K)``.
        loc: mu, ``(*S, D)``.
        noise_scale: sigma, ``(*S,)`` or ``(*S, D)``.
        relevance: the precisions of the columns of W, ``(*S, K)``, under the ARD prior.
    """

    loadings: Tensor
    loc: Tensor
    noise_scale: Tensor
    relevance: Tensor | None

    def sites(self) -> dict[str, Tensor]:
        """The draws by the names of the model's sites."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @property
    def column_scale(self) -> Float[Tensor, "*S D"]:
        """sigma as one number per column."""
        scale = self.noise_scale
        wide = scale if scale.dim() == self.loc.dim() else scale.unsqueeze(-1)
        return wide.expand_as(self.loc)


class BayesianPPCA(RowProgram):
    """Probabilistic PCA whose parameters have priors and are drawn by the program.

    W, mu and sigma are sites of the model outside the plate over data, ``loadings``, ``loc`` and
    ``noise_scale``; given them z_n ~ N(0, I_K) and x_n | z_n ~ N(W z_n + mu, Psi) as in
    :class:`~ppl_vae.models.ppca.PPCA`. With ``prior="ard"`` (automatic relevance determination)
    each column of W has a precision, the site ``relevance``, and W_dk ~ N(0, s_d^2 /
    relevance_k): columns that the data do not need are shrunk to zero.

    Args:
        data_dim: D.
        latent_dim: K.
        noise: ``"isotropic"`` or ``"diagonal"``.
        prior: on the loadings, ``"normal"`` or ``"ard"``.
        marginal: whether z is integrated out, so that ``model`` has no site ``z`` and
            x_n ~ N(mu, W W' + Psi); the density of x is the same.
        loadings_prior: the prior of the elements of W, expandable to (D, K); N(0, 1) if None.
            Under ARD it must be normal with mean zero, and its scale is divided by
            relevance_k^1/2.
        loc_prior: the prior of mu, expandable to (D,); N(0, 10^2) if None.
        noise_prior: the prior of sigma; sigma^2 ~ InverseGamma(1, 0.1) if None.
        relevance_prior: the prior of the precisions of columns, expandable to (K,); Gamma(0.5,
            0.001) if None. With Gamma(a, b) the mean of a relevance given W is at most (a + D / 2)
            / b, so that loadings smaller than s_d times the root of its inverse are not shrunk
            much: with a larger b, columns that explain nothing but chance are kept.

    Raises:
        ValueError: if a prior is improper, multivariate, of another support or another shape; if
            ``relevance_prior`` is given without ``prior="ard"``.

    References:
        Bishop: Bayesian PCA (1999).

    Example:
        >>> model = BayesianPPCA(data_dim=5, latent_dim=2)
        >>> model.model(num_data=3).shape
        torch.Size([3, 5])
    """

    @configurable
    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        noise: str = "isotropic",
        prior: str = "normal",
        marginal: bool = False,
        loadings_prior: Density | None = None,
        loc_prior: Density | None = None,
        noise_prior: Density | None = None,
        relevance_prior: Density | None = None,
    ) -> None:
        super().__init__()
        self.data_dim = check_int("data_dim", data_dim)
        self.latent_dim = check_int("latent_dim", latent_dim)
        self.noise = check_option("noise", noise, NOISES)
        self.prior = check_option("prior", prior, LOADINGS_PRIORS)
        self.marginal = marginal
        size, rank = (data_dim,), (latent_dim,)
        noise_size = () if noise == "isotropic" else size
        normal, wide = dist.Normal(0.0, 1.0), dist.Normal(0.0, 10.0)
        variance = InverseGammaScale(1.0, 0.1)
        self.loadings_prior = ParameterPrior("loadings", loadings_prior or normal, size + rank)
        self.loc_prior = ParameterPrior("loc", loc_prior or wide, size)
        self.noise_prior = ParameterPrior(
            "noise", noise_prior or variance, noise_size, positive=True
        )
        self.relevance_prior = _relevance_prior(prior, relevance_prior, rank)
        if prior == "ard" and not self.loadings_prior.is_normal_about_zero():
            raise ValueError(
                'prior="ard" needs a normal loadings_prior with mean zero, whose scale relevance '
                f"divides; got {loadings_prior!r}"
            )

    @classmethod
    def like(
        cls,
        x: RowSource,
        latent_dim: int,
        *,
        noise: str = "isotropic",
        prior: str = "normal",
        marginal: bool = False,
        relevance_prior: Density | None = None,
        mask: ArrayLike | None = None,
    ) -> Self:
        """A model with weakly informative priors in the units of x, of its width, dtype and
        device.

        With m_d and s_d the mean and the standard deviation of column d: W_dk ~ N(0, s_d^2),
        mu_d ~ N(m_d, (10 s_d)^2), and sigma^2 ~ InverseGamma(1, 0.1 s^2) with s^2 the mean of the
        s_d^2, or s_d^2 if the noise is diagonal.

        Args:
            x: a matrix, a memory map, or an iterable of blocks of rows; NaN marks a missing value.
            latent_dim: K.
            noise, prior, marginal, relevance_prior: as in the constructor.
            mask: True where observed.

        Raises:
            ValueError: as :meth:`ppl_vae.models.ppca.PPCA.like`; if a column is constant.
        """
        processes = Processes.current()
        with processes.together():
            blocks = RowBlocks(x, mask, processes=processes)
        columns, covariance = summarize_table(blocks)
        (covariance or columns).check_rank(latent_dim)
        columns.check(diagonal=True)
        scale, variance = columns.variance.sqrt(), columns.variance
        variance = variance if noise == "diagonal" else variance.mean()
        model = cls(
            len(scale),
            latent_dim,
            noise=noise,
            prior=prior,
            marginal=marginal,
            loadings_prior=dist.Normal(torch.zeros_like(scale)[:, None], scale[:, None]),
            loc_prior=dist.Normal(columns.mean, 10 * scale),
            noise_prior=InverseGammaScale(torch.ones_like(variance), 0.1 * variance),
            relevance_prior=relevance_prior,
        )
        model.schema = blocks.schema
        return model.to(device=columns.mean.device, dtype=blocks.dtype)

    def __repr__(self) -> str:
        names = ("data_dim", "latent_dim", "noise", "prior", "marginal")
        call = ConstructorCall(type(self).__name__, {name: getattr(self, name) for name in names})
        lines = [repr(call), f"  loadings ~ {self.loadings_prior!r}"]
        if self.relevance_prior is not None:
            lines[1] += ", its scale divided by relevance^(1/2)"
            lines.append(f"  relevance ~ {self.relevance_prior!r}")
        lines += [f"  loc ~ {self.loc_prior!r}", f"  noise_scale ~ {self.noise_prior!r}"]
        return "\n".join(lines)

    def sample_parameters(self) -> ParameterDraws:
        """Draw the parameters, as sites of the program that calls it."""
        relevance = None
        if self.relevance_prior is not None:
            relevance = pyro.sample("relevance", self.relevance_prior())
        return ParameterDraws(
            pyro.sample("loadings", self.loadings_density(relevance)),
            pyro.sample("loc", self.loc_prior()),
            pyro.sample("noise_scale", self.noise_prior()),
            relevance,
        )

    def loadings_density(self, relevance: Float[Tensor, "*S K"] | None = None) -> Density:
        """p(W), or p(W | relevance) under the ARD prior; event shape (D, K)."""
        if relevance is None:
            return self.loadings_prior()
        scale = self.loadings_prior.get_buffer("scale") * relevance.rsqrt().unsqueeze(-2)
        shape = (*relevance.shape[:-1], self.data_dim, self.latent_dim)
        return dist.Normal(0.0, scale.expand(shape)).to_event(2)

    def density_in_plate(self, observe: bool) -> tuple[Tensor, RowDensity]:
        """See :class:`~ppl_vae.models.latent_variable_model.RowProgram`; draws the parameters."""
        parameters = self.sample_parameters()

        def density(x: Tensor | None, mask: Tensor | None) -> Density:
            return self._data_density(parameters, None if x is None else mask)

        return next(self.loc_prior.buffers()), density

    def _data_density(self, parameters: ParameterDraws, mask: Tensor | None) -> Density:
        # p(x | z, parameters) with z drawn, or p(x | parameters); event shape (D,).
        loadings, loc, noise_scale, _ = parameters
        noise_scale = noise_scale.unsqueeze(-1) if self.noise == "isotropic" else noise_scale
        if self.marginal:
            scale = noise_scale.expand(torch.broadcast_shapes(noise_scale.shape, loc.shape))
            return ObservedGaussian(loadings, loc, scale, mask)
        z = pyro.sample("z", standard_normal(self.latent_dim, loc))
        mean = (z.unsqueeze(-2) @ loadings.mT).squeeze(-2) + loc
        return row_density(dist.Normal(mean, noise_scale), mask)

    def ppca(self, parameters: ParameterDraws) -> PPCA:
        """The model :class:`~ppl_vae.models.ppca.PPCA` with one draw of the parameters."""
        loadings, loc, noise_scale, _ = parameters
        ppca = PPCA.from_parameters(loadings, loc, noise_scale)
        ppca.schema = self.schema
        return ppca

    def not_conjugate(self) -> tuple[str, ...]:
        """The priors that are not conjugate, by name; empty if Gibbs sampling applies."""
        relevance = self.relevance_prior
        conjugate = {
            "loadings_prior": self.loadings_prior.is_normal_about_zero()
            and self.loadings_prior.is_constant_in_rows(),
            "loc_prior": self.loc_prior.family is dist.Normal,
            "noise_prior": self.noise_prior.family is InverseGammaScale,
            "relevance_prior": relevance is None or relevance.family is dist.Gamma,
        }
        return tuple(name for name, holds in conjugate.items() if not holds)


def _relevance_prior(
    prior: str, relevance_prior: Density | None, rank: tuple[int]
) -> ParameterPrior | None:
    if prior == "ard":
        default = dist.Gamma(0.5, 0.001)
        return ParameterPrior("relevance", relevance_prior or default, rank, positive=True)
    if relevance_prior is not None:
        raise ValueError(
            f'relevance_prior is used with prior="ard" only; prior is {prior!r}. Pass '
            'prior="ard", or leave relevance_prior out'
        )
    return None
