"""Deterministic autoencoders as model/guide pairs."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import pyro.distributions as dist
from torch import Tensor

from ppl_vae.core.config import configurable
from ppl_vae.core.program import Density, ProgramLike
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import check_option
from ppl_vae.guides.guides import AmortizedGuide
from ppl_vae.likelihoods.base import Likelihood
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.autoencoder_networks import mlp_networks
from ppl_vae.models.decoder_model import DecoderModel, given_or_amortized
from ppl_vae.models.latent_variable_model import reference_tensor
from ppl_vae.models.standardization import encoder_inputs
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import FixedScaleEncoder, Network
from ppl_vae.networks.patches import HiddenPatches
from ppl_vae.networks.sparse_layers import PRIORS, FlatPrior, check_penalty
from ppl_vae.networks.transformers import PatchDecoder, PatchTransformer


class Autoencoder(DecoderModel):
    """x -> f(x) -> G(f(x)) as a pair: the guide is a point mass at z = f(x), under a prior on z.

    The negative log joint is the usual loss, with all constants. With ``Gaussian(sigma)`` and a
    penalty lambda,

        -log p(x, z) = |x - G(z)|^2 / (2 sigma^2) + D/2 log(2 pi sigma^2)  [likelihood]
                       + lambda |z|_1 + K log(2 / lambda)                   [Laplace prior]
                    or + lambda |z|^2 / 2 + K/2 log(2 pi / lambda)          [normal prior]

    and the prior's term is zero for a flat prior. With ``Bernoulli(soft_targets=True)`` the
    likelihood's term is a cross-entropy, without a constant. ``fit_svi`` trains the pair as an
    autoencoder is trained. Its ELBO is this log joint and no lower bound on log p(x), because a
    point mass has no density; :meth:`as_vae` gives the guide one.

    Args:
        decoder: a network from rows of z, (rows, K), to (rows, D * likelihood.outputs_per_dim).
        data_dim: D.
        latent_dim: K, which may be larger than D.
        encoder: f, a network from rows of x, (rows, D), to (rows, K).
        guide: instead of ``encoder``, any guide with one site ``"z"``;
            ``PerDatumGuide(N, K, covariance="delta")``, a free code for each datum, gives
            dictionary learning.
        likelihood: by default ``Gaussian(1.0)``, for which the loss is half the squared error.
        prior: the prior of z; ``"flat"``, of density 1 everywhere, which cannot be sampled;
            ``"laplace"``, of scale 1 / penalty, an L1 penalty; ``"normal"``, of variance 1 /
            penalty, a squared penalty and with penalty 1 the prior of a VAE. The decoder's weights
            can grow as the codes shrink; use a penalty with ``columns="unit"``.
        penalty: lambda, in nats for each unit of |z_k|, or of z_k^2 / 2; by default 1.
        corruption: a random map that is applied to the encoder's x in training only (the steps of
            ``fit_svi``, not its evaluations of ``x_val``), e.g.
            :class:`~ppl_vae.networks.GaussianNoise`. It makes a denoising autoencoder, because the
            model scores the clean x.
        missing: how the guide encodes missing values, see
            :class:`~ppl_vae.guides.guides.AmortizedGuide`.
        inputs: a map from rows of x to the rows that f is given; by default the identity.
        patch_mask: patches of x that are hidden from f, in training and evaluation, e.g.
            :class:`~ppl_vae.networks.HiddenPatches`. It makes a masked autoencoder, because the
            model scores the entries of hidden patches only. -log p(x, z, hidden) also contains
            log(P over H), which cancels against the guide's log density. ``features`` and
            ``reconstruct`` hide no patch.

    References:
        Bourlard, Kamp: Auto-association by multilayer perceptrons and singular value
        decomposition (1988); Olshausen, Field: Sparse coding with an overcomplete basis set
        (1997); Vincent et al.: Stacked denoising autoencoders (2010); He et al.:
        Masked autoencoders are scalable vision learners (2022).

    Example:
        >>> autoencoder = Autoencoder.linear(data_dim=64, latent_dim=8, seed=0)
        >>> autoencoder.features(torch.zeros(3, 64)).shape
        torch.Size([3, 8])
    """

    @configurable
    def __init__(
        self,
        *,
        decoder: Network,
        data_dim: int,
        latent_dim: int,
        encoder: Network | None = None,
        guide: ProgramLike | None = None,
        likelihood: Likelihood | None = None,
        prior: str = "flat",
        penalty: float | None = None,
        corruption: Callable[[Tensor], Tensor] | None = None,
        missing: str = "zeros",
        inputs: Callable[[Tensor], Tensor] | None = None,
        patch_mask: HiddenPatches | None = None,
    ) -> None:
        if guide is not None:
            _check_not_given(corruption=corruption, inputs=inputs, patch_mask=patch_mask)
        amortize = partial(
            AmortizedGuide,
            latent_dim=latent_dim,
            covariance="delta",
            missing=missing,
            inputs=inputs,
            corruption=corruption,
            patch_mask=patch_mask,
        )
        guide = given_or_amortized(guide, encoder, amortize)
        super().__init__(decoder, likelihood or Gaussian(1.0), guide, data_dim, latent_dim)
        self.prior_kind = check_option("prior", prior, PRIORS)
        self.penalty = check_penalty(prior, penalty)

    @property
    def corruption(self) -> Callable[[Tensor], Tensor] | None:
        """The random map that is applied to the encoder's x in training; None without one."""
        return getattr(self.guide, "corruption", None)

    @property
    def encoder(self) -> Any:
        """f, the encoder network.

        Raises:
            TypeError: if the guide has no encoder.
        """
        if not isinstance(self.guide, AmortizedGuide):
            raise TypeError(
                "the guide must have an encoder, as an AmortizedGuide has; it is a "
                f"{type(self.guide).__name__}"
            )
        return self.guide.encoder

    def prior(self) -> Density:
        """Flat, Laplace of scale 1 / penalty, or normal of variance 1 / penalty."""
        if self.prior_kind == "flat":
            return FlatPrior(self.latent_dim)
        loc = reference_tensor(self).new_zeros(self.latent_dim)
        if self.prior_kind == "laplace":
            return dist.Laplace(loc, 1 / self.penalty).to_event(1)
        return dist.Normal(loc, self.penalty**-0.5).to_event(1)

    @classmethod
    @configurable
    def mlp(
        cls,
        data_dim: int,
        latent_dim: int,
        *,
        hidden: Sequence[int] = (128,),
        activation: str = "relu",
        code_activation: str = "linear",
        columns: str = "free",
        tied: bool = False,
        likelihood: Likelihood | None = None,
        prior: str = "flat",
        penalty: float | None = None,
        corruption: Callable[[Tensor], Tensor] | None = None,
        missing: str = "zeros",
        inputs: str = "auto",
        seed: int | None = None,
    ) -> Self:
        """An autoencoder of two multilayer perceptrons.

        Without hidden layers its only layer is the code: ``code_activation="relu"`` or
        ``"sigmoid"`` gives the classic networks with one hidden layer. ``hidden=(H,)`` with
        ``activation="sigmoid"`` is the four-layer network.

        Args:
            data_dim, latent_dim: D and K.
            hidden: widths of the encoder's hidden layers; the decoder has them in reverse order.
            activation: the activation of the hidden layers.
            code_activation: ``"linear"``, none; ``"soft-threshold"``, codes with exact zeros
                (:class:`~ppl_vae.networks.sparse_layers.SoftThreshold`); or an activation of
                hidden layers (``"relu"`` also has exact zeros).
            columns: constraint on the columns of the decoder's first weights, one for each
                dimension of z: ``"free"``; ``"unit"``, of length one; ``"orthonormal"``.
            tied: whether the encoder is the decoder's transpose, W'(x - b); without hidden layers.
            likelihood, prior, penalty, corruption, missing: as for the class.
            inputs: what f is given, ``"auto"``, ``"identity"`` or ``"log1p"``, as for
                :meth:`ppl_vae.VAE.mlp`.
            seed: the seed of the initial weights.

        Raises:
            ValueError: if an option is unknown, or options cannot be combined.
        """
        likelihood = Gaussian(1.0) if likelihood is None else likelihood
        encoder, decoder = mlp_networks(
            data_dim,
            latent_dim,
            likelihood.outputs_per_dim,
            hidden=hidden,
            activation=activation,
            code_activation=code_activation,
            columns=columns,
            tied=tied,
            missing=missing,
            seed=seed,
        )
        return cls(
            encoder=encoder,
            decoder=decoder,
            data_dim=data_dim,
            latent_dim=latent_dim,
            likelihood=likelihood,
            prior=prior,
            penalty=penalty,
            corruption=corruption,
            missing=missing,
            inputs=encoder_inputs(inputs, likelihood),
        )

    @classmethod
    def linear(cls, data_dim: int, latent_dim: int, *, tied: bool = False, **options: Any) -> Self:
        """An autoencoder of two affine maps; the optimal one is PCA's projection.

        With ``tied=True, columns="orthonormal"`` every such autoencoder is an orthogonal
        projection, as PCA's is. With K > D it can copy x and learn nothing.

        Args:
            data_dim, latent_dim: D and K.
            tied: whether the encoder is the decoder's transpose, W'(x - b).
            **options: further arguments of :meth:`mlp`, except ``hidden`` and ``activation``.
        """
        return cls.mlp(data_dim, latent_dim, hidden=(), tied=tied, **options)

    def as_vae(self, scale: float = 1.0) -> VAE:
        """The VAE of the same networks, copied: z ~ N(0, I), q(z | x) = N(f(x), scale^2 I).

        Its loss is that of the autoencoder with ``prior="normal"``, except for the noise added to
        the code and a constant, the entropy of q: see :func:`ppl_vae.evaluation.vae_limit`.

        Args:
            scale: standard deviation of q, fixed.

        Raises:
            TypeError, ValueError: without an encoder; if scale <= 0, or patches are hidden.
        """
        refuse_patch_masking(self)
        encoder, decoder, likelihood = copy.deepcopy((self.encoder, self.decoder, self.likelihood))
        guide = AmortizedGuide(
            FixedScaleEncoder(encoder, scale),
            self.latent_dim,
            missing=self.guide.missing,
            inputs=copy.deepcopy(self.guide.inputs),
            corruption=self.corruption,
        )
        return VAE(
            guide=guide,
            decoder=decoder,
            likelihood=likelihood,
            data_dim=self.data_dim,
            latent_dim=self.latent_dim,
        )

    @classmethod
    @configurable
    def masked(
        cls,
        image_shape: Sequence[int],
        patch: int | Sequence[int],
        *,
        share: float = 0.75,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        decoder_width: int = 64,
        decoder_depth: int = 1,
        likelihood: Likelihood | None = None,
        prior: str = "flat",
        penalty: float | None = None,
        corruption: Callable[[Tensor], Tensor] | None = None,
        inputs: str = "auto",
        seed: int | None = None,
    ) -> Self:
        """A masked autoencoder of two transformers; data remain flat rows.

        The encoder reads the visible patches, and the decoder predicts the hidden ones. After
        training, ``features(x)`` of whole images are its tokens side by side, K = P * width;
        ``.unflatten(1, (P, width)).mean(1)`` is their mean.
        ``reconstruct(x, mask=observed)`` predicts missing patches from the complete ones.

        Args:
            image_shape: (C, H, W); D = C H W.
            patch: height and width of a patch, in pixels; one number for both.
            share: fraction of the P patches that are hidden.
            width, depth, heads: those of its :class:`~ppl_vae.networks.PatchTransformer`.
            decoder_width, decoder_depth: those of the :class:`~ppl_vae.networks.PatchDecoder`.
            likelihood, prior, penalty, corruption, inputs: as for :meth:`mlp`.
            seed: the seed of the initial weights.

        Raises:
            ValueError: if the image's height or width is not a multiple of the patch's, if no
                patch or every patch would be hidden, or if heads do not divide a width.
        """
        likelihood = Gaussian(1.0) if likelihood is None else likelihood
        patch_mask = HiddenPatches(image_shape, patch, share)
        with seeded(seed):
            encoder = PatchTransformer(image_shape, patch, width, depth, heads)
            decoder = PatchDecoder(
                image_shape,
                patch,
                width,
                width=decoder_width,
                depth=decoder_depth,
                heads=heads,
                outputs_per_dim=likelihood.outputs_per_dim,
            )
        return cls(
            encoder=encoder,
            decoder=decoder,
            data_dim=patch_mask.data_dim,
            latent_dim=encoder.out_dim,
            likelihood=likelihood,
            prior=prior,
            penalty=penalty,
            corruption=corruption,
            missing="zeros+mask",
            inputs=encoder_inputs(inputs, likelihood),
            patch_mask=patch_mask,
        )

    def notes(self) -> list[str]:
        """Caveats on the fitted model."""
        objective = "an autoencoder: the objective is log p(x, f(x))"
        if self.patch_mask is not None:
            objective = (
                "a masked autoencoder: the objective is log p of x in hidden patches given f(x) "
                "of the visible ones"
            )
        return [f"{objective}, minus a loss, and no bound on log p(x)", *super().notes()]


def refuse_patch_masking(autoencoder: Autoencoder) -> None:
    """Raise a ``ValueError`` for a masked autoencoder, which cannot be evaluated as a VAE."""
    if autoencoder.patch_mask is not None:
        raise ValueError(
            "a masked autoencoder scores entries that are hidden from its encoder, which no VAE "
            "does; make the autoencoder of the same networks with patch_mask=None"
        )


def _check_not_given(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name}= is for the guide that is made from encoder=; pass it to your own guide "
                f"(AmortizedGuide(..., {name}=...))"
            )
