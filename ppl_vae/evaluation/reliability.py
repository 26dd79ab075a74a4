"""Whether an importance-sampling estimate may be believed."""

import numpy as np
import torch
from arviz_stats.base.array import array_stats
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.results import ESS_FLOOR

FEWEST_DRAWS = 25
"""Fewer draws are too few to tell."""
CONSTANT_SPREAD = 1e-2
"""Log weights within so many nats are constant up to rounding, and every estimate is fine."""


def effective_sample_size(log_weights: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    """(sum w)^2 / sum w^2 a datum, between 1 and S."""
    return torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))


def k_hat(log_weights: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    """The Pareto tail index of the weights a datum; the weights have 1 / k finite moments.

    0 where the weights are constant up to rounding; NaN with fewer than 25 draws or where no
    tail can be fitted.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry: Pareto smoothed importance sampling (2024).
    """
    weights = log_weights.detach().double().cpu().numpy()
    with np.errstate(invalid="ignore"):  # weights of zero
        constant = np.ptp(weights, axis=0) < CONSTANT_SPREAD
    values = [0.0 if c else _k_hat(w) for w, c in zip(weights.T, constant, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def _k_hat(log_weights: np.ndarray) -> float:
    if len(log_weights) < FEWEST_DRAWS:
        return float("nan")
    with np.errstate(all="ignore"):
        try:
            # arviz takes log-likelihoods here, whose importance weights are their reciprocals.
            return float(array_stats.psislw(log_weights.max() - log_weights)[1])
        except ValueError:  # a tail of equal weights
            return float("nan")


def largest_k_hat(num_samples: int) -> float:
    """Up to which k-hat S weights may be believed: min(1 - 1 / log10 S, 0.7)."""
    return float(min(1 - 1 / np.log10(num_samples), 0.7))


def is_reliable(log_weights: Float[Tensor, "S N"], k: Float[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """The verdict a datum.

    Constant weights (two at least) are reliable; otherwise at least 25 draws, k-hat at most
    :func:`largest_k_hat`, and an effective sample size of at least 10.
    """
    spread = log_weights.amax(0) - log_weights.amin(0)
    num_samples = len(log_weights)
    if num_samples == 1:
        return torch.zeros(spread.shape, dtype=torch.bool)
    if num_samples < FEWEST_DRAWS:
        return (spread < CONSTANT_SPREAD).cpu()
    tame = k.to(spread.device) <= largest_k_hat(num_samples)
    # k-hat calls one single huge weight fine; its effective sample size of 1 says what it is.
    enough = (effective_sample_size(log_weights) >= ESS_FLOOR) & tame
    return ((spread < CONSTANT_SPREAD) | enough).cpu()
