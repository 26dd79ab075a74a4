"""Rubin's rules: one estimate from those of several completed tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.text import counted

MAX_PRINTED = 12
"""The largest number of elements that are printed."""


@dataclass(frozen=True, repr=False)
class PooledEstimate(Result):
    """An estimate from M completed tables, with a variance that includes what is missing.

    Attributes:
        estimate: the mean of the estimates, of their shape.
        within: the mean of their variances; zero if none were given.
        between: the variance of the estimates.
        variance: within + (1 + 1/M) between.
        freedom: degrees of freedom of Student's t for intervals.
        missing_information: the fraction of information that is missing, between 0 and 1.
        num_imputations: M.
    """

    estimate: Tensor
    within: Tensor
    between: Tensor
    variance: Tensor
    freedom: Tensor
    missing_information: Tensor
    num_imputations: int

    @property
    def standard_error(self) -> Tensor:
        """The square root of the variance."""
        return self.variance.sqrt()

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The central interval of Student's t with this coverage.

        Raises:
            ValueError: if level is not between 0 and 1.
        """
        from scipy import stats

        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1; got {level}")
        factor = stats.t.ppf((1 + level) / 2, self.freedom.numpy(force=True))
        half = torch.as_tensor(factor) * self.standard_error
        return self.estimate - half, self.estimate + half

    def __repr__(self) -> str:
        lines = [f"Pooled estimate of {counted(self.num_imputations, 'completed table')}"]
        names = ("estimate", "standard_error", "freedom", "missing_information")
        if self.estimate.numel() <= MAX_PRINTED:
            lines += [f"  {name.replace('_', ' ')} {_numbers(self, name)}" for name in names]
        else:
            share = float(self.missing_information.max())
            lines.append(f"  of shape {tuple(self.estimate.shape)}")
            lines.append(f"  fraction of missing information up to {share:.2f}")
        return "\n".join(lines)


def _numbers(result: PooledEstimate, name: str) -> str:
    values: Tensor = getattr(result, name)
    return ", ".join(f"{value:.4g}" for value in values.flatten().tolist())


def pool(
    estimates: Sequence[Any], variances: Sequence[Any] | None = None, *, freedom: float = math.inf
) -> PooledEstimate:
    """Combine estimates from multiply imputed tables by Rubin's rules.

    With ``imputed = impute(..., posterior=samples, draws=20)`` and a function ``fit`` of a
    completed table that returns an estimate and its variance::

        pool(*zip(*[fit(table) for table in imputed.draws]))

    Args:
        estimates: one from each of M tables, numbers or arrays of one shape.
        variances: their squared standard errors, of the same shapes. None for a quantity of the
            table itself, such as a column's mean over these very rows, which has no sampling
            error.
        freedom: the degrees of freedom that the estimate would have without missing values, such
            as N - 1 for a mean; infinite for estimates whose intervals are normal.

    Raises:
        ValueError: if there are fewer than two estimates, if shapes differ, if a number is not
            finite, or if a variance is negative.

    References:
        Rubin: Multiple imputation for nonresponse in surveys (1987).
        Barnard, Rubin: Small-sample degrees of freedom with multiple imputation (1999).
    """
    values = _stacked("estimates", estimates)
    number = len(values)
    if number < 2:
        raise ValueError(f"estimates must be those of at least two tables; got {number}")
    if not freedom > 0 or (variances is None and freedom < math.inf):
        raise ValueError(f"freedom must be positive, and needs variances; got {freedom}")
    given = torch.zeros_like(values) if variances is None else _stacked("variances", variances)
    if given.shape != values.shape or bool((given < 0).any()):
        raise ValueError(
            "variances must be as many as estimates, of their shape, and at least zero; got "
            f"{tuple(given.shape)} for {tuple(values.shape)}, smallest {float(given.min()):.3g}"
        )
    within, between = given.mean(0), values.var(0)
    inflated = (1 + 1 / number) * between
    total = within + inflated
    share = torch.where(total > 0, inflated / total, 0.0)
    degrees = _degrees_of_freedom(share, number, freedom)
    # (r + 2 / (nu + 3)) / (r + 1) with r = share / (1 - share).
    missing = share + 2 * (1 - share) / (degrees + 3)
    return PooledEstimate(values.mean(0), within, between, total, degrees, missing, number)


def _degrees_of_freedom(share: Tensor, number: int, freedom: float) -> Float[Tensor, "..."]:
    # Equation 3 of Barnard and Rubin: 1 / nu = 1 / nu_m + 1 / nu_obs.
    inverse = share.square() / (number - 1)
    if math.isfinite(freedom):
        observed = (freedom + 1) / (freedom + 3) * freedom * (1 - share)
        inverse = inverse + 1 / observed
    return 1 / inverse


def _stacked(name: str, values: Sequence[Any]) -> Float[Tensor, "M ..."]:
    found = [torch.as_tensor(value).double() for value in values]
    if len({value.shape for value in found}) > 1:
        raise ValueError(f"{name} must have one shape; got {sorted({*map(_shape, found)})}")
    stacked = torch.stack(found) if found else torch.zeros(0)
    if not bool(stacked.isfinite().all()):
        raise ValueError(f"{name} must be finite; some are NaN or infinite")
    return stacked


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)
