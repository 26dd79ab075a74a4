"""Numbers that are too large for sums of their squares."""

from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.text import counted

MAX_MAGNITUDE = 1e150
"""The largest magnitude whose squares can be added up in double precision."""


def check_magnitude(
    x: Float[Tensor, "N D"], *, name: str = "x", schema: TableSchema | None = None
) -> None:
    """Check that the squares of entries can be added up in float64.

    Args:
        x: data; NaN marks a missing value.
        name: its name in messages.
        schema: the names of its columns.

    Raises:
        ValueError: naming the row and the column of the first entry that is too large.
    """
    sizes = x.detach().abs()
    if float(sizes.sum()) <= MAX_MAGNITUDE:
        return
    wrong = sizes > MAX_MAGNITUDE
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        known = None if schema is None else repr(schema.names[column])
        raise ValueError(
            f"{name} has {counted(int(wrong.sum()), 'entry')} beyond {MAX_MAGNITUDE:g} in "
            f"magnitude, whose squares are no finite numbers, the first {float(x[row, column]):g} "
            f"in row {row}, column {known or column} (counted from 0); write NaN if it marks a "
            "missing value, or rescale the column"
        )
