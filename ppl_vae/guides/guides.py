"""What is approximated: Gaussian guides q(z | x), exact, one per datum, or amortized by an
encoder.

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

from ppl_vae.core.config import configurable
from ppl_vae.core.program import Density, Program, as_rows, data_plate, filter_kwargs
from ppl_vae.core.state import validation_enabled
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.guides.families import (
    COVARIANCES,
    FAMILIES,
    gaussian,
    kl_projection,
    num_scale_outputs,
)
from ppl_vae.networks.patches import HiddenPatches

MISSING = ("zeros", "zeros+mask")


def num_encoder_inputs(missing: str, data_dim: int) -> int:
    """How many columns an encoder gets that sees missing values in this way."""
    check_option("missing", missing, MISSING)
    return {"zeros": data_dim, "zeros+mask": 2 * data_dim}[missing]


class GaussianGuide(Program):
    """Abstract: a guide whose one site ``"z"`` is a Gaussian or point; its call is the program."""

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
        """The guide as a Pyro program: samples ``"z"`` in the plate ``"data"``."""
        with data_plate(len(x), index=index, num_data=num_data, device=_device(x)):
            return pyro.sample("z", self.distribution(x, index, mask))


def _device(x: Any) -> torch.device | None:
    return x.device if isinstance(x, Tensor) else None


class ExactGuide(GaussianGuide):
    """The posterior of a model that knows it, or its best restriction to a Gaussian family.

    q(z | x) = argmin KL(q || p(z | x)) over the family; for ``"full"``, p(z | x) itself. It has
    no parameters of its own: fitted by SVI, it trains the model's.

    Args:
        model: an object with ``posterior(x)``, a Gaussian with a ``precision_matrix``; for data
            with missing values, with ``posterior(x, mask=mask)``.
        covariance: the family, see :mod:`ppl_vae.guides.families`.
    """

    @configurable
    def __init__(self, model: Any, *, covariance: str = "full") -> None:
        super().__init__()
        if not hasattr(model, "posterior"):
            raise TypeError(
                f"model must have a method 'posterior'; {type(model).__name__} has none"
            )
        # In a tuple: as a submodule the model would be renamed, and would not train with its own.
        self._held = (model,)
        self.covariance = check_option("covariance", covariance, COVARIANCES)
        self.latent_dim = getattr(model, "latent_dim", 0)

    def distribution(
        self, x: ArrayLike, index: Tensor | None = None, mask: Tensor | None = None
    ) -> Density:
        """q(z | x), from the model's posterior given what was observed.

        Raises:
            ValueError: if there is a mask, and the model's ``posterior`` takes none.
        """
        (model,) = self._held
        holes = filter_kwargs(model.posterior, {"mask": mask})
        if mask is not None and not holes:
            raise ValueError(
                f"x has missing entries, and the posterior of {type(model).__name__} takes no "
                "keyword 'mask'; use AmortizedGuide or PerDatumGuide, whose model scores the "
                "observed cells"
            )
        if isinstance(model, PyroModule):
            posterior = pyro_method(lambda module: module.posterior(x, **holes))(model)
        else:
            posterior = model.posterior(x, **holes)
        return kl_projection(posterior, self.covariance)


class PerDatumGuide(GaussianGuide):
    """One free q_i per datum, looked up by ``index``: variational inference before amortization.

    Args:
        num_data: N, the rows of the data it is for.
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
            self.raw = nn.Parameter(torch.zeros(num_data, width))
        else:
            self.register_buffer("raw", torch.zeros(num_data, 0))

    def tables(self) -> list[nn.Parameter]:
        """The parameters with a row a datum, of which a minibatch may move its own rows only."""
        return list(self.parameters())

    def forward(self, x: ArrayLike, *, num_data: int | None = None, **keywords: Any) -> Tensor:
        """The guide as a Pyro program.

        Raises:
            ValueError: if x is not (part of) the data that the guide is for.
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
        """q_i for the rows ``index``; without it, for all N. What x and mask hold is not read.

        Raises:
            ValueError: if index is missing for fewer than N rows.
            IndexError: if index is out of range.
        """
        if index is None:
            if len(x) != self.num_data:
                raise ValueError(
                    f"x has {len(x)} rows, this PerDatumGuide one q per datum for "
                    f"{self.num_data}; give index=, the rows of the data that x holds "
                    "(for new data use an AmortizedGuide)"
                )
            return gaussian(self.loc, self.raw, self.covariance)
        if validation_enabled() and index.device.type == "cpu" and len(index):
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= self.num_data:
                raise IndexError(
                    f"index must lie in 0..{self.num_data - 1}; it goes from {low} to {high}"
                )
        return gaussian(self.loc[index], self.raw[index], self.covariance)


class AmortizedGuide(GaussianGuide):
    """q(z | x) read off a network: one set of weights for all data, new ones included.

    Args:
        encoder: a network on rows of x, (rows, D), or with ``missing="zeros+mask"`` (rows, 2D).
            It returns (rows, K + R), the mean followed by R numbers for the covariance
            (:func:`num_scale_outputs`), so (rows, 2K) for ``"diagonal"``; or a pair (loc,
            scale): standard deviations, or ``scale_tril`` for ``"full"``.
        latent_dim: K.
        covariance: the family, see :mod:`ppl_vae.guides.families`.
        homoscedastic: one learned covariance for all data, as the exact posterior of a linear
            model has; the encoder then returns means alone, (rows, K).
        missing: what the encoder sees of a missing value: ``"zeros"``, a zero; ``"zeros+mask"``, a
            zero, and right of the D columns of x the mask as D more, 1 where observed (all ones
            for complete rows), so that a missing value is not taken for a zero.
        inputs: what an encoder is given in place of x, in training or not, such as
            :class:`~ppl_vae.models.standardization.Standardization`: a map of rows, (rows, D), to
            the same shape; missing values are zero after it. By default x itself.
        corruption: what is done to x before the encoder sees it, in training alone, e.g.
            :class:`~ppl_vae.GaussianNoise`: a callable of the rows with zeros in place of missing
            values, which stay zeros. The model scores x itself.
        patch_mask: patches of x that the encoder does not see, in training or not: it takes them
            for missing values, and the model scores nothing else. An encoder that names a keyword
            ``num_seen`` is told how many patches are left.

    References:
        Nazabal, Olmos, Ghahramani, Valera: Handling incomplete heterogeneous data using VAEs
        (2020), of zeros; Collier, Nazabal, Williams: VAEs in the presence of missing data (2020),
        of the mask beside them; Vincent et al.: Stacked denoising autoencoders (2010); He et al.:
        Masked autoencoders are scalable vision learners (2022), of hidden patches.
    """

    @configurable
    def __init__(
        self,
        encoder: Callable[..., Any],
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
        self.missing = check_option("missing", missing, MISSING)
        self.encoder = encoder
        self.inputs = inputs
        self.corruption = corruption
        self.patch_mask = patch_mask
        width = num_scale_outputs(covariance, latent_dim)
        self.raw = nn.Parameter(torch.zeros(width)) if homoscedastic and width else None
        self._encoder_width = latent_dim + (0 if homoscedastic else width)

    def forward(
        self,
        x: ArrayLike,
        *,
        mask: Tensor | None = None,
        index: Int[Tensor, " B"] | None = None,
        num_data: int | None = None,
        **_: Any,
    ) -> Tensor:
        """The guide as a Pyro program: samples ``"hidden"``, if it hides patches, and ``"z"``."""
        if self.patch_mask is None:
            return super().forward(x, mask=mask, index=index, num_data=num_data)
        x = as_rows(x, self._like(x), self.patch_mask.data_dim)
        with data_plate(len(x), index=index, num_data=num_data, device=x.device):
            hidden = pyro.sample("hidden", self.patch_mask.subsets(x))
            seen = ~self.patch_mask.cells(hidden.bool())
            seen = seen if mask is None else seen & mask
            told = filter_kwargs(self.encoder, {"num_seen": self.patch_mask.num_seen})
            return pyro.sample("z", self._read(x.expand_as(seen), seen, **told))

    @contextmanager
    def disable_patch_masking(self) -> Iterator[None]:
        """Nothing is hidden in runs inside, and the model scores all that was observed."""
        before, self.patch_mask = self.patch_mask, None
        try:
            yield
        finally:
            self.patch_mask = before

    def distribution(
        self, x: ArrayLike, index: Tensor | None = None, mask: Tensor | None = None
    ) -> Density:
        """q(z | x) for rows x; what stands where the mask is False is not read.

        Nothing else is hidden: that is for the program to do.

        Raises:
            ValueError: if the encoder's output has the wrong width; if x has NaN where the mask
                does not say so (looked for only where Pyro validates).
        """
        return self._read(as_rows(x, self._like(x)), mask)

    def _read(
        self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B D"] | None, **told: Any
    ) -> Density:
        seen = self._seen(x, mask)
        rows = seen.reshape(-1, seen.shape[-1])
        try:
            out = self.encoder(rows, **told)
        except RuntimeError as error:
            error.add_note(f"The encoder got {tuple(rows.shape)}, with missing={self.missing!r}.")
            raise
        if isinstance(out, tuple | list):
            return self._from_pair(x.shape[:-1], *out)
        self._check_width(out, self._encoder_width)
        out = out.reshape(*x.shape[:-1], -1)
        loc, raw = out[..., : self.latent_dim], out[..., self.latent_dim :]
        if self.raw is not None:
            raw = self.raw.expand(*loc.shape[:-1], -1)
        return gaussian(loc, raw, self.covariance)

    def _seen(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            x = torch.where(mask, x, 0.0)
        if validation_enabled() and (count := int(x.isnan().sum())):
            raise ValueError(
                f"x has {count} entries that are NaN and that no mask tells the guide of; call it "
                "with mask=~x.isnan(), as everything does that takes x and a pair"
            )
        if self.corruption is not None and self.training:
            x = self._mapped("corruption", self.corruption, x, mask)
        if self.inputs is not None:
            x = self._mapped("inputs", self.inputs, x, mask)
        if self.missing == "zeros":
            return x
        return torch.cat([x, torch.ones_like(x) if mask is None else mask.to(x)], -1)

    def _mapped(
        self, name: str, change: Callable[[Tensor], Tensor], x: Tensor, mask: Tensor | None
    ) -> Tensor:
        changed = change(x)
        if changed.shape != x.shape:
            raise ValueError(
                f"{name} must keep the shape of x, {tuple(x.shape)}; it returned "
                f"{tuple(changed.shape)}"
            )
        return changed if mask is None else torch.where(mask, changed, 0.0)

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
