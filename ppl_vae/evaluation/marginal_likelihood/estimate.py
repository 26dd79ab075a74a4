"""Estimates of log p(x_n) with their errors, their reliability, and reasons for unreliability."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.arrays.frame_labels import Frame
from ppl_vae.core.arrays.schema import RowLabels
from ppl_vae.core.results import NO_LABELS, UNSAVED, Result
from ppl_vae.core.stats import ESS_FLOOR, mean_and_error
from ppl_vae.core.text import counted
from ppl_vae.core.validation import as_vector
from ppl_vae.evaluation.marginal_likelihood.reliability import (
    CONSTANT_SPREAD,
    MIN_COUNT,
    MIN_DRAWS,
)

CURVE = (64, 16, 4, 1)
"""A convergence curve is computed from the first S/64, S/16, S/4 and S of the draws, without
repeating a number where S is small."""


@dataclass(frozen=True, repr=False)
class DatumEstimates(Result):
    """Estimates of log p(x_n), one per datum, with their errors and their reliability.

    Attributes:
        value: log of the mean weight, in nats: log p(x_n) up to its error where ``reliable``;
            elsewhere only a lower bound in expectation.
        standard_error: the standard error of ``value``, in nats: by the delta method from the
            variance of the weights, pooled over data with similar weights, times the ratio of
            Student's to the normal quantile.
        ess: effective sample size of each datum's own weights, between 1 and S.
        k_hat: Pareto tail index of each datum's own weights, see
            :func:`ppl_vae.evaluation.marginal_likelihood.reliability.k_hat`.
        reliable: whether each estimate is reliable, see
            :func:`ppl_vae.evaluation.marginal_likelihood.reliability.assess_reliability`.
    """

    value: Float[Tensor, " N"]
    standard_error: Float[Tensor, " N"]
    ess: Float[Tensor, " N"]
    k_hat: Float[Tensor, " N"]
    reliable: Bool[Tensor, " N"]

    def first(self, number: int) -> Self:
        """The estimates of the first ``number`` data."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        columns = {name: v[:number] for name, v in found.items() if isinstance(v, Tensor)}
        return replace(self, **columns)

    @property
    def mean(self) -> float:
        """The mean over the data, in nats per datum."""
        return float(self.value.mean())

    @property
    def mean_error(self) -> float:
        """Standard error of :attr:`mean` as an estimate for the population of the data.

        It is the standard deviation over data / sqrt(N), which includes the Monte Carlo error of
        independent draws. The error of draws of global latent variables, which all data share, is
        added as a second variance.
        """
        if len(self.value) < 2:
            return float(self.standard_error.mean())
        return math.hypot(mean_and_error(self.value)[1], self._common_error())

    def _common_error(self) -> float:
        # The Monte Carlo error of the mean that all data share.
        return 0.0

    @property
    def share_reliable(self) -> float:
        """The share of the data whose estimate is reliable."""
        return float(self.reliable.double().mean())


