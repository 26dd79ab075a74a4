"""A limit on the memory of tensors, checked before any of them is made."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SINGLE, TOTAL = 16, 256
"""Multiples of the number of elements that is expected: of one result, and of all together."""
SMALL, SMALL_TOTAL = 2**16, 2**22
"""Numbers of elements that are allowed in any case: of one result, and of all together."""


class AllocationError(MemoryError):
    """More memory would be needed than the code inside an :class:`AllocationLimit` may take."""


class AllocationLimit(TorchDispatchMode):
    """Code inside makes tensors of a bounded size only: sizes are found before memory is taken.

    Each operation is first evaluated for shapes alone (on torch's device ``"meta"``).

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for size in _result_sizes(func, args, kwargs):
            self.remaining -= size
            if size > self.single or self.remaining < 0:
                raise AllocationError(
                    f"{func} would make a tensor of {size:,} elements, far more than are needed"
                )
        return func(*args, **kwargs)


def _result_sizes(func: Any, args: Any, kwargs: Any) -> list[int]:
    """The numbers of elements of an operation's results; none where they depend on values."""
    args, kwargs = tree_map(_shape_only, (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    kwargs.pop("generator", None)
    try:
        results = func(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return []
    return [leaf.numel() for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]


def _shape_only(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value
