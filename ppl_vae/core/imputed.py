"""Imputed data, with what their standard deviations include."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ppl_vae.core.arrays.schema import RowLabels
from ppl_vae.core.results import NO_LABELS, UNSAVED, Result
from ppl_vae.core.stats import ESS_FLOOR
from ppl_vae.core.text import counted
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
"""The coverage in the table that PX-EM fitted the model to, measured by
``tests/evaluation/prediction/test_imputed_intervals.py``."""


@dataclasses.dataclass(frozen=True, repr=False)
class Imputation(Result):
    """Imputed data: the conditional distribution of each missing value given its row.

    Unless ``parameter_draws`` is positive, standard deviations and draws take the parameters of
    the model as known. If these were fitted to few rows, intervals are too narrow; ``COVERAGE`` in
    this module has measured figures. Under the true parameters mean ± 1.96 sd covered 95 %. With
    draws of the parameters standard deviations and quantiles include their uncertainty.

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
        quantiles: quantiles of the conditional distribution where missing; the data where
            observed; (Q, N, D). None if none were requested.
        labels: the labels of the rows and columns, if the data were a frame; see :meth:`to_frame`.
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
        if self.labels.frame_labels is None:
            return pd.DataFrame(values.detach().cpu().numpy(), columns=self.labels.columns)
        return self.labels.data(values)

    def __repr__(self) -> str:
        filled, known = self.sd != 0, self.sd[self.sd > 0]
        lines = [f"Imputation: {int(filled.sum())} of {counted(filled.numel(), 'entry')} filled"]
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
