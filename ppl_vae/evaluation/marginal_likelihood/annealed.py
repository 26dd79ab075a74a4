"""Annealed importance sampling (AIS) with Hamiltonian Monte Carlo.

With q the initial distribution (a guide's own, or the prior) and w(z) = p(x, z) / q(z), the
annealed distributions are the geometric f_b(z) = q(z) w(z)^b, 0 = b_0 < ... < b_T = 1. A chain
starts at z_0 ~ q and moves by Hamiltonian Monte Carlo, z_t ~ H_t(. | z_{t-1}), where each H_t
leaves f_{b_t} invariant. Its log weight is sum_t (b_t - b_{t-1}) log w(z_{t-1}). The mean of the
weight is p(x) for any T; that of its logarithm is below log p(x), by a gap that halves as T
doubles. For a reverse chain, from a draw of the posterior to q, the same sum has
E[exp(-sum)] = 1 / p(x).

Chains move in unconstrained space, which is that of ``biject_to(support)`` for each site of the
guide, determined at every step; the log-Jacobian is part of q there.

References:
    Neal: Annealed importance sampling (2001). Wu, Burda, Salakhutdinov, Grosse: On the
    quantitative analysis of decoder-based generative models (2017).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import validation
from ppl_vae.core.validation import check_int, check_option
from ppl_vae.evaluation.marginal_likelihood.annealing_path import AnnealingPath, PathDensity
from ppl_vae.evaluation.marginal_likelihood.batching import (
    LogWeightSampler,
    block_size,
    rows_at_once,
)
from ppl_vae.evaluation.marginal_likelihood.call_runner import CallRunner

SCHEDULES = ("linear", "sigmoid")
SIGMOID_END = 4.0
"""The sigmoid schedule is the logistic function between minus and plus this value."""
TUNING_CHAINS = 8
"""The number of chains per datum that tune the step sizes."""
SCALE_DRAWS = 32
"""The number of draws of q per datum that determine its standard deviations."""
MAX_TUNED_TEMPERATURES = 50
"""The number of temperatures at which step sizes are tuned; others use the nearest one's."""
FIRST_TUNING_MOVES, TUNING_MOVES = 10, 2
"""Tuning moves at the first temperature, so that the step size converges, and at each other."""
TARGET_ACCEPTANCE = 0.8
"""The acceptance rate to which step sizes are tuned.

It is higher than the 0.65 at which a single long chain is most efficient: with rejection rate r
the gap is (1 + r) / (1 - r) times that of exact moves.
"""
JITTER = 0.2
"""The relative random variation of each move's step size, which avoids periodic orbits."""


@dataclass(frozen=True)
class Annealing:
    """The settings of annealed importance sampling.

    Attributes:
        num_temperatures: T, the number of temperatures; the gap of a chain's mean log weight is
            about proportional to 1/T. With T = 1, this is importance sampling.
        schedule: ``"linear"``: b_t = t/T; ``"sigmoid"``: b_t is the logistic function of
            4 (2 t/T - 1), shifted and scaled to the range from 0 to 1: dense at both ends.
        leapfrog: leapfrog steps per move, each of which takes one gradient of the densities.

    Raises:
        ValueError: if a number is not an integer >= 1, or the schedule is unknown.

    References:
        Grosse, Ghahramani, Adams: Sandwiching the marginal likelihood using bidirectional Monte
        Carlo (2015), for the schedule.
    """

    num_temperatures: int = 500
    schedule: str = "sigmoid"
    leapfrog: int = 10

    def __post_init__(self) -> None:
        check_int("num_temperatures", self.num_temperatures)
        check_int("leapfrog", self.leapfrog)
        check_option("schedule", self.schedule, SCHEDULES)

    def betas(self) -> Float[Tensor, " T1"]:
        """b_0 = 0, ..., b_T = 1, in float64."""
        even = torch.linspace(0, 1, self.num_temperatures + 1, dtype=torch.float64)
        if self.schedule == "linear":
            return even
        curve = torch.sigmoid(SIGMOID_END * (2 * even - 1))
        return (curve - curve[0]) / (curve[-1] - curve[0])

    def num_evaluations(self, num_chunks: int) -> int:
        """The number of density evaluations for a batch, with chains in ``num_chunks`` parts."""
        tuned = min(self.num_temperatures, MAX_TUNED_TEMPERATURES)
        tuning = FIRST_TUNING_MOVES + TUNING_MOVES * tuned
        return self.leapfrog * (tuning + num_chunks * self.num_temperatures) + num_chunks + 1


