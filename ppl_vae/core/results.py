"""Results of fits and estimates: frozen dataclasses of tensors with a readable representation."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from ppl_vae.core.arrays.schema import RowLabels
from ppl_vae.core.text import counted
from ppl_vae.core.text_table import preformatted_html
from ppl_vae.core.validation import check_option

if TYPE_CHECKING:
    import pandas


CONDITIONAL = (
    "standard deviations take the fitted parameters as known, so that intervals are too narrow "
    "where rows are few"
)
UNCONDITIONAL = "standard deviations include the uncertainty of the parameters"
COVERAGE = (
    "with 12 columns, K = 3 and 30 % missing, PPCA's 95 % intervals covered 80 % at 20 rows, 91 % "
    "at 50 and 94 % at 200; those of factor analysis 66, 88 and 94 %"
)
"""Measured by ``tests/evaluation/test_imputed_intervals.py``."""
ESS_FLOOR = 10.0
"""Estimates from weighted draws with a smaller effective sample size are called unreliable."""


NO_LABELS = RowLabels()
UNSAVED = {"saved": False}
"""Metadata of a dataclass field with live objects, which :meth:`Result.to_dict` leaves out."""


class Result:
    """Base of the result dataclasses: conversion to plain Python, to pandas and to HTML."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as numbers, strings and lists; values outside JSON (NaN, inf) are None."""
        return {field.name: plain(getattr(self, field.name)) for field in _saved(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; infinite values come back as NaN.

        Raises:
            ValueError: if a field is missing.
        """
        hints, fields = typing.get_type_hints(cls), _saved(cls)
        if missing := [field.name for field in fields if field.name not in content]:
            raise ValueError(f"this is no {cls.__name__}: it has no {missing}")
        return cls(
            **{field.name: revived(content[field.name], hints[field.name]) for field in fields}
        )

    def to_frame(self) -> "pandas.DataFrame | Any":
        """The 1-d fields as columns; shorter ones are padded with NaN.

        The result of a data frame's rows is a frame of the same library, with its index.
        """
        import pandas as pd

        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        columns = {
            field.name: value.detach().cpu().numpy()
            for field in fields
            if isinstance(value := getattr(self, field.name), Tensor) and value.dim() == 1
        }
        labels = getattr(self, "labels", NO_LABELS)
        if labels.labels is not None:
            return labels.named(columns)
        return pd.DataFrame({name: pd.Series(value) for name, value in columns.items()})

    def _repr_html_(self) -> str:
        """The representation in a notebook."""
        return preformatted_html(repr(self))


def _saved(result: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(result) if field.metadata != UNSAVED]


def plain(value: Any) -> Any:
    """Convert tensors, results and containers of them to values that JSON can hold."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return None
    return value


def revived(value: Any, hint: Any) -> Any:
    """The inverse of :func:`plain`, given the type of the value."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        present = next(kind for kind in inner if kind is not types.NoneType)
        return None if value is None else revived(value, present)
    if origin is tuple:
        return tuple(revived(item, inner[0]) for item in value)
    if origin is dict:
        return {key: revived(item, inner[1]) for key, item in value.items()}
    if hint is float:
        return float("nan") if value is None else float(value)
    if isinstance(hint, type) and issubclass(hint, Result):
        return hint.from_dict(value)
    if hint is Tensor or hasattr(hint, "array_type"):  # a jaxtyping shape
        return _tensor(value)
    return value


def _tensor(value: Any) -> Tensor:
    tensor = torch.from_numpy(np.asarray(_without_none(value)))
    return tensor.double() if tensor.is_floating_point() else tensor


def _without_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return float("nan") if value is None else value


@dataclasses.dataclass(frozen=True)
class Curve(Result):
    """An objective along a fit, averaged over spans of equal length, for plots.

    Attributes:
        steps: the number of steps at the end of each span.
        seconds: the time at the end of each span.
        value: the mean objective over each span, in nats per datum.
    """

    steps: Tensor
    seconds: Tensor
    value: Tensor


@dataclasses.dataclass(frozen=True, repr=False)
class FitResult(Result):
    """The result of a fit.

    Attributes:
        algorithm: its name.
        objective: the maximised objective, in nats per datum. SVI: its estimate at each step. EM:
            the bound after each E-step and each M-step in turn, (2 T,).
        elapsed: seconds since the start, one for each entry of ``objective``.
        steps: the number of iterations.
        seconds: the total time.
        stopped: the reason why the fit stopped.
        log_likelihood: EM: exact log p where ``objective`` has the bound; equal after E-steps.
        validation: SVI with ``x_val``: the ELBO (beta = 1) of its rows at ``validation_steps``.
        validation_steps: the numbers of steps before these evaluations.
        restored: whether the state with the best validation ELBO was restored.
        notes: caveats.
        converged: whether the result satisfies the optimality condition up to the tolerance; None
            where no condition is known, as for SVI.
        certificate: EM: the objective at the best parameters for the covariance of the data (with
            missing values, for the expected one), minus the objective, in nats per datum: it is
            zero at a maximum and positive at a saddle point.
        execution: SVI: whether steps were captured or ran eagerly, and why.
    """

    algorithm: str
    objective: Tensor
    elapsed: Tensor
    steps: int
    seconds: float
    stopped: str
    log_likelihood: Tensor | None = None
    validation: Tensor | None = None
    validation_steps: Tensor | None = None
    restored: bool = False
    notes: tuple[str, ...] = ()
    converged: bool | None = None
    certificate: float | None = None
    execution: str = ""

    def shifted(self, nats: float, validation: float) -> Self:
        """The same fit with its objectives converted to other units of the data.

        Args:
            nats: what to add to the mean log density of the training rows.
            validation: what to add to that of the validation rows; with missing values the two
                differ.
        """
        moved = {"objective": self.objective + nats}
        if self.log_likelihood is not None:
            moved["log_likelihood"] = self.log_likelihood + nats
        if self.validation is not None:
            moved["validation"] = self.validation + validation
        return dataclasses.replace(self, **moved)

    def curve(self, points: int = 100) -> Curve:
        """The objective averaged over at most ``points`` spans; for EM, after E-steps only."""
        value, elapsed = self.objective.double(), self.elapsed.double()
        if len(value) == 2 * self.steps:
            value, elapsed = value[::2], elapsed[::2]
        size = -(-len(value) // points)
        spans = [slice(start, start + size) for start in range(0, len(value), size)]
        return Curve(
            steps=torch.tensor([min(span.stop, len(value)) for span in spans]),
            seconds=torch.tensor([float(elapsed[span][-1]) for span in spans]),
            value=torch.tensor([float(value[span].mean()) for span in spans]),
        )

    def __repr__(self) -> str:
        last = self.objective[-min(len(self.objective), 50) :] if self.steps else torch.zeros(0)
        value, mean = last[-1:].sum(), ""
        if self.algorithm == "SVI" and len(last) > 1:
            value, mean = last.mean(), f", the mean over the last {len(last)} steps"
        steps = counted(self.steps, "step")
        lines = [
            f"{self.algorithm}: {steps} in {self.seconds:.2f} s, {self.stopped}",
            f"  objective {value:.4f} nats per datum{mean}",
        ]
        if self.validation is not None and len(self.validation):
            best = f"  validation ELBO {self.validation.max():.4f} nats per datum at best"
            lines.append(best + (", restored" if self.restored else ""))
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclasses.dataclass(frozen=True, repr=False)
class Imputation(Result):
    """Imputed data: the conditional distribution of each missing value given its row.

    Unless ``parameter_draws`` is positive, standard deviations and draws take the parameters of
    the model as known. If these were fitted to few rows, intervals are too narrow: mean ± 1.96 sd
    of PPCA with D = 12, K = 3 and 30 % missing, fitted by PX-EM to the table itself, covered 80 %
    at N = 20, 91 % at N = 50 and 94 % at N = 200, those of factor analysis 66 %, 88 % and 94 %.
    Under the true parameters they covered 95 % (``tests/evaluation/test_imputed_intervals.py``).
    With draws of the parameters standard deviations and quantiles include their uncertainty.

    Attributes:
        mean: the data where observed, untouched; the conditional mean where missing; (N, D).
        sd: the conditional standard deviation where missing, noise included; zero where observed;
            (N, D). NaN where it is unknown, because the value depends on a covariance that the
            data of the fit did not determine; the mean there is arbitrary.
        draws: joint draws given the row where missing; the data where observed; (S, N, D). NaN
            where the standard deviation is; None if no draws were requested.
        ess: the effective sample size of the weighted draws of z in each row, (N,), float64; NaN
            for complete rows. None if the result is exact.
        notes: caveats.
        parameter_draws: the number of draws of the parameters that means and standard deviations
            are averaged over; 0 if the parameters are taken as known.
        levels: the probabilities of ``quantiles``, (Q,).
        quantiles: of the conditional distribution where missing; the data where observed;
            (Q, N, D). None if none were requested.
        labels: of the rows and columns, if the data were a frame; see :meth:`to_frame`.
    """

    mean: Tensor
    sd: Tensor
    draws: Tensor | None = None
    ess: Tensor | None = None
    notes: tuple[str, ...] = ()
    parameter_draws: int = 0
    levels: tuple[float, ...] = ()
    quantiles: Tensor | None = None
    labels: RowLabels = dataclasses.field(default=NO_LABELS, metadata=UNSAVED)

    def to_frame(self, part: str = "mean") -> "pandas.DataFrame | Any":
        """The filled table, or its standard deviations, with the names of rows and columns.

        Args:
            part: ``"mean"`` or ``"sd"``.

        Returns:
            A frame of the library of the data; of pandas for arrays.

        Raises:
            ValueError: if the part is another one.
        """
        import pandas as pd

        values = getattr(self, check_option("part", part, ("mean", "sd")))
        if self.labels.labels is None:
            return pd.DataFrame(values.detach().cpu().numpy(), columns=self.labels.columns)
        return self.labels.data(values)

    def __repr__(self) -> str:
        filled, known = self.sd != 0, self.sd[self.sd > 0]
        lines = [f"Imputation: {int(filled.sum())} of {counted(filled.numel(), 'cell')} filled"]
        if len(known):
            lines[0] += f", standard deviations {known.min():.3g}..{known.max():.3g}"
            lines.extend(f"  {line}" for line in self.uncertainty())
        if unknown := int(self.sd.isnan().sum()):
            lines.append(f"  the standard deviation of {unknown} of these is not known")
        if self.draws is not None:
            lines.append(f"  {counted(len(self.draws), 'draw')}")
        lines.extend(f"  {line}" for line in self._trust())
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def uncertainty(self) -> tuple[str, ...]:
        """What the standard deviations include, for people."""
        if self.parameter_draws:
            return (f"{UNCONDITIONAL} ({counted(self.parameter_draws, 'draw')} of them)",)
        return CONDITIONAL, f"({COVERAGE})"

    def _trust(self) -> Iterator[str]:
        if self.ess is None or not bool((known := ~self.ess.isnan()).any()):
            return
        ess = self.ess[known]
        few = int((ess < ESS_FLOOR).sum())
        yield f"effective draws of z per row: median {ess.median():.0f}, fewest {ess.min():.1f}"
        if few:
            yield (
                f"NOT reliable in {few} of {counted(len(ess), 'row')} with missing values, with "
                f"fewer than {ESS_FLOOR:.0f} effective draws"
            )
            yield "remedy: refine=300, which optimizes q for each row, or more draws (num_samples)"
