"""The entries of the data that a model scores, which bits per dimension are relative to."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.traces import by_draw_and_datum
from ppl_vae.data.sources.row_stream import Rows, RowStream

CELLS_AT_ONCE = 2**22
"""Entries whose missing values are counted at once, of data that are read in blocks."""


def num_scored(
    pair: Pair, data: Rows, rows: Int[Tensor, " R"], size: int
) -> Float[Tensor, " R"] | None:
    """The number of observed entries of each row that the model scores.

    A model of some columns given the others scores only the former. Which columns these are is
    known where nothing is missing, where the model scores as many entries as there are columns,
    or where it has an attribute ``scored_columns``.

    Args:
        pair, data: the pair and the whole data.
        rows: the rows to count in.
        size: the entries that the model scores in a complete row, :func:`entries_per_row`.

    Returns:
        None if it is not known which of the missing values are of scored columns.
    """
    is_missing = data.is_missing if isinstance(data, RowStream) else data.mask is not None
    if not is_missing:
        return torch.full((len(rows),), float(size), device=data.device)
    columns = getattr(pair.model_owner, "scored_columns", slice(None))
    like = data.like if isinstance(data, RowStream) else data.x
    if size != like[:, columns].shape[1]:
        return None
    if isinstance(data, Batch):
        assert data.mask is not None
        return data.mask[rows, columns].sum(1).to(like)
    batches = data.split(rows, CELLS_AT_ONCE // data.source.width + 1)
    masks = (batch.mask for batch in batches if batch.mask is not None)
    return torch.cat([mask[:, columns].sum(1) for mask in masks]).to(like)


def entries_per_row(pair: Pair, batch: Batch) -> int:
    """The number of entries in a row of the model's observed sites."""
    run = pair.inspect(batch)
    # A pyro.factor is an observed site with an empty value.
    observed = [site for site in run.observed.values() if site["value"].numel()]
    values = [by_draw_and_datum(run, site, site["value"]) for site in observed]
    return sum(value[0].numel() // value.shape[1] for value in values)
