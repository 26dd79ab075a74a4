"""Checksums of tensors, which differ where values do."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

BYTES_AT_ONCE = 2**26
"""The number of bytes that are copied at a time from another device."""


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 checksum of the values, shapes and dtypes of tensors, in hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        flat = tensor.detach().reshape(-1)
        for part in flat.split(max(1, BYTES_AT_ONCE // tensor.element_size())):
            digest.update(part.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe_tensor(tensor: Tensor) -> str:
    """Shape, dtype and the first digits of the checksum of a tensor, for messages."""
    size = " x ".join(map(str, tensor.shape))
    return f"{size}, {str(tensor.dtype).removeprefix('torch.')}, {tensor_digest([tensor])[:16]}"
