"""The variational autoencoder as a model/guide pair."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_vae.core.program import Density, ProgramLike
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.data.row_blocks import RowBlocks, RowSource
from ppl_vae.guides.families import num_scale_outputs
from ppl_vae.guides.guides import num_encoder_inputs
from ppl_vae.likelihoods.base import Likelihood
from ppl_vae.likelihoods.gaussian import Gaussian, NormalLikelihood
from ppl_vae.models.decoder_model import DecoderModel
from ppl_vae.models.standardization import Start, make_inputs, scale_notes
from ppl_vae.networks.mlp_conv import as_image_shape, conv_decoder, conv_encoder, mlp

ADVICE = (
    "this VAE takes them as they are, and one step size does not suit them all; if they are in "
    "different units, VAE.like(x, latent_dim) standardises them inside, with log p in the units "
    "of x"
)
"""What would have helped a fit to columns of mixed units."""


class VAE(DecoderModel):
    """A variational autoencoder: z ~ N(0, I_K), x | z ~ likelihood(decoder(z)), and its guide.

    ``vae.model`` and ``vae.guide`` are a Pyro pair; ``vae.guide.encoder`` is the network.

    Args:
        decoder: a network from rows of z, (rows, K), to (rows, D * likelihood.outputs_per_dim).
        likelihood: what the outputs mean.
        data_dim: D.
        latent_dim: K.
        encoder: a network for an :class:`~ppl_vae.guides.guides.AmortizedGuide`; or instead of it
        guide: any guide with one site ``"z"`` of event shape (K,).
        covariance: the family of the guide made from ``encoder``.
        missing: what that encoder sees of a missing value, ``"zeros"`` or ``"zeros+mask"``, see
            :class:`~ppl_vae.guides.guides.AmortizedGuide`.
        inputs: a map of rows of x to what that encoder is given instead of them; by default x
            itself.

    References:
        Kingma, Welling: Auto-Encoding Variational Bayes (2014).

    Example:
        >>> vae = VAE.mlp(data_dim=64, latent_dim=8, seed=0)
        >>> vae.sample(3, seed=0).shape
        torch.Size([3, 64])
    """

    def __init__(
        self,
        *,
        decoder: Callable[..., Any],
        likelihood: Likelihood,
        data_dim: int,
        latent_dim: int,
        encoder: Callable[..., Any] | None = None,
        guide: ProgramLike | None = None,
        covariance: str = "diagonal",
        missing: str = "zeros",
        inputs: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            decoder=decoder,
            likelihood=likelihood,
            data_dim=data_dim,
            latent_dim=latent_dim,
            encoder=encoder,
            guide=guide,
            covariance=covariance,
            missing=missing,
            inputs=inputs,
        )

    def prior(self) -> Density:
        """N(0, I_K)."""
        return dist.Normal(self._like().new_zeros(self.latent_dim), 1.0).to_event(1)

    @classmethod
    def mlp(
        cls,
        data_dim: int,
        latent_dim: int,
        *,
        hidden: Sequence[int] = (128,),
        likelihood: Likelihood | None = None,
        activation: str = "relu",
        covariance: str = "diagonal",
        missing: str = "zeros",
        inputs: str = "auto",
        seed: int | None = None,
    ) -> Self:
        """A VAE whose encoder and decoder are multilayer perceptrons.

        Args:
            data_dim, latent_dim: D and K.
            hidden: the encoder's hidden widths; the decoder has them reversed.
            likelihood: by default ``Gaussian("shared")``.
            activation: of the hidden layers.
            covariance: the guide's family.
            missing: what the encoder sees of a missing value: ``"zeros"``, or ``"zeros+mask"``,
                for which it has 2 D inputs.
            inputs: what the encoder is given: ``"identity"``, x; ``"log1p"``, log(1 + x);
                ``"auto"``, log(1 + x) of counts (``Poisson()``, ``Multinomial()``), which would
                overflow it, and x of everything else; ``"standardized"``, x standardised as
                :meth:`like` does it, once :meth:`center` has seen the data.
            seed: of the initial weights.
        """
        likelihood = Gaussian("shared") if likelihood is None else likelihood
        outputs = latent_dim + num_scale_outputs(covariance, check_int("latent_dim", latent_dim))
        seen = num_encoder_inputs(missing, data_dim)
        width = data_dim * likelihood.outputs_per_dim
        with seeded(seed):
            encoder = mlp(seen, outputs, hidden, activation=activation)
            decoder = mlp(latent_dim, width, hidden[::-1], activation=activation)
        sizes = {"data_dim": data_dim, "hidden": list(hidden), "activation": activation}
        return cls._of_networks(
            encoder, decoder, likelihood, data_dim, latent_dim, covariance, missing, inputs, sizes
        )

    @classmethod
    def _of_networks(
        cls,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        data_dim: int,
        latent_dim: int,
        covariance: str,
        missing: str,
        inputs: str,
        sizes: dict[str, Any],
    ) -> Self:
        name, given = make_inputs(inputs, likelihood, data_dim)
        vae = cls(
            encoder=encoder,
            decoder=decoder,
            likelihood=likelihood,
            data_dim=data_dim,
            latent_dim=latent_dim,
            covariance=covariance,
            missing=missing,
            inputs=given,
        )
        family = {"latent_dim": latent_dim, "covariance": covariance, "missing": missing}
        vae._config = sizes | family | {"inputs": name}
        return vae

    @classmethod
    def like(
        cls,
        x: RowSource,
        latent_dim: int,
        *,
        hidden: Sequence[int] = (128,),
        likelihood: Likelihood | None = None,
        activation: str = "relu",
        covariance: str = "diagonal",
        missing: str = "zeros",
        mask: ArrayLike | None = None,
        seed: int | None = None,
    ) -> Self:
        """A VAE of :meth:`mlp` for a table in any units: of x's width, dtype and device.

        Its networks work in standard units, and its buffers hold the way there: the encoder is
        given (x - mean) / sd of each column, and the decoder's outputs are in the same units. Raw
        rows go in, and draws, reconstructions and log p are in the units of x: from c_d x_d in
        place of x_d one gets, with the same seed, the same fit with log p lower by sum_d log c_d.

        ================================  ==================================  =================
        likelihood                        the encoder is given                the decoder starts
        ================================  ==================================  =================
        ``Gaussian``                      (x - mean) / sd                     at the means
        ``Poisson``, ``Multinomial``      log(1 + x), standardised            at the means
        ``Bernoulli``,                    x - mean                            at the means
        ``ContinuousBernoulli``
        ``Categorical``                   (x - mean) / sd                     at the shares
        ================================  ==================================  =================

        A missing value is zero after standardisation: the mean of its column. A constant column
        cannot be standardised; it keeps its units, and ``notes`` says so.

        Args:
            x: a matrix, a memory map, or an iterable of blocks of rows, which is read once; NaN
                is a missing value.
            latent_dim: K.
            hidden, activation, covariance, missing: as for :meth:`mlp`.
            likelihood: by default ``Gaussian("shared")``, which starts with half of each column's
                variance as noise. A learned or optimal sigma, its ``initial`` and its ``floor``
                are in standard deviations of the columns: one sigma for columns of several units.
                A sigma that is given as a number stays in the units of x.
            mask: True where observed.
            seed: of the initial weights.

        Raises:
            ValueError: if x is not in the likelihood's support; if a row or a column has nothing
                observed; if a column's standard deviation overflows x's dtype.

        Example:
            >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
            >>> vae = VAE.like(x * torch.tensor([1e-3, 1.0, 1e3]), latent_dim=2, seed=0)
            >>> vae.guide.inputs.scale.shape
            torch.Size([3])
        """
        # Noise of half the variance leaves the latent variables something to explain.
        likelihood = Gaussian("shared", initial=0.5**0.5) if likelihood is None else likelihood
        start = Start.of(blocks := RowBlocks(x, mask), likelihood)
        vae = cls.mlp(
            len(start.columns.mean),
            latent_dim,
            hidden=hidden,
            likelihood=likelihood,
            activation=activation,
            covariance=covariance,
            missing=missing,
            inputs="standardized",
            seed=seed,
        )
        dtype = torch.promote_types(blocks.dtype, torch.float32)
        vae = vae.to(device=start.columns.mean.device, dtype=dtype)
        vae._begin(start)
        return vae

    @classmethod
    def conv(
        cls,
        image_shape: Sequence[int],
        latent_dim: int,
        *,
        channels: Sequence[int] = (32, 64),
        likelihood: Likelihood | None = None,
        activation: str = "relu",
        covariance: str = "diagonal",
        missing: str = "zeros",
        inputs: str = "auto",
        seed: int | None = None,
    ) -> Self:
        """A VAE whose encoder and decoder are convolutional; data stay flat rows.

        Args:
            image_shape: (C, H, W), of any height and width; D = C H W.
            latent_dim: K.
            channels: of the encoder's convolutions, each of which halves height and width; the
                decoder has them reversed.
            likelihood: by default ``Gaussian("shared")``.
            activation: of the hidden layers.
            covariance: the guide's family.
            missing: what the encoder sees of a missing value: ``"zeros"``, or ``"zeros+mask"``,
                for which its images have 2 C channels.
            inputs: what the encoder is given: ``"identity"``, x; ``"log1p"``, log(1 + x);
                ``"auto"``, log(1 + x) of counts (``Poisson()``, ``Multinomial()``), which would
                overflow it, and x of everything else; ``"standardized"``, x standardised as
                :meth:`like` does it, once :meth:`center` has seen the data.
            seed: of the initial weights.
        """
        likelihood = Gaussian("shared") if likelihood is None else likelihood
        codes = latent_dim + num_scale_outputs(covariance, check_int("latent_dim", latent_dim))
        depth, *area = as_image_shape(image_shape)
        seen = (num_encoder_inputs(missing, depth), *area)
        how: dict[str, Any] = {
            "outputs_per_dim": likelihood.outputs_per_dim,
            "activation": activation,
        }
        with seeded(seed):
            encoder = conv_encoder(seen, codes, channels, activation=activation)
            decoder = conv_decoder(latent_dim, image_shape, channels[::-1], **how)
        sizes = {"image_shape": [depth, *area], "channels": list(channels)}
        sizes |= {"activation": activation, "networks": "conv"}
        data_dim = math.prod((depth, *area))
        return cls._of_networks(
            encoder, decoder, likelihood, data_dim, latent_dim, covariance, missing, inputs, sizes
        )

    def notes_on(self, x: Float[Tensor, "N D"], mask: Tensor | None = None) -> list[str]:
        """Whether a fit to x would have needed :meth:`like`: empty if not.

        Only a Gaussian's outputs are in the units of x. Images are in one unit.

        Args:
            x: rows; anything in missing values.
            mask: True where observed.
        """
        likelihood = self.likelihood
        if not isinstance(likelihood, NormalLikelihood) or likelihood.unit is not None:
            return []
        if (self._config or {}).get("networks") == "conv":
            return []
        return scale_notes(x, mask, ADVICE)

    def config(self) -> dict[str, Any] | None:
        """The arguments of :meth:`mlp`, or of :meth:`conv` and ``networks="conv"``.

        None for networks that only their author can rebuild.
        """
        return super().config()
