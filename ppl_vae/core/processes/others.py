"""What became of the other processes, when no message comes from them.

Errors of a backend of ``torch.distributed`` name the address that is gone, and not the rank.
Therefore each process enters its number into the store of ``torch.distributed``, where the others
find it after a failure.
"""

import importlib
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS_TO_END = 2.0
"""Seconds within which a process whose connections are closed is expected to have ended."""


def announce(rank: int) -> None:
    """Enter this process into the store, once."""
    store, key = _store(), _key(rank)
    if store is not None and not store.check([key]):
        store.set(key, f"{os.getpid()} {platform.node()}")


def describe_others(rank: int, size: int) -> str:
    """The processes that have ended, or are stopped, or have not begun; or what else is possible.

    Args:
        rank: the rank of this process.
        size: the number of processes.
    """
    deadline, found = time.monotonic() + SECONDS_TO_END, []
    while not found and time.monotonic() < deadline:
        time.sleep(0.05)
        found = _missing(rank, size)
    return ", ".join(found) or (
        "another one has ended, or waits elsewhere; every process must call the same functions"
    )


def _missing(rank: int, size: int) -> list[str]:
    store = _store()
    if store is None:
        return []
    try:
        entries = {
            other: bytes(store.get(_key(other))).decode() if store.check([_key(other)]) else ""
            for other in range(size)
            if other != rank
        }
    except RuntimeError:
        return ["the process that holds the store has ended (rank 0, unless torchrun holds it)"]
    states = {other: _state_of(entry) for other, entry in entries.items()}
    return [f"rank {other} {state}" for other, state in states.items() if state]


def _state_of(entry: str) -> str:
    # The state of the process with this entry is empty if it runs, or is on another machine.
    if not entry:
        return "has not called a function of ppl_vae, or ended before"
    pid, node = entry.split(" ", 1)
    state = _state(int(pid)) if node == platform.node() else ""
    return f"(process {pid}) {state}" if state else ""


def _store() -> Any:
    with suppress(AttributeError):  # a function that torch may rename
        return importlib.import_module("torch.distributed.distributed_c10d")._get_default_store()
    return None


def _key(rank: int) -> str:
    return f"ppl_vae process of rank {rank}"


def _state(pid: int) -> str:
    """What became of a process of this machine; an empty text if it is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "has ended"
    except OSError:
        pass
    with suppress(OSError, IndexError):  # not on every system
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return {"Z": "has ended", "X": "has ended", "T": "is stopped"}.get(letter, "")
    return ""
