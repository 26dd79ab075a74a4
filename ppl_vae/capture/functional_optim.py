"""Optimizers as pure functions: Adam, AdamW and SGD for steps that are captured as graphs.

The optimizers of ``torch.optim`` update tensors in place and keep their step counter outside the
tensors, which a captured graph cannot do. The update equations here are those of torch, tested
against it; their state is read from and written to the ``torch.optim`` object.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ppl_vae.capture.graph import CompilationError

OptState: TypeAlias = tuple[Tensor, ...]
"""The optimizer state of one parameter, e.g. the two moments of Adam."""


@dataclass(frozen=True)
class FunctionalAdam:
    """Adam, or AdamW if weight decay is ``decoupled``.

    References:
        Kingma, Ba: Adam: a method for stochastic optimization (2015).
        Loshchilov, Hutter: Decoupled weight decay regularization (2019).
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    state_keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def coefficients(self, step: int, lr: float) -> tuple[float, ...]:
        """The numbers that an update reads and that differ from step to step.

        Powers of the decay rates are computed here, once for each step: compiled code would
        compute them again for each few elements of the parameters.

        Args:
            step: its number, counted from 1.
            lr: the learning rate.
        """
        beta1, beta2 = self.betas
        return lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, 1 - lr * self.weight_decay

    def update(
        self, parameter: Tensor, gradient: Tensor, state: OptState, coefficients: Tensor
    ) -> tuple[Tensor, OptState]:
        """Return the parameter and its state after a step with these :meth:`coefficients`."""
        first, second = state
        rate, second_factor, shrinkage = coefficients
        (beta1, beta2), decay = self.betas, self.weight_decay
        if self.decoupled and decay:
            parameter = parameter * shrinkage
        elif decay:
            gradient = gradient + decay * parameter
        first = _flush_denormals(first + (gradient - first) * (1 - beta1))
        second = _flush_denormals(second * beta2 + gradient.square() * (1 - beta2))
        scale = second.sqrt() * second_factor + self.eps
        return parameter - rate * first / scale, (first, second)


@dataclass(frozen=True)
class FunctionalSGD:
    """Stochastic gradient descent, with or without momentum."""

    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The keys of the state in ``torch.optim.SGD``."""
        return ("momentum_buffer",) if self.momentum else ()

    def coefficients(self, step: int, lr: float) -> tuple[float, ...]:
        """The numbers that an update reads and that differ from step to step.

        Args:
            step: its number, counted from 1.
            lr: the learning rate.
        """
        return lr, float(step == 1)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: OptState, coefficients: Tensor
    ) -> tuple[Tensor, OptState]:
        """Return the parameter and its state after a step with these :meth:`coefficients`."""
        lr, is_first = coefficients
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        if not state:
            return parameter - lr * gradient, ()
        later = state[0] * self.momentum + (1 - self.dampening) * gradient
        buffer = _flush_denormals(torch.where(is_first == 1, gradient, later))
        direction = gradient + self.momentum * buffer if self.nesterov else buffer
        return parameter - lr * direction, (buffer,)


def _flush_denormals(moment: Tensor) -> Tensor:
    # Where gradients vanish, moments decay into denormal numbers, on which processors are slow:
    # a step of a network with dead units took a third longer.
    return torch.where(moment.abs() < torch.finfo(moment.dtype).tiny, 0.0, moment)


FunctionalOptimizer: TypeAlias = FunctionalAdam | FunctionalSGD


def functional_optimizer(optimizer: torch.optim.Optimizer) -> FunctionalOptimizer:
    """The functional counterpart of an optimizer.

    Raises:
        CompilationError: if there is none.
    """
    kind = type(optimizer)
    if kind not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        raise CompilationError(f"{kind.__name__} is none of Adam, AdamW, SGD")
    if len(optimizer.param_groups) != 1:
        raise CompilationError("the optimizer has several groups of parameters")
    group = optimizer.param_groups[0]
    for flag in ("amsgrad", "maximize", "differentiable"):
        if group.get(flag):
            raise CompilationError(f"{kind.__name__} has {flag} set")
    if isinstance(group["lr"], Tensor):
        raise CompilationError("the learning rate is a tensor")
    decay = float(group["weight_decay"])
    if kind is torch.optim.SGD:
        return FunctionalSGD(group["momentum"], group["dampening"], decay, bool(group["nesterov"]))
    # From torch 2.9 on, Adam has decoupled weight decay as an option.
    decoupled = kind is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))
    beta1, beta2 = map(float, group["betas"])
    return FunctionalAdam((beta1, beta2), group["eps"], decay, decoupled)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, functional: FunctionalOptimizer
) -> Any:
    """The dictionary in which an optimizer keeps the state of a parameter."""
    return optimizer.state[parameter] if functional.state_keys else {}


def read_optimizer_state(
    states: Sequence[Any], functional: FunctionalOptimizer, parameters: Sequence[Tensor]
) -> tuple[list[OptState], int]:
    """Read the state of ``torch.optim`` optimizers.

    Args:
        states: the optimizer's dictionary of each parameter, see :func:`optimizer_state`.
        functional: the optimizer's functional counterpart.
        parameters: the parameters, in the same order.

    Returns:
        The state of each parameter, and the number of steps made.

    Raises:
        ValueError: if not all parameters have made the same number of steps.
    """
    opt_states, counts = [], set()
    for parameter, state in zip(parameters, states, strict=True):
        values = tuple(state.get(key) for key in functional.state_keys)
        is_new = not state or any(value is None for value in values)
        counts.add(0 if is_new else int(state.get("step", 1)))
        zeros = (torch.zeros_like(parameter, requires_grad=False) for _ in functional.state_keys)
        opt_states.append(tuple(zeros) if is_new else values)
    if len(counts) > 1:
        raise ValueError("the parameters have not all made the same number of steps")
    return opt_states, counts.pop() if counts else 0


def write_optimizer_state(
    states: Sequence[Any],
    functional: FunctionalOptimizer,
    opt_states: Sequence[OptState],
    num_steps: int,
) -> None:
    """Write the state after ``num_steps`` steps to ``torch.optim`` optimizers, in place."""
    if not functional.state_keys:
        return
    for state, values in zip(states, opt_states, strict=True):
        state |= dict(zip(functional.state_keys, values, strict=True))
        if isinstance(functional, FunctionalAdam):
            step = state.get("step")
            if isinstance(step, Tensor):
                step.fill_(num_steps)
            else:
                state["step"] = torch.tensor(float(num_steps))
