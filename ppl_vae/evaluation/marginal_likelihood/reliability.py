"""Whether importance-sampling estimates of log p(x) may be believed, judged over all data at once.

Under a proposal that is too narrow or shifted, the data whose large weights were *not* drawn show
a small k-hat, a large effective sample size and the largest error: a verdict on each datum alone
picks the worst. The tail of the weights belongs to the pair and varies slowly over data, so both
the tail index and the variance of the weights are pooled over data whose weights are alike in
their bulk, which a few draws show already. How the verdict was calibrated, and how often its
intervals cover, stands in ``docs/reliability.md``.

References:
    Vehtari, Simpson, Gelman, Yao, Gabry: Pareto smoothed importance sampling (2024): k-hat.
    James, Stein: Estimation with quadratic loss (1961): shrinkage towards a common mean.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from arviz_stats.base.array import array_stats
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.results import ESS_FLOOR

FEWEST_DRAWS = 25
"""Fewer draws are too few to estimate a tail."""
CONSTANT_SPREAD = 1e-2
"""Log weights within so many nats are constant up to rounding."""
TIED, ROUNDING = 1e-4, 1e-9
"""Log weights nearer to each other than this, in units of the distance of the largest from the
median (at most one nat), come from one value of a discrete variable."""
FEWEST_COUNT = 10
"""A value of a discrete variable drawn less often has no estimated share in the mean weight."""
HARDLY_VARY = 0.95
"""From this effective share of the draws on the tail is too short to matter, or to be fitted."""
OWN_SHARE = 0.8
"""A datum's own effective share of the draws must then be this at least."""
REFERENCES = 2048
"""Over so many data at most, evenly spaced, tails are pooled."""
LARGEST_MISSED = 0.1
"""The largest standard error, in nats, that values may add which are hardly ever drawn."""
MARGIN = 0.03
"""Of a tail index pooled over some hundred data, its sampling error."""
LARGEST_TAIL_INDEX = 0.7
"""Above it the mean weight converges too slowly for any practical number of draws."""
STUDENT = (1.96**2 + 1) / 4
"""Student's 97.5 % quantile with n degrees of freedom is 1.96 (1 + STUDENT / n), to first order
in 1 / n."""
DATA_AT_ONCE = 8
"""So many data are summarised at once."""


class WeightSummary(NamedTuple):
    """What is kept of the weights of each datum; their bulk is what lies in the middle.

    Attributes:
        value: log of the mean weight, in nats.
        ess: see :func:`effective_sample_size`.
        k_hat: see :func:`k_hat`.
        tied: whether the largest weights have few distinct values, as discrete variables make.
        seldom: the part of the weights' relative variance that is due to values drawn fewer than
            ten times; of use where weights are tied.
        above, below: log of the distance in nats from the median of the log weights to their 80 %
            and 20 % quantiles, from ``TIED`` to 50 nats.
        curve: the log of the mean weight of the first draws.
    """

    value: Float[Tensor, " N"]
    ess: Float[Tensor, " N"]
    k_hat: Float[Tensor, " N"]
    tied: Bool[Tensor, " N"]
    seldom: Float[Tensor, " N"]
    above: Float[Tensor, " N"]
    below: Float[Tensor, " N"]
    curve: Float[Tensor, "N C"]


class Judgement(NamedTuple):
    """How far the estimate of each datum may be believed.

    Attributes:
        standard_error: of the log of the mean weight, in nats.
        tail_index: pooled over data; NaN where no tail could be fitted.
        limit: up to which tail index estimates are reliable.
        coverage: the expected coverage of ``value +- 1.96 standard_error``; NaN if not known.
        reliable: the verdict.
    """

    standard_error: Float[Tensor, " N"]
    tail_index: Float[Tensor, " N"]
    limit: Float[Tensor, " N"]
    coverage: Float[Tensor, " N"]
    reliable: Bool[Tensor, " N"]


def effective_sample_size(log_weights: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    """(sum w)^2 / sum w^2 of each datum, between 1 and S."""
    return torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))


