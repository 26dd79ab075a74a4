"""The best loadings of a linear-Gaussian model for a covariance, given how q is restricted.

Where the covariance is that of complete data, they are the maximum of the bound, given the noise
if it is diagonal. Where cells are missing and it is the expected covariance of the rows given what
was observed, they are an M-step with the missing cells as the only missing data. So they
cannot lower the likelihood, and do not raise it only where the model explains the leading axes of
that covariance already: they tell a maximum from a saddle point, at which EM stands still too.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.models.eigen import LeadingEigenpairs

COLLINEAR = 1e-3
"""The sine of the angle of a column of Psi^-1/2 W to those before it, under which W is rotated."""


def best_parameters(
    leading: LeadingEigenpairs,
    variance: Float[Tensor, " D"],
    *,
    isotropic: bool,
    family: str = "full",
) -> tuple[Float[Tensor, "D K"], Float[Tensor, " D"]]:
    """W and psi of the highest expected bound, for data of mean zero with the covariance S.

    With psi given, let t_1 >= t_2 >= ... be the eigenvalues of Psi^-1/2 S Psi^-1/2 and u_i its
    eigenvectors; then W = Psi^1/2 U diag(p - 1)^1/2, where the ratios p_i >= 1 depend on the
    family of q: t_i for the posterior (and for a diagonal q, which is exact on these axes),
    t_i^1/2 for a unit q, t_i^1/2 mean(t^1/2) for an isotropic one. Isotropic noise is not taken as
    given: psi is then multiplied by the best factor.

    Args:
        leading: t_1, ..., t_K, their eigenvectors, and the sum of the other eigenvalues.
        variance: psi.
        isotropic: whether all noise variances are one.
        family: of q, see :mod:`ppl_vae.guides.families`.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), equations 7 and 8;
        Jöreskog: Some contributions to maximum likelihood factor analysis (1967).
    """
    values, axes, rest = leading
    noise = values.new_ones(())
    if isotropic:
        noise = _best_noise(values, rest, len(variance), family)
    ratios = _ratios(values / noise, family).clamp(min=1)
    loadings = variance.sqrt()[:, None] * axes * (noise * (ratios - 1)).sqrt()
    return loadings, noise * variance


def _best_noise(kept: Tensor, left: Tensor, data_dim: int, family: str) -> Tensor:
    # s2, given the kept eigenvalues and the sum of the others.
    if family != "unit":
        return left / (data_dim - len(kept))
    # s = (A + (A^2 + 4 D T)^1/2) / 2 D with A the sum of t^1/2 over the axes that are on, those
    # with t^1/2 > s, and T the sum of t over all others.
    scale = ((left + kept.sum()) / data_dim).sqrt()
    for active in range(len(kept), 0, -1):
        roots, others = kept[:active].sqrt(), left + kept[active:].sum()
        total = roots.sum()
        found = (total + (total**2 + 4 * data_dim * others).sqrt()) / (2 * data_dim)
        if bool(roots[-1] > found):
            return found.square()
    return scale.square()


def _ratios(values: Float[Tensor, " K"], family: str) -> Float[Tensor, " K"]:
    roots = values.sqrt()
    return {"unit": roots, "isotropic": roots * roots.mean()}.get(family, values)


def conditioned(
    loadings: Float[Tensor, "D K"], variance: Float[Tensor, " D"]
) -> Float[Tensor, "D K"]:
    """W, rotated where the Cholesky factor of I + W' Psi^-1 W would lose digits.

    Entries of very different sizes on the diagonal do no harm, so it is judged with ones there.
    """
    eye = torch.eye(loadings.shape[1]).to(loadings)
    precision = loadings.mT @ (loadings / variance[:, None]) + eye
    sizes = precision.diagonal().sqrt()
    lower, failed = torch.linalg.cholesky_ex(precision / torch.outer(sizes, sizes))
    good = int(failed) == 0 and float(lower.diagonal().min()) > COLLINEAR
    return loadings if good else rotated(loadings, variance)


def rotated(loadings: Float[Tensor, "D K"], variance: Float[Tensor, " D"]) -> Float[Tensor, "D K"]:
    """W R with R the rotation for which W' Psi^-1 W is diagonal up to rounding.

    The model is the same, and the posterior's precision has no large entries beside small ones
    that matter.
    """
    _, _, turn = torch.linalg.svd(loadings / variance.sqrt()[:, None], full_matrices=False)
    return loadings @ turn.mT
