"""Means that are accumulated batch by batch."""

import torch
from torch import Tensor


class RunningMean:
    """The mean of values that are added batch by batch, in float64.

    Args:
        device: device of the values.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, values: Tensor, mask: Tensor | None) -> None:
        """Add the values where the mask is True."""
        total, count = sum_and_count(values.double(), mask)
        self.total, self.count = self.total + total, self.count + count


def sum_and_count(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum and number of the values where the mask is True."""
    if mask is None:
        return values.sum(), torch.full_like(values.sum(), values.numel())
    return torch.where(mask, values, 0.0).sum(), mask.expand_as(values).sum()
