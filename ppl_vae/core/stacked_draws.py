"""Separate runs of a pair, one per draw, presented as one run under a plate of samples.

A program that reads a global variable as one tensor (``F.linear(z, weight)``) cannot have a plate
of samples around it. It is run once per draw, and the traces are stacked.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Size, Tensor
from torch.distributions import constraints

from ppl_vae.core.traces import SAMPLE_PLATE, PairTraces, Site, free_dim, sites


class StackedDraws(TorchDistribution):
    """The distributions of a site in S runs as one, with the draws as its leftmost dimension.

    Args:
        parts: the distribution of each run.
        rank: the number of batch dimensions of the whole, that of the draws included.
    """

    def __init__(self, parts: Sequence[Any], rank: int) -> None:
        self.parts, first = list(parts), parts[0]
        unit = (1,) * (rank - 1 - len(first.batch_shape))
        batch_shape = Size((len(parts), *unit, *first.batch_shape))
        super().__init__(batch_shape, first.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether draws of each part have a gradient."""
        return all(part.has_rsample for part in self.parts)

    @property
    def support(self) -> constraints.Constraint | None:
        """The support of each part."""
        return self.parts[0].support

    @property
    def mean(self) -> Tensor:
        """The means."""
        return self.stack([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        """The variances."""
        return self.stack([part.variance for part in self.parts])

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """One draw of each part, differentiable where the part's is."""
        return self.stack([part(sample_shape) for part in self.parts])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """One draw of each part, without a gradient."""
        return self.rsample(sample_shape).detach()

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of each draw's value under its part."""
        values = value.expand(self.shape()).unbind(0)
        pairs = zip(self.parts, values, strict=True)
        shapes = [Size((*part.batch_shape, *part.event_shape)) for part in self.parts]
        return self.stack(
            [p.log_prob(v.reshape(s)) for (p, v), s in zip(pairs, shapes, strict=True)], event=0
        )

    def pairwise(self, other: "StackedDraws", function: Callable[[Any, Any], Tensor]) -> Tensor:
        """A function of the two distributions of each run, batch-shaped."""
        pairs = zip(self.parts, other.parts, strict=True)
        return self.stack([function(*pair) for pair in pairs], event=0)

    def stack(self, values: Sequence[Tensor], event: int | None = None) -> Tensor:
        """One tensor of the runs' values, whose last ``event`` dimensions are the event's."""
        event = len(self.event_shape) if event is None else event
        rank = len(self.batch_shape) - 1 + event
        return torch.stack([v.reshape((1,) * (rank - v.dim()) + v.shape) for v in values])


def stack_runs(runs: Sequence[PairTraces]) -> PairTraces:
    """The runs of single draws as one run under a plate of samples, left of all other plates."""
    first = runs[0]
    dim = free_dim(first)
    model = _stack_traces([run.model for run in runs], dim)
    guide = _stack_traces([run.guide for run in runs], dim)
    return PairTraces(model, guide, first.stated_num_data)


def _stack_traces(traces: Sequence[Trace], dim: int) -> Trace:
    stacked, found = Trace(), [sites(trace) for trace in traces]
    for name in found[0]:
        stacked.add_node(name, **_stack_sites([run[name] for run in found], dim))
    return stacked


def _stack_sites(found: Sequence[Site], dim: int) -> Site:
    fn = StackedDraws([site["fn"] for site in found], -dim)
    masks = [site["mask"] for site in found]
    if any(isinstance(mask, Tensor) for mask in masks):
        mask = fn.stack([torch.as_tensor(mask) for mask in masks], event=0)
    else:
        mask = masks[0]
    value = fn.stack([site["value"] for site in found])
    frame = CondIndepStackFrame(SAMPLE_PLATE, dim, len(found), 0)
    stack = (frame, *found[0]["cond_indep_stack"])
    return found[0] | {"fn": fn, "value": value, "mask": mask, "cond_indep_stack": stack}
