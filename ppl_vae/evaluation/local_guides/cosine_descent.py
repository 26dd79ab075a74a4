"""Gradient descent with a learning rate that falls to zero along a cosine."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_vae.core.state import validation, validation_enabled


def cosine_rates(lr: float, steps: int) -> list[float]:
    """The learning rates lr (1 + cos(pi k / steps)) / 2 for k = 0, ..., steps - 1."""
    return [lr * (1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps)]


def descend(
    optimizer: torch.optim.Optimizer, rates: Sequence[float], store_gradient: Callable[[], Any]
) -> None:
    """Take one step of an optimizer with each learning rate.

    Args:
        optimizer: an optimizer with one parameter group.
        rates: the learning rate of each step.
        store_gradient: computes the gradient of the function to minimize, and stores it in the
            parameters, before each step; see :func:`store_gradient`.
    """
    (group,) = optimizer.param_groups
    for number, rate in enumerate(rates):
        group["lr"] = rate
        # Checks of arguments read values, for which the host waits, at each site of each step.
        with validation(validation_enabled() and number == 0):
            store_gradient()
        optimizer.step()


def store_gradient(parameters: Sequence[Tensor], loss: Callable[[], Tensor]) -> None:
    """Store the gradient of a loss in parameters, and in no others that the loss depends on."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
