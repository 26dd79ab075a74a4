"""A limit on the memory of tensors, checked before any of them is made."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SINGLE, TOTAL = 16, 256
"""Multiples of the number of elements that is expected: of one result, and of all together."""
SMALL, SMALL_TOTAL = 2**16, 2**22
"""Numbers of elements that are allowed in any case: of one result, and of all together."""
OPERATION = 1024
"""The number of elements that an operation counts for at least, so that they must end."""


class AllocationError(MemoryError):
    """More memory would be needed than the code inside an :class:`AllocationLimit` may take."""


class AllocationLimit(TorchDispatchMode):
    """Code inside makes tensors of a bounded size only: sizes are found before memory is taken.

    An operation whose result could be large is first evaluated for shapes alone (on torch's
    device ``"meta"``).

    Args:
        num_elements: the number of elements that the code is expected to need. A few times that
            number is allowed, for what it computes on the way.

    Raises:
        AllocationError: inside, at the first operation whose result would be too large.
    """

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.single = SINGLE * num_elements + SMALL
        self.remaining = TOTAL * num_elements + SMALL_TOTAL

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes longer than most loads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        bound = _largest_size(args, kwargs)
        if bound > self.single:
            self._count(func, _sizes(_without_memory(func, args, kwargs)))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self._count(func, _sizes(result))
        return result

    def _count(self, func: Any, sizes: list[int]) -> None:
        self.remaining -= max(sum(sizes), OPERATION)
        largest = max(sizes, default=0)
        if largest > self.single:
            raise AllocationError(
                f"{func} would make a tensor of {largest:,} elements, far more than are needed"
            )
        if self.remaining < 0:
            raise AllocationError("there are far more tensors than are needed")


def _largest_size(args: Any, kwargs: Any) -> int:
    """A bound on the size of a result: the product of the sizes and numbers of its arguments."""
    bound = 1
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            bound *= max(1, leaf.numel())
        elif isinstance(leaf, int | float) and abs(leaf) > 1:
            bound *= math.ceil(abs(leaf)) if math.isfinite(leaf) else 1
    return bound


def _without_memory(func: Any, args: Any, kwargs: Any) -> Any:
    """The results of an operation without values; none where their shapes depend on values."""
    args, kwargs = tree_map(_shape_only, (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    kwargs.pop("generator", None)
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return []


def _sizes(results: Any) -> list[int]:
    return [leaf.numel() for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]


def _shape_only(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value
