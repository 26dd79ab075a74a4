"""The columns of a table, matched with those that a model was fitted to."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ppl_vae.core.text import counted
from ppl_vae.data.tables import Table

MAX_NAMES = 5
"""The number of columns that a message lists."""


def match_columns(
    table: Table, columns: Sequence[str] | None, data_dim: int, model: str
) -> tuple[Float[np.ndarray, "N D"], tuple[str, ...]]:
    """The values of a table in the order of a model's columns, and notes for the user.

    Columns are matched by name; those that the model does not have are left out, with a note.
    They are matched by position if the model does not know its columns, or if the names on either
    side are those that files without a header get (x1, x2, ...).

    Args:
        table: the table.
        columns: the names that the model was fitted to; None if they are not known.
        data_dim: D, the number of the model's columns.
        model: the name of the model, for messages.

    Raises:
        ValueError: if columns are missing, or the number of columns differs.
    """
    given = table.columns
    if columns is None or (_unnamed(given) != _unnamed(columns) and len(given) == data_dim):
        if len(given) != data_dim:
            raise ValueError(
                f"{table.name} has {counted(len(given), 'column')}, and the model in {model} has "
                f"{data_dim}"
            )
        return table.values, ("columns are matched by position, since they are not named",)
    if missing := [name for name in columns if name not in given]:
        raise ValueError(
            f"{table.name} lacks {counted(len(missing), 'column')} that the model was fitted to: "
            f"{_listed(missing)}; it has {_listed(given)}"
        )
    extra = [name for name in given if name not in columns]
    notes = [f"{table.name}: columns that the model does not have are left out: {_listed(extra)}"]
    places = [given.index(name) for name in columns]
    return table.values[:, places], tuple(notes[: len(extra)])


def _unnamed(columns: Sequence[str]) -> bool:
    return all(re.fullmatch(r"x\d+", name) for name in columns)


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - MAX_NAMES
    shown = ", ".join(map(repr, names[:MAX_NAMES]))
    return f"{shown} and {rest} more" if rest > 0 else shown
