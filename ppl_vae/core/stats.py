"""The mean of independent values and its standard error, and the least effective sample size."""

import math

from jaxtyping import Float
from torch import Tensor

ESS_FLOOR = 10.0
"""Estimates from weighted draws with a smaller effective sample size are called unreliable."""


def standard_error(values: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch"]:
    """The standard error of the mean along the last dimension: s / sqrt(N), s with N - 1.

    It is NaN for a single value.
    """
    return values.std(-1) / math.sqrt(values.shape[-1])


def mean_and_error(values: Float[Tensor, " N"]) -> tuple[float, float]:
    """The mean of N independent values and its :func:`standard_error`."""
    return float(values.mean()), float(standard_error(values))


def monte_carlo_error(errors: Float[Tensor, " N"]) -> float:
    """The error of the mean of N estimates with independent errors."""
    return float(errors.square().sum().sqrt()) / len(errors)
