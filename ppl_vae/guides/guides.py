"""Gaussian guides q(z | x): exact, with free parameters per datum, or amortized by an encoder.

The family is an argument, see :mod:`ppl_vae.guides.families`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from ppl_vae.core.arrays.inputs import as_rows
from ppl_vae.core.config import configurable
from ppl_vae.core.introspection import filter_kwargs
from ppl_vae.core.program import Density, Program, data_plate
from ppl_vae.core.state import validation_enabled
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int, check_option
from ppl_vae.guides.families import (
    COVARIANCES,
    FAMILIES,
    gaussian,
    kl_projection,
    num_scale_outputs,
)
from ppl_vae.networks.mlp_conv import Network
from ppl_vae.networks.patches import HiddenPatches

MISSING_ENCODINGS = ("zeros", "zeros+mask")
"""How missing values are presented to an encoder."""


def num_encoder_inputs(missing: str, data_dim: int) -> int:
    """Number of columns of an encoder's input, given how it is presented missing values."""
    check_option("missing", missing, MISSING_ENCODINGS)
    return {"zeros": data_dim, "zeros+mask": 2 * data_dim}[missing]


class GaussianGuide(Program):
    """Abstract: a guide with a single site ``"z"``, a Gaussian or a point mass."""

    latent_dim: int

    @abstractmethod
    def distribution(
        self, x: ArrayLike, index: Tensor | None = None, mask: Tensor | None = None
    ) -> Density:
        """q(z | x) for rows x, batch shape (rows,), event shape (K,)."""

    def forward(
        self,
        x: ArrayLike,
        *,
        mask: Tensor | None = None,
        index: Int[Tensor, " B"] | None = None,
        num_data: int | None = None,
        **_: Any,
    ) -> Tensor:
        """The guide as a Pyro program: sample ``"z"`` in the plate ``"data"``."""
        x = x if isinstance(x, Tensor) else as_matrix(x, schema=self.schema)
        with data_plate(len(x), index=index, num_data=num_data, device=x.device):
            return pyro.sample("z", self._sampling_distribution(x, index, mask))

    def _sampling_distribution(
        self, x: ArrayLike, index: Tensor | None, mask: Tensor | None
    ) -> Density:
        """The distribution of ``"z"`` in the program; a subclass may sample other sites here."""
        return self.distribution(x, index, mask)


class ExactGuide(GaussianGuide):
    """The exact Gaussian posterior of a model, or its KL projection onto a Gaussian family.

    q(z | x) = argmin KL(q || p(z | x)) over the family; for ``"full"``, p(z | x) itself. It has no
    parameters: SVI with it trains those of the model.

    Args:
        model: an object whose ``posterior(x)`` is a Gaussian with a ``precision_matrix``; for data
            with missing values, ``posterior(x, mask=mask)``.
        covariance: the family, see :mod:`ppl_vae.guides.families`.
    """

    @configurable
    def __init__(self, model: Any, *, covariance: str = "full") -> None:
        super().__init__()
        if not hasattr(model, "posterior"):
            raise TypeError(
                f"model must have a method 'posterior'; {type(model).__name__} has none"
            )
        # A tuple holds it: Pyro would rename the parameters of a submodule, and train copies.
        self._held = (model,)
        self.covariance = check_option("covariance", covariance, COVARIANCES)
        self.latent_dim = getattr(model, "latent_dim", 0)

    def distribution(
        self, x: ArrayLike, index: Tensor | None = None, mask: Tensor | None = None
    ) -> Density:
        """q(z | x), from the model's posterior given the observed entries.

        Raises:
            ValueError: if there is a mask, and the model's ``posterior`` takes none.
        """
        (model,) = self._held
        keywords = filter_kwargs(model.posterior, {"mask": mask})
        if mask is not None and not keywords:
            raise ValueError(
                f"x has missing entries, and the posterior of {type(model).__name__} takes no "
                "keyword 'mask'; use AmortizedGuide or PerDatumGuide, whose model scores the "
                "observed entries"
            )
        if isinstance(model, PyroModule):
            posterior = pyro_method(lambda module: module.posterior(x, **keywords))(model)
        else:
            posterior = model.posterior(x, **keywords)
        return kl_projection(posterior, self.covariance)


