"""The calibrated map from the pooled tail index of the weights to the coverage of the intervals.

Two functions of the numbers of draws and of data pooled, the tail index at which coverage is
90 % and the scale of its decrease, were fitted to the grid
that ``docs/reliability.md`` describes.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LIMIT_MARGIN = 0.03
"""The sampling error of a tail index that is pooled over a few hundred data."""
MAX_TAIL_INDEX = 0.7
"""Above this tail index the mean weight converges too slowly for any practical S."""


def largest_tail_index(num_samples: int, size: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The largest pooled tail index with which estimates are reliable; it is at most 0.7.

    It is below the index at which 95 % intervals are expected to cover with 90 %, by a margin for
    sampling errors.

    Args:
        num_samples: draws per datum, S.
        size: the effective number of data over which the index was pooled.
    """
    return (_crossing(num_samples, size) - LIMIT_MARGIN).clamp(max=MAX_TAIL_INDEX)


def expected_coverage(
    tail_index: Float[Tensor, " N"], num_samples: int, size: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """The expected coverage of 95 % intervals, 0.95 - 0.05 exp((k - crossing) / width).

    It decreases in the pooled tail index k and is 0.9 at the crossing. Above the crossing it is
    not used: guides with the same tail index differ widely there.

    Args:
        tail_index: the pooled tail index k.
        num_samples, size: as in :func:`largest_tail_index`.
    """
    draws, pooled = _coordinates(num_samples, size)
    width = (-0.054 - 1.137 * pooled - 0.803 * draws).exp()
    beyond = (tail_index - _crossing(num_samples, size)) / width
    return 0.95 - 0.05 * beyond.clamp(max=math.log(9)).exp()


def _crossing(num_samples: int, size: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The pooled tail index at which the expected coverage is 0.9."""
    draws, pooled = _coordinates(num_samples, size)
    return -0.119 + 0.242 * draws + 0.681 * pooled - 0.065 * draws * pooled - 0.159 * pooled**2


def _coordinates(num_samples: int, size: Float[Tensor, " N"]) -> tuple[Tensor, Tensor]:
    """log10(S / 100) and log10 of the data pooled, clamped to the range of the calibration."""
    draws = torch.tensor(num_samples / 100).double().log10().clamp(-0.602, 2.0)
    return draws, size.log10().clamp(0.0, 2.0)
