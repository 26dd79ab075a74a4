"""What all EM algorithms of linear-Gaussian models share: where they stand, and when they stop."""

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.models.moments import Columns
from ppl_vae.models.ppca import PPCA
from ppl_vae.results import FitResult

FLOOR_REACHED = "noise at its floor"
"""How the note on columns without noise of their own (Heywood cases) begins."""


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
        loadings, loc, variance: W (D, K), mu (D,), psi (D,), in float64.
        bound: E_q[log p(x, z)] + H[q], in nats a datum.
        log_likelihood: log p(x), in nats a datum.
        rounding: what rounding may move these by.
        first: whether no step led here.
        settled: whether the step that led here was all that could be done.
    """

    noise: Noise
    loadings: Float[Tensor, "D K"]
    loc: Float[Tensor, " D"]
    variance: Float[Tensor, " D"]
    bound: Float[Tensor, ""]
    log_likelihood: Float[Tensor, ""]
    rounding: float
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
) -> FitResult:
    """M- and E-steps in turn, from the first position until one of the reasons to stop; ppca set.

    Args:
        start: makes the first position.
        ppca: gets the parameters.
        name: of the algorithm.
        tol: stop when less is to be gained, in nats a datum.
        max_iterations: stop at the latest after so many.
        notes: on the data.
        began: when, by ``time.perf_counter``.
    """
    position, trace, stopped = start(), Trace(began), ""
    while not stopped:
        after_m, following = position.improved()
        trace.add(position.bound, position.log_likelihood)
        trace.add(after_m, following.log_likelihood)
        position = following
        rest = tol if position.settled else 0.0
        stopped = trace.why_stop(rest, max_iterations, position.rounding)
    noise = position.noise
    scale = noise.scale(position.variance)
    ppca.assign(loadings=position.loadings, loc=position.loc, noise_scale=scale)
    return trace.result(name, stopped, notes + noise.notes(position.variance))


class Trace:
    """What the iterations gave, and whether they should go on."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.bounds: list[float] = []
        self.log_likelihoods: list[float] = []
        self.elapsed: list[float] = []

    def add(self, bound: Tensor, log_likelihood: Tensor) -> None:
        """Take down a half-step."""
        self.bounds.append(float(bound))
        self.log_likelihoods.append(float(log_likelihood))
        self.elapsed.append(time.perf_counter() - self.began)

    def why_stop(self, tol: float, max_iterations: int, rounding: float) -> str:
        """Why to stop here, or an empty string.

        Gains g_t that shrink by a ratio r leave g_t r / (1 - r) to be gained.
        """
        if len(self.bounds) >= 2 * max_iterations:
            return f"after max_iterations={max_iterations}"
        if len(self.bounds) < 6:
            return ""
        first, second, third = self.bounds[-5], self.bounds[-3], self.bounds[-1]
        gain, ratio = third - second, (third - second) / max(second - first, 1e-300)
        if abs(gain) <= rounding:
            return "converged to rounding"
        if gain >= 0 and ratio < 1 and gain * ratio / (1 - ratio) < tol:
            return f"converged: under {tol:g} nats a datum to gain"
        return ""

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
            notes=notes,
        )


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
