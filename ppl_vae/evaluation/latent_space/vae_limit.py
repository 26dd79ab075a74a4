"""An autoencoder seen again as a VAE: what is left of the loss as q's width goes to zero."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import as_data_and_mask, check_support
from ppl_vae.core.results import Result, aligned
from ppl_vae.core.state import isolated_store, mode, seeded
from ppl_vae.core.traces import PairTraces, log_prob, sites
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.guides.guides import AmortizedGuide
from ppl_vae.models.autoencoder import Autoencoder, refuse_hiding
from ppl_vae.networks.mlp_conv import FixedScaleEncoder
from ppl_vae.objectives.bounds import elbo

SCALES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)


@dataclass(frozen=True, repr=False)
class VAELimit(Result):
    """Losses of one pair of networks as a VAE with q = N(f(x), s^2 I), and as an autoencoder.

        -ELBO = E_q[-log p(x | z)] + E_q[-log p(z)] - H[q],    H[q] = K/2 log(2 pi e s^2)

    As s goes to zero the first two terms go to -log p(x, f(x)), the autoencoder's loss. H[q], in
    which no parameter stands, goes to minus infinity: that of a point.

    Attributes:
        scales: s, standard deviations of q, (T,).
        loss: -ELBO in nats per datum, (T,); of a flat prior no bound.
        reconstruction: E_q[-log p(x | z)], (T,).
        code: E_q[-log p(z)], (T,).
        entropy: H[q], (T,).
        autoencoder: -log p(x, f(x)) in nats per datum, ().
        point_reconstruction: its part -log p(x | f(x)), ().
    """

    scales: Float[Tensor, " T"]
    loss: Float[Tensor, " T"]
    reconstruction: Float[Tensor, " T"]
    code: Float[Tensor, " T"]
    entropy: Float[Tensor, " T"]
    autoencoder: Float[Tensor, ""]
    point_reconstruction: Float[Tensor, ""]

    @property
    def without_entropy(self) -> Float[Tensor, " T"]:
        """E_q[-log p(x, z)]: the VAE's loss less the part that no parameter moves."""
        return self.reconstruction + self.code

    @property
    def difference(self) -> Float[Tensor, " T"]:
        """By how much that is above the autoencoder's loss, in nats per datum."""
        return self.without_entropy - self.autoencoder

    def __repr__(self) -> str:
        titles = ("sigma_q", "-ELBO", "-log p(x|z)", "-log p(z)", "-H[q]", "above the autoencoder")
        columns = (self.loss, self.reconstruction, self.code, -self.entropy)
        rows = [
            (f"{scale:g}", *(f"{value:.4f}" for value in values), f"{above:.2g}")
            for scale, *values, above in zip(self.scales, *columns, self.difference, strict=True)
        ]
        first, code = self.point_reconstruction, self.autoencoder - self.point_reconstruction
        point = ("point", "", f"{first:.4f}", f"{code:.4f}", "", f"{0:g}")
        lines = ["one pair of networks as a VAE, q = N(f(x), sigma_q^2 I), and as an autoencoder"]
        return "\n".join([*lines, *(f"  {line}" for line in aligned([titles, *rows, point]))])


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
    """The loss of an autoencoder's networks as those of a VAE whose q has a fixed width.

    With ``prior="normal"`` and s = 1 the KL is |f(x)|^2 / 2: the VAE with q = N(f(x), I) *is* the
    autoencoder that is penalised for long codes, with noise on its code while it trains. The
    networks are evaluated as they are, uncorrupted; :meth:`ppl_vae.Autoencoder.as_vae` gives such
    a VAE to train.

    Args:
        autoencoder: with an encoder.
        x: (N, D); NaN marks a missing value.
        mask: True where observed.
        scales: standard deviations of q.
        num_samples: draws of z per datum; the same noise is used for each scale.
        seed: of the draws.

    Raises:
        TypeError: if the guide has no encoder.
        ValueError: bad data, no scale, or one that is not positive; if patches are hidden.
    """
    scales = list(scales)
    if not scales:
        raise ValueError("scales must hold at least one standard deviation of q; it is empty")
    check_int("num_samples", num_samples)
    refuse_hiding(autoencoder)
    x, mask = as_data_and_mask(x, mask, model=autoencoder.model, guide=autoencoder.guide)
    check_support(autoencoder.model, x, mask)
    pair, codes = (autoencoder.model, autoencoder.guide), autoencoder.features(x, mask=mask)
    loss = -elbo(*pair, x, mask=mask).mean()
    code = -autoencoder.prior().log_prob(codes).mean()
    found = torch.stack([_terms(autoencoder, x, mask, s, num_samples, seed) for s in scales])
    width = torch.tensor(scales).to(found)
    entropy = autoencoder.latent_dim / 2 * (math.log(2 * math.pi * math.e) + 2 * width.log())
    return VAELimit(
        scales=width,
        loss=found.sum(1) - entropy,
        reconstruction=found[:, 0],
        code=found[:, 1],
        entropy=entropy,
        autoencoder=loss,
        point_reconstruction=loss - code,
    )


def _terms(
    autoencoder: Autoencoder,
    x: Tensor,
    mask: Tensor | None,
    scale: float,
    num_samples: int,
    seed: int | None,
) -> Float[Tensor, " 2"]:
    # Minus the means of log p(x | z) and log p(z).
    spread = FixedScaleEncoder(autoencoder.encoder, scale)
    own, size = autoencoder.guide, autoencoder.latent_dim
    guide = AmortizedGuide(spread, size, missing=own.missing, inputs=own.inputs)
    pair, batch = Pair(autoencoder.model, guide), Batch(x, mask)
    with isolated_store(), seeded(seed), mode(autoencoder, training=False):
        run = pair.run(batch, num_samples=num_samples, dim=pair.sample_dim(batch))
        return torch.stack([_mean(run, name) for name in ("x", "z")])


def _mean(run: PairTraces, name: str) -> Tensor:
    site = sites(run.model)[name]
    return -run.per_datum(site, log_prob(site)).mean()
