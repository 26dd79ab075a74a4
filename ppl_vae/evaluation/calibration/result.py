"""The result of simulation-based calibration."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.text import counted
from ppl_vae.core.text_table import render
from ppl_vae.evaluation.calibration.rank_uniformity import RankBand, UniformRanks

if TYPE_CHECKING:
    import pandas

LEVEL = 0.05
"""The probability that calibrated draws are rejected, over all quantities together."""
MIN_INDEPENDENCE = 0.8
"""The smallest share of effective draws for which the draws count as independent."""
MAX_ROWS = 10
"""The number of quantities in the printed table."""
MIN_SCORE = 3.0
"""A shift or a spread is named if it differs from that of uniform ranks by this many standard
errors."""


@dataclass(frozen=True, repr=False)
class SimulationBasedCalibration(Result):
    """Ranks of the values that generated simulated data among draws of their posterior.

    If the draws are independent draws of the exact posterior, each rank is uniform on
    0, ..., ``num_draws``.

    Attributes:
        quantities: the names of the test quantities.
        ranks: the number of draws below the true value, ties broken at random, (M, Q).
        num_draws: the draws per simulation, L.
        num_data: the rows of each simulated data set, N.
        effective_draws: the mean effective sample size of these draws, for each quantity; NaN
            where they are independent by construction or their dependence is unknown, (Q,).
        notes: caveats.
    """

    quantities: tuple[str, ...]
    ranks: Int[Tensor, "M Q"]
    num_draws: int
    num_data: int
    effective_draws: Float[Tensor, " Q"]
    notes: tuple[str, ...] = ()

    @property
    def num_simulations(self) -> int:
        """The number of simulated data sets, M."""
        return len(self.ranks)

    @cached_property
    def _uniform(self) -> UniformRanks:
        return UniformRanks(self.num_simulations, self.num_draws)

    @cached_property
    def p_values(self) -> Float[np.ndarray, " Q"]:
        """The probability that uniform ranks deviate as much from uniformity, for each quantity.

        They are not corrected for the number of quantities.
        """
        return self._uniform.p_values(self.ranks.numpy(force=True))

    @property
    def level(self) -> float:
        """The level of a test of one quantity, 0.05 divided by their number (Bonferroni)."""
        return LEVEL / len(self.quantities)

    def ecdf(self) -> Float[np.ndarray, "Q P"]:
        """The proportion of ranks below each point of :meth:`band`, for each quantity."""
        return self._uniform.counts_below(self.ranks.numpy(force=True)) / self.num_simulations

    def band(self) -> RankBand:
        """The band that all quantities stay in with probability 0.95 if ranks are uniform."""
        return self._uniform.band(self.level)

    @property
    def rejected(self) -> tuple[str, ...]:
        """The quantities whose ranks are not uniform, the most significant first."""
        order = np.argsort(self.p_values, kind="stable")
        return tuple(self.quantities[k] for k in order if self.p_values[k] < self.level)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per quantity: p-value, mean and variance of ranks relative to uniform ones.

        ``mean`` is 0.5 for uniform ranks; above it draws are too small. ``spread`` is 1; above it
        draws are too narrow.
        """
        import pandas as pd

        columns = {
            "p_value": self.p_values,
            "mean": self._mean(),
            "spread": self._spread(),
            "effective_draws": self.effective_draws.numpy(force=True),
        }
        return pd.DataFrame(columns, index=pd.Index(self.quantities, name="quantity"))

    def _scaled(self) -> Float[np.ndarray, "M Q"]:
        return (self.ranks.numpy(force=True) + 0.5) / (self.num_draws + 1)

    def _mean(self) -> Float[np.ndarray, " Q"]:
        return self._scaled().mean(0)

    def _spread(self) -> Float[np.ndarray, " Q"]:
        return np.square(self._scaled() - 0.5).mean(0) * 12

    @property
    def verdict(self) -> str:
        """Whether the ranks are uniform, and if not in which way, in one sentence."""
        simulations, number = counted(self.num_simulations, "simulation"), len(self.quantities)
        quantities = "test quantity" if number == 1 else "test quantities"
        worst = int(self.p_values.argmin())
        if not self.rejected:
            return (
                f"calibrated: in {simulations} the ranks of {number} {quantities} are consistent "
                f"with uniform ranks (smallest p-value {self.p_values[worst]:.2g}, of "
                f"{self.quantities[worst]}; the limit is {self.level:.2g})"
            )
        return (
            f"NOT calibrated: in {simulations} the ranks of {len(self.rejected)} of {number} "
            f"{quantities} are not uniform; of {self.rejected[0]}, {self._deviation(worst)} "
            f"(p-value {self.p_values[worst]:.2g}, the limit is {self.level:.2g})"
        )

    def _deviation(self, place: int) -> str:
        # Standard errors of the mean and of 12 (u - 1/2)^2 for u uniform on (0, 1).
        root = np.sqrt(self.num_simulations)
        shift = (self._mean()[place] - 0.5) * root * np.sqrt(12)
        spread = (self._spread()[place] - 1) * root / np.sqrt(0.8)
        if max(abs(shift), abs(spread)) < MIN_SCORE:
            return "the draws have another distribution than the posterior"
        if abs(shift) >= abs(spread):
            return f"the draws are too {'small' if shift > 0 else 'large'}"
        return f"the draws vary too {'little' if spread > 0 else 'much'}"

    def __repr__(self) -> str:
        order = np.argsort(self.p_values, kind="stable")[:MAX_ROWS]
        mean, spread = self._mean(), self._spread()
        rows = [
            (self.quantities[k], f"{self.p_values[k]:.4f}", f"{mean[k]:.3f}", f"{spread[k]:.3f}")
            for k in order
        ]
        lines = [
            f"Simulation-based calibration: {counted(self.num_simulations, 'simulation')} of "
            f"{counted(self.num_data, 'data point')}, {counted(self.num_draws, 'draw')} each",
            f"  {self.verdict}",
            render(rows, ("quantity", "p-value", "mean (0.5)", "spread (1)"), indent="  "),
        ]
        if len(self.quantities) > len(order):
            lines.append(f"  and {len(self.quantities) - len(order)} more with larger p-values")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def dependence_notes(
    effective_draws: Float[np.ndarray, " Q"], quantities: tuple[str, ...], num_draws: int
) -> tuple[str, ...]:
    """A note if the draws of a Markov chain are dependent after thinning."""
    if np.isnan(effective_draws).all():
        return ()
    worst = int(np.nanargmin(effective_draws))
    if effective_draws[worst] >= MIN_INDEPENDENCE * num_draws:
        return ()
    return (
        f"the {num_draws} draws that ranks refer to are dependent (of {quantities[worst]} their "
        f"effective sample size is {effective_draws[worst]:.0f}), so that ranks are not uniform "
        "even for the exact posterior; draw longer chains, or lower num_draws",
    )
