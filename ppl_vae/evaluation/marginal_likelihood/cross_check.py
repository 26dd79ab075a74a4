"""log p of the same data by several methods, side by side: do they agree?"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood

CHAINS = 32
"""A datum, enough to tell whether their weights are reliable."""
APART = 3.0
"""Means that differ by more of their Monte Carlo errors than this are told apart."""


@dataclass(frozen=True, repr=False)
class EstimatorComparison(Result):
    """Estimates of log p(x_n) of the same data by several methods.

    Each is a lower bound in expectation, so that where two differ by more than their errors the
    higher is nearer the truth.

    Attributes:
        estimates: by method.
    """

    estimates: dict[str, LogLikelihood]

    @classmethod
    def of(cls, estimates: Mapping[str, LogLikelihood]) -> Self:
        """Of estimates at hand.

        Raises:
            ValueError: if there are none, or they are not of equally many data.
        """
        lengths = {name: len(estimate.value) for name, estimate in estimates.items()}
        if not lengths:
            raise ValueError("there is no estimate; give at least one by its method")
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all must be of the same data; their numbers: {lengths}")
        return cls(dict(estimates))

    def difference(self, one: str, other: str) -> tuple[float, float]:
        """Mean over the data of one less the other, and its Monte Carlo error, nats per datum."""
        first, second = self.estimates[one], self.estimates[other]
        mean = float((first.value - second.value).mean())
        return mean, math.hypot(_monte_carlo(first), _monte_carlo(second))

    @property
    def highest(self) -> str:
        """The method with the highest mean."""
        return max(self.estimates, key=lambda name: self.estimates[name].mean)

    @property
    def short(self) -> dict[str, tuple[float, float]]:
        """By how much each method falls short of the highest, and the error, where it is told."""
        top, found = self.highest, {}
        for name in self.estimates:
            behind, error = self.difference(top, name)
            if behind > APART * error:
                found[name] = behind, error
        return found

    def to_frame(self) -> pd.DataFrame:
        """One row a method: mean, error over the data, its Monte Carlo part, share reliable."""
        rows = {
            name: {
                "mean": estimate.mean,
                "error": estimate.mean_error,
                "monte_carlo": _monte_carlo(estimate),
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
                f"log p of {number} data by each method, nats per datum ± Monte Carlo error",
                render([self._cells(name) for name in self.estimates], indent="  "),
                *(f"  {line}" for line in self._verdict()),
            ]
        )

    def _cells(self, name: str) -> tuple[str, ...]:
        estimate = self.estimates[name]
        bound = "≥" if estimate.share_reliable < FEW_RELIABLE else ""
        drawn = "chains" if estimate.method == "annealed" else "draws"
        return (
            name,
            f"{bound}{estimate.mean:.3f} ± {_monte_carlo(estimate):.3f}",
            f"{math.floor(100 * estimate.share_reliable)} % reliable",
            f"{estimate.num_samples} {drawn}",
        )

    def _verdict(self) -> Iterator[str]:
        short, top = self.short, self.highest
        for name, (behind, error) in short.items():
            yield f"{name} falls short of {top} by {behind:.3f} ± {error:.3f}: a lower bound"
        agreeing = [name for name in self.estimates if name not in short]
        if len(agreeing) > 1:
            pairs = itertools.combinations(agreeing, 2)
            widest = max((self.difference(*pair) for pair in pairs), key=lambda d: abs(d[0]))
            yield f"{_listed(agreeing)} agree: {abs(widest[0]):.3f} ± {widest[1]:.3f} at most"
        if any(e.share_reliable < FEW_RELIABLE for e in self.estimates.values()):
            yield f"≥: under {FEW_RELIABLE:.0%} reliable, a lower bound in expectation"


def cross_check(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    num_samples: int = 1000,
    *,
    refine: int = 300,
    num_chains: int = CHAINS,
    annealing: Annealing | None = None,
    mask: ArrayLike | None = None,
    rows: Int[Tensor, " R"] | None = None,
    capture: bool | str = "auto",
    precision: str = "float32",
    seed: int | None = None,
) -> EstimatorComparison:
    """Estimate log p(x_n) by three methods that err in different ways.

    ``"importance"`` draws from the guide's own q, ``"refined"`` from a q refined for each datum,
    ``"annealed"`` walks chains from the guide's q to the posterior.

    Args:
        model, guide: any pair under the contract.
        x: the whole data, (N, D); rows are looked up by their place in it.
        num_samples: draws per datum, of the first two.
        refine: steps of the search for each datum's q.
        num_chains: chains per datum, of the third.
        annealing: how they walk; by default ``Annealing()``.
        mask: True where x is observed; NaN in x says the same.
        rows: look at these rows of x only; by default at all.
        capture, precision: as in
            :func:`~ppl_vae.evaluation.marginal_likelihood.importance.log_likelihood`.
        seed: of the draws; each method has its own.

    Raises:
        ValueError: what :func:`~ppl_vae.evaluation.marginal_likelihood.importance.log_likelihood`
            refuses.
    """
    check_int("refine", refine)

    common = {"mask": mask, "rows": rows, "capture": capture, "precision": precision}
    methods: dict[str, dict[str, Any]] = {
        "importance": {"num_samples": num_samples},
        "refined": {"num_samples": num_samples, "refine": refine},
        "annealed": {"num_samples": num_chains, "method": "annealed", "annealing": annealing},
    }
    found = {}
    for place, (name, how) in enumerate(methods.items()):
        # Draws of their own, so that errors of differences are those of independent means.
        own = None if seed is None else seed + place
        found[name] = log_likelihood(model, guide, x, **how, **common, seed=own)
    return EstimatorComparison.of(found)


def _monte_carlo(estimate: LogLikelihood) -> float:
    return float(estimate.standard_error.square().sum().sqrt()) / len(estimate.value)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
