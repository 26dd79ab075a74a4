"""A training step as a pure function from tensors to tensors, without writes in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ppl_vae.capture.functional_gradient import (
    FunctionalGradient,
    Loss,
    LossInputs,
    TrainedTensors,
    to_device,
)
from ppl_vae.capture.functional_optim import (
    FunctionalOptimizer,
    OptState,
    read_optimizer_state,
    write_optimizer_state,
)
from ppl_vae.capture.graph import capture_graph, permuted, perturbed, trace_graph
from ppl_vae.core.devices.accelerators import copy_without_waiting


class StepState(NamedTuple):
    """The tensors that training steps update.

    Attributes:
        parameters: the trained parameters, unconstrained.
        opt_states: the optimizer state of each of them.
        buffers: the buffers of the modules.
    """

    parameters: list[Tensor]
    opt_states: list[OptState]
    buffers: list[Tensor]


class OneStep(NamedTuple):
    """The tensors that one training step only reads.

    Attributes:
        per_step: see :class:`.functional_gradient.LossInputs`.
        coefficients: what the optimizer's method of this name returns for the step.
        beta: the weight of the KL term, ().
    """

    per_step: list[Tensor]
    coefficients: Tensor
    beta: Tensor


class StepInputs(NamedTuple):
    """The tensors that training steps only read.

    Attributes:
        frozen: the parameters that are not trained.
        common: tensors that all steps of a call read.
        steps: those of each step, which are separate tensors. The compiler would write the
            position in a common tensor into the code, and compile it again for each step.
    """

    frozen: list[Tensor]
    common: list[Tensor]
    steps: list[OneStep]

    def at(self, position: int) -> "StepInputs":
        """The inputs of one of the steps."""
        return self._replace(steps=[self.steps[position]])


class TrainState(TrainedTensors):
    """The training state of a pair: read from modules and optimizers, and written back to them.

    Args:
        modules, named, frozen: as for :class:`.functional_gradient.TrainedTensors`.
        optimizer: the functional counterpart of the optimizers of the trained parameters.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        named: Mapping[str, Tensor],
        optimizer: FunctionalOptimizer,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(modules, named, frozen)
        self.optimizer = optimizer

    def read(self, opt_states: Sequence[Any]) -> tuple[StepState, int]:
        """The state as tensors, and the number of steps made.

        Args:
            opt_states: the optimizer's dictionary of each parameter.

        Raises:
            ValueError: if not all parameters have made the same number of steps.
        """
        values, num_steps = read_optimizer_state(opt_states, self.optimizer, self.parameters)
        parameters = [parameter.detach() for parameter in self.parameters]
        return StepState(parameters, values, list(self.tensors.buffers)), num_steps

    def inputs_of(
        self,
        per_step: Sequence[list[Tensor]],
        num_steps: int,
        rates: Sequence[float],
        betas: Sequence[float],
    ) -> list[OneStep]:
        """The inputs of the next steps.

        Args:
            per_step: the tensors of each of them.
            num_steps: the number of steps made before.
            rates: their learning rates.
            betas: their weights of the KL term.
        """
        like, steps = self.parameters[0], enumerate(rates, num_steps + 1)
        rows = [self.optimizer.coefficients(step, lr) for step, lr in steps]
        found = copy_without_waiting(torch.tensor(rows, dtype=like.dtype), like.device)
        weights = to_device(betas, like)
        return [
            OneStep(*each) for each in zip(per_step, found.unbind(), weights.unbind(), strict=True)
        ]

    @torch.no_grad()
    def write(self, opt_states: Sequence[Any], state: StepState, num_steps: int) -> None:
        """Write the state after ``num_steps`` steps to parameters, buffers and optimizers."""
        values = state.opt_states
        if self.parameters[0].device.type != "cpu":
            # The results of a CUDA graph are overwritten by its next replay.
            for parameter, value in zip(self.parameters, state.parameters, strict=True):
                parameter.copy_(value)
            values = [tuple(moment.clone() for moment in moments) for moments in values]
        else:  # exchanging the storage: copies would cost as much as captured steps save
            for parameter, value in zip(self.parameters, state.parameters, strict=True):
                parameter.data = value
        for buffer, value in zip(self.tensors.buffers, state.buffers, strict=True):
            buffer.copy_(value)
        write_optimizer_state(opt_states, self.optimizer, values, num_steps)


