"""Rows of data to be drawn beside one another: originals, reconstructions, samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result


@dataclass(frozen=True)
class ImageGrid(Result):
    """Rows of data to be drawn beside one another, as images or as profiles over the columns.

    Attributes:
        values: (R, C, D), in the data's units; NaN in missing values.
        down: what each of the R rows of tiles is.
        across: what each of the C columns of tiles is.
        image_shape: height and width, if a datum is an image.
        loc, scale: mean and standard deviation of each column over the training rows, (D,).
        limits: smallest and largest entry of the training rows.
    """

    values: Float[Tensor, "R C D"]
    down: tuple[str, ...]
    across: tuple[str, ...]
    image_shape: tuple[int, int] | None
    loc: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]
    limits: tuple[float, float]

    @property
    def holed(self) -> bool:
        """Whether something is missing in a row that is drawn."""
        return bool(self.values.isnan().any())

    @classmethod
    def of(
        cls,
        values: Float[Tensor, "R C D"],
        down: Sequence[str],
        across: Sequence[str],
        train: Float[Tensor, "N D"],
        image_shape: tuple[int, int] | None,
    ) -> Self:
        """Tiles beside the training rows that give them their scale."""
        train = train.double()
        loc = train.nanmean(0)
        scale = (train - loc).square().nanmean(0).sqrt()
        return cls(
            values=values.double(),
            down=tuple(down),
            across=tuple(across),
            image_shape=image_shape,
            loc=loc,
            scale=torch.where(scale > 0, scale, torch.ones_like(scale)),
            limits=(float(np.nanmin(train)), float(np.nanmax(train))),
        )
