"""Statistics of all training rows that likelihoods have, computed before an evaluation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.data.sources.observed_rows import closed_after_use, observe_rows
from ppl_vae.data.sources.row_stream import Rows
from ppl_vae.likelihoods.base import Likelihood
from ppl_vae.likelihoods.gaussian import OptimalGaussian

ROWS_PER_RUN = 4096
"""The largest number of (draw, datum) rows that go through the programs at once."""
FINAL_ROWS = 20_000
"""The number of (draw, datum) rows used to compute the final scale, but at least all data."""
VALIDATION_ROWS = 2_000
"""The same for the temporary scale of a validation during training."""


def freeze_scale(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    num_samples: int | None = None,
    seed: int | None = 0,
) -> None:
    """Freeze the scale of a pair's :class:`~ppl_vae.likelihoods.OptimalGaussian`, in place.

    sigma^2 becomes the mean squared residual over the observed entries of x and draws of z from
    the guide, which maximises the ELBO of x. :func:`~ppl_vae.fit_svi` does this at its end; after
    any other kind of training it must be called before the pair is evaluated.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the training data, (N, D); NaN marks a missing value.
        mask: True where observed.
        num_samples: draws of z per datum; by default enough for 20,000 rows in total.
        seed: the seed of the draws.

    Raises:
        ValueError: if the pair has no such likelihood; bad data.
    """
    pair = Pair(model, guide)
    if not _has_optimal_scale(pair):
        raise ValueError("the pair has no OptimalGaussian, so there is no scale to freeze")
    if num_samples is not None:
        check_int("num_samples", num_samples)
    with closed_after_use(observe_rows(x, mask, model=model, guide=guide), x) as whole:
        set_data_statistics(pair, whole, num_samples=num_samples, seed=seed)


def set_data_statistics(
    pair: Pair, whole: Rows, *, num_samples: int | None = None, seed: int | None = 0
) -> None:
    """Compute the likelihoods' statistics of all rows; see :func:`freeze_scale`."""
    if not (parts := _with_data_statistics(pair)):
        return
    with ExitStack() as stack:
        for context in (torch.no_grad(), isolated_store(), seeded(seed)):
            stack.enter_context(context)
        stack.enter_context(pair.train_mode(False))
        for part in parts:
            stack.enter_context(part.collect_statistics())
        remaining = num_samples or -(-FINAL_ROWS // len(whole))
        while remaining:
            draws = min(remaining, max(1, ROWS_PER_RUN // len(whole)))
            for batch in whole.split(torch.arange(len(whole)), ROWS_PER_RUN):
                # Rows are repeated: some programs do not run under a plate of samples.
                pair.run(batch, num_samples=draws)
            remaining -= draws


@contextmanager
def frozen_scale(pair: Pair, whole: Rows) -> Iterator[None]:
    """Context manager: a pair that is being trained can be evaluated.

    Args:
        pair: the pair.
        whole: its training data.
    """
    if not _has_optimal_scale(pair):
        yield
        return
    set_data_statistics(pair, whole, num_samples=-(-VALIDATION_ROWS // len(whole)))
    try:
        yield
    finally:
        unfreeze(pair)


def unfreeze(pair: Pair) -> None:
    """Discard these statistics at the start of training."""
    for part in _with_data_statistics(pair):
        if isinstance(part, OptimalGaussian):
            part.unfreeze()


def _has_optimal_scale(pair: Pair) -> bool:
    return any(isinstance(part, OptimalGaussian) for part in _with_data_statistics(pair))


def _with_data_statistics(pair: Pair) -> list[Likelihood]:
    parts = (part for module in pair.modules for part in module.modules())
    found = {
        id(part): part
        for part in parts
        if isinstance(part, Likelihood) and part.has_data_statistics
    }
    return list(found.values())
