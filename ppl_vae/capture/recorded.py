"""Recorded operations as a function that performs them with little work between them.

A graph calls each operation through torch's dispatcher of operators by name, which takes longer
than a method of a tensor that performs the same operation. For small tensors, calls take most of
the time.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae.capture.graph_values import CREATED, Aliases


def recorded_function(
    graph: GraphModule, flat: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """The function of a graph, with the same numbers.

    Tensors that do not depend on the arguments are computed once. Operations are called as
    methods of tensors or functions of torch, where these perform the operation and no other.

    Args:
        graph: a graph of tensor operations, which is left as it is.
        flat: arguments of the shapes that the function will be called with.
    """
    graph = GraphModule(graph, copy.deepcopy(graph.graph))
    run = _ObservedRun(graph)
    run.run(*flat)
    for number, (node, value) in enumerate(run.constants.items()):
        name = f"_recorded_constant_{number}"
        graph.register_buffer(name, value)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(name))
    graph.graph.eliminate_dead_code()  # before methods that write could be taken for dead code
    for node in graph.graph.nodes:
        node.op, node.target = run.calls.get(node, (node.op, node.target))
    graph.recompile()
    forward = graph.forward
    return lambda tensors: forward(*tensors)


class _ObservedRun(Interpreter):
    """A run of a graph that finds what need not be computed again, and how to call the rest.

    Attributes:
        constants: the tensors that do not depend on arguments and are never written to.
        calls: the kind of a node and its target that call the same operation in less time.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.aliases = Aliases(graph.graph)
        self.constants: dict[Node, Tensor] = {}
        self.calls: dict[Node, tuple[str, Any]] = {}

    def run_node(self, n: Node) -> Any:
        """Run a node, and observe how it can be called."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = None
        for kind, target, call in _other_calls(n):
            result = _result_of_same_operation(n.target, call, args, kwargs)
            if result is not None:
                self.calls[n] = kind, target
                break
        if result is None:
            result = super().run_node(n)
        if isinstance(result, Tensor) and self._is_constant(n):
            self.constants[n] = result
        return result

    def _is_constant(self, node: Node) -> bool:
        if not self.aliases.is_repeatable(node) or self.aliases.is_returned(node):
            return False
        return node.target in CREATED or (
            bool(node.all_input_nodes) and all(n in self.constants for n in node.all_input_nodes)
        )


def _other_calls(node: Node) -> list[tuple[str, Any, Callable[..., Any]]]:
    """Calls that may perform the operation of a node: the kind, the target, what is called."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    name = node.target._schema.name.split("::")[1]
    found: list[tuple[str, Any, Callable[..., Any]]] = []
    if node.args and isinstance(node.args[0], Node) and hasattr(Tensor, name):
        found.append(
            ("call_method", name, lambda first, *rest, **k: getattr(first, name)(*rest, **k))
        )
    function = getattr(torch, name, None)
    if callable(function):
        found.append(("call_function", function, function))
    return found


class _Performed(TorchDispatchMode):
    """Notes the operations that are performed."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(func)
        return func(*args, **(kwargs or {}))


def _result_of_same_operation(
    operation: Any, call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """The result of a call; None if it performs another operation."""
    with _Performed() as performed:
        try:
            result = call(*args, **kwargs)
        except (TypeError, RuntimeError):  # it takes other arguments
            return None
    return result if performed.operations == [operation] else None
