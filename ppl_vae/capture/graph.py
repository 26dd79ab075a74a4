"""Functions of tensors recorded as tensor code, Pyro's handlers gone.

A function that runs a pair on tensors which it is given is run once under a recorder of tensor
operations; what is recorded is a pure function of its arguments. Draws stay draws. A function
that is none (it reads a value, branches on one, draws with Python's or numpy's generator, closes
over a parameter of its own) is told apart by recording it twice, on different values, and
comparing.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ppl_vae.core.state import validation


class CaptureError(Exception):
    """Why something cannot be recorded; the message says so to a person."""


def first_line(error: Exception) -> str:
    """What an error says first, and of what kind it is."""
    if "_local_scalar_dense" in str(error):
        return "it reads a value of a tensor: .item(), float(), a branch on one"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors that programs hold: those of modules, and those in Pyro's parameter store.

    Attributes:
        modules: that hold parameters and buffers.
        constraints: of bare ``pyro.param`` statements, by name.
        parameters: of the modules, each once, then the bare ones, unconstrained.
        buffers: of the modules.
    """

    modules: list[nn.Module]
    constraints: dict[str, Any]
    parameters: list[Tensor]
    buffers: list[Tensor]

    @classmethod
    def by(cls, modules: Sequence[nn.Module], bare: Mapping[str, Tensor]) -> "ModuleTensors":
        """What these modules hold, and these parameters of the store."""
        parts = _parts(modules)
        own = _distinct(p for part in parts for p in part._parameters.values())
        buffers = _distinct(b for part in parts for b in part._buffers.values())
        constraints = pyro.get_param_store()._constraints
        known = {name: constraints[name] for name in bare}
        return cls(list(modules), known, [*own, *bare.values()], buffers)

    @contextmanager
    def replaced(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
        """Programs run inside read these values in place of their own, and no parameter store."""
        bare = parameters[len(parameters) - len(self.constraints) :]
        values = dict(zip(map(id, self.parameters), parameters, strict=True))
        values |= dict(zip(map(id, self.buffers), buffers, strict=True))
        stored = dict(zip(self.constraints, bare, strict=True))
        with ExitStack() as stack:
            nothing: Any = {"params": {}, "constraints": {}}
            for context in (
                # What programs register here (pyro.module) are the values given, and is dropped.
                pyro.get_param_store().scope(nothing),
                validation(False),
                _swapped(self.modules, values),
                _inert(self.modules),
                _Substitute(stored, self.constraints),
            ):
                stack.enter_context(context)
            yield


def bare_parameters(modules: Sequence[nn.Module], run: Callable[[], Any]) -> dict[str, Tensor]:
    """Unconstrained parameters in Pyro's store that a run reads and no module holds, by name."""
    own = {id(p) for module in modules for p in module.parameters()}
    with torch.no_grad(), poutine.trace(param_only=True) as touched:
        run()
    stored = dict(pyro.get_param_store().named_parameters())
    names = touched.trace.nodes.keys() & stored.keys()
    return {name: stored[name] for name in sorted(names) if id(stored[name]) not in own}


def record(function: Callable[..., Any], args: Any, others: Any) -> tuple[GraphModule, Any]:
    """A function as tensor code for arguments of these shapes.

    Args:
        function: of nested tuples and lists of tensors, to the same.
        args: its arguments.
        others: others of the same shapes, on which it must do the same operations.

    Returns:
        Code from the flat list of argument tensors to the flat list of result tensors, and how
        these are nested.

    Raises:
        CaptureError: if the function is not pure.
    """
    first, structure = trace(function, args)
    random.random()  # the other generators move on, so that what was drawn with them differs
    np.random.random()
    _compare(first, trace(function, others)[0])
    return first, structure


def trace(function: Callable[..., Any], args: Any, *, run: bool = True) -> tuple[GraphModule, Any]:
    """What :func:`record` gives, of a function that is known to be pure.

    Args:
        function, args: as for :func:`record`.
        run: whether to run it on these tensors. Of recorded code their shapes are enough, and no
            memory is needed for what it computes.
    """
    flat, nested = pytree.tree_flatten(args)
    structure: Any = None

    def on_flat(*tensors: Tensor) -> list[Tensor]:
        nonlocal structure
        result = function(*pytree.tree_unflatten(tensors, nested))
        leaves, structure = pytree.tree_flatten(result)
        return leaves

    try:
        with torch.no_grad():
            kind = "real" if run else "fake"
            made = make_fx(on_flat, tracing_mode=kind, _allow_non_fake_inputs=not run)
            recorded = made(*flat)
    except Exception as error:  # whatever a stranger's program meets
        raise CaptureError(f"it cannot be recorded ({first_line(error)})") from error
    recorded.graph.eliminate_dead_code()
    recorded.recompile()
    return recorded, structure


def _compare(first: GraphModule, second: GraphModule) -> None:
    if first.code != second.code:
        raise CaptureError("it does other things for other values (a branch on a value?)")
    for node in first.graph.find_nodes(op="get_attr"):
        ours, theirs = (getattr(recorded, str(node.target)) for recorded in (first, second))
        if not isinstance(ours, Tensor):
            continue
        if isinstance(ours, nn.Parameter) or ours.requires_grad:
            raise CaptureError("it uses a Parameter that belongs to neither model nor guide")
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            raise CaptureError(
                "it holds numbers that change from run to run (Python's or numpy's generator, or "
                "copies of parameters?)"
            )


def perturbed(tensors: Sequence[Tensor], by: float = 1e-3) -> list[Tensor]:
    """Other values of the same shapes, near these; integers stay."""
    return [t + by * torch.randn_like(t) if t.is_floating_point() else t for t in tensors]


def permuted(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same rows in another order."""
    return [t.roll(1, 0) if t.dim() else t for t in tensors]


def _parts(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return list({id(part): part for module in modules for part in module.modules()}.values())


def _distinct(tensors: Any) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


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
        raise CaptureError(f"{sampling[0]} has PyroSample attributes, which need Pyro's context")
    try:
        for part, _ in before:
            vars(part)["_pyro_context"] = _Inert()
        yield
    finally:
        for part, context in before:
            vars(part)["_pyro_context"] = context


class _Substitute(Messenger):
    """Gives bare ``pyro.param`` statements other values than the store's."""

    def __init__(self, values: dict[str, Tensor], constraints: dict[str, Any]) -> None:
        super().__init__()
        self.values, self.constraints = values, constraints

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.values:
            value = self.values[msg["name"]]
            msg["value"] = transform_to(self.constraints[msg["name"]])(value)
            msg["done"] = msg["stop"] = True
