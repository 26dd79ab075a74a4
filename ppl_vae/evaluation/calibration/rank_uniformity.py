"""Whether ranks are uniform: simultaneous bands of their empirical distribution function.

Of M independent ranks, uniform on 0, ..., L, the number below a point with probability t is
binomial(M, t). A band contains the whole empirical distribution function with a stated probability
if its pointwise intervals have a smaller level, which is found by simulation.

References:
    Saeilynoja, Buerkner, Vehtari: Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison (2022).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

MAX_POINTS = 100
"""The largest number of points at which the distribution function is compared."""
NULL_DRAWS = 10_000
"""Simulated sets of uniform ranks."""
ROUNDING = 1e-9
"""Levels with a smaller relative difference are equal."""


class RankBand(NamedTuple):
    """A simultaneous band for empirical distribution functions of uniform ranks.

    Attributes:
        probability: at each point, the probability of a rank below it, (P,).
        lower, upper: the lower and upper limits of the proportion of ranks below it, (P,).
    """

    probability: Float[np.ndarray, " P"]
    lower: Float[np.ndarray, " P"]
    upper: Float[np.ndarray, " P"]


class UniformRanks:
    """The distribution of M independent ranks that are uniform on 0, ..., L.

    Args:
        num_ranks: M.
        num_draws: L.
        size: the number of simulated sets.
    """

    def __init__(self, num_ranks: int, num_draws: int, size: int = NULL_DRAWS) -> None:
        from scipy import stats

        self.num_ranks = num_ranks
        points = min(num_draws + 1, MAX_POINTS)
        self.edges = np.linspace(0, num_draws + 1, points + 1).round().astype(int)
        self.probability = self.edges[1:-1] / (num_draws + 1)
        counts = np.arange(num_ranks + 1)
        self._cdf = stats.binom.cdf(counts[:, None], num_ranks, self.probability)
        generator = np.random.default_rng(0)  # always the same sets
        cells = np.diff(self.edges) / (num_draws + 1)
        simulated = generator.multinomial(num_ranks, cells, size=size)
        self._levels = np.sort(self._level(simulated.cumsum(1)[:, :-1]))

    def counts_below(self, ranks: Int[np.ndarray, "M Q"]) -> Int[np.ndarray, "Q P"]:
        """The number of ranks below each point, for each of several quantities."""
        below = [np.searchsorted(np.sort(column), self.edges[1:-1]) for column in ranks.T]
        return np.stack(below)

    def p_values(self, ranks: Int[np.ndarray, "M Q"]) -> Float[np.ndarray, " Q"]:
        """The probability that uniform ranks deviate at least as much, for each quantity.

        The deviation is the smallest two-sided tail probability over the points.
        """
        return self._probability_of(self._level(self.counts_below(ranks)))

    def band(self, level: float) -> RankBand:
        """The band that holds the functions whose p-value is at least ``level``."""
        from scipy import stats

        distinct = np.unique(self._levels)
        rejected = distinct[self._probability_of(distinct) < level]
        pointwise = rejected[-1] * (1 + ROUNDING) if len(rejected) else 0.0
        lower, upper = stats.binom.interval(1 - pointwise, self.num_ranks, self.probability)
        proportions = np.clip([lower, upper], 0, self.num_ranks) / self.num_ranks
        return RankBand(self.probability, *proportions)

    def _probability_of(self, levels: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
        # The probability that uniform ranks have a level that is as small; ties matter, since the
        # level is discrete.
        at_most = np.searchsorted(self._levels, levels * (1 + ROUNDING), side="right")
        return (at_most + 1) / (len(self._levels) + 1)

    def _level(self, counts: Int[np.ndarray, "R P"]) -> Float[np.ndarray, " R"]:
        # The smallest over points of 2 min(P(X <= count), P(X >= count)).
        columns = np.arange(len(self.probability))
        at_most = self._cdf[counts, columns]
        below = np.where(counts > 0, self._cdf[counts - 1, columns], 0.0)
        return 2 * np.minimum(at_most, 1 - below).min(1)
