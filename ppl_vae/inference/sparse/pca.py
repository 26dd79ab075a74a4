"""PCA as the optimal linear autoencoder, and the Gaussian that a linear autoencoder implies."""

import math
import time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_vae.core.arrays.inputs import as_data_and_mask, learn_schema
from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.state import threads
from ppl_vae.core.validation import ArrayLike
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.likelihoods.gaussian import Gaussian, NormalLikelihood
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.linear.sufficient_statistics import SampleCovariance
from ppl_vae.models.ppca import PPCA
from ppl_vae.networks.sparse_layers import NormalizedColumns, TiedEncoder

ROUNDING_SHARE = 1e-10
"""A squared error below this share of the variance consists of rounding errors, not of noise."""


@threads(1)  # see summarize
@torch.no_grad()
def fit_pca(autoencoder: Autoencoder, x: ArrayLike) -> FitResult:
    """Set a linear autoencoder to PCA, which minimizes the squared error.

    With u_k the eigenvectors of the K largest eigenvalues of the sample covariance,
    f(x) = U'(x - mean) and G(z) = U z + mean: the rank-K projection. Its mean squared error is the
    sum of the other eigenvalues, l_{K+1} + ... + l_D.

    Args:
        autoencoder: made by :meth:`ppl_vae.Autoencoder.linear`, tied or not, with any ``columns``,
            a flat prior and a ``Gaussian`` of fixed scale; set in place.
        x: complete data, (N, D).

    Returns:
        Its ``objective`` is log p(x | f(x)) in nats per datum, that is minus half the squared
        error divided by sigma^2, less a constant. It is no bound on log p(x).

    Raises:
        ValueError: if the autoencoder is of another kind, if x has NaN or another number of
            columns than the autoencoder, or if K is larger than the rank of the centred data.

    References:
        Bourlard, Kamp: Auto-association by multilayer perceptrons and singular value
        decomposition (1988); Baldi, Hornik: Neural networks and principal component analysis
        (1989).
    """
    start_time = time.perf_counter()
    decoder, encoder = _linear_layers(autoencoder)
    scale: Any = autoencoder.likelihood.scale
    blocks = RowBlocks(x, schema=autoencoder.schema)
    covariance = SampleCovariance.of(blocks)
    data_dim, k = autoencoder.data_dim, autoencoder.latent_dim
    if covariance.data_dim != data_dim:
        raise ValueError(f"x has {covariance.data_dim} columns, the autoencoder {data_dim}")
    values, vectors = covariance.eigh()
    if k > (rank := covariance.rank()):
        raise ValueError(f"latent_dim={k} is larger than the rank of the centred data, {rank}")
    _assign(decoder, encoder, vectors[:, :k], covariance.mean)
    learn_schema(autoencoder, blocks.schema)
    squared_error = (covariance.trace - values[:k].sum()).clamp(min=0)
    constant = data_dim / 2 * math.log(2 * math.pi * scale**2)
    seconds = time.perf_counter() - start_time
    return FitResult(
        algorithm="PCA",
        objective=(-squared_error / (2 * scale**2) - constant).reshape(1),
        elapsed=torch.tensor([seconds]),
        steps=1,
        seconds=seconds,
        stopped="exact",
        notes=blocks.notes() + covariance.columns.notes(),
    )


def _linear_layers(autoencoder: Autoencoder) -> tuple[Any, Any]:
    networks: Any = autoencoder.decoder, autoencoder.encoder
    if any(not isinstance(network, nn.Sequential) or len(network) != 1 for network in networks):
        raise ValueError(
            "autoencoder must be linear, as Autoencoder.linear makes it: one affine map each way"
        )
    (decoder,), (encoder,) = networks
    if not isinstance(decoder, nn.Linear | NormalizedColumns) or not isinstance(
        encoder, nn.Linear | TiedEncoder
    ):
        raise ValueError("autoencoder must be linear, as Autoencoder.linear makes it")
    likelihood = autoencoder.likelihood
    fixed = isinstance(likelihood, Gaussian) and likelihood.kind == "fixed"
    if autoencoder.prior_kind != "flat" or not fixed:
        raise ValueError(
            "PCA minimises the squared error alone: autoencoder must have prior='flat' and a "
            f"Gaussian of fixed scale; it has prior={autoencoder.prior_kind!r} and {likelihood}"
        )
    if autoencoder.guide.inputs is not None:
        raise ValueError(
            "the encoder of the autoencoder must take x itself, and takes transformed inputs: "
            f"{autoencoder.guide.inputs}; make it with inputs='identity'"
        )
    return decoder, encoder


