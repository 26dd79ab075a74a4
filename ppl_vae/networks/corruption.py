"""Corruption of the inputs of an encoder, as in denoising autoencoders.

Draws use torch's generator, so that a seed reproduces them. Any callable of rows that keeps their
shape can be used instead.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class GaussianNoise:
    """x + scale * eps with a new eps ~ N(0, I) at every call.

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
        """Rows with added noise."""
        return x + self.scale * torch.randn_like(x)


@dataclass(frozen=True)
class MaskingNoise:
    """Replaces each entry of x by ``value`` with probability ``share``, independently per call.

    Attributes:
        share: probability of replacement, in (0, 1).
        value: the replacement.

    Raises:
        ValueError: if share is not between 0 and 1.
    """

    share: float
    value: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1; got {self.share}")

    def __call__(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Rows with some entries replaced."""
        return torch.where(torch.rand_like(x) < self.share, self.value, x)


CORRUPTIONS: dict[str, type[GaussianNoise | MaskingNoise]] = {
    corruption.__name__: corruption for corruption in (GaussianNoise, MaskingNoise)
}
"""The corruptions by name, for saving and loading."""
