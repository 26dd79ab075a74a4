"""The inference gap, log p - ELBO = approximation gap + amortization gap."""

from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.core.arrays.digest import describe_tensor
from ppl_vae.core.arrays.inputs import labels_of
from ppl_vae.core.nonfinite_pairs import nonfinite_sites_named
from ppl_vae.core.pair import Pair
from ppl_vae.core.processes.divided_rows import DividedRows
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.core.validation import ArrayLike, as_vector
from ppl_vae.data.sources.observed_rows import closed_after_use, observe_rows
from ppl_vae.data.sources.row_blocks import RowSource
from ppl_vae.data.sources.row_stream import Rows, describe_rows
from ppl_vae.evaluation.inference_gaps.estimator import GapEstimator, GapSettings
from ppl_vae.evaluation.inference_gaps.family import family_of
from ppl_vae.evaluation.inference_gaps.global_draws import (
    average_over_draws,
    check_no_constants,
    conditioned_on_draws,
)
from ppl_vae.evaluation.inference_gaps.local_optimum import (
    MAX_POINTS,
)
from ppl_vae.evaluation.inference_gaps.result import Gaps
from ppl_vae.evaluation.marginal_likelihood.batching import (
    block_size,
    rows_at_once,
)
from ppl_vae.evaluation.marginal_likelihood.call_runner import CallRunner
from ppl_vae.objectives.divergences import check_importance_samplable

ROWS_FACTOR = 8
"""The number of rows at once relative to other evaluations, as in :class:`LocalVI`."""


def gaps(
    model: ProgramLike,
    guide: ProgramLike,
    x: RowSource,
    *,
    log_p: Float[Tensor, " N"] | None = None,
    best: ProgramLike | None = None,
    covariance: str | None = None,
    steps: int = 300,
    num_samples: int = 1000,
    tolerance: float | None = 1e-3,
    num_global_draws: int = 8,
    mask: ArrayLike | None = None,
    rows: Int[Tensor, " R"] | None = None,
    capture: bool | str = "auto",
    seed: int | None = None,
) -> Gaps:
    """Split log p - ELBO of a pair into the approximation gap and the amortization gap.

    The family is that of the guide's own q: a Gaussian with one of the covariances of
    :mod:`ppl_vae.guides.families`, or any class of distributions with parameters and
    reparameterized draws, all of whose parameters are then free for each datum (low-rank
    Gaussians, Gamma and Student distributions, Gaussians through affine maps, a product of
    several). For any other q the gap is not split, and ``Gaps.unsplit_reason`` states why: a
    flow with weights that all data share, a site whose q depends on the draw of another,
    auxiliary sites, mixtures and discrete sites.

    All ELBOs are estimated with common noise, which reduces the variance of their difference; see
    :class:`ppl_vae.evaluation.inference_gaps.local_optimum.SphericalRadialRule`. If log p(x, z)
    is quadratic in z and q is Gaussian with at most 16 dimensions per datum, they are exact.

    With global latent variables theta, the gaps of the data are averages, over draws of theta from
    the guide, of the gaps given theta; ``Gaps.global_part`` is the gap of q(theta) itself.

    Args:
        model, guide: any pair under the contract.
        x: the whole data, (N, D), in memory or read in blocks.
        log_p: exact log p(x_n) of the evaluated rows, if it is known. Otherwise it is estimated
            by importance sampling with a full-covariance Gaussian refined from q*. If q* is not
            such a Gaussian, q* itself is a second proposal (or the guide, if there is no q*). The
            estimate with the smaller error is used unless the mean of the other is higher by more
            than both errors, since both are lower bounds in expectation.
        best: a guide that is known to be the best of the family for each datum; by default it is
            searched for.
        covariance: the family, a covariance; by default the guide's own family.
        steps: the number of steps of the search for q*, and of the refinement for log p.
        num_samples: draws per datum for log p.
        tolerance: the search continues, in rounds of 50 steps, until a round gains less than
            this, in nats per datum, or for 20 rounds; ``last_gain`` and ``remaining`` report the
            gain of the last round. None: there are no rounds.
        num_global_draws: draws of the global latent variables, if there are any, each of which
            costs as much as the gaps of a pair without them.
        mask: True where x is observed; NaN in x has the same meaning.
        rows: the rows of x to evaluate; by default all.
        capture: how the searches and log p are computed, see :func:`~ppl_vae.log_likelihood`.
        seed: seed of the draws.

    Raises:
        ValueError: as :func:`~ppl_vae.evaluation.marginal_likelihood.importance.log_likelihood`,
            and if the tolerance is not positive; if ``log_p`` or ``best`` is given for a model
            with global latent variables.

    References:
        Cremer, Li, Duvenaud: Inference suboptimality in variational autoencoders (2018).
    """
    with ExitStack() as stack:
        with Processes.current().together():
            settings = GapSettings(
                covariance, best, steps, num_samples, tolerance, num_global_draws, capture
            )
            log_p = None if log_p is None else as_vector(log_p, name="log_p")
            observed = observe_rows(x, mask, model=model, guide=guide, check=False)
            data = stack.enter_context(closed_after_use(observed, x))
            rows = torch.arange(len(data)) if rows is None else rows
            _check_log_p(log_p, len(rows))
        found, log_ratios = _estimates(Pair(model, guide), data, rows, settings, log_p, seed)
    result = found[0]
    if log_ratios is not None:
        has_all_data = len(rows) == len(data)
        result = average_over_draws(found, log_ratios, has_all_data=has_all_data)
    return replace(result, labels=labels_of(x).take(rows))


