"""Disjoint rows for fitting, early stopping and testing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.validation import ArrayLike, as_matrix


@dataclass(frozen=True)
class Split:
    """Disjoint rows for fitting, early stopping and testing.

    Attributes:
        train, val, test: (N, D) each.
        train_rows, val_rows, test_rows: indices of these rows in the data (test rows: in
            ``x_test``, if that was given).
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
    """Split rows at random into training, validation and test rows.

    Args:
        x: the data, (N, D).
        x_test: given test rows; x is split into training and validation rows then.
        val, test: shares of the validation and test rows.
        seed: seed of the shuffle.

    Raises:
        ValueError: if there are too few rows, or x_test has another width.
    """
    schema, x = TableSchema.of(x), as_matrix(x)
    num_val = max(1, round(val * len(x)))
    if x_test is not None:
        x_test = as_matrix(x_test, name="x_test", schema=schema).to(x)
        if x_test.shape[1] != x.shape[1]:
            raise ValueError(f"x_test has {x_test.shape[1]} columns, x {x.shape[1]}")
        train, val_rows = _split_off(torch.arange(len(x)), num_val, seed)
        return Split(x[train], x[val_rows], x_test, train, val_rows, torch.arange(len(x_test)))
    num_test = max(2, round(test * len(x)))
    rest, test_rows = _split_off(torch.arange(len(x)), num_test, seed)
    train, val_rows = _split_off(rest, num_val, seed)
    return Split(x[train], x[val_rows], x[test_rows], train, val_rows, test_rows)


def _split_off(rows: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.model_selection import train_test_split

    if len(rows) - size < 3:
        raise ValueError(f"{len(rows)} rows are too few to hold out {size} and fit the rest")
    kept, held_out = train_test_split(rows.numpy(), test_size=size, random_state=seed)
    return torch.from_numpy(kept), torch.from_numpy(held_out)