class PerDatumGuide(GaussianGuide):
    """Free parameters of q_i for each datum, looked up by ``index``; not amortized.

    Args:
        num_data: N, number of rows of the data.
        latent_dim: K.
        covariance: the family, see :mod:`ppl_vae.guides.families`.
    """

    @configurable
    def __init__(self, num_data: int, latent_dim: int, *, covariance: str = "diagonal") -> None:
        super().__init__()
        self.num_data = check_int("num_data", num_data)
        self.latent_dim = check_int("latent_dim", latent_dim)
        self.covariance = check_option("covariance", covariance, FAMILIES)
        self.loc = nn.Parameter(torch.zeros(num_data, latent_dim))
        width = num_scale_outputs(covariance, latent_dim)
        if width:
            self.unconstrained_scale = nn.Parameter(torch.zeros(num_data, width))
        else:
            self.register_buffer("unconstrained_scale", torch.zeros(num_data, 0))

    def tables(self) -> list[nn.Parameter]:
        """The parameters with one row per datum; a minibatch may update its own rows only."""
        return list(self.parameters())

    def forward(self, x: ArrayLike, *, num_data: int | None = None, **keywords: Any) -> Tensor:
        """The guide as a Pyro program.

        Raises:
            ValueError: if ``num_data`` is not the N of the guide.
        """
        if num_data is not None and num_data != self.num_data:
            raise ValueError(
                f"num_data is {num_data}, and this PerDatumGuide has one q per datum for "
                f"{self.num_data}; for new data use an AmortizedGuide"
            )
        return super().forward(x, num_data=num_data, **keywords)

    def distribution(
        self, x: ArrayLike, index: Tensor | None = None, mask: Tensor | None = None
    ) -> Density:
        """q_i for the rows ``index``, or for all N without it; only the length of x is used.

        Raises:
            ValueError: if index is missing for fewer than N rows.
            IndexError: if index is out of range.
        """
        if index is None:
            if len(x) != self.num_data:
                raise ValueError(
                    f"x has {len(x)} rows, this PerDatumGuide one q per datum for "
                    f"{self.num_data}; give index=, the rows of x within the data "
                    "(for new data use an AmortizedGuide)"
                )
            return gaussian(self.loc, self.unconstrained_scale, self.covariance)
        if validation_enabled() and index.device.type == "cpu" and len(index):
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= self.num_data:
                raise IndexError(
                    f"index must lie in 0..{self.num_data - 1}; it ranges from {low} to {high}"
                )
        return gaussian(self.loc[index], self.unconstrained_scale[index], self.covariance)


