"""Grey values as binary or continuous data: binarization and dequantization."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.validation import ArrayLike, as_matrix, check_int
from ppl_vae.data.units import Units


def binarize(x: ArrayLike, generator: torch.Generator | None = None) -> Float[Tensor, "N D"]:
    """Stochastic binarization: each entry is drawn from a Bernoulli with that probability.

    Applied once, it makes a fixed binary data set of grey images; ``fit_svi(...,
    epoch_transform=binarize)`` draws a new one in each epoch.

    Args:
        x: (N, D), in 0..1; NaN stays NaN.
        generator: generator of the draws, on the device of x; by default the global one.

    Raises:
        ValueError: if x has entries outside 0..1.
    """
    x = as_matrix(x)
    missing = x.isnan()
    if num_wrong := int((~missing & ((x < 0) | (x > 1))).sum()):
        raise ValueError(
            f"x has {num_wrong} entries outside 0..1, which are not probabilities; divide by the "
            "largest grey value"
        )
    draws = torch.bernoulli(x.nan_to_num(), generator=generator)
    return torch.where(missing, x, draws)


@dataclass(frozen=True)
class Dequantization:
    """Uniform dequantization: discrete grey values made continuous by noise, scaled to 0..1.

        y = (x + step u) / (levels step),  u ~ Uniform(0, 1) for each entry,

    so y = (255 x + u) / 256 for 8-bit pixels given as k / 255, and (k + u) / 256 for ``step=1``.
    The likelihood of a density model of discrete values is unbounded; that of y is not. log p(y)
    plus :meth:`log_jacobian` is log p in the units of x. In units of one grey level (add D log
    step), its average over u is a lower bound on the log probability of the levels.

    Attributes:
        levels: number of grey values.
        step: difference between neighbouring grey values in x.

    References:
        Theis, van den Oord, Bethge: A note on the evaluation of generative models (2016).
    """

    levels: int = 256
    step: float = 1 / 255

    def __post_init__(self) -> None:
        check_int("levels", self.levels, 2)
        if not self.step > 0:
            raise ValueError(f"step must be positive; got {self.step}")

    def apply(
        self, x: ArrayLike, generator: torch.Generator | None = None
    ) -> Float[Tensor, "N D"]:
        """y, with noise from this generator (by default the global one); NaN stays NaN.

        Raises:
            ValueError: if x has other values than the grey values 0, step .. (levels - 1) step.
        """
        x = as_matrix(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        level = (x / self.step).round()
        off = (x / self.step - level).abs() > 1e-3
        wrong = off | (level < 0) | (level >= self.levels)
        if num_wrong := int(wrong.sum()):
            raise ValueError(
                f"x has {num_wrong} entries that are not among the {self.levels} grey values "
                f"0..{(self.levels - 1) * self.step:g} in steps of {self.step:g}; give the "
                "levels= and step= of x"
            )
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        # Midpoints of a grid of this many cells, so that rounding cannot reach the next level.
        cells = 2.0 ** math.floor(-math.log2(4 * self.levels * torch.finfo(x.dtype).eps))
        return (level + ((noise * cells).floor() + 0.5) / cells) / self.levels

    def undo(self, y: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The grey values below y, in the units of x; values outside 0..1 are extrapolated."""
        return (y * self.levels).floor() * self.step

    def log_jacobian(self, x: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """The term that converts log densities of y to those of x, in nats per datum.

        It counts the observed entries of each row; the values of x do not matter.
        """
        scale = torch.tensor(self.levels * self.step, dtype=torch.float64)
        return Units(torch.zeros_like(x[0]), scale).log_jacobian(x)
