"""A whole training step recorded as tensor code, without Pyro's handlers.

The pair is run once under a recorder of tensor operations; what is recorded is a pure function of
parameters, optimizer state, buffers, data and the rows of each step. Draws stay draws. A step
that is not such a function (it reads a value, branches on one, draws with Python's or numpy's
generator, closes over a parameter of its own) is told apart by recording it twice, on different
values, and comparing.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.inference.rules import Rule, Slots
from ppl_vae.state import isolated_store, validation


class NotRecordable(Exception):
    """Why a step cannot be recorded; the message says so to a person."""


def first_line(error: Exception) -> str:
    """What an error says first, and of what kind it is."""
    if "_local_scalar_dense" in str(error):
        return "it reads a value of a tensor: .item(), float(), a branch on one"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


@dataclass(frozen=True)
class State:
    """What steps change.

    Attributes:
        parameters: unconstrained.
        slots: of the optimizer, for each parameter.
        count: steps done, ().
        buffers: of the modules.
    """

    parameters: list[Tensor]
    slots: list[Slots]
    count: Tensor
    buffers: list[Tensor]


@dataclass(frozen=True)
class Inputs:
    """What steps read.

    Attributes:
        whole: tensors that all steps of a call see.
        each: tensors with one entry a step, (steps, ...).
        lr: learning rates, (steps,).
        beta: weights of the KL, (steps,).
    """

    whole: list[Tensor]
    each: list[Tensor]
    lr: Tensor
    beta: Tensor


@dataclass(frozen=True)
class Step:
    """A training step of a pair as a pure function.

    Attributes:
        loss: of (whole, this step's, beta): runs the pair; what is minimised, nats a datum.
        modules: that hold parameters and buffers.
        stored: names in the parameter store of parameters that no module holds.
        parameters: all that train, those of modules first, then those stored.
        rule: of the optimizer.
        tables: which parameters have a row a datum, of which a step moves its own rows only; the
            rows are the first of ``each``.
        grad_clip: largest norm of the gradient.
    """

    loss: Callable[[list[Tensor], list[Tensor], Tensor], Tensor]
    modules: list[nn.Module]
    stored: dict[str, Any]
    parameters: list[Tensor]
    rule: Rule
    tables: frozenset[int]
    grad_clip: float | None

    def __call__(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        """As many steps as ``inputs`` has entries; the new state, and the losses (steps,)."""
        losses = []
        for place in range(len(inputs.lr)):
            each = [values[place] for values in inputs.each]
            lr, beta = inputs.lr[place], inputs.beta[place]
            state, loss = self._one(state, inputs.whole, each, lr, beta)
            losses.append(loss)
        return state, torch.stack(losses)

    def _one(
        self, state: State, whole: list[Tensor], each: list[Tensor], lr: Tensor, beta: Tensor
    ) -> tuple[State, Tensor]:
        leaves = [p.detach().requires_grad_() for p in state.parameters]
        buffers = [buffer.clone() for buffer in state.buffers]
        with torch.enable_grad():
            loss = self._loss(leaves, buffers, whole, each, beta)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        clipped = _clipped(gradients, self.grad_clip)
        count = state.count + 1
        parameters, slots = [], []
        for place, gradient in enumerate(clipped):
            old = state.parameters[place], state.slots[place]
            new = (
                old
                if gradient is None
                else self.rule.update(*old[:1], gradient, old[1], count, lr)
            )
            if place in self.tables and each:
                new = _rows_only(old, new, each[0])
            parameters.append(new[0])
            slots.append(new[1])
        return State(parameters, slots, count, buffers), loss.detach()

    def _loss(
        self,
        leaves: list[Tensor],
        buffers: list[Tensor],
        whole: list[Tensor],
        each: list[Tensor],
        beta: Tensor,
    ) -> Tensor:
        known = {id(p): leaf for p, leaf in zip(self.parameters, leaves, strict=True)}
        ours = (id(buffer) for buffer in buffers_of(self.modules))
        known |= dict(zip(ours, buffers, strict=True))
        bare = dict(zip(self.stored, leaves[len(leaves) - len(self.stored) :], strict=True))
        within = (isolated_store(), validation(False), _swapped(self.modules, known))
        with ExitStack() as stack:
            for context in (*within, _inert(self.modules), _Substitute(bare, self.stored)):
                stack.enter_context(context)
            return self.loss(whole, each, beta)

    def record(self, state: State, inputs: Inputs) -> GraphModule:
        """The step as tensor code for inputs of these shapes.

        Raises:
            NotRecordable: if it is no pure function of state and inputs.
        """
        first = self._recorded(state, inputs)
        second = self._recorded(*_others(state, inputs))
        _compare(first, second)
        return first

    def _recorded(self, state: State, inputs: Inputs) -> GraphModule:
        def flat(*parts: Any) -> tuple[Any, ...]:
            after, losses = self(State(*parts[:4]), Inputs(*parts[4:]))
            return (*_flattened(after, inputs)[:4], losses)

        try:
            with torch.no_grad():
                recorded = make_fx(flat)(*_flattened(state, inputs))
        except Exception as error:  # whatever a stranger's program meets
            raise NotRecordable(f"it cannot be recorded ({first_line(error)})") from error
        recorded.graph.eliminate_dead_code()
        recorded.recompile()
        return recorded


def _flattened(state: State, inputs: Inputs) -> tuple[Any, ...]:
    return (
        state.parameters,
        state.slots,
        state.count,
        state.buffers,
        inputs.whole,
        inputs.each,
        inputs.lr,
        inputs.beta,
    )


def run_recorded(
    recorded: Callable[..., Any], state: State, inputs: Inputs
) -> tuple[State, Tensor]:
    """Run what :meth:`Step.record` gave, as it is or compiled."""
    with torch.no_grad():
        *parts, losses = recorded(*_flattened(state, inputs))
    parameters, slots, count, buffers = parts
    return State(list(parameters), [tuple(s) for s in slots], count, list(buffers)), losses


def _clipped(gradients: Sequence[Tensor | None], largest: float | None) -> list[Tensor | None]:
    if largest is None:
        return list(gradients)
    norms = [g.norm() for g in gradients if g is not None]
    factor = torch.clamp(largest / (torch.stack(norms).norm() + 1e-6), max=1.0)
    return [None if g is None else g * factor for g in gradients]


def _rows_only(
    old: tuple[Tensor, Slots], new: tuple[Tensor, Slots], rows: Tensor
) -> tuple[Tensor, Slots]:
    def moved(before: Tensor, after: Tensor) -> Tensor:
        return before.index_copy(0, rows, after[rows])

    return moved(old[0], new[0]), tuple(map(moved, old[1], new[1]))


def _parts(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return list({id(part): part for module in modules for part in module.modules()}.values())


def buffers_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """The buffers of modules, each once."""
    found = [b for part in _parts(modules) for b in part._buffers.values() if b is not None]
    return list({id(buffer): buffer for buffer in found}.values())


@contextmanager
def _swapped(modules: Sequence[nn.Module], values: dict[int, Tensor]) -> Iterator[None]:
    """Other tensors in place of modules' own, by their ids; shared ones in all their places."""
    places = []
    for part in _parts(modules):
        for held in (part._parameters, part._buffers):
            places += [(held, n, t) for n, t in held.items() if t is not None and id(t) in values]
    try:
        for held, name, tensor in places:
            held[name] = values[id(tensor)]
        yield
    finally:
        for held, name, tensor in places:
            held[name] = tensor


class _Inert:
    """A context of PyroModules in which parameters are read as they are, not from the store."""

    active = 0
    used = True

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass

    def get(self, name: str) -> None:
        return None

    def set(self, name: str, value: Tensor) -> None:
        pass


@contextmanager
def _inert(modules: Sequence[nn.Module]) -> Iterator[None]:
    parts = [part for part in _parts(modules) if isinstance(part, PyroModule)]
    before = [(part, part._pyro_context) for part in parts]
    if sampling := [type(p).__name__ for p, _ in before if getattr(p, "_pyro_samples", None)]:
        raise NotRecordable(f"{sampling[0]} has PyroSample attributes, which need Pyro's context")
    try:
        for part, _ in before:
            vars(part)["_pyro_context"] = _Inert()
        yield
    finally:
        for part, context in before:
            vars(part)["_pyro_context"] = context


class _Substitute(Messenger):
    """Gives bare ``pyro.param`` statements the values of a step."""

    def __init__(self, values: dict[str, Tensor], constraints: dict[str, Any]) -> None:
        super().__init__()
        self.values, self.constraints = values, constraints

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.values:
            value = self.values[msg["name"]]
            msg["value"] = transform_to(self.constraints[msg["name"]])(value)
            msg["done"] = msg["stop"] = True


def _others(state: State, inputs: Inputs) -> tuple[State, Inputs]:
    """Other values of the same shapes, as far as a step must not care; generators move on too."""
    random.random()
    np.random.random()
    parameters = [p + 1e-3 * torch.randn_like(p) for p in state.parameters]
    slots = [tuple(s + 1e-6 for s in held) for held in state.slots]
    each = [values.roll(1, 0) if len(values) > 1 else values for values in inputs.each]
    whole = [values.roll(1, 0) for values in inputs.whole]
    other = State(parameters, slots, state.count + 1, state.buffers)
    return other, Inputs(whole, each, inputs.lr * 0.9, inputs.beta * 0.9)


def _compare(first: GraphModule, second: GraphModule) -> None:
    if first.code != second.code:
        raise NotRecordable("it does other things for other values (a branch on a value?)")
    for node in first.graph.find_nodes(op="get_attr"):
        ours, theirs = (getattr(recorded, str(node.target)) for recorded in (first, second))
        if not isinstance(ours, Tensor):
            continue
        if isinstance(ours, nn.Parameter) or ours.requires_grad:
            raise NotRecordable("it uses a Parameter that belongs to neither model nor guide")
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            raise NotRecordable(
                "it holds numbers that change from run to run (Python's or numpy's generator, or "
                "copies of parameters?)"
            )


def stored_constraints(names: Sequence[str]) -> dict[str, Any]:
    """The constraints of parameters in Pyro's store, by name."""
    constraints = pyro.get_param_store()._constraints
    return {name: constraints[name] for name in names}
