"""Functions of the parameters of PPCA that rotations of the latent space leave as they are.

W and W R with R orthogonal have the same likelihood, so that draws of W itself move freely along
rotations. What is identified is the covariance W W' + Psi, the noise, the column space of W and,
where singular values of Psi^-1/2 W are separated, its singular vectors.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.models.bayesian_ppca import ParameterDraws

MIN_ALIGNMENT = 0.9
"""A canonical column is identified if the mean of its unit vectors is at least this long."""
PROCRUSTES_ITERATIONS = 10


class CanonicalLoadings(NamedTuple):
    """Loadings rotated to the principal axes of Psi^-1/2 W.

    Attributes:
        loadings: the identified columns, in decreasing order of their singular values, with signs
            that agree among draws, ``(*S, D, L)``.
        columns: which of the K columns these are.
    """

    loadings: Float[Tensor, "*S D L"]
    columns: tuple[int, ...]


def covariance(parameters: ParameterDraws) -> Float[Tensor, "*S D D"]:
    """W W' + Psi."""
    loadings, scale = parameters.loadings, parameters.column_scale
    return loadings @ loadings.mT + torch.diag_embed(scale.square())


def subspace_projection(parameters: ParameterDraws) -> Float[Tensor, "*S D D"]:
    """The orthogonal projection onto the column space of W."""
    q = torch.linalg.qr(parameters.loadings).Q
    return q @ q.mT


def canonical_loadings(parameters: ParameterDraws) -> CanonicalLoadings:
    """Psi^1/2 U S of the singular value decomposition U S V' = Psi^-1/2 W.

    The sign of each column is that of its projection on the mean over draws. Columns whose
    direction varies over draws, since its singular value is close to another or to zero, are left
    out.
    """
    scale = parameters.column_scale.unsqueeze(-1)
    axes, values, _ = torch.linalg.svd(parameters.loadings / scale, full_matrices=False)
    flat = axes.reshape(-1, *axes.shape[-2:])
    # The leading eigenvector of the mean of u u' does not depend on signs.
    moment = torch.einsum("sdk,sek->kde", flat, flat) / len(flat)
    reference = torch.linalg.eigh(moment).eigenvectors[..., -1].mT
    # The sign of the reference itself: its largest element is positive.
    largest = reference.gather(0, reference.abs().argmax(0, keepdim=True))
    axes = axes * (axes * reference * largest.sign()).sum(-2, keepdim=True).sign()
    alignment = axes.reshape(flat.shape).mean(0).norm(dim=0)
    chosen = (alignment >= MIN_ALIGNMENT).nonzero().flatten()
    loadings = (scale * axes * values.unsqueeze(-2))[..., chosen]
    return CanonicalLoadings(loadings, tuple(chosen.tolist()))


def mean_parameters(parameters: ParameterDraws) -> ParameterDraws:
    """The mean of the draws (S, ...), that of W up to a rotation.

    The mean of W over draws that are rotated against each other has no meaning. Each draw is
    rotated to the mean of all, in turn (orthogonal Procrustes), which starts as the best
    approximation of rank K to the mean of W W'. Relevances, which belong to the columns of a draw,
    are left out.

    References:
        Assmann, Boysen-Hogrefe, Pape: Bayesian analysis of static and dynamic factor models: an
        ex-post approach towards the rotation problem (2016).
    """
    loadings = parameters.loadings
    values, vectors = torch.linalg.eigh((loadings @ loadings.mT).mean(0))
    leading = slice(-loadings.shape[-1], None)
    mean = vectors[:, leading] * values[leading].clamp(min=0).sqrt()
    for _ in range(PROCRUSTES_ITERATIONS):
        left, _, right = torch.linalg.svd(loadings.mT @ mean)
        mean = (loadings @ (left @ right)).mean(0)
    return ParameterDraws(mean, parameters.loc.mean(0), parameters.noise_scale.mean(0), None)
