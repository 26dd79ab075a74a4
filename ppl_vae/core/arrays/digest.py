"""Checksums of tensors, which differ where values do."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BYTES_AT_ONCE = 2**26
"""The number of bytes that are copied at a time from another device."""


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 checksum of the values, shapes and dtypes of tensors, in hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        _update(digest, tensor)
    return digest.hexdigest()


class RowsDigest:
    """The description of a matrix whose rows are given in blocks.

    Args:
        shape: the shape of the matrix.
        dtype: the dtype of its entries.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size, kind = " x ".join(map(str, shape)), str(dtype).removeprefix("torch.")
        self._head = f"{size}, {kind}"
        self._digest = hashlib.sha256(f"{tuple(shape)} {dtype} ".encode())

    def add(self, rows: Tensor) -> None:
        """Add the next rows."""
        _update(self._digest, rows)

    def __str__(self) -> str:
        return f"{self._head}, {self._digest.hexdigest()[:16]}"


def describe_tensor(tensor: Tensor) -> str:
    """Shape, dtype and the first digits of the checksum of a tensor, for messages."""
    digest = RowsDigest(tuple(tensor.shape), tensor.dtype)
    digest.add(tensor)
    return str(digest)


def _update(digest: Any, tensor: Tensor) -> None:
    flat = tensor.detach().reshape(-1)
    for part in flat.split(max(1, BYTES_AT_ONCE // tensor.element_size())):
        digest.update(part.contiguous().cpu().view(torch.uint8).numpy().tobytes())
