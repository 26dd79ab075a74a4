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


class Adam:
    """Adam with torch's constants, whose steps are those of ``torch.optim.Adam`` to the last bit.

    Torch's own imports its compiler when it is constructed, which takes more than a second.

    Args:
        parameters: the parameters, which hold their gradients.

    References:
        Kingma, Ba: Adam: a method for stochastic optimization (2015).
    """

    BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.num_steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take a step with this learning rate."""
        self.num_steps += 1
        size = lr / (1 - self.BETA1**self.num_steps)
        root = math.sqrt(1 - self.BETA2**self.num_steps)
        for parameter, first, second in self.moments:
            gradient = parameter.grad
            if gradient is None:
                continue
            first.lerp_(gradient, 1 - self.BETA1)
            second.mul_(self.BETA2).addcmul_(gradient, gradient, value=1 - self.BETA2)
            scale = (second.sqrt() / root).add_(self.EPS)
            parameter.addcdiv_(first, scale, value=-size)


def descend(
    parameters: Sequence[Tensor], rates: Sequence[float], store_gradient: Callable[[], Any]
) -> None:
    """Take one step of Adam with each learning rate.

    Args:
        parameters: the parameters.
        rates: the learning rate of each step.
        store_gradient: computes the gradient of the function to minimize, and stores it in the
            parameters, before each step; see :func:`store_gradient`.
    """
    optimizer = Adam(parameters)
    for number, rate in enumerate(rates):
        # Checks of arguments read values, for which the host waits, at each site of each step.
        with validation(validation_enabled() and number == 0):
            store_gradient()
        optimizer.step(rate)


def store_gradient(parameters: Sequence[Tensor], loss: Callable[[], Tensor]) -> None:
    """Store the gradient of a loss in parameters, and in no others that the loss depends on."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
