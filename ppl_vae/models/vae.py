"""The variational autoencoder as a model/guide pair."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import pyro.distributions as dist

from ppl_vae.arguments import at_least
from ppl_vae.families import num_scale_outputs
from ppl_vae.guides import num_encoder_inputs
from ppl_vae.models.decoded import DecoderModel
from ppl_vae.models.gaussian import Gaussian
from ppl_vae.models.networks import as_image_shape, conv_decoder, conv_encoder, mlp
from ppl_vae.models.observation import Likelihood
from ppl_vae.program import Density, ProgramLike
from ppl_vae.state import seeded


class VAE(DecoderModel):
    """A variational autoencoder: z ~ N(0, I_K), x | z ~ likelihood(decoder(z)), and its guide.

    ``vae.model`` and ``vae.guide`` are a Pyro pair; ``vae.guide.encoder`` is the network.

    Args:
        decoder: a network from rows of z, (rows, K), to (rows, D * likelihood.outputs_per_dim).
        likelihood: what the outputs mean.
        data_dim: D.
        latent_dim: K.
        encoder: a network for an :class:`~ppl_vae.guides.AmortizedGuide`; or instead of it
        guide: any guide with one site ``"z"`` of event shape (K,).
        covariance: the family of the guide made from ``encoder``.
        missing: what that encoder sees of a hole, ``"zeros"`` or ``"zeros+mask"``, see
            :class:`~ppl_vae.guides.AmortizedGuide`.

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
        seed: int | None = None,
    ) -> Self:
        """A VAE whose encoder and decoder are multilayer perceptrons.

        Args:
            data_dim, latent_dim: D and K.
            hidden: the encoder's hidden widths; the decoder has them reversed.
            likelihood: by default ``Gaussian("shared")``.
            activation: of the hidden layers.
            covariance: the guide's family.
            missing: what the encoder sees of a hole: ``"zeros"``, or ``"zeros+mask"``, for which
                it has 2 D inputs.
            seed: of the initial weights.
        """
        likelihood = Gaussian("shared") if likelihood is None else likelihood
        outputs = latent_dim + num_scale_outputs(covariance, at_least("latent_dim", latent_dim))
        inputs = num_encoder_inputs(missing, data_dim)
        width = data_dim * likelihood.outputs_per_dim
        with seeded(seed):
            encoder = mlp(inputs, outputs, hidden, activation=activation)
            decoder = mlp(latent_dim, width, hidden[::-1], activation=activation)
        family: dict[str, Any] = {
            "latent_dim": latent_dim,
            "covariance": covariance,
            "missing": missing,
        }
        vae = cls(
            encoder=encoder, decoder=decoder, likelihood=likelihood, data_dim=data_dim, **family
        )
        sizes = {"data_dim": data_dim, "hidden": list(hidden), "activation": activation}
        vae._config = sizes | family
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
            missing: what the encoder sees of a hole: ``"zeros"``, or ``"zeros+mask"``, for which
                its images have 2 C channels.
            seed: of the initial weights.
        """
        likelihood = Gaussian("shared") if likelihood is None else likelihood
        codes = latent_dim + num_scale_outputs(covariance, at_least("latent_dim", latent_dim))
        depth, *area = as_image_shape(image_shape)
        seen = (num_encoder_inputs(missing, depth), *area)
        how: dict[str, Any] = {
            "outputs_per_dim": likelihood.outputs_per_dim,
            "activation": activation,
        }
        with seeded(seed):
            encoder = conv_encoder(seen, codes, channels, activation=activation)
            decoder = conv_decoder(latent_dim, image_shape, channels[::-1], **how)
        family: dict[str, Any] = {
            "latent_dim": latent_dim,
            "covariance": covariance,
            "missing": missing,
        }
        data_dim = math.prod((depth, *area))
        vae = cls(
            encoder=encoder, decoder=decoder, likelihood=likelihood, data_dim=data_dim, **family
        )
        sizes = {"image_shape": [depth, *area], "channels": list(channels)}
        vae._config = sizes | family | {"activation": activation, "networks": "conv"}
        return vae

    def config(self) -> dict[str, Any] | None:
        """The arguments of :meth:`mlp`, or of :meth:`conv` and ``networks="conv"``.

        None for networks that only their author can rebuild.
        """
        return super().config()