def _assign(
    decoder: Any, encoder: Any, axes: Float[Tensor, "D K"], mean: Float[Tensor, " D"]
) -> None:
    weights = decoder.free if isinstance(decoder, NormalizedColumns) else decoder.weight
    weights.copy_(axes)
    decoder.bias.copy_(mean)
    if isinstance(encoder, nn.Linear):
        encoder.weight.copy_(axes.mT)
        encoder.bias.copy_(-axes.mT @ mean)


@torch.no_grad()
def implied_gaussian(
    autoencoder: Autoencoder, x: ArrayLike, *, mask: ArrayLike | None = None
) -> PPCA:
    """The Gaussian that an autoencoder with a linear decoder implies for data.

    An autoencoder has no density of its own. Here its reconstruction error is modelled as noise,
    with sigma^2 the mean squared residual of an observed entry, and its codes as a Gaussian with
    their mean m and covariance C over the data. With G(z) = W z + b this is the PPCA model

        x ~ N(W m + b, W C W' + sigma^2 I).

    For PCA it has a lower likelihood than PPCA's closed form, although it has the same axes: the
    codes are treated as exact, so that the noise is counted twice along the K axes and is spread
    over D dimensions instead of D - K. With eigenvalues l_i its mean log p is

        -1/2 (D log 2 pi + sum_{i<=K} [log(l_i + s2) + l_i / (l_i + s2)] + (D-K) log s2 + D),

    s2 = sum_{i>K} l_i / D, on the data it was fitted to.

    Args:
        autoencoder: with a decoder that is an affine map, and any encoder.
        x: the training rows, (N, D); NaN marks a missing value.
        mask: True where observed.

    Returns:
        The model, in float64; its ``loadings`` are W C^(1/2).

    Raises:
        ValueError: if the decoder is no affine map, if its likelihood is no Gaussian, or if x is
            reproduced exactly, so that no noise is left.

    References:
        Ghosh, Sajjadi, Vergari, Black, Schölkopf: From variational to deterministic autoencoders
        (2020), on densities of codes estimated after training.
    """
    x, mask = as_data_and_mask(x, mask, model=autoencoder.model, guide=autoencoder.guide)
    weights, offset = _affine_decoder(autoencoder)
    codes = autoencoder.features(x, mask=mask).double()
    observed = torch.ones_like(x) if mask is None else mask.to(x)
    residuals = (x.double() - codes @ weights.mT - offset) * observed
    variance = residuals.square().sum() / observed.sum()
    centred = (x.double() - (x * observed).sum(0) / observed.sum(0)) * observed
    if not variance > ROUNDING_SHARE * centred.square().sum() / observed.sum():
        raise ValueError(
            f"the autoencoder, of latent_dim={autoencoder.latent_dim}, reproduces x without an "
            "error: the Gaussian it implies has no noise and is singular; take a smaller "
            "latent_dim"
        )
    covariance = codes.mT.cov(correction=0).reshape(autoencoder.latent_dim, -1)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()
    loc = weights @ codes.mean(0) + offset
    return PPCA.from_parameters(weights @ root, loc, variance.sqrt())


def _affine_decoder(
    autoencoder: Autoencoder,
) -> tuple[Float[Tensor, "D K"], Float[Tensor, " D"]]:
    # W and b, from the decoder's outputs at 0 and at the unit vectors; the outputs at other codes
    # show whether the decoder is affine.
    likelihood = autoencoder.likelihood
    if not isinstance(likelihood, NormalLikelihood) or likelihood.kind == "network":
        raise ValueError(
            "the implied Gaussian needs a Gaussian likelihood whose sigma is no network's output; "
            f"the autoencoder has {likelihood}"
        )
    k, decoder = autoencoder.latent_dim, autoencoder.decoder
    like = next(autoencoder.parameters())
    unit = torch.eye(k, dtype=like.dtype, device=like.device)
    probes = torch.cat(
        [torch.zeros(1, k).to(like), unit, 2 * unit, -unit, 3 * unit.flip(0) - unit]
    )
    outputs: Tensor = decoder(probes)
    offset, weights = outputs[0], (outputs[1 : k + 1] - outputs[0]).mT
    deviation = (outputs - probes @ weights.mT - offset).abs().max()
    if deviation > 1e3 * torch.finfo(like.dtype).eps * (1 + outputs.abs().max()):
        raise ValueError(
            "the decoder must be an affine map W z + b; its outputs differ from the affine map "
            f"fitted to them by up to {float(deviation):.3g}"
        )
    return weights.double(), offset.double()
