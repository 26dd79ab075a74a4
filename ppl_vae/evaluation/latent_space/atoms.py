"""The atoms of a dictionary, ordered by how much codes use them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.text import counted
from ppl_vae.core.validation import ArrayLike
from ppl_vae.inference.sparse.lasso import linear_layer
from ppl_vae.inference.sparse.map_codes import best_codes
from ppl_vae.models.autoencoder import Autoencoder

PRINTED_ATOMS = 5


@dataclass(frozen=True, repr=False)
class Atoms(Result):
    """The atoms of a dictionary, the most used first.

    Attributes:
        atoms: (K, D), the columns of W, each with the sign that makes the sum of its codes
            positive.
        mean_abs: the mean of |z_k| over the data, (K,), in units of x if atoms have length one.
        usage: the share of data whose z_k is not zero, (K,).
        index: the dimension of z that each atom belongs to, (K,).
    """

    atoms: Float[Tensor, "K D"]
    mean_abs: Float[Tensor, " K"]
    usage: Float[Tensor, " K"]
    index: Int[Tensor, " K"]

    def __repr__(self) -> str:
        number, width = self.atoms.shape
        shares = ", ".join(f"{float(share):.0%}" for share in self.usage[:PRINTED_ATOMS])
        return (
            f"{counted(number, 'atom')} of {counted(width, 'entry')}: "
            f"{float(self.usage.sum()):.1f} used per datum, {int((self.usage == 0).sum())} never "
            "used\n"
            f"  the most used atoms occur in {shares} of the data"
        )


@torch.no_grad()
def atoms(autoencoder: Autoencoder, x: ArrayLike, *, tolerance: float = 1e-3) -> Atoms:
    """Order the columns of a linear decoder by how much the MAP codes of the data use them.

    Args:
        autoencoder: an autoencoder whose decoder is one linear layer.
        x: (N, D); NaN marks a missing value.
        tolerance: the tolerance of :func:`ppl_vae.inference.best_codes`.

    Raises:
        ValueError: if the decoder is not one linear layer, or the data are invalid.
    """
    layer = linear_layer(autoencoder)
    weight = getattr(layer, "weight", None)
    if weight is None or weight.shape != (autoencoder.data_dim, autoencoder.latent_dim):
        raise ValueError(
            "only a decoder of one linear layer, such as Autoencoder.linear makes, has atoms; "
            f"this one is {layer}"
        )
    codes = best_codes(autoencoder, x, tolerance=tolerance).codes
    mean_abs, index = codes.abs().mean(0).sort(descending=True, stable=True)
    signs = torch.where(codes.sum(0) < 0, -1.0, 1.0).to(weight)
    usage = (codes != 0).to(codes).mean(0)[index]
    return Atoms((weight * signs).T[index].cpu(), mean_abs.cpu(), usage.cpu(), index.cpu())
