"""The mean of values over data and its standard error."""

import math

from jaxtyping import Float
from torch import Tensor


def mean_and_error(values: Float[Tensor, " N"]) -> tuple[float, float]:
    """The mean and its standard error, sd / sqrt(N) with N - 1 in the variance.

    The error is NaN for a single value.
    """
    spread = values.std() if len(values) > 1 else math.nan
    return float(values.mean()), float(spread) / math.sqrt(len(values))
