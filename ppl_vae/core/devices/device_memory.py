"""The memory of accelerators, by torch's own interface for any of them."""

from typing import Any

import torch

RESIDENT_SHARE = 0.5
"""The largest share of an accelerator's free memory that data may take."""


def fits_on_device(num_bytes: int, device: torch.device) -> bool | None:
    """Whether data may be kept in the memory of an accelerator.

    Args:
        num_bytes: the size of the data.
        device: the accelerator.

    Returns:
        None for the CPU, and where the free memory is not known.
    """
    if device.type == "cpu":
        return None
    free = _free_bytes(device)
    return None if free is None else num_bytes <= RESIDENT_SHARE * free


def _free_bytes(device: torch.device) -> int | None:
    own: Any = getattr(torch, device.type, None)  # of torch before torch.accelerator had memory
    for module, name in ((torch.accelerator, "get_memory_info"), (own, "mem_get_info")):
        function = getattr(module, name, None)
        if function is None:
            continue
        try:
            return int(function(device)[0])
        except (RuntimeError, NotImplementedError, AttributeError, ValueError):
            continue
    return None
