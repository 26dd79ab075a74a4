"""Operations on all rows of a block in pieces that stay in a processor's cache.

Each of several operations on a large block would read all of it from memory, which the processes
of one machine share.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

PIECE_FLOATS = 2**16
"""The number of floats of a piece (512 KiB in float64)."""


def to_float64(
    x: Float[Tensor, "B D"],
    device: Any = None,
    unit: float = 1.0,
    memory: Float[Tensor, "_ D"] | None = None,
) -> tuple[Float[Tensor, "B D"], Float[Tensor, " D"]]:
    """The rows of x in float64, divided by ``unit``, and the sums of their columns.

    Args:
        x: the rows.
        device: the device of the result; that of x by default.
        unit: the divisor.
        memory: where to write the result, if x must be copied and the result fits.
    """
    x = x.detach().to(device=device)
    if x.device.type != "cpu" or (x.dtype == torch.float64 and unit == 1):
        values = x.double()
        values = values if unit == 1 else values / unit
        return values, values.sum(0)
    fits = memory is not None and len(memory) >= len(x)
    values = (
        memory[: len(x)]
        if fits and memory is not None
        else torch.empty_like(x, dtype=torch.float64)
    )
    totals = values.new_zeros(values.shape[1])
    for given, piece in zip(_pieces(x), _pieces(values), strict=True):
        piece.copy_(given)
        if unit != 1:
            piece.div_(unit)
        totals += piece.sum(0)
    return values, totals


def is_copy(values: Float[Tensor, "B D"], x: Float[Tensor, "B D"]) -> bool:
    """Whether values on a CPU are in other memory than x."""
    on_cpu = values.device.type == "cpu"
    return on_cpu and (x.device != values.device or x.data_ptr() != values.data_ptr())


def centre(
    values: Float[Tensor, "B D"], mean: Float[Tensor, " D"], out: Float[Tensor, "B D"]
) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Subtract the mean of each column; returns the smallest and the largest values.

    Args:
        values: the rows.
        mean: what to subtract.
        out: where to write the differences.
    """
    if values.device.type != "cpu":
        torch.sub(values, mean, out=out)
        return values.amin(0), values.amax(0)
    low, high = values[0].clone(), values[0].clone()
    for piece, centred in zip(_pieces(values), _pieces(out), strict=True):
        torch.sub(piece, mean, out=centred)
        torch.minimum(low, piece.amin(0), out=low)
        torch.maximum(high, piece.amax(0), out=high)
    return low, high


def _pieces(x: Float[Tensor, "B D"]) -> tuple[Tensor, ...]:
    return x.split(max(1, PIECE_FLOATS // max(1, x.shape[1])))
