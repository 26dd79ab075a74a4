"""The distance between two PPCA models, invariant to rotations of their loadings."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from scipy.linalg import orthogonal_procrustes, subspace_angles
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.models.linear.linear_gaussian import LatentPosterior, MissingnessPatterns

LinearGaussian: TypeAlias = Any
"""x ~ N(loc, W W' + Psi), with W ``loadings`` (D, K), ``loc`` (D,), and ``noise_scale``, the
square root of Psi's diagonal, () or (D,).

This is not a ``Protocol``: from Python 3.12 on its checks do not find a module's parameters.
"""


@dataclass(frozen=True, repr=False)
class Subspace(Result):
    """The comparison of two linear-Gaussian models.

    Attributes:
        angles: principal angles between the column spaces, in degrees, largest first, (K,); K is
            the smaller latent dimension if they differ. A dimension that the loadings do not span
            (a column of zeros) counts as 90 degrees.
        axis_angles: angles between each column of the first model and the matched column of the
            second, in degrees, (K,); these depend on the rotation of the loadings.
        aligned: the loadings of the second model, rotated onto those of the first by Procrustes
            analysis if their shapes are equal.
        kl: KL(first || second) between the marginals of x, in nats per datum.
    """

    angles: Float[Tensor, " K"]
    axis_angles: Float[Tensor, " K"]
    aligned: Float[Tensor, "D L"]
    kl: float

    @property
    def largest_angle(self) -> float:
        """The largest principal angle, in degrees."""
        return float(self.angles.max())

    def __repr__(self) -> str:
        return (
            f"Subspace: largest principal angle {self.largest_angle:.3g} degrees, "
            f"KL {self.kl:.4g} nats per datum"
        )


@torch.no_grad()
def subspace(first: LinearGaussian, second: LinearGaussian) -> Subspace:
    """Compare two models with loadings, loc and noise_scale, such as PPCA.

    Raises:
        ValueError: if they have different data dimensions.
    """
    w, v = (model.loadings.detach().double().cpu() for model in (first, second))
    if len(w) != len(v):
        raise ValueError(f"the models have different data dimensions, {len(w)} and {len(v)}")
    angles = _principal_angles(w, v)
    return Subspace(angles, _axis_angles(w, v), _align(w, v), _kl(first, second))


def _principal_angles(w: Tensor, v: Tensor) -> Tensor:
    if not (bool(w.any()) and bool(v.any())):
        angles = w.new_zeros(0)  # scipy does not accept a matrix of zeros
    else:
        angles = torch.from_numpy(
            subspace_angles(w.numpy(force=True), v.numpy(force=True))
        ).rad2deg()
    num_unspanned = min(w.shape[1], v.shape[1]) - len(angles)
    return torch.cat([angles.new_full((num_unspanned,), 90.0), angles])


def _axis_angles(w: Tensor, v: Tensor) -> Tensor:
    lengths = w.norm(dim=0)[:, None] * v.norm(dim=0)
    cosines = (w.mT @ v).abs() / lengths.clamp(min=torch.finfo(w.dtype).tiny)
    rows, columns = linear_sum_assignment(-cosines.numpy(force=True))
    return cosines[rows, columns].clamp(max=1).acos().rad2deg()


def _align(w: Tensor, v: Tensor) -> Tensor:
    if w.shape != v.shape:
        return v
    rotation, _ = orthogonal_procrustes(v.numpy(force=True), w.numpy(force=True))
    return v @ torch.from_numpy(rotation).to(v)


def _kl(first: LinearGaussian, second: LinearGaussian) -> float:
    """KL(N(m, C) || N(m', C')) = 1/2 [tr C'^-1 C + d' C'^-1 d - D + log det C' / det C].

    With V the loadings of the second model and P = I + V' Psi'^-1 V, no D x D matrix is formed:
    the trace is that of W' C'^-1 W + Psi C'^-1, and (C'^-1)_dd = (1 - v_d' P^-1 v_d / psi'_d) /
    psi'_d.
    """
    models = (first, second)  # they may be on different devices
    w, v = (model.loadings.detach().double().cpu() for model in models)
    loc, other_loc = (model.loc.detach().double().cpu() for model in models)
    s, t = (m.noise_scale.detach().double().cpu().expand(len(w)) for m in models)
    complete, zero = MissingnessPatterns.complete(other_loc), torch.zeros_like(other_loc)
    # y' C'^-1 y = r' Psi'^-1 r + |m|^2 with r the residual and m the posterior mean given y.
    found = LatentPosterior.with_scale(
        torch.cat([w.mT, (loc - other_loc)[None]]), complete, v, zero, t
    )
    quadratic = (found.residual / t).square().sum() + found.mean.square().sum()
    other = found.covariances
    unexplained = 1 - (v / t[:, None] @ other.tril[0]).square().sum(1)
    own = LatentPosterior.with_scale(zero[None], complete, w, zero, s).covariances
    log_det = 2 * ((t / s).log().sum() + own.half_log_det[0] - other.half_log_det[0])
    return 0.5 * float(quadratic + ((s / t).square() * unexplained).sum() - len(w) + log_det)
