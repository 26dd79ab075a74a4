"""Exact inference in x | z ~ N(W z + mu, Psi), z ~ N(0, I), in float64."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from ppl_vae.core.arrays.frame_labels import Frame
from ppl_vae.core.arrays.inputs import as_rows, labels_of
from ppl_vae.core.imputed import Imputation
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import (
    ArrayLike,
    as_matrix,
    check_int,
    observed_mask,
)
from ppl_vae.data.sources.row_blocks import rows_per_block
from ppl_vae.data.sources.row_sources import is_matrix, is_source, row_source
from ppl_vae.models.latent_variable_model import LatentVariableModel
from ppl_vae.models.linear.identifiability import describe_undetermined, undetermined_entries
from ppl_vae.models.linear.linear_gaussian import LatentPosterior, MissingnessPatterns
from ppl_vae.models.linear.principal_axes import principal_axes

RESCALE_ADVICE = "rescale the columns of x to values of order one"


class LinearGaussianModel(LatentVariableModel):
    """Abstract: a model with loadings W (D, K), a mean ``loc`` (D,) and a ``noise_scale``.

    All methods compute in float64 for any dtype of the parameters and of x, and return the
    parameters' dtype. A result that overflows it raises a ``FloatingPointError`` with its name.
    Gradients reach the parameters through the conversion.

    Attributes:
        undetermined: pairs of columns whose covariance the data of the last exact fit did not
            determine, (P, 2), from ``ppl_vae.models.linear.identifiability``;
            None if there are none, or if no such fit was made. Saved with the parameters.
    """

    undetermined: Tensor | None
    loadings: Tensor
    loc: Tensor
    noise_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("undetermined", None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **keywords: Any
    ) -> None:
        # The number of pairs depends on the data, and may differ from the current one.
        pairs = state_dict.get(f"{prefix}undetermined")
        self.undetermined = None if pairs is None else pairs.detach().clone().to(self.loc.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **keywords)

    def _parameters64(self) -> tuple[Tensor, Tensor, Tensor]:
        # W, mu, and the noise standard deviations, (D,), in float64.
        scale = self.noise_scale.double().expand(self.data_dim)
        return self.loadings.double(), self.loc.double(), scale

    def _to_model_dtype(
        self, values: Tensor, name: str, dtype: torch.dtype | None = None
    ) -> Tensor:
        # Converts a result, checking for overflow except inside a program, where control flow
        # must not depend on values.
        dtype = dtype or self.loc.dtype
        converted = values.to(dtype)
        if am_i_wrapped() or bool((finite := converted.isfinite()).all()):
            return converted
        size = values.detach().abs().nan_to_num(torch.inf).max()
        is_double = dtype == torch.float64 or not bool(size.isfinite())
        limit = "float64" if is_double else str(dtype).removeprefix("torch.")
        convert = "" if is_double else "convert the model by .double(), or "
        place = f", first that of row {int((~finite).nonzero()[0])}" if finite.dim() == 1 else ""
        raise FloatingPointError(
            f"{name}: {int((~finite).sum())} of {finite.numel()} numbers overflow {limit}{place} "
            f"(the largest absolute value is {float(size):.3g}; the limit is "
            f"{torch.finfo(dtype).max:.3g}); {convert}{RESCALE_ADVICE}"
        )

    def marginal(self) -> dist.LowRankMultivariateNormal:
        """p(x), event shape (D,), with its parameters in float64.

        Its ``log_prob`` subtracts large numbers if the noise is small relative to the loadings;
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
        return self._to_model_dtype(
            loadings @ loadings.mT + scale.square().diag(), "the covariance"
        )

    def posterior(
        self, x: ArrayLike, *, mask: Bool[Tensor, "N D"] | ArrayLike | None = None
    ) -> dist.MultivariateNormal:
        """p(z | x), exact: batch shape (N,), event shape (K,).

        A row with nothing observed has the prior as its posterior.

        Args:
            x: (N, D), data of any kind, those read in blocks
                (:func:`~ppl_vae.data.sources.row_sources.row_source`) included; NaN is a missing
                value.
            mask: True where observed.

        Raises:
            ValueError: if x has another width.
            FloatingPointError: if the loadings are too large relative to the noise for float64.
        """
        blocks = list(self._posteriors(x, mask))
        tril = torch.cat([block.patterns.gather_rows(block.covariances.tril) for block in blocks])
        mean = torch.cat([block.mean for block in blocks])
        mean = self._to_model_dtype(mean, "the posterior means of z")
        return dist.MultivariateNormal(mean, scale_tril=tril.to(mean.dtype))

    def posterior_mean(
        self, x: ArrayLike, *, mask: ArrayLike | None = None
    ) -> Float[Tensor, "N K"] | Frame:
        """E[z | x], (N, K), without storing the covariances of all rows as :meth:`posterior` does.

        Of a data frame it is a frame with the columns z1, ..., zK.

        Args, raises: as :meth:`posterior`.
        """
        means = self._to_model_dtype(self._means(x, mask), "the posterior means of z")
        return labels_of(x).codes(means)

    def _means(self, x: ArrayLike, mask: ArrayLike | None) -> Tensor:
        return torch.cat([block.mean for block in self._posteriors(x, mask)])

    def log_likelihood(
        self, x: ArrayLike, *, mask: Bool[Tensor, "N D"] | ArrayLike | None = None
    ) -> Float[Tensor, " N"] | Frame:
        """The exact log-likelihood of the observed entries of each row, in nats per datum.

        Of a data frame it is a series with its index. For a row with nothing observed it is 0,
        the logarithm of the probability of no event, which is no number to average with others.
        By the Woodbury identity it costs O(D K) per row and O(D K^2) per missingness pattern.

        Args, raises: as :meth:`posterior`.
        """
        values = torch.cat([block.log_likelihood() for block in self._posteriors(x, mask)])
        return labels_of(x).rows(self._to_model_dtype(values, "log p(x)"), "log_likelihood")

    def _observed(self, x: ArrayLike, mask: ArrayLike | None) -> tuple[Tensor, Tensor | None]:
        # x in float64 with zeros for missing entries, and its mask; None if nothing is missing.
        inside = am_i_wrapped()  # inside a program the data were checked at its boundary
        x = x if inside else as_matrix(x, mask=mask, schema=self.schema)
        rows = as_rows(x, self.loc.detach().double(), self.data_dim)
        observed = mask if inside else observed_mask(rows)
        if observed is None:
            return rows, None
        return torch.where(observed, rows, 0.0), observed

    def _posteriors(
        self, x: ArrayLike, mask: ArrayLike | None = None
    ) -> Iterator[LatentPosterior]:
        # Complete rows in memory all at once, others block by block.
        in_memory = am_i_wrapped() or (is_matrix(x) and not is_source(x))
        source = None if in_memory else row_source(x, mask, schema=self.schema)
        if source is not None:
            for low, high in source.blocks(size=rows_per_block(3 * source.width)):
                yield from self._posteriors(source.read(low, high))
                source.release()
            return
        x, observed = self._observed(x, mask)
        loc = self.loc.detach().double()
        if observed is None:
            yield self._latent_posterior(x, MissingnessPatterns.complete(loc))
            return
        patterns = MissingnessPatterns.each if am_i_wrapped() else MissingnessPatterns.distinct
        size = rows_per_block(4 * self.data_dim + 4 * self.latent_dim**2)
        for rows, block_mask in zip(x.split(size), observed.split(size), strict=True):
            yield self._latent_posterior(rows, patterns(block_mask, loc))

    def _latent_posterior(self, x: Tensor, patterns: MissingnessPatterns) -> LatentPosterior:
        loadings, loc, scale = self._parameters64()
        try:
            return LatentPosterior.with_scale(
                x, patterns, loadings, loc, scale, check_precision=not am_i_wrapped()
            )
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            ratio, least = (loadings / scale[:, None]).detach().abs().max(), scale.detach().min()
            raise FloatingPointError(
                f"the loadings are too large relative to the noise for float64: their ratio "
                f"reaches {float(ratio):.3g} (the smallest noise scale is {float(least):.3g}), "
                "and above about 1e16 the noise is smaller than the rounding error of x; raise "
                "noise_scale"
            ) from error

    @torch.no_grad()
    def impute(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        draws: int = 0,
        seed: int | None = None,
    ) -> Imputation:
        """The missing values of x, given the observed entries of their rows.

        Observed entries are unchanged. A row with nothing observed gets the mean of x and its
        standard deviation. Standard deviations and draws treat the fitted parameters
        as known, so that with few rows intervals based on them are too narrow
        (:class:`ppl_vae.core.Imputation` quantifies this). Entries that depend on a covariance
        which the training data did not determine (``undetermined``) have a mean, which is as
        arbitrary as that covariance, and NaN as their standard deviation and in draws.

        Args:
            x: (N, D); NaN is a missing value.
            mask: True where observed.
            draws: the number of joint draws of each row's missing values.
            seed: the seed of these draws.

        Returns:
            Means, standard deviations and draws, in the more precise of the model's dtype and x's.

        Raises:
            ValueError: as :meth:`posterior`; if ``draws`` is not a whole number >= 0.
            FloatingPointError: if a result overflows.
        """
        labels, num_draws = labels_of(x, self), check_int("draws", draws, 0)
        x = as_matrix(x, mask=mask, schema=self.schema)
        x = x.to(device=self.loc.device, dtype=torch.promote_types(x.dtype, self.loc.dtype))
        observed = self._observed(x, None)[1]
        if observed is None:
            copies = x.expand(num_draws, -1, -1) if num_draws else None
            return Imputation(x, torch.zeros_like(x), copies, labels=labels)
        with seeded(seed):
            size = rows_per_block(self.data_dim * (4 + self.latent_dim + 2 * num_draws))
            blocks = zip(x.split(size), observed.split(size), strict=True)
            imputed = [self._impute_block(rows, mask, num_draws) for rows, mask in blocks]
        mean, sd, drawn = zip(*imputed, strict=True)
        found = self._imputation(observed, torch.cat(mean), torch.cat(sd), torch.cat(drawn, 1))
        return replace(found, labels=labels)

    def _impute_block(self, x: Tensor, observed: Tensor, num_samples: int) -> tuple[Tensor, ...]:
        # Mean, standard deviation and draws of some rows.
        rows = torch.where(observed, x, 0.0).double()
        loadings, loc, _ = self._parameters64()
        posterior = self._latent_posterior(rows, MissingnessPatterns.distinct(observed, loc))
        mean, sd, draws = (
            self._to_model_dtype(values, "imputed values", x.dtype)
            for values in posterior.predict(loadings, loc, num_samples)
        )
        mean, draws = (torch.where(observed, x, values) for values in (mean, draws))
        return mean, torch.where(observed, 0.0, sd), draws

    def _imputation(self, observed: Tensor, mean: Tensor, sd: Tensor, draws: Tensor) -> Imputation:
        unknown, notes = undetermined_entries(observed, self.undetermined), ()
        if bool(unknown.any()):
            sd, draws = (values.masked_fill(unknown, torch.nan) for values in (sd, draws))
            notes = describe_undetermined(self.undetermined, self.latent_dim)
        return Imputation(mean, sd, draws if len(draws) else None, notes=notes)

    @torch.no_grad()
    def sample(self, num_samples: int, *, seed: int | None = None) -> Float[Tensor, "S D"] | Frame:
        """Draws from p(x); of a model that was fitted to a data frame, as such a frame.

        Raises:
            ValueError: if num_samples is not a whole number >= 1.
            FloatingPointError: if a draw overflows.
        """
        shape = check_int("num_samples", num_samples), sum(self.loadings.shape)
        loadings, loc, scale = self._parameters64()
        with seeded(seed):
            draws = torch.randn(shape, dtype=loc.dtype, device=loc.device)
        z, noise = draws.split(loadings.shape[::-1], 1)
        draws = self._to_model_dtype(z @ loadings.mT + loc + noise * scale, "samples of x")
        return draws if self.schema is None else self.schema.frame(draws)

    def reconstruct(
        self, x: ArrayLike, *, mask: ArrayLike | None = None, shrink: bool = True
    ) -> Float[Tensor, "N D"] | Frame:
        """W m + mu with m the posterior mean of z; missing entries are reconstructed too.

        Of a data frame it is a frame with its index and columns.

        ``shrink=False`` is PCA's rank-K projection (with diagonal noise, the weighted one:
        m = (W' Psi^-1 W)^-1 W' Psi^-1 (x - mu), Bartlett's scores); it needs complete rows.

        Raises:
            ValueError: as :meth:`posterior`; if an entry is missing and ``shrink=False``.
            FloatingPointError: if a result overflows.
        """
        labels, (loadings, loc, scale) = labels_of(x, self), self._parameters64()
        if shrink:
            means = self._means(x, mask) @ loadings.mT + loc
            return labels.data(self._to_model_dtype(means, "reconstructions"))
        x, observed = self._observed(x, mask)
        if observed is not None:
            raise ValueError(
                f"x has {int((~observed).sum())} missing entries, and a projection needs complete "
                "rows; shrink=True takes missing values, and impute(x) fills them"
            )
        axes = torch.linalg.qr(loadings / scale[:, None]).Q
        projected = ((x - loc) / scale) @ axes @ axes.mT * scale + loc
        return labels.data(self._to_model_dtype(projected, "reconstructions"))

    @torch.no_grad()
    def canonical(self) -> Self:
        """A copy whose loadings are orthogonal and sorted by length, as principal axes are.

        W is only determined up to a rotation W R. With the singular value decomposition
        Psi^-1/2 W = U s V', this is W V = Psi^1/2 U s, with the largest entry of each column
        positive. The marginal is the same.
        """
        loadings, _, scale = self._parameters64()
        rotated = loadings @ principal_axes(loadings / scale[:, None])
        largest = rotated.abs().argmax(0, keepdim=True)
        rotated = rotated * rotated.gather(0, largest).sign()
        model = copy.deepcopy(self)
        model.loadings.copy_(self._to_model_dtype(rotated, "the canonical loadings"))
        return model
