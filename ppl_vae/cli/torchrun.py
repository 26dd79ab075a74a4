"""Commands that ``torchrun`` launches in several processes; rank 0 prints and writes."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta

DISTRIBUTED_VERBS = ("evaluate", "fit", "impute", "score")
"""The commands whose work the processes share; rank 0 runs the others alone."""
TIMEOUT = timedelta(minutes=10)
"""The longest time that a process waits for a message of the others."""


def num_processes() -> int:
    """The number of processes that ``torchrun`` launched; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def launched_rank() -> int:
    """The rank that ``torchrun`` gave to this process; 0 without it."""
    return int(os.environ["RANK"]) if num_processes() > 1 else 0


def num_restarts() -> int:
    """How often ``torchrun --max-restarts`` launched the processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def was_restarted() -> bool:
    """Whether ``torchrun --max-restarts`` launched the processes again."""
    return num_processes() > 1 and num_restarts() > 0


def has_nothing_to_do(arguments: list[str]) -> bool:
    """Whether rank 0 does all the work of a command, and this process is another."""
    return launched_rank() > 0 and not set(arguments[:1]) & set(DISTRIBUTED_VERBS)


@contextmanager
def launched_processes(arguments: list[str]) -> Iterator[None]:
    """Context manager: the processes share the work of a command, if several were launched.

    Args:
        arguments: the arguments of the command line.
    """
    if num_processes() == 1 or not set(arguments[:1]) & set(DISTRIBUTED_VERBS):
        yield
        return
    import torch.distributed as dist

    _connect()
    try:
        with ExitStack() as stack:
            if launched_rank():
                silent = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(silent))
                stack.callback(logging.disable, logging.root.manager.disable)
                logging.disable(logging.CRITICAL)
            yield
    finally:
        dist.destroy_process_group()


def _connect() -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun may keep its store when it restarts the processes, and in it the addresses of those
    # that have ended: each attempt has entries of its own.
    attempt = PrefixStore(f"attempt {num_restarts()}", store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=TIMEOUT)


def error_prefix() -> str:
    """What stands before the error of this process."""
    return f"rank {launched_rank()}: " if launched_rank() else ""
