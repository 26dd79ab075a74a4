"""Pyro programs captured as graphs of tensor operations.

A function that runs a pair on given tensors is executed once under torch's tracer. The resulting
graph is a function of its arguments alone: Pyro's handlers are gone, and random draws remain
random draws. A function that is not pure (it reads the value of a tensor, branches on one, draws
with Python's or numpy's generator, or uses a parameter that belongs to neither program) is
detected by tracing it twice on different values and comparing the two graphs.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from ppl_vae.capture.simplify import simplify
from ppl_vae.core.state import validation, without_stacks


class CaptureError(Exception):
    """Raised when a function cannot be captured as a graph or compiled; the message says why."""


class CompilationError(CaptureError):
    """Raised when a captured graph cannot be compiled, so that it can only run as recorded."""


def summarize_error(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    if "_local_scalar_dense" in str(error):
        return "it reads a value of a tensor: .item(), float(), a branch on one"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors that a pair's programs read: those of modules and of Pyro's parameter store.

    Attributes:
        modules: the modules with parameters and buffers.
        constraints: the constraints of bare ``pyro.param`` statements, by name.
        parameters: the parameters of the modules, each once, followed by the bare ones;
            unconstrained.
        buffers: the buffers of the modules.
    """

    modules: list[nn.Module]
    constraints: dict[str, Any]
    parameters: list[Tensor]
    buffers: list[Tensor]

    @classmethod
    def of(cls, modules: Sequence[nn.Module], bare: Mapping[str, Tensor]) -> "ModuleTensors":
        """Collect the tensors of modules, and bare parameters of the store given by name."""
        parts = _submodules(modules)
        own = _distinct(p for part in parts for p in part._parameters.values())
        buffers = _distinct(b for part in parts for b in part._buffers.values())
        stored = pyro.get_param_store()._constraints
        constraints = {name: stored[name] for name in bare}
        return cls(list(modules), constraints, [*own, *bare.values()], buffers)

    @contextmanager
    def substituted(
        self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> Iterator[None]:
        """Context manager: programs read these values in place of their own.

        The parameter store is empty inside, and what programs register there is discarded.

        Args:
            parameters: values in the order of :attr:`parameters`.
            buffers: values in the order of :attr:`buffers`.
        """
        bare = parameters[len(parameters) - len(self.constraints) :]
        values = dict(zip(map(id, self.parameters), parameters, strict=True))
        values |= dict(zip(map(id, self.buffers), buffers, strict=True))
        stored = dict(zip(self.constraints, bare, strict=True))
        empty_store: Any = {"params": {}, "constraints": {}}
        with ExitStack() as stack:
            for context in (
                pyro.get_param_store().scope(empty_store),
                validation(False),
                _module_tensors_replaced(self.modules, values),
                _parameter_store_bypassed(self.modules),
                _ParamSubstitution(stored, self.constraints),
            ):
                stack.enter_context(context)
            yield


def store_parameters(modules: Sequence[nn.Module], run: Callable[[], Any]) -> dict[str, Tensor]:
    """Parameters of Pyro's store that a run reads and no module holds, by name; unconstrained."""
    own = {id(p) for module in modules for p in module.parameters()}
    with torch.no_grad(), poutine.trace(param_only=True) as touched:
        run()
    stored = dict(pyro.get_param_store().named_parameters())
    names = touched.trace.nodes.keys() & stored.keys()
    return {name: stored[name] for name in sorted(names) if id(stored[name]) not in own}


def capture_graph(
    function: Callable[..., Any], args: Any, other_args: Any
) -> tuple[GraphModule, Any]:
    """Capture a function as a graph for arguments of these shapes.

    Args:
        function: a function from nested tuples and lists of tensors to the same.
        args: its arguments.
        other_args: arguments of the same shapes and other values, for which the function must
            perform the same operations.

    Returns:
        The graph, from the flat list of argument tensors to the flat list of result tensors; and
        the tree structure of the results.

    Raises:
        CaptureError: if the function is not pure.
    """
    first, structure = trace_graph(function, args)
    random.random()  # advance the other generators, so that numbers drawn with them differ
    np.random.random()
    _check_equal_graphs(first, trace_graph(function, other_args)[0])
    return first, structure


def trace_graph(
    function: Callable[..., Any], args: Any, *, execute: bool = True
) -> tuple[GraphModule, Any]:
    """Trace a function that is known to be pure; returns the same as :func:`capture_graph`.

    Args:
        function, args: as for :func:`capture_graph`.
        execute: whether to compute with the tensors. A function made of graphs needs only their
            shapes, and no memory for what it computes.
    """
    flat, nested = pytree.tree_flatten(args)
    structure: Any = None

    def flat_function(*tensors: Tensor) -> list[Tensor]:
        nonlocal structure
        result = function(*pytree.tree_unflatten(tensors, nested))
        leaves, structure = pytree.tree_flatten(result)
        return leaves

    try:
        with torch.no_grad(), without_stacks():
            tracing_mode = "real" if execute else "fake"
            graph = make_fx(
                flat_function, tracing_mode=tracing_mode, _allow_non_fake_inputs=not execute
            )(*flat)
    except Exception as error:  # a user's program may raise anything
        raise CaptureError(f"it cannot be captured ({summarize_error(error)})") from error
    _remove_aliases(graph)
    simplify(graph)
    return graph, structure


ALIASES = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)


