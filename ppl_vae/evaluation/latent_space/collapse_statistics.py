"""The KL of codes and its two parts, with errors and bounds: the numbers of a ``Collapse``."""

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.stats import mean_and_error
from ppl_vae.evaluation.latent_space.spectrum import Spectrum

ACTIVE_VARIANCE = 0.01
"""A dimension is active if the variance of its posterior mean exceeds this (Burda et al. 2016)."""
ROUNDING = 1e-6
"""A mutual information up to this, in nats per datum, is indistinguishable from zero."""
NEGLIGIBLE_BIAS = 0.01
"""Biases below this, in nats per datum, are ignored."""
PRINT_TOLERANCE = 0.0005
"""Half a unit of the last printed digit, in nats."""


@dataclass(frozen=True, repr=False)
class CodeKL(Result):
    """The KL of the codes of N data from the prior, in nats per datum.

    Attributes:
        names: the latent dimensions.
        kl_by_dimension: mean of KL(q(z_k | x) || p(z_k)), (K,), as
            :func:`ppl_vae.evaluation.kl_by_dimension` computes it; that of the marginals if q is a
            Gaussian with a full covariance; NaN where q does not factorize over dimensions.
        mean_variances: the variance over the data of E_q[z_k], (K,). Where the mean is estimated
            from draws, their Monte Carlo variance is subtracted.
        kl: KL of each datum, estimated from its draws, (N,).
        closed_kl: the same in closed form where it is known, else from the draws, (N,).
    """

    names: tuple[str, ...]
    kl_by_dimension: Float[Tensor, " K"]
    mean_variances: Float[Tensor, " K"]
    kl: Float[Tensor, " N"]
    closed_kl: Float[Tensor, " N"]

    @property
    def mean_kl(self) -> float:
        """Mean of KL(q(z | x) || p(z))."""
        return float(self.kl.mean())

    @property
    def active(self) -> Bool[Tensor, " K"]:
        """Which dimensions have a variance of the posterior mean above 0.01 (active units)."""
        return self.mean_variances > ACTIVE_VARIANCE

    @property
    def mean_kl_error(self) -> float:
        """Standard error of :attr:`mean_kl` over the data."""
        return mean_and_error(self.kl)[1]


@dataclass(frozen=True, repr=False)
class CollapseStatistics(CodeKL):
    """The mean KL of the codes of N data, split into two terms, in nats per datum.

    With q(z) = 1/N sum_m q(z | x_m), the mixture over the same N data,

        mean KL(q(z | x) || p(z)) = I(x; z) + KL(q(z) || p(z)),

    and all three are estimated from the same draws, so that they add up.

    Each term is a mean over data. Its standard error is the standard deviation over the data
    / sqrt(N), which refers to the population of the data and includes the Monte Carlo error. That
    all data share the mixture adds nothing to first order: a change d of q(z) changes the mean of
    log q(z) under q(z) itself by the integral of d, which is zero. What remains is a bias of
    second order, downwards for the mutual information and upwards by as much for the aggregate's
    KL: see :attr:`underestimated`.

    Attributes:
        names, kl_by_dimension, mean_variances, kl, closed_kl: as in :class:`CodeKL`.
        information: mean of log q(z | x_n) - log q(z) over the draws of each datum, (N,).
        aggregate: mean of log q(z) - log p(z) over the draws of each datum, (N,).
        retrieval_prob: the probability of retrieving the datum from its code when all data are
            equally likely, q(z | x_n) / sum_m q(z | x_m), averaged over draws, (N,): 1/N if codes
            are independent of x, 1 if each code identifies its datum.
        moment_kl: KL from the prior of independent Gaussians with the means and variances of q(z)
            in units of the prior (of each site given earlier ones), up to K/N; exact where the
            moments of q are known; 0 for sites whose prior is not Gaussian. It is a lower bound on
            KL(q(z) || p(z)) that does not depend on N.
        spectrum: the eigenvalues of the data and the noise variance of the model; None if the
            model has no single noise variance.
        num_samples: draws per datum.
    """

    information: Float[Tensor, " N"]
    aggregate: Float[Tensor, " N"]
    retrieval_prob: Float[Tensor, " N"]
    moment_kl: float
    spectrum: Spectrum | None
    num_samples: int

    @property
    def mutual_information(self) -> float:
        """I(x; z), a lower bound in expectation, at most :attr:`max_mutual_information`."""
        return float(self.information.mean())

    @property
    def aggregate_kl(self) -> float:
        """KL(q(z) || p(z)), an upper bound in expectation, too large by about :attr:`bias`."""
        return float(self.aggregate.mean())

    @property
    def mutual_information_error(self) -> float:
        """Standard error of :attr:`mutual_information`, which does not include :attr:`bias`."""
        return mean_and_error(self.information)[1]

    @property
    def aggregate_kl_error(self) -> float:
        """Standard error of :attr:`aggregate_kl`, which does not include :attr:`bias`."""
        return mean_and_error(self.aggregate)[1]

    @property
    def max_mutual_information(self) -> float:
        """log N, the largest mutual information that can be estimated from N data."""
        return math.log(len(self.kl))

    @property
    def upper_bound(self) -> float:
        """An upper bound on the mutual information, mean ``closed_kl`` - ``moment_kl``.

        It has no Monte Carlo error where both are known in closed form.
        """
        return float(self.closed_kl.mean()) - self.moment_kl

    @property
    def above_upper_bound(self) -> bool:
        """Whether the estimated mutual information exceeds the bound, by Monte Carlo error."""
        return self.mutual_information > self.upper_bound + PRINT_TOLERANCE

    @property
    def bias(self) -> float:
        """Estimated downward bias of the mutual information, in nats per datum.

        It is only a lower bound on the bias if the mutual information is :attr:`underestimated`.

        With r = q(z | x) / q(z), the datum's own component in the mixture makes log q(z) too large
        by E[r - 1] / N, and the finite mixture makes it too small by half of that; E[r] is N times
        the mean of ``retrieval_prob``.
        """
        return 0.5 * (float(self.retrieval_prob.mean()) - 1 / len(self.kl))

    @property
    def underestimated(self) -> bool:
        """Whether the estimated mutual information is only a lower bound.

        Its bias then exceeds both 0.01 nats and a quarter of its standard error, which is always
        so where it is :attr:`saturated`.
        """
        return self.bias > max(NEGLIGIBLE_BIAS, 0.25 * self.mutual_information_error)

    @property
    def saturated(self) -> bool:
        """Whether the estimated mutual information is within log 2 of its largest value, log N.

        The difference is minus the mean log probability of retrieving a datum from its code, so
        that the geometric mean of this probability then exceeds one half.
        """
        return self.mutual_information > self.max_mutual_information - math.log(2)

    @property
    def depends_on_x(self) -> bool:
        """Whether the mutual information exceeds zero by more than 1.96 standard errors.

        Codes may depend on x without an active dimension: through the variances of q, or through
        the probabilities of a discrete variable whose mean stays the same.
        """
        return self.mutual_information > max(1.96 * self.mutual_information_error, ROUNDING)
