"""What a recorded graph must not contain for an accelerator to replay it, as a CUDA graph.

A CUDA graph replays kernels with fixed addresses and shapes. The host takes no part: it can read
no value, copy nothing between devices, make no tensor and choose no shape.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ppl_vae.capture.graph import CaptureError

READING = {"_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq"}
"""Operations that read whether they succeeded; tags of torch mark those that read other values."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def graph_obstacles(graph: GraphModule, device: torch.device) -> list[str]:
    """The reasons why a graph cannot be replayed by a device alone, each with its operation.

    Args:
        graph: recorded on tensors of the device.
        device: the device.
    """
    found = [reason for node in graph.graph.nodes for reason in _obstacles(graph, node, device)]
    return list(dict.fromkeys(found))


def move_constants(graph: GraphModule) -> None:
    """Let a graph hold the constants that it copies to the device on the device.

    ``Normal(loc, 1.0)`` makes a tensor of 1.0 on the CPU and copies it, in each run anew.
    """
    copies = [(node, _constant_of(graph, node)) for node in graph.graph.nodes]
    for number, (node, constant) in enumerate(copies):
        if constant is None:
            continue
        name = f"_device_constant{number}"
        graph.register_buffer(name, node.target(constant, **node.kwargs), persistent=False)
        with graph.graph.inserting_before(node):
            held = graph.graph.get_attr(name)
            # A copy, since operations of the graph may write to it.
            copied = graph.graph.call_function(torch.ops.aten.clone.default, (held,))
        copied.meta = held.meta = dict(node.meta)
        node.replace_all_uses_with(copied)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _constant_of(graph: GraphModule, node: Node) -> Tensor | None:
    """The tensor on the CPU that a node copies to the device; None for other nodes."""
    if node.target is not torch.ops.aten._to_copy.default or node.kwargs.get("device") is None:
        return None
    source: Any = node.args[0]
    while source.target is torch.ops.aten.lift_fresh_copy.default:
        source = source.args[0]
    value = getattr(graph, str(source.target)) if source.op == "get_attr" else None
    return value if isinstance(value, Tensor) and value.device.type == "cpu" else None


def check_graph(graph: GraphModule, device: torch.device) -> None:
    """Check that a graph can be replayed by an accelerator alone.

    Raises:
        CaptureError: with the reasons.
    """
    if reasons := graph_obstacles(graph, device):
        raise CaptureError(f"a {device.type} cannot replay it alone: {'; '.join(reasons)}")


def _obstacles(graph: GraphModule, node: Node, device: torch.device) -> Iterator[str]:
    if node.op == "get_attr":
        value = getattr(graph, str(node.target))
        if isinstance(value, Tensor) and value.dim() and value.device.type != device.type:
            yield f"it holds a tensor of shape {tuple(value.shape)} on the {value.device.type}"
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    name = node.target.overloadpacket.__name__
    tags = node.target.tags
    dynamic = _has_mask(node) if name in INDEXING else torch.Tag.dynamic_output_shape in tags
    if dynamic:
        yield f"the shape of {name}'s result depends on values"
    elif torch.Tag.data_dependent_output in tags or name in READING:
        yield f"{name} reads values on the host"
    asked: Any = node.kwargs.get("device")
    if asked is None:
        return
    there = torch.device(asked).type
    sources = {_device_type(source) for source in node.all_input_nodes} - {there, None}
    if sources:
        yield f"{name} copies from {sources.pop()} to {there}"
    elif there == device.type:
        return
    else:
        yield f"{name} makes a tensor on the {there}; pass device="


def _device_type(node: Node) -> str | None:
    value = node.meta.get("val")
    return value.device.type if isinstance(value, Tensor) else None


def _has_mask(node: Node) -> bool:
    indices: Any = node.args[1]
    values = [i.meta.get("val") for i in indices if isinstance(i, Node)]
    return any(v is not None and v.dtype in (torch.bool, torch.uint8) for v in values)
