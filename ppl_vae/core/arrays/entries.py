"""Entries of arrays as real numbers: what is converted, and what is refused by name."""

import math
import numbers
import warnings
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np

REAL_KINDS = "fiub"
"""Numpy's kinds of real numbers and booleans."""
PLAIN_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
"""Dtypes that torch takes without a conversion."""
MISSING_TYPES = ("NoneType", "NAType")
"""Names of the types of objects that mark a missing value."""
DENSE_BYTES = 2**31
"""The largest size, as a dense matrix in float64, of a sparse matrix that is converted."""


def is_real(dtype: Any) -> bool:
    """Whether a numpy dtype is one of real numbers or booleans."""
    return isinstance(dtype, np.dtype) and dtype.kind in REAL_KINDS


def as_real_array(x: Any, name: str) -> np.ndarray:
    """An array of real numbers, in a dtype that torch takes; NaN where a value is masked.

    Args:
        x: an array of any library, a masked array, a scipy sparse matrix, or nested lists.
        name: its name in messages.

    Warns:
        UserWarning: if a sparse matrix is converted, or numbers of more digits than float64.

    Raises:
        TypeError: if the entries are not real numbers; the message names their columns.
        ValueError: if a sparse matrix would be too large; if lists have different lengths.
    """
    x = densified(x, name)
    refuse_fields(x, name)
    masked = np.ma.getmaskarray(x) if isinstance(x, np.ma.MaskedArray) else None
    array = np.asarray(x.data if isinstance(x, np.ma.MaskedArray) else x)
    if masked is not None and masked.any():
        array = _without_masked(array, masked, name)
    if array.dtype.kind == "O" and array.ndim == 2:
        array = _matrix_of_objects(array, name)
    elif array.dtype.kind not in REAL_KINDS:
        raise TypeError(_description(x, array, name))
    return as_plain(array, name)


def refuse_fields(x: Any, name: str) -> None:
    """Refuse arrays with fields, and dictionaries of columns or rows, which are frames.

    Raises:
        TypeError: naming the fields, and the way out.
    """
    fields = getattr(getattr(x, "dtype", None), "names", None)
    kind = "a structured array with the fields"
    if isinstance(x, Mapping):
        kind, fields = "a dictionary with the keys", tuple(x)
    elif isinstance(x, list | tuple) and x and isinstance(x[0], Mapping):
        kind, fields = "a list of dictionaries with the keys", tuple(x[0])
    if isinstance(fields, tuple) and fields:
        listed = ", ".join(map(repr, fields[:5])) + (", ..." if len(fields) > 5 else "")
        raise TypeError(
            f"{name} is {kind} {listed}; pass the frame pandas.DataFrame({name}), whose columns "
            "have these names"
        )


def as_plain(array: np.ndarray, name: str) -> np.ndarray:
    """Real numbers in a dtype and memory layout that torch takes."""
    plain = array.dtype.str[1:] in PLAIN_DTYPES
    dtype = array.dtype.newbyteorder("=") if plain else np.dtype(float)
    converted = np.require(array, dtype=dtype, requirements=["C", "W"])
    if not plain and not np.array_equal(converted.astype(array.dtype), array, equal_nan=True):
        warnings.warn(
            f"{name} is of {array.dtype.name}, and some of its numbers have more digits than "
            "float64, to which it is converted. Convert it yourself to avoid this warning",
            stacklevel=4,
        )
    return converted


def densified(x: Any, name: str) -> Any:
    """A sparse matrix of scipy as an array, whose entries that are not stored are zero.

    Raises:
        ValueError: if the array would be too large, with its size.
    """
    if not (type(x).__module__.startswith("scipy.sparse") and hasattr(x, "toarray")):
        return x
    warn_of_densifying(x.shape, name)
    return x.toarray()


def warn_of_densifying(shape: Iterable[int], name: str) -> None:
    """Warn that a sparse matrix is converted, or refuse it if it is too large."""
    shape = tuple(shape)
    size = 8 * math.prod(shape)
    if size > DENSE_BYTES:
        raise ValueError(
            f"{name} is a sparse matrix of shape {shape}, which would take {size / 2**30:.3g} GiB "
            f"as the dense matrix that computations need; the limit is {DENSE_BYTES / 2**30:.3g} "
            "GiB. Take fewer columns, or pass blocks of rows as a list of dense matrices"
        )
    warnings.warn(
        f"{name} is a sparse matrix; it is converted to a dense one of shape {shape}, in which "
        "entries that are not stored are zero, not missing",
        stacklevel=4,
    )


def column_of_numbers(array: np.ndarray) -> np.ndarray:
    """The entries of a column as real numbers; objects are converted to float64.

    Raises:
        TypeError: if they are not real numbers, with what they are.
    """
    if array.dtype.kind == "O":
        return _numbers(array)
    if array.dtype.kind not in REAL_KINDS:
        raise TypeError(f"{array.dtype} values")
    return array


def refuse_columns(wrong: Mapping[Any, str], name: str) -> TypeError:
    """The error that names columns without real numbers, given what they hold instead."""
    listed, held = list(wrong)[:5], ", ".join(dict.fromkeys(list(wrong.values())[:5]))
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return TypeError(
        f"{name} has columns that are not numeric: {listed}{more} (they hold {held}); drop or "
        "encode them"
    )


def _without_masked(array: np.ndarray, masked: np.ndarray, name: str) -> np.ndarray:
    # The entries with a mark of a missing value where they are masked.
    if array.dtype.kind == "O":
        filled = array.copy()
        filled[masked] = None
        return filled
    if array.dtype.kind not in REAL_KINDS:
        raise TypeError(f"{name} must hold numbers; its entries are of type {array.dtype}")
    dtype = array.dtype if array.dtype.kind == "f" else np.dtype(float)
    filled = array.astype(dtype)
    filled[masked] = np.nan
    return filled


def _matrix_of_objects(array: np.ndarray, name: str) -> np.ndarray:
    columns, wrong = [], {}
    for position, column in enumerate(array.T):
        try:
            columns.append(_numbers(column))
        except TypeError as error:
            wrong[position] = str(error)
    if wrong:
        error = str(refuse_columns(wrong, name))
        raise TypeError(f"{name} must hold numbers; its entries are of type object: {error}")
    return np.stack(columns, 1) if columns else np.empty(array.shape)


def _numbers(column: np.ndarray) -> np.ndarray:
    # Python numbers, Decimals and marks of missing values as float64.
    values = np.full(len(column), np.nan)
    for position, entry in enumerate(column):
        if type(entry).__name__ in MISSING_TYPES:
            continue
        if not isinstance(entry, numbers.Real | Decimal | np.bool_):
            raise TypeError(_no_number(entry))
        try:
            values[position] = float(entry)
        except OverflowError:
            raise TypeError("whole numbers too large for float64") from None
    return values


def _no_number(entry: Any) -> str:
    shown = f"{entry!r:.40}, which is of type {type(entry).__name__}"
    try:
        float(entry)
    except (TypeError, ValueError) as error:
        return f"{shown}: {error}"
    return shown


def _description(x: Any, array: np.ndarray, name: str) -> str:
    if array.dtype.kind == "c":
        return f"{name} has complex entries; it must have real ones"
    if array.ndim or array.dtype.kind != "O":
        return f"{name} must hold numbers; its entries are of type {array.dtype}"
    return f"{name} must hold numbers; it is of type {type(x).__name__}"
