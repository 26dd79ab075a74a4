"""The tail index of weights, by a generalised Pareto distribution fitted to the largest ones.

The distribution of the excess of a weight over a cutoff, with k its tail index, has 1 / k finite
moments. Of S weights, the largest min(S / 5, 3 sqrt(S)) are fitted, with a weak prior on k. The
estimate is that of ``arviz_stats.array_stats.psislw``, which takes one datum at a time, smooths
the weights as well, and takes more than a second to import.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

QUARTILE_SCALE = 3
"""The standard deviation of the prior of Zhang and Stephens, in inverse quartiles."""
PRIOR_INDEX, PRIOR_SIZE = 0.5, 10
"""The mean of the prior of k, and the number of weights that it counts as."""
NEGLIGIBLE = 10 * torch.finfo(torch.float64).eps
"""The probability below which a value of the scale is left out of its posterior mean."""


def tail_size(num_weights: int) -> int:
    """The number of weights that the distribution is fitted to."""
    return math.floor(3 * math.sqrt(num_weights)) if num_weights > 225 else num_weights // 5


def tail_index(ordered: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    """k of each datum; NaN where the tail consists of equal weights.

    Args:
        ordered: log weights in ascending order, in float64, of at least 25 draws.

    References:
        Zhang, Stephens: A new and efficient estimation method for the generalized Pareto
        distribution (2009). Vehtari, Simpson, Gelman, Yao, Gabry: Pareto smoothed importance
        sampling (2024).
    """
    largest = (ordered[-tail_size(len(ordered)) - 1 :] - ordered[-1]).mT
    weights = largest.exp()
    excess = weights[:, 1:] - weights[:, :1]
    equal = largest[:, -1] - largest[:, 1] < torch.finfo(torch.float64).tiny
    return _shape(excess).masked_fill(equal, math.nan)


def _shape(excess: Float[Tensor, "N M"]) -> Float[Tensor, " N"]:
    # With b = -k / scale, the profile likelihood of b is averaged over a grid.
    size = excess.shape[1]
    grid_size = 30 + math.isqrt(size)
    position = torch.arange(1, grid_size + 1, dtype=excess.dtype, device=excess.device)
    grid = 1 - (grid_size / (position - 0.5)).sqrt()
    quartile = excess[:, int(size / 4 + 0.5) - 1, None]
    b = grid / (QUARTILE_SCALE * quartile) + 1 / excess[:, -1:]
    k = torch.log1p(-b[:, :, None] * excess[:, None]).mean(2)
    profile = size * ((-b / k).log() - k - 1)
    probability = torch.softmax(profile, 1)
    kept = probability >= NEGLIGIBLE
    total = probability.where(kept, 0.0).sum(1)
    mean = (b * probability).where(kept, 0.0).sum(1) / total.where(total > 0, 1.0)
    index = torch.log1p(-mean[:, None] * excess).mean(1)
    return (size * index + PRIOR_SIZE * PRIOR_INDEX) / (size + PRIOR_SIZE)
