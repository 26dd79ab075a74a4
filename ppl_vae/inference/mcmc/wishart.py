"""Draws of gamma variables, of Wishart matrices, and of normal vectors with a given precision."""

import torch
from jaxtyping import Float
from torch import Tensor


def standard_gamma(shape: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Gamma(shape, 1), without the checks of the distribution's class."""
    return torch._standard_gamma(shape)  # pyright: ignore[reportPrivateImportUsage]


def half_degrees(freedom: Float[Tensor, "*S"], size: int) -> Float[Tensor, "*S K"]:
    """Half the degrees of freedom of each diagonal element of :func:`bartlett_factor`, squared:
    (freedom - i) / 2, i = 0, ..., K - 1."""
    below = torch.arange(size, dtype=freedom.dtype, device=freedom.device)
    return (freedom.unsqueeze(-1) - below) / 2


def bartlett_factor(halves: Float[Tensor, "*S K"]) -> Float[Tensor, "*S K K"]:
    """A lower triangular T with T T' ~ Wishart(freedom, I), freedom > K - 1.

    T_ii^2 is chi-squared with freedom - i degrees of freedom, i = 0, ..., K - 1, and elements
    below the diagonal are standard normal (Bartlett 1933).

    Args:
        halves: from :func:`half_degrees`.
    """
    factor = torch.randn(*halves.shape, halves.shape[-1], dtype=halves.dtype, device=halves.device)
    factor.tril_(-1).diagonal(dim1=-2, dim2=-1).copy_((2 * standard_gamma(halves)).sqrt())
    return factor


def draw_normal(
    precision: Float[Tensor, "*S K K"], score: Float[Tensor, "*S K"]
) -> Float[Tensor, "*S K"]:
    """A draw of N(P^-1 s, P^-1): with P = L L', it is L'^-1 (L^-1 s + e), e standard normal."""
    tril = torch.linalg.cholesky(precision)
    half = torch.linalg.solve_triangular(tril, score.unsqueeze(-1), upper=False)
    half += torch.randn_like(half)
    return torch.linalg.solve_triangular(tril.mT, half, upper=True).squeeze(-1)


def draw_normals_of_one_gram(
    gram: Float[Tensor, "*S K K"],
    prior_precision: Float[Tensor, " K"] | Float[Tensor, "*S K"],
    weight: Float[Tensor, "*S D"],
    prior_weight: Float[Tensor, " D"],
    score: Float[Tensor, "*S D K"],
) -> Float[Tensor, "*S D K"]:
    """Draws of N(P_d^-1 s_d, P_d^-1), P_d = weight_d gram + prior_weight_d diag(prior_precision).

    With B = diag(prior_precision)^1/2 and one eigendecomposition B^-1 gram B^-1 = Q diag(l) Q',
    P_d is B Q diag(weight_d l + prior_weight_d) Q' B.
    """
    root = prior_precision.rsqrt()
    values, vectors = torch.linalg.eigh(root.unsqueeze(-1) * gram * root.unsqueeze(-2))
    half = root.unsqueeze(-1) * vectors  # B^-1 Q
    precision = weight.unsqueeze(-1) * values.unsqueeze(-2) + prior_weight.unsqueeze(-1)
    precision.clamp_min_(prior_weight.min())  # values are positive up to rounding
    root = precision.rsqrt()
    rotated = (score @ half * root + torch.randn_like(score)) * root
    return rotated @ half.mT
