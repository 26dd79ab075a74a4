"""Large sums over the processes of one machine, through memory that all of them map."""

import os
import secrets
from collections.abc import Sequence
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.processes.messages import record
from ppl_vae.core.processes.ranks import Processes

MIN_BYTES = 2**19
"""Sums of fewer bytes are one message of ``torch.distributed``, which then takes less time."""


class WeightedSum:
    """A weighted sum over the processes that is repeated, as that of the gradients in each step.

    On one machine a message of ``torch.distributed`` passes through sockets. Memory that the
    processes share takes less time: each of them writes its summand there, adds up one section of
    all summands in the order of the ranks, and copies the whole sum. A small message after each of
    the first two parts makes them wait for each other, and finds a process that has ended. Where
    the processes share no memory (on several machines, on systems without anonymous files, for
    tensors of an accelerator), and for small sums, it is :meth:`.Processes.sum`.

    Args:
        processes: the processes.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._memory: Tensor | None = None  # (P + 1, M): the summands and the sum
        self._is_possible = processes.size > 1 and hasattr(os, "memfd_create")

    def __call__(
        self, parts: Sequence[Tensor], weight: float, dtype: torch.dtype
    ) -> Float[Tensor, " M"]:
        """The sum of the concatenated parts, with the same bits on all processes.

        Args:
            parts: this process's summand in parts, on one device; their shapes are the same on
                all processes.
            weight: the weight of this process's summand.
            dtype: the dtype of the sum, the same on all processes.

        Raises:
            ProcessError: if another process has ended.
        """
        sizes = [part.numel() for part in parts]
        size = sum(sizes)
        memory = self._memory_for(size, dtype, parts[0].device)
        summand = (
            parts[0].new_empty(size, dtype=dtype)
            if memory is None
            else memory[self.processes.rank, :size]
        )
        for part, place in zip(parts, summand.split(sizes), strict=True):
            torch.mul(part.reshape(-1).to(dtype), weight, out=place)
        if memory is None:
            return self.processes.sum(summand)
        record("sum", summand.nbytes)
        self.processes.wait()
        own = self.processes.share(size)
        section = torch.add(memory[0, own], memory[1, own], out=memory[-1, own])
        for other in memory[2:-1, own]:
            section += other
        self.processes.wait()
        return memory[-1, :size].clone()

    def _memory_for(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        if device.type != "cpu" or size * dtype.itemsize < MIN_BYTES:
            return None
        known = self._memory
        fits = known is not None and known.shape[1] >= size and known.dtype == dtype
        if self._is_possible and not fits:
            self._memory = shared_memory(self.processes, (self.processes.size + 1, size), dtype)
            self._is_possible = self._memory is not None
        return self._memory


def shared_memory(
    processes: Processes, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor | None:
    """A tensor whose memory all processes share; None on all of them if any cannot map it.

    It is an anonymous file of rank 0, which the system removes with the last process that maps it.

    Args:
        processes: the processes.
        shape: the shape of the tensor.
        dtype: the dtype of the tensor.
    """
    name = f"ppl_vae {secrets.token_hex(16)}"
    path, file, memory = "", None, None
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    if processes.rank == 0:
        with suppress(OSError):
            file = os.memfd_create(name)
            os.posix_fallocate(file, 0, num_bytes)
            path = f"/proc/{os.getpid()}/fd/{file}"
    name, path = processes.broadcast_bytes(f"{name}\n{path}".encode()).decode().split("\n")
    with suppress(OSError, RuntimeError):
        # The random name is found on the machine of rank 0 only.
        if path and name in os.readlink(path):
            memory = torch.from_file(path, shared=True, size=shape[0] * shape[1], dtype=dtype)
    are_mapped = processes.gather_text("" if memory is None else "mapped")
    if file is not None:
        os.close(file)
    return memory.view(shape) if memory is not None and all(are_mapped) else None
