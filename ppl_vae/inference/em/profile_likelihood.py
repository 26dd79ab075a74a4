"""Factor analysis of a covariance matrix: noise variances that maximize the profile likelihood.

With t_1 >= t_2 >= ... the eigenvalues and u_i the eigenvectors of Psi^-1/2 S Psi^-1/2, the best
loadings for given noise variances have a closed form (:mod:`ppl_vae.inference.em.closed_form`).
Inserting them gives the profile log-likelihood

    f(psi) = -1/2 (D log 2 pi + sum log psi_d + sum_i t_i + sum_k (log t_k + 1 - t_k)),

the last sum over the active axes k: those of the first K with an eigenvalue above one. Let j run
over the other axes and x = log psi. The derivatives of f are

    df/dx_d = 1/2 sum_j (t_j - 1) u_jd^2,
    d2f/dx_d dx_e = -1/2 (sum_j t_j u_jd u_je) (sum_j u_jd u_je)
                    -1/2 sum_kj (1 - t_j) (t_k + t_j) / (t_k - t_j) u_kd u_ke u_jd u_je.

References:
    Jöreskog: Some contributions to maximum likelihood factor analysis (1967); Clarke: A rapidly
    convergent method for maximum-likelihood factor analysis (1970).
"""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.models.linear.eigen import LeadingEigenpairs, right_singular_vectors

MAX_STEPS, MAX_HALVINGS = 100, 30
"""The largest numbers of Newton steps, and of halvings of one step."""
MIN_PREDICTED_GAIN = 1e-13
"""Newton's method stops at a step with a smaller predicted gain, in nats per datum."""
MAX_LOG_STEP = 2.0
"""The largest change of the logarithm of a noise variance in one step."""


@dataclass(frozen=True)
class ProfileLikelihood:
    """The profile likelihood at given noise variances.

    Attributes:
        variance: psi, (D,).
        values: t_i, (D,).
        axes: u_i, (D, D).
        num_active: how many of the first K eigenvalues are larger than one.
        log_likelihood: f(psi) + D/2 log 2 pi, in nats per datum.
    """

    variance: Float[Tensor, " D"]
    values: Float[Tensor, " D"]
    axes: Float[Tensor, "D D"]
    num_active: int
    log_likelihood: Float[Tensor, ""]

    @classmethod
    def of(
        cls, factor: Float[Tensor, "R D"], variance: Float[Tensor, " D"], latent_dim: int
    ) -> Self:
        """The profile likelihood for the covariance S = F'F."""
        singular, axes = right_singular_vectors(factor / variance.sqrt())
        if (lacking := len(variance) - len(singular)) > 0:
            singular = torch.nn.functional.pad(singular, (0, lacking))
            axes = torch.cat([axes, torch.linalg.qr(axes, mode="complete").Q[:, -lacking:]], 1)
        values = singular.square()
        num_active = int((values[:latent_dim] > 1).sum())
        active = values[:num_active]
        terms = variance.log().sum() + values[num_active:].sum() + (active.log() + 1).sum()
        return cls(variance, values, axes, num_active, -terms / 2)

    def leading_eigenpairs(self, latent_dim: int) -> LeadingEigenpairs:
        """The first K eigenvalues and eigenvectors, and the sum of the other eigenvalues."""
        k = latent_dim
        return self.values[:k], self.axes[:, :k], self.values[k:].sum()

    def derivatives(self) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
        """The gradient and the Hessian of f with respect to log psi."""
        active, others = self.axes[:, : self.num_active], self.axes[:, self.num_active :]
        k, j = self.values[: self.num_active, None], self.values[self.num_active :]
        gradient = (others.square() @ (j - 1)) / 2
        first = (others * j) @ others.mT * (others @ others.mT)
        ratio = (1 - j) * (k + j) / (k - j).clamp(min=torch.finfo(j.dtype).eps * k)
        second = torch.zeros_like(first)
        for axis, row in zip(active.mT, ratio, strict=True):
            second += torch.outer(axis, axis) * ((others * row) @ others.mT)
        return gradient, -(first + second) / 2


def maximize_profile_likelihood(
    factor: Float[Tensor, "R D"],
    variance: Float[Tensor, " D"],
    min_variance: Float[Tensor, " D"],
    latent_dim: int,
) -> ProfileLikelihood:
    """The profile likelihood at a maximum, found by Newton's method from psi.

    Every step raises the profile likelihood; the method ends where no step does.

    Args:
        factor: F, with S = F'F.
        variance: the initial psi.
        min_variance: the smallest noise variances.
        latent_dim: K.
    """
    current = ProfileLikelihood.of(factor, variance, latent_dim)
    for _ in range(MAX_STEPS):
        following = _newton_step(current, factor, min_variance, latent_dim)
        if following is None:
            break
        current = following
    return current


def _newton_step(
    current: ProfileLikelihood, factor: Tensor, min_variance: Tensor, latent_dim: int
) -> ProfileLikelihood | None:
    # None at a maximum, up to rounding.
    gradient, hessian = current.derivatives()
    free = (current.variance > min_variance * (1 + 1e-12)) | (gradient > 0)
    step = torch.zeros_like(gradient)
    if not bool(free.any()):
        return None
    # Where f is not concave, the sign of its curvature is changed.
    curvature, directions = torch.linalg.eigh(-hessian[free][:, free])
    curvature = curvature.abs().clamp(min=1e-10 * float(curvature.abs().max()))
    step[free] = directions @ ((directions.mT @ gradient[free]) / curvature)
    if float(step @ gradient) / 2 < MIN_PREDICTED_GAIN:
        return None
    step = step.clamp(-MAX_LOG_STEP, MAX_LOG_STEP)
    for _ in range(MAX_HALVINGS):
        variance = torch.maximum(current.variance * step.exp(), min_variance)
        candidate = ProfileLikelihood.of(factor, variance, latent_dim)
        if candidate.log_likelihood > current.log_likelihood:
            return candidate
        step = step / 2
    return None
