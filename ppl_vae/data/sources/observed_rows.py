"""Rows of any kind where a pair can use them: in memory if they are few, else read in blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.inputs import as_data_and_mask, check_named_support, schema_of
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.batch import Batch
from ppl_vae.core.devices.device_memory import fits_on_device
from ppl_vae.core.introspection import placement
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import kept_generators
from ppl_vae.core.validation import ArrayLike, as_matrix, is_block_list
from ppl_vae.data.sources.array_source import ArraySource
from ppl_vae.data.sources.block_source import BlockSource
from ppl_vae.data.sources.row_sources import row_source
from ppl_vae.data.sources.row_stream import Rows, RowStream

LOADED_NUMBERS = 2**26
"""Sources of at most this number of numbers (256 MiB in float32) are loaded into memory."""


def open_source(
    x: Any, mask: ArrayLike | None, *, model: ProgramLike, guide: ProgramLike | None = None
) -> BlockSource | None:
    """The source that reads x in blocks; None if x is in memory.

    A matrix in memory that does not fit into that of the pair's accelerator is a source, too.

    Args:
        x, mask: as for :func:`~ppl_vae.data.sources.row_sources.row_source`.
        model, guide: the pair, for its device and the columns that it was fitted to.

    Raises:
        TypeError, ValueError: as :func:`~ppl_vae.data.sources.row_sources.row_source`.
    """
    with kept_generators([]):
        source = row_source(x, mask, schema=schema_of(model))
    if source is not None or not isinstance(x, Tensor) or x.dim() != 2:
        return source
    place: dict[str, Any] = placement(*([model] if guide is None else [model, guide]))
    device = place.get("device", x.device)
    if x.device == device or fits_on_device(x.numel() * x.element_size(), device) is not False:
        return None
    return ArraySource(x, mask)


def observe_rows(
    x: Any,
    mask: ArrayLike | None = None,
    *,
    model: ProgramLike,
    guide: ProgramLike | None = None,
    source: BlockSource | None = None,
    name: str = "x",
    allow_empty_rows: bool = False,
    check: bool = True,
    with_digest: bool = False,
) -> Rows:
    """All rows of x where a pair can use them.

    Args:
        x: a matrix of any kind, or what :func:`~ppl_vae.data.sources.row_sources.row_source` reads
            in blocks.
        mask: True where observed.
        model, guide: the pair.
        source: the :func:`open_source` of x, if it is open already.
        name: the name of x in messages.
        allow_empty_rows: whether rows may have nothing observed.
        check: whether the model checks that the rows lie in its support.
        with_digest: whether checksums of rows that are read in blocks are computed; several
            processes compare them in any case.

    Returns:
        A :class:`~ppl_vae.core.batch.Batch` of all rows if they are in memory, or few enough to
        be loaded and allowed in any order; else a :class:`RowStream`.

    Raises:
        TypeError, ValueError: as :func:`~ppl_vae.core.arrays.inputs.as_data_and_mask` and the
            sources.
    """
    if isinstance(x, Batch | RowStream):
        return x
    source = source or open_source(x, mask, model=model, guide=guide)
    with_digest = with_digest or Processes.current().size > 1
    if source is not None and not _is_loaded(source):
        return RowStream(
            source, model, guide,
            name=name, allow_empty_rows=allow_empty_rows, check=check, with_digest=with_digest,
        )  # fmt: skip
    if source is not None and not is_block_list(x):
        dtype: Any = placement(*([model] if guide is None else [model, guide])).get("dtype")
        x, mask = _loaded(source, dtype or torch.get_default_dtype()), None
    values, observed = as_data_and_mask(
        x, mask, model=model, guide=guide, name=name, allow_empty_rows=allow_empty_rows
    )
    if check:
        check_named_support(model, values, observed, name)
    return Batch(values, observed)


@contextmanager
def closed_after_use(rows: Rows, x: Any) -> Iterator[Rows]:
    """Context manager: the :func:`observe_rows` of x, whose files are closed at the end; rows that
    were given as x stay open."""
    try:
        yield rows
    finally:
        if isinstance(rows, RowStream) and rows is not x:
            rows.close()


def whole_table(
    x: Any,
    mask: ArrayLike | None = None,
    *,
    schema: TableSchema | None,
    source: BlockSource | None = None,
) -> Float[Tensor, "N D"]:
    """All rows of x in memory and in their own dtype, for results that hold the table itself.

    Args:
        x, mask: as for :func:`observe_rows`; missing values become NaN.
        schema: the schema of the frame that the model was fitted to.
        source: the source of x, if it is open already.

    Raises:
        ValueError: if x gives other rows each time it is read.
        TypeError, ValueError: as :func:`observe_rows`.
    """
    with kept_generators([]):
        source = source or row_source(x, mask, schema=schema)
    if source is None or is_block_list(x):
        return as_matrix(x, mask=mask, schema=schema)
    if not source.repeatable:
        raise ValueError(
            "x gives other rows each time it is read, so that its observed values cannot be kept; "
            "give rows without random changes"
        )
    return _loaded(source)


def _is_loaded(source: BlockSource) -> bool:
    small = source.num_rows * source.width <= LOADED_NUMBERS
    return small and source.repeatable and source.shuffled


def _loaded(source: BlockSource, dtype: torch.dtype | None = None) -> Tensor:
    """All rows, with NaN where a value is missing; by default in the dtype of the first block."""
    x = None
    with kept_generators([]):
        for low, high in source.blocks():
            block = source.read(low, high)
            block = block if dtype is None else block.to(dtype)
            x = block.new_empty(source.num_rows, source.width) if x is None else x
            x[low:high] = block
            source.release()
    assert x is not None
    return x
