"""Patches of images, and random masks of patches, for masked autoencoders."""

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
    """The grid of patches of images that are flat rows.

    Patches are numbered along the rows of the image; the entries of a patch are ordered by
    channel, then by row.

    Attributes:
        image_shape: (C, H, W); a row has D = C H W entries.
        patch: height and width of a patch, in pixels; one number for squares.

    Raises:
        ValueError: if patches do not tile the image.
    """

    image_shape: Sequence[int]
    patch: int | Sequence[int]

    def __post_init__(self) -> None:
        shape, sides = as_image_shape(self.image_shape), _as_sides(self.patch)
        if shape[1] % sides[0] or shape[2] % sides[1]:
            raise ValueError(
                f"patches must tile the image; {shape[1]} x {shape[2]} pixels are not a multiple "
                f"of {sides[0]} x {sides[1]}. Use another patch size, or pad the images"
            )
        # Lists become tuples, so that a loaded object equals the saved one.
        object.__setattr__(self, "image_shape", shape)
        object.__setattr__(self, "patch", sides)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return _as_sides(self.patch)

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of patches along the height and the width of an image."""
        (_, height, width), sides = self.image_shape, self.sides
        return height // sides[0], width // sides[1]

    @property
    def num_patches(self) -> int:
        """P, the number of patches of an image."""
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """The number of entries of a patch, D / P."""
        return self.image_shape[0] * math.prod(self.sides)

    @property
    def data_dim(self) -> int:
        """D, the number of entries of an image."""
        return math.prod(self.image_shape)

    def cut(self, rows: Shaped[Tensor, "*B D"]) -> Shaped[Tensor, "*B P E"]:
        """Split images into patches, each a flat row."""
        (rows_of_patches, columns_of_patches), sides = self.grid, self.sides
        shape = (self.image_shape[0], rows_of_patches, sides[0], columns_of_patches, sides[1])
        images = rows.unflatten(-1, shape).movedim((-4, -2), (-5, -4))
        return images.flatten(-3).flatten(-3, -2)

    def join(
        self, patches: Shaped[Tensor, "*B P F"], outputs_per_dim: int = 1
    ) -> Shaped[Tensor, "*B O"]:
        """Join patches to images, as flat rows; the inverse of :meth:`cut`.

        Args:
            patches: with ``outputs_per_dim`` adjacent numbers for each entry.
            outputs_per_dim: number of outputs per entry, which stay adjacent in the rows.
        """
        shape = (self.image_shape[0], *self.sides, outputs_per_dim)
        parts = patches.unflatten(-1, shape).unflatten(-5, self.grid)
        return parts.movedim((-6, -5), (-5, -3)).flatten(-6)

    def to_entries(self, values: Shaped[Tensor, "*B P"]) -> Shaped[Tensor, "*B D"]:
        """Broadcast one value per patch to the entries of the images."""
        return self.join(values.unsqueeze(-1).expand(*values.shape, self.patch_dim))

    def fully_observed(self, observed: Bool[Tensor, "*B D"]) -> Bool[Tensor, "*B P"]:
        """Which patches have no missing entries."""
        return self.cut(observed).all(-1)


def _as_sides(patch: int | Sequence[int]) -> tuple[int, int]:
    sides = patch if isinstance(patch, Sequence) else (patch, patch)
    if len(sides) != 2:
        raise ValueError(f"patch must be a side in pixels, or (height, width); got {patch!r}")
    height, width = (check_int("patch", side) for side in sides)
    return height, width


@dataclass(frozen=True)
class HiddenPatches(Patches):
    """A random share of each image's patches, hidden from the guide and scored by the model.

    The set of hidden patches is a site ``"hidden"`` of both programs, in the plate ``"data"``: a
    row of P numbers, 1 where hidden, drawn for every datum in every run, in training and
    evaluation. All sets of H patches have the same probability, with log p = -log(P over H) in
    both programs, so that log weights do not depend on it.

    Attributes:
        image_shape: (C, H, W).
        patch: height and width of a patch, in pixels; one number for squares.
        share: share of the patches that are hidden, rounded to a whole number of them.

    Raises:
        ValueError: if patches do not tile the image, or if none or all would be hidden.

    References:
        He, Chen, Xie, Li, Dollar, Girshick: Masked autoencoders are scalable vision learners
        (2022).
    """

    share: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.num_hidden < self.num_patches:
            raise ValueError(
                f"share must hide some but not all patches; share={self.share} hides "
                f"{self.num_hidden} of {self.num_patches}"
            )

    @property
    def num_hidden(self) -> int:
        """H, the number of hidden patches of an image."""
        return round(self.share * self.num_patches)

    @property
    def num_visible(self) -> int:
        """P - H, the number of visible patches of an image."""
        return self.num_patches - self.num_hidden

    def subsets(self, like: Tensor) -> Density:
        """The distribution of the site ``"hidden"``, in the dtype and on the device of
        ``like``."""
        return UniformSubsets(self.num_patches, self.num_hidden, like)

    def visible(self, num_rows: int, *, seed: int | None = None) -> Bool[Tensor, "N D"]:
        """Draw masks of the visible entries of images."""
        with seeded(seed):
            hidden = self.subsets(torch.empty(0)).sample(torch.Size([num_rows]))
        return ~self.to_entries(hidden.bool())


class UniformSubsets(TorchDistribution):
    """Uniform distribution over subsets of H of P elements, as indicator vectors.

    Args:
        number: P.
        size: H.
        like: a tensor with the dtype and device of the draws.
        batch_shape: batch shape of independent subsets.
    """

    arg_constraints: ClassVar[Any] = {}
    support: Any = constraints.independent(constraints.boolean, 1)
    has_rsample = True
    """True, since without parameters draws lose no gradient."""

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
        """The same distribution with a larger batch shape."""
        return type(self)(
            self.number,
            self.size,
            self._like,
            batch_shape,
            validate_args=self._validate_args,
        )

    def log_prob(self, value: Shaped[Tensor, "*A P"]) -> Float[Tensor, "*B"]:
        """-log(P over H) for vectors with H ones, -inf for others, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        inside = value.sum(-1).expand(self._batch_of(value)) == self.size
        log_p = self._like - math.log(math.comb(self.number, self.size))
        return torch.where(inside, log_p, -torch.inf)

    def _batch_of(self, value: Tensor) -> torch.Size:
        return torch.broadcast_shapes(value.shape[:-1], self.batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Float[Tensor, "*B P"]:
        """Draws: the first H elements of random permutations."""
        shape = self._extended_shape(sample_shape)
        order = torch.rand(shape, dtype=self._like.dtype, device=self._like.device).argsort(-1)
        return (order < self.size).to(self._like.dtype)
