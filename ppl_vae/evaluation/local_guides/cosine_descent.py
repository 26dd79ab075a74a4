"""Gradient descent with a learning rate that falls to zero along a cosine."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppl_vae.core.state import validation, validation_enabled


def cosine_rates(lr: float, steps: int) -> list[float]:
    """The learning rates lr (1 + cos(pi k / steps)) / 2 for k = 0, ..., steps - 1."""
    return [lr * (1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps)]


def descend(
    optimizer: torch.optim.Optimizer, rates: Sequence[float], loss: Callable[[], Tensor]
) -> None:
    """Take one step of an optimizer with each learning rate.

    Only the gradients of the optimizer's own parameters are computed, so that those of a model
    that the loss also depends on remain unchanged.

    Args:
        optimizer: an optimizer with one parameter group.
        rates: the learning rate of each step.
        loss: the function to minimize, evaluated at each step.
    """
    (group,) = optimizer.param_groups
    for number, rate in enumerate(rates):
        group["lr"] = rate
        # Checks of arguments read values, for which the host waits, at each site of each step.
        with validation(validation_enabled() and number == 0):
            gradients = torch.autograd.grad(loss(), group["params"])
        for parameter, gradient in zip(group["params"], gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
