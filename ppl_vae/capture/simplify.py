"""Graphs of recorded operations without those that compute nothing new; no number changes.

What an eager step costs, apart from matrix products, is mostly the operations on tensors of the
size of a batch, and the calls of small ones. Many of them copy their argument, divide by the
scale one of a prior, repeat an operation, or compute the same number for each element of a tensor
that was expanded to that size.
"""

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ppl_vae.capture.graph_values import Aliases, layout_of, uniform_numbers, value_of

ATEN = torch.ops.aten
RESHAPED = (ATEN.view.default, ATEN.expand.default)
"""Operations that change nothing if the shape is the same."""
INVERSE_OF_ITSELF = (ATEN.t.default, ATEN.neg.default)
ROUNDED_ALIKE = (
    ATEN.add.Tensor,
    ATEN.sub.Tensor,
    ATEN.mul.Tensor,
    ATEN.mul.Scalar,
    ATEN.div.Tensor,
    ATEN.div.Scalar,
    ATEN.neg.default,
    ATEN.log.default,
)
"""Operations on single elements whose rounding does not depend on how elements are grouped."""
ELEMENTWISE = (*ROUNDED_ALIKE, ATEN.pow.Tensor_Scalar, ATEN.exp.default)
"""Operations on single elements, which take expanded tensors as they take others."""
TENSOR_FORMS = {ATEN.mul.Scalar: ATEN.mul.Tensor, ATEN.div.Scalar: ATEN.div.Tensor}
"""The operation that torch performs for another one."""
NEUTRAL = {
    ATEN.mul.Tensor: 1.0,
    ATEN.div.Tensor: 1.0,
    ATEN.pow.Tensor_Scalar: 1.0,
    ATEN.sub.Tensor: 0.0,
}
"""The second operand with which an operation returns its first one, signed zeros included."""


def simplify(graph: GraphModule) -> None:
    """Remove operations without changing a number, in place."""
    aliases = Aliases(graph.graph)
    numbers = uniform_numbers(graph.graph, aliases)
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        target: Any = node.target
        node.target = TENSOR_FORMS.get(target, target)
        source = _unchanged(node, aliases, numbers)
        if source is not None:
            _replace(graph, node, source)
        elif _can_precede_expansion(node):
            _move_before_expansion(graph, node)
    _merge_repeated(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _replace(graph: GraphModule, node: Node, source: Node) -> None:
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)


def _merge_repeated(graph: GraphModule) -> None:
    """Let operations with the same arguments be performed once."""
    aliases, found = Aliases(graph.graph), dict[Any, Node]()
    for node in list(graph.graph.nodes):
        is_cheap = node.target in ELEMENTWISE or aliases.is_view(node)
        if node.op != "call_function" or not is_cheap or not aliases.is_repeatable(node):
            continue
        first = found.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if first is not node and aliases.share(node, first):
            _replace(graph, node, first)


def _unchanged(node: Node, aliases: Aliases, numbers: dict[Node, float]) -> Node | None:
    """The tensor that the result of an operation repeats; None if there is none."""
    if not node.args or not isinstance(source := node.args[0], Node):
        return None
    if node.target in INVERSE_OF_ITSELF and source.target is node.target:
        twice = source.args[0]
        if not isinstance(twice, Node) or layout_of(twice) != layout_of(node):
            return None
        return twice if aliases.share(node, twice) else None
    if layout_of(source) is None or layout_of(source) != layout_of(node):
        return None
    if node.target in RESHAPED:
        return source
    return source if _is_neutral(node, numbers) and aliases.share(node, source) else None


def _is_neutral(node: Node, numbers: dict[Node, float]) -> bool:
    """Whether the second operand of an operation does not change the first one."""
    target: Any = node.target
    if target not in NEUTRAL or node.kwargs:
        return False
    other = node.args[1]
    number = numbers.get(other) if isinstance(other, Node) else other
    if not isinstance(number, int | float) or math.copysign(1, number) < 0:  # x - (-0) is x + 0
        return False
    return number == NEUTRAL[target]


def _can_precede_expansion(node: Node) -> bool:
    is_product = node.target is ATEN.pow.Tensor_Scalar and node.args[1] in (1, 2)
    is_alike = is_product or node.target in ROUNDED_ALIKE
    if not is_alike or node.kwargs or not _is_floating(node):
        return False
    operands = [operand for operand in node.args if isinstance(operand, Node)]
    if not operands or not all(_expanded_source(operand) for operand in operands):
        return False
    return all(user.target in ELEMENTWISE for user in node.users)


def _is_floating(node: Node) -> bool:
    operands = [node, *(operand for operand in node.args if isinstance(operand, Node))]
    values = [value_of(operand) for operand in operands]
    first = values[0]
    return first is not None and all(
        v is not None and v.is_floating_point() and v.dtype == first.dtype for v in values
    )


def _expanded_source(node: Node) -> Node | None:
    """The tensor of the same number of dimensions, or of none, that an expansion repeats."""
    source = node.args[0] if node.args else None
    if node.target is not ATEN.expand.default or not isinstance(source, Node):
        return None
    before, after = value_of(source), value_of(node)
    if before is None or after is None or before.dim() not in (0, after.dim()):
        return None
    return source


def _move_before_expansion(graph: GraphModule, node: Node) -> None:
    before = node.meta["val"]
    operands = [_expanded_source(a) if isinstance(a, Node) else a for a in node.args]
    shapes = [operand.meta["val"].shape for operand in operands if isinstance(operand, Node)]
    value = torch.empty(torch.broadcast_shapes(*shapes), dtype=before.dtype, device="meta")
    if value.numel() == before.numel():
        return
    with graph.graph.inserting_before(node):
        small: Node = graph.graph.call_function(node.target, tuple(operands))  # pyright: ignore[reportArgumentType]
        shape = list(before.shape)
        expanded: Node = graph.graph.call_function(ATEN.expand.default, (small, shape))
    small.meta["val"], expanded.meta["val"] = value, value.expand(shape)
    node.replace_all_uses_with(expanded)
    graph.graph.erase_node(node)
