"""One iteration of EM and its certificate, for complete data and for data with missing values."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.devices.accelerators import read_together
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.inference.em.closed_form import best_parameters
from ppl_vae.inference.em.noise import Noise
from ppl_vae.inference.em.profile_likelihood import maximize_profile_likelihood
from ppl_vae.models.linear.eigen import MAX_JACOBI_SIZE, LeadingEigenpairs

ILL_CONDITIONED = "the table is too ill-conditioned for float64"
"""The beginning of the note on digits lost to rounding."""
NEGLIGIBLE = 1e-8
"""Rounding errors of log p up to this size, in nats per datum, are not reported."""
EXACT_FAMILIES = ("full", "diagonal")
"""Families of q that contain the posterior, in the best rotation of W."""
REFINEMENT_STEPS = 10
"""EM iterations from the closed-form parameters, for diagonal q and missing values."""


class LinearGaussianParameters(NamedTuple):
    """The parameters of a linear-Gaussian model, in float64.

    Attributes:
        loadings: W, (D, K).
        loc: mu, (D,).
        variance: psi, (D,).
    """

    loadings: Float[Tensor, "D K"]
    loc: Float[Tensor, " D"]
    variance: Float[Tensor, " D"]

    def of_rank_zero(self, processes: Processes) -> "LinearGaussianParameters":
        """The parameters of rank 0, so that all processes have the same bits."""
        flat = processes.broadcast(torch.cat([part.reshape(-1) for part in self]))
        parts = flat.split([part.numel() for part in self])
        return LinearGaussianParameters(
            *(new.reshape(part.shape) for new, part in zip(parts, self, strict=True))
        )


class EMState(ABC):
    """Parameters, and the expectations of the E-step at these parameters.

    Attributes:
        noise: the noise model.
        family: the family of q, see :mod:`ppl_vae.guides.families`.
        parameters: W, mu and psi.
        bound: E_q[log p(x, z)] + H[q], in nats per datum; on the CPU, as the next two.
        log_likelihood: log p(x), in nats per datum.
        rounding: the largest rounding error of these two, in nats per datum.
        column_variance: the variance of each column of the data, (D,).
        needs_refinement: whether the closed-form parameters need further EM iterations, because
            no rotation of W makes q the posterior of every row.
        stalls_in_rotation: whether EM can stall where only a rotation of W would raise the bound.
        is_initial: whether no step has been made yet.
        can_extrapolate: whether gains may be extrapolated from here; False after an M-step that
            replaced a rejected accelerated proposal.
    """

    noise: Noise
    family: str
    parameters: LinearGaussianParameters
    bound: Float[Tensor, ""]
    log_likelihood: Float[Tensor, ""]
    rounding: float
    column_variance: Float[Tensor, " D"]
    needs_refinement: bool = False
    stalls_in_rotation: bool = False
    is_initial: bool = True
    can_extrapolate: bool = True

    @abstractmethod
    def e_step(self, loadings: Tensor, loc: Tensor, variance: Tensor) -> "EMState":
        """The state after an E-step at W, mu and psi."""

    @abstractmethod
    def m_step(self) -> tuple[Float[Tensor, ""], LinearGaussianParameters]:
        """The bound after an M-step, on any device, and its W, mu and psi."""

    @abstractmethod
    def residual_moments(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """The means over rows of r^2 and of w_d' V w_d, see :meth:`Noise.accelerate`."""

    @abstractmethod
    def covariance_factor(self) -> Float[Tensor, "R D"]:
        """F, with F'F the (expected) covariance of the data."""

    @abstractmethod
    def leading_eigenpairs(self) -> LeadingEigenpairs:
        """The leading eigenpairs of Psi^-1/2 S Psi^-1/2, S the (expected) covariance."""

    def best_for_covariance(self) -> LinearGaussianParameters:
        """The W and psi that are optimal for the (expected) covariance of the data; mu is kept.

        With isotropic noise they have a closed form. Factor analysis has none: there psi is the
        limit of Newton's method from here, or is kept if q is restricted or the columns are many.
        """
        k, variance = self.parameters.loadings.shape[1], self.parameters.variance
        min_variance = self.noise.min_variance
        exact = self.family in EXACT_FAMILIES
        if min_variance is None or not exact or len(variance) > MAX_JACOBI_SIZE:
            leading = self.leading_eigenpairs()
        else:
            factor = self.covariance_factor()
            profile = maximize_profile_likelihood(factor, variance, min_variance, k)
            leading, variance = profile.leading_eigenpairs(k), profile.variance
        loadings, variance = best_parameters(
            leading, variance, isotropic=min_variance is None, family=self.family
        )
        return self.parameters._replace(loadings=loadings, variance=variance)

    def accelerated_proposal(
        self, parameters: LinearGaussianParameters
    ) -> LinearGaussianParameters | None:
        """An accelerated proposal, accepted only if its bound is at least that of the M-step.

        Here noise variances are updated beyond the M-step, see :meth:`Noise.accelerate`.

        Args:
            parameters: those of the M-step.

        Returns:
            None if acceleration is not applicable.
        """
        if not self.noise.accelerated:
            return None
        variance = self.noise.accelerate(self.parameters.variance, *self.residual_moments())
        return parameters._replace(variance=variance)

    def read(
        self, bound: Tensor, log_likelihood: Tensor, rounding: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """Keep the objective of this state, which is read from the device with other numbers.

        Returns:
            the other numbers, on the CPU.

        Raises:
            torch.linalg.LinAlgError: if a factorization on an accelerator failed.
        """
        self.bound, self.log_likelihood, error, *found = read_together(
            bound, log_likelihood, rounding, *others
        )
        self.rounding = float(error)
        check_factored(self.bound, bound.device)
        return tuple(found)

    def step(self) -> tuple[Float[Tensor, ""], "EMState"]:
        """The bound after an M-step, and the state after the E-step that follows.

        From the second iteration on the accelerated proposal is used, if there is one and its
        bound is at least that of the M-step.
        """
        after_m_step, parameters = self.m_step()
        device, after_m_step = after_m_step.device, after_m_step.cpu()
        check_factored(after_m_step, device)
        proposal = None if self.is_initial else self.accelerated_proposal(parameters)
        if proposal is not None:
            proposed = self._successor(proposal, can_extrapolate=True)
            if proposed.bound >= after_m_step - proposed.rounding:
                return after_m_step, proposed
        return after_m_step, self._successor(
            parameters, can_extrapolate=not self.noise.accelerated
        )

    def notes(self) -> tuple[str, ...]:
        """A note on the accuracy of the results, if rounding errors are not negligible."""
        if self.rounding <= NEGLIGIBLE:
            return ()
        ratio = float((self.column_variance / self.parameters.variance).max().sqrt())
        return (
            f"{ILL_CONDITIONED}: rounding may move log p by {self.rounding:.1g} nats per datum "
            f"(a column's standard deviation is {ratio:.1g} times that of its noise)",
        )

    def certify(self, tolerance: float) -> "Certificate":
        """Compare the bound with that at the best parameters for the covariance of the data.

        With a diagonal q and missing values no rotation of W is best for all rows, so that some
        EM iterations are made from these parameters until they are better here by ``tolerance``.
        """
        best = self._successor(self.best_for_covariance(), can_extrapolate=True)
        for _ in range(REFINEMENT_STEPS if self.needs_refinement else 0):
            if best.bound > self.bound + tolerance:
                break
            _, best = best.step()
        gap = gain = float(best.bound - self.bound)
        if self.stalls_in_rotation:
            gain = min(gap, float(best.log_likelihood - self.log_likelihood))
        return Certificate(gap, gain, best)

    def _successor(
        self, parameters: LinearGaussianParameters, *, can_extrapolate: bool
    ) -> "EMState":
        state = self.e_step(*parameters)
        state.is_initial, state.can_extrapolate = False, can_extrapolate
        return state


def check_factored(bound: Float[Tensor, ""], device: torch.device) -> None:
    """Check that no factorization failed on an accelerator, where it leaves NaN, see
    :func:`ppl_vae.models.linear.eigen.cholesky_factor`."""
    if device.type != "cpu" and bool(bound.isnan()):
        raise torch.linalg.LinAlgError(  # pyright: ignore[reportPrivateImportUsage]
            "a matrix of EM is not positive definite up to rounding; rescale the columns that "
            "are largest or smallest"
        )


class Certificate(NamedTuple):
    """How far a state is from the best parameters for the covariance of the data.

    Attributes:
        gap: the bound at the best parameters less that of the state, in nats per datum.
        restart_gain: the gain of a restart from the best parameters, in nats per datum. It is
            that of log p, if lower, where EM alone approaches the best rotation of W.
        state: the state at the best parameters.
    """

    gap: float
    restart_gain: float
    state: EMState
