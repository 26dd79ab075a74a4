"""Weighted sums over the processes of the tests, by shared memory or by messages."""

import gc
import os

import svi_cases
import torch

from ppl_vae.core.processes import shared_memory
from ppl_vae.core.processes.messages import record_messages
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.processes.shared_memory import WeightedSum

SIZES = ((400, 350), (1, 160_001), (1, 135_000), (2, 2), (1, 200_000))
"""Shapes of a part; the last sum is larger than the memory for those before it."""


def summand(rank, number, dtype):
    """The parts of a rank's summand, and its weight."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    shape = SIZES[number % len(SIZES)]
    parts = [torch.ones(3), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)]
    return parts, (rank + 1) / 7


def weighted_sum(size, number, dtype):
    """The same sum by one process, in the order of the ranks."""
    total = 0
    for rank in range(size):
        parts, weight = summand(rank, number, dtype)
        total = total + torch.cat([part.flatten().to(dtype) for part in parts]) * weight
    return total


def repeated_sums(dtype, rank_without_memory=None):
    """Whether all sums are exact after the last one, and whether memory was shared."""
    processes = Processes.current()
    sums, found, readlink = WeightedSum(processes), [], os.readlink
    if processes.rank == rank_without_memory:
        os.readlink = no_such_file
    try:
        with record_messages() as log:
            for number in range(10):
                parts, weight = summand(processes.rank, number, dtype)
                found.append(sums(parts, weight, dtype))
                found[-1] *= processes.rank + 2  # on this process only
    finally:
        os.readlink = readlink
    equal = [
        is_sum(total, weighted_sum(processes.size, number, dtype) * (processes.rank + 2))
        for number, total in enumerate(found)
    ]
    number = sum(n for (kind, _), n in log.counts.items() if kind == "sum")
    return all(equal), number, sums._memory is not None


def is_sum(total, expected):
    # The order of a small sum, which is a message, is another one for three numbers or more.
    if total.nbytes < shared_memory.MIN_BYTES and Processes.current().size > 2:
        return torch.allclose(total, expected, rtol=8 * torch.finfo(total.dtype).eps)
    return torch.equal(total, expected)


def no_such_file(path):
    raise FileNotFoundError(path)


def large_fit(x, least_bytes):
    """A fit whose gradients are more than half a megabyte."""
    before = shared_memory.MIN_BYTES
    shared_memory.MIN_BYTES = least_bytes or before
    try:
        options = {"steps": 4, "batch_size": 10, "capture": False, "grad_clip": 0.5}
        return svi_cases.fit_vae(x, options, hidden=(400, 400))[0]
    finally:
        shared_memory.MIN_BYTES = before


def files_of_this_process():
    """The open files and the mapped ones that shared memory has left."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if "memfd:ppl_vae" in line]
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    opened = [link for link in links if os.path.lexists(link) and "ppl_vae" in os.readlink(link)]
    return mapped, opened