@dataclass(frozen=True)
class FunctionalStep:
    """A training step of a pair as a pure function.

    Attributes:
        loss: the loss.
        train_state: the tensors of the pair.
        tables: positions of those trained parameters that have one row per datum. A step updates
            only the rows of its batch, whose indices are the first of the tensors of this step.
        table_rate: the factor by which updates of these rows are multiplied.
        grad_clip: the largest norm of the gradient.
    """

    loss: Loss
    train_state: TrainState
    tables: frozenset[int] = frozenset()
    table_rate: float = 1.0
    grad_clip: float | None = None

    def __call__(self, state: Any, inputs: Any) -> tuple[StepState, Tensor]:
        """Make the steps of ``inputs``.

        Returns:
            The state after the steps, and the loss at each of them, (steps,).
        """
        state, inputs = StepState(*state), StepInputs(*inputs)
        losses = []
        for step in inputs.steps:
            state, loss = self._single_step(state, inputs, OneStep(*step))
            losses.append(loss)
        return state, torch.stack(losses)

    def capture(self, state: StepState, inputs: StepInputs) -> tuple[GraphModule, Any]:
        """Capture the steps as a graph, see :func:`.graph.capture_graph`.

        The pair is run for one step; the graph of several steps is composed of that of one.
        """
        first = inputs.at(0)
        graph, structure = capture_graph(self, (state, first), perturbed_arguments(state, first))

        def several(state: StepState, inputs: Any) -> tuple[StepState, Tensor]:
            losses, inputs = [], StepInputs(*inputs)
            for position in range(len(inputs.steps)):
                flat = pytree.tree_leaves((state, inputs.at(position)))
                state, loss = pytree.tree_unflatten(graph(*flat), structure)
                losses.append(loss)
            return state, torch.cat(losses)

        if len(inputs.steps) == 1:
            return graph, structure
        return trace_graph(several, (state, inputs), execute=False)

    def _single_step(
        self, state: StepState, inputs: StepInputs, step: OneStep
    ) -> tuple[StepState, Tensor]:
        loss, gradients, buffers = FunctionalGradient(self.loss, self.train_state)(
            LossInputs(
                state.parameters,
                state.buffers,
                inputs.frozen,
                inputs.common,
                step.per_step,
                step.beta,
            )
        )
        rows = step.per_step[0] if step.per_step else None
        parameters, opt_states = [], []
        for place, gradient in enumerate(_clip_gradients(gradients, self.grad_clip)):
            old = state.parameters[place], state.opt_states[place]
            new = self._update(old, gradient, step.coefficients)
            if place in self.tables and rows is not None:
                new = _update_rows_only(old, new, rows, self.table_rate)
            parameters.append(new[0])
            opt_states.append(new[1])
        return StepState(parameters, opt_states, buffers), loss

    def _update(
        self, old: tuple[Tensor, OptState], gradient: Tensor | None, coefficients: Tensor
    ) -> tuple[Tensor, OptState]:
        if gradient is None:
            return old
        return self.train_state.optimizer.update(old[0], gradient, old[1], coefficients)


def perturbed_arguments(state: StepState, inputs: StepInputs) -> tuple[StepState, StepInputs]:
    """Arguments with other values, for which a step must perform the same operations."""
    moments = [tuple(moment + 1e-6 for moment in values) for values in state.opt_states]
    other = StepState(perturbed(state.parameters), moments, state.buffers)
    steps = [
        OneStep(permuted(step.per_step), step.coefficients * 0.9, step.beta * 0.9)
        for step in inputs.steps
    ]
    return other, StepInputs(perturbed(inputs.frozen), permuted(inputs.common), steps)


def _clip_gradients(
    gradients: Sequence[Tensor | None], max_norm: float | None
) -> list[Tensor | None]:
    if max_norm is None:
        return list(gradients)
    norms = [g.norm() for g in gradients if g is not None]
    factor = torch.clamp(max_norm / (torch.stack(norms).norm() + 1e-6), max=1.0)
    return [None if g is None else g * factor for g in gradients]


def _update_rows_only(
    old: tuple[Tensor, OptState], new: tuple[Tensor, OptState], rows: Tensor, rate: float
) -> tuple[Tensor, OptState]:
    def take_rows(before: Tensor, after: Tensor) -> Tensor:
        return before.index_copy(0, rows, after[rows])

    parameter = torch.lerp(old[0], new[0], rate)
    return take_rows(old[0], parameter), tuple(map(take_rows, old[1], new[1]))
