"""The settings of EM and of its variants."""

from dataclasses import dataclass

from ppl_vae.core.validation import check_int, check_option
from ppl_vae.guides.families import COVARIANCES


@dataclass(frozen=True)
class EMSettings:
    """What distinguishes the algorithms, and the arguments that they share.

    Attributes:
        family: the family of q, see :mod:`ppl_vae.guides.families`.
        prior_update: how the M-step updates z's prior, see
            :class:`~ppl_vae.inference.em.complete_data.CompleteProblem`.
        tol, max_iterations, starts, noise_floor: see :func:`ppl_vae.fit_em`.
    """

    family: str
    prior_update: str
    tol: float
    max_iterations: int
    starts: int
    noise_floor: float

    def check(self) -> None:
        """Check the arguments.

        Raises:
            ValueError: naming the one that is wrong.
        """
        check_option("covariance", self.family, COVARIANCES)
        if self.prior_update == "rotate" and self.family != "diagonal":
            raise ValueError(
                f"rotate=True needs covariance='diagonal', got {self.family!r}: on principal axes "
                "only a diagonal q is exact, so elsewhere the step would not be monotone"
            )
        check_int("max_iterations", self.max_iterations)
        check_int("starts", self.starts)

    @property
    def accelerated(self) -> bool:
        """Whether noise variances may be updated beyond the M-step."""
        return self.prior_update == "expand"
