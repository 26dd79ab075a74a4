"""Caveats on a stochastic fit."""

from ppl_vae.inference.svi.batches.minibatch import MinibatchObjective
from ppl_vae.inference.svi.batches.schedule import Schedule


def fit_notes(
    minibatch: MinibatchObjective, schedule: Schedule, order_seed: int, resumed: str
) -> tuple[str, ...]:
    """Notes of the pair and of its data, on a checkpoint, and on rows that were never drawn.

    Args:
        minibatch: the objective on minibatches.
        schedule: the rows of each step.
        order_seed: the seed of the order of the rows.
        resumed: from which checkpoint the fit was resumed; empty if it was not.
    """
    notes = minibatch.pair.notes()
    notes += minibatch.notes()
    notes += (resumed,) if resumed else ()
    if not (schedule.drop_last and schedule.remainder):
        return notes
    never = schedule.num_never_drawn(order_seed, minibatch.whole.device)
    return (
        *notes,
        f"drop_last left {schedule.remainder} of {schedule.num_data} rows out of each epoch, "
        f"different ones in each; {never} were in no batch at all",
    )
