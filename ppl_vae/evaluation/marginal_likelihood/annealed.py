"""Annealed importance sampling: log weights of chains that walk from a start to the posterior.

With q the start (a guide's own, or the prior) and w(z) = p(x, z) / q(z), the distributions on the
way are the geometric f_b(z) = q(z) w(z)^b, 0 = b_0 < ... < b_T = 1. A chain starts at z_0 ~ q and
moves by Hamiltonian Monte Carlo, z_t ~ H_t(. | z_{t-1}), each H_t leaving f_{b_t} as it is. Its
log weight is sum_t (b_t - b_{t-1}) log w(z_{t-1}). The mean of the weight is p(x) for any T; that
of its logarithm is less than log p(x), by a gap that halves as T doubles. Of a chain that walks
backwards from a draw of the posterior the same sum has E[exp(-sum)] = 1 / p(x).

Chains move in unconstrained space: that of ``biject_to(support)`` for each site which the guide
draws, taken anew at every step; its log-Jacobian is part of q there.

References:
    Neal: Annealed importance sampling (2001). Wu, Burda, Salakhutdinov, Grosse: On the
    quantitative analysis of decoder-based generative models (2017).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.capture.compiled import CompiledFunction
from ppl_vae.capture.graph import CaptureError, ModuleTensors, capture_graph, permuted, perturbed
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import precision, validation
from ppl_vae.core.validation import check_int, check_option
from ppl_vae.evaluation.marginal_likelihood.annealing_path import Path
from ppl_vae.evaluation.marginal_likelihood.batching import (
    BlockRunner,
    LogWeightSampler,
    block_size,
    rows_at_once,
)

SCHEDULES = ("linear", "sigmoid")
SIGMOID_END = 4.0
"""The sigmoid schedule is the logistic function between minus and plus this."""
FEWEST_TUNING, MOST_TUNING = 8, 32
"""Chains per datum that find the step sizes: as many as go together to measure, within these."""
TUNING_STOPS = 100
"""Temperatures at most at which step sizes are found; others take the nearest one's."""
FEWEST_RECORDED = 400
"""Evaluations of densities for which recording them is worth its second."""
FIRST_MOVES = 10
"""Moves at the first of them, so that the step size gets there; two at each other."""
ACCEPTANCE = 0.8
"""The share of moves that step sizes are tuned to have accepted.

More than the 0.65 at which a single long chain is cheapest: a move rejected with chance r leaves
the gap (1 + r) / (1 - r) times as wide as one that is exact.
"""
JITTER = 0.2
"""Each move's step size varies by so much of itself, so that orbits are not walked in circles."""


@dataclass(frozen=True)
class Annealing:
    """How chains walk from the start to the posterior.

    Attributes:
        temperatures: T, the steps on the way; the gap of a chain's mean log weight is about
            proportional to 1/T. With one, this is importance sampling.
        schedule: ``"linear"``: b_t = t/T; ``"sigmoid"``: b_t goes like the logistic function of
            4 (2 t/T - 1), moved and scaled to run from 0 to 1: slow at both ends.
        leapfrog: steps of a Hamiltonian move, each of which runs the pair forth and back once.

    Raises:
        ValueError: if a number is no whole one >= 1, or the schedule is not known.

    References:
        Grosse, Ghahramani, Adams: Sandwiching the marginal likelihood using bidirectional Monte
        Carlo (2015), of the schedule.
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

    def num_evaluations(self, chunks: int) -> int:
        """How often a block's densities are computed, with its chains in so many chunks."""
        tuning = FIRST_MOVES + 2 * min(self.num_temperatures, TUNING_STOPS)
        return (self.leapfrog + 1) * (tuning + chunks * self.num_temperatures)


