"""The embedded digits, disjoint splits, units of the data, binarization and dequantization."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.imputed import Imputation
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int, check_option
from ppl_vae.data.column_stats import LARGEST_RATIO, ColumnStats, may_be_grey_values


def digits() -> Float[np.ndarray, "1797 64"]:
    """scikit-learn's handwritten digits, 8 x 8 pixels, each in 0..1 (sixteenths)."""
    from sklearn.datasets import load_digits

    return np.asarray(load_digits(return_X_y=True)[0]) / 16


@dataclass(frozen=True)
class Split:
    """Disjoint rows for fitting, early stopping and testing.

    Attributes:
        train, val, test: (N, D) each.
        train_rows, val_rows, test_rows: indices of these rows in the data (test rows: in
            ``x_test``, if that was given).
    """

    train: Tensor
    val: Tensor
    test: Tensor
    train_rows: Tensor
    val_rows: Tensor
    test_rows: Tensor


def split(
    x: ArrayLike,
    x_test: ArrayLike | None = None,
    *,
    val: float = 0.08,
    test: float = 0.17,
    seed: int = 0,
) -> Split:
    """Split rows at random into training, validation and test rows.

    Args:
        x: the data, (N, D).
        x_test: given test rows; x is split into training and validation rows then.
        val, test: shares of the validation and test rows.
        seed: seed of the shuffle.

    Raises:
        ValueError: if there are too few rows, or x_test has another width.
    """
    schema, x = TableSchema.of(x), as_matrix(x)
    num_val = max(1, round(val * len(x)))
    if x_test is not None:
        x_test = as_matrix(x_test, name="x_test", schema=schema).to(x)
        if x_test.shape[1] != x.shape[1]:
            raise ValueError(f"x_test has {x_test.shape[1]} columns, x {x.shape[1]}")
        train, val_rows = _split_off(torch.arange(len(x)), num_val, seed)
        return Split(x[train], x[val_rows], x_test, train, val_rows, torch.arange(len(x_test)))
    num_test = max(2, round(test * len(x)))
    rest, test_rows = _split_off(torch.arange(len(x)), num_test, seed)
    train, val_rows = _split_off(rest, num_val, seed)
    return Split(x[train], x[val_rows], x[test_rows], train, val_rows, test_rows)


def _split_off(rows: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.model_selection import train_test_split

    if len(rows) - size < 3:
        raise ValueError(f"{len(rows)} rows are too few to hold out {size} and fit the rest")
    kept, held_out = train_test_split(rows.numpy(), test_size=size, random_state=seed)
    return torch.from_numpy(kept), torch.from_numpy(held_out)


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


def binarize(x: ArrayLike, generator: torch.Generator | None = None) -> Float[Tensor, "N D"]:
    """Stochastic binarization: each entry is drawn from a Bernoulli with that probability.

    Applied once, it makes a fixed binary data set of grey images; ``fit_svi(...,
    epoch_transform=binarize)`` draws a new one in each epoch.

    Args:
        x: (N, D), in 0..1; NaN stays NaN.
        generator: generator of the draws, on the device of x; by default the global one.

    Raises:
        ValueError: if x has entries outside 0..1.
    """
    x = as_matrix(x)
    missing = x.isnan()
    if num_wrong := int((~missing & ((x < 0) | (x > 1))).sum()):
        raise ValueError(
            f"x has {num_wrong} entries outside 0..1, which are not probabilities; divide by the "
            "largest grey value"
        )
    draws = torch.bernoulli(x.nan_to_num(), generator=generator)
    return torch.where(missing, x, draws)


@dataclass(frozen=True)
class Dequantization:
    """Uniform dequantization: discrete grey values made continuous by noise, scaled to 0..1.

        y = (x + step u) / (levels step),  u ~ Uniform(0, 1) for each entry,

    so y = (255 x + u) / 256 for 8-bit pixels given as k / 255, and (k + u) / 256 for ``step=1``.
    The likelihood of a density model of discrete values is unbounded; that of y is not. log p(y)
    plus :meth:`log_jacobian` is log p in the units of x. In units of one grey level (add D log
    step), its average over u is a lower bound on the log probability of the levels.

    Attributes:
        levels: number of grey values.
        step: difference between neighbouring grey values in x.

    References:
        Theis, van den Oord, Bethge: A note on the evaluation of generative models (2016).
    """

    levels: int = 256
    step: float = 1 / 255

    def __post_init__(self) -> None:
        check_int("levels", self.levels, 2)
        if not self.step > 0:
            raise ValueError(f"step must be positive; got {self.step}")

    def apply(
        self, x: ArrayLike, generator: torch.Generator | None = None
    ) -> Float[Tensor, "N D"]:
        """y, with noise from this generator (by default the global one); NaN stays NaN.

        Raises:
            ValueError: if x has other values than the grey values 0, step .. (levels - 1) step.
        """
        x = as_matrix(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        level = (x / self.step).round()
        off = (x / self.step - level).abs() > 1e-3
        wrong = off | (level < 0) | (level >= self.levels)
        if num_wrong := int(wrong.sum()):
            raise ValueError(
                f"x has {num_wrong} entries that are not among the {self.levels} grey values "
                f"0..{(self.levels - 1) * self.step:g} in steps of {self.step:g}; give the "
                "levels= and step= of x"
            )
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        # Midpoints of a grid of this many cells, so that rounding cannot reach the next level.
        cells = 2.0 ** math.floor(-math.log2(4 * self.levels * torch.finfo(x.dtype).eps))
        return (level + ((noise * cells).floor() + 0.5) / cells) / self.levels

    def undo(self, y: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The grey values below y, in the units of x; values outside 0..1 are extrapolated."""
        return (y * self.levels).floor() * self.step

    def log_jacobian(self, x: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """The term that converts log densities of y to those of x, in nats per datum.

        It counts the observed entries of each row; the values of x do not matter.
        """
        scale = torch.tensor(self.levels * self.step, dtype=torch.float64)
        return Units(torch.zeros_like(x[0]), scale).log_jacobian(x)