def k_hat(log_weights: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    """The Pareto tail index of each datum's own weights; they have 1 / k finite moments.

    0 where the weights are constant up to rounding; NaN with fewer than 25 draws, or where a tail
    cannot be fitted since its weights have few distinct values.
    """
    weights = log_weights.detach().double().cpu()
    constant = (weights.amax(0) - weights.amin(0)) < CONSTANT_SPREAD
    skipped = is_tied(weights) | (len(weights) < FEWEST_DRAWS)
    values = [
        0.0 if flat else math.nan if skip else _k_hat(column)
        for column, flat, skip in zip(weights.numpy().T, constant, skipped, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _k_hat(log_weights: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        try:
            # arviz takes log-likelihoods here, whose importance weights are their reciprocals.
            return float(array_stats.psislw(log_weights.max() - log_weights)[1])
        except ValueError:  # a tail of equal weights
            return float("nan")


def is_tied(log_weights: Float[Tensor, "S N"]) -> Bool[Tensor, " N"]:
    """Whether half of the tail to which a Pareto distribution is fitted repeats other values."""
    ordered = log_weights.sort(0).values
    size = math.ceil(min(0.2 * len(ordered), 3 * math.sqrt(len(ordered)))) + 1
    distinct = 1 + _new_values(ordered)[-min(size, len(ordered)) :][1:].sum(0)
    return distinct <= max(min(size, len(ordered)) / 2, 1)


def _new_values(ordered: Float[Tensor, "S N"]) -> Bool[Tensor, "S N"]:
    """Which weights in ascending order differ from the one before by more than rounding."""
    above = (ordered[-1] - ordered[len(ordered) // 2]).nan_to_num(nan=1.0).clamp(max=1.0)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = (ordered[1:] - ordered[:-1]) > TIED * above + ROUNDING
    return new


def summarise(log_weights: Float[Tensor, "S N"], curve: Float[Tensor, "N C"]) -> WeightSummary:
    """What :func:`judge` and a result need of a block of data, on the CPU.

    Some data at a time: each step holds several arrays of the size of the weights.
    """
    pieces = zip(log_weights.split(DATA_AT_ONCE, 1), curve.split(DATA_AT_ONCE), strict=True)
    parts = zip(*(_summarised(*piece) for piece in pieces), strict=True)
    return WeightSummary(*(torch.cat(part) for part in parts))


def _summarised(log_weights: Float[Tensor, "S N"], curve: Float[Tensor, "N C"]) -> WeightSummary:
    ordered = log_weights.sort(0).values
    low, middle, high = (ordered[round(p * (len(ordered) - 1))] for p in (0.2, 0.5, 0.8))
    parts = (
        curve[:, -1],
        effective_sample_size(log_weights),
        k_hat(log_weights),
        is_tied(log_weights),
        _seldom(ordered),
        _log_distance(high - middle),
        _log_distance(middle - low),
        curve,
    )
    return WeightSummary(*(part.cpu() for part in parts))


def _log_distance(nats: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Weights of zero lie infinitely far below; their distance is as good as 50 nats."""
    return nats.nan_to_num(nan=50.0, posinf=50.0).clamp(TIED, 50.0).log()


def _seldom(ordered: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    place = _new_values(ordered).cumsum(0) - 1
    counts = torch.zeros_like(place).scatter_add_(0, place, torch.ones_like(place))
    few = counts.gather(0, place) < FEWEST_COUNT
    relative = (ordered - ordered.logsumexp(0) + math.log(len(ordered))).exp() - 1
    return torch.where(few, relative.square(), 0.0).mean(0)


def judge(
    summary: WeightSummary,
    num_samples: int,
    missed: Float[Tensor, " N"] | None = None,
    complete: bool = False,
) -> Judgement:
    """The verdict on each datum, in the light of all.

    Estimates are reliable where their intervals are expected to cover with at least 90 %: the
    pooled tail index is at most :func:`largest_tail_index`, or weights hardly vary (an effective
    sample size, pooled, of 95 % of the draws), or weights have few values, all of them drawn
    often enough. At least 10 draws must be effective, and 25 be made unless weights are constant.

    Args:
        summary: of all data.
        num_samples: S.
        missed: the standard error that values of discrete variables add which S draws are likely
            to miss; at most 0.1 nats for a reliable estimate.
        complete: whether no other values can be missed.
    """
    pools, total = _Pools(summary, num_samples), float(num_samples)
    variance = pools.shrunk((total / summary.ess - 1).clamp(min=0))
    spread, ess = (variance / max(total - 1, 1)).sqrt(), total / (1 + variance)
    error = spread * (1 + STUDENT / ess)
    error = error if missed is None else error.hypot(missed)
    limit = largest_tail_index(num_samples, pools.size)
    nearly_constant = (ess >= HARDLY_VARY * total) & (summary.ess >= OWN_SHARE * total)
    seldom = (pools.mean(summary.seldom) / total).sqrt()
    often = summary.tied & ((seldom <= torch.clamp(spread / 2, min=CONSTANT_SPREAD)) | complete)
    good = torch.where(summary.tied, often, nearly_constant | (pools.tail_index <= limit))
    if num_samples < FEWEST_DRAWS:
        good = nearly_constant & (summary.k_hat == 0) & (num_samples > 1)
    else:
        good = good & (torch.minimum(summary.ess, ess) >= ESS_FLOOR)
    good = good if missed is None else good & (missed <= LARGEST_MISSED)
    coverage = expected_coverage(pools.tail_index, num_samples, pools.size)
    # Where little was pooled, the variance of weights that hardly vary is not well known either.
    sure = 0.95 - 0.08 * FEWEST_DRAWS / max(total, FEWEST_DRAWS) / pools.size
    coverage = coverage.nan_to_num(nan=0.0).maximum(sure).where(nearly_constant | often, coverage)
    known = good | (pools.tail_index.isfinite() & ~summary.tied)
    if missed is not None:
        known = known & (missed <= LARGEST_MISSED)
    return Judgement(error, pools.tail_index, limit, coverage.where(known, torch.nan), good)


class _Pools:
    """Weighted means over the data whose weights are alike in their bulk.

    Data n and m weigh exp(-d^2 / 2 h^2) in each other's means, d being the distance of the bulks
    (log distances above and below the median) and h twice what sampling alone makes of it, or
    more. Each datum's k-hat is then shrunk towards its group's mean by as much as the k-hats of
    the group scatter no more than sampling makes them.

    Attributes:
        tail_index: the k-hats after shrinkage; NaN for tied weights.
        size: by how many data each of these is known; for tied weights, their variance.
    """

    def __init__(self, summary: WeightSummary, num_samples: int) -> None:
        self.bulk = torch.stack([summary.above, summary.below], 1)
        self.width = max(3 / math.sqrt(num_samples), 0.1)
        step = -(-len(self.bulk) // REFERENCES)
        self.references = torch.arange(0, len(self.bulk), step)
        own, fitted = summary.k_hat, summary.k_hat.isfinite() & ~summary.tied
        mean, size = self._mean(own, fitted)
        between = (self._mean(own.square(), fitted)[0] - mean.square()) * size / (size - 1)
        noise = _noise(num_samples) * ((1 + mean) / 1.5).clamp(min=1)
        kept = (1 - noise.square() / between).clamp(0, 1)
        # What has no tail of its own has its group's; a group of one has nothing to shrink to.
        self.kept = torch.where(fitted & (size > 1.5), kept, 0.0)
        nearer = mean + self.kept * (own.where(fitted, mean) - mean)
        self.tail_index = nearer.where(~summary.tied, torch.nan)
        size = size.where(size.isfinite(), self._mean(summary.ess, summary.ess.isfinite())[1])
        self.size = 1 / ((1 - self.kept).square() / size + self.kept.square())

    def shrunk(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Each value moved towards its group's mean, as far as its k-hat is."""
        mean = self.mean(values)
        return mean + self.kept * (values - mean).nan_to_num(nan=0.0)

    def mean(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The mean over each datum's group."""
        return self._mean(values, values.isfinite())[0]

    def _mean(
        self, values: Float[Tensor, " N"], known: Bool[Tensor, " N"]
    ) -> tuple[Tensor, Tensor]:
        """The mean of the known values in each datum's group, and of how many it is worth."""
        parts = [
            self._mean_of(rows, values.where(known, 0.0), known)
            for rows in torch.arange(len(values)).split(REFERENCES)
        ]
        first, size = (torch.cat(part) for part in zip(*parts, strict=True))
        return first, size

    def _mean_of(self, rows: Tensor, values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        distance = torch.cdist(self.bulk[rows], self.bulk[self.references])
        weights = torch.exp(-0.5 * (distance / self.width).square())
        # Each datum belongs to its own group, whether it is among the references or not.
        weights = weights * known[self.references]
        weights[rows[:, None] == self.references] = 0.0
        own = known[rows].double()
        total, squares = weights.sum(1) + own, weights.square().sum(1) + own
        mean = (weights @ values[self.references] + own * values[rows]) / total
        return mean, total.square() / squares


def _noise(num_samples: int) -> float:
    """The standard deviation of one k-hat for a true index of up to 0.5, as measured."""
    return 0.36 * (num_samples / 25) ** -0.226


def _places(num_samples: int, size: Float[Tensor, " N"]) -> tuple[Tensor, Tensor]:
    """log10 of the draws in units of 100, and of the data pooled, within what was calibrated."""
    draws = torch.tensor(num_samples / 100).double().log10().clamp(-0.602, 2.0)
    return draws, size.log10().clamp(0.0, 2.0)


def largest_tail_index(num_samples: int, size: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Up to which pooled tail index estimates are reliable, at most 0.7.

    By a margin for sampling less than where 95 % intervals are expected to cover with 90 %.

    Args:
        num_samples: S.
        size: over how many data the index was pooled.
    """
    return (_crossing(num_samples, size) - MARGIN).clamp(max=LARGEST_TAIL_INDEX)


def _crossing(num_samples: int, size: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """At which pooled tail index the expected coverage falls to 0.9."""
    draws, pooled = _places(num_samples, size)
    return -0.119 + 0.242 * draws + 0.681 * pooled - 0.065 * draws * pooled - 0.159 * pooled**2


def expected_coverage(
    tail_index: Float[Tensor, " N"], num_samples: int, size: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """How often 95 % intervals cover: 0.95 - 0.05 exp((k - crossing) / width), 0.5 at least.

    It falls as the pooled tail index k grows; at the crossing it is 0.9. Both functions of the
    numbers of draws and of data pooled were fitted to the grid of ``docs/reliability.md``. Far
    above the crossing guides with the same tail index differ widely.

    Args:
        tail_index: k.
        num_samples, size: as in :func:`largest_tail_index`.
    """
    draws, pooled = _places(num_samples, size)
    width = (-0.054 - 1.137 * pooled - 0.803 * draws).exp()
    beyond = (tail_index - _crossing(num_samples, size)) / width
    return 0.95 - 0.05 * beyond.clamp(max=math.log(9)).exp()
