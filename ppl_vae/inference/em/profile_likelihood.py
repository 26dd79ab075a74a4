"""Factor analysis of a covariance: the noise variances at which the profile likelihood is highest.

With t_1 >= t_2 >= ... the eigenvalues and u_i the eigenvectors of Psi^-1/2 S Psi^-1/2, the best
loadings for given noise variances have a closed form (:mod:`ppl_vae.inference.em.closed_form`),
and leave

    f(psi) = -1/2 (D log 2 pi + sum log psi_d + sum_i t_i + sum_k (log t_k + 1 - t_k)),

the last sum over the first K eigenvalues that are larger than one (k). Over the others (j), and
with x = log psi, its derivatives are

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

from ppl_vae.models.eigen import LeadingEigenpairs, right_singular_vectors

STEPS, HALVINGS = 100, 30
NOTHING = 1e-13
"""A step that promises less, in nats per datum, is not made."""
LONGEST = 2.0
"""Of a step of the logarithm of a noise variance."""


@dataclass(frozen=True)
class Profile:
    """The profile likelihood at some noise variances.

    Attributes:
        variance: psi, (D,).
        values: t_i, (D,).
        axes: u_i, (D, D).
        kept: how many of the first K are larger than one.
        height: f(psi) + D/2 log 2 pi, in nats per datum.
    """

    variance: Float[Tensor, " D"]
    values: Float[Tensor, " D"]
    axes: Float[Tensor, "D D"]
    kept: int
    height: Float[Tensor, ""]

    @classmethod
    def of(
        cls, factor: Float[Tensor, "R D"], variance: Float[Tensor, " D"], latent_dim: int
    ) -> Self:
        """For S = F'F."""
        singular, axes = right_singular_vectors(factor / variance.sqrt())
        if (lacking := len(variance) - len(singular)) > 0:
            singular = torch.nn.functional.pad(singular, (0, lacking))
            axes = torch.cat([axes, torch.linalg.qr(axes, mode="complete").Q[:, -lacking:]], 1)
        values = singular.square()
        kept = int((values[:latent_dim] > 1).sum())
        first = values[:kept]
        parts = variance.log().sum() + values[kept:].sum() + (first.log() + 1).sum()
        return cls(variance, values, axes, kept, -parts / 2)

    def leading(self, latent_dim: int) -> LeadingEigenpairs:
        """The first K eigenvalues and eigenvectors, and the sum of the others."""
        k = latent_dim
        return self.values[:k], self.axes[:, :k], self.values[k:].sum()

    def derivatives(self) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
        """The gradient and the Hessian of f with respect to log psi."""
        inside, others = self.axes[:, : self.kept], self.axes[:, self.kept :]
        k, j = self.values[: self.kept, None], self.values[self.kept :]
        gradient = (others.square() @ (j - 1)) / 2
        first = (others * j) @ others.mT * (others @ others.mT)
        ratio = (1 - j) * (k + j) / (k - j).clamp(min=torch.finfo(j.dtype).eps * k)
        second = torch.zeros_like(first)
        for axis, row in zip(inside.mT, ratio, strict=True):
            second += torch.outer(axis, axis) * ((others * row) @ others.mT)
        return gradient, -(first + second) / 2


def best_noise(
    factor: Float[Tensor, "R D"],
    variance: Float[Tensor, " D"],
    min_variance: Float[Tensor, " D"],
    latent_dim: int,
) -> Profile:
    """The profile at a maximum, found by Newton's method from psi, each variance above its floor.

    Every step raises the profile likelihood; the steps end where none does.

    Args:
        factor: F, with S = F'F.
        variance: psi to start from.
        floors: the least noise variances.
        latent_dim: K.
    """
    here = Profile.of(factor, variance, latent_dim)
    for _ in range(STEPS):
        following = _newton(here, factor, min_variance, latent_dim)
        if following is None:
            break
        here = following
    return here


def _newton(
    here: Profile, factor: Tensor, min_variance: Tensor, latent_dim: int
) -> Profile | None:
    gradient, hessian = here.derivatives()
    free = (here.variance > min_variance * (1 + 1e-12)) | (gradient > 0)
    step = torch.zeros_like(gradient)
    if not bool(free.any()):
        return None
    # Where f is not concave its curvature is taken with the other sign.
    curvature, directions = torch.linalg.eigh(-hessian[free][:, free])
    curvature = curvature.abs().clamp(min=1e-10 * float(curvature.abs().max()))
    step[free] = directions @ ((directions.mT @ gradient[free]) / curvature)
    if float(step @ gradient) / 2 < NOTHING:
        return None
    step = step.clamp(-LONGEST, LONGEST)
    for _ in range(HALVINGS):
        moved = torch.maximum(here.variance * step.exp(), min_variance)
        other = Profile.of(factor, moved, latent_dim)
        if other.height > here.height:
            return other
        step = step / 2
    return None
