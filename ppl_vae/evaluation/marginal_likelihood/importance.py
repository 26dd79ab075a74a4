"""Estimates of the marginal log-likelihood of any pair, with their reliability."""

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from pyro import poutine
from torch import Tensor

from ppl_vae.core.arrays.inputs import labels_of
from ppl_vae.core.batch import Batch
from ppl_vae.core.global_sites import PriorProposal
from ppl_vae.core.nonfinite_pairs import nonfinite_sites_named
from ppl_vae.core.pair import Pair
from ppl_vae.core.processes.divided_rows import DividedRows
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import isolated_store
from ppl_vae.core.validation import ArrayLike, check_int, check_option, check_rows_observed
from ppl_vae.data.sources.observed_rows import closed_after_use, observe_rows
from ppl_vae.data.sources.row_blocks import RowSource, empty_rows_dropped_note
from ppl_vae.data.sources.row_stream import Rows, RowStream, describe_rows
from ppl_vae.evaluation.marginal_likelihood.annealed import AISWeights, Annealing
from ppl_vae.evaluation.marginal_likelihood.batching import (
    LogWeightSampler,
    block_size,
    check_log_weights,
    rows_at_once,
)
from ppl_vae.evaluation.marginal_likelihood.call_runner import CallRunner
from ppl_vae.evaluation.marginal_likelihood.discrete_sites import (
    LatentDiagnostics,
    diagnose_latents,
)
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood, log_mean_weights
from ppl_vae.evaluation.marginal_likelihood.local_vi import LocalVI
from ppl_vae.evaluation.marginal_likelihood.reliability import (
    WeightSummary,
    assess_reliability,
    summarize_weights,
)
from ppl_vae.evaluation.marginal_likelihood.scored_entries import (
    entries_per_row,
    num_scored,
)
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.objectives.divergences import check_importance_samplable

METHODS = ("importance", "prior", "annealed")


@torch.no_grad()
def log_likelihood(
    model: ProgramLike,
    guide: ProgramLike | None,
    x: RowSource,
    num_samples: int = 1000,
    *,
    method: str = "importance",
    refine: int = 0,
    covariance: str | None = None,
    annealing: Annealing | None = None,
    mask: ArrayLike | None = None,
    rows: Int[Tensor, " R"] | None = None,
    capture: bool | str = "auto",
    precision: str = "float32",
    seed: int | None = None,
) -> LogLikelihood:
    """Estimate log p(x_n) of each datum by log (1/S sum_s p(x_n, z_s) / q(z_s | x_n)).

    Draws and data are processed in batches, so that memory grows with neither.

    With global latent variables theta, the estimate is that of the *posterior predictive*
    density, log E_q(theta) p(x_n | theta), with q(theta) the guide: the mean is over draws
    theta_s, which the data share, and weights p(x_n, z_s | theta_s) / q(z_s | x_n, theta_s). It is
    for data that theta was not fitted to. The error of the mean over data takes the shared draws
    into account.

    Args:
        model, guide: any pair under the contract; it is run in evaluation mode. The guide is the
            proposal. With ``method="prior"`` only its global variables are used, and it may be
            None: all draws are then from the prior, and global variables give the prior
            predictive density. With ``"annealed"``, chains start from the prior if it is None.
        x: the whole data, (N, D), of any kind; sources larger than memory are read in blocks
            (:func:`~ppl_vae.data.sources.row_sources.row_source`). Guides with a table identify
            rows by their index in it. Rows with nothing observed are left out, with a note: their
            log p is 0, that of no event, which is no number to average.
        num_samples: draws per datum, S; with ``method="annealed"``, chains.
        method: ``"importance"``: draws from the guide. ``"prior"``: draws from the prior, with
            weights p(x | z). ``"annealed"``: chains from the guide's q, refined or not, to the
            posterior (:mod:`ppl_vae.evaluation.marginal_likelihood.annealed`), for posteriors
            that no guide approximates well.
        refine: the number of steps for which a copy of the guide's Gaussian is first optimized
            for every datum by Adam, with a learning rate that falls to zero along a cosine. The
            guide itself is left unchanged.
        covariance: the family of the refined Gaussian; by default ``"full"``.
        annealing: the settings of the chains; by default ``Annealing()``.
        mask: True where x is observed; NaN in x has the same meaning.
        rows: the rows of x to evaluate; by default all.
        capture: how draws, refinement and chains are computed: False, eagerly, by Pyro's
            handlers; ``"recorded"``, by the tensor operations of an eager call, which were
            recorded, with the same numbers; True, by code that is compiled from them, with the
            same draws. ``"auto"`` begins eagerly and takes what is worth its time for the
            remaining calls. Pairs that cannot be captured run eagerly, with a warning;
            ``LogLikelihood.execution`` states what was done and why.
        precision: precision of float32 matrix products, see
            :func:`ppl_vae.core.state.precision`. Weights are summed in float64 in any case.
        seed: seed of the draws.

    Raises:
        ValueError: if data or arguments are invalid; if :func:`ppl_vae.core.traces.check_pair`
            rejects the pair; with a flat prior, or a guide that is a point mass (those of an
            autoencoder); or if chains cannot move a site
            (:mod:`ppl_vae.evaluation.marginal_likelihood.annealed`).
    """
    with ExitStack() as stack:
        with Processes.current().together():
            proposal = _proposal(model, guide, method, refine, covariance)
            if annealing is not None and method != "annealed":
                raise ValueError(f"annealing= is for method='annealed'; method is {method!r}")
            num_samples, pair = check_int("num_samples", num_samples), Pair(model, proposal)
            labels = labels_of(x)
            observed = observe_rows(x, mask, model=model, guide=guide, allow_empty_rows=True)
            data = stack.enter_context(closed_after_use(observed, x))
            rows, left_out = _scored_rows(data, rows)
        estimate, execution, entries = _estimate(
            pair, guide, data, rows, num_samples,
            method=method, refine=refine, covariance=covariance, annealing=annealing,
            capture=capture, precision=precision, seed=seed,
        )  # fmt: skip
        num_entries = num_scored(pair, data, rows, entries)
        num_entries = num_entries if num_entries is None else num_entries.to(estimate.value)
    notes = *pair.notes(), *left_out, *estimate.notes
    labels = labels.take(rows)
    return replace(
        estimate, execution=execution, num_entries=num_entries, notes=notes, labels=labels
    )


