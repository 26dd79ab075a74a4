"""What is known of the tensors of a graph without running it: layouts, memory, single numbers."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

ATEN = torch.ops.aten
CREATED = {
    ATEN.new_zeros.default: 0.0,
    ATEN.new_ones.default: 1.0,
    ATEN.zeros_like.default: 0.0,
    ATEN.ones_like.default: 1.0,
    ATEN.zeros.default: 0.0,
    ATEN.ones.default: 1.0,
}
"""Operations that make a tensor of one number."""


def value_of(node: Node) -> Tensor | None:
    """The tensor that was computed when the graph was recorded."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def layout_of(node: Node) -> tuple[Any, ...] | None:
    """Shape, strides and dtype."""
    value = value_of(node)
    return None if value is None else (value.shape, value.stride(), value.dtype)


class Aliases:
    """Which tensors of a graph share memory, and which memory is written to.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: Graph) -> None:
        self._parents: dict[Node, Node] = {}
        for node in graph.nodes:
            for argument in _aliased_arguments(node):
                self._join(node, argument)
        self._written = {self._memory(a) for node in graph.nodes for a in _written_arguments(node)}
        self._given = {self._memory(node) for node in graph.nodes if node.op == "placeholder"}
        outputs = [a for node in graph.nodes if node.op == "output" for a in node.all_input_nodes]
        self._returned = {self._memory(node) for node in outputs}

    def is_written(self, node: Node) -> bool:
        """Whether some operation writes to the memory of a tensor."""
        return self._memory(node) in self._written

    def is_returned(self, node: Node) -> bool:
        """Whether a result of the graph shares the memory of a tensor."""
        return self._memory(node) in self._returned

    def is_view(self, node: Node) -> bool:
        """Whether an operation returns a view of its argument."""
        return bool(_aliased_arguments(node)) and not _written_arguments(node)

    def is_repeatable(self, node: Node) -> bool:
        """Whether an operation gives the same numbers for the same arguments at any time."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or _written_arguments(node):
            return False
        is_random = torch.Tag.nondeterministic_seeded in target.tags
        return not is_random and not any(map(self.is_written, (node, *node.all_input_nodes)))

    def share(self, node: Node, source: Node) -> bool:
        """Whether a tensor may take the place of another one with the same numbers; then it does.

        Not if one of them is written to, nor if a result would then share the memory of an
        argument or of another result.

        Args:
            node: the tensor that is replaced.
            source: the tensor that takes its place.
        """
        memory, other = self._memory(node), self._memory(source)
        if memory is other:  # two views of the same elements
            return True
        if self.is_written(node) or self.is_written(source):
            return False
        if memory in self._returned and other in self._given | self._returned:
            return False
        self._join(node, source)
        for kind in (self._given, self._returned):
            if memory in kind or other in kind:
                kind.add(self._memory(node))
        return True

    def _memory(self, node: Node) -> Node:
        while node in self._parents:
            node = self._parents[node]
        return node

    def _join(self, node: Node, other: Node) -> None:
        first, second = self._memory(node), self._memory(other)
        if first is not second:
            self._parents[first] = second


def _schema_arguments(node: Node) -> list[tuple[Any, Any]]:
    schema = getattr(node.target, "_schema", None)  # of operations, but not of inputs and outputs
    if schema is None:
        return []
    named = [(a, node.kwargs.get(a.name)) for a in schema.arguments[len(node.args) :]]
    return [*zip(schema.arguments, node.args, strict=False), *named]


def _nodes_in(value: Any) -> list[Node]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, Node)]


def _aliased_arguments(node: Node) -> list[Node]:
    if node.target is operator.getitem:
        return _nodes_in(node.args[0])
    pairs = _schema_arguments(node)
    return [each for a, value in pairs if a.alias_info is not None for each in _nodes_in(value)]


def _written_arguments(node: Node) -> list[Node]:
    pairs = _schema_arguments(node)
    return [
        each
        for a, value in pairs
        if a.alias_info is not None and a.alias_info.is_write
        for each in _nodes_in(value)
    ]


def uniform_numbers(graph: Graph, aliases: Aliases) -> dict[Node, float]:
    """The tensors all of whose elements are one number, which the graph states, and the number."""
    found: dict[Node, float] = {}
    for node in graph.nodes:
        if aliases.is_written(node):
            continue
        target, first = node.target, node.args[0] if node.args else None
        if target in CREATED:
            found[node] = CREATED[target]
        elif isinstance(first, Node) and first in found and aliases.is_view(node):
            found[node] = found[first]
    return found
