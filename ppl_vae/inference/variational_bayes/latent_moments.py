"""q(z) of variational Bayes, as sums over data."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.models.linear.linear_gaussian import (
    MissingnessPatterns,
    from_tril_vec,
    outer_tril,
    tril_vec,
)
from ppl_vae.models.linear.principal_axes import half_log_det
from ppl_vae.models.linear.table_statistics import TableStatistics
from ppl_vae.models.variational_posterior import ParameterMoments


@dataclass(frozen=True)
class LatentMoments:
    """Expectations under q(z) of sums over data; x is relative to the means of the columns.

    Attributes:
        gram: sums of (z, 1) (z, 1)' over the data in which the column is observed, (D, L, L)
            with L = K + 1.
        cross: sums of x (z, 1)' over these data, (D, L).
        squares: sums of x^2 over these data, (D,).
        counts: their numbers, (D,).
        num_data: N.
        second_moment: the sum of z z' over all data, (K, K).
        total: the sum of z, (K,).
        half_log_det: the sum of 1/2 log det of the covariances of z, ().
    """

    gram: Float[Tensor, "D L L"]
    cross: Float[Tensor, "D L"]
    squares: Float[Tensor, " D"]
    counts: Float[Tensor, " D"]
    num_data: int
    second_moment: Float[Tensor, "K K"]
    total: Float[Tensor, " K"]
    half_log_det: Float[Tensor, ""]

    @classmethod
    def of(cls, statistics: TableStatistics, parameters: ParameterMoments) -> Self:
        """The sums under the best q(z), given moments of the parameters."""
        patterns, weight = _patterns(statistics), statistics.weight[:, None]
        rows, size = statistics.rows, parameters.mean.shape[1] - 1
        mean, tril = parameters.latent_posterior(rows, statistics.weight, patterns)
        design = torch.cat([mean, weight], 1)
        outer = patterns.sum_by_pattern(outer_tril(design, design))
        # Those of the covariances fill the leading block.
        covariance = torch.nn.functional.pad(tril @ tril.mT, (0, 1, 0, 1))
        sums = outer + statistics.counts[:, None] * tril_vec(covariance)
        everything = from_tril_vec(sums.sum(0), size + 1)
        return cls(
            gram=from_tril_vec(statistics.observed.mT @ sums, size + 1),
            cross=rows.mT @ design,
            squares=rows.square().sum(0),
            counts=statistics.columns.count,
            second_moment=everything[:-1, :-1],
            total=everything[:-1, -1],
            half_log_det=half_log_det(tril) @ statistics.counts,
            num_data=statistics.num_data,
        )

    def expected_squares(
        self, mean: Float[Tensor, "D L"], second_moment: Float[Tensor, "D L L"]
    ) -> Float[Tensor, " D"]:
        """The sums of E (x - w'z - mu)^2, given moments of the rows (w, mu)."""
        explained = (second_moment * self.gram).sum((1, 2)) - 2 * (mean * self.cross).sum(1)
        return self.squares + explained

    def expected_log_prior_and_entropy(self) -> Float[Tensor, ""]:
        """E log p(z) - E log q(z), summed over data."""
        size = len(self.total)
        return self.half_log_det + 0.5 * (size * self.num_data - self.second_moment.trace())


def _patterns(statistics: TableStatistics) -> MissingnessPatterns:
    if statistics.is_complete:
        return MissingnessPatterns(statistics.observed, None, None)
    mask = statistics.observed[statistics.pattern].bool()
    return MissingnessPatterns(statistics.observed, statistics.pattern, mask)
