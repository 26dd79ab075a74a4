"""The gaps of a pair as a result: the total, its two parts and their errors."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.arrays.schema import RowLabels
from ppl_vae.core.results import NO_LABELS, UNSAVED, Result
from ppl_vae.core.stats import mean_and_error, monte_carlo_error
from ppl_vae.core.text import counted
from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood

NORMAL_QUANTILE = 1.96
"""The 97.5 % quantile of the standard normal distribution."""
ROUNDING = 1e-5
"""Smaller differences, as a share of log p, count as zero: a hundred float32 rounding errors."""


@dataclass(frozen=True)
class GlobalPart(Result):
    """What global latent variables theta contribute to the gaps of a pair.

    Attributes:
        num_draws: the number of draws of theta that the gaps of data are averaged over, G.
        total_error, approximation_error, amortization_error: the standard errors of the mean gaps
            that are due to these draws, which the data share, in nats per datum.
        kl: an estimate of KL(q(theta) || p(theta | x)) / N, in nats per datum: in expectation at
            most that, since log p(x) is estimated by a lower bound, and at most log(G) / N. NaN
            where the rows are not all data.
    """

    num_draws: int
    total_error: float
    approximation_error: float
    amortization_error: float
    kl: float


NO_GLOBAL_PART = GlobalPart(0, 0.0, 0.0, 0.0, 0.0)
"""What a pair without global latent variables has."""


@dataclass(frozen=True, repr=False)
class Gaps(Result):
    """log p - ELBO of each datum, split in two parts where possible.

    With q* the member of the guide's family that is best for each datum,
    log p - ELBO[q] = (log p - ELBO[q*]) + (ELBO[q*] - ELBO[q]).

    Both parts are at least zero. Their estimates have errors of either sign, and two one-sided
    errors: if the search for q* stops short of the optimum, the difference is counted in the
    approximation gap instead of the amortization gap; and if log p is only a lower bound, so is
    the approximation gap. The search starts at the guide's own q, which is q* for data for which
    it finds nothing better. If the best member of the guide's family cannot be searched for,
    ``unsplit_reason`` states why, the parts are NaN, and each is between zero and the total.

    Attributes:
        log_likelihood: log p(x_n), exact if it was given, else estimated, in nats.
        elbo: the ELBO of the guide, in nats.
        best_elbo: ELBO[q*], in nats; NaN without q*.
        covariance: the family of q*: a covariance of :mod:`ppl_vae.guides.families`, or the class
            of the guide's distributions, whose parameters are then all free for each datum.
        estimate: the estimate of log p; None if log p was given.
        approximation_mc_error: Monte Carlo standard error of log p(x_n) - ELBO[q*] of each datum,
            in nats.
        amortization_mc_error: Monte Carlo standard error of ELBO[q*] - ELBO[q] of each datum,
            which have common noise, in nats.
        last_gain: the gain of each datum in the last round of the search, in nats; a round with a
            negative mean gain was discarded. The mean is below ``tolerance`` unless the search
            ended after 20 rounds. 0 if the best guide was given, NaN if there was no round
            (``tolerance=None``).
        total_mc_error: Monte Carlo standard error of log p(x_n) - ELBO[q] of each datum, in nats.
        kept_own_q: True for data whose q* is the guide's own q, because the q that was found (or
            given as ``best``) has a significantly lower ELBO.
        unsplit_reason: why there is no amortization gap, as a clause; empty if there is one.
        global_part: with global latent variables, all values are averages given draws of them,
            and this is the rest of log p(x) - ELBO; None without any.
        labels: the labels of the data, if they were rows of a frame; ``to_frame`` returns such a
            frame.
    """

    log_likelihood: Float[Tensor, " N"]
    elbo: Float[Tensor, " N"]
    best_elbo: Float[Tensor, " N"]
    covariance: str
    estimate: LogLikelihood | None
    approximation_mc_error: Float[Tensor, " N"]
    amortization_mc_error: Float[Tensor, " N"]
    last_gain: Float[Tensor, " N"]
    total_mc_error: Float[Tensor, " N"]
    kept_own_q: Bool[Tensor, " N"]
    unsplit_reason: str = ""
    global_part: GlobalPart | None = None
    labels: RowLabels = field(default=NO_LABELS, metadata=UNSAVED)

    def shifted(self, nats: Float[Tensor, " N"]) -> Self:
        """The gaps in other units of the data, which add ``nats`` to log p and to each ELBO."""
        return replace(
            self,
            log_likelihood=self.log_likelihood + nats,
            elbo=self.elbo + nats,
            best_elbo=self.best_elbo + nats,
            estimate=None if self.estimate is None else self.estimate.shifted(nats),
        )

    @property
    def _global_part(self) -> GlobalPart:
        return self.global_part or NO_GLOBAL_PART

    @property
    def total(self) -> float:
        """Mean of log p - ELBO[q], the sum of both gaps, in nats per datum."""
        return float((self.log_likelihood - self.elbo).mean())

    @property
    def total_error(self) -> float:
        """Standard error of :attr:`total` over the data, including Monte Carlo error."""
        error = error_of_mean(self.log_likelihood - self.elbo, self.total_mc_error)
        return math.hypot(error, self._global_part.total_error)

    @property
    def total_monte_carlo(self) -> float:
        """The Monte Carlo part of :attr:`total_error`, which more draws reduce."""
        return monte_carlo_error(self.total_mc_error)

    @property
    def approximation(self) -> float:
        """Mean of log p - ELBO[q*], the loss due to the family, in nats per datum."""
        return float((self.log_likelihood - self.best_elbo).mean())

    @property
    def amortization(self) -> float:
        """Mean of ELBO[q*] - ELBO[q], the loss due to amortization, in nats per datum."""
        return math.nan if self.unsplit_reason else float((self.best_elbo - self.elbo).mean())

    @property
    def approximation_monte_carlo(self) -> float:
        """The Monte Carlo part of :attr:`approximation_error`, which more draws reduce."""
        return monte_carlo_error(self.approximation_mc_error)

    @property
    def approximation_error(self) -> float:
        """Standard error of :attr:`approximation` over the data, including Monte Carlo error.

        Draws of different data are independent, so that the variance over data includes theirs.
        """
        error = error_of_mean(self.log_likelihood - self.best_elbo, self.approximation_mc_error)
        return math.hypot(error, self._global_part.approximation_error)

    @property
    def amortization_error(self) -> float:
        """Standard error of :attr:`amortization` over the data, including Monte Carlo error."""
        if self.unsplit_reason:
            return math.nan
        error = error_of_mean(self.best_elbo - self.elbo, self.amortization_mc_error)
        return math.hypot(error, self._global_part.amortization_error)

    @property
    def amortization_monte_carlo(self) -> float:
        """The Monte Carlo part of :attr:`amortization_error`, which more draws reduce."""
        return math.nan if self.unsplit_reason else monte_carlo_error(self.amortization_mc_error)

    @property
    def remaining(self) -> float:
        """The change of ELBO[q*] in the last round of the search, in nats per datum.

        The distance to the optimum may be about as large: by it the approximation gap may be too
        large and the amortization gap too small.
        """
        return abs(float(self.last_gain.mean()))

    @property
    def approximation_range(self) -> tuple[float, float]:
        """The plausible range, with 1.96 errors to both sides and the one-sided errors.

        The lower end allows for a search that stopped short of the optimum; if log p is reliable
        for less than 85 % of the data, the upper end is infinite. Without q* the range is from
        zero to the total.
        """
        if not self._has_best:
            return 0.0, self._highest_total()
        width, left = NORMAL_QUANTILE * self.approximation_error, _zero_if_nan(self.remaining)
        highest = math.inf if self._is_lower_bound else self.approximation + width
        return self.approximation - width - left, highest

    @property
    def amortization_range(self) -> tuple[float, float]:
        """The plausible range, with 1.96 errors to both sides and the distance to the optimum.

        Without q* it is from zero to the total; it is NaN for the best q of a family to which the
        guide's own q does not belong.
        """
        if not self._has_best:
            return 0.0, self._highest_total()
        width, left = NORMAL_QUANTILE * self.amortization_error, _zero_if_nan(self.remaining)
        return self.amortization - width, self.amortization + width + left

    @property
    def _has_best(self) -> bool:
        return not bool(self.best_elbo.isnan().any())

    @property
    def _is_lower_bound(self) -> bool:
        """Whether log p is only a lower bound for many data."""
        return self.estimate is not None and self.estimate.share_reliable < FEW_RELIABLE

    def _highest_total(self) -> float:
        return (
            math.inf if self._is_lower_bound else self.total + NORMAL_QUANTILE * self.total_error
        )

    def __repr__(self) -> str:
        source = "given" if self.estimate is None else "estimated"
        return "\n".join(
            [
                f"Gaps in nats per datum, ± one standard error: log p "
                f"{self.log_likelihood.mean():.3f} ({source}), ELBO {self.elbo.mean():.3f}",
                *(f"  {line}" for line in self._findings()),
                *(f"  {line}" for line in self._caveats()),
            ]
        )

    @property
    def is_zero(self) -> bool:
        """Whether log p - ELBO[q] is zero up to rounding for each datum, and so are both gaps.

        Not if the gaps refer to another family than that of q (``unsplit_reason``).
        """
        if self.unsplit_reason:
            return False
        tolerance = ROUNDING * (1 + self.log_likelihood.abs())
        return bool(((self.log_likelihood - self.elbo).abs() <= tolerance).all())

    def _findings(self) -> Iterator[str]:
        if not self.is_zero:
            yield f"total {_nats(self.total)} ± {self.total_error:.3f}"
            yield from self._parts()
            yield from self._notes()
            return
        largest = float((self.log_likelihood - self.elbo).abs().max())
        yield (
            "q is the exact posterior: both gaps are zero up to rounding (log p and the ELBO "
            f"differ by {largest:.1g} at most)"
        )

    def _parts(self) -> Iterator[str]:
        if self._has_best:
            yield (
                f"approximation {_nats(self.approximation)} ± {self.approximation_error:.3f} "
                f"(best {self.covariance} q per datum)"
            )
        if not self.unsplit_reason:
            yield f"amortization  {_nats(self.amortization)} ± {self.amortization_error:.3f}"
        elif self._has_best:
            yield f"the amortization gap is not defined, because {self.unsplit_reason}"
        else:
            yield f"the gap is not split, because {self.unsplit_reason}:"
            yield "the approximation and the amortization gap are each between 0 and the total"

    def _notes(self) -> Iterator[str]:
        if self.unsplit_reason:
            yield f"Monte Carlo part of this error: {self.total_monte_carlo:.2g}"
        else:
            parts = self.approximation_monte_carlo, self.amortization_monte_carlo
            yield "Monte Carlo parts of these errors: {:.2g} and {:.2g}".format(*parts)
        if self.remaining > 0 and not self.unsplit_reason:
            yield (
                f"the last round of the search changed the best ELBO by {self.remaining:.2g}: "
                "about as much of the approximation gap may belong to the amortization gap"
            )
        if number := int(self.kept_own_q.sum()):
            yield (
                f"for {number} of {counted(len(self.kept_own_q), 'data point')} no better q was "
                "found than the guide's own, which is used as the best"
            )

    def _global_lines(self) -> Iterator[str]:
        if (part := self.global_part) is None:
            return
        yield f"these are means over {part.num_draws} draws of the global variables"
        if not math.isnan(part.kl):
            limit = math.log(part.num_draws) / len(self.elbo)
            yield (
                f"global variables: KL(q || posterior) / N is at least {_nats(part.kl)} (draws "
                f"cannot show more than {_nats(limit)})"
            )

    def _caveats(self) -> Iterator[str]:
        yield from self._global_lines()
        if self._is_lower_bound:
            yield "log p is a lower bound for many data, and so is the approximation gap"
        if self.estimate is not None:
            yield from (f"note: {note}" for note in self.estimate.notes)


def error_of_mean(values: Float[Tensor, " N"], mc_error: Float[Tensor, " N"]) -> float:
    """Standard error of a mean over data; for one datum, its Monte Carlo error."""
    return mean_and_error(values)[1] if len(values) > 1 else monte_carlo_error(mc_error)


def _nats(value: float) -> str:
    """A number with three decimals, without a minus sign before zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def _zero_if_nan(value: float) -> float:
    return 0.0 if math.isnan(value) else value
