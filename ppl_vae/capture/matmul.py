"""Matrix products by the faster of two libraries, where a measurement says which that is.

On a CPU torch multiplies matrices by one BLAS library, which on some processors does not use
their widest instructions; oneDNN, which torch carries too, does. Which is faster depends on the
processor and the shape, so it is timed.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

REPETITIONS = 7
MARGIN = 0.95
"""The other library must take less than this share of the time: a call of it costs more."""
ATEN = torch.ops.aten


def with_fastest_products(recorded: GraphModule) -> GraphModule:
    """Recorded code with each float32 matrix product on a CPU by the library that is faster."""
    if not _there():
        return recorded
    faster: dict[Any, bool] = {}
    for node in recorded.graph.nodes:
        if (found := _product(node)) is None:
            continue
        bias, left, right = found
        values = [part.meta["val"] for part in (left, right)]
        key = (*((v.shape, v.stride()) for v in values), bias is None)
        if key not in faster:
            faster[key] = _is_faster(values[0], values[1], bias is not None)
        if faster[key]:
            node.target, node.args = _operator(), (left, right, bias)
            node.kwargs = {}
    recorded.recompile()
    return recorded


def _product(node: Node) -> tuple[Node | None, Node, Node] | None:
    """(bias, left, right) of a float32 product on a CPU."""
    bias: Any = None
    if node.target is ATEN.mm.default:
        left, right = node.args
    elif node.target is ATEN.addmm.default and not node.kwargs:
        bias, left, right = node.args
    else:
        return None
    parts: Any = [part for part in (bias, left, right) if part is not None]
    if not all(isinstance(part, Node) and _is_plain(part.meta.get("val")) for part in parts):
        return None
    if bias is not None and bias.meta["val"].dim() != 1:
        return None
    return bias, parts[-2], parts[-1]


def _is_plain(value: Any) -> bool:
    usual = isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel() > 0
    return usual and value.device.type == "cpu"


def _is_faster(left: Tensor, right: Tensor, has_bias: bool) -> bool:
    a, b = (torch.empty_strided(v.shape, v.stride()).normal_() for v in (left, right))
    c = a.new_zeros(b.shape[1])
    plain = (lambda: torch.addmm(c, a, b)) if has_bias else (lambda: torch.mm(a, b))
    other: Callable[[], Tensor] = lambda: _operator()(a, b, c if has_bias else None)  # noqa: E731
    times: tuple[list[float], list[float]] = [], []
    for _ in range(REPETITIONS):  # the first warms up
        for calls, kept in zip((plain, other), times, strict=True):
            begun = time.perf_counter()
            calls()
            kept.append(time.perf_counter() - begun)
    return min(times[1][1:]) < MARGIN * min(times[0][1:])


@functools.cache
def _there() -> bool:
    try:
        return torch.backends.mkldnn.is_available() and bool(_onednn())
    except AttributeError:
        return False


def _onednn() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default


def _operator() -> Any:
    return _library()[0]


@functools.cache
def _library() -> tuple[Any, Any]:
    # An operator of our own keeps the compiler from taking the right factor for a constant.
    library = torch.library.Library("ppl_vae", "FRAGMENT")
    flexible = (torch.Tag.flexible_layout,)
    library.define("product(Tensor left, Tensor right, Tensor? bias) -> Tensor", tags=flexible)
    multiply = _onednn()

    def product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        return multiply(left, right.t(), bias, "none", [], "")

    def shape(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        return left.new_empty(left.shape[0], right.shape[1])

    library.impl("product", product, "CPU")
    library.impl("product", shape, "Meta")
    return torch.ops.ppl_vae.product.default, library  # which lives as long as it is held
