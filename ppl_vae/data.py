"""Data: the embedded digits, disjoint splits, and units."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ppl_vae.arguments import ArrayLike, as_matrix


def digits() -> Float[np.ndarray, "1797 64"]:
    """scikit-learn's handwritten digits, 8 x 8 pixels, each in 0..1 (sixteenths)."""
    return np.asarray(load_digits(return_X_y=True)[0]) / 16


@dataclass(frozen=True)
class Split:
    """Disjoint rows for fitting, early stopping and testing.

    Attributes:
        train, val, test: (N, D) each.
        train_rows, val_rows, test_rows: which rows of the data they were (of ``x_test``, if that
            was given).
    """

    train: Tensor
    val: Tensor
    test: Tensor
    train_rows: Tensor
    val_rows: Tensor
    test_rows: Tensor


def split(
    x: ArrayLike,
    x_test: ArrayLike | None = None,
    *,
    val: float = 0.08,
    test: float = 0.17,
    seed: int = 0,
) -> Split:
    """Shuffle rows and part them; with ``x_test`` given, x has no test rows to give.

    Raises:
        ValueError: if there are too few rows to part, or x_test has another width.
    """
    x = as_matrix(x)
    num_val = max(1, round(val * len(x)))
    if x_test is not None:
        x_test = as_matrix(x_test, name="x_test").to(x)
        if x_test.shape[1] != x.shape[1]:
            raise ValueError(f"x_test has {x_test.shape[1]} columns, x {x.shape[1]}")
        train, val_rows = _part(torch.arange(len(x)), num_val, seed)
        return Split(x[train], x[val_rows], x_test, train, val_rows, torch.arange(len(x_test)))
    num_test = max(2, round(test * len(x)))
    rest, test_rows = _part(torch.arange(len(x)), num_test, seed)
    train, val_rows = _part(rest, num_val, seed)
    return Split(x[train], x[val_rows], x[test_rows], train, val_rows, test_rows)


def _part(rows: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    if len(rows) - size < 3:
        raise ValueError(f"{len(rows)} rows are too few to keep {size} apart and fit the rest")
    kept, apart = train_test_split(rows.numpy(), test_size=size, random_state=seed)
    return torch.from_numpy(kept), torch.from_numpy(apart)


@dataclass(frozen=True)
class Units:
    """A shift a column and one scale for all: step sizes then do not depend on the data's units.

    PPCA is equivariant under it: only log p moves, by the log of its Jacobian. Holes stay holes.

    Attributes:
        loc: (D,).
        scale: ().
    """

    loc: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Float[Tensor, "N D"]) -> "Units":
        """Mean zero a column, variance one on average, over the observed cells of x.

        Raises:
            ValueError: if x does not vary.
        """
        loc = x.nanmean(0)
        scale = (x - loc).square().nanmean(0).mean().sqrt()
        if not scale > 0:
            raise ValueError("x does not vary: all its rows are equal")
        return cls(loc, scale)

    @classmethod
    def none(cls, x: Float[Tensor, "N D"]) -> "Units":
        """Those of x itself."""
        return cls(torch.zeros_like(x[0]), torch.ones_like(x[0, 0]))

    def apply(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """x in these units."""
        return (x - self.loc) / self.scale

    def undo(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """From these units back to the data's."""
        return x * self.scale.to(x) + self.loc.to(x)

    def log_jacobian(self, x: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """What to add to log densities of :meth:`apply` (x) to get those of x, in nats a datum.

        Of each row's observed cells; only the holes of x matter, not its values.
        """
        return -(~x.isnan()).sum(1).double() * math.log(float(self.scale))
