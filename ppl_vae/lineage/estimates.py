"""Mean log-likelihoods of a lineage's rows, and what a Bayesian stage adds to them."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.stats import mean_and_error
from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood

PREDICTIVE = "posterior predictive"
"""The method of a log p that averages the density over draws of the parameters."""


@dataclass(frozen=True)
class MeanEstimate(Result):
    """A mean log-likelihood in nats per datum.

    Attributes:
        value: the mean.
        error: its standard error. On training rows it is that of the Monte Carlo estimate, on
            held-out rows that of the mean over the data, Monte Carlo error included; None where
            the value is exact.
        share_reliable: the share of data whose estimate is reliable; 1 where it is exact.
        method: ``"exact"``, ``"estimated"``, ``"posterior predictive"`` or the reason why there
            is no value.
    """

    value: float
    error: float | None = None
    share_reliable: float = 1.0
    method: str = "exact"

    @property
    def is_lower_bound(self) -> bool:
        """Whether too few of the estimates are reliable for the mean to be more than a bound."""
        return self.share_reliable < FEW_RELIABLE


@dataclass(frozen=True)
class PosteriorSummary(Result):
    """What the posterior of PPCA's parameters adds to a point estimate.

    Attributes:
        over_optimum: the posterior predictive held-out log p, minus log p of PPCA at the highest
            known likelihood of the training rows.
        over_mean: the same, minus log p of PPCA at the posterior mean of the parameters.
        num_active: the number of columns of W that are not switched off; None where the algorithm
            does not decide it.
        diagnosis: whether the draws can be trusted, and why; empty for independent draws.
    """

    over_optimum: MeanEstimate
    over_mean: MeanEstimate
    num_active: int | None
    diagnosis: str = ""


def paired_gain(estimate: LogLikelihood, plug_in: Float[Tensor, " N"]) -> MeanEstimate:
    """The mean of the differences between a posterior predictive log p and that of a point.

    The error has the Monte Carlo error of the draws, which all data share, as a second part.
    """
    difference = estimate.value - plug_in
    if len(difference) < 2:
        return MeanEstimate(float(difference.mean()), None, 1.0, PREDICTIVE)
    mean, error = mean_and_error(difference)
    error = (error**2 + (estimate.global_error or 0.0) ** 2) ** 0.5
    return MeanEstimate(mean, error, 1.0, PREDICTIVE)
