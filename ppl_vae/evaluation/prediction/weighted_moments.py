"""Running weighted moments of imputed values over draws of z."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class BlockEstimate:
    """Conditional moments and draws of all entries of a block of rows, and their ESS."""

    mean: Float[Tensor, "B D"]
    variance: Float[Tensor, "B D"]
    draws: Float[Tensor, "R B D"] | None
    ess: Float[Tensor, " B"]


class WeightedMoments:
    """Running weighted moments over draws, with weights relative to the largest one so far.

    Means are accumulated as differences from ``centre``, so that rounding does not destroy the
    variance of large values.
    """

    def __init__(self, centre: Float[Tensor, "B D"]) -> None:
        self.centre = centre
        self.top = torch.full_like(centre[:, 0], -torch.inf)
        self.total, self.squares = torch.zeros_like(self.top), torch.zeros_like(self.top)
        self.first, self.second = torch.zeros_like(centre), torch.zeros_like(centre)

    def add(
        self,
        log_weights: Float[Tensor, "S B"],
        mean: Float[Tensor, "S B D"],
        variance: Float[Tensor, "S B D"],
    ) -> Float[Tensor, "S B"]:
        """Add draws with these moments of x given z; returns their weights in the new units."""
        top = torch.maximum(self.top, log_weights.amax(0))
        unit = torch.where(top.isfinite(), top, 0.0)
        scale, weights = (self.top - unit).exp(), (log_weights - unit).exp()
        deviation = mean - self.centre
        self.top = top
        self.total = self.total * scale + weights.sum(0)
        self.squares = self.squares * scale.square() + weights.square().sum(0)
        over_draws, scale = "sb,sbd->bd", scale[:, None]
        self.first = self.first * scale + torch.einsum(over_draws, weights, deviation)
        second = deviation.square() + variance
        self.second = self.second * scale + torch.einsum(over_draws, weights, second)
        return weights

    def estimate(self, draws: Tensor | None) -> BlockEstimate:
        """The conditional moments of x, with the given draws.

        Raises:
            FloatingPointError: if all weights of a row are zero.
        """
        if empty := int((self.total == 0).sum()):
            raise FloatingPointError(
                f"all weights of {empty} rows with missing values are zero: the observed values "
                "have no density under any draw of the guide; use refine=, or a guide fitted to "
                "such rows"
            )
        first, second = self.first / self.total[:, None], self.second / self.total[:, None]
        variance = (second - first.square()).clamp(min=0)
        ess = self.total.square() / self.squares
        return BlockEstimate(self.centre + first, variance, draws, ess)
