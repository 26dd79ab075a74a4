"""The ranking of several models by their held-out log-likelihood, with paired errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.stats import standard_error
from ppl_vae.core.text import counted
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, as_vector
from ppl_vae.evaluation.marginal_likelihood.elpd import stacking_weights
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood

if TYPE_CHECKING:
    import pandas


FEW_RELIABLE = 0.85
"""With a smaller share of reliable data, a mean is reported as a lower bound."""


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Models ranked by their mean log p(x_n) over the same held-out data, the best first.

    With l_mn = log p_m(x_n) and b the best model, the difference is mean_n(l_mn - l_bn) and its
    error sd_n(l_mn - l_bn) / sqrt(N), in which variation that all models share cancels. All
    values are in nats per datum. The Monte Carlo error of draws of global latent variables, which
    the data share, is added to both errors.

    Attributes:
        names: the names of the models.
        mean: the mean of log p over the data.
        error: its standard error, sd over the data / sqrt(N), which includes the Monte Carlo
            error.
        difference: the difference from the best model's mean; 0 for the best, else <= 0.
        difference_error: the paired standard error of the difference; 0 for the best.
        reliable: the share of the data whose estimate is reliable; 1 for exact values.
        weight: the stacking weight (by ArviZ): the model's weight in the mixture of the models
            under which these data are most probable, which measures what it adds to the others.
        pointwise: log p of each datum under each model.
        notes: the caveats of each model's estimates, preceded by its name.
    """

    names: tuple[str, ...]
    mean: Float[Tensor, " M"]
    error: Float[Tensor, " M"]
    difference: Float[Tensor, " M"]
    difference_error: Float[Tensor, " M"]
    reliable: Float[Tensor, " M"]
    weight: Float[Tensor, " M"]
    pointwise: Float[Tensor, "M N"]
    notes: tuple[str, ...] = ()

    @property
    def num_data(self) -> int:
        """The number of data that all models were evaluated on, N."""
        return self.pointwise.shape[1]

    def to_frame(self) -> "pandas.DataFrame":
        """One row per model, indexed by its name; all attributes but ``pointwise`` as columns."""
        import pandas as pd

        columns = ("mean", "error", "difference", "difference_error", "reliable", "weight")
        index = pd.Index(self.names, name="model")
        return pd.DataFrame(
            {key: getattr(self, key).numpy(force=True) for key in columns}, index=index
        )

    def __repr__(self) -> str:
        lines = [
            f"log p of {self.num_data} data points, nats per datum, ± one standard error; "
            "differences to the best are paired",
            render([self._cells(row) for row in range(len(self.names))], indent="  "),
        ]
        if bool((self.reliable < FEW_RELIABLE).any()):
            lines.append(f"  ≥: under {FEW_RELIABLE:.0%} reliable, a lower bound in expectation")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _cells(self, row: int) -> tuple[str, ...]:
        bound = "≥" if self.reliable[row] < FEW_RELIABLE else ""
        behind = f"{self.difference[row]:.3f} ± {self.difference_error[row]:.3f}"
        return (
            self.names[row],
            f"{bound}{self.mean[row]:.3f} ± {self.error[row]:.3f}",
            behind if row else "best",
            f"{math.floor(100 * self.reliable[row])} % reliable",
            f"weight {self.weight[row]:.2f}",
        )


def compare(estimates: Mapping[str, LogLikelihood | Tensor | ArrayLike]) -> Comparison:
    """Rank models by the mean of their held-out *marginal* log-likelihoods of the same data.

    Args:
        estimates: log p(x_n) of each datum, in nats, by the name of the model: a
            :class:`LogLikelihood`, or N exact values. The data must have the same order and units
            for all models.

    Raises:
        ValueError: if there are no models, fewer than two data or different numbers of data, or
            if values are not 1-d, NaN or infinite; the message names the models.

    References:
        Vehtari, Gelman, Gabry: Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC (2017): the paired standard error of a difference. Yao,
        Vehtari, Simpson, Gelman: Using stacking to average Bayesian predictive distributions
        (2018).
    """
    if not estimates:
        raise ValueError("there is nothing to compare; pass log p(x_n) of at least one model")
    values = {name: _values(name, estimate) for name, estimate in estimates.items()}
    _check_lengths(values)
    reliable = torch.tensor([_share_reliable(e) for e in estimates.values()], dtype=torch.float64)
    pointwise = torch.stack(list(values.values()))
    order = pointwise.mean(1).argsort(descending=True, stable=True)
    pointwise = pointwise[order]
    mean = pointwise.mean(1)
    common = torch.tensor([_global_error(e) for e in estimates.values()], dtype=torch.float64)
    common = common[order]
    both = torch.where(torch.arange(len(common)) > 0, common.hypot(common[0]), 0.0)
    return Comparison(
        names=tuple(list(values)[k] for k in order),
        mean=mean,
        error=standard_error(pointwise).hypot(common),
        difference=mean - mean[0],
        difference_error=standard_error(pointwise - pointwise[0]).hypot(both),
        reliable=reliable[order],
        weight=stacking_weights([list(values)[k] for k in order], pointwise),
        pointwise=pointwise,
        notes=tuple(f"{name}: {note}" for name, e in estimates.items() for note in _notes(e)),
    )


def _notes(estimate: Any) -> tuple[str, ...]:
    return estimate.notes if isinstance(estimate, LogLikelihood) else ()


def _global_error(estimate: Any) -> float:
    return (estimate.global_error or 0.0) if isinstance(estimate, LogLikelihood) else 0.0


def _share_reliable(estimate: Any) -> float:
    return estimate.share_reliable if isinstance(estimate, LogLikelihood) else 1.0


def _values(name: str, estimate: Any) -> Float[Tensor, " N"]:
    values = estimate.value if isinstance(estimate, LogLikelihood) else estimate
    values = as_vector(values, name=f"log p of {name!r}").double().cpu()
    if wrong := int((~values.isfinite()).sum()):
        raise ValueError(
            f"log p of {name!r} is NaN or infinite for {wrong} of "
            f"{counted(len(values), 'data point')}; such models cannot be ranked by a mean. "
            "Leave the "
            "model out, or those data for all models"
        )
    return values


def _check_lengths(values: Mapping[str, Tensor]) -> None:
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "all models must be evaluated on the same data; the numbers of data points are "
            f"{lengths}"
        )
    if min(lengths.values()) < 2:
        raise ValueError(
            "a standard error needs at least 2 data points; the numbers of data points are "
            f"{lengths}"
        )
