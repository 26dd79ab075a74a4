"""The atoms of a dictionary, and how much each of them is used."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.validation import ArrayLike
from ppl_vae.inference.sparse.lasso import linear_layer
from ppl_vae.inference.sparse.map_codes import best_codes
from ppl_vae.models.autoencoder import Autoencoder

SHOWN = 5


@dataclass(frozen=True, repr=False)
class Atoms(Result):
    """The atoms of a dictionary, the most used first.

    Attributes:
        atoms: (K, D), the columns of W; of each the sign in which its codes' sum is positive.
        use: the mean of |z_k| over the data, (K,), in units of x where atoms have length one.
        share: the share of data whose z_k is not zero, (K,).
        index: which dimension of z each is, (K,).
    """

    atoms: Float[Tensor, "K D"]
    use: Float[Tensor, " K"]
    share: Float[Tensor, " K"]
    index: Int[Tensor, " K"]

    def __repr__(self) -> str:
        number, width = self.atoms.shape
        shares = ", ".join(f"{float(share):.0%}" for share in self.share[:SHOWN])
        return (
            f"{number} atoms of {width} entries; a datum uses {float(self.share.sum()):.1f} of "
            f"them, {int((self.share == 0).sum())} are used by none\n"
            f"  the most used stand in {shares} of the data"
        )


@torch.no_grad()
def atoms(autoencoder: Autoencoder, x: ArrayLike, *, tolerance: float = 1e-3) -> Atoms:
    """Look at a linear decoder's columns by how much the best codes of data use them.

    Args:
        autoencoder: with a decoder of one linear layer.
        x: (N, D); NaN marks a missing value.
        tolerance: of :func:`ppl_vae.best_codes`.

    Raises:
        ValueError: if the decoder is not one linear layer; bad data.
    """
    layer = linear_layer(autoencoder)
    weight = getattr(layer, "weight", None)
    if weight is None or weight.shape != (autoencoder.data_dim, autoencoder.latent_dim):
        raise ValueError(
            "only a decoder of one linear layer, such as Autoencoder.linear makes, has atoms; "
            f"this one is {layer}"
        )
    codes = best_codes(autoencoder, x, tolerance=tolerance).codes
    use, index = codes.abs().mean(0).sort(descending=True, stable=True)
    signs = torch.where(codes.sum(0) < 0, -1.0, 1.0).to(weight)
    share = (codes != 0).to(codes).mean(0)[index]
    return Atoms((weight * signs).T[index].cpu(), use.cpu(), share.cpu(), index.cpu())