class AmortizedGuide(GaussianGuide):
    """q(z | x) computed by a network: one set of weights for all data, including new data.

    Args:
        encoder: a network of rows of x, (rows, D), or (rows, 2D) with ``missing="zeros+mask"``.
            It returns (rows, K + R), the mean followed by the R unconstrained parameters of the
            covariance (:func:`ppl_vae.guides.families.num_scale_outputs`), so (rows, 2K) for
            ``"diagonal"``; or a pair (loc, scale): standard deviations, or ``scale_tril`` for
            ``"full"``.
        latent_dim: K.
        covariance: the family, see :mod:`ppl_vae.guides.families`.
        homoscedastic: one learned covariance for all data, as the exact posterior of a linear
            model has; the encoder then returns means only, (rows, K).
        missing: how missing values are presented to the encoder: ``"zeros"``, or ``"zeros+mask"``,
            zeros and the mask as D more columns, 1 where observed (everywhere in complete rows).
        inputs: transformation of x before the encoder, in training and evaluation, such as
            :class:`~ppl_vae.models.standardization.Standardization`: a map of rows, (rows, D), to
            the same shape; missing values are zero after it. None by default.
        corruption: corruption of x before the encoder, in training only, e.g.
            :class:`~ppl_vae.networks.GaussianNoise`: a callable of the rows with zeros in place of
            missing values, which stay zeros. The model scores x itself.
        patch_mask: patches of x that are hidden from the encoder, in training and evaluation: they
            are missing values for it, and the model scores only them. An encoder with a keyword
            ``num_visible`` is passed the number of visible patches.

    References:
        Nazabal, Olmos, Ghahramani, Valera: Handling incomplete heterogeneous data using VAEs
        (2020): zeros; Collier, Nazabal, Williams: VAEs in the presence of missing data (2020):
        zeros and the mask; Vincent et al.: Stacked denoising autoencoders (2010): corruption; He
        et al.: Masked autoencoders are scalable vision learners (2022): hidden patches.
    """

    @configurable
    def __init__(
        self,
        encoder: Network,
        latent_dim: int,
        *,
        covariance: str = "diagonal",
        homoscedastic: bool = False,
        missing: str = "zeros",
        inputs: Callable[[Tensor], Tensor] | None = None,
        corruption: Callable[[Tensor], Tensor] | None = None,
        patch_mask: HiddenPatches | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim = check_int("latent_dim", latent_dim)
        self.covariance = check_option("covariance", covariance, FAMILIES)
        self.missing = check_option("missing", missing, MISSING_ENCODINGS)
        self.encoder = encoder
        self.inputs = inputs
        self.corruption = corruption
        self.patch_mask = patch_mask
        width = num_scale_outputs(covariance, latent_dim)
        self.unconstrained_scale = (
            nn.Parameter(torch.zeros(width)) if homoscedastic and width else None
        )
        self._encoder_width = latent_dim + (0 if homoscedastic else width)

    def _sampling_distribution(
        self, x: ArrayLike, index: Tensor | None, mask: Tensor | None
    ) -> Density:
        """Sample the site ``"hidden"`` first, if there is a patch mask."""
        if self.patch_mask is None:
            return super()._sampling_distribution(x, index, mask)
        x = as_rows(x, self._like(x), self.patch_mask.data_dim, self.schema)
        hidden = pyro.sample("hidden", self.patch_mask.subsets(x))
        visible = ~self.patch_mask.to_entries(hidden.bool())
        visible = visible if mask is None else visible & mask
        keywords = filter_kwargs(self.encoder, {"num_visible": self.patch_mask.num_visible})
        return self._encode(x.expand_as(visible), visible, **keywords)

    @contextmanager
    def disable_patch_masking(self) -> Iterator[None]:
        """Context manager: hide no patches, so that the model scores all observed entries."""
        before, self.patch_mask = self.patch_mask, None
        try:
            yield
        finally:
            self.patch_mask = before

    def distribution(
        self, x: ArrayLike, index: Tensor | None = None, mask: Tensor | None = None
    ) -> Density:
        """q(z | x) for rows x; entries where the mask is False are not used.

        No patches are hidden: only the program does that.

        Raises:
            ValueError: if the encoder's output has the wrong width; if x has NaN where the mask
                is True or absent (checked only if Pyro's validation is on).
        """
        return self._encode(as_rows(x, self._like(x), schema=self.schema), mask)

    def _encode(
        self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B D"] | None, **keywords: Any
    ) -> Density:
        inputs = self._encoder_inputs(x, mask)
        rows = inputs.reshape(-1, inputs.shape[-1])
        try:
            out = self.encoder(rows, **keywords)
        except RuntimeError as error:
            error.add_note(f"The encoder got {tuple(rows.shape)}, with missing={self.missing!r}.")
            raise
        if isinstance(out, tuple | list):
            return self._from_pair(x.shape[:-1], *out)
        self._check_width(out, self._encoder_width)
        out = out.reshape(*x.shape[:-1], -1)
        loc, scale = out[..., : self.latent_dim], out[..., self.latent_dim :]
        if self.unconstrained_scale is not None:
            scale = self.unconstrained_scale.expand(*loc.shape[:-1], -1)
        return gaussian(loc, scale, self.covariance)

    def _encoder_inputs(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            x = torch.where(mask, x, 0.0)
        if validation_enabled() and (count := int(x.isnan().sum())):
            raise ValueError(
                f"x has {count} NaN entries that are not masked; call the guide with "
                "mask=~x.isnan(), as functions of a pair and x do"
            )
        if self.corruption is not None and self.training:
            x = self._transform("corruption", self.corruption, x, mask)
        if self.inputs is not None:
            x = self._transform("inputs", self.inputs, x, mask)
        if self.missing == "zeros":
            return x
        return torch.cat([x, torch.ones_like(x) if mask is None else mask.to(x)], -1)

    def _transform(
        self, name: str, transform: Callable[[Tensor], Tensor], x: Tensor, mask: Tensor | None
    ) -> Tensor:
        transformed = transform(x)
        if transformed.shape != x.shape:
            raise ValueError(
                f"{name} must keep the shape of x, {tuple(x.shape)}; it returned "
                f"{tuple(transformed.shape)}"
            )
        return transformed if mask is None else torch.where(mask, transformed, 0.0)

    def _like(self, x: Any) -> Tensor:
        parameters = self.encoder.parameters() if isinstance(self.encoder, nn.Module) else ()
        return next(iter(parameters), x if isinstance(x, Tensor) else torch.empty(0))

    def _check_width(self, out: Tensor, width: int) -> None:
        if out.dim() != 2 or out.shape[-1] != width:
            raise ValueError(
                f"the encoder must return (rows, {width}) for latent_dim={self.latent_dim} and "
                f"covariance={self.covariance!r}, or a pair (loc, scale); "
                f"it returned {tuple(out.shape)}"
            )

    def _from_pair(self, batch: torch.Size, loc: Tensor, scale: Tensor) -> Density:
        self._check_width(loc, self.latent_dim)
        full = self.covariance == "full"
        scale = scale.expand(*loc.shape, -1) if full else scale.expand(loc.shape)
        loc, scale = (part.reshape(*batch, *part.shape[1:]) for part in (loc, scale))
        if full:
            return dist.MultivariateNormal(loc, scale_tril=scale)
        return dist.Normal(loc, scale).to_event(1)
