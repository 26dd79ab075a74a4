"""What is known exactly of x | z ~ N(W z + mu, Psi), z ~ N(0, I): everything, in float64."""

import copy
from collections.abc import Iterator
from typing import Any, Self

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from ppl_vae.core.program import Program, as_rows
from ppl_vae.core.results import Imputation
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import (
    ArrayLike,
    as_matrix,
    check_int,
    check_rows_observed,
    observed_mask,
)
from ppl_vae.data.row_blocks import rows_per_block
from ppl_vae.models.identifiability import described, undetermined_cells
from ppl_vae.models.linear_gaussian import LatentPosterior, MissingnessPatterns
from ppl_vae.models.principal_axes import principal_axes

WAY_OUT = "give the columns of x other units, nearer to one"


class LinearGaussianModel(Program):
    """Abstract: a model with loadings W (D, K), a mean ``loc`` (D,) and a ``noise_scale``.

    All methods compute in float64, whatever the dtype of the parameters and of x, and return the
    parameters' dtype. What that dtype cannot hold raises a ``FloatingPointError`` which names it.
    Gradients reach the parameters through the conversion.

    Attributes:
        undetermined: pairs of columns whose covariance the data of the last exact fit did not
            determine, (P, 2), as :func:`~ppl_vae.models.identifiability.undetermined_pairs` finds
            them; None if there are none, or if no such fit was made. Saved with the parameters.
    """

    undetermined: Tensor | None
    data_dim: int
    latent_dim: int
    loadings: Tensor
    loc: Tensor
    noise_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("undetermined", None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **keywords: Any
    ) -> None:
        # The number of pairs is a matter of the data, and may differ from the one held.
        pairs = state_dict.get(f"{prefix}undetermined")
        self.undetermined = None if pairs is None else pairs.detach().clone().to(self.loc.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **keywords)

    def _parameters64(self) -> tuple[Tensor, Tensor, Tensor]:
        # W, mu, and the standard deviations of the noise, (D,).
        scale = self.noise_scale.double().expand(self.data_dim)
        return self.loadings.double(), self.loc.double(), scale

    def _returned(self, values: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
        # In the model's dtype, or another. Inside a program nothing depends on values.
        dtype = dtype or self.loc.dtype
        converted = values.to(dtype)
        if am_i_wrapped() or bool((finite := converted.isfinite()).all()):
            return converted
        size = values.detach().abs().nan_to_num(torch.inf).max()
        fits = "float64" if dtype == torch.float64 or not bool(size.isfinite()) else str(dtype)
        more = "" if fits == "float64" else "convert the model by .double(), or "
        raise FloatingPointError(
            f"{name}: {int((~finite).sum())} of {finite.numel()} numbers overflow "
            f"{fits.removeprefix('torch.')} (the largest is {float(size):.3g} in size; at most "
            f"{torch.finfo(dtype).max:.3g} can be held); {more}{WAY_OUT}"
        )

    def marginal(self) -> dist.LowRankMultivariateNormal:
        """p(x), event shape (D,), with its parameters in float64.

        Its ``log_prob`` subtracts large numbers where the noise is small beside the loadings;
        :meth:`log_likelihood` does not.
        """
        loadings, loc, scale = self._parameters64()
        return dist.LowRankMultivariateNormal(loc, loadings, scale.square())

    def covariance(self) -> Float[Tensor, "D D"]:
        """W W' + Psi, the covariance of x.

        Raises:
            FloatingPointError: if it overflows.
        """
        loadings, _, scale = self._parameters64()
        return self._returned(loadings @ loadings.mT + scale.square().diag(), "the covariance")

    def posterior(
        self, x: ArrayLike, *, mask: Bool[Tensor, "N D"] | ArrayLike | None = None
    ) -> dist.MultivariateNormal:
        """p(z | x), exact: batch shape (N,), event shape (K,).

        Args:
            x: (N, D); NaN is a missing value.
            mask: True where observed.

        Raises:
            ValueError: if x has another width, or a row with nothing observed.
            FloatingPointError: if the loadings are too large beside the noise for float64.
        """
        found = list(self._solve(x, mask))
        tril = torch.cat([solution.patterns.spread(solution.tril) for solution in found])
        mean = self._returned(torch.cat([s.mean for s in found]), "the posterior means of z")
        return dist.MultivariateNormal(mean, scale_tril=tril.to(mean.dtype))

    def posterior_mean(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Tensor:
        """E[z | x], (N, K), without the covariances that :meth:`posterior` holds of all rows.

        Args, raises: as :meth:`posterior`.
        """
        return self._returned(self._means(x, mask), "the posterior means of z")

    def _means(self, x: ArrayLike, mask: ArrayLike | None) -> Tensor:
        return torch.cat([solution.mean for solution in self._solve(x, mask)])

    def log_likelihood(
        self, x: ArrayLike, *, mask: Bool[Tensor, "N D"] | ArrayLike | None = None
    ) -> Float[Tensor, " N"]:
        """log p of what was observed of each row, exact, in nats per datum.

        By Woodbury: O(D K) per row, and O(D K^2) for each pattern of missing values.

        Args, raises: as :meth:`posterior`.
        """
        found = torch.cat([solution.log_likelihood() for solution in self._solve(x, mask)])
        return self._returned(found, "log p(x)")

    def _observed(self, x: ArrayLike, mask: ArrayLike | None) -> tuple[Tensor, Tensor | None]:
        # x in float64, zero where missing, and what was observed; None if nothing is missing.
        inside = am_i_wrapped()  # inside a program the data were checked at its boundary
        rows = as_rows(x if inside else as_matrix(x), self.loc.detach().double(), self.data_dim)
        seen = mask if inside else observed_mask(rows, mask)
        if seen is None:
            return rows, None
        if not inside:
            check_rows_observed(seen)
        return torch.where(seen, rows, 0.0), seen

    def _solve(self, x: ArrayLike, mask: ArrayLike | None = None) -> Iterator[LatentPosterior]:
        # All rows at once if they are complete, and piece by piece if not.
        x, seen = self._observed(x, mask)
        loc = self.loc.detach().double()
        if seen is None:
            yield self._solution(x, MissingnessPatterns.complete(loc))
            return
        patterns = MissingnessPatterns.each if am_i_wrapped() else MissingnessPatterns.shared
        size = rows_per_block(4 * self.data_dim + 4 * self.latent_dim**2)
        for rows, cells in zip(x.split(size), seen.split(size), strict=True):
            yield self._solution(rows, patterns(cells, loc))

    def _solution(self, x: Tensor, patterns: MissingnessPatterns) -> LatentPosterior:
        loadings, loc, scale = self._parameters64()
        try:
            return LatentPosterior.with_scale(
                x, patterns, loadings, loc, scale, look=not am_i_wrapped()
            )
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            ratio, least = (loadings / scale[:, None]).detach().abs().max(), scale.detach().min()
            raise FloatingPointError(
                f"the loadings are too large beside the noise for float64: their ratio reaches "
                f"{float(ratio):.3g} (the smallest noise scale is {float(least):.3g}), and from "
                "about 1e16 on the noise is smaller than the rounding of x; raise noise_scale"
            ) from error

    @torch.no_grad()
    def impute(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        num_samples: int = 0,
        seed: int | None = None,
    ) -> Imputation:
        """The missing values of x, given what was observed in their rows.

        Observed cells are untouched. Standard deviations and draws take the fitted parameters as
        known: with few rows, intervals made of them are too narrow (:class:`Imputation` has
        numbers). Cells that rest on a covariance which the data of the fit did not determine
        (``undetermined``) have a mean, which is as arbitrary as that covariance, and NaN for a
        standard deviation and in draws.

        Args:
            x: (N, D); NaN is a missing value.
            mask: True where observed.
            num_samples: how many draws to make of each row's missing values, jointly.
            seed: of these.

        Returns:
            In the model's dtype, or x's own if that is finer.

        Raises:
            ValueError: as :meth:`posterior`; if num_samples is no whole number >= 0.
            FloatingPointError: if something overflows.
        """
        x, num_samples = as_matrix(x), check_int("num_samples", num_samples, 0)
        kept = x.to(device=self.loc.device, dtype=torch.promote_types(x.dtype, self.loc.dtype))
        seen = self._observed(x, mask)[1]
        if seen is None:
            draws = kept.expand(num_samples, -1, -1) if num_samples else None
            return Imputation(kept, torch.zeros_like(kept), draws)
        with seeded(seed):
            size = rows_per_block(self.data_dim * (4 + self.latent_dim + 2 * num_samples))
            pieces = zip(kept.split(size), seen.split(size), strict=True)
            found = [self._fill(rows, cells, num_samples) for rows, cells in pieces]
        mean, sd, draws = zip(*found, strict=True)
        return self._marked(seen, torch.cat(mean), torch.cat(sd), torch.cat(draws, 1))

    def _fill(self, kept: Tensor, seen: Tensor, num_samples: int) -> tuple[Tensor, ...]:
        # Mean, standard deviation and draws of some rows.
        rows = torch.where(seen, kept, 0.0).double()
        loadings, loc, _ = self._parameters64()
        solution = self._solution(rows, MissingnessPatterns.shared(seen, loc))
        mean, sd, draws = (
            self._returned(values, "what was imputed", kept.dtype)
            for values in solution.predict(loadings, loc, num_samples)
        )
        mean, draws = (torch.where(seen, kept, filled) for filled in (mean, draws))
        return mean, torch.where(seen, 0.0, sd), draws

    def _marked(self, seen: Tensor, mean: Tensor, sd: Tensor, draws: Tensor) -> Imputation:
        unknown, notes = undetermined_cells(seen, self.undetermined), ()
        if bool(unknown.any()):
            sd, draws = (values.masked_fill(unknown, torch.nan) for values in (sd, draws))
            notes = described(self.undetermined, self.latent_dim)
        return Imputation(mean, sd, draws if len(draws) else None, notes=notes)

    @torch.no_grad()
    def sample(self, num_samples: int, *, seed: int | None = None) -> Float[Tensor, "S D"]:
        """Draws from p(x).

        Raises:
            ValueError: if num_samples is no whole number >= 1.
            FloatingPointError: if they overflow.
        """
        shape = check_int("num_samples", num_samples), sum(self.loadings.shape)
        loadings, loc, scale = self._parameters64()
        with seeded(seed):
            draws = torch.randn(shape, dtype=loc.dtype, device=loc.device)
        z, noise = draws.split(loadings.shape[::-1], 1)
        return self._returned(z @ loadings.mT + loc + noise * scale, "samples of x")

    def reconstruct(
        self, x: ArrayLike, *, mask: ArrayLike | None = None, shrink: bool = True
    ) -> Float[Tensor, "N D"]:
        """W m + mu with m the posterior mean, where values are missing too.

        ``shrink=False`` is PCA's rank-K projection (with diagonal noise, the weighted one:
        m = (W' Psi^-1 W)^-1 W' Psi^-1 (x - mu), Bartlett's scores); it needs complete rows.

        Raises:
            ValueError: as :meth:`posterior`; if something is missing and ``shrink=False``.
            FloatingPointError: if something overflows.
        """
        loadings, loc, scale = self._parameters64()
        if shrink:
            return self._returned(self._means(x, mask) @ loadings.mT + loc, "reconstructions")
        x, seen = self._observed(x, mask)
        if seen is not None:
            raise ValueError(
                f"x has {int((~seen).sum())} missing entries, and a projection needs complete "
                "rows; shrink=True takes missing values, and impute(x) fills them"
            )
        axes = torch.linalg.qr(loadings / scale[:, None]).Q
        found = ((x - loc) / scale) @ axes @ axes.mT * scale + loc
        return self._returned(found, "reconstructions")

    @torch.no_grad()
    def canonical(self) -> Self:
        """A copy whose columns stand on the principal axes, longest first.

        W is only determined up to a rotation W R; with Psi^-1/2 W = U s V' this is W V, which is
        Psi^1/2 U s, each column's largest entry positive. The marginal is the same.
        """
        loadings, _, scale = self._parameters64()
        turned = loadings @ principal_axes(loadings / scale[:, None])
        largest = turned.abs().argmax(0, keepdim=True)
        turned = turned * turned.gather(0, largest).sign()
        copied = copy.deepcopy(self)
        copied.loadings.copy_(self._returned(turned, "the canonical loadings"))
        return copied
