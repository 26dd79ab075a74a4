"""Looks at all training rows that some likelihoods need before they can be evaluated."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike, as_data_and_mask, check_support, modules_of
from ppl_vae.core.state import isolated_store, mode, seeded
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.likelihoods.base import Likelihood
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.objectives.bounds import batch_keywords

ROWS_AT_ONCE = 4096
ENOUGH, A_LOOK = 20_000, 2_000
"""So many rows (draws times data), or all data once, are run for a scale that is kept, and for one
that is gone after a look at validation rows."""


def freeze_scale(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    num_samples: int | None = None,
    seed: int | None = 0,
) -> None:
    """Freeze the optimal scale of a pair's ``Gaussian("optimal")``, in place.

    sigma^2 is the mean squared residual over the observed cells of x and draws of z from the
    guide, at which the ELBO of x is highest. :func:`~ppl_vae.fit_svi` ends with it; after
    training of any other kind it must be called before anything is evaluated.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the training data, (N, D); NaN marks a missing value.
        mask: True where observed.
        num_samples: draws of z per datum; by default as many as make 20,000 rows in all.
        seed: of the draws.

    Raises:
        ValueError: if the pair has no such likelihood; bad data.
    """
    if not _has_optimal_scale(model, guide):
        raise ValueError("the pair has no Gaussian('optimal'), so there is no scale to freeze")
    if num_samples is not None:
        check_int("num_samples", num_samples)
    x, mask = as_data_and_mask(x, mask, model=model, guide=guide)
    check_support(model, x, mask)
    calibrate(model, guide, x, mask, num_samples=num_samples, seed=seed)


def calibrate(
    model: ProgramLike,
    guide: ProgramLike,
    x: Tensor,
    mask: Tensor | None,
    *,
    num_samples: int | None = None,
    seed: int | None = 0,
) -> None:
    """Show all rows to the likelihoods of a pair that ask for it; see :func:`freeze_scale`."""
    if not (parts := _needing_calibration(model, guide)):
        return
    with ExitStack() as stack:
        for context in (torch.no_grad(), isolated_store(), seeded(seed)):
            stack.enter_context(context)
        stack.enter_context(mode(model, guide, training=False))
        for part in parts:
            stack.enter_context(part.calibrate())
        left = num_samples or -(-ENOUGH // len(x))
        while left:
            draws = min(left, max(1, ROWS_AT_ONCE // len(x)))
            for rows in torch.arange(len(x), device=x.device).split(ROWS_AT_ONCE):
                # Rows are repeated, which programs can have that no plate of samples fits around.
                told = batch_keywords(x, mask, rows)
                Pair(model, guide).run(Batch(x[rows], **told), num_samples=draws)
            left -= draws


@contextmanager
def frozen(
    model: ProgramLike, guide: ProgramLike, x: Tensor, mask: Tensor | None
) -> Iterator[None]:
    """Inside, a pair that is in training can be evaluated."""
    if not _has_optimal_scale(model, guide):
        yield
        return
    calibrate(model, guide, x, mask, num_samples=-(-A_LOOK // len(x)))
    try:
        yield
    finally:
        unfreeze(model, guide)


def unfreeze(model: ProgramLike, guide: ProgramLike) -> None:
    """Let optimal scales be those of each batch again, as a fit begins."""
    for part in _needing_calibration(model, guide):
        part.unfreeze()


def _has_optimal_scale(model: ProgramLike, guide: ProgramLike) -> bool:
    parts = _needing_calibration(model, guide)
    return any(isinstance(part, Gaussian) and part.kind == "optimal" for part in parts)


def _needing_calibration(model: ProgramLike, guide: ProgramLike) -> list[Likelihood]:
    parts = (part for module in modules_of(model, guide) for part in module.modules())
    found = {
        id(part): part for part in parts if isinstance(part, Likelihood) and part.needs_calibration
    }
    return list(found.values())
