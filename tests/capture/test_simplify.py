"""Graphs of recorded operations are simplified without a change of any number."""

import pytest
import torch

from ppl_vae.capture.graph import trace_graph

ATEN = torch.ops.aten
SIZES = 6, 5


def scaled_squares(x, scale):
    scales = scale.exp().expand(SIZES)
    variances = (-(scales**2)) * 2
    return (x - 1) ** 2 / variances - scales.log(), (x * 2 * 1).t().t().view(SIZES)


def written_copy(x, scale):
    copied = x.add(scale) * 1
    copied.add_(1)
    return copied, x.add(scale)


def written_source(x, scale):
    shifted = x.add(scale)
    copied = shifted * 1
    shifted.view(-1).add_(1)
    return copied, shifted


def returned_copy(x, scale):
    return x * 1, scale.expand(SIZES) * 2


def shifted_scale(x, scale):
    return x.sum(0, keepdim=True).expand(SIZES).mul(scale.expand(SIZES)).add(x), scale.neg()


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "function", [scaled_squares, written_copy, written_source, returned_copy, shifted_scale]
)
def test_numbers_and_layouts_are_those_of_the_function(function):
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(SIZES, generator=generator), torch.tensor(0.3)
    graph, _ = trace_graph(function, (x.clone(), scale))
    kept = x.clone()
    for found, expected in zip(graph(x, scale), function(x.clone(), scale), strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()
        assert found.data_ptr() != x.data_ptr()
    assert torch.equal(x, kept)


def test_repeated_numbers_are_computed_once():
    graph, _ = trace_graph(scaled_squares, (torch.randn(SIZES), torch.tensor(0.3)))
    found = targets(graph)
    assert ATEN.t.default not in found and ATEN.view.default not in found
    sizes = {
        node.target: node.meta["val"].numel() for node in graph.graph.nodes if "val" in node.meta
    }
    assert sizes[ATEN.neg.default] == 1 and sizes[ATEN.div.Tensor] == 30
