"""The interface of likelihoods p(x | z), and what they share."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.core.config import configurable
from ppl_vae.core.program import Density, Program

Outputs = Float[Tensor, "*B O"]
RowTensor = Float[Tensor, "N D"]
Mask = Bool[Tensor, "*M D"]
Means = Float[Tensor, " E"]


@dataclass(frozen=True)
class Support:
    """The support of the entries of x.

    Attributes:
        constraint: the set of values.
        name: its name in error messages.
        advice: a remedy for data with other values.
    """

    constraint: constraints.Constraint
    name: str
    advice: str

    def check(self, x: RowTensor, mask: Mask | None) -> None:
        """Check that observed entries of x lie in the support.

        Raises:
            ValueError: if some do not.
        """
        inside = self.constraint.check(x)
        observed = torch.ones_like(inside) if mask is None else mask
        if num_wrong := int((~inside & observed).sum()):
            low, high = x[observed].min(), x[observed].max()
            raise ValueError(
                f"x has {num_wrong} entries outside {self.name} (min {low:.2f}, max {high:.2f}); "
                f"{self.advice}"
            )


class Likelihood(Program):
    """Abstract: maps the outputs of a decoder to the density of x given z.

    Outputs are (..., D * ``outputs_per_dim``): first those of the first dimension of x, then those
    of the second, and so on. A subclass implements :meth:`density` and :meth:`initial_outputs`;
    everything else has a default.
    """

    outputs_per_dim: int = 1
    """Number of outputs for each dimension of x."""
    supports_mask: bool = True
    """Whether the observed part of a row can be scored, given a mask."""
    counts: bool = False
    """Whether x holds counts, of which an encoder is given log(1 + x)."""
    support: Support | None = None
    """The support of the entries of x; None for all real numbers."""
    bounded: bool = False
    """Whether x lies in 0..1; inputs of an encoder are then centred but not rescaled."""
    has_data_statistics: bool = False
    """Whether :meth:`collect_statistics` computes statistics of the full data set."""

    @configurable
    def __init__(self) -> None:
        super().__init__()

    def forward(
        self,
        outputs: Outputs,
        x: RowTensor | None = None,
        mask: Mask | None = None,
        *,
        observe: bool = True,
    ) -> Density:
        """p(x | z), event shape (D,).

        Args:
            outputs: outputs of a decoder.
            x: the corresponding rows, if there are any; missing values may be anything.
            mask: True where x is observed; the density scores observed entries only. With more
                dimensions than x it differs from draw to draw.
            observe: whether x is scored; otherwise only totals of its rows are used.
        """
        return self.density(outputs, x, mask, observe)

    @abstractmethod
    def density(
        self, outputs: Outputs, x: RowTensor | None, mask: Mask | None, observe: bool
    ) -> Density:
        """p(x | z), as :meth:`forward` returns it."""

    def check(self, x: RowTensor, mask: Mask | None = None) -> None:
        """Check that observed entries of x lie in the support.

        Raises:
            ValueError: if some do not; the message has their number and a remedy.
        """
        if self.support is not None:
            self.support.check(x, mask)

    @abstractmethod
    def initial_outputs(self, means: Means, half_weight: Means) -> Float[Tensor, " O"]:
        """Outputs at which the mean of the features given z equals ``means``.

        No such outputs exist for a mean on the boundary of the support; it is moved inside by
        the weight of half an entry.

        Args:
            means: means of the observed entries of the features, see :meth:`features`.
            half_weight: 1 / (2 N_e), with N_e the number of these entries.
        """

    def features(self, x: RowTensor) -> Float[Tensor, "N E"]:
        """Features whose means determine :meth:`initial_outputs`, E / D for each entry of x."""
        return x

    def set_data_dim(self, data_dim: int) -> None:
        """Set the data dimension D (called by the model)."""

    def standardize(self, loc: Float[Tensor, " D"], scale: Float[Tensor, " D"]) -> None:
        """Interpret outputs in units of the columns, (x - loc) / scale, from now on.

        Natural parameters have no units; nothing changes then.

        Args:
            loc, scale: mean and standard deviation of each column.
        """

    @contextmanager
    def collect_statistics(self) -> Iterator[None]:
        """Context manager: accumulate statistics of the rows scored inside."""
        yield

    def notes(self) -> list[str]:
        """Caveats on the numbers that the fitted likelihood gives; empty if there are none."""
        return []


def row_density(entries: Density, mask: Mask | None) -> Density:
    """The density of rows of independent entries, batch shape (..., D), without missing ones."""
    return (entries if mask is None else entries.mask(mask)).to_event(1)
