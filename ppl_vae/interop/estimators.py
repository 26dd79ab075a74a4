"""Common base classes of the scikit-learn estimators: missing values in the input, codes out."""

import warnings
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from ppl_vae.core.arrays.entries import REAL_KINDS, as_real_array, refuse_fields
from ppl_vae.core.arrays.frames import read_frame
from ppl_vae.core.validation import ArrayLike, as_matrix, is_block_list

DTYPES: Any = [np.float64, np.float32]
"""The supported dtypes; other numeric types are converted to the first."""


class RowsWithMissingValues:
    """Abstract base of estimators whose input may contain missing values (NaN)."""

    def _validated(self, X: ArrayLike, *, reset: bool = False, **rules: Any) -> np.ndarray:
        if str(getattr(X, "dtype", "")).endswith("float16"):
            warnings.warn(
                f"X has dtype {X.dtype}, which is too imprecise to compute in; it is cast to "
                "float64",
                stacklevel=3,
            )
        X = validate_data(
            self, as_input(X), reset=reset, dtype=DTYPES, ensure_all_finite="allow-nan", **rules
        )
        return np.asarray(X)

    def __sklearn_tags__(self) -> Tags:
        parent: Any = super()
        tags: Tags = parent.__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


class CodeTransformer(RowsWithMissingValues, ClassNamePrefixFeaturesOutMixin, TransformerMixin):
    """Abstract base of transformers from rows to codes, and back to means of x."""

    n_components_: int

    def transform(self, X: ArrayLike) -> Float[np.ndarray, "N K"]:
        """The code of each row: the mean of z given its observed values.

        Raises:
            ValueError: if X has the wrong number of columns or infinite entries.
        """
        check_is_fitted(self)
        X = self._validated(X)
        with torch.no_grad():
            return cast_to(X.dtype, as_array(self._codes(X)), "codes")

    def inverse_transform(self, X: ArrayLike) -> Float[np.ndarray, "N D"]:
        """The mean of x given z.

        Args:
            X: z, (N, K).

        Raises:
            ValueError: if X does not have K columns, or has NaN or infinite entries.
        """
        check_is_fitted(self)
        X = check_array(X, dtype=DTYPES, input_name="X")
        if X.shape[1] != self.n_components_:
            raise ValueError(
                f"X must have n_components_={self.n_components_} columns, as returned "
                f"by transform; it has {X.shape[1]}"
            )
        return cast_to(X.dtype, self._decoded(X), "means of x")

    @abstractmethod
    def _codes(self, X: np.ndarray) -> Float[Tensor, "N K"]:
        """The codes of validated rows."""

    @abstractmethod
    def _decoded(self, X: np.ndarray) -> Float[np.ndarray, "N D"]:
        """The means of x given validated codes."""

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        transformer_tags: Any = tags.transformer_tags
        transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def as_input(X: ArrayLike) -> Any:
    """Data of any kind as an array or a pandas frame of numbers, which scikit-learn checks.

    Frames keep the names of their columns. Arrays of numbers are left as they are, those of
    complex numbers too, which scikit-learn refuses by name.

    Raises:
        TypeError: if entries are not real numbers; the message names their columns.
    """
    if (reader := read_frame(X, name="X")) is not None:
        values = reader.matrix(range(reader.shape[1]), name="X")
        if reader.labels.columns is None:
            return values
        import pandas as pd

        return pd.DataFrame(values, columns=list(reader.labels.columns))
    refuse_fields(X, "X")
    if is_block_list(X) or isinstance(X, Tensor):
        return as_matrix(X, name="X", check_finite=False).cpu().numpy()
    if isinstance(X, list | tuple):
        X = np.asarray(X)
    masked = isinstance(X, np.ma.MaskedArray)
    if not masked and getattr(getattr(X, "dtype", None), "kind", "f") in REAL_KINDS + "c":
        return X
    return as_real_array(X, "X")


def as_array(values: Tensor) -> np.ndarray:
    """A tensor on any device as an array, detached from its gradient."""
    return values.detach().cpu().numpy()


def cast_to(dtype: Any, values: np.ndarray, name: str) -> np.ndarray:
    """Values in the dtype of X.

    Raises:
        FloatingPointError: if they overflow it.
    """
    largest, limit = float(np.abs(values).max(initial=0)), float(np.finfo(dtype).max)
    if largest > limit:
        raise FloatingPointError(
            f"{name} overflow {dtype}: the largest is {largest:.3g} in absolute value, and the "
            f"limit is {limit:.3g}; pass X in float64, or its columns in other units"
        )
    return values.astype(dtype)


def drawn_seed(random_state: Any) -> int:
    """Draw a seed for torch from a ``random_state`` of scikit-learn."""
    return check_random_state(random_state).randint(2**31 - 1)
