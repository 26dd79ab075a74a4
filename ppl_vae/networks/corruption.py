"""What is done to data before an encoder sees them: noise that a model must see through.

Draws are torch's, so that a seed repeats them. Any callable of rows that keeps their shape will
do in the place of these.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class GaussianNoise:
    """x + scale * eps, eps ~ N(0, I), drawn anew at every call.

    Attributes:
        scale: standard deviation, in the units of x.

    Raises:
        ValueError: if scale is not positive.
    """

    scale: float

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, in the units of x; got {self.scale}")

    def __call__(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Rows with noise on them."""
        return x + self.scale * torch.randn_like(x)


@dataclass(frozen=True)
class MaskingNoise:
    """Each cell of x is replaced, with probability ``share``, by ``value``; anew at every call.

    Attributes:
        share: of the cells, in (0, 1).
        value: what stands in their place.

    Raises:
        ValueError: if share is not between 0 and 1.
    """

    share: float
    value: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1; got {self.share}")

    def __call__(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Rows some cells of which are replaced."""
        return torch.where(torch.rand_like(x) < self.share, self.value, x)


CORRUPTIONS: dict[str, type[GaussianNoise | MaskingNoise]] = {
    kind.__name__: kind for kind in (GaussianNoise, MaskingNoise)
}