@dataclass(frozen=True, repr=False)
class LogLikelihood(DatumEstimates):
    """Estimates of log p(x_n), one per datum.

    An estimate is reliable if the interval ``value ± 1.96 standard_error`` is expected to cover
    log p(x_n) with a probability of at least 90 %. The assessment of each datum uses the weights
    of all data of the call; the criteria are stated in
    :mod:`ppl_vae.evaluation.marginal_likelihood.reliability` and ``docs/reliability.md``.

    Attributes:
        value, standard_error, ess, k_hat, reliable: as in
            :class:`ppl_vae.evaluation.marginal_likelihood.estimate.DatumEstimates`.
        num_samples: draws per datum, S; with ``method="annealed"``, chains.
        method: ``"importance"``, ``"prior"`` or ``"annealed"``; ``"exact"`` if the values were
            not estimated; ``"posterior predictive"`` if the exact density was averaged over draws
            of the parameters.
        refine: optimization steps of each datum's own q before the draws were made from it.
        execution: whether it was computed eagerly, recorded or compiled, and why.
        curve: ``value`` from the first S/64, S/16 and S/4 of the draws, and from all S, (N, C)
            with C = 4, or less where S is too small for four different numbers; it increases
            towards log p in expectation. None for exact values.
        num_entries: the number of observed entries of each datum, (N,); None if not known.
        notes: the caveats that the pair attaches to these estimates.
        tail_index: the k-hats shrunk towards those of data with similar weights; NaN where no
            tail can be fitted.
        limit: the largest tail index with which estimates are reliable; it increases in the
            number of draws and of the data pooled.
        pool_size: the effective number of data over which each tail index is pooled, which
            ``limit`` depends on.
        coverage: the expected coverage of the interval; NaN where the estimate is not reliable,
            since it is not known there.
        undersampled_mass: posterior probability of the values of discrete latent variables that
            the guide is expected to draw fewer than ten times in S, in excess of the guide's own
            probability; their error is part of ``standard_error``, see
            :class:`ppl_vae.evaluation.marginal_likelihood.discrete_sites.Undersampled`. None if
            no variable is discrete.
        refinable: whether ``refine=`` applies, which it does not to discrete variables.
        global_error: the Monte Carlo error of ``mean``, in nats, where draws of global latent
            variables are shared by the data, whose errors are then dependent; else None.
        labels: the labels of the data, if they were rows of a frame; ``to_frame`` returns such a
            frame.
    """

    num_samples: int
    method: str
    refine: int
    execution: str = ""
    curve: Float[Tensor, "N C"] | None = None
    num_entries: Float[Tensor, " N"] | None = None
    notes: tuple[str, ...] = ()
    tail_index: Float[Tensor, " N"] | None = None
    limit: Float[Tensor, " N"] | None = None
    pool_size: Float[Tensor, " N"] | None = None
    coverage: Float[Tensor, " N"] | None = None
    undersampled_mass: Float[Tensor, " N"] | None = None
    refinable: bool = True
    global_error: float | None = None
    labels: RowLabels = field(default=NO_LABELS, metadata=UNSAVED)

    def first(self, number: int) -> Self:
        """The estimates of the first ``number`` data."""
        return replace(super().first(number), labels=self.labels.take(torch.arange(number)))

    def _common_error(self) -> float:
        return self.global_error or 0.0

    def shifted(self, nats: Float[Tensor, " N"]) -> Self:
        """The estimates in other units of the data, which add ``nats`` to each log density."""
        nats = nats.to(self.value.device)
        curve = None if self.curve is None else self.curve + nats[:, None]
        return replace(self, value=self.value + nats, curve=curve)

    @property
    def is_weighted(self) -> bool:
        """Whether the values are means of importance weights, which can be unreliable."""
        return self.method in ("importance", "prior", "annealed")

    @property
    def convergence(self) -> tuple[tuple[int, float], ...]:
        """Pairs of a number of draws and the mean estimate from them; empty without a curve."""
        if self.curve is None:
            return ()
        return tuple(zip(curve_draws(self.num_samples), self.curve.mean(0).tolist(), strict=True))

    @property
    def bits_per_dimension(self) -> float:
        """-log2 p of all data over the number of their observed entries; less is better.

        Raises:
            ValueError: if it is not known how many entries there were.
        """
        if self.num_entries is None:
            raise ValueError(
                "it is not known how many entries the data had; num_entries= is missing"
            )
        return -float(self.value.sum() / self.num_entries.sum()) / math.log(2)

    @property
    def expected_coverage(self) -> float:
        """The mean of ``coverage`` over the reliable data; NaN if there are none."""
        return math.nan if self.coverage is None else float(self.coverage.nanmean())

    def __repr__(self) -> str:
        num_data, good = len(self.value), int(self.reliable.sum())
        if good == num_data:
            verdict = (
                f"reliable for {'all ' if num_data > 1 else ''}{counted(num_data, 'data point')}"
            )
        else:
            verdict = (
                f"NOT reliable for {num_data - good} of {counted(num_data, 'data point')}, for "
                "which it is a lower bound in expectation"
            )
        lines = [
            f"log-likelihood: {verdict}",
            f"  {self.mean:.3f} ± {self.mean_error:.3f} nats per datum (± one standard error)"
            f"{self._bits()}",
            f"  by {self._settings()}",
        ]
        if fewer := self.convergence[:-1]:
            means = ", ".join(f"{mean:.3f} with {number}" for number, mean in fewer)
            lines.append(f"  from fewer of these draws: {means}")
        notes = (f"note: {note}" for note in self.notes)
        comments = *self._coverage(), *notes, *self._reasons_and_advice()
        return "\n".join([*lines, *(f"  {line}" for line in comments)])

    def _settings(self) -> str:
        if self.method == "exact":
            return "a closed form"
        if not self.is_weighted:
            return f"{self.method}, {counted(self.num_samples, 'draw')} of the parameters"
        drawn = counted(self.num_samples, "chain" if self.method == "annealed" else "draw")
        return f"{self.method}, {drawn}, refine={self.refine}"

    def _bits(self) -> str:
        return (
            ""
            if self.num_entries is None
            else f", {self.bits_per_dimension:.4f} bits per dimension"
        )

    def _coverage(self) -> Iterator[str]:
        if not math.isnan(covered := self.expected_coverage):
            intervals = "95 % intervals (1.96 standard errors)"
            if not bool(self.reliable.all()):
                intervals += " of the reliable estimates"
            yield f"{intervals} are expected to cover {covered:.0%}"

    def _reasons_and_advice(self) -> Iterator[str]:
        if bool(self.reliable.all()):
            return
        yield from (f"unreliable because {reason}" for reason in self._reasons())
        if self.num_samples < MIN_DRAWS:
            return
        if self.method == "prior":
            yield "prior draws rarely explain x; use method='importance' with a guide"
        elif self.method == "annealed":
            yield "remedy: more chains, or more temperatures: Annealing(num_temperatures=...)"
        elif not self.refinable:
            yield "remedy: more draws, or a guide that is closer to the posterior"
        elif not self.refine:
            yield "remedy: refine=300, which optimizes a separate q for every datum"
        else:
            yield "remedy: more steps in refine=, covariance='full', or more draws"

    def _reasons(self) -> Iterator[str]:
        """The reasons why estimates are unreliable; for each datum the first that applies."""
        if self.num_samples < MIN_DRAWS:
            number = self.num_samples
            yield f"too few draws were made to assess it, {number}; use at least {MIN_DRAWS}"
            return
        left = ~self.reliable
        mass = self.undersampled_mass
        if mass is not None and bool((rare := left & (mass > CONSTANT_SPREAD)).any()):
            yield (
                f"values of discrete variables that the guide draws fewer than {MIN_COUNT} "
                f"times hold up to {mass[rare].max():.0%} of the posterior{_of(rare)}"
            )
            left = left & ~rare
        if self.tail_index is not None and self.limit is not None:
            heavy = left & (self.tail_index > self.limit)
            if bool(heavy.any()):
                yield self._heavy(heavy) + _of(heavy)
            left = left & ~heavy
        if bool((few := left & ~(self.ess >= ESS_FLOOR)).any()):
            yield f"fewer than {ESS_FLOOR:.0f} of their draws are effective{_of(few)}"
        if bool((others := left & (self.ess >= ESS_FLOOR)).any()):
            yield f"a few draws decide the mean weight of data like them{_of(others)}"

    def _heavy(self, which: Bool[Tensor, " N"]) -> str:
        medians = (
            math.nan if values is None else float(values[which].median())
            for values in (self.tail_index, self.limit, self.pool_size)
        )
        index, limit, pooled = medians
        text = f"the tail index {index:.2f} of their weights is above {limit:.2f}, the limit"
        if not math.isnan(pooled):
            text += f" when it is pooled over {counted(round(pooled), 'data point')}"
        return text + ("; the weights' variance is not finite" if index > 0.5 else "")


def curve_draws(num_samples: int) -> tuple[int, ...]:
    """The number of draws from which each point of a convergence curve is computed, ascending."""
    return tuple(sorted({max(1, num_samples // part) for part in CURVE}))


def log_mean_weights(log_weights: Float[Tensor, "S N"]) -> Float[Tensor, "N C"]:
    """Log of the mean of the first weights, for each number of draws of :func:`curve_draws`."""
    numbers = curve_draws(len(log_weights))
    means = [log_weights[:number].logsumexp(0) - math.log(number) for number in numbers]
    return torch.stack(means, 1)


def exact_result(value: Float[Tensor, " N"] | Frame) -> LogLikelihood:
    """Exact values of log p(x_n) as a result: without error, reliable, without weights."""
    value = as_vector(value, name="log p").double().cpu()
    none = torch.full_like(value, math.nan)
    return LogLikelihood(
        value=value,
        standard_error=torch.zeros_like(value),
        ess=none,
        k_hat=none,
        reliable=torch.ones_like(value, dtype=torch.bool),
        num_samples=0,
        method="exact",
        refine=0,
    )


def _of(which: Bool[Tensor, " N"]) -> str:
    return f" (for {counted(int(which.sum()), 'data point')})"
