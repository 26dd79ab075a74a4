"""The unit in which the squares of all entries of a table are in the range of float64."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.magnitude import MAX_MAGNITUDE, check_magnitude

SMALLEST_MAXIMUM = 1e-60
"""Tables whose largest absolute value is below this, or above its inverse, are rescaled."""


def unit_of(x: Float[Tensor, "B D"]) -> float:
    """The divisor of a table.

    It is the power of two next to the largest absolute value, if squares of such values, summed
    over many rows, could overflow or underflow; else 1.

    Raises:
        ValueError: if no unit suits all columns.
    """
    values = x.detach()
    if bool((ends := torch.stack(values.aminmax())).isfinite().all()):
        largest = float(ends.abs().max())  # one pass if no value is missing
    else:
        sizes = values.double().abs()
        largest = float(sizes.where(sizes.isfinite(), 0.0).max())
    if largest == 0 or SMALLEST_MAXIMUM < largest < 1 / SMALLEST_MAXIMUM:
        return 1.0
    _check_common_unit(values)
    return math.ldexp(1.0, max(min(math.frexp(largest)[1], 1000), -1000))


def _check_common_unit(x: Float[Tensor, "B D"]) -> None:
    """Check that the squares of all columns are in the range of float64 in one unit.

    Raises:
        ValueError: naming the row and the column of the first entry that is too large.
    """
    sizes = x.double().abs().nan_to_num(0.0, posinf=0.0)
    columns = sizes.amax(0)
    varied = columns[columns > 0]
    if float(varied.max() / varied.min()) > MAX_MAGNITUDE:
        check_magnitude(x)
