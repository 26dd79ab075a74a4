"""Marginal log-likelihoods of any pair, by importance sampling or annealed, with a verdict."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from pyro import poutine
from torch import Tensor

from ppl_vae.arguments import ArrayLike, at_least, choose_option
from ppl_vae.evaluation.annealed import Annealer, Annealing
from ppl_vae.evaluation.rails import Rails, Refiner, Weigher, block_size, rows_at_once
from ppl_vae.evaluation.reliability import (
    FEWEST_DRAWS,
    effective_sample_size,
    is_reliable,
    k_hat,
)
from ppl_vae.evaluation.weighable import check_weighable
from ppl_vae.families import COVARIANCES
from ppl_vae.objectives import batch_keywords
from ppl_vae.program import ProgramLike, as_observed, check_support, notes_of, owner_of
from ppl_vae.results import Result
from ppl_vae.state import evaluating, isolated_store, seeded

METHODS = ("importance", "prior", "annealed")
CURVE = (64, 16, 4, 1)
"""A convergence curve looks at so small parts of the draws."""


@dataclass(frozen=True, repr=False)
class LogLikelihood(Result):
    """Estimates of log p(x_n), one a datum.

    Attributes:
        value: log of the mean weight, in nats: log p(x_n) up to its error where ``reliable``;
            elsewhere no more than a lower bound in expectation.
        standard_error: of ``value``, from the spread of the weights, in nats.
        ess: effective sample size of the weights, 1..S.
        k_hat: Pareto tail index of the weights, see :func:`ppl_vae.evaluation.reliability.k_hat`.
        reliable: the verdict, see :func:`ppl_vae.evaluation.reliability.is_reliable`.
        num_samples: S, the draws a datum; chains, if annealed.
        method: ``"importance"``, ``"prior"``, ``"annealed"``, or ``"exact"`` where there was
            nothing to estimate.
        refine: steps spent on each datum's own q before drawing from it.
        path: how it was computed, eagerly or captured, and why.
        curve: ``value`` from the first S/64, S/16 and S/4 of the draws, and from all S, (N, 4); in
            expectation it rises towards log p. None where there was nothing to estimate.
        cells: how many cells of each datum were observed, (N,); None where it is not known.
        notes: what else a person should know of these numbers, from the pair.
    """

    value: Float[Tensor, " N"]
    standard_error: Float[Tensor, " N"]
    ess: Float[Tensor, " N"]
    k_hat: Float[Tensor, " N"]
    reliable: Bool[Tensor, " N"]
    num_samples: int
    method: str
    refine: int
    path: str = ""
    curve: Float[Tensor, "N C"] | None = None
    cells: Float[Tensor, " N"] | None = None
    notes: tuple[str, ...] = ()

    def shifted(self, nats: Float[Tensor, " N"]) -> Self:
        """The same in other units of the data, in which each log density is so much higher."""
        curve = None if self.curve is None else self.curve + nats[:, None]
        return replace(self, value=self.value + nats, curve=curve)

    def first(self, number: int) -> Self:
        """Of the first so many data."""
        columns = ("value", "standard_error", "ess", "k_hat", "reliable", "curve", "cells")
        found = {name: getattr(self, name) for name in columns}
        return replace(self, **{n: v[:number] for n, v in found.items() if v is not None})

    @property
    def convergence(self) -> tuple[tuple[int, float], ...]:
        """The mean over the data against the draws it was made of; empty without a curve."""
        if self.curve is None:
            return ()
        return tuple(zip(curve_draws(self.num_samples), self.curve.mean(0).tolist(), strict=True))

    @property
    def bits_per_dimension(self) -> float:
        """-log2 p of all data over the number of their observed cells: less is better.

        Raises:
            ValueError: if it is not known how many cells there were.
        """
        if self.cells is None:
            raise ValueError("it is not known how many cells the data had; cells= is missing")
        return -float(self.value.sum() / self.cells.sum()) / math.log(2)

    @property
    def mean(self) -> float:
        """Over the data, in nats a datum."""
        return float(self.value.mean())

    @property
    def mean_error(self) -> float:
        """Standard error of :attr:`mean` as an estimate for the population the data are from.

        The standard deviation over data / sqrt(N); it holds the Monte Carlo error already.
        """
        if len(self.value) < 2:
            return float(self.standard_error.mean())
        return float(self.value.std() / math.sqrt(len(self.value)))

    @property
    def share_reliable(self) -> float:
        """The share of data whose estimate is reliable."""
        return float(self.reliable.double().mean())

    def __repr__(self) -> str:
        num_data, good = len(self.value), int(self.reliable.sum())
        if good == num_data:
            verdict = f"reliable for all {num_data} data"
        else:
            verdict = (
                f"NOT reliable for {num_data - good} of {num_data} data: there it is a lower "
                "bound in expectation"
            )
        lines = [
            f"log-likelihood: {verdict}",
            f"  {self.mean:.3f} +- {self.mean_error:.3f} nats a datum{self._bits()} "
            f"({self.method}, {self.num_samples} draws, refine={self.refine})",
        ]
        if fewer := self.convergence[:-1]:
            looks = ", ".join(f"{mean:.3f} with {number}" for number, mean in fewer)
            lines.append(f"  from fewer of these draws: {looks}")
        return "\n".join([*lines, *(f"  {line}" for line in self._advice())])

    def _bits(self) -> str:
        return "" if self.cells is None else f", {self.bits_per_dimension:.4f} bits a dimension"

    def _advice(self) -> Iterator[str]:
        yield from (f"note: {note}" for note in self.notes)
        if bool(self.reliable.all()):
            return
        finite = self.k_hat[self.k_hat.isfinite()]
        if len(finite):
            yield f"k-hat: median {finite.median():.2f}, largest {finite.max():.2f}"
        if self.num_samples < FEWEST_DRAWS:
            yield f"{self.num_samples} draws are too few to tell; use at least {FEWEST_DRAWS}"
        elif self.method == "prior":
            yield "the prior seldom draws what explains x; use method='importance' with a guide"
        elif self.method == "annealed":
            yield "would help: annealing=Annealing(temperatures=...) with more, more chains"
        elif not self.refine:
            yield "would help: refine=300, a q of its own for every datum"
        else:
            yield "would help: more steps in refine=, covariance='full', more draws"


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
        num_samples: draws a datum, S; with ``method="annealed"``, chains.
        method: ``"importance"``; ``"prior"``: draws from the prior, weights p(x | z);
            ``"annealed"``: chains that walk from the guide's q, refined or not, to the posterior
            (:mod:`ppl_vae.evaluation.annealed`), for posteriors that no guide comes near.
        refine: optimise a copy of the guide's Gaussian for every datum by so many steps first
            (:func:`ppl_vae.evaluation.local.refine`). The guide itself stays as it is.
        covariance: the family of the refined Gaussian; by default ``"full"``.
        annealing: how chains walk; by default ``Annealing()``.
        mask: True where x is observed; NaN in x says the same.
        rows: look at these rows of x only; by default at all.
        capture: run as compiled tensor code: ``"auto"`` if the time left is worth compiling;
            True from the start. Draws are those of an eager run from the same seed. What cannot
            be captured runs eagerly, with a warning.
        precision: of float32 matrix products, see :func:`ppl_vae.state.precision`. Weights are
            summed in float64 in any case.
        seed: of the draws.

    Raises:
        ValueError: bad data or arguments; what :func:`ppl_vae.traces.check_pair` refuses; a flat
            prior or a point for a guide (an autoencoder's); a site that chains cannot move
            (:class:`ppl_vae.evaluation.paths.Path`).
    """
    proposal = _proposal(model, guide, method, refine, covariance)
    if annealing is not None and method != "annealed":
        raise ValueError(f"annealing= is for method='annealed'; method is {method!r}")
    num_samples = at_least("num_samples", num_samples)
    x, mask = as_observed(x, mask, model=model, guide=guide)
    check_support(model, x, mask)
    rows = torch.arange(len(x)) if rows is None else rows
    size = block_size(x, num_samples, refined=refine > 0)
    weigher = Weigher(model, Rails(capture, num_samples * len(rows) // rows_at_once(x)), precision)
    if method == "annealed":
        how = {"capture": capture, "numbers": precision}
        weigher = Annealer(model, annealing or Annealing(), x, len(rows), num_samples, **how)
        size = weigher.block_size
    blocks = rows.to(x.device).split(size)
    how = {"steps": max(refine, 1), "covariance": covariance or "full", "numbers": precision}
    refiner = Refiner(model, rails=Rails(capture, len(blocks)), **how)
    parts = []
    with isolated_store(), seeded(seed), evaluating(model, proposal):
        check_weighable(model, proposal, x[blocks[0]], batch_keywords(x, mask, blocks[0]))
        for block_rows in blocks:
            block = x[block_rows], batch_keywords(x, mask, block_rows)
            local = refiner(proposal, *block) if refine else proposal
            parts.append(_estimate(weigher, local, *block, num_samples))
    found = collect(parts, num_samples, method, refine)
    columns = getattr(owner_of(model), "scored_columns", slice(None))  # of a conditional model
    cells = torch.full_like(found.value, x[:, columns].shape[1])
    if mask is not None:
        cells = mask[rows.to(x.device), columns].sum(1).to(cells)
    return replace(found, path=weigher.why, cells=cells, notes=notes_of(model, proposal))


def collect(
    parts: list[tuple[Tensor, ...]], num_samples: int, method: str, refine: int
) -> LogLikelihood:
    """The estimates of several blocks of data as one result."""
    columns = zip(*parts, strict=True)
    value, error, ess, k, reliable, curve = (torch.cat(column) for column in columns)
    how = num_samples, method, refine
    return LogLikelihood(value, error, ess, k, reliable, *how, curve=curve)


def curve_draws(num_samples: int) -> tuple[int, ...]:
    """How many draws each point of a convergence curve is made of."""
    return tuple(max(1, num_samples // part) for part in CURVE)


def exact_result(value: Float[Tensor, " N"]) -> LogLikelihood:
    """Exact values of log p(x_n) in the form of estimates: no error, reliable, no weights."""
    value = value.detach().double().cpu()
    none = torch.full_like(value, math.nan)
    sure = torch.ones_like(value, dtype=torch.bool)
    return LogLikelihood(value, torch.zeros_like(value), none, none, sure, 0, "exact", 0)


def _proposal(
    model: ProgramLike, guide: ProgramLike | None, method: str, refine: int, family: str | None
) -> ProgramLike:
    choose_option("method", method, METHODS)
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
    at_least("refine", refine, 0)
    if family is not None:
        choose_option("covariance", family, COVARIANCES)
    if family is not None and not refine:
        raise ValueError("covariance= is the family of the refined q; it needs refine=steps")


def prior_guide(model: ProgramLike) -> ProgramLike:
    """A guide that draws from the model's prior: the model with its observed sites hidden."""

    def hide(site: Any) -> bool:
        return site["type"] == "sample" and bool(site["is_observed"])

    return poutine.block(model, hide_fn=hide)


def estimate(
    model: ProgramLike, guide: ProgramLike, x: Tensor, keywords: dict[str, Any], num_samples: int
) -> tuple[Tensor, ...]:
    """The first five fields of a :class:`LogLikelihood`, and its curve, for a block of data.

    Raises:
        FloatingPointError: if a log weight is NaN.
    """
    weigher = Weigher(model, Rails(False, 1))
    return _estimate(weigher, guide, x, keywords, num_samples)


@torch.no_grad()
def _estimate(
    weigher: Weigher, guide: ProgramLike, x: Tensor, keywords: dict[str, Any], num_samples: int
) -> tuple[Tensor, ...]:
    weights = weigher(guide, x, keywords, num_samples)
    if bool(weights.isnan().any()):
        raise FloatingPointError(
            "log weights are NaN; do the model and the guide give finite densities on these data?"
        )
    return _summary(weights)


def _summary(weights: Float[Tensor, "S B"]) -> tuple[Tensor, ...]:
    num_samples = len(weights)
    looks = ((weights[:number].logsumexp(0), number) for number in curve_draws(num_samples))
    curve = torch.stack([total - math.log(number) for total, number in looks], 1)
    ess = effective_sample_size(weights)
    # The delta method: the relative variance of the mean weight, (S / ESS - 1) / (S - 1).
    spread = (num_samples / ess - 1).clamp(min=0) / max(num_samples - 1, 1)
    k = k_hat(weights)
    error = spread.sqrt().cpu()
    return curve[:, -1].cpu(), error, ess.cpu(), k, is_reliable(weights, k), curve.cpu()