def _remove_aliases(graph: GraphModule) -> None:
    # Autograd's bookkeeping: the same tensor under another name, at the cost of an operation.
    for node in list(graph.graph.nodes):
        if node.target in ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _check_equal_graphs(first: GraphModule, second: GraphModule) -> None:
    if first.code != second.code:
        raise CaptureError(
            "its operations or constants change from run to run (a branch on a value, or numbers "
            "from Python's or numpy's generator?)"
        )
    for node in first.graph.find_nodes(op="get_attr"):
        constant, other = (getattr(graph, str(node.target)) for graph in (first, second))
        if isinstance(constant, Tensor):
            _check_equal_constants(constant, other)


def _check_equal_constants(constant: Tensor, other: Tensor) -> None:
    if isinstance(constant, nn.Parameter) or constant.requires_grad:
        raise CaptureError("it uses a Parameter that belongs to neither model nor guide")
    if constant.shape != other.shape or not torch.equal(constant, other):
        raise CaptureError(
            "it contains numbers that change from run to run (from Python's or numpy's "
            "generator, or copies of parameters?)"
        )


def perturbed(tensors: Sequence[Tensor], scale: float = 1e-3) -> list[Tensor]:
    """The tensors plus Gaussian noise of this scale; integer tensors are unchanged."""
    return [t + scale * torch.randn_like(t) if t.is_floating_point() else t for t in tensors]


def permuted(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with their rows in another order."""
    return [t.roll(1, 0) if t.dim() else t for t in tensors]


def _submodules(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return list({id(part): part for module in modules for part in module.modules()}.values())


def _distinct(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


@contextmanager
def _module_tensors_replaced(
    modules: Sequence[nn.Module], values: Mapping[int, Tensor]
) -> Iterator[None]:
    """Context manager: modules hold other tensors in place of their own.

    The tracer records operations on the tensors that the function is given. Therefore modules
    must compute with these and not with their parameters, which would become constants of the
    graph. ``torch.func.functional_call`` does this for one module; here several modules may
    share tensors, and plain tensors must take the place of Parameters, which assignment to an
    attribute of a module refuses. So the modules' dictionaries are written to, and restored.

    Args:
        modules: the modules, with their submodules.
        values: the new tensors, by the ``id`` of the tensor to replace; a tensor that several
            modules share is replaced in each of them.
    """
    slots = [
        (tensors, name, tensor)
        for part in _submodules(modules)
        for tensors in (part._parameters, part._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and id(tensor) in values
    ]
    try:
        for tensors, name, tensor in slots:
            tensors[name] = values[id(tensor)]  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for tensors, name, tensor in slots:
            tensors[name] = tensor  # pyright: ignore[reportArgumentType]


class _NullContext:
    """A stand-in for the context object of a ``PyroModule`` that is never active.

    See :func:`_parameter_store_bypassed`. The attributes are those that Pyro reads.
    """

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
def _parameter_store_bypassed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Context manager: ``PyroModule`` attributes are read directly, not from the parameter store.

    While a method of a ``PyroModule`` runs as a program, reading a constrained parameter of the
    module registers the unconstrained tensor in Pyro's global store and returns the value that
    the store keeps under that name. Under the tracer these are the temporary tensors that
    :func:`_module_tensors_replaced` has put there: they must neither enter the store, which
    would turn them into Parameters, nor be looked up in it. A ``PyroModule`` does so only while
    its context object is active. With an inactive one it applies the constraint to the tensor
    that it holds, which is the same value.

    Raises:
        CaptureError: if a module has ``PyroSample`` attributes, which are sample sites only
            while that context is active.
    """
    parts = [part for part in _submodules(modules) if isinstance(part, PyroModule)]
    contexts = [(part, part._pyro_context) for part in parts]
    if sampling := [type(p).__name__ for p in parts if getattr(p, "_pyro_samples", None)]:
        raise CaptureError(f"{sampling[0]} has PyroSample attributes, which need Pyro's context")
    try:
        for part in parts:
            vars(part)["_pyro_context"] = _NullContext()
        yield
    finally:
        for part, context in contexts:
            vars(part)["_pyro_context"] = context


class _ParamSubstitution(Messenger):
    """A handler that makes bare ``pyro.param`` statements return given values.

    Parameters of no module exist only in Pyro's store, which is empty during tracing; without
    this handler the statements would create them again from their initial values.

    Args:
        values: unconstrained values by parameter name.
        constraints: the constraints of these parameters.
    """

    def __init__(self, values: Mapping[str, Tensor], constraints: Mapping[str, Any]) -> None:
        super().__init__()
        self.values, self.constraints = values, constraints

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.values:
            value = self.values[msg["name"]]
            msg["value"] = transform_to(self.constraints[msg["name"]])(value)
            msg["done"] = msg["stop"] = True
