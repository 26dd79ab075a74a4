"""An optional choice between two BLAS libraries for each matrix product of a graph, by timing.

On a CPU, torch multiplies matrices with one BLAS library, which on some processors does not use
the widest instructions; oneDNN, which torch also contains, does. Which of the two is faster
depends on the processor and the shapes. The choice is made by a measurement and therefore is not
reproducible: the two libraries round differently, so results may differ in the last digits from
run to run. It is off by default.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

REPETITIONS = 7
"""Timed calls of each library per product; the first is a warm-up."""
MAX_TIME_RATIO = 0.95
"""oneDNN is selected if it takes less than this fraction of the default library's time."""
ATEN = torch.ops.aten


def select_fastest_matmul(graph: GraphModule) -> GraphModule:
    """Replace each float32 matrix product on a CPU by oneDNN's if that is faster, in place."""
    if not _onednn_available():
        return graph
    decisions: dict[Any, bool] = {}
    for node in graph.graph.nodes:
        if (operands := _match_matmul(node)) is None:
            continue
        bias, left, right = operands
        values = [factor.meta["val"] for factor in (left, right)]
        key = (*((v.shape, v.stride()) for v in values), bias is None)
        if key not in decisions:
            decisions[key] = _onednn_is_faster(values[0], values[1], bias is not None)
        if decisions[key]:
            node.target, node.args = _onednn_operator(), (left, right, bias)
            node.kwargs = {}
    graph.recompile()
    return graph


def _match_matmul(node: Node) -> tuple[Node | None, Node, Node] | None:
    """The (bias, left, right) of a float32 product on a CPU; None for any other node."""
    bias: Any = None
    if node.target is ATEN.mm.default:
        left, right = node.args
    elif node.target is ATEN.addmm.default and not node.kwargs:
        bias, left, right = node.args
    else:
        return None
    operands: Any = [operand for operand in (bias, left, right) if operand is not None]
    if not all(isinstance(op, Node) and _is_float32_cpu(op.meta.get("val")) for op in operands):
        return None
    if bias is not None and bias.meta["val"].dim() != 1:
        return None
    return bias, operands[-2], operands[-1]


def _is_float32_cpu(value: Any) -> bool:
    is_float32 = isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel() > 0
    return is_float32 and value.device.type == "cpu"


def _onednn_is_faster(left: Tensor, right: Tensor, has_bias: bool) -> bool:
    a, b = (torch.empty_strided(v.shape, v.stride()).normal_() for v in (left, right))
    c = a.new_zeros(b.shape[1])
    default = (lambda: torch.addmm(c, a, b)) if has_bias else (lambda: torch.mm(a, b))
    onednn = functools.partial(_onednn_operator(), a, b, c if has_bias else None)
    calls: tuple[Callable[[], Tensor], ...] = (default, onednn)
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(REPETITIONS):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(seconds[1][1:]) < MAX_TIME_RATIO * min(seconds[0][1:])


@functools.cache
def _onednn_available() -> bool:
    try:
        return torch.backends.mkldnn.is_available() and bool(_linear())
    except AttributeError:
        return False


def _linear() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default


def _onednn_operator() -> Any:
    return _registered_operator()[0]


@functools.cache
def _registered_operator() -> tuple[Any, Any]:
    # With a custom operator the compiler does not treat the right factor as a constant.
    library = torch.library.Library("ppl_vae", "FRAGMENT")
    tags = (torch.Tag.flexible_layout,)
    library.define("onednn_matmul(Tensor left, Tensor right, Tensor? bias) -> Tensor", tags=tags)
    linear = _linear()

    def multiply(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        return linear(left, right.t(), bias, "none", [], "")

    def empty_result(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        return left.new_empty(left.shape[0], right.shape[1])

    library.impl("onednn_matmul", multiply, "CPU")
    library.impl("onednn_matmul", empty_result, "Meta")
    return torch.ops.ppl_vae.onednn_matmul.default, library  # the operator exists while both do
