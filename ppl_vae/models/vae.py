"""The variational autoencoder as a model/guide pair."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from pyro import poutine
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from ppl_vae.arguments import ArrayLike, at_least
from ppl_vae.guides import AmortizedGuide, num_encoder_inputs, num_scale_outputs
from ppl_vae.models.gaussian import Gaussian
from ppl_vae.models.networks import as_image_shape, conv_decoder, conv_encoder, mlp, output_bias
from ppl_vae.models.observation import Likelihood
from ppl_vae.program import (
    Density,
    Program,
    ProgramLike,
    accepted,
    as_observed,
    as_rows,
    count_rows,
    data_plate,
    fold_rows,
)
from ppl_vae.state import isolated_store, probing, seeded


class VAE(Program):
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
        super().__init__()
        if (encoder is None) == (guide is None):
            raise ValueError("give exactly one of encoder and guide")
        _refuse_taken(decoder=decoder, likelihood=likelihood, encoder=encoder, guide=guide)
        self.data_dim = at_least("data_dim", data_dim)
        self.latent_dim = at_least("latent_dim", latent_dim)
        self.decoder = decoder
        self.likelihood = likelihood
        likelihood.sized(data_dim)
        if encoder is not None:
            guide = AmortizedGuide(encoder, latent_dim, covariance=covariance, missing=missing)
        guide_dim = getattr(guide, "latent_dim", latent_dim)
        if guide_dim != latent_dim:
            raise ValueError(f"the guide has latent_dim={guide_dim}, the model {latent_dim}")
        self.guide: Any = guide
        self._config: dict[str, Any] | None = None

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
            z = pyro.sample("z", dist.Normal(like.new_zeros(self.latent_dim), 1.0).to_event(1))
            if mask is not None and x is not None:
                # NaN under a mask would still poison the gradient.
                x = torch.where(mask, x, 0.0)
            given = self._given(z.to(like.dtype), x, None if x is None else mask, observe)
            return pyro.sample("x", given, obs=x if observe else None)

    def _like(self) -> Tensor:
        return next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))

    def _given(
        self, z: Float[Tensor, "*B K"], x: Tensor | None, mask: Tensor | None, observe: bool
    ) -> Density:
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

    @torch.no_grad()
    def center(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Self:
        """Set the decoder's output bias so that training starts about the means of x's columns.

        Where the decoder's last weights add nothing, the mean of p(x | z) is that of the column.

        Args:
            x: (N, D); NaN is a hole.
            mask: True where observed.

        Returns:
            The VAE itself.

        Raises:
            TypeError: if the decoder does not end in a layer with a bias for each output.
            ValueError: if x is not in the likelihood's support, or a column has nothing observed.
        """
        x, mask = as_observed(x, mask, model=self.model)
        self.check_data(x, mask)
        width = self.data_dim * self.likelihood.outputs_per_dim
        output_bias(self.decoder, width).copy_(self.likelihood.start(x, mask))
        return self

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "*B K"]) -> Density:
        """p(x | z), event shape (D,)."""
        return self._given(z.to(self._like()), None, None, False)

    @torch.no_grad()
    def sample(self, num_samples: int, *, seed: int | None = None) -> Float[Tensor, "S D"]:
        """Draws from p(x): z from the prior, then x given z."""
        shape = (at_least("num_samples", num_samples), self.latent_dim)
        with seeded(seed):
            return self.decode(torch.randn(shape).to(self._like())).sample()

    @torch.no_grad()
    def reconstruct(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Float[Tensor, "N D"]:
        """The mean of p(x | z) at the mean of q(z | x), in holes too.

        (The mean of a hole given its row is another number: :func:`ppl_vae.impute`.)

        Args:
            x: (N, D); NaN is a hole.
            mask: True where observed.

        Raises:
            ValueError: if x has another width, or a row with nothing observed.
        """
        x, mask = as_observed(x, mask, model=self.model, guide=self.guide)
        holes = accepted(self.guide, {"mask": mask})
        with isolated_store(), probing(self.guide):
            q = poutine.trace(self.guide).get_trace(x, **holes).nodes["z"]["fn"]
        return self._given(q.mean.to(x), x, mask, False).mean


def _refuse_taken(**parts: Any) -> None:
    for name, part in parts.items():
        if isinstance(part, PyroModule) and "." in part._pyro_name:
            raise ValueError(
                f"{name} belongs to another model already, and would no longer train there; "
                "pass a new one, or copy.deepcopy of it"
            )
