"""What codes are used for, as a result: posterior collapse, or codes that are not compressed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.evaluation.latent_space.spectrum import Spectrum

ACTIVE = 0.01
"""A dimension whose posterior mean varies by more over the data is active (Burda et al. 2016)."""
OFF = 0.05
"""Below so many nats per dimension, on average, the KL is near zero."""
NAMED = 0.5
"""From this share of data whose codes name them on, codes hardly overlap."""
FAR = 0.1
"""An aggregate posterior is far from the prior if its moments alone cost this share of the KL."""
ROUNDING = 1e-6
"""Nats per datum: a mutual information that is not more is none."""
RESOLUTION = 0.01
"""Nats per datum: a smaller bias is not looked at."""
SHOWN = 0.0005
"""Nats: half of the last digit that is printed."""
COLLAPSED, NOT_COMPRESSED = "posterior collapse", "not compressed"


@dataclass(frozen=True, repr=False)
class Collapse(Result):
    """What the codes of N data hold, in nats per datum.

    With q(z) = 1/N sum_m q(z | x_m), the mixture over the same N data,

        mean KL(q(z | x) || p(z)) = I(x; z) + KL(q(z) || p(z)),

    and all three are read from the same draws, so that they add up.

    Each term is a mean over data of what its codes give, and its error is the standard deviation
    of these over the data / sqrt(N): for the population that the data are from, the Monte Carlo
    part included. That all data share the mixture adds nothing to first order: moving q(z) by d
    moves the mean of log q(z) under q(z) itself by the integral of d, which is zero. What is left
    is a bias of second order, downwards for the mutual information and upwards by as much for the
    aggregate's KL: see :attr:`saturated`.

    Attributes:
        names: of the latent dimensions.
        kl_by_dimension: mean of KL(q(z_k | x) || p(z_k)), (K,), as :func:`kl_by_dimension` has
            it; of the marginals, if q is a Gaussian with a full covariance; NaN where q is no
            product over dimensions.
        mean_variances: the variance over the data of E_q[z_k], (K,). Where the mean is known from
            draws alone, what these add to it has been taken off.
        kl: of each datum, from its draws, (N,).
        closed_kl: the same in closed form where it is known, else from the draws, (N,).
        information: mean of log q(z | x_n) - log q(z) over the draws of each datum, (N,).
        aggregate: mean of log q(z) - log p(z), (N,).
        identified: with the data equally likely, the probability that a code of the datum is
            given to it, q(z | x_n) / sum_m q(z | x_m), (N,): 1/N if codes say nothing, 1 if each
            names its datum.
        moments: KL from the prior of independent Gaussians with q(z)'s means and variances in
            units of the prior (of each site given those before it), up to K/N; by formula where
            q's are known; 0 for sites whose prior is not Gaussian. KL(q(z) || p(z)) is at least
            this, and it does not depend on N.
        spectrum: the data's eigenvalues and the model's noise variance; None if it has none.
        num_samples: draws per datum.
    """

    names: tuple[str, ...]
    kl_by_dimension: Float[Tensor, " K"]
    mean_variances: Float[Tensor, " K"]
    kl: Float[Tensor, " N"]
    closed_kl: Float[Tensor, " N"]
    information: Float[Tensor, " N"]
    aggregate: Float[Tensor, " N"]
    identified: Float[Tensor, " N"]
    moments: float
    spectrum: Spectrum | None
    num_samples: int

    @property
    def active(self) -> Bool[Tensor, " K"]:
        """Which dimensions' posterior means vary by more than 0.01 over the data."""
        return self.mean_variances > ACTIVE

    @property
    def mean_kl(self) -> float:
        """Mean of KL(q(z | x) || p(z))."""
        return float(self.kl.mean())

    @property
    def mutual_information(self) -> float:
        """I(x; z): a lower bound in expectation, and at most :attr:`cap`."""
        return float(self.information.mean())

    @property
    def aggregate_kl(self) -> float:
        """KL(q(z) || p(z)): an upper bound in expectation, too large by about :attr:`bias`."""
        return float(self.aggregate.mean())

    @property
    def mean_kl_error(self) -> float:
        """Standard error of :attr:`mean_kl` over the data."""
        return _error(self.kl)

    @property
    def mutual_information_error(self) -> float:
        """Standard error of :attr:`mutual_information`; says nothing of it if it is saturated."""
        return _error(self.information)

    @property
    def aggregate_kl_error(self) -> float:
        """Standard error of :attr:`aggregate_kl`, in which :attr:`bias` is not."""
        return _error(self.aggregate)

    @property
    def cap(self) -> float:
        """log N: as much as can be told of one datum among N."""
        return math.log(len(self.kl))

    @property
    def ceiling(self) -> float:
        """The mutual information is at most this: the mean of :attr:`closed_kl` less
        :attr:`moments`. It is computed, without an error of draws, where both are known.
        """
        return float(self.closed_kl.mean()) - self.moments

    @property
    def above_ceiling(self) -> bool:
        """Whether the estimate of the mutual information exceeds it, by the error of its draws."""
        return self.mutual_information > self.ceiling + SHOWN

    @property
    def bias(self) -> float:
        """About how much too small the mutual information is; if it is saturated, at least this.

        With r = q(z | x) / q(z), the datum's own part in the mixture makes log q(z) too large by
        E[r - 1] / N, the finite mixture makes it too small by half of that; E[r] is N times the
        mean of ``identified``.
        """
        return 0.5 * (float(self.identified.mean()) - 1 / len(self.kl))

    @property
    def saturated(self) -> bool:
        """Whether the mutual information is no more than a lower bound: its bias is more than
        0.01 nats and than a quarter of its standard error. It is so wherever it is near log N.
        """
        return self.bias > max(RESOLUTION, 0.25 * self.mutual_information_error)

    @property
    def depends(self) -> bool:
        """Whether the mutual information is above zero by more than 1.96 standard errors.

        A code may depend on x without an active dimension: its spread may, or the probabilities
        of a discrete variable around the same mean.
        """
        return self.mutual_information > max(1.96 * self.mutual_information_error, ROUNDING)

    @property
    def failure(self) -> str | None:
        """``"posterior collapse"``: no dimension is active, and the KL is near zero.

        ``"not compressed"``: codes name their data, and lie far from the prior. Else None.
        """
        if not bool(self.active.any()):
            return COLLAPSED if self.mean_kl < OFF * len(self.names) else None
        named = self.saturated and float(self.identified.mean()) > NAMED
        return NOT_COMPRESSED if named and self.moments > FAR * self.mean_kl else None

    @property
    def verdict(self) -> str:
        """In words."""
        used, all_ = int(self.active.sum()), len(self.names)
        named = f"{100 * float(self.identified.mean()):.0f} % of codes name their datum"
        # The estimate may exceed its ceiling by the error of its draws; what is said does not.
        information = min(self.mutual_information, self.ceiling)
        told = f"{information:.3f} ± {self.mutual_information_error:.3f} nats"
        if self.failure == COLLAPSED:
            near = f"within {self.mean_kl:.3f} nats of the prior, and hardly depends on x"
            near = near if self.depends else "the prior"
            return f"{COLLAPSED}: q(z | x) is {near} in all {all_} dimensions"
        if self.failure == NOT_COMPRESSED:
            return f"{NOT_COMPRESSED}: z is a look-up table, {named}, far from the prior"
        if not used and self.depends:
            still = f", although no posterior mean varies by more than {ACTIVE:g}"
            still = "" if self._without_means else still
            return f"q(z | x) depends on x, by {told}{still}"
        if not used:
            return (
                "q(z | x) is not the prior, and no dependence on x can be shown (mutual "
                f"information {told})"
            )
        text = f"{used} of {all_} dimensions active"
        if off := int((~self.active & (self.kl_by_dimension < OFF)).sum()):
            text += f", {off} collapsed to the prior"
        if self.saturated and float(self.identified.mean()) > NAMED:
            text += f"; {named}: {len(self.kl)} data are too few to tell it from a look-up table"
        return text

    @property
    def _without_means(self) -> bool:
        # The values of a discrete variable may be names, which have no mean.
        return bool(self.mean_variances.isnan().all())

    def to_frame(self) -> pd.DataFrame:
        """One row a latent dimension, indexed by its name."""
        columns = {
            "kl": self.kl_by_dimension.numpy(),
            "mean_variance": self.mean_variances.numpy(),
            "active": self.active.numpy(),
        }
        return pd.DataFrame(columns, index=pd.Index(self.names, name="dimension"))

    def __repr__(self) -> str:
        return "\n".join([f"collapse: {self.verdict}", *(f"  {line}" for line in self._lines())])

    def _lines(self) -> Iterator[str]:
        yield (
            f"KL {self.mean_kl:z.3f} ± {self.mean_kl_error:z.3f} nats per datum = "
            f"mutual information {self.mutual_information:z.3f} ± "
            f"{self.mutual_information_error:z.3f} + KL(q(z) || p(z)) "
            f"{self.aggregate_kl:z.3f} ± {self.aggregate_kl_error:z.3f}"
        )
        bounds = f"at most {self.ceiling:.3f}"
        if self.above_ceiling:
            yield f"the mutual information is {bounds}: the rest is the error of its draws"
        else:
            bounds = f"at least {self.mutual_information:.3f} and {bounds}"
        if self.saturated:
            yield (
                f"saturated: {len(self.kl)} data cannot show more than log N = {self.cap:.3f}; "
                f"the mutual information is {bounds}"
            )
        elif self.bias > RESOLUTION:
            yield f"the former is about {self.bias:.3f} too small, the latter as much too large"
        if not self._without_means:
            variances = sorted(self.mean_variances.tolist(), reverse=True)
            shown = " ".join(f"{v:z.3f}" for v in variances[:10]) + " ..." * (len(variances) > 10)
            yield f"variances of the posterior means: {shown}"
        if self.spectrum is not None:
            (noise,) = self.spectrum.noise.values()
            off, k = len(self.spectrum.collapsing(noise)), self.spectrum.latent_dim
            yield f"PPCA of this noise variance, {noise:.3g}, has a use for {k - off} of {k} axes"


def _error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))
