"""An autoencoder as the limit of a VAE whose posterior standard deviation goes to zero."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.results import Result
from ppl_vae.core.state import isolated_store, seeded, train_mode
from ppl_vae.core.text_table import render
from ppl_vae.core.traces import PairTraces, log_prob, sites
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.guides.guides import AmortizedGuide
from ppl_vae.models.autoencoder import Autoencoder, refuse_patch_masking
from ppl_vae.networks.mlp_conv import FixedScaleEncoder
from ppl_vae.objectives.bounds import elbo

SCALES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)


@dataclass(frozen=True, repr=False)
class VAELosses(Result):
    """The loss of a VAE with q = N(f(x), s^2 I) and its terms, for several s, in nats per datum.

    Attributes:
        scales: s, the standard deviations of q, (T,).
        loss: -ELBO, (T,); it is not a bound on -log p(x) if the prior is flat.
        reconstruction: E_q[-log p(x | z)], (T,).
        cross_entropy: E_q[-log p(z)], (T,).
        entropy: H[q], (T,).
    """

    scales: Float[Tensor, " T"]
    loss: Float[Tensor, " T"]
    reconstruction: Float[Tensor, " T"]
    cross_entropy: Float[Tensor, " T"]
    entropy: Float[Tensor, " T"]

    @property
    def without_entropy(self) -> Float[Tensor, " T"]:
        """E_q[-log p(x, z)], the loss of the VAE without the entropy of q."""
        return self.reconstruction + self.cross_entropy


@dataclass(frozen=True, repr=False)
class VAELimit(VAELosses):
    """Losses of the same networks as a VAE with q = N(f(x), s^2 I), and as an autoencoder.

        -ELBO = E_q[-log p(x | z)] + E_q[-log p(z)] - H[q],    H[q] = K/2 log(2 pi e s^2)

    As s goes to zero the first two terms converge to -log p(x, f(x)), the loss of the autoencoder.
    H[q], which does not depend on any parameter, goes to minus infinity, the entropy of a point
    mass. All values are in nats per datum.

    Attributes:
        scales, loss, reconstruction, cross_entropy, entropy: as in
            :class:`ppl_vae.evaluation.latent_space.vae_limit.VAELosses`.
        autoencoder: -log p(x, f(x)), the loss of the autoencoder, ().
        autoencoder_reconstruction: the part -log p(x | f(x)) of it, ().
    """

    autoencoder: Float[Tensor, ""]
    autoencoder_reconstruction: Float[Tensor, ""]

    @property
    def difference(self) -> Float[Tensor, " T"]:
        """The excess of ``without_entropy`` over the loss of the autoencoder."""
        return self.without_entropy - self.autoencoder

    def __repr__(self) -> str:
        titles = ("sigma_q", "-ELBO", "-log p(x|z)", "-log p(z)", "-H[q]", "above the autoencoder")
        columns = (self.loss, self.reconstruction, self.cross_entropy, -self.entropy)
        rows = [
            (f"{scale:g}", *(f"{value:.4f}" for value in values), f"{excess:.2g}")
            for scale, *values, excess in zip(self.scales, *columns, self.difference, strict=True)
        ]
        reconstruction = self.autoencoder_reconstruction
        code = self.autoencoder - reconstruction
        point = ("point", "", f"{reconstruction:.4f}", f"{code:.4f}", "", f"{0:g}")
        lines = ["one pair of networks as a VAE, q = N(f(x), sigma_q^2 I), and as an autoencoder"]
        return "\n".join([*lines, render([*rows, point], titles, indent="  ")])


@torch.no_grad()
def vae_limit(
    autoencoder: Autoencoder,
    x: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    scales: Iterable[float] = SCALES,
    num_samples: int = 100,
    seed: int | None = None,
) -> VAELimit:
    """Evaluate the networks of an autoencoder as a VAE whose q has a fixed standard deviation.

    With ``prior="normal"`` and s = 1 the KL is |f(x)|^2 / 2: the VAE with q = N(f(x), I) is the
    autoencoder with a squared penalty on its codes and Gaussian noise added to them in training.
    The networks are not trained here and see uncorrupted data;
    :meth:`ppl_vae.Autoencoder.as_vae` returns such a VAE for training.

    Args:
        autoencoder: an autoencoder with an encoder network.
        x: (N, D); NaN marks a missing value.
        mask: True where x is observed.
        scales: standard deviations of q.
        num_samples: draws of z per datum; the same noise is used for every scale.
        seed: seed of the draws.

    Raises:
        TypeError: if the guide has no encoder.
        ValueError: if data are invalid, there is no scale or one is not positive, or the
            autoencoder hides patches.
    """
    scales = list(scales)
    if not scales:
        raise ValueError("scales must hold at least one standard deviation of q; it is empty")
    check_int("num_samples", num_samples)
    refuse_patch_masking(autoencoder)
    pair = Pair(autoencoder.model, autoencoder.guide)
    data = pair.observe(x, mask)
    pair.check_support(data)
    codes = autoencoder.features(data.x, mask=data.mask)
    log_prior = autoencoder.prior().log_prob(codes).mean()
    loss = -elbo(pair.model, pair.guide, data.x, mask=data.mask).mean()
    terms = torch.stack([_terms(autoencoder, data, s, num_samples, seed) for s in scales])
    scale = torch.tensor(scales).to(terms)
    entropy = autoencoder.latent_dim / 2 * (math.log(2 * math.pi * math.e) + 2 * scale.log())
    return VAELimit(
        scales=scale,
        loss=terms.sum(1) - entropy,
        reconstruction=terms[:, 0],
        cross_entropy=terms[:, 1],
        entropy=entropy,
        autoencoder=loss,
        autoencoder_reconstruction=loss + log_prior,
    )


def _terms(
    autoencoder: Autoencoder, data: Batch, scale: float, num_samples: int, seed: int | None
) -> Float[Tensor, " 2"]:
    # The means of -log p(x | z) and -log p(z).
    encoder = FixedScaleEncoder(autoencoder.encoder, scale)
    point, size = autoencoder.guide, autoencoder.latent_dim
    guide = AmortizedGuide(encoder, size, missing=point.missing, inputs=point.inputs)
    pair = Pair(autoencoder.model, guide)
    with isolated_store(), seeded(seed), train_mode(autoencoder, training=False):
        run = pair.run(data, num_samples=num_samples, dim=pair.sample_dim(data))
        return torch.stack([_mean_loss(run, name) for name in ("x", "z")])


def _mean_loss(run: PairTraces, name: str) -> Tensor:
    site = sites(run.model)[name]
    return -run.per_datum(site, log_prob(site)).mean()
