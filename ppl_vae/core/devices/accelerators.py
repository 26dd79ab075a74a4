"""Accelerators: which one there is, what it can do, and copies that do not wait for it.

Nothing here names a kind of accelerator, except for what belongs to NVIDIA's.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
FIRST_WITH_TF32 = (8, 0)
"""The first compute capability whose tensor cores have TF32."""


def current_accelerator() -> torch.device | None:
    """The accelerator that torch uses now, with its index; None without one."""
    if not torch.accelerator.is_available():
        return None
    kind = torch.accelerator.current_accelerator()
    return None if kind is None else torch.empty(0, device=kind).device


def automatic_device(tensors: Sequence[Tensor]) -> torch.device:
    """Where a pair with these tensors is fitted if nothing is asked for.

    A pair whose parameters are on an accelerator stays there. Another one is moved to torch's
    current accelerator; to the CPU without one, or if it has no float64, in which sums are
    computed.
    """
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return tensor.device
    found = current_accelerator()
    return found if found is not None and _computes(found, torch.float64) else CPU


def available_device(device: str | torch.device) -> torch.device:
    """A device by its name, checked to be there.

    Raises:
        ValueError: if it is not.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(device)!r} is not available; use device='auto' or 'cpu'"
        ) from error


def accelerators_in_use() -> list[torch.device]:
    """The accelerators whose generators a seed sets; none before torch has started them."""
    found = current_accelerator()
    if found is None:
        return []
    module: Any = torch.get_device_module(found.type)
    if not getattr(module, "is_initialized", bool)():
        return []
    return [torch.device(found.type, index) for index in range(torch.accelerator.device_count())]


def synchronize() -> None:
    """Wait until the accelerators have done what they were asked for."""
    for device in accelerators_in_use():
        module: Any = torch.get_device_module(device.type)
        module.synchronize(device)


def read_together(*numbers: Tensor) -> tuple[Tensor, ...]:
    """Numbers of a device, tensors of shape (), on the CPU: the host waits once for all."""
    return torch.stack(numbers).cpu().unbind()


def generator_state(device: torch.device) -> Tensor | None:
    """The state of an accelerator's default generator; None for the CPU, whose state is apart."""
    if device.type == "cpu":
        return None
    module: Any = torch.get_device_module(device.type)
    return module.get_rng_state(device)


def set_generator_state(state: Tensor, device: torch.device) -> None:
    """Restore the state of :func:`generator_state`."""
    module: Any = torch.get_device_module(device.type)
    module.set_rng_state(state, device)


def copy_without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; the host goes on while numbers are copied.

    This needs memory that the operating system does not move; where a device offers none, the
    host waits.
    """
    if device.type == "cpu":
        return tensor
    try:
        tensor = tensor.pin_memory()
    except RuntimeError:
        return tensor.to(device)
    return tensor.to(device, non_blocking=True)


def check_precision(name: str, device: torch.device) -> None:
    """Check that a device computes matrix products in a precision.

    Args:
        name: ``"float32"``, ``"tf32"`` or ``"bf16"``.
        device: where the products are.

    Raises:
        ValueError: if it does not.
    """
    if name == "tf32" and not _has_tf32(device):
        raise ValueError(
            "precision='tf32' is a format of NVIDIA's GPUs from Ampere on; use 'float32' or "
            f"'bf16' on a {device.type}"
        )
    if name == "bf16" and not _computes(device, torch.bfloat16):
        raise ValueError(f"a {device.type} here has no bfloat16; use precision='float32'")


def _has_tf32(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= FIRST_WITH_TF32


@cache
def _computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies matrices of a dtype."""
    try:
        factor = torch.ones(1, 1, dtype=dtype, device=device)
        torch.mm(factor, factor)
    except (RuntimeError, TypeError):
        return False
    return True
