"""Images cut into patches, and patches that are hidden: what masked autoencoders are made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.core.program import Density
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import check_int
from ppl_vae.networks.mlp_conv import as_image_shape


@dataclass(frozen=True)
class Patches:
    """The grid of patches that images, which are flat rows, are cut into.

    Patches are numbered along the image's rows; a patch holds its entries channel by channel,
    and each channel row by row.

    Attributes:
        image_shape: (C, H, W); a row has D = C H W entries.
        patch: height and width of a patch, in pixels; one number is both.

    Raises:
        ValueError: if the image is no whole number of patches high and wide.
    """

    image_shape: Sequence[int]
    patch: int | Sequence[int]

    def __post_init__(self) -> None:
        shape, sides = as_image_shape(self.image_shape), _as_sides(self.patch)
        if shape[1] % sides[0] or shape[2] % sides[1]:
            raise ValueError(
                f"image_shape must be a whole number of patches high and wide; {shape[1]} x "
                f"{shape[2]} pixels are none of {sides[0]} x {sides[1]}. Take another patch, or "
                "pad the images"
            )
        # Lists and tuples are the same, so that what was saved equals what was made.
        object.__setattr__(self, "image_shape", shape)
        object.__setattr__(self, "patch", sides)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return _as_sides(self.patch)

    @property
    def grid(self) -> tuple[int, int]:
        """How many patches an image is high and wide."""
        (_, height, width), (high, wide) = self.image_shape, self.sides
        return height // high, width // wide

    @property
    def number(self) -> int:
        """P, the patches of an image."""
        return math.prod(self.grid)

    @property
    def width(self) -> int:
        """The entries of a patch, D / P."""
        return self.image_shape[0] * math.prod(self.sides)

    @property
    def data_dim(self) -> int:
        """D."""
        return math.prod(self.image_shape)

    def cut(self, rows: Shaped[Tensor, "*B D"]) -> Shaped[Tensor, "*B P E"]:
        """The patches of images, each a flat row."""
        (down, across), (high, wide) = self.grid, self.sides
        shape = (self.image_shape[0], down, high, across, wide)
        images = rows.unflatten(-1, shape).movedim((-4, -2), (-5, -4))
        return images.flatten(-3).flatten(-3, -2)

    def join(
        self, patches: Shaped[Tensor, "*B P F"], outputs_per_dim: int = 1
    ) -> Shaped[Tensor, "*B O"]:
        """The images that patches were cut from, as flat rows.

        Args:
            patches: with ``outputs_per_dim`` numbers beside one another for each entry.
            outputs_per_dim: these stay beside one another in the rows.
        """
        shape = (self.image_shape[0], *self.sides, outputs_per_dim)
        parts = patches.unflatten(-1, shape).unflatten(-5, self.grid)
        return parts.movedim((-6, -5), (-5, -3)).flatten(-6)

    def cells(self, marks: Shaped[Tensor, "*B P"]) -> Shaped[Tensor, "*B D"]:
        """For each entry of an image the mark of its patch."""
        return self.join(marks.unsqueeze(-1).expand(*marks.shape, self.width))

    def whole(self, seen: Bool[Tensor, "*B D"]) -> Bool[Tensor, "*B P"]:
        """Which patches have all of their entries seen."""
        return self.cut(seen).all(-1)


def _as_sides(patch: int | Sequence[int]) -> tuple[int, int]:
    sides = patch if isinstance(patch, Sequence) else (patch, patch)
    if len(sides) != 2:
        raise ValueError(f"patch must be a side in pixels, or (height, width); got {patch!r}")
    high, wide = (check_int("patch", side) for side in sides)
    return high, wide


@dataclass(frozen=True)
class HiddenPatches(Patches):
    """A share of each image's patches, hidden from the guide and scored by the model.

    Which they are is a site ``"hidden"`` of both programs, in the plate ``"data"``: a row of P
    numbers, 1 where hidden, drawn anew for every datum at every run, in training or not. All
    sets of so many patches are equally probable, with log p = -log(P over H) in either program,
    so it leaves log weights as they are.

    Attributes:
        image_shape: (C, H, W).
        patch: height and width of a patch, in pixels; one number is both.
        share: of the patches that are hidden, rounded to a whole number of them.

    Raises:
        ValueError: if the image is no whole number of patches high and wide, or if none or all
            of them would be hidden.

    References:
        He, Chen, Xie, Li, Dollar, Girshick: Masked autoencoders are scalable vision learners
        (2022).
    """

    share: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.num_hidden < self.number:
            raise ValueError(
                f"share must hide some patches and leave some; share={self.share} hides "
                f"{self.num_hidden} of {self.number}"
            )

    @property
    def num_hidden(self) -> int:
        """H, the patches that are hidden from an image."""
        return round(self.share * self.number)

    @property
    def num_seen(self) -> int:
        """The patches that are left, P - H."""
        return self.number - self.num_hidden

    def subsets(self, like: Tensor) -> Density:
        """The distribution of the site ``"hidden"``, of this tensor's dtype and device."""
        return Subsets(self.number, self.num_hidden, like)

    def visible(self, num_rows: int, *, seed: int | None = None) -> Bool[Tensor, "N D"]:
        """Draws of what is left of images, as masks: True for entries that are not hidden."""
        with seeded(seed):
            hidden = self.subsets(torch.empty(0)).sample(torch.Size([num_rows]))
        return ~self.cells(hidden.bool())


class Subsets(TorchDistribution):
    """Uniform over the subsets of H of P things, as rows of ones (in it) and zeros.

    Args:
        number: P.
        size: H.
        like: a tensor of the dtype and device of the draws.
        batch_shape: of independent subsets.
    """

    arg_constraints: ClassVar[Any] = {}
    support: Any = constraints.independent(constraints.boolean, 1)
    has_rsample = True
    """There are no parameters, and so no gradient that a draw could lose."""

    def __init__(
        self,
        number: int,
        size: int,
        like: Tensor,
        batch_shape: Sequence[int] = (),
        validate_args: bool | None = None,
    ) -> None:
        self.number, self.size = number, size
        self._like = like.new_zeros(())
        shapes = torch.Size(batch_shape), torch.Size([number])
        super().__init__(*shapes, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same for a larger batch."""
        how = {"validate_args": self._validate_args}
        return type(self)(self.number, self.size, self._like, batch_shape, **how)

    def log_prob(self, value: Shaped[Tensor, "*A P"]) -> Float[Tensor, "*B"]:
        """-log(P over H) for H ones, -inf for another number of them, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        inside = value.sum(-1).expand(self._batch_of(value)) == self.size
        known = self._like - math.log(math.comb(self.number, self.size))
        return torch.where(inside, known, -torch.inf)

    def _batch_of(self, value: Tensor) -> torch.Size:
        return torch.broadcast_shapes(value.shape[:-1], self.batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Float[Tensor, "*B P"]:
        """Draws: the first H of a random order."""
        shape = self._extended_shape(sample_shape)
        order = torch.rand(shape, dtype=self._like.dtype, device=self._like.device).argsort(-1)
        return (order < self.size).to(self._like.dtype)
