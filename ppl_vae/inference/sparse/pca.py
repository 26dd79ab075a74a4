"""PCA as the best linear autoencoder, and the Gaussian that a linear autoencoder implies."""

import math
import time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_vae.core.program import as_data_and_mask
from ppl_vae.core.results import FitResult
from ppl_vae.core.state import threads
from ppl_vae.core.validation import ArrayLike
from ppl_vae.likelihoods.gaussian import Gaussian, NormalLikelihood
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.sufficient_statistics import SampleCovariance
from ppl_vae.networks.sparse_layers import NormalizedColumns, TiedEncoder

ALMOST_NONE = 1e-10
"""Squared error below this share of the variance is rounding, and no noise."""


@threads(1)  # see summarize
@torch.no_grad()
def fit_pca(autoencoder: Autoencoder, x: ArrayLike) -> FitResult:
    """Set a linear autoencoder to PCA, the one of least squared error.

    With u_k the eigenvectors of the sample covariance of its K largest eigenvalues,
    f(x) = U'(x - mean) and G(z) = U z + mean: the rank-K projection. The squared error it leaves
    is the sum of the other eigenvalues, l_{K+1} + ... + l_D.

    Args:
        autoencoder: of :meth:`Autoencoder.linear`, tied or not, of any columns, with a flat prior
            and a ``Gaussian`` of fixed scale; set in place.
        x: complete data, (N, D).

    Returns:
        Its ``objective`` is log p(x | f(x)) in nats per datum, minus half the squared error over
        sigma^2 and a constant: no bound on log p(x).

    Raises:
        ValueError: if the autoencoder is another one, x has NaN or another width, or K is larger
            than the rank of the centred data.

    References:
        Bourlard, Kamp: Auto-association by multilayer perceptrons and singular value
        decomposition (1988); Baldi, Hornik: Neural networks and principal component analysis
        (1989).
    """
    began = time.perf_counter()
    decode, encode = _linear_parts(autoencoder)
    scale: Any = autoencoder.likelihood.scale
    covariance = SampleCovariance.of(x)
    data_dim, k = autoencoder.data_dim, autoencoder.latent_dim
    if covariance.data_dim != data_dim:
        raise ValueError(f"x has {covariance.data_dim} columns, the autoencoder {data_dim}")
    values, vectors = covariance.eigh()
    if k > (rank := covariance.rank()):
        raise ValueError(
            f"latent_dim={k} is more than x has axes: the rank of the centred data is {rank}"
        )
    _assign(decode, encode, vectors[:, :k], covariance.mean)
    left = (covariance.trace - values[:k].sum()).clamp(min=0)
    constant = data_dim / 2 * math.log(2 * math.pi * scale**2)
    seconds = time.perf_counter() - began
    return FitResult(
        algorithm="PCA",
        objective=(-left / (2 * scale**2) - constant).reshape(1),
        elapsed=torch.tensor([seconds]),
        steps=1,
        seconds=seconds,
        stopped="exact",
        notes=covariance.columns.notes(),
    )


def _linear_parts(autoencoder: Autoencoder) -> tuple[Any, Any]:
    networks: Any = autoencoder.decoder, autoencoder.encoder
    if any(not isinstance(network, nn.Sequential) or len(network) != 1 for network in networks):
        raise ValueError(
            "autoencoder must be linear, as Autoencoder.linear makes it: one affine map each way"
        )
    (decode,), (encode,) = networks
    if not isinstance(decode, nn.Linear | NormalizedColumns) or not isinstance(
        encode, nn.Linear | TiedEncoder
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
            "autoencoder must be given x itself, and is given another thing: "
            f"{autoencoder.guide.inputs}; make it with inputs='identity'"
        )
    return decode, encode


def _assign(
    decode: Any, encode: Any, axes: Float[Tensor, "D K"], mean: Float[Tensor, " D"]
) -> None:
    weights = decode.free if isinstance(decode, NormalizedColumns) else decode.weight
    weights.copy_(axes)
    decode.bias.copy_(mean)
    if isinstance(encode, nn.Linear):
        encode.weight.copy_(axes.mT)
        encode.bias.copy_(-axes.mT @ mean)