def _estimates(
    pair: Pair,
    data: Rows,
    rows: Int[Tensor, " R"],
    settings: GapSettings,
    log_p: Float[Tensor, " R"] | None,
    seed: int | None,
) -> tuple[list[Gaps], Float[Tensor, " G"] | None]:
    # The gaps for each draw of the global latent variables, and their log density ratios.
    known = None if log_p is None else describe_tensor(log_p)
    division = DividedRows.of(
        "gaps", pair, partial(describe_rows, data), rows, seed, settings=settings, log_p=known
    )
    (one,) = data.split(rows[:1], 1)
    most_rows = max(1, ROWS_FACTOR * rows_at_once(one.x) // MAX_POINTS)
    size = min(block_size(one.x, settings.num_samples, refined=True), most_rows)
    together, log_ratios = division.processes.together, None
    num_batches = -(-len(division.own) // size)

    def make_runner(calls_per_batch: int) -> CallRunner:
        runner = CallRunner(settings.capture, num_batches * calls_per_batch)
        return stack.enter_context(closing(runner))

    with ExitStack() as stack, together(), isolated_store(), pair.eval_mode():
        stack.enter_context(seeded(division.seed))
        pairs, first = [pair], next(data.split(rows[:size], size))
        check_importance_samplable(pair, first)
        if pair.has_globals(first):
            check_no_constants(log_p=log_p, best=settings.best)
            pairs, log_ratios = conditioned_on_draws(pair, first, settings.num_global_draws)
        division.seed_own_draws()
        estimators = []
        for each in pairs:
            with nonfinite_sites_named(each, first):
                family = family_of(each, first, settings.covariance)
            estimator = GapEstimator(each, family, settings, make_runner)
            for batch in data.split(division.own, size):
                with nonfinite_sites_named(each, batch):
                    estimator.evaluate(batch, estimates_log_p=log_p is None)
            estimators.append(estimator)
    return [each.of_all_rows(division).result(log_p) for each in estimators], log_ratios


def _check_log_p(log_p: Any, number: int) -> None:
    if log_p is not None and log_p.shape != (number,):
        raise ValueError(
            f"log_p must have one value for each of {number} rows; its shape is "
            f"{tuple(log_p.shape)}"
        )
