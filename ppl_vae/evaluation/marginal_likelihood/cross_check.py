"""Estimates of log p of the same data by several methods, and whether they agree."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

from jaxtyping import Int
from torch import Tensor

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.stats import monte_carlo_error
from ppl_vae.core.text import counted
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood

if TYPE_CHECKING:
    import pandas


NUM_CHAINS = 32
"""Default AIS chains per datum; enough for a Pareto k-hat."""
SIGNIFICANT_ERRORS = 3.0
"""Means differ significantly if they do by more than this many Monte Carlo errors."""


@dataclass(frozen=True, repr=False)
class EstimatorComparison(Result):
    """Estimates of log p(x_n) of the same data by several methods.

    Each is a lower bound in expectation. Where two differ by more than their errors, the higher
    one is therefore closer to the true value.

    Attributes:
        estimates: the estimates by the name of the method.
    """

    estimates: dict[str, LogLikelihood]

    @classmethod
    def of(cls, estimates: Mapping[str, LogLikelihood]) -> Self:
        """Compare estimates that were computed before.

        Raises:
            ValueError: if there are none, or if they have different numbers of data.
        """
        lengths = {name: len(estimate.value) for name, estimate in estimates.items()}
        if not lengths:
            raise ValueError("there is no estimate; pass at least one by the name of its method")
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"all estimates must be of the same data; the numbers of data points are {lengths}"
            )
        return cls(dict(estimates))

    def difference(self, one: str, other: str) -> tuple[float, float]:
        """The mean of one minus the other, and its Monte Carlo error, in nats per datum."""
        first, second = self.estimates[one], self.estimates[other]
        mean = float((first.value - second.value).mean())
        return mean, math.hypot(
            monte_carlo_error(first.standard_error), monte_carlo_error(second.standard_error)
        )

    @property
    def highest(self) -> str:
        """The method with the highest mean."""
        return max(self.estimates, key=lambda name: self.estimates[name].mean)

    @property
    def shortfalls(self) -> dict[str, tuple[float, float]]:
        """The significant differences from the highest mean, and their errors, by method."""
        top, found = self.highest, {}
        for name in self.estimates:
            behind, error = self.difference(top, name)
            if behind > SIGNIFICANT_ERRORS * error:
                found[name] = behind, error
        return found

    @property
    def unreliable(self) -> tuple[str, ...]:
        """The methods whose estimates are reliable for less than 85 % of the data."""
        return tuple(n for n, e in self.estimates.items() if e.share_reliable < FEW_RELIABLE)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per method: mean, standard error, its Monte Carlo part, share reliable."""
        import pandas as pd

        rows = {
            name: {
                "mean": estimate.mean,
                "error": estimate.mean_error,
                "monte_carlo": monte_carlo_error(estimate.standard_error),
                "reliable": estimate.share_reliable,
                "draws": estimate.num_samples,
            }
            for name, estimate in self.estimates.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")

    def __repr__(self) -> str:
        number = len(next(iter(self.estimates.values())).value)
        return "\n".join(
            [
                f"log p of {counted(number, 'data point')} by each method, nats per datum, "
                "± one Monte Carlo error",
                render([self._cells(name) for name in self.estimates], indent="  "),
                *(f"  {line}" for line in self._verdict()),
            ]
        )

    def _cells(self, name: str) -> tuple[str, ...]:
        estimate = self.estimates[name]
        bound = "≥" if name in self.unreliable else ""
        drawn = "chain" if estimate.method == "annealed" else "draw"
        return (
            name,
            f"{bound}{estimate.mean:.3f} ± {monte_carlo_error(estimate.standard_error):.3f}",
            f"{math.floor(100 * estimate.share_reliable)} % reliable",
            counted(estimate.num_samples, drawn),
        )

    def _verdict(self) -> Iterator[str]:
        shortfalls, top, unreliable = self.shortfalls, self.highest, self.unreliable
        for name, (behind, error) in shortfalls.items():
            yield f"{name} falls short of {top} by {behind:.3f} ± {error:.3f}: a lower bound"
        close = [name for name in self.estimates if name not in shortfalls]
        agreeing = [name for name in close if name not in unreliable]
        if len(agreeing) > 1:
            yield f"{_listed(agreeing)} agree: {self._widest(agreeing)} at most"
        if len(close) > len(agreeing) and len(close) > 1:
            yield from self._without_verdict(close, agreeing)
        if unreliable:
            yield f"≥: under {FEW_RELIABLE:.0%} reliable, a lower bound in expectation"

    def _without_verdict(self, close: list[str], agreeing: list[str]) -> Iterator[str]:
        # Estimates that are not reliable may all fall short by the same amount.
        unreliable = _listed([name for name in close if name not in agreeing])
        if len(agreeing) > 1:
            yield f"left out of this agreement, because too few data are reliable: {unreliable}"
            return
        yield (
            f"{_listed(close)} differ by {self._widest(close)} at most, but this agreement cannot "
            f"be trusted, because too few data are reliable by {unreliable}"
        )

    def _widest(self, names: list[str]) -> str:
        pairs = itertools.combinations(names, 2)
        mean, error = max((self.difference(*pair) for pair in pairs), key=lambda d: abs(d[0]))
        return f"{abs(mean):.3f} ± {error:.3f}"


def cross_check(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    num_samples: int = 1000,
    *,
    refine: int = 300,
    num_chains: int = NUM_CHAINS,
    annealing: Annealing | None = None,
    mask: ArrayLike | None = None,
    rows: Int[Tensor, " R"] | None = None,
    capture: bool | str = "auto",
    precision: str = "float32",
    seed: int | None = None,
) -> EstimatorComparison:
    """Estimate log p(x_n) by three methods with different sources of error.

    ``"importance"`` draws from the guide's own q, ``"refined"`` from a q that is refined for each
    datum, and ``"annealed"`` anneals chains from the guide's q to the posterior.

    Args:
        model, guide: any pair under the contract.
        x: the whole data, (N, D); guides with a table identify rows by their index in it.
        num_samples: draws per datum of the first two methods.
        refine: optimization steps of each datum's q.
        num_chains: chains per datum of the third method.
        annealing: the settings of the chains; by default ``Annealing()``.
        mask: True where x is observed; NaN in x has the same meaning.
        rows: the rows of x to evaluate; by default all.
        capture, precision: as in
            :func:`~ppl_vae.evaluation.marginal_likelihood.importance.log_likelihood`.
        seed: seed of the draws; each method has its own.

    Raises:
        ValueError: if :func:`~ppl_vae.evaluation.marginal_likelihood.importance.log_likelihood`
            rejects the arguments.
    """
    check_int("refine", refine)
    estimate = partial(
        log_likelihood,
        model,
        guide,
        x,
        mask=mask,
        rows=rows,
        capture=capture,
        precision=precision,
    )
    # With different seeds the draws, and so the errors of the means, are independent.
    seeds = [None if seed is None else seed + k for k in range(3)]
    return EstimatorComparison.of(
        {
            "importance": estimate(num_samples, seed=seeds[0]),
            "refined": estimate(num_samples, refine=refine, seed=seeds[1]),
            "annealed": estimate(
                num_chains, method="annealed", annealing=annealing, seed=seeds[2]
            ),
        }
    )


def _listed(names: list[str]) -> str:
    return " and ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])
