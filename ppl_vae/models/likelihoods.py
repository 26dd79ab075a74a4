"""Decoders as densities: p(x | z) from a decoder's outputs, constants always kept."""

from abc import abstractmethod
from typing import Any, cast

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.arguments import choose_option
from ppl_vae.program import Density, Program


class Likelihood(Program):
    """Abstract: maps a decoder's outputs to the distribution of x given z.

    Its call takes outputs of shape (..., D * outputs_per_dim) and returns a Pyro distribution of
    batch shape (..., D) (the model makes the last dimension an event).
    """

    outputs_per_dim: int = 1

    @abstractmethod
    def forward(self, outputs: Float[Tensor, "*B O"]) -> Density:
        """p(x | z), one distribution a data dimension."""

    @abstractmethod
    def check(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N D"] | None = None) -> None:
        """Check that observed entries of x lie in the support.

        Raises:
            ValueError: if some do not; the message counts them.
        """

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {}

    def notes(self) -> list[str]:
        """What a person should know of the fitted likelihood; empty if nothing."""
        return []


class Gaussian(Likelihood):
    """x | z ~ N(G(z), sigma^2 I).

    Args:
        scale: sigma: a positive number (fixed), or ``"shared"``, one learned sigma.
        initial: where a learned sigma starts.
        floor: a learned sigma stays above it; :meth:`notes` says when it was reached.
    """

    scale: Tensor

    def __init__(
        self, scale: float | str = "shared", *, initial: float = 1.0, floor: float = 1e-4
    ) -> None:
        super().__init__()
        self._config = {"scale": scale, "initial": initial, "floor": floor}
        self.floor = floor
        if isinstance(scale, str):
            choose_option("scale", scale, ("shared",))
            if not 0 <= floor < initial:
                raise ValueError(
                    f"need 0 <= floor < initial; got floor={floor}, initial={initial}"
                )
            above = constraints.greater_than(floor)
            self.scale = cast(Any, PyroParam(torch.tensor(float(initial)), above))
        elif scale > 0:
            # Exact in every dtype, which a buffer is not.
            self.scale = cast(Any, float(scale))
        else:
            raise ValueError(f"scale must be positive or 'shared'; got {scale}")

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return self._config

    def forward(self, outputs: Float[Tensor, "*B D"]) -> Density:
        """N(outputs, sigma^2), one a data dimension."""
        return dist.Normal(outputs, self.scale)

    def check(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N D"] | None = None) -> None:
        """Nothing to check: every real number is in the support."""

    def notes(self) -> list[str]:
        """Whether the learned scale stands on its floor."""
        if self._config["scale"] != "shared" or self.scale > 1.01 * self.floor:
            return []
        return [f"the noise scale has reached its floor, {self.floor:g}: lower floor= or check x"]


class Bernoulli(Likelihood):
    """x | z ~ Bernoulli(logits = G(z)), for binary x."""

    def forward(self, outputs: Float[Tensor, "*B D"]) -> Density:
        """Bernoulli with these logits, one a data dimension."""
        return dist.Bernoulli(logits=outputs)

    def check(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N D"] | None = None) -> None:
        """Check that observed entries are 0 or 1.

        Raises:
            ValueError: if some are not: over grey values it is no density.
        """
        wrong = (x != 0) & (x != 1)
        wrong = wrong if mask is None else wrong & mask
        if num_wrong := int(wrong.sum()):
            raise ValueError(
                f"x has {num_wrong} entries outside {{0, 1}} "
                f"(min {x.min():.2f}, max {x.max():.2f}); a Bernoulli is no density there. "
                "Use Gaussian('shared'), or binarize: (x > t).float()"
            )


LIKELIHOODS: dict[str, type[Likelihood]] = {"Gaussian": Gaussian, "Bernoulli": Bernoulli}
