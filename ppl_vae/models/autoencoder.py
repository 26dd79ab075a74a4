"""Deterministic autoencoders as model/guide pairs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae.core.program import Density, ProgramLike
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import check_option
from ppl_vae.guides.guides import AmortizedGuide, num_encoder_inputs
from ppl_vae.likelihoods.base import Likelihood
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.decoder_model import DecoderModel
from ppl_vae.models.standardization import make_inputs
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import FixedScaleEncoder, mlp
from ppl_vae.networks.patches import HiddenPatches
from ppl_vae.networks.sparse_layers import (
    CODE_ACTIVATIONS,
    COLUMNS,
    PRIORS,
    FlatPrior,
    NormalizedColumns,
    TiedEncoder,
    check_penalty,
    make_code_activation,
)
from ppl_vae.networks.transformers import PatchDecoder, PatchTransformer


class Autoencoder(DecoderModel):
    """x -> f(x) -> G(f(x)) as a pair: a guide that is a point, z = f(x), under a prior.

    Minus its log joint is the loss of the textbooks, constants kept. With ``Gaussian(sigma)``
    and a penalty lambda,

        -log p(x, z) = |x - G(z)|^2 / (2 sigma^2) + D/2 log(2 pi sigma^2)  [likelihood]
                       + lambda |z|_1 + K log(2 / lambda)                   [Laplace prior]
                    or + lambda |z|^2 / 2 + K/2 log(2 pi / lambda)          [normal prior]

    and 0 in the place of the second line for a flat prior. ``Bernoulli(soft_targets=True)`` makes
    a cross-entropy of the first line, without a constant. Fitted by ``fit_svi`` it trains as an
    autoencoder does. Its ELBO is this log joint, and no bound: a point has no density.
    :meth:`as_vae` gives it one.

    Args:
        decoder: a network from rows of z, (rows, K), to (rows, D * likelihood.outputs_per_dim).
        data_dim: D.
        latent_dim: K, which may be larger than D.
        encoder: f, a network from rows of x, (rows, D), to (rows, K); or instead of it
        guide: any guide with one site ``"z"``; ``PerDatumGuide(N, K, covariance="delta")``, a
            free code for each datum, makes it dictionary learning.
        likelihood: by default ``Gaussian(1.0)``: half the squared error.
        prior: of z; ``"flat"``: density 1 everywhere, which cannot be sampled; ``"laplace"``: of
            scale 1 / penalty, an L1 penalty; ``"normal"``: of variance 1 / penalty, a squared
            one, and with penalty 1 the prior of a VAE. A penalty says nothing about codes if the
            decoder may grow as they shrink: ask for ``columns="unit"`` with it.
        penalty: lambda, in nats for each unit of |z_k|, or of z_k^2 / 2; by default 1.
        corruption: what is done to x before f sees it, in training alone (``fit_svi``, its steps
            but not its looks at ``x_val``), e.g. :class:`~ppl_vae.GaussianNoise`: a denoising
            autoencoder, for the model scores the clean x.
        missing: what f sees of a missing value, see
            :class:`~ppl_vae.guides.guides.AmortizedGuide`.
        inputs: a map of rows of x to what f is given instead of them; by default x itself.
        patch_mask: patches of x that f does not see, in training or not, e.g.
            :class:`~ppl_vae.HiddenPatches`: a masked autoencoder, for the model scores the
            entries of hidden patches alone; -log p(x, z, hidden) has log(P over H) besides, which
            the guide's log density takes away. ``features`` and ``reconstruct`` hide nothing.

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

    def __init__(
        self,
        *,
        decoder: Callable[..., Any],
        data_dim: int,
        latent_dim: int,
        encoder: Callable[..., Any] | None = None,
        guide: ProgramLike | None = None,
        likelihood: Likelihood | None = None,
        prior: str = "flat",
        penalty: float | None = None,
        corruption: Callable[[Tensor], Tensor] | None = None,
        missing: str = "zeros",
        inputs: Callable[[Tensor], Tensor] | None = None,
        patch_mask: HiddenPatches | None = None,
    ) -> None:
        for name, given in (
            ("corruption", corruption),
            ("inputs", inputs),
            ("patch_mask", patch_mask),
        ):
            if guide is not None and given is not None:
                raise ValueError(
                    f"{name}= is for the guide that is made from encoder=; give it to your own "
                    f"(AmortizedGuide(..., {name}=...))"
                )
        super().__init__(
            decoder=decoder,
            likelihood=Gaussian(1.0) if likelihood is None else likelihood,
            data_dim=data_dim,
            latent_dim=latent_dim,
            encoder=encoder,
            guide=guide,
            covariance="delta",
            missing=missing,
            inputs=inputs,
            corruption=corruption,
            patch_mask=patch_mask,
        )
        self.prior_kind = check_option("prior", prior, PRIORS)
        self.penalty = check_penalty(prior, penalty)

    @property
    def corruption(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to x before the encoder sees it, in training."""
        return getattr(self.guide, "corruption", None)

    @property
    def encoder(self) -> Any:
        """f, the network.

        Raises:
            TypeError: if the guide has none.
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
        loc = self._like().new_zeros(self.latent_dim)
        if self.prior_kind == "laplace":
            return dist.Laplace(loc, 1 / self.penalty).to_event(1)
        return dist.Normal(loc, self.penalty**-0.5).to_event(1)

    @classmethod
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

        Without hidden layers it has one layer, its code: ``code_activation="relu"`` or
        ``"sigmoid"`` makes the classic one-hidden-layer networks of it. ``hidden=(H,)`` with
        ``activation="sigmoid"`` is the four-layer network.

        Args:
            data_dim, latent_dim: D and K.
            hidden: the encoder's hidden widths; the decoder has them reversed.
            activation: of the hidden layers.
            code_activation: of the code: ``"linear"``, none; ``"soft-threshold"``, codes with
                exact zeros (:class:`~ppl_vae.networks.sparse_layers.SoftThreshold`); or one of the
                hidden layers' (``"relu"`` has exact zeros, too).
            columns: of the decoder's first weights, one for each dimension of z: ``"free"``;
                ``"unit"``, of length one; ``"orthonormal"``, orthogonal besides.
            tied: whether the encoder is the decoder's transpose, W'(x - b); without hidden layers.
            likelihood, prior, penalty, corruption, missing: as for the class.
            inputs: what f is given, ``"auto"``, ``"identity"`` or ``"log1p"``, as a VAE's encoder.
            seed: of the initial weights.

        Raises:
            ValueError: options that are not known or do not go together.
        """
        likelihood = Gaussian(1.0) if likelihood is None else likelihood
        check_option("columns", columns, COLUMNS)
        check_option("code_activation", code_activation, CODE_ACTIVATIONS)
        width = data_dim * likelihood.outputs_per_dim
        seen = num_encoder_inputs(missing, data_dim)
        name, given = make_inputs(inputs, likelihood)
        if tied:
            _check_tied(hidden, missing, likelihood)
        with seeded(seed):
            encoder = mlp(seen, latent_dim, hidden, activation=activation)
            decoder = mlp(latent_dim, width, hidden[::-1], activation=activation)
        if columns != "free":
            first: Any = decoder[0]
            decoder[0] = NormalizedColumns(first, columns)
        if tied:
            encoder = nn.Sequential(TiedEncoder(decoder[0]))
        if code_activation != "linear":
            encoder.append(make_code_activation(code_activation, latent_dim))
        how: dict[str, Any] = {"prior": prior, "penalty": penalty, "missing": missing}
        sizes: dict[str, Any] = {"data_dim": data_dim, "latent_dim": latent_dim}
        parts: dict[str, Any] = {"likelihood": likelihood, "corruption": corruption}
        made = cls(encoder=encoder, decoder=decoder, inputs=given, **sizes, **parts, **how)
        nets: dict[str, Any] = {"hidden": list(hidden), "activation": activation, "tied": tied}
        codes = {"code_activation": code_activation, "columns": columns, "inputs": name}
        made._config = sizes | how | nets | codes
        return made

    @classmethod
    def linear(cls, data_dim: int, latent_dim: int, *, tied: bool = False, **options: Any) -> Self:
        """An autoencoder of two affine maps: what PCA finds is the best of them.

        With ``tied=True, columns="orthonormal"`` it is a projection, as PCA's is. With K > D it
        can copy x and learn nothing.

        Args:
            data_dim, latent_dim: D and K.
            tied: whether the encoder is the decoder's transpose, W'(x - b).
            **options: as :meth:`mlp` takes them, all but ``hidden`` and ``activation``.
        """
        return cls.mlp(data_dim, latent_dim, hidden=(), tied=tied, **options)

    def as_vae(self, scale: float = 1.0) -> VAE:
        """The VAE of the same networks, copied: z ~ N(0, I), q(z | x) = N(f(x), scale^2 I).

        Its loss is that of the autoencoder with ``prior="normal"``, except that noise is put on
        the code, and a constant, the entropy of q: see :func:`ppl_vae.vae_limit`.

        Args:
            scale: standard deviation of q, fixed.

        Raises:
            TypeError: if the guide has no encoder.
            ValueError: if scale is not positive, or patches are hidden.
        """
        refuse_patch_masking(self)
        encoder, decoder, likelihood = copy.deepcopy((self.encoder, self.decoder, self.likelihood))
        how: dict[str, Any] = {"missing": self.guide.missing, "corruption": self.corruption}
        how["inputs"] = copy.deepcopy(self.guide.inputs)
        guide = AmortizedGuide(FixedScaleEncoder(encoder, scale), self.latent_dim, **how)
        sizes: dict[str, Any] = {"data_dim": self.data_dim, "latent_dim": self.latent_dim}
        return VAE(guide=guide, decoder=decoder, likelihood=likelihood, **sizes)

    @classmethod
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
        """A masked autoencoder: a transformer on the patches that are left, and another to paint
        those that are hidden; data stay flat rows.

        Of use afterwards is the first: ``features(x)`` of whole images are its tokens side by
        side, K = P * width; ``.unflatten(1, (P, width)).mean(1)`` is their mean, P times as short.
        ``reconstruct(x, mask=seen)`` paints what is not seen from what is, by whole patches.

        Args:
            image_shape: (C, H, W); D = C H W.
            patch: height and width of a patch, in pixels; one number is both.
            share: of the P patches that are hidden.
            width, depth, heads: of the encoder, a
                :class:`~ppl_vae.networks.transformers.PatchTransformer`.
            decoder_width, decoder_depth: of the decoder, which has as many heads, a
                :class:`~ppl_vae.networks.transformers.PatchDecoder`.
            likelihood, prior, penalty, corruption, inputs: as for :meth:`mlp`.
            seed: of the initial weights.

        Raises:
            ValueError: if the image is no whole number of patches high and wide, if none or all
                of them would be hidden, or if heads do not divide a width.
        """
        likelihood = Gaussian(1.0) if likelihood is None else likelihood
        patch_mask = HiddenPatches(image_shape, patch, share)
        nets: dict[str, Any] = {"width": width, "depth": depth, "heads": heads}
        shallow: dict[str, Any] = {"width": decoder_width, "depth": decoder_depth, "heads": heads}
        outputs = likelihood.outputs_per_dim
        name, given = make_inputs(inputs, likelihood)
        with seeded(seed):
            encoder = PatchTransformer(image_shape, patch, **nets)
            decoder = PatchDecoder(image_shape, patch, width, **shallow, outputs_per_dim=outputs)
        how: dict[str, Any] = {"prior": prior, "penalty": penalty}
        made = cls(
            encoder=encoder,
            decoder=decoder,
            data_dim=patch_mask.data_dim,
            latent_dim=encoder.out_dim,
            likelihood=likelihood,
            corruption=corruption,
            missing="zeros+mask",
            inputs=given,
            patch_mask=patch_mask,
            **how,
        )
        nets |= {"decoder_width": decoder_width, "decoder_depth": decoder_depth}
        made._config = patch_mask.config() | nets | how | {"networks": "masked", "inputs": name}
        return made

    def notes(self) -> list[str]:
        """What a person should know of the fitted model."""
        kind = "an autoencoder: what is maximised is log p(x, f(x))"
        if self.patch_mask is not None:
            kind = (
                "a masked autoencoder: what is maximised is log p of x in hidden patches given "
                "f(x) of the others"
            )
        return [f"{kind}, minus a loss, and no bound on log p(x)", *super().notes()]


def refuse_patch_masking(autoencoder: Autoencoder) -> None:
    """Refuse one that scores other cells than it sees, where it is to be looked at as a VAE.

    Raises:
        ValueError: if it hides patches.
    """
    if autoencoder.patch_mask is not None:
        raise ValueError(
            "a masked autoencoder scores what it does not see, which no VAE does; make the "
            "autoencoder of the same networks with patch_mask=None"
        )


def _check_tied(hidden: Sequence[int], missing: str, likelihood: Likelihood) -> None:
    if hidden or missing != "zeros" or likelihood.outputs_per_dim != 1:
        raise ValueError(
            "tied=True needs an encoder that can be the decoder's transpose: hidden=(), "
            "missing='zeros', and a likelihood with one output a dimension"
        )
