"""Graphs of recorded operations without those that compute nothing new; no number changes.

What an eager step costs, apart from matrix products, is mostly the operations on tensors of the
size of a batch. Many of them copy their argument, or compute the same number for each element of a
tensor that was expanded to that size.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

ATEN = torch.ops.aten
RESHAPED = (ATEN.view.default, ATEN.expand.default)
"""Operations that change nothing if the shape is the same."""
ROUNDED_ALIKE = (
    ATEN.add.Tensor,
    ATEN.sub.Tensor,
    ATEN.mul.Tensor,
    ATEN.mul.Scalar,
    ATEN.div.Tensor,
    ATEN.div.Scalar,
    ATEN.neg.default,
)
"""Operations on single elements whose rounding does not depend on how elements are grouped."""
ELEMENTWISE = (*ROUNDED_ALIKE, ATEN.pow.Tensor_Scalar, ATEN.log.default, ATEN.exp.default)
"""Operations on single elements, which take expanded tensors as they take others."""


def simplify(graph: GraphModule) -> None:
    """Remove operations without changing a number, in place."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        source = _unchanged(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
        elif _can_precede_expansion(node):
            _move_before_expansion(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _unchanged(node: Node) -> Node | None:
    """The tensor that the result of an operation repeats; None if there is none."""
    if not node.args or not isinstance(source := node.args[0], Node):
        return None
    if node.target is ATEN.t.default and source.target is ATEN.t.default:
        twice = source.args[0]
        return twice if isinstance(twice, Node) else None
    before, after = _value(source), _value(node)
    if before is None or after is None or before.shape != after.shape:
        return None
    same_layout = before.stride() == after.stride() and before.dtype == after.dtype
    if not same_layout:
        return None
    return source if node.target in RESHAPED or _is_neutral_copy(node, source) else None


def _is_neutral_copy(node: Node, source: Node) -> bool:
    """Whether an operation multiplies by one, or raises to it, and its copy is not needed."""
    targets = (ATEN.mul.Tensor, ATEN.mul.Scalar, ATEN.pow.Tensor_Scalar)
    number = node.args[1] if node.target in targets else None
    if not isinstance(number, int | float) or number != 1:
        return False
    return all(map(_makes_new_tensors, (source, *source.users, *node.users)))


def _makes_new_tensors(node: Node) -> bool:
    """Whether an operation neither writes to its arguments nor returns a part of them."""
    schema = getattr(node.target, "_schema", None)  # of operations, but not of inputs and outputs
    return schema is not None and not any(
        each.alias_info is not None for each in (*schema.arguments, *schema.returns)
    )


def _can_precede_expansion(node: Node) -> bool:
    square = node.target is ATEN.pow.Tensor_Scalar and node.args[1] == 2
    if not (square or node.target in ROUNDED_ALIKE) or node.kwargs or not _is_floating(node):
        return False
    operands = [operand for operand in node.args if isinstance(operand, Node)]
    if not operands or not all(_expanded_source(operand) for operand in operands):
        return False
    return all(user.target in ELEMENTWISE for user in node.users)


def _is_floating(node: Node) -> bool:
    operands = [node, *(operand for operand in node.args if isinstance(operand, Node))]
    values = [_value(operand) for operand in operands]
    first = values[0]
    return first is not None and all(
        v is not None and v.is_floating_point() and v.dtype == first.dtype for v in values
    )


def _expanded_source(node: Node) -> Node | None:
    """The tensor of the same number of dimensions, or of none, that an expansion repeats."""
    source = node.args[0] if node.args else None
    if node.target is not ATEN.expand.default or not isinstance(source, Node):
        return None
    before, after = _value(source), _value(node)
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


def _value(node: Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None
