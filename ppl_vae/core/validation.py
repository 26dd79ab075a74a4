"""Checks and conversions of arguments; the messages name the argument, the rule and a remedy."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ppl_vae.core.arrays.entries import as_plain, as_real_array, warn_of_densifying
from ppl_vae.core.arrays.frames import read_frame
from ppl_vae.core.arrays.schema import TableSchema

ArrayLike: TypeAlias = Any
"""Data as :func:`as_matrix` takes them: arrays, frames, tensors, nested lists of numbers."""

HALF_DTYPES = (torch.float16, torch.bfloat16)


def check_option(name: str, value: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """The option itself, if it is a known one.

    Raises:
        ValueError: if it is not; the message lists the known ones.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
    return value


def check_int(name: str, value: int, smallest: int = 1) -> int:
    """The whole number itself, if it is not too small.

    Raises:
        ValueError: if it is smaller than ``smallest`` or not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < smallest:
        raise ValueError(f"{name} must be a whole number >= {smallest}; got {value!r}")
    return int(value)


def as_matrix(
    x: ArrayLike,
    *,
    name: str = "x",
    mask: ArrayLike | None = None,
    schema: TableSchema | None = None,
    check_finite: bool = True,
    allow_no_rows: bool = False,
    **place: Any,
) -> Float[Tensor, "N D"]:
    """Numbers of any kind as a floating-point matrix, one row per datum; NaN marks a missing
    value.

    Every function that takes data converts them here. Values that are missing in a frame, masked
    in a masked array, or False in ``mask`` become NaN.

    Args:
        x: a numpy array or masked array, a tensor, nested lists, a sparse matrix of scipy, a data
            frame (pandas, xarray, polars, pyarrow, or any that narwhals reads), what
            :func:`~ppl_vae.data.files.tables.read_table` returns, or a list of such
            blocks of rows, of the same columns; integers, booleans and objects that are numbers
            too.
        name: the argument's name in messages.
        mask: True where observed, of x's shape.
        schema: the schema of the frame that a model was fitted to: columns of a frame are matched
            to it by name, those of an array by position.
        check_finite: whether to refuse infinite entries, which is one pass over all of them.
        allow_no_rows: whether x may have no rows, as the share of one process among several.
        **place: ``dtype`` and ``device`` of the result; floating-point numbers keep their own
            without it, but for float16 and bfloat16, which are converted to float32; others get
            torch's default dtype, or float64 if that does not hold them exactly.

    Warns:
        UserWarning: if x is of a dtype that is converted with a loss, if it is a sparse matrix,
            or if columns of a frame are left out.

    Raises:
        TypeError: if the entries are not real numbers; the message names their columns.
        ValueError: if x is not 2-d, is empty, has infinite entries, or lacks columns of the
            schema; if a sparse matrix is too large; if the mask is not boolean or has another
            shape.
    """
    refuse_file_name(x, name=name)
    if is_block_list(x):
        return _concatenated(x, name, mask, schema, check_finite, place)
    tensor, positions = _as_tensor(x, name, schema)
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} must be 2-d, one flat row per datum; it has shape {tuple(tensor.shape)}. "
            f"For one datum write {name}[None], for images {name}.reshape(len({name}), -1)"
        )
    tensor = _as_floating(tensor, name, place)
    if mask is not None:
        observed = _matched_mask(mask, x, tensor, positions, name)
        tensor = torch.where(observed.to(tensor.device), tensor, torch.nan)
    if not tensor.numel() and not (allow_no_rows and tensor.shape[1]):
        raise ValueError(f"{name} is empty: its shape is {tuple(tensor.shape)}")
    # A finite sum has no infinite term, so that one pass suffices.
    if (
        check_finite
        and not bool(tensor.sum().isfinite())
        and (num_infinite := int(tensor.isinf().sum()))
    ):
        raise ValueError(
            f"{name} has {num_infinite} infinite entries; remove those rows, "
            "or write NaN where a value is missing"
        )
    return tensor


def is_block_list(x: Any) -> bool:
    """Whether x is a list of 2-d blocks of rows, rather than of rows."""
    return isinstance(x, list | tuple) and bool(x) and len(getattr(x[0], "shape", ())) == 2


def _concatenated(
    blocks: Any,
    name: str,
    mask: ArrayLike | None,
    schema: TableSchema | None,
    check_finite: bool,
    place: dict[str, Any],
) -> Float[Tensor, "N D"]:
    schema = TableSchema.of(blocks) if schema is None else schema
    parts = [
        as_matrix(
            block,
            name=f"block {i} of {name}",
            schema=schema,
            check_finite=False,
            allow_no_rows=True,
            **place,
        )
        for i, block in enumerate(blocks)
    ]
    if len(widths := {part.shape[1] for part in parts}) > 1:
        raise ValueError(
            f"the blocks of {name} must have the same width; they have {sorted(widths)} columns"
        )
    return as_matrix(torch.cat(parts), name=name, mask=mask, check_finite=check_finite)


def _as_tensor(
    x: ArrayLike, name: str, schema: TableSchema | None
) -> tuple[Tensor, list[int] | None]:
    # The entries as a tensor without a gradient, and the places in x of its columns, if these
    # were matched by name.
    if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor):
        x = torch.stack([row.detach() for row in x])
    if isinstance(x, Tensor):
        if x.is_nested or x.is_meta:
            kind = "a nested tensor" if x.is_nested else "on the device 'meta', without values"
            raise TypeError(f"{name} must be a tensor of rows of one length; it is {kind}")
        if x.layout != torch.strided:
            warn_of_densifying(x.shape, name)
            x = x.to_dense()
        if x.is_complex():
            raise TypeError(f"{name} has complex entries; it must have real ones")
        return x.detach(), None
    reader = read_frame(x, name=name)
    if reader is None:
        return torch.as_tensor(as_real_array(x, name)), None
    positions = None
    if schema is not None:
        positions = schema.positions(reader.labels.columns, name=name)
    taken = range(reader.shape[1]) if positions is None else positions
    return torch.as_tensor(as_plain(reader.matrix(taken, name=name), name)), positions


def _as_floating(tensor: Tensor, name: str, place: dict[str, Any]) -> Tensor:
    if tensor.dtype in HALF_DTYPES:
        place = {"dtype": torch.float32} | place
        _warn_of_conversion(tensor.dtype, place["dtype"], name)
    elif not tensor.is_floating_point() and "dtype" not in place:
        place = {"dtype": _exact_dtype(tensor)} | place
    return tensor.to(**place) if place else tensor


def _exact_dtype(whole: Tensor) -> torch.dtype:
    # The default dtype, or float64 if that does not hold these whole numbers.
    default = torch.get_default_dtype()
    if whole.dtype in (torch.int32, torch.int64, torch.uint32) and whole.numel():
        least, largest = whole.aminmax()
        if max(abs(int(least)), abs(int(largest))) > 1 / torch.finfo(default).eps:
            return torch.float64
    return default


def _matched_mask(
    mask: ArrayLike, x: ArrayLike, tensor: Tensor, positions: list[int] | None, name: str
) -> Bool[Tensor, "N D"]:
    # The mask of the columns of the tensor, which were taken from x at these positions.
    width = tensor.shape[1]
    if positions is not None and (reader := read_frame(x)) is not None:
        width = reader.shape[1]
    observed = as_mask(mask, (len(tensor), width), name=name, schema=TableSchema.of(x))
    return observed if positions is None else observed[:, positions]


def as_vector(values: ArrayLike, *, name: str = "y") -> Shaped[Tensor, " N"]:
    """One number per row, as a tensor without a gradient.

    Args:
        values: a tensor, an array, a list, or a series of a frame's library.
        name: its name in messages.

    Raises:
        TypeError: if the entries are not real numbers.
        ValueError: if it is not 1-d.
    """
    if isinstance(values, Tensor):
        vector = values.detach()
    else:
        vector = torch.as_tensor(as_real_array(values, name))
    if vector.dim() != 1:
        raise ValueError(
            f"{name} must be 1-d, one number per row; it has shape {tuple(vector.shape)}"
        )
    return vector


def refuse_file_name(x: Any, *, name: str = "x") -> None:
    """Refuse the name of a file in place of its content.

    Raises:
        TypeError: showing how the file is read.
    """
    if isinstance(x, str | Path):
        raise TypeError(
            f"{name} is a file name, {str(x)!r}, and must hold the numbers themselves; read the "
            f"file first: ppl_vae.read_table({str(x)!r}).values"
        )


def observed_mask(
    x: Float[Tensor, "N D"], mask: ArrayLike | None = None, *, name: str = "x"
) -> Bool[Tensor, "N D"] | None:
    """Which entries of x are observed: True in the mask, and not NaN. None if all are.

    Args:
        x: the data.
        mask: True where observed, of x's shape.
        name: the name of x in messages.

    Raises:
        ValueError: if mask is not boolean or has another shape.
    """
    if mask is not None:
        mask = as_mask(mask, tuple(x.shape), name=name).to(x.device)
    elif bool(x.sum().isfinite()):
        return None
    observed = ~x.isnan() if mask is None else ~x.isnan() & mask
    return None if bool(observed.all()) else observed


def as_mask(
    mask: ArrayLike,
    shape: tuple[int, ...],
    *,
    name: str = "x",
    schema: TableSchema | None = None,
) -> Bool[Tensor, "N D"]:
    """A mask as a tensor, of the stated shape.

    Args:
        mask: an array, tensor, nested lists or frame of booleans, or a list of blocks of them.
        shape: the shape of the data.
        name: the name of the data in messages.
        schema: the schema of the data, to which the columns of a mask that is a frame are matched.

    Raises:
        ValueError: if it is not boolean or has another shape.
    """
    found = _boolean_tensor(mask, schema)
    if found.dtype != torch.bool or found.shape != shape:
        raise ValueError(
            f"mask must be boolean with the shape of {name}, {shape}; "
            f"it is {found.dtype} with shape {tuple(found.shape)}"
        )
    return found


def _boolean_tensor(mask: ArrayLike, schema: TableSchema | None) -> Tensor:
    if isinstance(mask, Tensor):
        return mask
    if is_block_list(mask):
        return torch.cat([_boolean_tensor(block, schema) for block in mask])
    if np.ma.is_masked(mask):
        raise ValueError("mask has masked entries itself; it must be True or False everywhere")
    if read_frame(mask, name="mask") is not None:
        return _as_tensor(mask, "mask", schema)[0]
    return torch.as_tensor(as_real_array(mask, "mask"))


def check_rows_observed(observed: Bool[Tensor, "N D"], *, name: str = "x", first: int = 0) -> None:
    """Check that every row has an observed entry; ``first`` is the number of the first row.

    Raises:
        ValueError: naming the rows that have none.
    """
    empty = (~observed.any(1)).nonzero().flatten().tolist()
    if empty:
        listed = [first + row for row in empty[:5]]
        raise ValueError(f"{name} has rows with nothing observed: {listed}; drop them")


def without_empty_rows(x: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
    """The rows with an observed entry, NaN marking a missing one.

    Warns:
        UserWarning: with the number of the rows that are left out.
    """
    some = ~x.isnan().all(1)
    if bool(some.all()):
        return x
    empty = (~some).nonzero().flatten().tolist()
    warnings.warn(
        f"x has rows with nothing observed, which are left out: {len(empty)} of {len(x)} "
        f"(numbers {', '.join(map(str, empty[:5]))})",
        stacklevel=3,
    )
    return x[some]


def _warn_of_conversion(given: torch.dtype, taken: torch.dtype, name: str) -> None:
    if taken in HALF_DTYPES:  # the dtype of the model
        return
    digits = {torch.float16: "three to four", torch.bfloat16: "two to three"}[given]
    given_name, taken_name = (str(dtype).removeprefix("torch.") for dtype in (given, taken))
    warnings.warn(
        f"{name} is of {given_name}, which holds {digits} digits, too few to compute with; "
        f"it is converted to {taken_name}. Convert it yourself to avoid this warning",
        stacklevel=3,
    )
