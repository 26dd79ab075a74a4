"""The bytes of a file: regular files only, decompressed, and never more than a given number."""

import bz2
import errno
import gzip
import io
import lzma
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ppl_vae.core.text import counted

DECOMPRESSORS: dict[str, Callable[[Path], io.BufferedIOBase]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
"""How compressed files are opened, by their suffixes; archives (.zip) are opened apart."""
COMPRESSED = (*DECOMPRESSORS, ".zip")
CHUNK = 2**20
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


class FileTooLargeError(ValueError):
    """The content of a file is larger than what may be read."""


@contextmanager
def named_damage(message: str) -> Iterator[None]:
    """Turn any error that a library raises for a damaged file into one that names the file.

    Raises:
        ValueError: with the message, and that of the library.
    """
    try:
        yield
    except (FileTooLargeError, ModuleNotFoundError):
        raise
    except Exception as error:  # the libraries raise errors of many kinds
        raise ValueError(f"{message}: {error or type(error).__name__}") from error


@runtime_checkable
class Readable(Protocol):
    """A file of bytes, of any class."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""
        ...


def quoted(names: Iterable[Any]) -> str:
    """The first ten names in quotation marks, separated by commas."""
    names = [repr(str(name)) for name in names]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def check_file(path: Path, max_bytes: int) -> None:
    """Check that a path is a regular file that is not too large.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is a folder, a pipe, a device or a loop of links, or too large.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    except OSError as error:
        loop = error.errno == errno.ELOOP
        reason = "is a loop of links" if loop else f"cannot be read: {error.strerror}"
        raise ValueError(f"{path} {reason}") from error
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is a folder; give a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a pipe, a socket or a device; save its content in a file")
    check_size(f"{path}", status.st_size, max_bytes)


def check_size(name: str, size: int, max_bytes: int) -> None:
    """Check the size of what is about to be read.

    Raises:
        FileTooLargeError: if it is larger than allowed.
    """
    if size > max_bytes:
        raise FileTooLargeError(
            f"{name} has {_readable(size)}, and at most {_readable(max_bytes)} are read; if that "
            "is right, give a larger max_bytes"
        )


def read_content(path: Path, suffixes: tuple[str, ...], max_bytes: int) -> bytes:
    """The content of a file, decompressed if its name ends in .gz, .bz2, .xz or .zip.

    Args:
        path: the file.
        suffixes: the suffixes, one of which the file in an archive has.
        max_bytes: the largest number of bytes that are read.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it cannot be read, is damaged, or has more bytes; if an archive holds not
            exactly one file.
    """
    check_file(path, max_bytes)
    suffix = path.suffix.lower()
    with named_damage(f"{path} cannot be read"):
        if suffix == ".zip":
            with (
                zipfile.ZipFile(path) as archive,
                archive.open(_only_member(archive, suffixes)) as file,
            ):
                return _read_at_most(file, path, max_bytes)
        if suffix not in DECOMPRESSORS:
            return path.read_bytes()
        with DECOMPRESSORS[suffix](path) as file:
            return _read_at_most(file, path, max_bytes)


def _only_member(archive: zipfile.ZipFile, suffixes: tuple[str, ...]) -> zipfile.ZipInfo:
    members = [
        member
        for member in archive.infolist()
        if not member.is_dir() and not member.filename.startswith("__MACOSX/")
    ]
    fitting = [m for m in members if m.filename.lower().endswith(suffixes)]
    if len(fitting) != 1:
        names = quoted(member.filename for member in members)
        raise ValueError(
            f"it holds {counted(len(fitting), 'table')} ({names}), and must hold one; extract the "
            "table that is to be read"
        )
    return fitting[0]


def _read_at_most(file: Readable, path: Path, max_bytes: int) -> bytes:
    # It is read in pieces, so that no more is decompressed than is allowed.
    content = bytearray()
    while piece := file.read(CHUNK):
        content += piece
        if len(content) > max_bytes:
            raise FileTooLargeError(
                f"{path} has more than {_readable(max_bytes)} when it is decompressed; if that is "
                "right, give a larger max_bytes"
            )
    return bytes(content)


def _readable(size: int) -> str:
    power = min((max(size, 1).bit_length() - 1) // 10, len(UNITS) - 1)
    number = f"{size / 1024**power:.1f}" if power else str(size)
    return f"{number} {UNITS[power]}"
