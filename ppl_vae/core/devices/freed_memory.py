"""Memory of tensors that are freed is kept for later ones, on systems with the GNU C library."""

import torch

KEPT_BYTES = 2**25 - 2**16
"""Slightly less than 32 MB, the largest size to which the library adapts."""


def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MB of freed memory for the next tensors.

    The library takes large blocks from the operating system and gives them back when they are
    freed, so that each new tensor of a megabyte costs a page fault for every 4 kB, which took a
    sixth of the time of an evaluation. When a block is freed it takes blocks of that size for
    short-lived (``M_MMAP_THRESHOLD`` in mallopt(3)), and keeps twice as much. The block here is
    never written to, so that it takes no memory. Other libraries do nothing of this.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8, device="cpu")
