"""The loss of a pair and its gradient as a pure function from tensors to tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ppl_vae.capture.compiled import CompiledFunction
from ppl_vae.capture.graph import ModuleTensors, capture_graph, permuted, perturbed
from ppl_vae.core.devices.accelerators import copy_without_waiting

Loss: TypeAlias = Callable[[list[Tensor], list[Tensor], Tensor], Tensor]
"""A loss to minimise, of (shared tensors, tensors of this step, beta); it runs the pair."""


class TrainedTensors:
    """The tensors that a pair's programs read, of which some are trained.

    Args:
        modules: the modules of the programs.
        named: the trained parameters by name; those of no module are parameters of Pyro's store.
        frozen: parameters of the store that are not trained, by name.

    Attributes:
        tensors: all tensors that the programs read.
        parameters: the trained parameters, in the order of ``tensors``.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        named: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        own = {id(p) for module in modules for p in module.parameters()}
        bare = {name: p for name, p in named.items() if id(p) not in own}
        self.tensors = ModuleTensors.of(modules, {**(frozen or {}), **bare})
        trained = {id(p) for p in named.values()}
        self._is_trained = [id(p) in trained for p in self.tensors.parameters]
        self.parameters = [p for p in self.tensors.parameters if id(p) in trained]

    def frozen_parameters(self) -> list[Tensor]:
        """The parameters that the programs read and that are not trained."""
        pairs = zip(self.tensors.parameters, self._is_trained, strict=True)
        return [p.detach() for p, is_trained in pairs if not is_trained]

    def merge(self, trained: Sequence[Tensor], frozen: Sequence[Tensor]) -> list[Tensor]:
        """Values for all parameters in the order of ``tensors``, from those of the two kinds."""
        first, second = iter(trained), iter(frozen)
        return [next(first if is_trained else second) for is_trained in self._is_trained]


class LossInputs(NamedTuple):
    """What the loss of a step depends on.

    Attributes:
        parameters: the trained parameters, unconstrained.
        buffers: the buffers of the modules.
        frozen: the parameters that are not trained.
        common: tensors that all steps read.
        per_step: tensors of this step.
        beta: the weight of the KL term, ().
    """

    parameters: list[Tensor]
    buffers: list[Tensor]
    frozen: list[Tensor]
    common: list[Tensor]
    per_step: list[Tensor]
    beta: Tensor

    def perturbed(self) -> "LossInputs":
        """Other values, for which the loss must perform the same operations."""
        return LossInputs(
            perturbed(self.parameters),
            self.buffers,
            perturbed(self.frozen),
            permuted(self.common),
            permuted(self.per_step),
            self.beta * 0.9,
        )


class LossGradient(NamedTuple):
    """The loss of a step, its gradient, and the buffers after it.

    Attributes:
        loss: ().
        gradients: the gradients of the trained parameters; None if the loss does not depend on
            one.
        buffers: the buffers of the modules.
    """

    loss: Tensor
    gradients: list[Tensor | None]
    buffers: list[Tensor]


@dataclass(frozen=True)
class FunctionalGradient:
    """The gradient of a pair's loss as a pure function.

    Attributes:
        loss: the loss.
        trained: the tensors of the pair.
    """

    loss: Loss
    trained: TrainedTensors

    def __call__(self, inputs: Any) -> LossGradient:
        """The loss and its gradient; nothing is written in place."""
        inputs = LossInputs(*inputs)
        leaves = [p.detach().requires_grad_() for p in inputs.parameters]
        buffers = [buffer.clone() for buffer in inputs.buffers]
        values = self.trained.merge(leaves, inputs.frozen)
        with torch.enable_grad(), self.trained.tensors.substituted(values, buffers):
            loss = self.loss(inputs.common, inputs.per_step, inputs.beta)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        return LossGradient(loss.detach(), list(gradients), buffers)

    def capture(self, inputs: LossInputs) -> tuple[GraphModule, Any]:
        """Capture the gradient as a graph, see :func:`.graph.capture_graph`."""
        return capture_graph(self, (inputs,), (inputs.perturbed(),))


def to_device(values: Sequence[float], like: Tensor) -> Tensor:
    """Floats as a tensor of the dtype and device of another, without waiting for the device."""
    return copy_without_waiting(torch.tensor(values, dtype=like.dtype), like.device)


class CapturedGradient:
    """The gradient of a pair's loss by captured operations, stored in the trained parameters.

    Args:
        trained: the tensors of the pair.
        run: the captured :class:`FunctionalGradient` of these tensors, or of others of the same
            shapes that the same programs read.
    """

    def __init__(self, trained: TrainedTensors, run: CompiledFunction) -> None:
        self.trained, self.run = trained, run

    @torch.no_grad()
    def __call__(self, common: list[Tensor], per_step: list[Tensor], beta: float = 1.0) -> Tensor:
        """The loss; the parameters hold its gradient afterwards, and buffers are updated.

        Args:
            common, per_step, beta: as for :class:`LossInputs`.

        Raises:
            CaptureError: at the first call, if the loss cannot be captured; nothing is changed.
        """
        trained = self.trained
        parameters = [p.detach() for p in trained.parameters]
        weight = to_device([beta], parameters[0])[0]
        inputs = LossInputs(
            parameters,
            trained.tensors.buffers,
            trained.frozen_parameters(),
            common,
            per_step,
            weight,
        )
        found = LossGradient(*self.run(inputs))
        for parameter, gradient in zip(trained.parameters, found.gradients, strict=True):
            parameter.grad = gradient
        for buffer, after in zip(trained.tensors.buffers, found.buffers, strict=True):
            buffer.copy_(after)
        return found.loss
