"""The posterior of the parameters of BayesianPPCA, z integrated out, in real coordinates."""

import copy
import math

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.state import validation
from ppl_vae.inference.mcmc.trapezoidal import TrapezoidalLoadings, orthogonal
from ppl_vae.models.bayesian_ppca import BayesianPPCA, ParameterDraws
from ppl_vae.models.linear.integrated_likelihood import integrated_log_likelihood
from ppl_vae.models.linear.table_statistics import TableStatistics
from ppl_vae.models.priors import ParameterPrior

SMALLEST_NOISE = 0.05
"""The least noise variance of a start, relative to the mean variance of the columns."""


class IntegratedPosterior:
    """log p(X, theta) of :class:`~ppl_vae.models.bayesian_ppca.BayesianPPCA` and its coordinates.

    The likelihood is log p(X | W, mu, sigma) with z integrated out, from sufficient statistics. A
    position is a vector of these blocks:

    * ``trapezoid``: the coordinates of L in W = diag(s) L Q', see ``TrapezoidalLoadings``;
    * ``rotation``: a K x K matrix with independent standard normal elements, whose orthogonal
      factor is Q', unless the prior is invariant under rotations. The likelihood does not depend
      on it. If the prior is invariant, neither does the posterior, and Q is drawn afterwards;
    * ``loadings``: the elements of diag(s)^-1 W in place of these two blocks, if the prior of W
      changes with the signs of its columns. (The density would jump where the determinant of
      ``rotation`` is zero and the sign of a column changes);
    * ``loc``: mu in standard deviations of the columns from their means;
    * ``log_noise``: log sigma;
    * ``log_relevance``: under ARD, unless the prior of the relevance is a gamma distribution. Then
      it is integrated out, and drawn afterwards:
      relevance_k | W ~ Gamma(a + D / 2, b + sum_d W_dk^2 / (2 s_dk^2)).

    Args:
        model: the model; it is copied, in float64.
        statistics: the statistics of the data.
    """

    def __init__(self, model: BayesianPPCA, statistics: TableStatistics) -> None:
        self.statistics = statistics
        self.model = copy.deepcopy(model).to(statistics.rows)
        self.scale = statistics.columns.variance.sqrt()
        self.scale = torch.where(self.scale > 0, self.scale, 1.0)
        self.is_invariant = model.prior == "normal" and (
            model.loadings_prior.is_normal_about_zero()
            and model.loadings_prior.is_constant_in_rows()
        )
        self.is_raw = not (model.prior == "ard" or _is_symmetric(model.loadings_prior))
        loadings, noise_scale = self._start()
        self.trapezoid = TrapezoidalLoadings.pivoted(loadings, self._loadings_scale())
        self.sizes = {
            "trapezoid": 0 if self.is_raw else self.trapezoid.num_coordinates,
            "rotation": 0 if self.is_invariant or self.is_raw else model.latent_dim**2,
            "loadings": model.data_dim * model.latent_dim if self.is_raw else 0,
            "loc": model.data_dim,
            "log_noise": noise_scale.numel(),
            "log_relevance": model.latent_dim if self._samples_relevance else 0,
        }
        self.start = self._position(loadings, noise_scale)

    @property
    def num_coordinates(self) -> int:
        """The length of a position."""
        return sum(self.sizes.values())

    @property
    def is_rotation(self) -> Bool[Tensor, " P"]:
        """Which coordinates belong to the block ``rotation``."""
        names = list(self.sizes)
        sizes = torch.tensor(list(self.sizes.values()))
        return torch.arange(len(names)).repeat_interleave(sizes) == names.index("rotation")

    @property
    def _samples_relevance(self) -> bool:
        prior = self.model.relevance_prior
        return prior is not None and prior.family is not dist.Gamma

    def _loadings_scale(self) -> Float[Tensor, " D"]:
        if not self.is_invariant:
            return self.scale
        shape = self.model.loadings_prior.shape
        return self.model.loadings_prior.get_buffer("scale").expand(shape)[:, 0]

    def blocks(self, position: Float[Tensor, "*S P"]) -> dict[str, Tensor]:
        """The blocks of positions by name."""
        parts = position.split(list(self.sizes.values()), -1)
        return dict(zip(self.sizes, parts, strict=True))

    def log_density(self, position: Float[Tensor, "*S P"]) -> Float[Tensor, "*S"]:
        """log p(X, theta) as a density of the position, normalized like the prior, in nats."""
        blocks = self.blocks(position)
        with validation(False):
            loadings, log_prior = self._loadings(blocks)
            loc, noise_scale = self._loc(blocks), self._noise_scale(blocks)
            log_prior = log_prior + self.model.loc_prior().log_prob(loc) + self.scale.log().sum()
            log_prior = log_prior + self.model.noise_prior().log_prob(noise_scale)
            log_prior = log_prior + blocks["log_noise"].sum(-1)
            return log_prior + integrated_log_likelihood(
                self.statistics, loadings, loc, noise_scale
            )

    def _loc(self, blocks: dict[str, Tensor]) -> Tensor:
        return self.statistics.mean + self.scale * blocks["loc"]

    def _noise_scale(self, blocks: dict[str, Tensor]) -> Tensor:
        scale = blocks["log_noise"].exp()
        return scale.squeeze(-1) if self.model.noise == "isotropic" else scale

    def _loadings(self, blocks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        # W, up to a rotation if the prior is invariant, and the log prior of its coordinates.
        if self.is_raw:
            loadings = self._raw(blocks)
            log_volume = self.model.latent_dim * self.scale.log().sum()
            return loadings, log_volume + self._log_loadings_prior(loadings, blocks)
        loadings = self.trapezoid.loadings(blocks["trapezoid"])
        if self.is_invariant:
            return loadings, self.trapezoid.log_prior(blocks["trapezoid"])
        normal = blocks["rotation"]
        loadings = loadings @ orthogonal(self._square(normal))
        log_normal = -normal.square().sum(-1) / 2 - normal.shape[-1] * math.log(2 * math.pi) / 2
        log_volume = self.trapezoid.log_volume(blocks["trapezoid"]) + log_normal
        return loadings, log_volume + self._log_loadings_prior(loadings, blocks)

    def _raw(self, blocks: dict[str, Tensor]) -> Tensor:
        return self.scale.unsqueeze(-1) * blocks["loadings"].unflatten(-1, self._shape)

    def _square(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.model.latent_dim, self.model.latent_dim))

    def _log_loadings_prior(self, loadings: Tensor, blocks: dict[str, Tensor]) -> Tensor:
        model, prior = self.model, self.model.relevance_prior
        if prior is None:
            return model.loadings_prior().log_prob(loadings)
        if not self._samples_relevance:
            return _log_ard(prior, self._scaled(loadings)) - self._scales().log().sum()
        log_relevance = blocks["log_relevance"]
        relevance = log_relevance.exp()
        log_prior = prior().log_prob(relevance) + log_relevance.sum(-1)
        return log_prior + model.loadings_density(relevance).log_prob(loadings)

    def _scales(self) -> Float[Tensor, "D K"]:
        return self.model.loadings_prior.get_buffer("scale").expand(*self._shape)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.model.data_dim, self.model.latent_dim

    def _scaled(self, loadings: Tensor) -> Tensor:
        return loadings / self._scales()

    @torch.no_grad()
    def parameters(self, position: Float[Tensor, "*S P"]) -> ParameterDraws:
        """The parameters at positions; Q and the relevance are drawn where they are not in it."""
        blocks = self.blocks(position)
        loadings = self._raw(blocks) if self.is_raw else self._rotated(blocks)
        relevance, prior = None, self.model.relevance_prior
        if self._samples_relevance:
            relevance = blocks["log_relevance"].exp()
        elif prior is not None:
            half_squares = self._scaled(loadings).square().sum(-2) / 2
            shape = prior.get_buffer("concentration") + self.model.data_dim / 2
            relevance = dist.Gamma(shape, prior.get_buffer("rate") + half_squares).sample()
        return ParameterDraws(loadings, self._loc(blocks), self._noise_scale(blocks), relevance)

    def _rotated(self, blocks: dict[str, Tensor]) -> Tensor:
        normal = blocks["rotation"]
        if self.is_invariant:
            normal = torch.randn(*normal.shape[:-1], self.model.latent_dim**2).to(normal)
        loadings = self.trapezoid.loadings(blocks["trapezoid"])
        return loadings @ orthogonal(self._square(normal))

    def _position(self, loadings: Tensor, noise_scale: Tensor) -> Float[Tensor, " P"]:
        if self.is_raw:
            parts = [(loadings / self.scale.unsqueeze(-1)).flatten()]
        else:
            parts = [self.trapezoid.coordinates(loadings)]
        if self.sizes["rotation"]:
            parts.append(torch.eye(self.model.latent_dim).to(loadings).flatten())
        parts += [torch.zeros_like(self.scale), noise_scale.log().reshape(-1)]
        if self._samples_relevance:
            parts.append(torch.zeros(self.model.latent_dim).to(loadings))
        return torch.cat(parts)

    def _start(self) -> tuple[Tensor, Tensor]:
        # Principal axes of the observed entries, of standardized columns if noise is diagonal.
        rows, latent_dim = self.statistics.rows, self.model.latent_dim
        isotropic = self.model.noise == "isotropic"
        unit = self.scale.square().mean().sqrt().expand_as(self.scale) if isotropic else self.scale
        scaled = rows / unit
        pairs = self.statistics.observed.mT @ (
            self.statistics.counts[:, None] * self.statistics.observed
        )
        values, axes = torch.linalg.eigh(scaled.mT @ scaled / pairs.clamp(min=1.0))
        values, axes = values.flip(0), axes.flip(1)
        remainder = values[latent_dim:]
        noise = remainder.mean() if len(remainder) else values.new_zeros(())
        noise = noise.clamp(min=SMALLEST_NOISE)
        used = min(latent_dim, len(values))
        length = (values[:used] - noise).clamp(min=SMALLEST_NOISE).sqrt()
        loadings = values.new_full((len(values), latent_dim), 0.0)
        loadings[:, :used] = unit[:, None] * axes[:, :used] * length
        scale = noise.sqrt() * unit
        return loadings, scale[0] if isotropic else scale


def _is_symmetric(prior: ParameterPrior) -> bool:
    # Whether the density of W does not change with the sign of a column.
    if prior.family not in (dist.Normal, dist.Laplace, dist.StudentT, dist.Cauchy):
        return False
    return not bool(prior.get_buffer("loc").any())


def _log_ard(prior: ParameterPrior, scaled: Float[Tensor, "*S D K"]) -> Float[Tensor, "*S"]:
    # The density of the columns of W / s with the relevance integrated out, a multivariate t:
    # Gamma(a + D / 2) / Gamma(a) b^a (2 pi)^(-D / 2) (b + |w_k|^2 / 2)^-(a + D / 2).
    shape = scaled.shape[-1:]
    concentration = prior.get_buffer("concentration").expand(shape)
    rate = prior.get_buffer("rate").expand(shape)
    data_dim = scaled.shape[-2]
    total = concentration + data_dim / 2
    constant = torch.lgamma(total) - torch.lgamma(concentration) + concentration * rate.log()
    constant = constant - data_dim * math.log(2 * math.pi) / 2
    return (constant - total * (rate + scaled.square().sum(-2) / 2).log()).sum(-1)
