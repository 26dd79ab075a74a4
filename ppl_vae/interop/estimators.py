"""What the package's estimators for scikit-learn have in common: rows with missing values in,
codes out."""

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

from ppl_vae.core.validation import ArrayLike

DTYPES: Any = [np.float64, np.float32]
"""Those that are kept: other numbers become the first."""


class RowsWithMissingValues:
    """Abstract: an estimator of rows in which NaN marks a missing value."""

    def _validated(self, X: ArrayLike, *, reset: bool = False, **rules: Any) -> np.ndarray:
        if str(getattr(X, "dtype", "")).endswith("float16"):
            warnings.warn(
                f"X is of {X.dtype}, which is too coarse to compute in; it is raised to float64",
                stacklevel=3,
            )
        holes: Any = {"ensure_all_finite": "allow-nan"}
        return np.asarray(validate_data(self, X, reset=reset, dtype=DTYPES, **holes, **rules))

    def __sklearn_tags__(self) -> Tags:
        above: Any = super()
        tags: Tags = above.__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


class CodeTransformer(RowsWithMissingValues, ClassNamePrefixFeaturesOutMixin, TransformerMixin):
    """Abstract: a transformer of rows into codes, and back into their means."""

    n_components_: int

    def transform(self, X: ArrayLike) -> Float[np.ndarray, "N K"]:
        """The code of each row: the mean of z given what was observed of it.

        Raises:
            ValueError: if X has another width or infinite entries, or a row with nothing observed.
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
            ValueError: if X has another width than K, NaN, or infinite entries.
        """
        check_is_fitted(self)
        X = check_array(X, dtype=DTYPES, input_name="X")
        if X.shape[1] != self.n_components_:
            raise ValueError(
                f"X must have n_components_={self.n_components_} columns, as transform gives "
                f"them; it has {X.shape[1]}"
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
        kept: Any = tags.transformer_tags
        kept.preserves_dtype = ["float64", "float32"]
        return tags


def as_array(values: Tensor) -> np.ndarray:
    """A tensor of any device, without its gradient."""
    return values.detach().cpu().numpy()


def cast_to(dtype: Any, values: np.ndarray, name: str) -> np.ndarray:
    """Values in the dtype of X.

    Raises:
        FloatingPointError: if they overflow it.
    """
    largest, limit = float(np.abs(values).max(initial=0)), float(np.finfo(dtype).max)
    if largest > limit:
        raise FloatingPointError(
            f"{name} overflow {dtype}: the largest is {largest:.3g} in size, and at most "
            f"{limit:.3g} can be held; give X in float64, or its columns in other units"
        )
    return values.astype(dtype)


def drawn_seed(random_state: Any) -> int:
    """A seed for torch from what scikit-learn calls a ``random_state``."""
    return check_random_state(random_state).randint(2**31 - 1)