class AISWeights(LogWeightSampler):
    """Log weights of chains for blocks of data, in the place of those of single draws.

    Args:
        model: of the pair.
        annealing: how chains walk.
        like: data.
        num_data: how many data there are.
        num_chains: a datum.
        capture: compile densities and gradients: True, False, or ``"auto"``, if it pays.
        numbers: precision of matrix products, see :func:`ppl_vae.core.state.precision`.

    Attributes:
        block_size: how many data make a block.
        num_tuning: how many chains per datum find the step sizes.
        records: whether what is not compiled is run as recorded tensor code, without Pyro's
            handlers, which takes no compiling and is a few times as fast.
        accepted: the mean chance of each move, while measuring, to be accepted.
    """

    def __init__(
        self,
        model: ProgramLike,
        annealing: Annealing,
        like: Tensor,
        num_data: int,
        num_chains: int,
        *,
        capture: bool | str = False,
        numbers: str = "float32",
    ) -> None:
        self.annealing = annealing
        whole = block_size(like, max(num_chains, MOST_TUNING), refined=False)
        self.block_size = min(whole, num_data)
        sizes = _chunks(num_chains, self.block_size, rows_at_once(like))
        calls = math.ceil(num_data / self.block_size) * annealing.num_evaluations(len(sizes))
        super().__init__(model, BlockRunner(capture, calls), numbers)
        self.num_tuning = min(max(sizes[0], FEWEST_TUNING), MOST_TUNING)
        self._usual = {sizes[0], self.num_tuning}
        self.records = capture is not False and calls >= FEWEST_RECORDED
        self.filter_kwargs: list[Tensor] = []

    @property
    def why(self) -> str:
        """The way and the reason, and how many moves were accepted."""
        way = self.runner.why.replace("eager:", "recorded:") if self.records else self.runner.why
        if not self.filter_kwargs:
            return way
        return f"{way}; {float(torch.stack(self.filter_kwargs).mean()):.0%} of moves accepted"

    def __call__(
        self, guide: ProgramLike, x: Tensor, keywords: dict[str, Any], num_samples: int
    ) -> Float[Tensor, "S B"]:
        """The log weights of S chains for each of B data, in float64."""
        return AISChains(self, Path(self.model, guide, x, keywords)).forward(num_samples)

    def slopes(
        self, path: Path, points: Float[Tensor, "S B K"], beta: Float[Tensor, ""]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`Path.slopes` at the block's own tensors: eagerly, recorded or compiled."""

        def eager() -> Any:
            with precision(self.numbers, points.device), validation(False):
                return path.slopes(path.tensors, points, beta)

        def recorded(compiled: bool) -> Any:
            held, key = self._held(path.guide, eager), (compiled, points.shape, *path.key)
            if key not in self._runs:
                how = {"compiled": compiled, "precision": self.numbers}
                self._runs[key] = CompiledFunction(partial(_record, path, held), **how)
            values = [p.detach() for p in held.parameters]
            tensors = [*path.tensors, points, beta]
            return tuple(t.clone() for t in self._runs[key](values, held.buffers, tensors))

        def plain() -> Any:
            if self.records:
                try:
                    return recorded(False)
                except CaptureError:
                    self.records = False
            return eager()

        # A last block, or a last few chains, are not worth compiling for.
        usual = len(points) in self._usual and points.shape[1] == self.block_size
        return self.runner.do(lambda: recorded(self.runner.compiled), plain) if usual else eager()


def _record(
    path: Path, held: ModuleTensors, parameters: Any, buffers: Any, tensors: list[Tensor]
) -> Any:
    def pure(parameters: Any, buffers: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        *given, points, beta = tensors
        with held.substituted(parameters, [buffer.clone() for buffer in buffers]):
            return path.slopes(given, points, beta)

    others = perturbed(parameters), buffers, permuted(tensors)
    return capture_graph(pure, (parameters, buffers, tensors), others)


class AISChains:
    """Chains for one block of data, with step sizes that are found first and then stay.

    Chains of their own find the step sizes, so that those which measure are independent of them:
    moves that adapt to where a chain is would leave no f_b as it is, and bias the weights.

    Args:
        annealer: how to walk.
        path: where.

    Attributes:
        scale: q's standard deviations, (B, K), the units of step sizes.
        steps: the step sizes at b_1, ..., b_{T-1}, (T-1, B); with T = 1 there are none to use.
    """

    def __init__(self, annealer: AISWeights, path: Path) -> None:
        self.annealer, self.path = annealer, path
        points = path.start(MOST_TUNING)
        self.betas = annealer.annealing.betas().to(points.device)
        self.scale = points.std(0).clamp(min=torch.finfo(points.dtype).tiny)
        self.steps = self._tuned(points[: annealer.num_tuning])

    def forward(self, number: int) -> Float[Tensor, "S B"]:
        """Log weights of so many chains per datum, from draws of q."""
        return torch.cat([self._weights(self.path.start(size)) for size in self._sizes(number)])

    def backward(self, number: int, point: Float[Tensor, "1 B K"]) -> Float[Tensor, "S B"]:
        """The same sums for chains that start at a draw of the posterior and walk to q."""
        starts = (point.repeat(size, 1, 1) for size in self._sizes(number))
        return torch.cat([self._weights(start, reverse=True) for start in starts])

    def _sizes(self, number: int) -> list[int]:
        x = self.path.tensors[0]
        return _chunks(number, len(x), rows_at_once(x))

    def _weights(self, points: Float[Tensor, "S B K"], *, reverse: bool = False) -> Tensor:
        stops, widths, steps = self.betas[1:-1], self.betas.diff(), self.steps
        if reverse:
            stops, widths, steps = stops.flip(0), widths.flip(0), steps.flip(0)
        total = torch.zeros(points.shape[:2], dtype=torch.float64, device=points.device)
        for beta, width, step in zip(stops, widths[:-1], steps, strict=True):
            points, weight, chance = self._move(points, beta, step)
            total = total + width * weight.double()
            self.annealer.filter_kwargs.append(chance.mean())
        weight, *_ = self.annealer.slopes(self.path, points, self.betas[-1].to(points.dtype))
        return total + widths[-1] * weight.double()

    def _move(
        self, points: Float[Tensor, "S B K"], beta: Tensor, step: Float[Tensor, " B"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A Hamiltonian move; also log w where it began, and the chance that it is accepted."""
        beta = beta.to(points.dtype)
        momentum = kick = torch.randn_like(points)
        jitter = 1 + JITTER * (2 * torch.rand_like(points[..., :1]) - 1)
        step = self.scale * step[:, None] * jitter
        weight, value, slope = self.annealer.slopes(self.path, points, beta)
        new, new_value = points, value
        for _ in range(self.annealer.annealing.leapfrog):
            kick = kick + step / 2 * slope
            new = new + step * kick
            _, new_value, slope = self.annealer.slopes(self.path, new, beta)
            kick = kick + step / 2 * slope
        gain = new_value - value - (kick.square() - momentum.square()).sum(-1) / 2
        # NaN: the move left where densities are finite.
        gain = torch.where(gain.isnan(), -torch.inf, gain)
        filter_kwargs = torch.rand_like(gain).log() < gain
        chance = gain.clamp(max=0).exp()
        return torch.where(filter_kwargs[..., None], new, points), weight, chance

    def _tuned(self, points: Float[Tensor, "S B K"]) -> Float[Tensor, "T B"]:
        """Step sizes at each stop, in units of q's standard deviations, that meet ACCEPTANCE."""
        num_stops = len(self.betas) - 2
        grid = torch.linspace(0, num_stops - 1, min(num_stops, TUNING_STOPS)).round().long()
        log_step = self.scale.new_full(self.scale.shape[:1], -math.log(points.shape[-1]) / 4)
        found = [log_step] * (num_stops == 0)
        for place, stop in enumerate(grid.tolist()):
            for _ in range(FIRST_MOVES if place == 0 else 2):
                points, _, chance = self._move(points, self.betas[1 + stop], log_step.exp())
                log_step = log_step + (chance.mean(0) - ACCEPTANCE) / 2
            found.append(log_step)
        nearest = (torch.arange(num_stops)[:, None] - grid).abs().argmin(-1) if num_stops else []
        return torch.stack(found)[nearest].exp()


def _chunks(number: int, num_rows: int, at_once: int) -> list[int]:
    """So many chains of these rows, in parts of which each may go through a pair at once."""
    size = max(1, min(number, at_once // num_rows))
    return [size] * (number // size) + [number % size] * (number % size > 0)
