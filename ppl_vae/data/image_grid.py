"""Grids of rows of data that are drawn together, such as originals above reconstructions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result


@dataclass(frozen=True)
class ImageGrid(Result):
    """A grid of rows of data, drawn as images or as cells of a table.

    Attributes:
        values: (R, C, D), in the units of the data; NaN marks a missing value.
        row_labels: labels of the R rows of the grid.
        column_labels: labels of its C columns.
        image_shape: height and width, if rows of data are images.
        loc, scale: mean and standard deviation of each column over the training rows, (D,).
        limits: smallest and largest entry of the training rows, the range of the grey values.
        names: the names of the columns of the data, (D,); numbers from 1 if there are none.
    """

    values: Float[Tensor, "R C D"]
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    image_shape: tuple[int, int] | None
    loc: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]
    limits: tuple[float, float]
    names: tuple[str, ...]

    @property
    def has_missing(self) -> bool:
        """Whether a value is missing in the grid."""
        return bool(self.values.isnan().any())

    @classmethod
    def of(
        cls,
        values: Float[Tensor, "R C D"],
        row_labels: Sequence[str],
        column_labels: Sequence[str],
        train: Float[Tensor, "N D"],
        image_shape: tuple[int, int] | None,
        names: Sequence[str] | None = None,
    ) -> Self:
        """The grid of these values, with the scales of the columns taken from training rows.

        Args:
            values: (R, C, D), in the units of the data.
            row_labels, column_labels: labels of the rows and columns of the grid.
            train: the training rows, (N, D).
            image_shape: height and width, if rows of data are images.
            names: the names of the columns of the data.
        """
        numbers = tuple(str(k + 1) for k in range(train.shape[1]))
        train = train.double()
        loc = train.nanmean(0)
        scale = (train - loc).square().nanmean(0).sqrt()
        observed = train[~train.isnan()]
        return cls(
            values=values.double(),
            row_labels=tuple(row_labels),
            column_labels=tuple(column_labels),
            image_shape=image_shape,
            loc=loc,
            scale=torch.where(scale > 0, scale, torch.ones_like(scale)),
            limits=(float(observed.min()), float(observed.max())),
            names=numbers if names is None else tuple(names),
        )
