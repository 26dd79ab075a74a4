"""The units in which data are fitted: affine transformations of the columns."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.imputed import Imputation
from ppl_vae.core.validation import check_option
from ppl_vae.data.column_stats import LARGEST_RATIO, ColumnStats, may_be_grey_values


@dataclass(frozen=True)
class Units:
    """An affine transformation of the columns, with one common scale or one per column.

    A common scale makes step sizes independent of the data's units, and PPCA is equivariant: only
    log p changes, by the log of the Jacobian. With one scale per column, isotropic noise is
    proportional to the columns' standard deviations, so PPCA is a different model; the Jacobian
    converts its log p to the units of the data all the same. Missing values stay missing.

    Attributes:
        loc: what is subtracted from each column, (D,).
        scale: what the columns are divided by then, () or (D,).
    """

    loc: Float[Tensor, " D"]
    scale: Float[Tensor, "*D"]

    @property
    def per_column(self) -> bool:
        """Whether each column has a scale of its own."""
        return self.scale.dim() > 0

    @property
    def common_scale(self) -> float:
        """The common scale of the columns; 1 if each column has its own."""
        return 1.0 if self.per_column else float(self.scale)

    @classmethod
    def standardized(cls, columns: ColumnStats) -> "Units":
        """Mean zero and variance one for each column; a constant column keeps its scale."""
        scale = torch.where(columns.constant, 1.0, columns.variance.sqrt())
        return cls(columns.centre, scale)

    @classmethod
    def of(cls, x: Float[Tensor, "N D"]) -> "Units":
        """Mean zero per column, and variance one on average, over the observed entries of x.

        Raises:
            ValueError: if x does not vary.
        """
        loc = x.nanmean(0)
        scale = (x - loc).square().nanmean(0).mean().sqrt()
        if not scale > 0:
            raise ValueError("x does not vary: all its rows are equal")
        return cls(loc, scale)

    @classmethod
    def none(cls, x: Float[Tensor, "N D"]) -> "Units":
        """The identity."""
        return cls(torch.zeros_like(x[0]), torch.ones_like(x[0, 0]))

    def apply(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """x in these units."""
        return (x - self.loc.to(x)) / self.scale.to(x)

    def undo(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Convert from these units back to those of the data."""
        return x * self.scale.to(x) + self.loc.to(x)

    def undo_imputation(self, found: Imputation, x: Float[Tensor, "N D"]) -> Imputation:
        """Means and standard deviations of the missing values of x, converted from these units;
        observed values are those of x."""
        mean = torch.where(x.isnan(), self.undo(found.mean.to(x)), x)
        return replace(found, mean=mean, sd=found.sd.to(x) * self.scale.to(x))

    def log_jacobian(self, x: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """The term that converts log densities of :meth:`apply` (x) to those of x, in nats per
        datum.

        It is minus the sum of log scale over the observed entries of each row; only the
        missingness of x matters, not its values.
        """
        observed = (~x.isnan()).double()
        if not self.per_column:
            return -observed.sum(1) * math.log(float(self.scale))
        return -(observed @ self.scale.double().log().to(x.device))


SCALES = ("auto", "none", "standardize")


@dataclass(frozen=True)
class Scaling:
    """The units in which a table is fitted.

    Attributes:
        units: units of the fits.
        requested: ``"auto"``, ``"none"`` or ``"standardize"``.
        note: an explanation of the choice for reports; may be empty.
    """

    units: Units
    requested: str
    note: str

    @property
    def applied(self) -> str:
        """Either ``"standardize"`` or ``"none"``."""
        return "standardize" if self.units.per_column else "none"


def choose_scaling(
    x: Float[Tensor, "N D"],
    columns: ColumnStats,
    scale: str = "auto",
    *,
    image_shape: tuple[int, int] | None = None,
) -> Scaling:
    """Choose the units in which to fit a table.

    ``"standardize"`` gives every column its own scale, ``"none"`` one scale to all columns.
    ``"auto"`` standardises if the standard deviations of the varying columns differ by more than
    a factor of ten and the rows are not images, whose pixels share one unit, so that small
    standard deviations at their edges are informative. Rows are images if ``image_shape`` is
    given or they may be grey values: all entries within 0..1, and at least half of the varying
    columns exceed one half somewhere.

    Args:
        x: the training rows; NaN marks a missing value.
        columns: their column statistics.
        scale: one of ``SCALES``.
        image_shape: height and width, if rows are images.

    Raises:
        ValueError: if ``scale`` is not known, or x does not vary.
    """
    check_option("scale", scale, SCALES)
    common, varies = Units.of(x), ~columns.constant
    deviations = columns.variance.sqrt()[varies]
    low, high = float(deviations.min()), float(deviations.max())
    mixed = high > LARGEST_RATIO * low
    spread = f"the standard deviations of the columns range from {low:.3g} to {high:.3g}"
    grey = may_be_grey_values(columns.low, columns.high, varies)
    if scale == "auto" and mixed and image_shape is None and grey:
        note = (
            f"the columns are not standardised, although {spread}: all values lie in 0..1, as "
            "grey values do; scale='standardize' (--scale standardize) standardises them"
        )
        return Scaling(common, scale, note)
    if scale == "none" and mixed and image_shape is None and not grey:
        note = (
            f"the columns are not standardised (scale='none', --scale none), although {spread}: "
            "models with one noise variance for all columns depend on their units"
        )
        return Scaling(common, scale, note)
    if scale == "none" or (scale == "auto" and not (mixed and image_shape is None)):
        return Scaling(common, scale, "")
    constant = len(varies) - int(varies.sum())
    excepted = f"; {constant} constant column(s) keep their scale" if constant else ""
    note = (
        f"the columns are standardised for every fit (scale={scale!r}): {spread}{excepted}. "
        "PPCA's noise is then proportional to the columns' standard deviations, which is another "
        "model than PPCA of the original columns (scale='none', --scale none), and sigma is in "
        "standard deviations. Log p is in the units of the data"
    )
    return Scaling(Units.standardized(columns), scale, note)
