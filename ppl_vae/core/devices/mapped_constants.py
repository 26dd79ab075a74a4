"""Constants of torch's vector functions in pages of memory that this process has mapped."""

import torch

SINGLE_VECTOR = 16
"""The number of floats of the widest vectors of x86 processors."""


def map_constants() -> None:
    """Read the constants of log(1 + x) in float32, so that their pages are mapped.

    The vectorized functions log1p, expm1, softplus, log_sigmoid and elu end with a load of the
    result at a special argument, which a mask disables for all others. Processors suppress the
    page fault of a disabled load by microcode, in some hundred cycles, as long as nothing has
    read the page (Intel 64 and IA-32 Architectures Optimization Reference Manual, on masked loads
    that need an assist). Where no other function has read it, each vector then costs six to ten
    times as much. Here x = -0 enables the load. No result changes.

    A process that was forked has its own mappings and needs its own call.
    """
    torch.full((SINGLE_VECTOR,), -0.0, dtype=torch.float32, device="cpu").log1p()
