"""What models of a code and a decoder have in common: z from a prior, x from what z decodes to."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import pyro
import torch
from jaxtyping import Bool, Float, Int
from pyro import poutine
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from ppl_vae.core.program import (
    Density,
    Program,
    ProgramLike,
    as_data_and_mask,
    as_rows,
    count_rows,
    data_plate,
    filter_kwargs,
    fold_rows,
)
from ppl_vae.core.state import dry_run, eval_mode, isolated_store, mode, seeded
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.data.row_blocks import RowBlocks, RowSource
from ppl_vae.guides.guides import AmortizedGuide
from ppl_vae.likelihoods.base import Likelihood
from ppl_vae.models.standardization import Standardization, Start
from ppl_vae.networks.mlp_conv import output_bias
from ppl_vae.networks.patches import HiddenPatches


class DecoderModel(Program):
    """Abstract: z ~ prior, x | z ~ likelihood(decoder(z)), and a guide.

    Args:
        decoder: a network from rows of z, (rows, K), to (rows, D * likelihood.outputs_per_dim).
        likelihood: what the outputs mean.
        data_dim: D.
        latent_dim: K.
        encoder: a network for an :class:`~ppl_vae.guides.guides.AmortizedGuide`; or instead of it
        guide: any guide with one site ``"z"`` of event shape (K,).
        **amortized: further arguments of the guide that is made from ``encoder``.
    """

    def __init__(
        self,
        *,
        decoder: Callable[..., Any],
        likelihood: Likelihood,
        data_dim: int,
        latent_dim: int,
        encoder: Callable[..., Any] | None,
        guide: ProgramLike | None,
        **amortized: Any,
    ) -> None:
        super().__init__()
        if (encoder is None) == (guide is None):
            raise ValueError("give exactly one of encoder and guide")
        _refuse_taken(decoder=decoder, likelihood=likelihood, encoder=encoder, guide=guide)
        self.data_dim = check_int("data_dim", data_dim)
        self.latent_dim = check_int("latent_dim", latent_dim)
        self.decoder = decoder
        self.likelihood = likelihood
        likelihood.set_data_dim(data_dim)
        if encoder is not None:
            guide = AmortizedGuide(encoder, latent_dim, **amortized)
        self.guide: Any = guide
        if isinstance(getattr(guide, "inputs", None), Standardization):
            likelihood.standardize(torch.zeros(data_dim), torch.ones(data_dim))
        _check_patch_mask(self.patch_mask, data_dim, likelihood)
        guide_dim = getattr(guide, "latent_dim", latent_dim)
        if guide_dim != latent_dim:
            raise ValueError(f"the guide has latent_dim={guide_dim}, the model {latent_dim}")
        self._config: dict[str, Any] | None = None

    @property
    def patch_mask(self) -> HiddenPatches | None:
        """The patches that the guide does not see, and that alone are scored."""
        found = getattr(self.guide, "patch_mask", None)
        return found if isinstance(found, HiddenPatches) else None

    @abstractmethod
    def prior(self) -> Density:
        """p(z), event shape (K,)."""

    def config(self) -> dict[str, Any] | None:
        """The arguments that networks of the package were made with, without the likelihood.

        None for networks that only their author can rebuild.
        """
        return self._config

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
        like = self._like()
        x = None if x is None else as_rows(x, like, self.data_dim)
        rows = count_rows(x, num_data)
        with data_plate(rows, index=index, num_data=num_data, device=like.device):
            scored = self._scored(mask, like)
            z = pyro.sample("z", self.prior())
            if mask is not None and x is not None:
                # NaN under a mask would still poison the gradient.
                x = torch.where(mask, x, 0.0)
            given = self.given(z.to(like.dtype), x, None if x is None else scored, observe)
            return pyro.sample("x", given, obs=x if observe else None)

    def _scored(self, mask: Tensor | None, like: Tensor) -> Bool[Tensor, "*B D"] | None:
        """Which observed cells p(x | z) is of: all, or those in hidden patches."""
        if self.patch_mask is None:
            return mask
        hidden = pyro.sample("hidden", self.patch_mask.subsets(like))
        cells = self.patch_mask.to_entries(hidden.bool())
        return cells if mask is None else cells & mask

    def _like(self) -> Tensor:
        return next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))

    def given(
        self,
        z: Float[Tensor, "*B K"],
        x: Float[Tensor, "N D"] | None = None,
        mask: Bool[Tensor, "*M D"] | None = None,
        observe: bool = False,
    ) -> Density:
        """p(x | z), event shape (D,), with its gradient; see :meth:`decode` for one without.

        Args:
            z: codes, of the model's dtype.
            x, mask, observe: as a likelihood takes them, see
                :class:`~ppl_vae.likelihoods.base.Likelihood`.
        """
        width = self.data_dim * self.likelihood.outputs_per_dim
        outputs = fold_rows(self.decoder, z, width, "decoder")
        return self.likelihood(outputs, x, mask, observe=observe)

    def check_data(self, x: Float[Tensor, "N D"], mask: Tensor | None = None) -> None:
        """Check that x lies in the likelihood's support.

        Raises:
            ValueError: if not.
        """
        self.likelihood.check(x, mask)

    def notes(self) -> list[str]:
        """What a person should know of the fitted model; empty if nothing."""
        return self.likelihood.notes()

    def center(self, x: RowSource, *, mask: ArrayLike | None = None) -> Self:
        """Set the decoder's output bias so that training starts about the means of x's columns.

        Where the decoder's last weights add nothing, the mean of p(x | z) is that of the column.
        A model with ``inputs="standardized"`` takes the columns' means and standard deviations
        from x besides; of others the networks still see x in the units that it has, and columns
        of very different scales need :meth:`ppl_vae.VAE.like`.

        Args:
            x: (N, D), a memory map, or an iterable of blocks of rows; NaN is a missing value.
            mask: True where observed.

        Returns:
            The model itself.

        Raises:
            TypeError: if the decoder does not end in a layer with a bias for each output.
            ValueError: if x has another width, is not in the likelihood's support, or a row or a
                column has nothing observed.
        """
        like = self._like()
        self._begin(Start.of(RowBlocks(x, mask, device=like.device), self.likelihood))
        return self

    @torch.no_grad()
    def _begin(self, start: Start) -> None:
        like, width = self._like(), len(start.columns.mean)
        if width != self.data_dim:
            raise ValueError(
                f"x must have shape (rows, {self.data_dim}) for this model; it has {width} columns"
            )
        outputs = self.data_dim * self.likelihood.outputs_per_dim
        bias = output_bias(self.decoder, outputs)
        inputs: Any = getattr(self.guide, "inputs", None)
        if isinstance(inputs, Standardization):
            scales = [start.scales(c, like.dtype) for c in (start.columns, start.inputs)]
            self.likelihood.standardize(start.columns.centre.to(like), scales[0].to(like))
            inputs.loc.copy_(start.inputs.centre)
            if not self.likelihood.bounded:
                inputs.scale.copy_(scales[1])
                inputs.constant.copy_(start.inputs.constant)
        means, half = start.means.to(like.device), start.half.to(like.device)
        bias.copy_(self.likelihood.initial_outputs(means, half))

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "*B K"]) -> Density:
        """p(x | z), event shape (D,)."""
        return self.given(z.to(self._like()))

    @torch.no_grad()
    def sample(self, num_samples: int, *, seed: int | None = None) -> Float[Tensor, "S D"]:
        """Draws from p(x): z from the prior, then x given z.

        Raises:
            ValueError: if the prior is flat.
        """
        shape = torch.Size([check_int("num_samples", num_samples)])
        with seeded(seed):
            return self.decode(self.prior().sample(shape)).sample()

    @torch.no_grad()
    def features(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Float[Tensor, "N K"]:
        """The code of each row: the mean of q(z | x), of an autoencoder f(x), in evaluation mode.

        A guide that hides patches hides none here.

        Args:
            x: (N, D); NaN marks a missing value.
            mask: True where observed.

        Raises:
            ValueError: if x has another width, or a row with nothing observed.
        """
        return self._code(*as_data_and_mask(x, mask, model=self.model, guide=self.guide))

    @torch.no_grad()
    def reconstruct(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Float[Tensor, "N D"]:
        """The mean of p(x | z) at the mean of q(z | x), in missing values too, in evaluation mode.

        (The mean of a missing value given its row is another number: :func:`ppl_vae.impute`.) A
        guide that hides patches hides none here: what it is not to see is for the mask to say.

        Args:
            x: (N, D); NaN marks a missing value.
            mask: True where observed.

        Raises:
            ValueError: if x has another width, or a row with nothing observed.
        """
        x, mask = as_data_and_mask(x, mask, model=self.model, guide=self.guide)
        with mode(self, training=False):
            return self.given(self._code(x, mask).to(x), x, mask, False).mean

    def _code(self, x: Tensor, mask: Tensor | None) -> Float[Tensor, "N K"]:
        holes = filter_kwargs(self.guide, {"mask": mask})
        with isolated_store(), dry_run(self.guide), eval_mode(self, self.guide):
            return poutine.trace(self.guide).get_trace(x, **holes).nodes["z"]["fn"].mean


def _check_patch_mask(
    patch_mask: HiddenPatches | None, data_dim: int, likelihood: Likelihood
) -> None:
    if patch_mask is None:
        return
    if patch_mask.data_dim != data_dim:
        raise ValueError(
            f"patch_mask= is for images of shape {patch_mask.image_shape}, {patch_mask.data_dim} "
            f"entries; data_dim is {data_dim}"
        )
    if not likelihood.supports_mask:
        raise ValueError(
            f"patch_mask= needs a likelihood that can score a part of x; "
            f"{type(likelihood).__name__} scores whole rows alone. Use Poisson() for counts"
        )


def _refuse_taken(**parts: Any) -> None:
    for name, part in parts.items():
        if isinstance(part, PyroModule) and "." in part._pyro_name:
            raise ValueError(
                f"{name} belongs to another model already, and would no longer train there; "
                "pass a new one, or copy.deepcopy of it"
            )
