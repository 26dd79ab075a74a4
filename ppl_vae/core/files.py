"""Atomic writing of files: a reader finds the old file or the new one."""

import os
import platform
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ppl_vae.core.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

PARTIAL = re.compile(r"\..+\.(?P<host>[^.]*)-(?P<pid>\d+)-[0-9a-f]{8}\.partial")
"""Names of temporary files: those of the file, of the machine and of the process that writes."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed at the end: a kill leaves the old file or the new.

    What killed processes left in the folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    partial = _partial_name(path)
    try:
        yield partial
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is on the disk before it has its name."""
    with atomic_file(path) as partial:
        write_synced(partial, data)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and put it on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_regular(path: Path) -> bytes:
    """The content of a file that is no device, named pipe or folder, which could not end.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is not a regular file, or does not fit into memory.
    """
    if not path.is_file():
        if path.exists() or path.is_symlink():
            raise CheckpointError(f"{path} is not a regular file")
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return path.read_bytes()
    except (MemoryError, OverflowError) as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path} of {size:,} bytes does not fit into memory") from error


def check_writable(path: Path) -> None:
    """Check that :func:`write_atomically` can write a file, by creating one in its folder.

    Raises:
        OSError: naming the file and the reason.
    """
    trial = _partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
    except OSError as error:
        raise OSError(error.errno, f"it cannot be written: {error.strerror}", str(path)) from error
    finally:
        with suppress(OSError):
            trial.unlink(missing_ok=True)


@contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Wait until no other writer is inside for this folder, and keep others out.

    The lock belongs to the open folder and ends with the process, however it ends. Where a system
    has no such locks, or the folder cannot be read, writers are not kept apart.
    """
    if fcntl is None or not os.access(folder, os.R_OK):
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    if fcntl is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial_name(path: Path) -> Path:
    # No two writers, threads of one process included, have one temporary file.
    host = platform.node().split(".")[0]
    return path.with_name(f".{path.name}.{host}-{os.getpid()}-{secrets.token_hex(4)}.partial")


def _remove_leftovers(folder: Path) -> None:
    host = platform.node().split(".")[0]
    for path in folder.glob(".*.partial"):
        found = PARTIAL.fullmatch(path.name)
        if found and found["host"] == host and not _is_running(int(found["pid"])):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    if fcntl is None:  # on Windows, where the call below would send a signal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True
