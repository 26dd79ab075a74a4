"""What the EM algorithms of linear-Gaussian models share: parameters, and the data given them."""

from abc import abstractmethod
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.em.closed_form import best_parameters
from ppl_vae.inference.em.noise import Noise
from ppl_vae.inference.em.profile_likelihood import best_noise
from ppl_vae.models.eigen import MAX_JACOBI_SIZE, LeadingEigenpairs

ILL_CONDITIONED = "the table is too ill-conditioned for float64"
"""How the note on digits lost to rounding begins."""
FINE = 1e-8
"""What rounding may move log p by, in nats per datum, without a note."""
EXACT = ("full", "diagonal")
"""Families of q that hold the posterior, in the best rotation of W."""
STEPS_FROM_BEST = 10
"""From the best parameters for a covariance, where q is restricted and cells are missing."""

Parameters: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""W (D, K), mu (D,) and psi (D,), in float64."""


class EMState:
    """Where an algorithm stands after an E-step: parameters, and what the data are there.

    Attributes:
        noise: of the model.
        family: of q, see :mod:`ppl_vae.guides.families`.
        loadings, loc, variance: W (D, K), mu (D,), psi (D,), in float64.
        bound: E_q[log p(x, z)] + H[q], in nats per datum.
        log_likelihood: log p(x), in nats per datum.
        rounding: what rounding may move these by.
        total: the variance of each column, (D,).
        needs_steps: whether W has no rotation in which q is the posterior of every row.
        stalls: whether W may be in a rotation that is not the best one, with a lower bound.
        first: whether no step led here.
        settled: whether the step that led here was all that could be done.
    """

    noise: Noise
    family: str
    loadings: Float[Tensor, "D K"]
    loc: Float[Tensor, " D"]
    variance: Float[Tensor, " D"]
    bound: Float[Tensor, ""]
    log_likelihood: Float[Tensor, ""]
    rounding: float
    total: Float[Tensor, " D"]
    needs_steps: bool = False
    stalls: bool = False
    first: bool = True
    final: bool = True

    @abstractmethod
    def m_step(self) -> tuple[Float[Tensor, ""], Parameters]:
        """The bound after an M-step, and W, mu and psi there."""

    @abstractmethod
    def at(self, *parameters: Tensor) -> "EMState":
        """The position after an E-step at W, mu and psi."""

    @abstractmethod
    def own_squares(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """The means over rows of r^2 and of w_d' V w_d, see :meth:`Noise.accelerate`."""

    @abstractmethod
    def factor(self) -> Float[Tensor, "R D"]:
        """F, with F'F the (expected) covariance of the data."""

    @abstractmethod
    def leading(self) -> LeadingEigenpairs:
        """The leading axes of the (expected) covariance of the data, its columns over psi^1/2."""

    def best(self) -> Parameters:
        """The best W, mu and psi for the covariance of the data; mu as it is.

        In closed form. Factor analysis has none; there psi is where Newton's method comes to from
        here, or as it is if q is restricted or the columns are many.
        """
        k, min_variance, variance = self.loadings.shape[1], self.noise.min_variance, self.variance
        if min_variance is None or self.family not in EXACT or len(variance) > MAX_JACOBI_SIZE:
            leading = self.leading()
        else:
            profile = best_noise(self.factor(), variance, min_variance, k)
            leading, variance = profile.leading(k), profile.variance
        loadings, variance = best_parameters(
            leading, variance, isotropic=min_variance is None, family=self.family
        )
        return loadings, self.loc, variance

    def accelerated_proposal(self, parameters: Parameters) -> Parameters | None:
        """What promises more than the M-step's parameters and may be worse; None if nothing does.

        Noise variances leap if they may.
        """
        if not self.noise.accelerated:
            return None
        loadings, loc, _ = parameters
        return loadings, loc, self.noise.accelerate(self.variance, *self.own_squares())

    def step(self) -> tuple[Float[Tensor, ""], "EMState"]:
        """The bound after an M-step, and the position after the E-step that follows.

        From the second step on the bold parameters are taken, if there are some and if they keep
        the promise of the M-step.
        """
        after, careful = self.m_step()
        accelerated_proposal = None if self.first else self.accelerated_proposal(careful)
        if accelerated_proposal is not None:
            following = self._reached(*accelerated_proposal, final=True)
            if following.bound >= after - following.rounding:
                return after, following
        return after, self._reached(*careful, final=not self.noise.accelerated)

    def notes(self) -> tuple[str, ...]:
        """What a person should know of how far the numbers here can be trusted."""
        if self.rounding <= FINE:
            return ()
        ratio = float((self.total / self.variance).max().sqrt())
        return (
            f"{ILL_CONDITIONED}: rounding may move log p by {self.rounding:.1g} nats per datum "
            f"(a column's standard deviation is {ratio:.1g} times that of its noise)",
        )

    def certified(self, allowed: float) -> tuple[float, float, "EMState"]:
        """How far the bound is below that at the best parameters, and a position there.

        Where q is restricted and cells are missing, no rotation of W is best for all rows, so a
        few steps are made from the best parameters.

        Returns:
            The difference of the bounds, what a restart there would gain, both in nats per datum,
            and the position. It gains nothing if all that is better there is the rotation, which
            the steps find by themselves.
        """
        other = self._reached(*self.best(), final=True)
        for _ in range(STEPS_FROM_BEST if self.needs_steps else 0):
            if other.bound > self.bound + allowed:
                break
            _, other = other.step()
        left = float(other.bound - self.bound)
        if not self.stalls:
            return left, left, other
        return left, min(left, float(other.log_likelihood - self.log_likelihood)), other

    def _reached(self, *parameters: Tensor, final: bool) -> "EMState":
        state = self.at(*parameters)
        state.first, state.final = False, final
        return state


def project_covariance(precision: Float[Tensor, "*B K K"], family: str) -> Float[Tensor, "*B K K"]:
    """The covariance of the family's Gaussian closest to N(m, precision^-1), in KL(q || p)."""
    if family == "full":
        return torch.linalg.inv(precision)
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    variances = {
        "unit": torch.ones_like(diagonal),
        "isotropic": (1 / diagonal.mean(-1, keepdim=True)).expand_as(diagonal),
        "diagonal": 1 / diagonal,
    }[family]
    return torch.diag_embed(variances)
