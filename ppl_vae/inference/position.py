"""What all EM algorithms of linear-Gaussian models share: where they stand, and when they stop."""

import math
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.axes import best_parameters
from ppl_vae.inference.profile import best_noise
from ppl_vae.models.moments import JACOBI_SIZE, Columns, Leading
from ppl_vae.models.ppca import PPCA
from ppl_vae.results import FitResult

FLOOR_REACHED = "noise at its floor"
"""How the note on columns without noise of their own (Heywood cases) begins."""
ILL_CONDITIONED = "the table is too ill-conditioned for float64"
"""How the note on digits lost to rounding begins."""
SADDLE = "a saddle point was left"
"""How the note on restarts begins."""
NOT_CONVERGED = "not converged"
"""How the note on a fit that did not end at a maximum begins."""
FINE = 1e-8
"""What rounding may move log p by, in nats per datum, without a word."""
EXACT = ("full", "diagonal")
"""Families of q that hold the posterior, in the best rotation of W."""
STEPS_FROM_BEST = 10
"""From the best parameters for a covariance, where q is restricted and cells are missing."""
FELL, OUT_OF_ITERATIONS = "the bound fell", "out of iterations"
WITHIN_ROUNDING, LITTLE_GAIN = "within rounding", "little to gain"

Parameters: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""W (D, K), mu (D,) and psi (D,), in float64."""


@dataclass(frozen=True)
class Noise:
    """How noise variances follow from squared residuals.

    Attributes:
        floors: the least variance of each column's own noise, (D,); None if the noise is
            isotropic, one variance for all.
        leaping: whether variances may leap, where the M-step would crawl.
    """

    floors: Float[Tensor, " D"] | None
    leaping: bool = False

    @classmethod
    def of(
        cls, ppca: PPCA, columns: Columns, relative_floor: float, *, leaping: bool = False
    ) -> Self:
        """A model's, with floors relative to the variances of the columns.

        Raises:
            ValueError: if the floor is not within (0, 1).
        """
        if not 0 < relative_floor < 1:
            raise ValueError(
                "noise_floor must lie between 0 and 1, as a share of a column's variance; got "
                f"{relative_floor}"
            )
        if ppca.noise == "isotropic":
            return cls(None)
        return cls(relative_floor * columns.variance, leaping)

    def variance(
        self, squares: Float[Tensor, " D"], counts: Float[Tensor, " D"]
    ) -> Float[Tensor, " D"]:
        """The variances, psi, that maximise -1/2 sum_d (counts log psi + squares / psi)."""
        if self.floors is None:
            return (squares.sum() / counts.sum()).expand(len(squares))
        return torch.maximum(squares / counts, self.floors)

    def leap(
        self,
        variance: Float[Tensor, " D"],
        residual: Float[Tensor, " D"],
        spread: Float[Tensor, " D"],
    ) -> Float[Tensor, " D"]:
        """Each variance to where log p is highest in it alone, the others as they are.

        With C the covariance of x, a = (C^-1)_dd and b = (C^-1 S C^-1)_dd, log p changes by
        -1/2 (log(1 + a t) - b t / (1 + a t)) as psi_d changes by t, and is highest at
        t = (b - a) / a^2. With r = x - mu - W m, a = u / psi and b = E r^2 / psi^2, where
        u = 1 - w_d' V w_d / psi is the share of psi that z does not take: t is EM's step,
        E r^2 - u psi, over u^2, and EM crawls where u is small (as towards a floor, at 1 / t).
        With holes a and b are means over the rows that have the column.

        Args:
            variance: psi.
            residual: the mean of r^2.
            spread: the mean of w_d' V w_d, with V the covariance of z given the row.
        """
        assert self.floors is not None
        own = (1 - spread / variance).clamp(min=torch.finfo(variance.dtype).eps)
        leapt = variance + (residual - own * variance) / own.square()
        return torch.maximum(leapt, self.floors)

    def rounding(
        self,
        total: Float[Tensor, " D"],
        residual: Float[Tensor, " D"],
        variance: Float[Tensor, " D"],
    ) -> float:
        """By how much rounding may move log p, in nats per datum.

        r = x - mu - W m has an error of the size of eps |x|, and counts as r^2 / psi.

        Args:
            total: the variance of each column.
            residual: the mean of r^2.
            variance: psi.
        """
        eps = torch.finfo(total.dtype).eps
        error = 2 * eps * total.sqrt()
        squares = ((2 * residual.sqrt() + error) * error / variance).sum()
        return float(squares) + 4 * eps * len(total)

    def scale(self, variance: Float[Tensor, " D"]) -> Tensor:
        """The model's ``noise_scale`` for these variances."""
        return (variance[0] if self.floors is None else variance).sqrt()

    def notes(self, variance: Float[Tensor, " D"]) -> tuple[str, ...]:
        """Which columns have reached their floors."""
        if self.floors is None or not (reached := variance <= self.floors).any():
            return ()
        listed = ", ".join(map(str, reached.nonzero().flatten().tolist()))
        return (f"{FLOOR_REACHED} (Heywood cases): {listed}",)


