"""What decides whether an importance-sampling estimate of log p(x_n) is reliable.

:func:`assess_reliability` decides. An estimate is reliable if its 95 % interval is expected to
cover log p(x_n) with a probability of at least 90 % (87 % where the weights hardly vary, but the
variance comes from fewer than three similar data with few draws), which is so if either

* the Pareto tail index of the weights, pooled over data, is at most
  the calibrated limit (``largest_tail_index`` in ``coverage.py``); or
* the weights hardly vary: the effective sample size, pooled over similar data, is at least 95 % of
  the draws, and the datum's own at least 80 %; or
* the weights take few values (discrete latent variables), each of which was drawn often;

and, in each case, at least 25 draws were made of which at least 10 are effective. Weights that are
constant need two draws only: their estimate is exact.

All data are assessed together. Under a proposal that is too narrow or shifted, the data whose
large weights were *not* drawn show a small k-hat, a large effective sample size and the largest
error, so that an assessment of each datum alone calls the worst estimates reliable. The tail of
the weights is a property of the pair and varies slowly over data; the tail index and the variance
of the weights are therefore pooled over data whose log weights have similar quantiles, which a few
draws determine already. The calibration and the coverage of the intervals are documented in
``docs/reliability.md``.

References:
    Vehtari, Simpson, Gelman, Yao, Gabry: Pareto smoothed importance sampling (2024): k-hat.
    James, Stein: Estimation with quadratic loss (1961): shrinkage towards a common mean.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.stats import ESS_FLOOR
from ppl_vae.evaluation.marginal_likelihood.coverage import (
    expected_coverage,
    largest_tail_index,
)
from ppl_vae.evaluation.marginal_likelihood.pareto_tail import tail_index

MIN_DRAWS = 25
"""With fewer draws the tail of the weights cannot be estimated."""
CONSTANT_SPREAD = 1e-2
"""Log weights within this range, in nats, are constant up to rounding."""
TIED, ROUNDING = 1e-4, 1e-9
"""Log weights that differ by less than ``TIED`` times the distance of the largest from the median
(at most one nat) plus ``ROUNDING`` come from one value of a discrete variable."""
MIN_COUNT = 10
"""A value of a discrete variable that was drawn less often counts as poorly estimated."""
NEARLY_CONSTANT_SHARE = 0.95
"""Above this effective share of the draws the tail is too short to matter, or to be fitted."""
MIN_OWN_SHARE = 0.8
"""The effective share of the draws that a datum itself must have in that case."""
MAX_REFERENCES = 2048
"""Pooled statistics are averaged over at most this many data, evenly spaced."""
MAX_UNDERSAMPLED_ERROR = 0.1
"""The largest standard error, in nats, that rarely drawn discrete values may add."""
STUDENT_CORRECTION = (1.96**2 + 1) / 4
"""Student's 97.5 % quantile with n degrees of freedom is 1.96 (1 + STUDENT_CORRECTION / n), to
first order in 1 / n."""
DATA_AT_ONCE = 8
"""The number of data that are summarized together."""


class WeightSummary(NamedTuple):
    """The statistics of the weights of each datum from which its reliability is assessed.

    Attributes:
        value: log of the mean weight, in nats.
        ess: the effective sample size, see :func:`ppl_vae.evaluation.effective_sample_size`.
        k_hat: the Pareto tail index, see :func:`k_hat`.
        tied: whether the largest weights have few distinct values, as with discrete variables.
        rare_variance: the part of the weights' relative variance that comes from values drawn
            fewer than ten times; it is used where weights are tied.
        above, below: log of the distances in nats from the median of the log weights to their
            80 % and 20 % quantiles, from ``TIED`` to 50 nats.
        curve: log of the mean weight of the first draws, for several numbers of draws.
        joint_variance: the variance, over draws, of the mean over the B data of a batch of
            ``value``, times B: it differs from that of independent draws where the data share
            global variables. It is the same for all data of a batch.
    """

    value: Float[Tensor, " N"]
    ess: Float[Tensor, " N"]
    k_hat: Float[Tensor, " N"]
    tied: Bool[Tensor, " N"]
    rare_variance: Float[Tensor, " N"]
    above: Float[Tensor, " N"]
    below: Float[Tensor, " N"]
    curve: Float[Tensor, "N C"]
    joint_variance: Float[Tensor, " N"]


class Reliability(NamedTuple):
    """The reliability of the estimate of each datum.

    Attributes:
        standard_error: the standard error of the log of the mean weight, in nats.
        tail_index: the tail index pooled over data; NaN where no tail could be fitted.
        limit: the largest tail index with which estimates are reliable.
        pool_size: the effective number of data that the tail index is pooled over.
        coverage: the expected coverage of ``value ± 1.96 standard_error``; NaN where the
            estimate is not reliable, since it is not known there.
        reliable: whether the estimate is reliable.
    """

    standard_error: Float[Tensor, " N"]
    tail_index: Float[Tensor, " N"]
    limit: Float[Tensor, " N"]
    pool_size: Float[Tensor, " N"]
    coverage: Float[Tensor, " N"]
    reliable: Bool[Tensor, " N"]


def effective_sample_size(log_weights: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    """(sum w)^2 / sum w^2 of each datum, between 1 and S."""
    return torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))


def k_hat(log_weights: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    """The Pareto tail index of each datum's own weights; they have 1 / k finite moments.

    It is 0 where the weights are constant up to rounding. It is NaN with fewer than 25 draws, and
    where a tail cannot be fitted because its weights have few distinct values.
    """
    ordered = log_weights.detach().double().cpu().sort(0).values
    return _k_hat(ordered, has_ties(ordered))


def _k_hat(ordered: Float[Tensor, "S N"], tied: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    if len(ordered) < MIN_DRAWS:
        index = torch.full_like(ordered[0], math.nan)
    else:
        index = tail_index(ordered).masked_fill(tied, math.nan)
    return index.masked_fill(ordered[-1] - ordered[0] < CONSTANT_SPREAD, 0.0)


def has_ties(ordered: Float[Tensor, "S N"]) -> Bool[Tensor, " N"]:
    """Whether at least half of the tail that a Pareto distribution is fitted to are ties.

    Args:
        ordered: log weights in ascending order.
    """
    size = math.ceil(min(0.2 * len(ordered), 3 * math.sqrt(len(ordered)))) + 1
    distinct = 1 + _new_values(ordered)[-min(size, len(ordered)) :][1:].sum(0)
    return distinct <= max(min(size, len(ordered)) / 2, 1)


def _new_values(ordered: Float[Tensor, "S N"]) -> Bool[Tensor, "S N"]:
    """Whether each weight, in ascending order, exceeds the previous one by more than rounding."""
    above = (ordered[-1] - ordered[len(ordered) // 2]).nan_to_num(nan=1.0).clamp(max=1.0)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = (ordered[1:] - ordered[:-1]) > TIED * above + ROUNDING
    return new


def summarize_weights(
    log_weights: Float[Tensor, "S N"], curve: Float[Tensor, "N C"]
) -> WeightSummary:
    """Compute the statistics of the weights of a batch, on the CPU.

    A few data are processed at a time, since each step holds several copies of the weights.
    """
    pieces = map(_summarize_few, log_weights.split(DATA_AT_ONCE, 1))
    parts = [torch.cat(part) for part in zip(*pieces, strict=True)]
    joint = _joint_variance(log_weights)
    # From an accelerator the weights are copied once, and so are the statistics of all data.
    vectors = torch.stack([curve[:, -1], *parts, joint]).cpu()
    value, ess, index, tied, rare, above, below, joint_variance = vectors
    shape = rare, above, below
    return WeightSummary(value, ess, index, tied.bool(), *shape, curve.cpu(), joint_variance)


def _joint_variance(log_weights: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    # By the delta method, log mean_s w_sn varies as mean_s w_sn / E[w_n].
    relative = torch.zeros_like(log_weights[:, 0])
    for part in log_weights.split(DATA_AT_ONCE, 1):
        relative = relative + (part - part.logsumexp(0)).exp().sum(1)
    num_samples, num_data = log_weights.shape
    if num_samples == 1:
        return torch.full_like(log_weights[0], math.inf)
    return (num_samples * relative.var() / num_data).expand(num_data)


def _summarize_few(log_weights: Float[Tensor, "S N"]) -> tuple[Float[Tensor, " N"], ...]:
    ordered = log_weights.sort(0).values
    tied = has_ties(ordered)
    low, middle, high = (ordered[round(p * (len(ordered) - 1))] for p in (0.2, 0.5, 0.8))
    return (
        effective_sample_size(log_weights),
        _k_hat(ordered, tied),
        tied.to(log_weights),
        _rare_variance(ordered),
        _log_distance(high - middle),
        _log_distance(middle - low),
    )


def _log_distance(nats: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Log of a distance in nats, of at most 50 (weights of zero are infinitely far below)."""
    return nats.nan_to_num(nan=50.0, posinf=50.0).clamp(TIED, 50.0).log()


