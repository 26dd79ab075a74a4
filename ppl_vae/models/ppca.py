"""Probabilistic PCA and factor analysis, in which every quantity is known exactly."""

import copy
import math
from collections.abc import Iterator
from typing import Any, Self, cast

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from pyro.nn import PyroParam, pyro_method
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.arguments import (
    ArrayLike,
    as_matrix,
    at_least,
    check_rows_seen,
    choose_option,
    seen_cells,
)
from ppl_vae.blocks import RowBlocks, RowSource, rows_at_once
from ppl_vae.models.linear_gaussian import Patterns, Solution
from ppl_vae.models.moments import summarize
from ppl_vae.program import Program, as_rows, count_rows, data_plate
from ppl_vae.results import Imputation
from ppl_vae.state import seeded

NOISES = ("isotropic", "diagonal")


class PPCA(Program):
    """Probabilistic PCA: z ~ N(0, I_K), x | z ~ N(W z + mu, Psi), Psi = sigma^2 I_D.

    With ``noise="diagonal"`` it is factor analysis: Psi = diag(sigma_1^2, ..., sigma_D^2).
    Marginally x ~ N(mu, W W' + Psi), and z | x ~ N(P^-1 W' Psi^-1 (x - mu), P^-1) with
    P = I + W' Psi^-1 W. ``model`` is the Pyro program; everything else is exact, and takes holes:
    of a row only what was observed counts, the rest is integrated out.

    Args:
        data_dim: D.
        latent_dim: K.
        noise: ``"isotropic"`` or ``"diagonal"``.
        seed: of the random loadings to start from.

    Attributes:
        loadings: W, (D, K).
        loc: mu, (D,).
        noise_scale: sigma, (), or (D,) if the noise is diagonal.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999).
        Rubin, Thayer: EM algorithms for ML factor analysis (1982).

    Example:
        >>> ppca = PPCA(data_dim=5, latent_dim=2, seed=0)
        >>> x = ppca.sample(100, seed=0)
        >>> ppca.log_likelihood(x).shape
        torch.Size([100])
    """

    noise_scale: Tensor

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        *,
        noise: str = "isotropic",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.data_dim = at_least("data_dim", data_dim)
        self.latent_dim = at_least("latent_dim", latent_dim)
        self.noise = choose_option("noise", noise, NOISES)
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
        """A model of x's shape, dtype and device: its mean, and half of its variance as noise.

        Args:
            x: a matrix, a memory map, or an iterable of blocks of rows; NaN is a hole.
            latent_dim: K.
            noise: ``"isotropic"`` or ``"diagonal"``.
            mask: True where observed.
            seed: of the random loadings.

        Raises:
            ValueError: if K >= the rank of the centred data, as far as complete data show it; if
                a row or column has nothing observed, or a column with a noise of its own is
                constant.
        """
        columns, covariance = summarize(blocks := RowBlocks(x, mask, rescale=True))
        (covariance or columns).check_rank(latent_dim)
        columns.check(diagonal=noise == "diagonal")
        ppca = cls(len(columns.mean), latent_dim, noise=noise, seed=seed)
        ppca = ppca.to(device=columns.mean.device, dtype=blocks.dtype)
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

        A vector of noise scales makes the noise diagonal.
        """
        noise = "diagonal" if isinstance(noise_scale, Tensor) and noise_scale.dim() else NOISES[0]
        ppca = cls(*loadings.shape, noise=noise, seed=0).to(loadings)
        return ppca.assign(loadings=loadings, loc=loc, noise_scale=noise_scale)

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
            ValueError: if one has another shape (a number will do for a diagonal noise, too), or
                a noise scale is not positive.
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
            own = self.noise_scale_unconstrained
            if scale.shape not in (own.shape, torch.Size()):
                raise ValueError(
                    f"noise_scale must have shape {tuple(own.shape)}; it has {tuple(scale.shape)}"
                )
            if not (scale > 0).all():
                raise ValueError(f"noise_scale must be positive; got {scale.min().item()}")
            own.copy_(scale.log())
        return self

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {k: getattr(self, k) for k in ("data_dim", "latent_dim", "noise")}

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

    def _variance(self) -> Float[Tensor, " D"]:
        return self.noise_scale.square().expand(self.data_dim)

    def marginal(self) -> dist.LowRankMultivariateNormal:
        """p(x), event shape (D,)."""
        return dist.LowRankMultivariateNormal(self.loc, self.loadings, self._variance())

    def covariance(self) -> Float[Tensor, "D D"]:
        """W W' + Psi, the covariance of x."""
        return self.loadings @ self.loadings.mT + self._variance().diag()

    def posterior(
        self, x: ArrayLike, *, mask: Bool[Tensor, "N D"] | ArrayLike | None = None
    ) -> dist.MultivariateNormal:
        """p(z | x), exact: batch shape (N,), event shape (K,).

        Args:
            x: (N, D); NaN is a hole.
            mask: True where observed.

        Raises:
            ValueError: if x has another width, or a row with nothing observed.
        """
        found = list(self._solve(x, mask))
        tril = torch.cat([solution.patterns.spread(solution.tril) for solution in found])
        return dist.MultivariateNormal(torch.cat([s.mean for s in found]), scale_tril=tril)

    def posterior_mean(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Tensor:
        """E[z | x], (N, K), without the covariances that :meth:`posterior` holds of all rows."""
        return torch.cat([solution.mean for solution in self._solve(x, mask)])

    def log_likelihood(
        self, x: ArrayLike, *, mask: Bool[Tensor, "N D"] | ArrayLike | None = None
    ) -> Float[Tensor, " N"]:
        """log p of what was observed of each row, exact, in nats a datum.

        By Woodbury: O(D K) a row, and O(D K^2) for each pattern of holes.

        Args, raises: as :meth:`posterior`.
        """
        return torch.cat([solution.log_likelihood() for solution in self._solve(x, mask)])

    def _observed(self, x: ArrayLike, mask: ArrayLike | None) -> tuple[Tensor, Tensor | None]:
        # x as rows with zeros in its holes, and what was seen; None if nothing is missing.
        inside = am_i_wrapped()  # inside a program the data were checked at its boundary
        rows = as_rows(x if inside else as_matrix(x), self.loc, self.data_dim)
        seen = mask if inside else seen_cells(rows, mask)
        if seen is None:
            return rows, None
        if not inside:
            check_rows_seen(seen)
        return torch.where(seen, rows, 0.0), seen

    def _solve(self, x: ArrayLike, mask: ArrayLike | None = None) -> Iterator[Solution]:
        # All rows at once if they are complete, and piece by piece if not.
        x, seen = self._observed(x, mask)
        parameters = self.loadings, self.loc, self._variance()
        if seen is None:
            yield Solution.of(x, Patterns.complete(self.loc), *parameters)
            return
        patterns = Patterns.each if am_i_wrapped() else Patterns.shared
        size = rows_at_once(4 * self.data_dim + 4 * self.latent_dim**2)
        for rows, cells in zip(x.split(size), seen.split(size), strict=True):
            yield Solution.of(rows, patterns(cells, self.loc), *parameters)

    @torch.no_grad()
    def impute(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        num_samples: int = 0,
        seed: int | None = None,
    ) -> Imputation:
        """The holes of x, given what was observed in their rows; observed cells are untouched.

        Args:
            x: (N, D); NaN is a hole.
            mask: True where observed.
            num_samples: how many draws to make of each row's holes, jointly.
            seed: of these.

        Returns:
            In the model's dtype, or x's own if that is finer.

        Raises:
            ValueError: as :meth:`posterior`; if num_samples is no whole number >= 0.
        """
        x, num_samples = as_matrix(x), at_least("num_samples", num_samples, 0)
        kept = x.to(device=self.loc.device, dtype=torch.promote_types(x.dtype, self.loc.dtype))
        seen = self._observed(x, mask)[1]
        if seen is None:
            draws = kept.expand(num_samples, -1, -1) if num_samples else None
            return Imputation(kept, torch.zeros_like(kept), draws)
        with seeded(seed):
            size = rows_at_once(self.data_dim * (4 + self.latent_dim + 2 * num_samples))
            pieces = zip(kept.split(size), seen.split(size), strict=True)
            found = [self._fill(rows, cells, num_samples) for rows, cells in pieces]
        mean, sd, draws = zip(*found, strict=True)
        return Imputation(
            torch.cat(mean), torch.cat(sd), torch.cat(draws, 1) if num_samples else None
        )

    def _fill(self, kept: Tensor, seen: Tensor, num_samples: int) -> tuple[Tensor, ...]:
        # Mean, standard deviation and draws of some rows.
        parameters = self.loadings, self.loc, self._variance()
        rows = torch.where(seen, kept, 0.0).to(self.loc)
        solution = Solution.of(rows, Patterns.shared(seen, self.loc), *parameters)
        mean, sd, draws = solution.predict(self.loadings, self.loc, num_samples)
        mean, draws = (torch.where(seen, kept, filled.to(kept)) for filled in (mean, draws))
        return mean, torch.where(seen, 0.0, sd).to(kept), draws

    @torch.no_grad()
    def sample(self, num_samples: int, *, seed: int | None = None) -> Float[Tensor, "S D"]:
        """Draws from p(x)."""
        with seeded(seed):
            return self.marginal().sample(torch.Size([at_least("num_samples", num_samples)]))

    def reconstruct(
        self, x: ArrayLike, *, mask: ArrayLike | None = None, shrink: bool = True
    ) -> Float[Tensor, "N D"]:
        """W m + mu with m the posterior mean, in holes too.

        ``shrink=False`` is PCA's rank-K projection (with diagonal noise, the weighted one:
        m = (W' Psi^-1 W)^-1 W' Psi^-1 (x - mu), Bartlett's scores); it needs complete rows.

        Raises:
            ValueError: as :meth:`posterior`; if something is missing and ``shrink=False``.
        """
        if shrink:
            return self.posterior_mean(x, mask=mask) @ self.loadings.mT + self.loc
        x, seen = self._observed(x, mask)
        if seen is not None:
            raise ValueError(
                f"x has {int((~seen).sum())} missing entries, and a projection needs complete "
                "rows; shrink=True takes holes, and impute(x) fills them"
            )
        scale = self._variance().sqrt()
        axes = torch.linalg.qr(self.loadings / scale[:, None]).Q
        return ((x - self.loc) / scale) @ axes @ axes.mT * scale + self.loc

    @torch.no_grad()
    def canonical(self) -> Self:
        """A copy whose columns stand on the principal axes, longest first.

        W is only determined up to a rotation W R; with Psi^-1/2 W = U s V' this is Psi^1/2 U s
        (for isotropic noise simply W V), each column's largest entry positive. The marginal is
        the same.
        """
        scale = self._variance().sqrt()[:, None]
        u, s, _ = torch.linalg.svd(self.loadings / scale, full_matrices=False)
        turned = scale * u * s
        largest = turned.abs().argmax(0, keepdim=True)
        return copy.deepcopy(self).assign(loadings=turned * turned.gather(0, largest).sign())
