"""Early stopping on a validation value, and copies of the state to restore."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Snapshot:
    """Copies of tensors, which can be restored in place."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.values = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Set the tensors to the values they had."""
        for tensor, value in zip(self.tensors, self.values, strict=True):
            tensor.copy_(value)


@dataclass
class EarlyStopping:
    """Keeps the state with the best validation value, and decides when to stop.

    Attributes:
        patience: evaluations without improvement before stopping; None never stops.
        best: the state with the best value so far.
        values: the validation values.
        steps: the number of steps made before each of them.
        num_without_improvement: evaluations since the best value.
    """

    patience: int | None
    best: Snapshot | None = None
    values: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    num_without_improvement: int = 0

    @property
    def should_stop(self) -> bool:
        """Whether the patience is exhausted."""
        return self.patience is not None and self.num_without_improvement >= self.patience

    def update(self, step: int, value: float, state: Sequence[Tensor]) -> bool:
        """Add a validation value of the current state; returns whether to stop."""
        improved = not self.values or value > max(self.values)
        self.values.append(value)
        self.steps.append(step)
        self.num_without_improvement = 0 if improved else self.num_without_improvement + 1
        if improved:
            self.best = Snapshot(state)
        return self.should_stop