def _rare_variance(ordered: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    value_index = _new_values(ordered).cumsum(0) - 1
    counts = torch.zeros_like(value_index)
    counts.scatter_add_(0, value_index, torch.ones_like(value_index))
    rare = counts.gather(0, value_index) < MIN_COUNT
    relative = (ordered - ordered.logsumexp(0) + math.log(len(ordered))).exp() - 1
    return torch.where(rare, relative.square(), 0.0).mean(0)


def assess_reliability(
    summary: WeightSummary,
    num_samples: int,
    undersampled_error: Float[Tensor, " N"] | None = None,
    complete: bool = False,
) -> Reliability:
    """Assess the estimate of each datum, from the weights of all data.

    The criteria are stated at the top of this module.

    Args:
        summary: the statistics of all data.
        num_samples: draws per datum, S.
        undersampled_error: the standard error that values of discrete variables add which S draws
            are likely to miss; it is at most 0.1 nats for a reliable estimate.
        complete: whether all values of the discrete variables were evaluated, so that no others
            can be missed.
    """
    pools, total = _PooledStatistics(summary, num_samples), float(num_samples)
    variance = pools.shrunk((total / summary.ess - 1).clamp(min=0))
    spread, ess = (variance / max(total - 1, 1)).sqrt(), total / (1 + variance)
    error = spread * (1 + STUDENT_CORRECTION / ess)
    limit = largest_tail_index(num_samples, pools.size)
    nearly_constant = (ess >= NEARLY_CONSTANT_SHARE * total) & (
        summary.ess >= MIN_OWN_SHARE * total
    )
    rare_error = (pools.mean(summary.rare_variance) / total).sqrt()
    drawn_often = summary.tied & (
        (rare_error <= torch.clamp(spread / 2, min=CONSTANT_SPREAD)) | complete
    )
    short_tailed = nearly_constant | (pools.tail_index <= limit)
    reliable = torch.where(summary.tied, drawn_often, short_tailed)
    if num_samples < MIN_DRAWS:
        reliable = nearly_constant & (summary.k_hat == 0) & (num_samples > 1)
    else:
        reliable = reliable & (torch.minimum(summary.ess, ess) >= ESS_FLOOR)
    if undersampled_error is not None:
        error = error.hypot(undersampled_error)
        reliable = reliable & (undersampled_error <= MAX_UNDERSAMPLED_ERROR)
    coverage = _coverage(pools, num_samples, tail_matters=~(nearly_constant | drawn_often))
    # In one dimension all very narrow guides have weights with nearly the same distribution
    # for any width, while the coverage falls to zero: the tail does not determine it.
    coverage = coverage.where(reliable, torch.nan)
    return Reliability(error, pools.tail_index, limit, pools.size, coverage, reliable)


def _coverage(
    pools: "_PooledStatistics", num_samples: int, *, tail_matters: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    coverage = expected_coverage(pools.tail_index, num_samples, pools.size)
    # With little to pool, the variance of nearly constant weights is itself uncertain.
    certain = 0.95 - 0.08 * MIN_DRAWS / max(float(num_samples), MIN_DRAWS) / pools.size
    return coverage.where(tail_matters, coverage.nan_to_num(nan=0.0).maximum(certain))


class _PooledStatistics:
    """Kernel-weighted means over data whose log weights have similar quantiles.

    Data n and m have the weight exp(-d^2 / 2 h^2) in each other's means, where d is the distance
    between their quantiles (log distances above and below the median) and h is at least twice
    what d is by sampling alone. Each k-hat is then shrunk towards the mean of its neighbourhood,
    to the extent that the k-hats there vary no more than by sampling.

    Attributes:
        tail_index: the k-hats after shrinkage; NaN for tied weights.
        size: the effective number of data that each tail index is estimated from; for tied
            weights, the number that the variance is estimated from.
    """

    def __init__(self, summary: WeightSummary, num_samples: int) -> None:
        self.quantiles = torch.stack([summary.above, summary.below], 1)
        self.bandwidth = max(3 / math.sqrt(num_samples), 0.1)
        step = -(-len(self.quantiles) // MAX_REFERENCES)
        self.references = torch.arange(0, len(self.quantiles), step)
        own, fitted = summary.k_hat, summary.k_hat.isfinite() & ~summary.tied
        mean, size = self._mean(own, fitted)
        between = (self._mean(own.square(), fitted)[0] - mean.square()) * size / (size - 1)
        noise = _k_hat_error(num_samples) * ((1 + mean) / 1.5).clamp(min=1)
        retained = (1 - noise.square() / between).clamp(0, 1)
        # A datum without a fitted tail takes the mean; a single datum has nothing to shrink to.
        self.retained = torch.where(fitted & (size > 1.5), retained, 0.0)
        shrunk = mean + self.retained * (own.where(fitted, mean) - mean)
        self.tail_index = shrunk.where(~summary.tied, torch.nan)
        size = size.where(size.isfinite(), self._mean(summary.ess, summary.ess.isfinite())[1])
        self.size = 1 / ((1 - self.retained).square() / size + self.retained.square())

    def shrunk(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Each value, shrunk towards the mean of its neighbourhood as much as its k-hat is."""
        mean = self.mean(values)
        return mean + self.retained * (values - mean).nan_to_num(nan=0.0)

    def mean(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The mean over the neighbourhood of each datum."""
        return self._mean(values, values.isfinite())[0]

    def _mean(
        self, values: Float[Tensor, " N"], known: Bool[Tensor, " N"]
    ) -> tuple[Tensor, Tensor]:
        """The mean of the known values in each neighbourhood, and its effective number of data."""
        parts = [
            self._mean_of(rows, values.where(known, 0.0), known)
            for rows in torch.arange(len(values)).split(MAX_REFERENCES)
        ]
        first, size = (torch.cat(part) for part in zip(*parts, strict=True))
        return first, size

    def _mean_of(self, rows: Tensor, values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        distance = torch.cdist(self.quantiles[rows], self.quantiles[self.references])
        weights = torch.exp(-0.5 * (distance / self.bandwidth).square())
        # Each datum counts in its own mean, whether it is among the references or not.
        weights = weights * known[self.references]
        weights[rows[:, None] == self.references] = 0.0
        own = known[rows].double()
        total, squares = weights.sum(1) + own, weights.square().sum(1) + own
        mean = (weights @ values[self.references] + own * values[rows]) / total
        return mean, total.square() / squares


def _k_hat_error(num_samples: int) -> float:
    """The standard deviation of one k-hat with a true index of at most 0.5, found empirically."""
    return 0.36 * (num_samples / 25) ** -0.226
