"""Models with a decoder network: z from a prior, and x from the density that z decodes to."""

from collections.abc import Callable
from typing import Any, Self

import pyro
import torch
from jaxtyping import Bool, Float
from pyro.nn import PyroModule
from torch import Tensor

from ppl_vae.core.arrays.frame_labels import Frame
from ppl_vae.core.arrays.inputs import as_data_and_mask, labels_of, learn_schema
from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import run_guide
from ppl_vae.core.program import Density, ProgramLike, fold_rows
from ppl_vae.core.state import dry_run, eval_mode, isolated_store, seeded, train_mode
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.data.sources.row_blocks import RowBlocks, RowSource
from ppl_vae.guides.guides import AmortizedGuide
from ppl_vae.likelihoods.base import Likelihood, Mask, RowTensor
from ppl_vae.models.latent_variable_model import Codes, LatentVariableModel, reference_tensor
from ppl_vae.models.standardization import InitialStatistics, Standardization
from ppl_vae.networks.mlp_conv import Network, output_bias
from ppl_vae.networks.patches import HiddenPatches


class DecoderModel(LatentVariableModel):
    """Abstract: z ~ prior, x | z ~ likelihood(decoder(z)), and a guide.

    Args:
        decoder, likelihood, guide, data_dim, latent_dim: as for :class:`ppl_vae.VAE`.
    """

    def __init__(
        self,
        decoder: Network,
        likelihood: Likelihood,
        guide: ProgramLike,
        data_dim: int,
        latent_dim: int,
    ) -> None:
        super().__init__()
        _check_unused(decoder=decoder, likelihood=likelihood, guide=guide)
        self.data_dim = check_int("data_dim", data_dim)
        self.latent_dim = check_int("latent_dim", latent_dim)
        self.decoder = decoder
        self.likelihood = likelihood
        likelihood.set_data_dim(data_dim)
        self.guide: Any = guide
        if isinstance(getattr(self.guide, "inputs", None), Standardization):
            likelihood.standardize(torch.zeros(data_dim), torch.ones(data_dim))
        _check_patch_mask(self.patch_mask, data_dim, likelihood)
        guide_dim = getattr(self.guide, "latent_dim", latent_dim)
        if guide_dim != latent_dim:
            raise ValueError(f"the guide has latent_dim={guide_dim}, the model {latent_dim}")

    @property
    def patch_mask(self) -> HiddenPatches | None:
        """The patches that are hidden from the guide and are the only ones scored, if any."""
        found = getattr(self.guide, "patch_mask", None)
        return found if isinstance(found, HiddenPatches) else None

    def _scored_entries(self, mask: Tensor | None, like: Tensor) -> Bool[Tensor, "*B D"] | None:
        if self.patch_mask is None:
            return mask
        hidden = pyro.sample("hidden", self.patch_mask.subsets(like))
        entries = self.patch_mask.to_entries(hidden.bool())
        return entries if mask is None else entries & mask

    def conditional(
        self, z: Codes, x: RowTensor | None = None, mask: Mask | None = None, observe: bool = False
    ) -> Density:
        """p(x | z), event shape (D,), with its gradient; :meth:`decode` computes none.

        Args: see :class:`~ppl_vae.models.latent_variable_model.LatentVariableModel`.
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
        """Caveats on the fitted model; empty if there are none."""
        return self.likelihood.notes()

    def center(self, x: RowSource, *, mask: ArrayLike | None = None) -> Self:
        """Set the decoder's output bias so that training starts at the means of x's columns.

        Where the decoder's last weights contribute nothing, the mean of p(x | z) is that of the
        column. A model with ``inputs="standardized"`` also takes the columns' means and standard
        deviations from x. The networks of other models still receive x in its own units, and
        columns of very different scales need :meth:`ppl_vae.VAE.like`.

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
        device = reference_tensor(self).device
        blocks = RowBlocks(x, mask, device=device, schema=self.schema)
        self._initialize(InitialStatistics.of(blocks, self.likelihood))
        learn_schema(self, blocks.schema)
        return self

    @torch.no_grad()
    def _initialize(self, statistics: InitialStatistics) -> None:
        like, width = reference_tensor(self), len(statistics.columns.mean)
        if width != self.data_dim:
            raise ValueError(
                f"x must have shape (rows, {self.data_dim}) for this model; it has {width} columns"
            )
        bias = output_bias(self.decoder, self.data_dim * self.likelihood.outputs_per_dim)
        inputs: Any = getattr(self.guide, "inputs", None)
        if isinstance(inputs, Standardization):
            scale = statistics.scales(statistics.columns, like.dtype)
            input_scale = statistics.scales(statistics.inputs, like.dtype)
            self.likelihood.standardize(statistics.columns.centre.to(like), scale.to(like))
            inputs.loc.copy_(statistics.inputs.centre)
            if not self.likelihood.bounded:
                inputs.scale.copy_(input_scale)
                inputs.constant.copy_(statistics.inputs.constant)
        means, half = statistics.means.to(like.device), statistics.half.to(like.device)
        bias.copy_(self.likelihood.initial_outputs(means, half))

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "*B K"]) -> Density:
        """p(x | z), event shape (D,), without a gradient."""
        with isolated_store():  # where Pyro would keep the scale of every model
            return self.conditional(z.to(reference_tensor(self)))

    @torch.no_grad()
    def sample(self, num_samples: int, *, seed: int | None = None) -> Float[Tensor, "S D"] | Frame:
        """Draws from p(x): z from the prior, then x given z.

        Of a model that was fitted to a data frame they are such a frame.

        Raises:
            ValueError: if the prior is flat.
        """
        shape = torch.Size([check_int("num_samples", num_samples)])
        with seeded(seed):
            draws = self.decode(self.prior().sample(shape)).sample()
        return draws if self.schema is None else self.schema.frame(draws)

    @torch.no_grad()
    def features(
        self, x: ArrayLike, *, mask: ArrayLike | None = None
    ) -> Float[Tensor, "N K"] | Frame:
        """The code of each row: the mean of q(z | x), for an autoencoder f(x).

        Of a data frame it is a frame with the columns z1, ..., zK. The networks are in evaluation
        mode, and no patch is hidden from the guide.

        Args:
            x: (N, D); NaN marks a missing value. The code of a row with nothing observed is
                what the encoder makes of it.
            mask: True where observed.

        Raises:
            ValueError: if x has another width.
        """
        return labels_of(x).codes(self._code(*self._data_and_mask(x, mask)))

    def _data_and_mask(self, x: ArrayLike, mask: ArrayLike | None) -> tuple[Tensor, Tensor | None]:
        return as_data_and_mask(x, mask, model=self.model, guide=self.guide, allow_empty_rows=True)

    @torch.no_grad()
    def reconstruct(
        self, x: ArrayLike, *, mask: ArrayLike | None = None
    ) -> Float[Tensor, "N D"] | Frame:
        """The mean of p(x | z) at the mean of q(z | x), for missing entries too.

        Of a data frame it is a frame with its index and columns. The mean of a missing entry given
        its row is another quantity: :func:`ppl_vae.impute`. The networks are in evaluation mode,
        and only entries that ``mask`` or NaN marks as missing are hidden from the guide.

        Args:
            x: (N, D); NaN marks a missing value.
            mask: True where observed.

        Raises:
            ValueError: if x has another width.
        """
        labels, (x, mask) = labels_of(x, self.model), self._data_and_mask(x, mask)
        with isolated_store(), train_mode(self, training=False):
            return labels.data(self.conditional(self._code(x, mask).to(x), x, mask, False).mean)

    def _code(self, x: Tensor, mask: Tensor | None) -> Float[Tensor, "N K"]:
        with isolated_store(), dry_run(self.guide), eval_mode(self, self.guide):
            site: Any = run_guide(self.guide, Batch(x, mask)).guide.nodes["z"]
        return site["fn"].mean


def given_or_amortized(
    guide: ProgramLike | None,
    encoder: Callable[..., Any] | None,
    amortize: Callable[[Callable[..., Any]], AmortizedGuide],
) -> ProgramLike:
    """The guide of a model: the given one, or one made from an encoder.

    Args:
        guide: a guide, or None.
        encoder: an encoder, or None.
        amortize: makes the guide from the encoder.

    Raises:
        ValueError: unless exactly one of guide and encoder is given; if the encoder belongs to
            another model.
    """
    if encoder is None and guide is not None:
        return guide
    if encoder is not None and guide is None:
        _check_unused(encoder=encoder)
        return amortize(encoder)
    raise ValueError("give exactly one of encoder and guide")


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
            "patch_mask= needs a likelihood that can score a subset of the entries of x; "
            f"{type(likelihood).__name__} scores whole rows only. Use Poisson() for counts"
        )


def _check_unused(**parts: Any) -> None:
    for name, part in parts.items():
        if isinstance(part, PyroModule) and "." in part._pyro_name:
            raise ValueError(
                f"{name} belongs to another model already, and would no longer train there; "
                "pass a new one, or copy.deepcopy of it"
            )
