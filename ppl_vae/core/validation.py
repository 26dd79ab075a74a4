"""Checks and conversions of arguments; the messages name the argument, the rule and a remedy."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

ArrayLike: TypeAlias = Any
"""A numpy array, pandas DataFrame, nested list or tensor of numbers."""

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
    x: ArrayLike, *, name: str = "x", check_finite: bool = True, **place: Any
) -> Float[Tensor, "N D"]:
    """Numbers of any kind as a floating-point matrix, one row per datum; NaN marks a missing
    value.

    Args:
        x: numpy array, pandas DataFrame, nested list or tensor; integers and booleans too.
        name: the argument's name in messages.
        check_finite: whether to refuse infinite entries, which is one pass over all of them.
        **place: ``dtype`` and ``device`` of the result; floating-point numbers keep their own
            without it, but for float16 and bfloat16, which are converted to float32; others get
            torch's default dtype.

    Warns:
        UserWarning: if x is of float16 or bfloat16 and is converted to another dtype.

    Raises:
        TypeError: if the entries are not real numbers.
        ValueError: if x is not 2-d, is empty, or has infinite entries.
    """
    refuse_file_name(x, name=name)
    tensor = x if isinstance(x, Tensor) else torch.as_tensor(_as_array(x, name))
    if tensor.is_complex():
        raise TypeError(f"{name} has complex entries; it must have real ones")
    if not tensor.is_floating_point():
        place = {"dtype": torch.get_default_dtype()} | place
    elif tensor.dtype in HALF_DTYPES:
        place = {"dtype": torch.float32} | place
        _warn_of_conversion(tensor.dtype, place["dtype"], name)
    tensor = tensor.to(**place) if place else tensor
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} must be 2-d, one flat row per datum; it has shape {tuple(tensor.shape)}. "
            f"For one datum write {name}[None], for images {name}.reshape(len({name}), -1)"
        )
    if not tensor.numel():
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


def as_mask(mask: ArrayLike, shape: tuple[int, ...], *, name: str = "x") -> Bool[Tensor, "N D"]:
    """A mask as a tensor, of the stated shape; ``name`` is the name of the data in messages.

    Raises:
        ValueError: if it is not boolean or has another shape.
    """
    mask = torch.as_tensor(mask)
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"mask must be boolean with the shape of {name}, {shape}; "
            f"it is {mask.dtype} with shape {tuple(mask.shape)}"
        )
    return mask


def check_rows_observed(observed: Bool[Tensor, "N D"], *, name: str = "x", first: int = 0) -> None:
    """Check that every row has an observed entry; ``first`` is the number of the first row.

    Raises:
        ValueError: naming the rows that have none.
    """
    empty = (~observed.any(1)).nonzero().flatten().tolist()
    if empty:
        listed = [first + row for row in empty[:5]]
        raise ValueError(f"{name} has rows with nothing observed: {listed}; drop them")


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


def _as_array(x: ArrayLike, name: str) -> np.ndarray:
    if hasattr(x, "select_dtypes"):  # a pandas DataFrame
        wrong = list(x.select_dtypes(exclude=["number", "bool"]).columns)
        if wrong:
            raise TypeError(
                f"{name} has columns that are not numeric: {wrong[:5]}; drop or encode them"
            )
        x = x.to_numpy(dtype=float, na_value=np.nan)
    array = np.asarray(x)
    if array.dtype.kind not in "fiubc":
        raise TypeError(f"{name} must hold numbers; its entries are of type {array.dtype}")
    # torch takes neither wide unsigned, long double nor swapped bytes, and warns of read-only.
    plain = array.dtype.str[1:] in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
    kind = (
        array.dtype.newbyteorder("=") if plain else complex if array.dtype.kind == "c" else float
    )
    return np.require(array, dtype=kind, requirements=["C", "W"])
