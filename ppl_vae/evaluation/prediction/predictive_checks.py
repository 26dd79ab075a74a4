"""Predictive checks of PPCA: statistics of replicated data sets against those of the data.

A data set of the same size, with the same entries missing, is drawn for each of several draws of
the parameters from their posterior (posterior predictive check) or their prior (prior predictive
check), and a statistic of it is compared with that of the data.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.inputs import labels_of
from ppl_vae.core.results import Result
from ppl_vae.core.state import seeded
from ppl_vae.core.text import counted
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int, check_option
from ppl_vae.evaluation.prediction.multiple_imputation import evenly_spaced
from ppl_vae.models.bayesian_ppca import ParameterDraws

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MAX_ROWS = 2000
"""The largest number of rows of the data that a check uses, evenly spaced."""
MAX_COLUMNS = 30
"""The largest number of columns that a check uses: those with the largest variances."""
EXTREME = 0.025
"""A p-value below this, or above one minus this, is extreme."""


@dataclass(frozen=True, repr=False)
class PredictiveCheck(Result):
    """A statistic of the data, and of data sets drawn from a model of them.

    Elements of the statistic are in units of the columns' standard deviations, which makes
    covariances correlations of the data; quantiles are relative to the columns' means.

    Attributes:
        statistic: ``"covariance"`` or ``"quantiles"``.
        elements: the name of each element.
        observed: the statistics of the data, (E,).
        posterior: the statistics of data sets drawn from the posterior predictive distribution,
            (R, E).
        prior: the statistics of data sets drawn from the prior predictive distribution, (R, E);
            None if no draws of the prior were given.
        notes: which rows and columns were left out.
    """

    statistic: str
    elements: tuple[str, ...]
    observed: Float[Tensor, " E"]
    posterior: Float[Tensor, "R E"]
    prior: Float[Tensor, "R E"] | None
    notes: tuple[str, ...] = ()

    @property
    def p_value(self) -> Float[Tensor, " E"]:
        """Posterior predictive p-values, the shares of replicated data sets in which the element
        is at least as large as in the data, (E,)."""
        return (self.posterior >= self.observed).double().mean(0)

    @property
    def extreme(self) -> Tensor:
        """Which p-values are below 0.025 or above 0.975, (E,)."""
        return (self.p_value - 0.5).abs() > 0.5 - EXTREME

    def __repr__(self) -> str:
        number, total = int(self.extreme.sum()), len(self.elements)
        lines = [
            f"posterior predictive check, {self.statistic}: {number} of "
            f"{counted(total, 'p-value')} below {EXTREME} or above {1 - EXTREME}, from "
            f"{counted(len(self.posterior), 'replicated data set')}"
        ]
        distance = (self.p_value - 0.5).abs()
        for place in distance.argsort(descending=True)[:3].tolist():
            lines.append(f"  {self.elements[place]}: p = {float(self.p_value[place]):.3f}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def predictive_check(
    x: ArrayLike,
    posterior: ParameterDraws,
    statistic: str = "covariance",
    *,
    prior: ParameterDraws | None = None,
    num_replicates: int = 200,
    columns: Iterable[Any] | None = None,
    seed: int | None = None,
) -> PredictiveCheck:
    """Compare a statistic of the data with that of data sets drawn from the posterior.

    PPCA fits the covariance of the data if K is large enough; the quantiles of the columns show
    whether they are Gaussian. Posterior predictive p-values use the data twice, and therefore
    concentrate around one half if the model is right.

    Args:
        x: the data of the fit, (N, D); NaN marks a missing value.
        posterior: draws of the parameters (S, ...), e.g. ``samples.parameters()``; some of them,
            evenly spaced, are used, each for one data set.
        statistic: ``"covariance"``, of all pairs of columns, or ``"quantiles"`` of each column.
        prior: draws of the prior, for a prior predictive check as well.
        num_replicates: the number of replicated data sets, R, at most S.
        columns: names of the columns; by default those of a DataFrame, or x1, x2, ...
        seed: seed of the replicated data.

    Raises:
        ValueError: if the statistic is unknown, or the draws have another width than x.

    References:
        Gelman, Meng, Stern: Posterior predictive assessment of model fitness via realized
        discrepancies (1996).
    """
    compute = STATISTICS[check_option("statistic", statistic, STATISTICS)]
    check_int("num_replicates", num_replicates)
    names = labels_of(x).columns if columns is None else columns
    data = as_matrix(x).double()
    names = [f"x{k + 1}" for k in range(data.shape[1])] if names is None else list(names)
    chosen, rows, notes = _choose(data)
    names, data = [str(names[k]) for k in chosen.tolist()], data[rows][:, chosen]
    loc = data.nanmean(0)
    scale = (data - loc).square().nanmean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)

    def of(values: Tensor) -> Tensor:
        return compute((values - loc) / scale)

    def replicated(parameters: ParameterDraws) -> Tensor:
        used = evenly_spaced(parameters, min(num_replicates, len(parameters.loc)))
        drawn = _replicates(data, used, chosen)
        return torch.stack([of(values) for values in drawn])

    with seeded(seed):
        return PredictiveCheck(
            statistic=statistic,
            elements=tuple(NAMES[statistic](names)),
            observed=of(data),
            posterior=replicated(posterior),
            prior=None if prior is None else replicated(prior),
            notes=notes,
        )


def _choose(data: Float[Tensor, "N D"]) -> tuple[Tensor, slice, tuple[str, ...]]:
    # The columns and rows that are used, and notes on the others.
    num_rows, width = data.shape
    step = -(-num_rows // MAX_ROWS)
    notes = [f"every {step}-th row only"] if step > 1 else []
    variance = (data - data.nanmean(0)).square().nanmean(0)
    chosen = variance.argsort(descending=True, stable=True)[:MAX_COLUMNS].sort().values
    if width > MAX_COLUMNS:
        notes.append(f"the {MAX_COLUMNS} columns with the largest variances, of {width}, only")
    return chosen, slice(None, None, step), tuple(notes)


def _replicates(
    data: Float[Tensor, "N D"], parameters: ParameterDraws, columns: Tensor
) -> Iterable[Float[Tensor, "N D"]]:
    # A data set for each draw of the parameters, with the missing entries of the data.
    missing, (loadings, loc, _, _) = data.isnan(), parameters
    if loc.shape[-1] <= int(columns.max()):
        raise ValueError(
            f"the draws are of parameters for {loc.shape[-1]} columns, and x has more; give the "
            "data of the fit"
        )
    for w, mean, scale in zip(loadings, loc, parameters.column_scale, strict=True):
        z = torch.randn(len(data), w.shape[-1]).to(data)
        noise = torch.randn(data.shape).to(data) * scale[columns].to(data)
        values = z @ w[columns].mT.to(data) + mean[columns].to(data) + noise
        yield values.masked_fill(missing, torch.nan)


def _covariance(values: Float[Tensor, "N D"]) -> Float[Tensor, " E"]:
    # The covariance of each pair of columns over the rows in which both are observed.
    observed = ~values.isnan()
    centred = torch.where(observed, values - values.nanmean(0), 0.0)
    counts = observed.to(values).mT @ observed.to(values)
    matrix = centred.mT @ centred / counts.clamp(min=1)
    below, beside = torch.tril_indices(*matrix.shape)
    return matrix[below, beside]


def _quantiles(values: Float[Tensor, "N D"]) -> Float[Tensor, " E"]:
    levels = torch.tensor(QUANTILES).to(values)
    return values.nanquantile(levels, dim=0).mT.flatten()


def _covariance_names(names: Sequence[str]) -> list[str]:
    below, beside = torch.tril_indices(len(names), len(names)).tolist()
    return [f"{names[i]}, {names[j]}" for i, j in zip(below, beside, strict=True)]


def _quantile_names(names: Sequence[str]) -> list[str]:
    return [f"{name}, {level:.0%}" for name in names for level in QUANTILES]


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "covariance": _covariance,
    "quantiles": _quantiles,
}
NAMES: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "covariance": _covariance_names,
    "quantiles": _quantile_names,
}