class Position:
    """Where an algorithm stands after an E-step: parameters, and what the data are there.

    Attributes:
        noise: of the model.
        family: of q, see :mod:`ppl_vae.families`.
        loadings, loc, variance: W (D, K), mu (D,), psi (D,), in float64.
        bound: E_q[log p(x, z)] + H[q], in nats per datum.
        log_likelihood: log p(x), in nats per datum.
        rounding: what rounding may move these by.
        total: the variance of each column, (D,).
        needs_steps: whether W has no rotation in which q is the posterior of every row.
        stalls: whether W may be in a rotation that is not the best one, with a lower bound.
        first: whether no step led here.
        settled: whether the step that led here was all that could be done.
    """

    noise: Noise
    family: str
    loadings: Float[Tensor, "D K"]
    loc: Float[Tensor, " D"]
    variance: Float[Tensor, " D"]
    bound: Float[Tensor, ""]
    log_likelihood: Float[Tensor, ""]
    rounding: float
    total: Float[Tensor, " D"]
    needs_steps: bool = False
    stalls: bool = False
    first: bool = True
    settled: bool = True

    @abstractmethod
    def maximized(self) -> tuple[Float[Tensor, ""], Parameters]:
        """The bound after an M-step, and W, mu and psi there."""

    @abstractmethod
    def at(self, *parameters: Tensor) -> "Position":
        """The position after an E-step at W, mu and psi."""

    @abstractmethod
    def own_squares(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """The means over rows of r^2 and of w_d' V w_d, see :meth:`Noise.leap`."""

    @abstractmethod
    def factor(self) -> Float[Tensor, "R D"]:
        """F, with F'F the (expected) covariance of the data."""

    @abstractmethod
    def leading(self) -> Leading:
        """The leading axes of the (expected) covariance of the data, its columns over psi^1/2."""

    def best(self) -> Parameters:
        """The best W, mu and psi for the covariance of the data; mu as it is.

        In closed form. Factor analysis has none; there psi is where Newton's method comes to from
        here, or as it is if q is restricted or the columns are many.
        """
        k, floors, variance = self.loadings.shape[1], self.noise.floors, self.variance
        if floors is None or self.family not in EXACT or len(variance) > JACOBI_SIZE:
            leading = self.leading()
        else:
            profile = best_noise(self.factor(), variance, floors, k)
            leading, variance = profile.leading(k), profile.variance
        loadings, variance = best_parameters(
            leading, variance, isotropic=floors is None, family=self.family
        )
        return loadings, self.loc, variance

    def bold(self, parameters: Parameters) -> Parameters | None:
        """What promises more than the M-step's parameters and may be worse; None if nothing does.

        Noise variances leap if they may.
        """
        if not self.noise.leaping:
            return None
        loadings, loc, _ = parameters
        return loadings, loc, self.noise.leap(self.variance, *self.own_squares())

    def improved(self) -> tuple[Float[Tensor, ""], "Position"]:
        """The bound after an M-step, and the position after the E-step that follows.

        From the second step on the bold parameters are taken, if there are some and if they keep
        the promise of the M-step.
        """
        after, careful = self.maximized()
        bold = None if self.first else self.bold(careful)
        if bold is not None:
            following = self._reached(*bold, settled=True)
            if following.bound >= after - following.rounding:
                return after, following
        return after, self._reached(*careful, settled=not self.noise.leaping)

    def notes(self) -> tuple[str, ...]:
        """What a person should know of how far the numbers here can be trusted."""
        if self.rounding <= FINE:
            return ()
        ratio = float((self.total / self.variance).max().sqrt())
        return (
            f"{ILL_CONDITIONED}: rounding may move log p by {self.rounding:.1g} nats per datum "
            f"(a column's standard deviation is {ratio:.1g} times that of its noise)",
        )

    def certified(self, allowed: float) -> tuple[float, float, "Position"]:
        """How far the bound is below that at the best parameters, and a position there.

        Where q is restricted and cells are missing, no rotation of W is best for all rows, so a
        few steps are made from the best parameters.

        Returns:
            The difference of the bounds, what a restart there would gain, both in nats per datum,
            and the position. It gains nothing if all that is better there is the rotation, which
            the steps find by themselves.
        """
        other = self._reached(*self.best(), settled=True)
        for _ in range(STEPS_FROM_BEST if self.needs_steps else 0):
            if other.bound > self.bound + allowed:
                break
            _, other = other.improved()
        left = float(other.bound - self.bound)
        if not self.stalls:
            return left, left, other
        return left, min(left, float(other.log_likelihood - self.log_likelihood)), other

    def _reached(self, *parameters: Tensor, settled: bool) -> "Position":
        position = self.at(*parameters)
        position.first, position.settled = False, settled
        return position


def ascend(
    start: Callable[[], Position],
    ppca: PPCA,
    name: str,
    *,
    tol: float,
    max_iterations: int,
    notes: tuple[str, ...],
    began: float,
    unit: float,
    shift: float,
) -> FitResult:
    """M- and E-steps in turn, from the first position to one that is certified; ppca set.

    Where the steps gain next to nothing, the bound is compared with that at the best parameters
    for the covariance of the data (:meth:`Position.certified`). If that is higher, the position is
    a saddle point, and the steps go on from there.

    Args:
        start: makes the first position.
        ppca: gets the parameters.
        name: of the algorithm.
        tol: stop when less is to be gained, in nats per datum.
        max_iterations: stop at the latest after so many.
        notes: on the data.
        began: when, by ``time.perf_counter``.
        unit: of x in the positions.
        shift: from log p in these units to that in those of x, in nats per datum.

    Raises:
        FloatingPointError: if the first position has no finite likelihood.
    """
    position, trace = start(), Trace(began, tol, max_iterations)
    if not bool(position.bound.isfinite() & position.log_likelihood.isfinite()):
        raise FloatingPointError(
            f"the log-likelihood of x is {float(position.log_likelihood)} where {name} starts: its "
            "squares leave the range of float64; start from PPCA.like(x), or rescale the columns"
        )
    stopped = ""
    while not stopped:
        position = trace.advanced(position)
        if reason := trace.why_check(position):
            stopped, position = trace.checked(position, reason)
    noise = position.noise
    scale = noise.scale(position.variance)
    ppca.assign(
        loadings=position.loadings * unit, loc=position.loc * unit, noise_scale=scale * unit
    )
    notes = notes + noise.notes(position.variance) + position.notes()
    found = trace.result(name, stopped, notes)
    return found.shifted(shift, 0.0)


class Trace:
    """What the iterations gave, whether they should go on, and whether they ended at a maximum."""

    def __init__(self, began: float, tol: float, max_iterations: int) -> None:
        self.began, self.tol, self.max_iterations = began, tol, max_iterations
        self.bounds: list[float] = []
        self.log_likelihoods: list[float] = []
        self.elapsed: list[float] = []
        self.since = 0  # the first entry after the last restart
        self.next_tol = tol
        self.fell, self.converged, self.left = False, False, math.nan
        self.restarts: list[float] = []

    def advanced(self, position: Position) -> Position:
        """The position after the next iteration; the same if rounding would lower the bound."""
        after_m, following = position.improved()
        slack = min(max(position.rounding, following.rounding), FINE)
        self.fell = not bool(following.bound >= position.bound - slack)
        self.add(position.bound, position.log_likelihood)
        kept = position if self.fell else following
        self.add(position.bound if self.fell else after_m, kept.log_likelihood)
        return kept

    def add(self, bound: Tensor, log_likelihood: Tensor) -> None:
        """Enter a half-step."""
        self.bounds.append(float(bound))
        self.log_likelihoods.append(float(log_likelihood))
        self.elapsed.append(time.perf_counter() - self.began)

    def why_check(self, position: Position) -> str:
        """Why the iterations may be over, or an empty string.

        Gains g_t that shrink by a ratio r leave g_t r / (1 - r) to be gained, unless the position
        is near a saddle point.
        """
        if self.fell:
            return FELL
        if len(self.bounds) >= 2 * self.max_iterations:
            return OUT_OF_ITERATIONS
        if len(self.bounds) - self.since < 6:
            return ""
        first, second, third = self.bounds[-5], self.bounds[-3], self.bounds[-1]
        gain, ratio = third - second, (third - second) / max(second - first, 1e-300)
        if abs(gain) <= min(position.rounding, FINE):
            return WITHIN_ROUNDING
        rest = self.next_tol if position.settled else 0.0
        if gain >= 0 and ratio < 1 and gain * ratio / (1 - ratio) < rest:
            return LITTLE_GAIN
        return ""

    def checked(self, position: Position, reason: str) -> tuple[str, Position]:
        """Why to stop at this position; or an empty string, and the position to go on from."""
        allowed = max(2 * self.tol, 2 * position.rounding)
        self.left, gain, other = position.certified(allowed)
        self.converged = self.left <= allowed and reason != OUT_OF_ITERATIONS
        out = len(self.bounds) + 2 >= 2 * self.max_iterations
        if reason == OUT_OF_ITERATIONS or (out and not self.converged):
            return f"after max_iterations={self.max_iterations}", position
        if gain > allowed:
            self._restart(position, other, gain)
            return "", other
        if self.converged and (self.fell or reason == WITHIN_ROUNDING):
            return "converged to rounding", position
        if self.converged:
            return f"converged: under {max(self.tol, self.left):.3g} nats per datum to gain", position
        if reason == LITTLE_GAIN:
            self.next_tol /= 4
            return "", position
        return "because the gain of an iteration is below rounding", position

    def _restart(self, position: Position, other: Position, gain: float) -> None:
        self.restarts.append(gain)
        self.add(position.bound, position.log_likelihood)
        self.add(position.bound, other.log_likelihood)
        self.since, self.next_tol, self.fell = len(self.bounds), self.tol, False

    def result(self, name: str, stopped: str, notes: tuple[str, ...]) -> FitResult:
        """What is handed to the user."""
        return FitResult(
            algorithm=name,
            objective=torch.tensor(self.bounds, dtype=torch.float64),
            log_likelihood=torch.tensor(self.log_likelihoods, dtype=torch.float64),
            elapsed=torch.tensor(self.elapsed, dtype=torch.float64),
            steps=len(self.bounds) // 2,
            seconds=time.perf_counter() - self.began,
            stopped=stopped,
            notes=self._notes() + notes,
            converged=self.converged,
            certificate=max(self.left, 0.0),
        )

    def _notes(self) -> tuple[str, ...]:
        notes: tuple[str, ...] = ()
        if self.restarts:
            gained = ", ".join(f"{gain:.2g}" for gain in self.restarts)
            notes = (
                f"{SADDLE} {len(self.restarts)} times: axes left out explained more than axes kept, "
                f"and were put in their place (gained {gained} nats per datum)",
            )
        if not self.converged:
            notes += (
                f"{NOT_CONVERGED}: the bound is {self.left:.2g} nats per datum below that at the "
                "best parameters for the covariance of the data",
            )
        return notes


def restricted_covariance(
    precision: Float[Tensor, "*B K K"], family: str
) -> Float[Tensor, "*B K K"]:
    """The covariance of the family's Gaussian closest to N(m, precision^-1), in KL(q || p)."""
    if family == "full":
        return torch.linalg.inv(precision)
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    variances = {
        "unit": torch.ones_like(diagonal),
        "isotropic": (1 / diagonal.mean(-1, keepdim=True)).expand_as(diagonal),
        "diagonal": 1 / diagonal,
    }[family]
    return torch.diag_embed(variances)
