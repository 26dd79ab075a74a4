"""Arrays in files: .npy, and .npz with one matrix and further columns."""

import io
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.lib import format as npy_format

from ppl_vae.core.validation import as_matrix
from ppl_vae.data.files.file_content import Readable, check_file, check_size, named_damage, quoted
from ppl_vae.data.files.raw_table import HALF_PRECISION, RawTable

HEADERS = {
    (1, 0): (2, npy_format.read_array_header_1_0),
    (2, 0): (4, npy_format.read_array_header_2_0),
}
"""By version, how many bytes state the length of a header, and what reads it."""
MAX_HEADER = 10_000
"""The largest length of a header, as numpy has it; those of numbers have 118 bytes."""


def npy_table(path: Path, max_bytes: int) -> RawTable:
    """The table of a .npy file, (N, D), one row per datum, or (N, H, W), images.

    Raises:
        FileNotFoundError: if there is no file.
        TypeError: if the entries are not real numbers.
        ValueError: if it is not such a file, or too large.
    """
    check_file(path, max_bytes)
    with path.open("rb") as file, named_damage(_damage(path)):
        array = _read_array(file, path, os.fstat(file.fileno()).st_size, max_bytes)
    if array.ndim not in (2, 3):
        raise ValueError(_shape_message(path, array))
    return _matrix_table(path, array)


def npz_table(path: Path, max_bytes: int) -> RawTable:
    """The table of a .npz file with one matrix, (N, D), or images, (N, H, W).

    Arrays (N,) are further columns under their own names.

    Raises:
        FileNotFoundError: if there is no file.
        TypeError: if the entries are not real numbers.
        ValueError: if it is not such a file, or too large; if it holds several matrices.
    """
    check_file(path, max_bytes)
    with named_damage(_damage(path)), zipfile.ZipFile(path) as archive:
        arrays = dict(_read_members(archive, path, max_bytes))
    matrices = {name: array for name, array in arrays.items() if array.ndim in (2, 3)}
    if len(matrices) != 1:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(
            f"{path} must hold one matrix of numbers; it has {shapes or 'no array'}; save one of "
            "them as .npy"
        )
    (name, matrix) = matrices.popitem()
    table = _matrix_table(path, matrix)
    beside = {n: a for n, a in arrays.items() if n != name and a.shape == matrix.shape[:1]}
    if others := set(arrays) - {name, *beside}:
        table.notes.append(f"arrays that do not fit to {name!r} are left out: {quoted(others)}")
    clash = set(beside) & set(table.cells)
    if clash:
        raise ValueError(f"{path}: an array has the name of a column of {name!r}: {quoted(clash)}")
    for column, array in beside.items():
        texts = array.dtype.kind in "US"
        table.cells[column] = pd.Series(array.astype(str if texts else np.float64).tolist())
        if texts:
            table.cells[column] = table.cells[column].astype(object)
    return table


def _read_members(
    archive: zipfile.ZipFile, path: Path, max_bytes: int
) -> Iterator[tuple[str, np.ndarray]]:
    members = [m for m in archive.infolist() if not m.is_dir()]
    check_size(f"{path}", sum(m.file_size for m in members), max_bytes)
    for member in members:
        with archive.open(member) as file:
            yield (
                member.filename.removesuffix(".npy"),
                _read_array(file, path, member.file_size, max_bytes),
            )


def _read_array(file: Readable, path: Path, size: int, max_bytes: int) -> np.ndarray:
    """An array, after a check that the file holds as much as its header says.

    Raises:
        ValueError: if it does not, or the array has objects or fields.
    """
    version = npy_format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"version {version} of the format is not supported")
    shape, fortran_order, dtype = _read_header(file, version)
    if dtype.hasobject:
        raise ValueError("it has Python objects, which are never read")
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or dtype.names:
        raise ValueError(f"it has {dtype} {shape}")
    if needed > size:
        raise ValueError(f"its header promises {needed} bytes, and the file has {size}")
    check_size(f"the array of {path}", needed, max_bytes)
    content = file.read(needed)
    if len(content) < needed:
        raise ValueError(f"its header promises {needed} bytes, and {len(content)} follow")
    flat = np.frombuffer(content, dtype=dtype, count=math.prod(shape))
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _read_header(file: Readable, version: tuple[int, int]) -> tuple[Any, bool, np.dtype]:
    """The shape, the order and the type of an array.

    Raises:
        ValueError: if it is longer than any header, or states something else.
    """
    width, reader = HEADERS[version]
    stated = file.read(width)
    length = int.from_bytes(stated, "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header has {length} bytes, and at most {MAX_HEADER} are read")
    header = file.read(length)
    try:
        return reader(io.BytesIO(stated + header))
    except Exception as error:  # numpy's message quotes what is in the header
        raise ValueError("its header does not state the shape and the type of an array") from error


def _damage(path: Path) -> str:
    return f"{path} is not a {path.suffix.lower()} file of numbers"


def _shape_message(path: Path, array: np.ndarray) -> str:
    return (
        f"{path} must hold one array of numbers, (N, D), one row per datum, or (N, H, W), images; "
        f"it has {array.dtype} {array.shape}"
    )


def _matrix_table(path: Path, array: np.ndarray) -> RawTable:
    rows = array.reshape(len(array), math.prod(array.shape[1:]))
    notes = []
    if rows.dtype == np.float16:
        notes.append(HALF_PRECISION)
        rows = rows.astype(np.float64)
    flat = as_matrix(rows, name=path.name, dtype=torch.float64, check_finite=False).numpy()
    return RawTable(
        path.name,
        pd.DataFrame(flat, columns=[f"x{k + 1}" for k in range(flat.shape[1])]),
        has_names=False,
        image_shape=(array.shape[1], array.shape[2]) if array.ndim == 3 else None,
        notes=notes,
    )
