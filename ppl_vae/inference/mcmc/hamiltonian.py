"""Chains of Pyro's NUTS for a density of one real vector, with its gradient captured as a
graph."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.infer import NUTS
from torch import Tensor
from torch.fx import GraphModule

from ppl_vae.capture.compiled import CompiledFunction
from ppl_vae.capture.graph import CaptureError, capture_graph
from ppl_vae.core.state import threads, validation
from ppl_vae.inference.mcmc.settings import ChainSettings

MIN_COMPILED_ITERATIONS = 1000
"""The least number of iterations of all chains for which compiling takes less time than it saves:
10 seconds of compiling against a millisecond per gradient and 10 gradients per iteration."""
MAX_DENSE_SIZE = 100
"""The largest number of coordinates for which the mass matrix is dense."""

LogDensity: TypeAlias = Callable[[Tensor], Tensor]
"""A function from a position, (P,), to the logarithm of a density, ()."""
DensityAndGradient: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function from a position, (P,), to the logarithm of a density, (), and its gradient, (P,)."""
Starts: TypeAlias = Float[Tensor, "C P"]
"""The first position of each chain."""
IterationCallback: TypeAlias = Callable[[int, float], None]
"""A function of the number of iterations made and the last log density."""


class DensityGradient:
    """The value and the gradient of a log density, captured as a graph of tensor operations.

    Args:
        log_density: a function whose operations do not depend on values.
        position: a position of the shape and dtype to evaluate it at.
        compiled: whether to compile the graph. Without a compiler the graph itself is run, and a
            function that cannot be captured is run as it is.
    """

    def __init__(
        self, log_density: LogDensity, position: Float[Tensor, " P"], *, compiled: bool
    ) -> None:
        def capture(position: Tensor) -> tuple[GraphModule, Any]:
            other = position + torch.linspace(0.01, 0.02, len(position)).to(position)
            return capture_graph(
                lambda p: value_and_gradient(log_density, p), (position,), (other,)
            )

        position = position.clone()  # a tensor that the density holds would be its argument
        value_and_gradient(log_density, position)  # an error of the density is its own
        self._function: DensityAndGradient = lambda p: value_and_gradient(log_density, p)
        for mode in (True, False) if compiled else (False,):
            function = CompiledFunction(capture, compiled=mode)
            try:
                function(position)
            except CaptureError:
                continue
            self._function = function
            break

    def __call__(self, position: Float[Tensor, " P"]) -> tuple[Tensor, Float[Tensor, " P"]]:
        """log p and its gradient at a position."""
        return self._function(position.detach())


def value_and_gradient(
    log_density: LogDensity, position: Float[Tensor, " P"]
) -> tuple[Tensor, Float[Tensor, " P"]]:
    """log p and its gradient by automatic differentiation."""
    leaf = position.detach().requires_grad_()
    with torch.enable_grad():
        value = log_density(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


class _NegativeLogDensity(torch.autograd.Function):
    """-log p, whose gradient is computed along with it."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, density: DensityAndGradient) -> Tensor:
        value, gradient = density(position)
        ctx.save_for_backward(gradient)
        return -value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return -grad_outputs[0] * gradient, None


class _PotentialEnergy:
    """The potential energy -log p as Pyro calls it; it keeps the last value of log p."""

    def __init__(self, density: DensityAndGradient) -> None:
        self.density, self.log_p = density, float("nan")

    def __call__(self, params: dict[str, Tensor]) -> Tensor:
        energy: Any = _NegativeLogDensity.apply(params["position"], self.density)
        self.log_p = -float(energy.detach())
        return energy


@dataclass(frozen=True)
class Chains:
    """Positions of several chains.

    Attributes:
        positions: (C, S, P).
        divergences: the number of iterations whose trajectory diverged, warm-up excluded.
        acceptance: the mean acceptance probability along trajectories, warm-up excluded.
    """

    positions: Float[Tensor, "C S P"]
    divergences: int
    acceptance: float


def run_chains(
    density: DensityAndGradient,
    starts: Starts,
    settings: ChainSettings,
    after_iteration: IterationCallback,
) -> Chains:
    """Run Pyro's NUTS from each start in turn, in this process.

    The step size and the mass matrix are adapted during warm-up, and the mass matrix is dense for
    up to ``MAX_DENSE_SIZE`` coordinates.

    Args:
        density: the target.
        starts: one for each chain.
        settings: the numbers of iterations that are kept, and of those before, which adapt the
            sampler.
        after_iteration: called after each iteration.

    References:
        Hoffman, Gelman: The No-U-Turn Sampler (2014).
        Betancourt: A conceptual introduction to Hamiltonian Monte Carlo (2017).
    """
    num_samples, warmup = settings.num_samples, settings.warmup
    results = [
        _run_chain(
            density, start, num_samples, warmup, number * (num_samples + warmup), after_iteration
        )
        for number, start in enumerate(starts)
    ]
    positions, divergences, acceptance = zip(*results, strict=True)
    return Chains(torch.stack(positions), sum(divergences), _mean(acceptance))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _run_chain(
    density: DensityAndGradient,
    start: Float[Tensor, " P"],
    num_samples: int,
    warmup: int,
    before: int,
    after_iteration: IterationCallback,
) -> tuple[Float[Tensor, "S P"], int, float]:
    potential = _PotentialEnergy(density)
    kernel = NUTS(potential_fn=potential, full_mass=len(start) <= MAX_DENSE_SIZE)
    params, kept = {"position": start.clone()}, []
    with ExitStack() as stack:
        for context in (poutine.block(), validation(False), threads(1)):
            stack.enter_context(context)
        kernel.initial_params = params
        kernel.setup(warmup)
        for iteration in range(warmup + num_samples):
            params = kernel.sample(params)
            if iteration >= warmup:
                kept.append(params["position"].detach().clone())
            after_iteration(before + iteration + 1, potential.log_p)
        divergences = len(kernel.diagnostics()["divergences"])
        acceptance = float(kernel.logging()["acc. prob"])
        kernel.cleanup()
    return torch.stack(kept), divergences, acceptance
