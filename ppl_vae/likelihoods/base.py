"""What decoders' outputs mean: the contract of likelihoods, and what they have in common."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.config import configurable
from ppl_vae.core.program import Density, Program

Outputs = Float[Tensor, "*B O"]
Rows = Float[Tensor, "N D"]
Mask = Bool[Tensor, "*M D"]


class Likelihood(Program):
    """Abstract: maps a decoder's outputs to the density of x given z.

    Outputs are (..., D * ``outputs_per_dim``): those of the first dimension of x beside one
    another, then those of the second, and so on.
    """

    outputs_per_dim: int = 1
    needs_calibration: bool = False
    """Whether there is something to learn from a look at all rows, in :meth:`calibrate`."""
    partial: bool = True
    """Whether cells of a row may be left out, by a mask."""
    counts: bool = False
    """Whether x holds counts, of which an encoder is given log(1 + x)."""
    bounded: bool = False
    """Whether x lies in 0..1, where an encoder's inputs are centred and need no common scale."""

    @configurable
    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self,
        outputs: Outputs,
        x: Rows | None = None,
        mask: Mask | None = None,
        *,
        observe: bool = True,
    ) -> Density:
        """p(x | z), event shape (D,).

        Args:
            outputs: of a decoder.
            x: the rows that belong to them, where there are any; anything in their missing values.
            mask: True where x is observed; only there does the density score it. With more
                dimensions than x it differs from draw to draw.
            observe: whether x is scored; else it only says what the rows are like (their totals).
        """

    @abstractmethod
    def check(self, x: Rows, mask: Mask | None = None) -> None:
        """Check that observed entries of x lie in the support.

        Raises:
            ValueError: if some do not; the message counts them and says what would do.
        """

    def features(self, x: Rows) -> Float[Tensor, "N E"]:
        """What the means of :meth:`outputs_at` are taken of: E / D numbers for each entry of x."""
        return x

    @abstractmethod
    def outputs_at(
        self, means: Float[Tensor, " E"], half: Float[Tensor, " E"]
    ) -> Float[Tensor, " O"]:
        """Outputs at which the mean of the features given z is this.

        A mean on the edge of the support, where there are no such outputs, counts as half an
        entry from it.

        Args:
            means: of the features' observed entries.
            half: half an entry's share in each mean.
        """

    def start(self, x: Rows, mask: Mask | None = None) -> Float[Tensor, " O"]:
        """Outputs at which the mean of x given z is the mean of x's observed entries.

        Raises:
            ValueError: if a column has nothing observed.
        """
        features = self.features(x)
        each = features.shape[1] // x.shape[1]
        observed = None if mask is None else mask.repeat_interleave(each, 1)
        return self.outputs_at(*column_means(features, observed))

    def standardize(self, loc: Float[Tensor, " D"], scale: Float[Tensor, " D"]) -> None:
        """Take outputs to be in units of the columns, (x - loc) / scale, from now on.

        Where outputs are natural parameters, which have no units, nothing changes.

        Args:
            loc, scale: mean and standard deviation of each column.
        """

    def set_data_dim(self, data_dim: int) -> None:
        """Be told D; a VAE does that."""

    @contextmanager
    def calibrate(self) -> Iterator[None]:
        """Runs of a pair on all rows inside tell what is to be known of them."""
        yield

    def unfreeze(self) -> None:
        """Forget what is not to be known in training, as a fit begins."""

    def notes(self) -> list[str]:
        """What a person should know of the fitted likelihood; empty if nothing."""
        return []


def by_cell(cells: Density, mask: Mask | None) -> Density:
    """Independent cells, batch shape (..., D), as the density of rows, missing values left out."""
    return (cells if mask is None else cells.mask(mask)).to_event(1)


def refuse_outside(
    x: Rows, inside: Bool[Tensor, "N D"], mask: Mask | None, support: str, advice: str
) -> None:
    """Refuse observed entries that are not inside the support.

    Raises:
        ValueError: if there are any.
    """
    seen = torch.ones_like(inside) if mask is None else mask
    if num_wrong := int((~inside & seen).sum()):
        low, high = x[seen].min(), x[seen].max()
        raise ValueError(
            f"x has {num_wrong} entries outside {support} (min {low:.2f}, max {high:.2f}); "
            f"{advice}"
        )


def column_means(
    x: Float[Tensor, "N E"], mask: Bool[Tensor, "N E"] | None
) -> tuple[Float[Tensor, " E"], Float[Tensor, " E"]]:
    """The mean of the observed entries of each column, and half an entry's share in it.

    Raises:
        ValueError: if a column has none.
    """
    seen = torch.ones_like(x) if mask is None else mask.to(x)
    number = seen.sum(0)
    if empty := (number == 0).nonzero().flatten().tolist():
        raise ValueError(f"x has columns with nothing observed: {empty[:5]}; drop them")
    return torch.where(seen > 0, x, 0.0).sum(0) / number, 0.5 / number
