"""How far two PPCA models are from each other, whatever rotation their loadings stand in."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from scipy.linalg import orthogonal_procrustes, subspace_angles
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.models.linear_gaussian import LatentPosterior, MissingnessPatterns

LinearGaussian: TypeAlias = Any
"""x ~ N(loc, W W' + Psi), with W ``loadings`` (D, K), ``loc`` (D,), and ``noise_scale``, the root
of Psi's diagonal, () or (D,).

A ``Protocol`` would not do: from Python 3.12 on its checks do not see a module's parameters.
"""


@dataclass(frozen=True, repr=False)
class Subspace(Result):
    """Two linear-Gaussian models compared.

    Attributes:
        angles: principal angles between the column spaces, in degrees, largest first, (K,); K is
            the smaller latent dimension, if they differ. A dimension that loadings do not span
            (a column of zeros) counts as 90 degrees.
        axis_angles: between each column of the first and the column of the second matched to it,
            in degrees, (K,); these do depend on the rotation of the loadings.
        aligned: the second's loadings, turned onto the first's if these are as many.
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
    ours, theirs = (model.loadings.detach().double().cpu() for model in (first, second))
    if len(ours) != len(theirs):
        raise ValueError(
            f"the models have different data dimensions, {len(ours)} and {len(theirs)}"
        )
    angles = _principal_angles(ours, theirs)
    return Subspace(angles, _axis_angles(ours, theirs), _align(ours, theirs), _kl(first, second))


def _principal_angles(ours: Tensor, theirs: Tensor) -> Tensor:
    if not (bool(ours.any()) and bool(theirs.any())):
        found = ours.new_zeros(0)  # which scipy does not take
    else:
        found = torch.from_numpy(subspace_angles(ours.numpy(), theirs.numpy())).rad2deg()
    lost = min(ours.shape[1], theirs.shape[1]) - len(found)
    return torch.cat([found.new_full((lost,), 90.0), found])


def _axis_angles(ours: Tensor, theirs: Tensor) -> Tensor:
    lengths = ours.norm(dim=0)[:, None] * theirs.norm(dim=0)
    cosines = (ours.mT @ theirs).abs() / lengths.clamp(min=torch.finfo(ours.dtype).tiny)
    rows, columns = linear_sum_assignment(-cosines.numpy())
    return cosines[rows, columns].clamp(max=1).acos().rad2deg()


def _align(ours: Tensor, theirs: Tensor) -> Tensor:
    if ours.shape != theirs.shape:
        return theirs
    rotation, _ = orthogonal_procrustes(theirs.numpy(), ours.numpy())
    return theirs @ torch.from_numpy(rotation)


def _kl(first: LinearGaussian, second: LinearGaussian) -> float:
    """KL(N(m, C) || N(m', C')) = 1/2 [tr C'^-1 C + d' C'^-1 d - D + log det C' / det C].

    With V the second's loadings and P = I + V' Psi'^-1 V no D x D matrix is formed: the trace is
    that of W' C'^-1 W + Psi C'^-1, and (C'^-1)_dd = (1 - v_d' P^-1 v_d / psi'_d) / psi'_d.
    """
    models = (first, second)  # which may stand on different devices
    w, v = (model.loadings.detach().double().cpu() for model in models)
    ours, theirs = (model.loc.detach().double().cpu() for model in models)
    s, t = (m.noise_scale.detach().double().cpu().expand(len(w)) for m in models)
    complete, zero = MissingnessPatterns.complete(theirs), torch.zeros_like(theirs)
    # y' C'^-1 y = r' Psi'^-1 r + |m|^2 with r the residual and m the posterior mean given y.
    found = LatentPosterior.with_scale(
        torch.cat([w.mT, (ours - theirs)[None]]), complete, v, zero, t
    )
    quadratic = (found.residual / t).square().sum() + found.mean.square().sum()
    unexplained = 1 - (v / t[:, None] @ found.tril[0]).square().sum(1)
    own = LatentPosterior.with_scale(zero[None], complete, w, zero, s)
    log_det = 2 * ((t / s).log().sum() + own.half_log_det[0] - found.half_log_det[0])
    return 0.5 * float(quadratic + ((s / t).square() * unexplained).sum() - len(w) + log_det)
