"""Draws of gamma variables and of Wishart matrices."""

import torch
from jaxtyping import Float
from torch import Tensor


def standard_gamma(shape: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Gamma(shape, 1), without the checks of the distribution's class."""
    return torch._standard_gamma(shape)  # pyright: ignore[reportPrivateImportUsage]


def bartlett_factor(freedom: Float[Tensor, "*S"], size: int) -> Float[Tensor, "*S K K"]:
    """A lower triangular T with T T' ~ Wishart(freedom, I), freedom > K - 1.

    T_ii^2 is chi-squared with freedom - i degrees of freedom, i = 0, ..., K - 1, and elements
    below the diagonal are standard normal (Bartlett 1933).
    """
    degrees = freedom.unsqueeze(-1) - torch.arange(
        size, dtype=freedom.dtype, device=freedom.device
    )
    diagonal = (2 * standard_gamma(degrees / 2)).sqrt()
    below = torch.randn(*freedom.shape, size, size, dtype=freedom.dtype, device=freedom.device)
    return below.tril(-1) + torch.diag_embed(diagonal)
