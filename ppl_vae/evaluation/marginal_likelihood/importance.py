"""Marginal log-likelihoods of any pair, by importance sampling or annealed, with a verdict."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from pyro import poutine
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import (
    ProgramLike,
    as_data_and_mask,
    bound_object,
    check_support,
    notes_of,
)
from ppl_vae.core.state import eval_mode, isolated_store, seeded
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.evaluation.marginal_likelihood.annealed import AISWeights, Annealing
from ppl_vae.evaluation.marginal_likelihood.batching import (
    BlockRunner,
    LocalVI,
    LogWeightSampler,
    block_size,
    rows_at_once,
)
from ppl_vae.evaluation.marginal_likelihood.discrete_sites import Examined, examine
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood, log_mean_weights
from ppl_vae.evaluation.marginal_likelihood.reliability import WeightSummary, judge, summarise
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.objectives.bounds import batch_keywords
from ppl_vae.objectives.divergences import check_importance_samplable

METHODS = ("importance", "prior", "annealed")


@torch.no_grad()
def log_likelihood(
    model: ProgramLike,
    guide: ProgramLike | None,
    x: ArrayLike,
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

    Draws and data are streamed, so that memory does not grow with either.

    Args:
        model, guide: any pair under the contract; run in evaluation mode. The guide is the
            proposal; ``method="prior"`` does without one (None), ``"annealed"`` then starts from
            the prior.
        x: the whole data, (N, D); rows are looked up by their place in it.
        num_samples: draws per datum, S; with ``method="annealed"``, chains.
        method: ``"importance"``; ``"prior"``: draws from the prior, weights p(x | z);
            ``"annealed"``: chains that walk from the guide's q, refined or not, to the posterior
            (:mod:`ppl_vae.evaluation.marginal_likelihood.annealed`), for posteriors that no guide
            comes near.
        refine: optimise a copy of the guide's Gaussian for every datum by so many steps first
            (:func:`ppl_vae.evaluation.local_guides.local_gaussian.refine`). The guide itself stays
            as it is.
        covariance: the family of the refined Gaussian; by default ``"full"``.
        annealing: how chains walk; by default ``Annealing()``.
        mask: True where x is observed; NaN in x says the same.
        rows: look at these rows of x only; by default at all.
        capture: run as compiled tensor code: ``"auto"`` if the time left is worth compiling;
            True from the start. Draws are those of an eager run from the same seed. What cannot
            be captured runs eagerly, with a warning.
        precision: of float32 matrix products, see :func:`ppl_vae.core.state.precision`. Weights
            are summed in float64 in any case.
        seed: of the draws.

    Raises:
        ValueError: bad data or arguments; what :func:`ppl_vae.core.traces.check_pair` refuses; a
            flat prior or a point for a guide (an autoencoder's); a site that chains cannot move
            (:class:`ppl_vae.evaluation.marginal_likelihood.annealing_path.Path`).
    """
    proposal = _proposal(model, guide, method, refine, covariance)
    if annealing is not None and method != "annealed":
        raise ValueError(f"annealing= is for method='annealed'; method is {method!r}")
    num_samples = check_int("num_samples", num_samples)
    x, mask = as_data_and_mask(x, mask, model=model, guide=guide)
    check_support(model, x, mask)
    rows = torch.arange(len(x)) if rows is None else rows
    size = block_size(x, num_samples, refined=refine > 0)
    weigher = LogWeightSampler(
        model, BlockRunner(capture, num_samples * len(rows) // rows_at_once(x)), precision
    )
    if method == "annealed":
        how = {"capture": capture, "numbers": precision}
        weigher = AISWeights(model, annealing or Annealing(), x, len(rows), num_samples, **how)
        size = weigher.block_size
    blocks = rows.to(x.device).split(size)
    how = {"steps": max(refine, 1), "covariance": covariance or "full", "numbers": precision}
    refiner = LocalVI(model, runner=BlockRunner(capture, len(blocks)), **how)
    parts: list[WeightSummary] = []
    with isolated_store(), seeded(seed), eval_mode(model, proposal):
        check_importance_samplable(Pair(model, proposal), Batch(x, mask).rows(blocks[0]))
        for block_rows in blocks:
            block = x[block_rows], batch_keywords(x, mask, block_rows)
            local = refiner(proposal, *block) if refine else proposal
            parts.append(_estimate(weigher, local, *block, num_samples))
        examined = None
        if method != "annealed" and not refine:
            told = [
                (x[part], batch_keywords(x, mask, part))
                for part in rows.to(x.device).split(rows_at_once(x))
            ]
            examined = examine(model, proposal, told, num_samples)
    found = collect(parts, num_samples, method, refine, examined)
    columns = getattr(bound_object(model), "scored_columns", slice(None))  # of a conditional model
    cells = torch.full_like(found.value, x[:, columns].shape[1])
    if mask is not None:
        cells = mask[rows.to(x.device), columns].sum(1).to(cells)
    notes = *notes_of(model, proposal), *found.notes
    return replace(found, path=weigher.why, cells=cells, notes=notes)


def collect(
    parts: list[WeightSummary],
    num_samples: int,
    method: str,
    refine: int,
    examined: Examined | None = None,
) -> LogLikelihood:
    """The estimates of several blocks of data as one result, judged in the light of all.

    Args:
        parts: what is known of the weights of each block.
        num_samples, method, refine: how they were drawn.
        examined: what the sites of the pair say, where they were looked at.
    """
    summary = WeightSummary(*(torch.cat(column) for column in zip(*parts, strict=True)))
    missed = None if examined is None else examined.missed
    complete = examined is not None and examined.complete
    found = judge(summary, num_samples, None if missed is None else missed.error, complete)
    return LogLikelihood(
        summary.value,
        found.standard_error,
        summary.ess,
        summary.k_hat,
        found.reliable,
        num_samples,
        method,
        refine,
        curve=summary.curve,
        notes=() if examined is None else examined.notes,
        tail_index=found.tail_index,
        limit=found.limit,
        coverage=found.coverage,
        missed=None if missed is None else missed.mass,
        refinable=examined is None or examined.refinable,
    )


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
    """Check how many steps each datum's own q is to be refined, and in which family.

    Raises:
        ValueError: if refine is no whole number >= 0, or the family is not known or not needed.
    """
    check_int("refine", refine, 0)
    if family is not None:
        check_option("covariance", family, COVARIANCES)
    if family is not None and not refine:
        raise ValueError("covariance= is the family of the refined q; it needs refine=steps")


def prior_guide(model: ProgramLike) -> ProgramLike:
    """A guide that draws from the model's prior: the model with its observed sites hidden."""

    def hide(site: Any) -> bool:
        return site["type"] == "sample" and bool(site["is_observed"])

    return poutine.block(model, hide_fn=hide)


def estimate(
    model: ProgramLike, guide: ProgramLike, x: Tensor, keywords: dict[str, Any], num_samples: int
) -> WeightSummary:
    """What :func:`collect` needs of a block of data.

    Raises:
        FloatingPointError: if a log weight is NaN.
    """
    weigher = LogWeightSampler(model, BlockRunner(False, 1))
    return _estimate(weigher, guide, x, keywords, num_samples)


@torch.no_grad()
def _estimate(
    weigher: LogWeightSampler,
    guide: ProgramLike,
    x: Tensor,
    keywords: dict[str, Any],
    num_samples: int,
) -> WeightSummary:
    weights = weigher(guide, x, keywords, num_samples)
    if bool(weights.isnan().any()):
        raise FloatingPointError(
            "log weights are NaN; do the model and the guide give finite densities on these data?"
        )
    return summarise(weights, log_mean_weights(weights))
