"""Graphs of recorded operations are simplified without a change of any number."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae.capture.graph import trace_graph
from ppl_vae.capture.recorded import recorded_function
from ppl_vae.core.state import seeded

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


def standardised(x, scale):
    zeros, ones = x.new_zeros(5), torch.ones_like(x)
    return (x - zeros) / ones + x.neg().neg(), (x - zeros).exp() * 1, x - (-zeros)


def repeated(x, scale):
    return (x * scale).exp() + (x * scale).sin(), (x * 2).t().exp(), (x * 2).t().log()


def written_constants(x, scale):
    ones, shifts = torch.ones_like(x), x.new_zeros(5)
    ones.add_(1)
    shifts.view(5, 1).add_(2)
    return x / ones, x - shifts


def draws(x, scale):
    return torch.randn_like(x) - torch.randn_like(x), torch.ones_like(x).normal_() * x


FUNCTIONS = [
    scaled_squares,
    written_copy,
    written_source,
    returned_copy,
    shifted_scale,
    standardised,
    repeated,
    written_constants,
    draws,
]


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_numbers_and_layouts_are_those_of_the_function(function):
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(SIZES, generator=generator), torch.tensor(0.3)
    x[0, 0], x[0, 1] = -0.0, torch.inf
    graph, _ = trace_graph(function, (x.clone(), scale))
    kept = x.clone()
    with seeded(1):
        expected = function(x.clone(), scale)
    run = recorded_function(graph, [x, scale])
    for call in (lambda: graph(x, scale), lambda: run([x, scale]), lambda: run([x, scale])):
        with seeded(1):
            found = call()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(bits(one), bits(other)) and one.stride() == other.stride()
            assert one.data_ptr() != x.data_ptr()
    assert torch.equal(x, kept)


def bits(values):
    return values.contiguous().view(torch.int32)  # which distinguish the signs of zeros


def test_operations_on_expanded_tensors_round_as_on_their_sources():
    values = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 10
    for value in values:
        wide = value.expand(SIZES)
        for one, other in ((value.log(), wide.log()), (value**2, wide**2), (value / 3, wide / 3)):
            assert torch.equal(one.expand(SIZES), other)


def test_priors_of_mean_zero_and_scale_one_and_repetitions_cost_nothing():
    x, scale = torch.randn(SIZES), torch.tensor(0.3)
    graph, _ = trace_graph(standardised, (x, scale))
    assert targets(graph).count(ATEN.div.Tensor) == targets(graph).count(ATEN.mul.Tensor) == 0
    graph, _ = trace_graph(repeated, (x, scale))
    assert targets(graph).count(ATEN.mul.Tensor) == 2 and targets(graph).count(ATEN.t.default) == 1


def test_recorded_functions_call_methods_and_compute_constants_once():
    def function(x, scale):
        zeros = x.new_zeros(5)
        return ATEN.threshold_backward(x, scale * x + zeros.exp().sum(), 0), torch.rand(2)

    graph, _ = trace_graph(function, (torch.randn(SIZES), torch.tensor(0.3)))
    called = Counter()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called[func] += 1
            return func(*args, **(kwargs or {}))

    run = recorded_function(graph, [torch.randn(SIZES), torch.tensor(0.3)])
    with Counted():
        first, second = (run([torch.randn(SIZES), torch.tensor(0.3)]) for _ in range(2))
    assert called[ATEN.exp.default] == called[ATEN.new_zeros.default] == 0
    assert called[ATEN.threshold_backward.default] == called[ATEN.rand.default] == 2
    assert not torch.equal(first[1], second[1])


def test_repeated_numbers_are_computed_once():
    graph, _ = trace_graph(scaled_squares, (torch.randn(SIZES), torch.tensor(0.3)))
    found = targets(graph)
    assert ATEN.t.default not in found and ATEN.view.default not in found
    sizes = {
        node.target: node.meta["val"].numel() for node in graph.graph.nodes if "val" in node.meta
    }
    assert sizes[ATEN.neg.default] == 1 and sizes[ATEN.div.Tensor] == 30
