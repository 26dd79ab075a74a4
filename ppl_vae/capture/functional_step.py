"""A training step as a pure function: tensors in, tensors out, nothing written in place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ppl_vae.capture.functional_optim import (
    FunctionalOptimizer,
    OptState,
    read_optimizer_state,
    write_optimizer_state,
)
from ppl_vae.capture.graph import ModuleTensors, permuted, perturbed, record, trace


class State(NamedTuple):
    """What steps change.

    Attributes:
        parameters: those that train, unconstrained.
        slots: of the optimizer, for each of them.
        done: steps, ().
        buffers: of the modules.
    """

    parameters: list[Tensor]
    slots: list[OptState]
    done: Tensor
    buffers: list[Tensor]


class Inputs(NamedTuple):
    """What steps read.

    Attributes:
        fixed: parameters that do not train.
        whole: tensors that all steps of a call see.
        each: tensors with one entry a step, (steps, ...).
        lr: learning rates, (steps,).
        beta: weights of the KL, (steps,).
    """

    fixed: list[Tensor]
    whole: list[Tensor]
    each: list[Tensor]
    lr: Tensor
    beta: Tensor

    def of_step(self, place: int) -> "Inputs":
        """Those of one of the steps."""
        one = slice(place, place + 1)
        each = [values[one] for values in self.each]
        return self._replace(each=each, lr=self.lr[one], beta=self.beta[one])


class TrainState:
    """What a training changes of what programs hold: read as a state, and written back.

    Args:
        modules: of the programs.
        named: the parameters that train, by name; those of no module are bare ones.
        rule: of their optimizers.
        fixed: bare parameters that do not train, by name.

    Attributes:
        held: what the programs hold.
        parameters: those that train, in the order of those held.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        named: Mapping[str, Tensor],
        rule: FunctionalOptimizer,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        own = {id(p) for module in modules for p in module.parameters()}
        bare = {name: p for name, p in named.items() if id(p) not in own}
        self.held, self.rule = ModuleTensors.by(modules, {**(fixed or {}), **bare}), rule
        trained = {id(p) for p in named.values()}
        self._trains = [id(p) in trained for p in self.held.parameters]
        self.parameters = [p for p in self.held.parameters if id(p) in trained]

    def fixed(self) -> list[Tensor]:
        """The held parameters that do not train."""
        both = zip(self.held.parameters, self._trains, strict=True)
        return [p.detach() for p, trains in both if not trains]

    def together(self, trained: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
        """Values for all parameters that are held, from those for the two kinds."""
        first, second = iter(trained), iter(fixed)
        return [next(first if trains else second) for trains in self._trains]

    def read(self, states: Sequence[Any]) -> tuple[State, int]:
        """The state, given what optimizers remember of each parameter; and the steps done.

        Raises:
            ValueError: if not all parameters have made the same number of steps.
        """
        slots, count = read_optimizer_state(states, self.rule, self.parameters)
        parameters = [parameter.detach() for parameter in self.parameters]
        counted = to_device([float(count)], self.parameters[0])[0]
        return State(parameters, slots, counted, list(self.held.buffers)), count

    @torch.no_grad()
    def write(self, states: Sequence[Any], after: State, count: int) -> None:
        """Take over the state after ``count`` steps."""
        slots = after.slots
        if self.parameters[0].device.type == "cuda":
            # What a graph gave is overwritten when it runs again.
            for parameter, value in zip(self.parameters, after.parameters, strict=True):
                parameter.copy_(value)
            slots = [tuple(slot.clone() for slot in held) for held in slots]
        else:  # by swapping what the tensors hold: copies would cost as much as the steps save
            for parameter, value in zip(self.parameters, after.parameters, strict=True):
                parameter.data = value
        for buffer, value in zip(self.held.buffers, after.buffers, strict=True):
            buffer.copy_(value)
        write_optimizer_state(states, self.rule, slots, count)


def to_device(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor of this dtype and device, without waiting for the device."""
    tensor = torch.tensor(values, dtype=like.dtype)
    if like.device.type != "cuda":
        return tensor.to(like.device)
    return tensor.pin_memory().to(like.device, non_blocking=True)


@dataclass(frozen=True)
class Step:
    """A training step of a pair as a pure function.

    Attributes:
        loss: of (whole, this step's, beta): runs the pair; what is minimised.
        trained: what trains, of what the programs hold.
        tables: which of the trained have a row a datum, of which a step moves its own rows only;
            the rows are the first of ``each``.
        table_rate: by how much the moves of these rows are multiplied.
        grad_clip: largest norm of the gradient.
    """

    loss: Callable[[list[Tensor], list[Tensor], Tensor], Tensor]
    trained: TrainState
    tables: frozenset[int] = frozenset()
    table_rate: float = 1.0
    grad_clip: float | None = None

    def __call__(self, state: Any, inputs: Any) -> tuple[State, Tensor]:
        """As many steps as ``inputs`` has entries; the new state, and the losses (steps,)."""
        state, inputs = State(*state), Inputs(*inputs)
        losses = []
        for place in range(len(inputs.lr)):
            each = [values[place] for values in inputs.each]
            state, loss = self._one(state, inputs, each, inputs.lr[place], inputs.beta[place])
            losses.append(loss)
        return state, torch.stack(losses)

    def record(self, state: State, inputs: Inputs) -> tuple[GraphModule, Any]:
        """As :func:`.recording.record`: the pair is run for one step, whose code makes several."""
        first = inputs.of_step(0)
        code, nested = record(self, (state, first), other_values(state, first))

        def several(state: State, inputs: Inputs) -> tuple[State, Tensor]:
            losses = []
            for place in range(len(inputs.lr)):
                flat = pytree.tree_leaves((state, inputs.of_step(place)))
                state, loss = pytree.tree_unflatten(code(*flat), nested)
                losses.append(loss)
            return state, torch.cat(losses)

        return (
            (code, nested) if len(inputs.lr) == 1 else trace(several, (state, inputs), run=False)
        )

    def _one(
        self, state: State, inputs: Inputs, each: list[Tensor], lr: Tensor, beta: Tensor
    ) -> tuple[State, Tensor]:
        leaves = [p.detach().requires_grad_() for p in state.parameters]
        buffers = [buffer.clone() for buffer in state.buffers]
        values = self.trained.together(leaves, inputs.fixed)
        with torch.enable_grad(), self.trained.held.replaced(values, buffers):
            loss = self.loss(inputs.whole, each, beta)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        done = state.done + 1
        parameters, slots = [], []
        for place, gradient in enumerate(_clipped(gradients, self.grad_clip)):
            new = old = state.parameters[place], state.slots[place]
            if gradient is not None:
                new = self.trained.rule.update(old[0], gradient, old[1], done, lr)
            if place in self.tables and each:
                new = _rows_only(old, new, each[0], self.table_rate)
            parameters.append(new[0])
            slots.append(new[1])
        return State(parameters, slots, done, buffers), loss.detach()


def other_values(state: State, inputs: Inputs) -> tuple[State, Inputs]:
    """Other values of the same shapes, as far as a step must not care."""
    slots = [tuple(s + 1e-6 for s in held) for held in state.slots]
    other = State(perturbed(state.parameters), slots, state.done + 1, state.buffers)
    each, whole = permuted(inputs.each), permuted(inputs.whole)
    fixed = perturbed(inputs.fixed)
    return other, Inputs(fixed, whole, each, inputs.lr * 0.9, inputs.beta * 0.9)


def _clipped(gradients: Sequence[Tensor | None], largest: float | None) -> list[Tensor | None]:
    if largest is None:
        return list(gradients)
    norms = [g.norm() for g in gradients if g is not None]
    factor = torch.clamp(largest / (torch.stack(norms).norm() + 1e-6), max=1.0)
    return [None if g is None else g * factor for g in gradients]


def _rows_only(
    old: tuple[Tensor, OptState], new: tuple[Tensor, OptState], rows: Tensor, rate: float
) -> tuple[Tensor, OptState]:
    def moved(before: Tensor, after: Tensor) -> Tensor:
        return before.index_copy(0, rows, after[rows])

    parameter = torch.lerp(old[0], new[0], rate)
    return moved(old[0], parameter), tuple(map(moved, old[1], new[1]))
