"""Optimizers as pure functions: Adam, AdamW and SGD for steps that are recorded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

OptState: TypeAlias = tuple[Tensor, ...]
"""What a rule remembers of one parameter."""


@dataclass(frozen=True)
class FunctionalAdam:
    """Adam, or AdamW with ``decoupled`` weight decay.

    References:
        Kingma, Ba: Adam: a method for stochastic optimization (2015).
        Loshchilov, Hutter: Decoupled weight decay regularization (2019).
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def update(
        self, parameter: Tensor, gradient: Tensor, slots: OptState, step: Tensor, lr: Tensor
    ) -> tuple[Tensor, OptState]:
        """The parameter and its slots after the ``step``-th step (counted from 1)."""
        first, second = slots
        (beta1, beta2), decay = self.betas, self.weight_decay
        if self.decoupled and decay:
            parameter = parameter * (1 - lr * decay)
        elif decay:
            gradient = gradient + decay * parameter
        first = _flushed(first + (gradient - first) * (1 - beta1))
        second = _flushed(second * beta2 + gradient.square() * (1 - beta2))
        spread = (second / (1 - beta2**step)).sqrt() + self.eps
        return parameter - lr / (1 - beta1**step) * first / spread, (first, second)


@dataclass(frozen=True)
class FunctionalSGD:
    """Stochastic gradient descent, with momentum or without."""

    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Of the slots."""
        return ("momentum_buffer",) if self.momentum else ()

    def update(
        self, parameter: Tensor, gradient: Tensor, slots: OptState, step: Tensor, lr: Tensor
    ) -> tuple[Tensor, OptState]:
        """The parameter and its slots after the ``step``-th step (counted from 1)."""
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        if not slots:
            return parameter - lr * gradient, ()
        later = slots[0] * self.momentum + (1 - self.dampening) * gradient
        buffer = _flushed(torch.where(step == 1, gradient, later))
        direction = gradient + self.momentum * buffer if self.nesterov else buffer
        return parameter - lr * direction, (buffer,)


def _flushed(slot: Tensor) -> Tensor:
    # Where gradients end, moments decay into denormal numbers, with which processors are slow:
    # a step of a network with dead units took a third longer.
    return torch.where(slot.abs() < torch.finfo(slot.dtype).tiny, 0.0, slot)


FunctionalOptimizer: TypeAlias = FunctionalAdam | FunctionalSGD


def functional_optimizer(optimizer: torch.optim.Optimizer) -> FunctionalOptimizer | str:
    """The rule of an optimizer, or why it has none here."""
    kind = type(optimizer)
    if kind not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        return f"{kind.__name__} is none of Adam, AdamW, SGD"
    if len(optimizer.param_groups) != 1:
        return "the optimizer has several groups of parameters"
    group = optimizer.param_groups[0]
    for flag in ("amsgrad", "maximize", "differentiable"):
        if group.get(flag):
            return f"{kind.__name__} has {flag} set"
    if isinstance(group["lr"], Tensor):
        return "the learning rate is a tensor"
    decay = float(group["weight_decay"])
    if kind is torch.optim.SGD:
        return FunctionalSGD(group["momentum"], group["dampening"], decay, bool(group["nesterov"]))
    # From torch 2.9 on Adam knows of decoupled decay itself.
    decoupled = kind is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))
    beta1, beta2 = map(float, group["betas"])
    return FunctionalAdam((beta1, beta2), group["eps"], decay, decoupled)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, rule: FunctionalOptimizer
) -> Any:
    """What an optimizer remembers of a parameter, to read and to write."""
    return optimizer.state[parameter] if rule.names else {}


def read_optimizer_state(
    states: Sequence[Any], rule: FunctionalOptimizer, parameters: Sequence[Tensor]
) -> tuple[list[OptState], int]:
    """What optimizers remember of their parameters, and after how many steps.

    Args:
        states: an optimizer's state of each parameter.
        rule: the optimizer's.
        parameters: in the same order.

    Raises:
        ValueError: if not all parameters have made the same number of steps.
    """
    slots, counts = [], set()
    for parameter, state in zip(parameters, states, strict=True):
        held = tuple(state.get(name) for name in rule.names)
        fresh = not state or any(value is None for value in held)
        counts.add(0 if fresh else int(state.get("step", 1)))
        zeros = (torch.zeros_like(parameter, requires_grad=False) for _ in rule.names)
        slots.append(tuple(zeros) if fresh else held)
    if len(counts) > 1:
        raise ValueError("the parameters have not all made the same number of steps")
    return slots, counts.pop() if counts else 0


def write_optimizer_state(
    states: Sequence[Any], rule: FunctionalOptimizer, slots: Sequence[OptState], count: int
) -> None:
    """Let optimizers remember this, so that they can go on by themselves."""
    if not rule.names:
        return
    for state, held in zip(states, slots, strict=True):
        state |= dict(zip(rule.names, held, strict=True))
        if isinstance(rule, FunctionalAdam):
            step = state.get("step")
            if isinstance(step, Tensor):
                step.fill_(count)
            else:
                state["step"] = torch.tensor(float(count))