@torch.no_grad()
def implied_gaussian(
    autoencoder: Autoencoder, x: ArrayLike, *, mask: ArrayLike | None = None
) -> PPCA:
    """The Gaussian that an autoencoder with a linear decoder implies for data.

    An autoencoder has no density of its own. Its squared error is that of noise, whose best
    sigma^2 is the mean squared residual of a cell; and its codes are spread like a Gaussian of
    their mean m and covariance C over the data. With G(z) = W z + b this is the PPCA

        x ~ N(W m + b, W C W' + sigma^2 I).

    PCA's falls short of PPCA's closed form, although it has the same axes: codes are taken for
    exact, so that the noise is counted twice along the K axes, and spread over D dimensions
    where it lies in D - K. With eigenvalues l_i its mean log p is

        -1/2 (D log 2 pi + sum_{i<=K} [log(l_i + s2) + l_i / (l_i + s2)] + (D-K) log s2 + D),

    s2 = sum_{i>K} l_i / D, on the data it was fitted to.

    Args:
        autoencoder: with a decoder that is an affine map, and any encoder.
        x: the training rows, (N, D); NaN marks a missing value.
        mask: True where observed.

    Returns:
        The model, in float64; ``loadings`` are W C^(1/2).

    Raises:
        ValueError: if the decoder is no affine map, its likelihood no Gaussian, or x is reproduced
            without an error, so that no noise is left.

    References:
        Ghosh, Sajjadi, Vergari, Black, Schölkopf: From variational to deterministic autoencoders
        (2020), of the density of codes estimated afterwards.
    """
    x, mask = as_data_and_mask(x, mask, model=autoencoder.model, guide=autoencoder.guide)
    weights, offset = _affine(autoencoder)
    codes = autoencoder.features(x, mask=mask).double()
    seen = torch.ones_like(x) if mask is None else mask.to(x)
    residuals = (x.double() - codes @ weights.mT - offset) * seen
    variance = residuals.square().sum() / seen.sum()
    around = (x.double() - (x * seen).sum(0) / seen.sum(0)) * seen
    if not variance > ALMOST_NONE * around.square().sum() / seen.sum():
        raise ValueError(
            f"the autoencoder, of latent_dim={autoencoder.latent_dim}, reproduces x without an "
            "error: the Gaussian it implies has no noise, and is singular. Take fewer dimensions"
        )
    covariance = codes.mT.cov(correction=0).reshape(autoencoder.latent_dim, -1)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()
    loc = weights @ codes.mean(0) + offset
    return PPCA.from_parameters(weights @ root, loc, variance.sqrt())


def _affine(autoencoder: Autoencoder) -> tuple[Float[Tensor, "D K"], Float[Tensor, " D"]]:
    # W and b, read off the decoder's outputs; whether it has others is seen at other codes.
    if (
        not isinstance(autoencoder.likelihood, NormalLikelihood)
        or autoencoder.likelihood.kind == "network"
    ):
        raise ValueError(
            "the implied Gaussian is that of a Gaussian likelihood whose sigma is no network's; "
            f"the autoencoder has {autoencoder.likelihood}"
        )
    k, decoder = autoencoder.latent_dim, autoencoder.decoder
    like = next(autoencoder.parameters())
    unit = torch.eye(k).to(like)
    probes = torch.cat(
        [torch.zeros(1, k).to(like), unit, 2 * unit, -unit, 3 * unit.flip(0) - unit]
    )
    outputs: Tensor = decoder(probes)
    offset, weights = outputs[0], (outputs[1 : k + 1] - outputs[0]).mT
    off = (outputs - probes @ weights.mT - offset).abs().max()
    if off > 1e3 * torch.finfo(like.dtype).eps * (1 + outputs.abs().max()):
        raise ValueError(
            f"the decoder must be an affine map W z + b, and is none: it is {float(off):.3g} off"
        )
    return weights.double(), offset.double()