def _estimate(
    pair: Pair,
    guide: ProgramLike | None,
    data: Rows,
    rows: Int[Tensor, " R"],
    num_samples: int,
    *,
    method: str,
    refine: int,
    covariance: str | None,
    annealing: Annealing | None,
    capture: bool | str,
    precision: str,
    seed: int | None,
) -> tuple[LogLikelihood, str, int]:
    # The estimate, how it was computed, and the number of entries of a row that are scored.
    settings = f"{num_samples=}, {method=}, {refine=}, {covariance=}, {annealing=}, {precision=}"
    division = DividedRows.of(
        "log_likelihood", pair, partial(describe_rows, data), rows, seed, settings=settings
    )
    own, together, diagnostics = division.own, division.processes.together, None
    with ExitStack() as stack, together(), isolated_store(), division.seeded(), pair.eval_mode():
        first = next(data.split(rows[:1], 1))
        chains = annealing or Annealing() if method == "annealed" else None
        sampler, size = _sampler(
            chains, first.x, len(own), num_samples, capture, precision, refined=refine > 0
        )
        num_steps = -(-len(own) // size) * refine
        local_vi = LocalVI(
            steps=max(refine, 1),
            covariance=covariance or "full",
            runner=CallRunner(capture, num_steps, precision=precision),
        )
        for runner in (sampler.runner, local_vi.runner):
            stack.enter_context(closing(runner))
        start = next(data.split(rows[:size], size))
        check_importance_samplable(pair, start)
        num_entries = entries_per_row(pair, start)
        has_globals = pair.has_globals(start)
        if has_globals and method == "prior" and guide is not None:
            pair = pair.with_guide(PriorProposal(pair.model, guide))
        batches = data.split(own, size)
        proposals = ((local_vi(pair, batch) if refine else pair, batch) for batch in batches)
        parts = [weight_summary(sampler, q, batch, num_samples) for q, batch in proposals]
        if method != "annealed" and not refine:
            large_batches = data.split(own, rows_at_once(first.x))
            diagnostics = diagnose_latents(pair, start, large_batches, num_samples)
    parts, diagnostics = _of_all_rows(parts, diagnostics, division)
    estimate = combine(parts, num_samples, method, refine, diagnostics, has_globals=has_globals)
    refinement = f"; refinement {local_vi.runner.execution}" if refine else ""
    return estimate, sampler.execution + refinement, num_entries


def _of_all_rows(
    parts: Sequence[WeightSummary], diagnostics: LatentDiagnostics | None, division: DividedRows
) -> tuple[list[WeightSummary], LatentDiagnostics | None]:
    # What each process found for its rows.
    if diagnostics is not None and diagnostics.undersampled is not None:
        undersampled = division.gather_columns(diagnostics.undersampled)
        diagnostics = diagnostics._replace(undersampled=undersampled)
    return [division.gather_columns(_joined(parts))], diagnostics


def _scored_rows(
    data: Rows, rows: Int[Tensor, " R"] | None
) -> tuple[Int[Tensor, " R"], tuple[str, ...]]:
    # The rows with an observed entry, and a note on the others.
    rows = (torch.arange(len(data)) if rows is None else rows).to(data.device)
    if isinstance(data, RowStream):
        empty = torch.isin(rows, data.empty_rows.to(rows.device))
        return rows[~empty], empty_rows_dropped_note(rows[empty].tolist())
    if data.mask is None or bool((some := data.mask[rows].any(1)).all()):
        return rows, ()
    if not bool(some.any()):
        check_rows_observed(data.mask)
    return rows[some], empty_rows_dropped_note(rows[~some].tolist())


def _sampler(
    annealing: Annealing | None,
    x: Tensor,
    num_rows: int,
    num_samples: int,
    capture: bool | str,
    precision: str,
    *,
    refined: bool,
) -> tuple[LogWeightSampler, int]:
    # The sampler of log weights, and the number of rows of a batch.
    if annealing is not None:
        chains = AISWeights(
            annealing, x, num_rows, num_samples, capture=capture, precision=precision
        )
        return chains, chains.block_size
    num_calls = num_samples * num_rows // rows_at_once(x)
    sampler = LogWeightSampler(CallRunner(capture, num_calls, precision=precision))
    return sampler, block_size(x, num_samples, refined=refined)


def combine(
    parts: Sequence[WeightSummary],
    num_samples: int,
    method: str,
    refine: int,
    diagnostics: LatentDiagnostics | None = None,
    *,
    has_globals: bool = False,
) -> LogLikelihood:
    """The estimates of several batches as one result, whose reliability is assessed jointly.

    Args:
        parts: the statistics of the weights of each batch.
        num_samples, method, refine: the settings of the estimates.
        diagnostics: the diagnostics of the latent sites of the pair, where they were computed.
        has_globals: whether the data of a batch share draws of global variables.
    """
    summary = _joined(parts)
    undersampled = None if diagnostics is None else diagnostics.undersampled
    mean_variance = float(summary.joint_variance.sum()) / len(summary.value) ** 2
    reliability = assess_reliability(
        summary,
        num_samples,
        None if undersampled is None else undersampled.error,
        complete=diagnostics is not None and diagnostics.complete,
    )
    return LogLikelihood(
        value=summary.value,
        standard_error=reliability.standard_error,
        ess=summary.ess,
        k_hat=summary.k_hat,
        reliable=reliability.reliable,
        num_samples=num_samples,
        method=method,
        refine=refine,
        curve=summary.curve,
        notes=() if diagnostics is None else diagnostics.notes,
        tail_index=reliability.tail_index,
        limit=reliability.limit,
        pool_size=reliability.pool_size,
        coverage=reliability.coverage,
        undersampled_mass=None if undersampled is None else undersampled.mass,
        refinable=diagnostics is None or diagnostics.refinable,
        global_error=math.sqrt(mean_variance) if has_globals else None,
    )


def _joined(parts: Sequence[WeightSummary]) -> WeightSummary:
    return WeightSummary(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _proposal(
    model: ProgramLike, guide: ProgramLike | None, method: str, refine: int, family: str | None
) -> ProgramLike:
    check_option("method", method, METHODS)
    check_refinement(refine, family)
    if method == "prior" or (method == "annealed" and guide is None):
        if refine:
            raise ValueError("refine= needs method='importance' and a guide to start from")
        return prior_guide(model)
    if guide is None:
        raise ValueError("method='importance' needs a guide; method='prior' does not")
    return guide


def check_refinement(refine: int, family: str | None) -> None:
    """Check the number of refinement steps of each datum's q, and its family.

    Raises:
        ValueError: if refine is not an integer >= 0, or the family is unknown or not used.
    """
    check_int("refine", refine, 0)
    if family is not None:
        check_option("covariance", family, COVARIANCES)
    if family is not None and not refine:
        raise ValueError("covariance= is the family of the refined q; it needs refine=steps")


def prior_guide(model: ProgramLike) -> ProgramLike:
    """A guide that draws from the model's prior: the model without its observed sites."""

    def hide(site: Any) -> bool:
        return site["type"] == "sample" and bool(site["is_observed"])

    return poutine.block(model, hide_fn=hide)


@torch.no_grad()
def weight_summary(
    sampler: LogWeightSampler, pair: Pair, batch: Batch, num_samples: int
) -> WeightSummary:
    """Draw the log weights of a batch, and compute the statistics that :func:`combine` needs.

    Raises:
        FloatingPointError: if a log weight is NaN.
    """
    with nonfinite_sites_named(pair, batch):
        log_weights = sampler(pair, batch, num_samples)
        check_log_weights(log_weights, batch)
    return summarize_weights(log_weights, log_mean_weights(log_weights))
