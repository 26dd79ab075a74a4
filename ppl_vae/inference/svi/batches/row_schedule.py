"""The schedule of a fit to rows in memory, or to those of a source."""

from ppl_vae.core.text import counted
from ppl_vae.data.sources.block_source import BlockSource
from ppl_vae.data.sources.row_stream import Rows, RowStream
from ppl_vae.inference.svi.batches.schedule import Schedule


def schedule_of(
    rows: Rows,
    source: BlockSource | None,
    batch_size: int | None,
    epochs: int | None,
    steps: int | None,
    *,
    refresh: bool,
    drop_last: bool,
    resumable: bool,
) -> Schedule:
    """The schedule of a fit.

    Args:
        rows: all rows.
        source: that of the rows, whose batches are used if it states any; None for a matrix.
        batch_size, epochs, steps, refresh, drop_last: as for :meth:`.Schedule.of`.
        resumable: whether the fit writes checkpoints.

    Raises:
        ValueError: if it states others than the arguments, or cannot be read as it must be.
    """
    if source is not None and source.batch_size is not None:
        if batch_size not in (None, source.batch_size):
            raise ValueError(
                f"{batch_size=} is not the batch_size of the DataLoader, {source.batch_size}; "
                "give only one of them"
            )
        batch_size = min(source.batch_size, source.num_rows)
        drop_last = drop_last or source.drop_last
    order = None
    if isinstance(rows, RowStream):
        order = rows.order
        _check_stream(rows, batch_size, refresh=refresh, resumable=resumable)
    return Schedule.of(
        len(rows), batch_size, epochs, steps, refresh=refresh, drop_last=drop_last, order=order
    )


def _check_stream(
    rows: RowStream, batch_size: int | None, *, refresh: bool, resumable: bool
) -> None:
    if batch_size is None:
        raise ValueError(
            f"batch_size is required for rows that are read in blocks; x has {len(rows)} rows"
        )
    if refresh:
        raise ValueError(
            "epoch_transform needs all rows in memory, but those of x are read in blocks; let a "
            "torch Dataset transform its items, which are then new in each epoch"
        )
    if resumable and not rows.source.repeatable:
        raise ValueError(
            "checkpoint= needs an x that gives the same rows each time it is read, so that a fit "
            "resumes at the exact row, but two readings of the first rows differ; set the "
            "generator of a DataLoader and the seeds of random transforms, or fit without a "
            "checkpoint"
        )


def empty_rows_kept_note(rows: Rows) -> tuple[str, ...]:
    """A note on rows with nothing observed, if there are any."""
    if isinstance(rows, RowStream):
        number = len(rows.empty_rows)
    else:
        number = 0 if rows.mask is None else int((~rows.mask.any(1)).sum())
    if not number:
        return ()
    return (
        f"{counted(number, 'row')} with nothing observed took part: the bound of such a row is "
        "minus the KL of q(z | x) from p(z), at most zero, and counts in averages per datum",
    )
