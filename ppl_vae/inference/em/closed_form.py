"""The optimal loadings of a linear-Gaussian model for a given covariance matrix.

For the sample covariance of complete data they maximize the bound, given the noise variances if
these differ between columns. For the expected covariance of data with missing values they are an
M-step in which the missing entries are the only missing data. This M-step cannot lower the
likelihood, and it leaves the likelihood unchanged only where the model already explains the
leading axes of that covariance. It therefore distinguishes a maximum from a saddle point, at
which EM does not move either.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.models.linear.eigen import LeadingEigenpairs

MIN_SINE = 1e-3
"""W is rotated if a column of Psi^-1/2 W makes an angle of smaller sine with those before it."""


def best_parameters(
    leading: LeadingEigenpairs,
    variance: Float[Tensor, " D"],
    *,
    isotropic: bool,
    family: str = "full",
) -> tuple[Float[Tensor, "D K"], Float[Tensor, " D"]]:
    """W and psi that maximize the expected bound for centred data of covariance S.

    With psi given, let t_1 >= t_2 >= ... be the eigenvalues of Psi^-1/2 S Psi^-1/2 and u_i its
    eigenvectors. Then W = Psi^1/2 U diag(p - 1)^1/2, where the ratios p_i >= 1 depend on the
    family of q: t_i for the posterior (and for a diagonal q, which is exact on these axes),
    t_i^1/2 for a unit q, t_i^1/2 mean(t^1/2) for an isotropic one. With isotropic noise psi is
    not fixed; it is multiplied by the optimal factor.

    Args:
        leading: t_1, ..., t_K, their eigenvectors, and the sum of the other eigenvalues.
        variance: psi.
        isotropic: whether the noise variance is the same for all columns.
        family: the family of q, see :mod:`ppl_vae.guides.families`.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), equations 7 and 8;
        Jöreskog: Some contributions to maximum likelihood factor analysis (1967).
    """
    values, axes, rest = leading
    noise = values.new_ones(())
    if isotropic:
        noise = _best_noise_factor(values, rest, len(variance), family)
    ratios = _ratios(values / noise, family).clamp(min=1)
    loadings = variance.sqrt()[:, None] * axes * (noise * (ratios - 1)).sqrt()
    return loadings, noise * variance


def _best_noise_factor(values: Tensor, rest: Tensor, data_dim: int, family: str) -> Tensor:
    # s2, given the leading eigenvalues and the sum of the others.
    if family != "unit":
        return rest / (data_dim - len(values))
    # s = (A + (A^2 + 4 D T)^1/2) / 2 D with A the sum of t^1/2 over the active axes, those with
    # t^1/2 > s, and T the sum of t over all others.
    scale = ((rest + values.sum()) / data_dim).sqrt()
    for num_active in range(len(values), 0, -1):
        roots, inactive = values[:num_active].sqrt(), rest + values[num_active:].sum()
        total = roots.sum()
        candidate = (total + (total**2 + 4 * data_dim * inactive).sqrt()) / (2 * data_dim)
        if bool(roots[-1] > candidate):
            return candidate.square()
    return scale.square()


def _ratios(values: Float[Tensor, " K"], family: str) -> Float[Tensor, " K"]:
    roots = values.sqrt()
    return {"unit": roots, "isotropic": roots * roots.mean()}.get(family, values)


def rotate_if_collinear(
    loadings: Float[Tensor, "D K"], variance: Float[Tensor, " D"]
) -> Float[Tensor, "D K"]:
    """W, rotated where the Cholesky factor of I + W' Psi^-1 W would lose digits.

    The test scales the diagonal to one, because entries of very different sizes do no harm there.
    """
    eye = torch.eye(loadings.shape[1], dtype=loadings.dtype, device=loadings.device)
    precision = loadings.mT @ (loadings / variance[:, None]) + eye
    scale = precision.diagonal().sqrt()
    lower, failed = torch.linalg.cholesky_ex(precision / torch.outer(scale, scale))
    accurate = (failed == 0) & (lower.diagonal().min() > MIN_SINE)
    return loadings if bool(accurate) else rotate_to_principal_axes(loadings, variance)


def rotate_to_principal_axes(
    loadings: Float[Tensor, "D K"], variance: Float[Tensor, " D"]
) -> Float[Tensor, "D K"]:
    """W R with the rotation R that makes W' Psi^-1 W diagonal up to rounding.

    The model is unchanged, and the posterior precision has no large off-diagonal entries that
    could hide small ones.
    """
    _, _, rotation = torch.linalg.svd(loadings / variance.sqrt()[:, None], full_matrices=False)
    return loadings @ rotation.mT
