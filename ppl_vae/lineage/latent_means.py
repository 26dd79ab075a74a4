"""Latent means of a pair with two latent dimensions, for a figure."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result


@dataclass(frozen=True)
class LatentMeans(Result):
    """Means of q(z | x) of a pair with two latent dimensions.

    Attributes:
        means: (N, 2), in standard deviations of the prior.
        labels: the class of each datum, or None.
        label: the name of the class variable.
        remark: a remark on the pair.
    """

    means: Float[Tensor, "N 2"]
    labels: tuple[Any, ...] | None
    label: str
    remark: str
