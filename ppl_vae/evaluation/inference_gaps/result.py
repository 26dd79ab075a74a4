"""What the gaps of a pair are, as a result: the total, its two parts and their errors."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood

Z = 1.96


@dataclass(frozen=True, repr=False)
class Gaps(Result):
    """log p - ELBO of each datum, split in two where that can be done.

    With q* the member of the guide's family that is best for each datum,
    log p - ELBO[q] = (log p - ELBO[q*]) + (ELBO[q*] - ELBO[q]).

    Both parts are at least zero. Their estimates have an error of either sign, and may be off to
    one side: where the search for q* left something to gain, as much belongs to the amortization
    gap instead of the approximation gap; where log p is no more than a lower bound, so is the
    approximation gap. The search starts at the guide's own q, which is q* for data for which it
    found nothing better. Where the best member of the guide's family cannot be sought, ``unsplit``
    says why, the parts are NaN, and each of them lies between zero and the total.

    Attributes:
        log_likelihood: log p(x_n), exact if it was given, else estimated, in nats.
        elbo: the guide's, in nats.
        best_elbo: ELBO[q*], in nats; NaN if no q* was sought.
        covariance: the family of q*: a covariance of :mod:`ppl_vae.guides.families`, or the class
            of the guide's distributions, whose parameters are then all free for each datum.
        estimate: how log p was estimated; None if it was given.
        approximation_noise: Monte Carlo standard error of log p(x_n) - ELBO[q*] of each datum,
            of both, in nats.
        amortization_noise: the same of ELBO[q*] - ELBO[q], whose draws are common.
        gained: by each datum in the last block of the search, in nats; a block that lost on
            average was undone. On average less than ``tolerance`` unless the search ended after 20
            blocks. 0 if the best guide was given, NaN if no block was asked for
            (``tolerance=None``).
        total_noise: Monte Carlo standard error of log p(x_n) - ELBO[q] of each datum, in nats.
        kept: True for data whose q* is the guide's own q, since what was found in its place (or
            given as ``best``) has a lower ELBO by more than its error.
        unsplit: why there is no amortization gap here, as the end of a sentence; empty where
            there is one.
    """

    log_likelihood: Float[Tensor, " N"]
    elbo: Float[Tensor, " N"]
    best_elbo: Float[Tensor, " N"]
    covariance: str
    estimate: LogLikelihood | None
    approximation_noise: Float[Tensor, " N"]
    amortization_noise: Float[Tensor, " N"]
    gained: Float[Tensor, " N"]
    total_noise: Float[Tensor, " N"]
    kept: Bool[Tensor, " N"]
    unsplit: str = ""

    @property
    def total(self) -> float:
        """Mean of log p - ELBO[q]: both gaps together, in nats per datum."""
        return float((self.log_likelihood - self.elbo).mean())

    @property
    def total_error(self) -> float:
        """Standard error of :attr:`total`: over the data, Monte Carlo part included."""
        return error_of_mean(self.log_likelihood - self.elbo, self.total_noise)

    @property
    def total_monte_carlo(self) -> float:
        """The part of :attr:`total_error` that more draws would take away."""
        return monte_carlo_error(self.total_noise)

    @property
    def approximation(self) -> float:
        """Mean of log p - ELBO[q*]: what the family costs, in nats per datum."""
        return float((self.log_likelihood - self.best_elbo).mean())

    @property
    def amortization(self) -> float:
        """Mean of ELBO[q*] - ELBO[q]: what reading q off a network costs, in nats per datum."""
        return math.nan if self.unsplit else float((self.best_elbo - self.elbo).mean())

    @property
    def approximation_error(self) -> float:
        """Standard error of :attr:`approximation`: over the data, Monte Carlo part included.

        Draws are independent from datum to datum, so that the spread over data holds theirs.
        """
        return error_of_mean(self.log_likelihood - self.best_elbo, self.approximation_noise)

    @property
    def amortization_error(self) -> float:
        """Standard error of :attr:`amortization`: over the data, Monte Carlo part included."""
        return (
            math.nan
            if self.unsplit
            else error_of_mean(self.best_elbo - self.elbo, self.amortization_noise)
        )

    @property
    def approximation_monte_carlo(self) -> float:
        """The part of :attr:`approximation_error` that more draws would take away."""
        return monte_carlo_error(self.approximation_noise)

    @property
    def amortization_monte_carlo(self) -> float:
        """The part of :attr:`amortization_error` that more draws would take away."""
        return math.nan if self.unsplit else monte_carlo_error(self.amortization_noise)

    @property
    def remaining(self) -> float:
        """How many nats per datum the last block of the search moved ELBO[q*].

        About as much may be left to gain: the approximation gap may be too large by it, and the
        amortization gap too small.
        """
        return abs(float(self.gained.mean()))

    @property
    def approximation_range(self) -> tuple[float, float]:
        """From the lowest to the highest that is plausible: 1.96 errors, and what is one-sided.

        The search may have left something; and with log p reliable for less than 85 % of the
        data there is no highest. Where no q* was sought, from zero to the total.
        """
        if not self._sought:
            return 0.0, self._highest_total()
        width, left = Z * self.approximation_error, _known(self.remaining)
        highest = math.inf if self._bounded else self.approximation + width
        return self.approximation - width - left, highest

    @property
    def amortization_range(self) -> tuple[float, float]:
        """From the lowest to the highest that is plausible: 1.96 errors, and what was left.

        Where no q* was sought, from zero to the total; NaN for the best q of a family that the
        guide's own q is not of.
        """
        if not self._sought:
            return 0.0, self._highest_total()
        width, left = Z * self.amortization_error, _known(self.remaining)
        return self.amortization - width, self.amortization + width + left

    @property
    def _sought(self) -> bool:
        return not bool(self.best_elbo.isnan().any())

    @property
    def _bounded(self) -> bool:
        """Whether log p is no more than a lower bound for many data."""
        return self.estimate is not None and self.estimate.share_reliable < FEW_RELIABLE

    def _highest_total(self) -> float:
        return math.inf if self._bounded else self.total + Z * self.total_error

    def __repr__(self) -> str:
        how = "given" if self.estimate is None else "estimated"
        return "\n".join(
            [
                f"Gaps in nats per datum: log p {self.log_likelihood.mean():.3f} ({how}), "
                f"ELBO {self.elbo.mean():.3f}",
                f"  total {_nats(self.total)} +- {self.total_error:.3f}",
                *(f"  {line}" for line in self._parts()),
                *(f"  {line}" for line in self._notes()),
            ]
        )

    def _parts(self) -> Iterator[str]:
        if self._sought:
            yield (
                f"approximation {_nats(self.approximation)} +- {self.approximation_error:.3f} "
                f"(best {self.covariance} q per datum)"
            )
        if not self.unsplit:
            yield f"amortization  {_nats(self.amortization)} +- {self.amortization_error:.3f}"
        elif self._sought:
            yield f"there is no amortization gap to give, because {self.unsplit}"
        else:
            yield f"the gap is not split, because {self.unsplit}:"
            yield "the approximation and the amortization gap are each between 0 and the total"

    def _notes(self) -> Iterator[str]:
        if self.unsplit:
            yield f"of this error Monte Carlo: {self.total_monte_carlo:.2g}"
        else:
            parts = self.approximation_monte_carlo, self.amortization_monte_carlo
            yield "of these errors Monte Carlo: {:.2g} and {:.2g}".format(*parts)
        if self.remaining > 0 and not self.unsplit:
            yield (
                f"the search's last block moved it by {self.remaining:.2g}: about so much of the "
                "approximation gap may belong to the amortization gap"
            )
        if number := int(self.kept.sum()):
            yield (
                f"for {number} of {len(self.kept)} data no better q was found than the guide's "
                "own, which is taken for the best"
            )
        if self._bounded:
            yield "log p is a lower bound for many data, and so is the approximation gap"
        if self.estimate is not None:
            yield from (f"note: {note}" for note in self.estimate.notes)


def error_of_mean(values: Float[Tensor, " N"], noise: Float[Tensor, " N"]) -> float:
    """Standard error of a mean over data; of one datum, its own Monte Carlo error."""
    if len(values) > 1:
        return float(values.std() / math.sqrt(len(values)))
    return monte_carlo_error(noise)


def _nats(value: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def monte_carlo_error(noise: Float[Tensor, " N"]) -> float:
    """Monte Carlo error of a mean over data, whose draws are independent."""
    return float(noise.square().sum().sqrt() / len(noise))
