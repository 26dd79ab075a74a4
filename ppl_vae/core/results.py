"""The base of results: dataclasses that are converted to plain Python, pandas and HTML."""

import dataclasses
import types
import typing
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from ppl_vae.core.arrays.schema import RowLabels
from ppl_vae.core.text_table import preformatted_html

if TYPE_CHECKING:
    import pandas


NO_LABELS = RowLabels()
UNSAVED = {"saved": False}
"""Metadata of a dataclass field with live objects, which :meth:`Result.to_dict` leaves out."""


class Result:
    """Base of the result dataclasses: conversion to plain Python, to pandas and to HTML."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as numbers, strings and lists; values outside JSON (NaN, inf) are None."""
        return {field.name: plain(getattr(self, field.name)) for field in _saved(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; infinite values come back as NaN.

        Raises:
            ValueError: if a field is missing.
        """
        hints, fields = typing.get_type_hints(cls), _saved(cls)
        if missing := [field.name for field in fields if field.name not in content]:
            raise ValueError(f"this is no {cls.__name__}: it has no {missing}")
        return cls(
            **{field.name: from_plain(content[field.name], hints[field.name]) for field in fields}
        )

    def to_frame(self) -> "pandas.DataFrame | Any":
        """The 1-d fields as columns; shorter ones are padded with NaN.

        The result of a data frame's rows is a frame of the same library, with its index.
        """
        import pandas as pd

        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        columns = {
            field.name: value.detach().cpu().numpy()
            for field in fields
            if isinstance(value := getattr(self, field.name), Tensor) and value.dim() == 1
        }
        labels = getattr(self, "labels", NO_LABELS)
        if labels.frame_labels is not None:
            return labels.named(columns)
        return pd.DataFrame({name: pd.Series(value) for name, value in columns.items()})

    def _repr_html_(self) -> str:
        """The representation in a notebook."""
        return preformatted_html(repr(self))


def _saved(result: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(result) if field.metadata != UNSAVED]


def plain(value: Any) -> Any:
    """Convert tensors, results and containers of them to values that JSON can hold."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return None
    return value


def from_plain(value: Any, hint: Any) -> Any:
    """The inverse of :func:`plain`, given the type of the value."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        present = next(kind for kind in inner if kind is not types.NoneType)
        return None if value is None else from_plain(value, present)
    if origin is tuple:
        return tuple(from_plain(item, inner[0]) for item in value)
    if origin is dict:
        return {key: from_plain(item, inner[1]) for key, item in value.items()}
    if hint is float:
        return float("nan") if value is None else float(value)
    if isinstance(hint, type) and issubclass(hint, Result):
        return hint.from_dict(value)
    if hint is Tensor or hasattr(hint, "array_type"):  # a jaxtyping shape
        return _tensor(value)
    return value


def _tensor(value: Any) -> Tensor:
    tensor = torch.from_numpy(np.asarray(_without_none(value)))
    return tensor.double() if tensor.is_floating_point() else tensor


def _without_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return float("nan") if value is None else value
