"""Estimates of log p(x_n) as a result that says how far it may be believed, and why not."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.results import ESS_FLOOR, Result
from ppl_vae.evaluation.marginal_likelihood.reliability import (
    CONSTANT_SPREAD,
    FEWEST_COUNT,
    FEWEST_DRAWS,
)

CURVE = (64, 16, 4, 1)
"""A convergence curve looks at so small parts of the draws."""


@dataclass(frozen=True, repr=False)
class LogLikelihood(Result):
    """Estimates of log p(x_n), one per datum.

    An estimate is reliable if the interval ``value +- 1.96 standard_error`` is expected to cover
    log p(x_n) with a probability of 90 % at least. The verdict on each datum draws on all data of
    the call, see :mod:`ppl_vae.evaluation.marginal_likelihood.reliability` and
    ``docs/reliability.md``.

    Attributes:
        value: log of the mean weight, in nats: log p(x_n) up to its error where ``reliable``;
            elsewhere no more than a lower bound in expectation.
        standard_error: of ``value``, in nats: by the delta method from the variance of the
            weights, pooled over the data whose weights are alike, times Student's quantile in
            units of the normal one.
        ess: effective sample size of each datum's own weights, 1..S.
        k_hat: Pareto tail index of each datum's own weights, see
            :func:`ppl_vae.evaluation.marginal_likelihood.reliability.k_hat`.
        reliable: the verdict, see
            :func:`ppl_vae.evaluation.marginal_likelihood.reliability.judge`.
        num_samples: S, the draws of each datum; chains, if annealed.
        method: ``"importance"``, ``"prior"``, ``"annealed"``, or ``"exact"`` where there was
            nothing to estimate.
        refine: steps spent on each datum's own q before drawing from it.
        execution: how it was computed, eagerly or captured, and why.
        curve: ``value`` from the first S/64, S/16 and S/4 of the draws, and from all S, (N, 4); in
            expectation it rises towards log p. None where there was nothing to estimate.
        cells: how many cells of each datum were observed, (N,); None where it is not known.
        notes: what else a person should know of these numbers, from the pair.
        tail_index: the k-hats shrunk towards those of the data whose weights are alike; NaN where
            no tail can be fitted.
        limit: up to which tail index estimates are reliable; it grows with the number of draws
            and of the data pooled.
        coverage: the expected coverage of the interval; NaN where it is not known.
        missed: posterior probability of values of discrete latent variables that the guide is
            expected to draw fewer than ten times in S, beyond its own probability of them; their
            error is part of ``standard_error``, see
            :class:`ppl_vae.evaluation.marginal_likelihood.discrete_sites.Missed`. None if no
            variable is discrete.
        refinable: whether ``refine=`` can be asked for: it cannot with discrete variables.
    """

    value: Float[Tensor, " N"]
    standard_error: Float[Tensor, " N"]
    ess: Float[Tensor, " N"]
    k_hat: Float[Tensor, " N"]
    reliable: Bool[Tensor, " N"]
    num_samples: int
    method: str
    refine: int
    execution: str = ""
    curve: Float[Tensor, "N C"] | None = None
    cells: Float[Tensor, " N"] | None = None
    notes: tuple[str, ...] = ()
    tail_index: Float[Tensor, " N"] | None = None
    limit: Float[Tensor, " N"] | None = None
    coverage: Float[Tensor, " N"] | None = None
    missed: Float[Tensor, " N"] | None = None
    refinable: bool = True

    def shifted(self, nats: Float[Tensor, " N"]) -> Self:
        """The same in other units of the data, in which each log density is so much higher."""
        curve = None if self.curve is None else self.curve + nats[:, None]
        return replace(self, value=self.value + nats, curve=curve)

    def first(self, number: int) -> Self:
        """Of the first so many data."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        columns = {name: v[:number] for name, v in found.items() if isinstance(v, Tensor)}
        return replace(self, **columns)

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
        """Over the data, in nats per datum."""
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

    @property
    def expected_coverage(self) -> float:
        """The mean of :attr:`coverage` over the data for which it is known; NaN if for none."""
        return math.nan if self.coverage is None else float(self.coverage.nanmean())

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
            f"  {self.mean:.3f} +- {self.mean_error:.3f} nats per datum{self._bits()} "
            f"({self.method}, {self.num_samples} draws, refine={self.refine})",
        ]
        if fewer := self.convergence[:-1]:
            looks = ", ".join(f"{mean:.3f} with {number}" for number, mean in fewer)
            lines.append(f"  from fewer of these draws: {looks}")
        told = *self._coverage(), *(f"note: {note}" for note in self.notes), *self._doubts()
        return "\n".join([*lines, *(f"  {line}" for line in told)])

    def _bits(self) -> str:
        return "" if self.cells is None else f", {self.bits_per_dimension:.4f} bits per dimension"

    def _coverage(self) -> Iterator[str]:
        if not math.isnan(covered := self.expected_coverage):
            yield f"95 % intervals (1.96 standard errors) are expected to cover {covered:.0%}"

    def _doubts(self) -> Iterator[str]:
        if bool(self.reliable.all()):
            return
        yield from (f"unreliable because {reason}" for reason in self._reasons())
        if self.num_samples < FEWEST_DRAWS:
            return
        if self.method == "prior":
            yield "the prior seldom draws what explains x; use method='importance' with a guide"
        elif self.method == "annealed":
            yield "would help: annealing=Annealing(temperatures=...) with more, more chains"
        elif not self.refinable:
            yield "would help: more draws, or a guide that is nearer to the posterior"
        elif not self.refine:
            yield "would help: refine=300, a q of its own for every datum"
        else:
            yield "would help: more steps in refine=, covariance='full', more draws"

    def _reasons(self) -> Iterator[str]:
        """Why estimates are unreliable; for each datum the first reason that holds."""
        if self.num_samples < FEWEST_DRAWS:
            yield f"{self.num_samples} draws are too few to tell; use at least {FEWEST_DRAWS}"
            return
        left = ~self.reliable
        if self.missed is not None and bool(
            (rare := left & (self.missed > CONSTANT_SPREAD)).any()
        ):
            yield (
                f"values of discrete variables that the guide draws fewer than {FEWEST_COUNT} "
                f"times hold up to {self.missed[rare].max():.0%} of the posterior"
                f"{_of(rare)}"
            )
            left = left & ~rare
        if self.tail_index is not None and self.limit is not None:
            heavy = left & (self.tail_index > self.limit)
            if bool(heavy.any()):
                yield self._heavy(self.tail_index[heavy], self.limit[heavy]) + _of(heavy)
            left = left & ~heavy
        if bool((few := left & ~(self.ess >= ESS_FLOOR)).any()):
            yield f"fewer than {ESS_FLOOR:.0f} of their draws are effective{_of(few)}"
        if bool((others := left & (self.ess >= ESS_FLOOR)).any()):
            yield f"a few draws decide the mean weight of data like them{_of(others)}"

    def _heavy(self, index: Float[Tensor, " M"], limit: Float[Tensor, " M"]) -> str:
        high, allowed = float(index.median()), float(limit.median())
        text = f"the pooled tail index {high:.2f} is above {allowed:.2f}"
        return text + (": the weights' variance is not finite" if high > 0.5 else "")


def curve_draws(num_samples: int) -> tuple[int, ...]:
    """How many draws each point of a convergence curve is made of."""
    return tuple(max(1, num_samples // part) for part in CURVE)


def log_mean_weights(log_weights: Float[Tensor, "S N"]) -> Float[Tensor, "N C"]:
    """The log of the mean of the first weights, for each number of :func:`curve_draws`."""
    numbers = curve_draws(len(log_weights))
    means = [log_weights[:number].logsumexp(0) - math.log(number) for number in numbers]
    return torch.stack(means, 1)


def exact_result(value: Float[Tensor, " N"]) -> LogLikelihood:
    """Exact values of log p(x_n) in the form of estimates: no error, reliable, no weights."""
    value = value.detach().double().cpu()
    none = torch.full_like(value, math.nan)
    sure = torch.ones_like(value, dtype=torch.bool)
    return LogLikelihood(value, torch.zeros_like(value), none, none, sure, 0, "exact", 0)


def _of(which: Bool[Tensor, " N"]) -> str:
    return f" (for {int(which.sum())} data)"
