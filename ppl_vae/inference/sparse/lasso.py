"""The lasso for all rows at once, with a dictionary of unit columns, by coordinate descent."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.networks.sparse_layers import NormalizedColumns

CHECK_INTERVAL = 10
"""The number of iterations between two checks of convergence."""


def lasso_mismatch(autoencoder: Autoencoder) -> str:
    """Why the best codes of an autoencoder are no lasso solution; an empty string if they are."""
    layer, likelihood = linear_layer(autoencoder), autoencoder.likelihood
    if not isinstance(layer, NormalizedColumns) or layer.kind != "unit":
        return (
            "the decoder must be one linear layer with unit columns, as "
            f"Autoencoder.linear(..., columns='unit') makes; it is {layer}"
        )
    if autoencoder.prior_kind != "laplace":
        return f"prior must be 'laplace' for sparse codes; it is {autoencoder.prior_kind!r}"
    if not isinstance(likelihood, Gaussian) or likelihood.kind != "fixed":
        kind = getattr(likelihood, "kind", type(likelihood).__name__)
        return (
            f"likelihood must be a Gaussian of fixed scale, such as Gaussian(0.1); got {kind!r}. "
            "fit_svi takes others"
        )
    return ""


def linear_layer(autoencoder: Autoencoder) -> Any:
    """The layer of a decoder with one layer; a deeper decoder is returned whole."""
    decoder: Any = autoencoder.decoder
    single = isinstance(decoder, torch.nn.Sequential) and len(decoder) == 1
    return decoder[0] if single else decoder


class Lasso:
    """Minimize |x_n - W z_n - b|^2 / 2 + t |z_n|_1 for all rows x_n, in float64.

    Given the other codes, and w_k of length one, the optimal z_nk is
    S_t(w_k'(x_n - b - W z_n) + z_nk), S_t(a) = sign(a) max(|a| - t, 0). Up to a constant,
    -log p(x_n, z_n) is this objective divided by sigma^2, with t = lambda sigma^2.

    Args:
        columns: W, each column of length one.
        bias: b.
        x: the rows.
        threshold: t.

    References:
        Friedman, Hastie, Hoefling, Tibshirani: Pathwise coordinate optimization (2007).
    """

    def __init__(
        self,
        columns: Float[Tensor, "D K"],
        bias: Float[Tensor, " D"],
        x: Float[Tensor, "N D"],
        threshold: float,
    ) -> None:
        self.gram = columns.T @ columns
        self.correlations = columns.T @ (x - bias).T
        self.threshold = threshold

    @classmethod
    def of(cls, autoencoder: Autoencoder, x: Float[Tensor, "N D"]) -> "Lasso":
        """The lasso of an autoencoder's best codes; :func:`lasso_mismatch` must be empty."""
        layer: Any = linear_layer(autoencoder)
        likelihood: Any = autoencoder.likelihood
        weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
        return cls(weight, bias, x.double(), autoencoder.penalty * likelihood.scale**2)

    def sweep(self, codes: Float[Tensor, "K N"]) -> None:
        """Set each code of each datum in turn to its optimum given the others, in place."""
        for k in range(len(codes)):
            target = torch.addmv(self.correlations[k] + codes[k], codes.T, self.gram[k], alpha=-1)
            codes[k] = F.softshrink(target, self.threshold)

    def largest_step(self, codes: Float[Tensor, "K N"]) -> Float[Tensor, " N"]:
        """The largest change of one code of each datum to its optimum given the others."""
        optimum = F.softshrink(self.correlations - self.gram @ codes + codes, self.threshold)
        return (optimum - codes).abs().amax(0)

    def solve(self, codes: Float[Tensor, "K N"], tolerance: float, max_sweeps: int) -> int:
        """Sweep until the largest step is at most ``tolerance``; returns the number of sweeps."""
        for sweeps in range(1, max_sweeps + 1):
            self.sweep(codes)
            check = sweeps % CHECK_INTERVAL == 0
            if check and bool((self.largest_step(codes) <= tolerance).all()):
                return sweeps
        return max_sweeps
