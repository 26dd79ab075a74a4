"""The variational autoencoder as a model/guide pair."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.config import configurable
from ppl_vae.core.program import Density, ProgramLike
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.data.column_scales import scale_notes
from ppl_vae.data.sources.row_blocks import RowBlocks, RowSource
from ppl_vae.guides.families import num_scale_outputs
from ppl_vae.guides.guides import AmortizedGuide, num_encoder_inputs
from ppl_vae.likelihoods.base import Likelihood
from ppl_vae.likelihoods.gaussian import Gaussian, NormalLikelihood
from ppl_vae.models.decoder_model import DecoderModel, given_or_amortized
from ppl_vae.models.latent_variable_model import reference_tensor, standard_normal
from ppl_vae.models.standardization import InitialStatistics, encoder_inputs
from ppl_vae.networks.mlp_conv import as_image_shape, conv_decoder, conv_encoder, mlp

STANDARDIZE_ADVICE = (
    "this VAE takes x in its own units, and one step size does not suit all columns; if they are "
    "in different units, VAE.like(x, latent_dim) standardises them internally and reports log p "
    "in the units of x"
)
"""The advice in the note on a fit to columns of mixed units."""


class VAE(DecoderModel):
    """A variational autoencoder: z ~ N(0, I_K), x | z ~ likelihood(decoder(z)), and its guide.

    ``vae.model`` and ``vae.guide`` are a Pyro pair; ``vae.guide.encoder`` is the network.

    Args:
        decoder: a network from rows of z, (rows, K), to (rows, D * likelihood.outputs_per_dim).
        likelihood: the family of p(x | z); it maps the decoder's outputs to a density.
        data_dim: D.
        latent_dim: K.
        encoder: a network for an :class:`~ppl_vae.guides.guides.AmortizedGuide`.
        guide: instead of ``encoder``, any guide with one site ``"z"`` of event shape (K,).
        covariance: the family of the guide made from ``encoder``.
        missing: how that guide encodes missing values, ``"zeros"`` or ``"zeros+mask"``, see
            :class:`~ppl_vae.guides.guides.AmortizedGuide`.
        inputs: a map from rows of x to the rows that the encoder is given; by default the
            identity.

    References:
        Kingma, Welling: Auto-Encoding Variational Bayes (2014).

    Example:
        >>> vae = VAE.mlp(data_dim=64, latent_dim=8, seed=0)
        >>> vae.sample(3, seed=0).shape
        torch.Size([3, 64])
    """

    @configurable
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
        amortize = partial(
            AmortizedGuide,
            latent_dim=latent_dim,
            covariance=covariance,
            missing=missing,
            inputs=inputs,
        )
        guide = given_or_amortized(guide, encoder, amortize)
        super().__init__(decoder, likelihood, guide, data_dim, latent_dim)
        self._has_images = False

    def prior(self) -> Density:
        """N(0, I_K)."""
        return standard_normal(self.latent_dim, reference_tensor(self))

    @classmethod
    @configurable
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
            hidden: widths of the encoder's hidden layers; the decoder has them in reverse order.
            likelihood: by default ``Gaussian("shared")``.
            activation: the activation of the hidden layers.
            covariance: the guide's family.
            missing: how the guide encodes missing values: ``"zeros"``, or ``"zeros+mask"``, for
                which the encoder has 2 D inputs.
            inputs: what the encoder is given: ``"identity"``, x; ``"log1p"``, log(1 + x);
                ``"auto"``, log(1 + x) for counts (``Poisson()``, ``Multinomial()``), which are
                too large for it otherwise, and x for all other likelihoods; ``"standardized"``,
                x standardised as :meth:`like` does it, once
                :meth:`~ppl_vae.models.decoder_model.DecoderModel.center` has read the data.
            seed: the seed of the initial weights.
        """
        likelihood = Gaussian("shared") if likelihood is None else likelihood
        outputs = latent_dim + num_scale_outputs(covariance, check_int("latent_dim", latent_dim))
        width = data_dim * likelihood.outputs_per_dim
        with seeded(seed):
            rows = num_encoder_inputs(missing, data_dim)
            encoder = mlp(rows, outputs, hidden, activation=activation)
            decoder = mlp(latent_dim, width, hidden[::-1], activation=activation)
        return cls(
            encoder=encoder,
            decoder=decoder,
            likelihood=likelihood,
            data_dim=data_dim,
            latent_dim=latent_dim,
            covariance=covariance,
            missing=missing,
            inputs=encoder_inputs(inputs, likelihood, data_dim),
        )

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
        """A VAE of :meth:`mlp` for a table in any units, of x's width, dtype and device.

        Its networks work in standard units, and its buffers hold the transformation: the encoder
        is given (x - mean) / sd of each column, and the decoder's outputs are in the same units.
        Data enter in their own units, and draws, reconstructions and log p are in the units of x:
        multiplying each column x_d by c_d gives, with the same seed, the same fit with log p lower
        by sum_d log c_d.

        ================================  ==================================  =================
        likelihood                        the encoder is given                the decoder starts
        ================================  ==================================  =================
        ``Gaussian``                      (x - mean) / sd                     at the means
        ``Poisson``, ``Multinomial``      log(1 + x), standardised            at the means
        ``Bernoulli``,                    x - mean                            at the means
        ``ContinuousBernoulli``
        ``Categorical``                   (x - mean) / sd                     at the frequencies
        ================================  ==================================  =================

        A missing value is zero after standardisation, which is the mean of its column. A constant
        column cannot be standardised; it keeps its units, and ``notes`` reports it.

        Args:
            x: a matrix, a memory map, or an iterable of blocks of rows, which is read once; NaN
                is a missing value.
            latent_dim: K.
            hidden, activation, covariance, missing: as for :meth:`mlp`.
            likelihood: by default ``Gaussian("shared")``, which starts with half of each column's
                variance as noise. A learned or optimal sigma, its ``initial`` and its ``floor``
                are in standard deviations of the columns, so that one sigma serves columns of
                several units. A sigma given as a number is in the units of x.
            mask: True where observed.
            seed: the seed of the initial weights.

        Raises:
            ValueError: if x is not in the likelihood's support; if a row or a column has nothing
                observed; if a column's standard deviation overflows x's dtype.

        Example:
            >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
            >>> vae = VAE.like(x * torch.tensor([1e-3, 1.0, 1e3]), latent_dim=2, seed=0)
            >>> vae.guide.inputs.scale.shape
            torch.Size([3])
        """
        # Noise of half the variance leaves the other half for the latent variables to explain.
        likelihood = Gaussian("shared", initial=0.5**0.5) if likelihood is None else likelihood
        blocks = RowBlocks(x, mask)
        statistics = InitialStatistics.of(blocks, likelihood)
        mean = statistics.columns.mean
        vae = cls.mlp(
            len(mean),
            latent_dim,
            hidden=hidden,
            likelihood=likelihood,
            activation=activation,
            covariance=covariance,
            missing=missing,
            inputs="standardized",
            seed=seed,
        )
        vae = vae.to(device=mean.device, dtype=torch.promote_types(blocks.dtype, torch.float32))
        vae._initialize(statistics)
        vae.schema = blocks.schema
        return vae

    @classmethod
    @configurable
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
        """A VAE whose encoder and decoder are convolutional; data remain flat rows.

        Args:
            image_shape: (C, H, W), of any height and width; D = C H W.
            latent_dim: K.
            channels: the channels of the encoder's convolutions, each of which halves height and
                width; the decoder has them in reverse order.
            likelihood, activation, covariance, inputs, seed: as for :meth:`mlp`.
            missing: how the guide encodes missing values: ``"zeros"``, or ``"zeros+mask"``, for
                which the encoder's images have 2 C channels.
        """
        likelihood = Gaussian("shared") if likelihood is None else likelihood
        outputs = latent_dim + num_scale_outputs(covariance, check_int("latent_dim", latent_dim))
        depth, *area = as_image_shape(image_shape)
        with seeded(seed):
            images = (num_encoder_inputs(missing, depth), *area)
            encoder = conv_encoder(images, outputs, channels, activation=activation)
            decoder = conv_decoder(
                latent_dim,
                image_shape,
                channels[::-1],
                outputs_per_dim=likelihood.outputs_per_dim,
                activation=activation,
            )
        data_dim = math.prod((depth, *area))
        vae = cls(
            encoder=encoder,
            decoder=decoder,
            likelihood=likelihood,
            data_dim=data_dim,
            latent_dim=latent_dim,
            covariance=covariance,
            missing=missing,
            inputs=encoder_inputs(inputs, likelihood, data_dim),
        )
        vae._has_images = True
        return vae

    def notes_on(self, x: Float[Tensor, "N D"], mask: Tensor | None = None) -> list[str]:
        """A note if a fit to x would need :meth:`like`; empty if not.

        Only a Gaussian's outputs are in the units of x. The pixels of images share one unit.

        Args:
            x: rows; missing entries may hold any number.
            mask: True where observed.
        """
        likelihood = self.likelihood
        if not isinstance(likelihood, NormalLikelihood) or likelihood.unit is not None:
            return []
        return [] if self._has_images else scale_notes(x, mask, STANDARDIZE_ADVICE)