class AISWeights(LogWeightSampler):
    """Computes log weights of AIS chains, as :class:`LogWeightSampler` does of single draws.

    Args:
        annealing: the settings of the chains.
        x: the data, or a part of them, for the batch size.
        num_data: the number of data.
        num_chains: chains per datum.
        capture: how densities and gradients are computed, see
            :class:`ppl_vae.capture.policy.CapturePolicy`.
        precision: precision of matrix products, see :func:`ppl_vae.core.state.precision`.

    Attributes:
        block_size: the number of data in a batch.
        acceptance: the mean acceptance probability of each move of the measured chains.
    """

    def __init__(
        self,
        annealing: Annealing,
        x: Tensor,
        num_data: int,
        num_chains: int,
        *,
        capture: bool | str = False,
        precision: str = "float32",
    ) -> None:
        self.annealing = annealing
        size = block_size(x, max(num_chains, SCALE_DRAWS), refined=False)
        self.block_size = min(size, num_data)
        chunks = _chunk_sizes(num_chains, self.block_size, rows_at_once(x))
        self._repeats = annealing.num_evaluations(len(chunks))
        num_calls = math.ceil(num_data / self.block_size) * self._repeats
        super().__init__(CallRunner(capture, num_calls, precision=precision))
        self._usual_sizes = {chunks[0], TUNING_CHAINS}
        self.acceptance: list[Tensor] = []

    @property
    def execution(self) -> str:
        """How the densities were computed, and why, and the acceptance rate."""
        if not self.acceptance:
            return self.runner.execution
        accepted = float(torch.stack(self.acceptance).mean())
        return f"{self.runner.execution}; {accepted:.0%} of moves accepted"

    def __call__(self, pair: Pair, batch: Batch, num_samples: int) -> Float[Tensor, "S B"]:
        """The log weights of S chains for each of B data, in float64."""
        return AISChains(self, AnnealingPath(pair, batch)).forward(num_samples)

    def density(self, path: AnnealingPath, points: Float[Tensor, "S B K"]) -> PathDensity:
        """:meth:`AnnealingPath.density` on the batch, eagerly, recorded or compiled."""

        def compute(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            *given, points = tensors
            with validation(False):
                return tuple(path.density(given, points))

        # Code is compiled for the usual shapes alone, not for the remaining data or chains.
        usual = len(points) in self._usual_sizes and points.shape[1] == self.block_size
        tensors = [*path.batch.tensors, points]
        return PathDensity(
            *self.run(path, tuple(points.shape), compute, tensors, self._repeats, usual=usual)
        )


class ChainState(NamedTuple):
    """Points of chains, and the densities there, which the next move does not compute again.

    Attributes:
        points: (S, B, K).
        density: log q, log w and their gradients.
    """

    points: Tensor
    density: PathDensity

    def replaced(self, other: "ChainState", where: Bool[Tensor, "S B"]) -> "ChainState":
        """The other chains where this is True."""

        def choose(new: Tensor, old: Tensor) -> Tensor:
            chosen = where[..., None] if new.dim() > where.dim() else where
            return torch.where(chosen, new, old)

        parts = zip(other.density, self.density, strict=True)
        density = PathDensity(*(choose(new, old) for new, old in parts))
        return ChainState(choose(other.points, self.points), density)


class AISChains:
    """AIS chains for one batch of data, with step sizes that are tuned first and then fixed.

    Separate chains tune the step sizes, so that the measured chains are independent of them.
    Step sizes that adapt to the state of a chain would leave no f_b invariant, and bias the
    weights.

    Args:
        sampler: computes densities, and holds the settings.
        path: the annealed distributions.

    Attributes:
        scale: the standard deviations of q, (B, K), which are the units of step sizes.
        steps: the step sizes at b_1, ..., b_{T-1}, (T-1, B).
    """

    def __init__(self, sampler: AISWeights, path: AnnealingPath) -> None:
        self.sampler, self.path = sampler, path
        points = path.draw(SCALE_DRAWS)
        self.betas = sampler.annealing.betas().to(points.device)
        self.scale = points.std(0).clamp(min=torch.finfo(points.dtype).tiny)
        self.steps = self._tune(points[:TUNING_CHAINS])

    def forward(self, num_chains: int) -> Float[Tensor, "S B"]:
        """Log weights of chains per datum, from draws of q to the posterior."""
        chunks = self._chunk_sizes(num_chains)
        return torch.cat([self._log_weights(self.path.draw(size)) for size in chunks])

    def backward(self, num_chains: int, point: Float[Tensor, "1 B K"]) -> Float[Tensor, "S B"]:
        """The same sums for reverse chains, from a draw of the posterior to q."""
        starts = (point.repeat(size, 1, 1) for size in self._chunk_sizes(num_chains))
        return torch.cat([self._log_weights(start, reverse=True) for start in starts])

    def _chunk_sizes(self, num_chains: int) -> list[int]:
        x = self.path.batch.x
        return _chunk_sizes(num_chains, len(x), rows_at_once(x))

    def _log_weights(self, points: Float[Tensor, "S B K"], *, reverse: bool = False) -> Tensor:
        betas, increments, steps = self.betas[1:-1], self.betas.diff(), self.steps
        if reverse:
            betas, increments, steps = betas.flip(0), increments.flip(0), steps.flip(0)
        total = torch.zeros(points.shape[:2], dtype=torch.float64, device=points.device)
        state = self._state(points)
        for beta, increment, step in zip(betas, increments[:-1], steps, strict=True):
            total = total + increment * state.density.log_weight.double()
            state, acceptance = self._move(state, beta, step)
            self.sampler.acceptance.append(acceptance.mean())
        return total + increments[-1] * state.density.log_weight.double()

    def _state(self, points: Float[Tensor, "S B K"]) -> ChainState:
        return ChainState(points, self.sampler.density(self.path, points))

    def _move(
        self, state: ChainState, beta: Tensor, step: Float[Tensor, " B"]
    ) -> tuple[ChainState, Float[Tensor, "S B"]]:
        """A Hamiltonian move: the chains after it, and acceptance probabilities."""
        beta = beta.to(state.points.dtype)
        momentum = initial_momentum = torch.randn_like(state.points)
        jitter = 1 + JITTER * (2 * torch.rand_like(state.points[..., :1]) - 1)
        step = self.scale * step[:, None] * jitter
        proposal = state
        for _ in range(self.sampler.annealing.leapfrog):
            momentum = momentum + step / 2 * proposal.density.grad(beta)
            proposal = self._state(proposal.points + step * momentum)
            momentum = momentum + step / 2 * proposal.density.grad(beta)
        kinetic_change = (momentum.square() - initial_momentum.square()).sum(-1) / 2
        change = proposal.density.log_prob(beta) - state.density.log_prob(beta)
        # It is NaN where the proposal has no finite density.
        log_ratio = change - kinetic_change
        log_ratio = torch.where(log_ratio.isnan(), -torch.inf, log_ratio)
        accepted = torch.rand_like(log_ratio).log() < log_ratio
        return state.replaced(proposal, accepted), log_ratio.clamp(max=0).exp()

    def _tune(self, points: Float[Tensor, "S B K"]) -> Float[Tensor, "T B"]:
        """Step sizes at each temperature, in units of q's standard deviations."""
        num_inner = len(self.betas) - 2
        if num_inner == 0:  # importance sampling: there are no moves
            return self.scale.new_empty(0, len(self.scale))
        num_tuned = min(num_inner, MAX_TUNED_TEMPERATURES)
        grid = torch.linspace(0, num_inner - 1, num_tuned).round().long()
        log_step = self.scale.new_full(self.scale.shape[:1], -math.log(points.shape[-1]) / 4)
        state, tuned = self._state(points), []
        for position, inner in enumerate(grid.tolist()):
            for _ in range(TUNING_MOVES if position else FIRST_TUNING_MOVES):
                state, acceptance = self._move(state, self.betas[1 + inner], log_step.exp())
                log_step = log_step + (acceptance.mean(0) - TARGET_ACCEPTANCE) / 2
            tuned.append(log_step)
        nearest = (torch.arange(num_inner)[:, None] - grid).abs().argmin(-1)
        return torch.stack(tuned)[nearest].exp()


def _chunk_sizes(num_chains: int, num_rows: int, at_once: int) -> list[int]:
    """The sizes of chunks of chains for these rows, each of which may run at once."""
    size = max(1, min(num_chains, at_once // num_rows))
    sizes = [size] * (num_chains // size)
    return [*sizes, num_chains % size] if num_chains % size else sizes
