"""The lasso of all data at once, under a dictionary of unit columns, by coordinate descent."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.networks.sparse_layers import NormalizedColumns

LOOK = 10
"""So many sweeps between looks at how far the codes still are from the best."""


def why_no_lasso(autoencoder: Autoencoder) -> str:
    """Why the best codes under a model are not this lasso's, or an empty string if they are."""
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
    """The decoder's one layer; of a deeper one the decoder itself."""
    decoder: Any = autoencoder.decoder
    single = isinstance(decoder, torch.nn.Sequential) and len(decoder) == 1
    return decoder[0] if single else decoder


class Lasso:
    """|x_n - W z_n - b|^2 / 2 + t |z_n|_1 for all rows x_n, in float64.

    Given the others the best z_nk is S_t(w_k'(x_n - b - W z_n) + z_nk) where w_k has length one,
    S_t(a) = sign(a) max(|a| - t, 0). Minus log p(x_n, z_n) is this over sigma^2, and a constant,
    with t = lambda sigma^2.

    Args:
        columns: W, each of length one.
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
        self.towards = columns.T @ (x - bias).T
        self.threshold = threshold

    @classmethod
    def of(cls, autoencoder: Autoencoder, x: Float[Tensor, "N D"]) -> "Lasso":
        """That of a model's best codes, where :func:`why_no_lasso` has nothing to say."""
        layer: Any = linear_layer(autoencoder)
        likelihood: Any = autoencoder.likelihood
        weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
        return cls(weight, bias, x.double(), autoencoder.penalty * likelihood.scale**2)

    def sweep(self, codes: Float[Tensor, "K N"]) -> None:
        """Each code of each datum in turn made the best given the others, in place."""
        for k in range(len(codes)):
            pull = torch.addmv(self.towards[k] + codes[k], codes.T, self.gram[k], alpha=-1)
            codes[k] = F.softshrink(pull, self.threshold)

    def left(self, codes: Float[Tensor, "K N"]) -> Float[Tensor, " N"]:
        """The longest step that one code of a datum would still take, alone."""
        alone = F.softshrink(self.towards - self.gram @ codes + codes, self.threshold)
        return (alone - codes).abs().amax(0)

    def solve(self, codes: Float[Tensor, "K N"], tolerance: float, most: int) -> int:
        """Sweeps until no step longer than this is left; returns how many there were."""
        for done in range(1, most + 1):
            self.sweep(codes)
            if done % LOOK == 0 and bool((self.left(codes) <= tolerance).all()):
                return done
        return most
