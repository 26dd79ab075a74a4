"""Data: the embedded digits, disjoint splits, units, and draws from grey values."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ppl_vae.core.validation import ArrayLike, as_matrix, check_int, check_option
from ppl_vae.data.column_scales import MAX_SCALE_RATIO, resembles_grey_values
from ppl_vae.data.column_stats import ColumnStats


def digits() -> Float[np.ndarray, "1797 64"]:
    """scikit-learn's handwritten digits, 8 x 8 pixels, each in 0..1 (sixteenths)."""
    return np.asarray(load_digits(return_X_y=True)[0]) / 16


@dataclass(frozen=True)
class Split:
    """Disjoint rows for fitting, early stopping and testing.

    Attributes:
        train, val, test: (N, D) each.
        train_rows, val_rows, test_rows: which rows of the data they were (of ``x_test``, if that
            was given).
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
    """Shuffle rows and part them; with ``x_test`` given, x has no test rows to give.

    Raises:
        ValueError: if there are too few rows to part, or x_test has another width.
    """
    x = as_matrix(x)
    num_val = max(1, round(val * len(x)))
    if x_test is not None:
        x_test = as_matrix(x_test, name="x_test").to(x)
        if x_test.shape[1] != x.shape[1]:
            raise ValueError(f"x_test has {x_test.shape[1]} columns, x {x.shape[1]}")
        train, val_rows = _part(torch.arange(len(x)), num_val, seed)
        return Split(x[train], x[val_rows], x_test, train, val_rows, torch.arange(len(x_test)))
    num_test = max(2, round(test * len(x)))
    rest, test_rows = _part(torch.arange(len(x)), num_test, seed)
    train, val_rows = _part(rest, num_val, seed)
    return Split(x[train], x[val_rows], x[test_rows], train, val_rows, test_rows)


def _part(rows: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    if len(rows) - size < 3:
        raise ValueError(f"{len(rows)} rows are too few to keep {size} apart and fit the rest")
    kept, apart = train_test_split(rows.numpy(), test_size=size, random_state=seed)
    return torch.from_numpy(kept), torch.from_numpy(apart)


@dataclass(frozen=True)
class Units:
    """A shift per column, and one scale for all columns or one for each.

    With one scale step sizes do not depend on the data's units, and PPCA is equivariant: only
    log p moves, by the log of the Jacobian. With a scale per column isotropic noise is noise in
    proportion to the columns' standard deviations, so PPCA is another model; its log p comes back
    to the units of the data by the Jacobian all the same. Missing values stay missing.

    Attributes:
        loc: (D,).
        scale: () or (D,).
    """

    loc: Float[Tensor, " D"]
    scale: Float[Tensor, "*D"]

    @property
    def per_column(self) -> bool:
        """Whether each column has a scale of its own."""
        return self.scale.dim() > 0

    @property
    def common_scale(self) -> float:
        """The scale of all columns; 1 where each has its own, since there is no common one."""
        return 1.0 if self.per_column else float(self.scale)

    @classmethod
    def standardized(cls, columns: ColumnStats) -> "Units":
        """Mean zero and variance one for each column; a constant column keeps its scale."""
        scale = torch.where(columns.constant, 1.0, columns.variance.sqrt())
        return cls(columns.centre, scale)

    @classmethod
    def of(cls, x: Float[Tensor, "N D"]) -> "Units":
        """Mean zero a column, variance one on average, over the observed cells of x.

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
        """Those of x itself."""
        return cls(torch.zeros_like(x[0]), torch.ones_like(x[0, 0]))

    def apply(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """x in these units."""
        return (x - self.loc.to(x)) / self.scale.to(x)

    def undo(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """From these units back to the data's."""
        return x * self.scale.to(x) + self.loc.to(x)

    def log_jacobian(self, x: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """What to add to log densities of :meth:`apply` (x) to get those of x, in nats per datum.

        It is minus the sum of log scale over each row's observed cells; only what is missing in
        x matters, not its values.
        """
        observed = (~x.isnan()).double()
        if not self.per_column:
            return -observed.sum(1) * math.log(float(self.scale))
        return -(observed @ self.scale.double().log().to(x.device))


SCALES = ("auto", "none", "standardize")


@dataclass(frozen=True)
class Scaling:
    """The units in which a table is fitted, and why.

    Attributes:
        units: of the fits.
        asked: ``"auto"``, ``"none"`` or ``"standardize"``.
        note: what a person should know of them; empty if nothing.
    """

    units: Units
    asked: str
    note: str

    @property
    def done(self) -> str:
        """``"standardize"`` or ``"none"``."""
        return "standardize" if self.units.per_column else "none"


def choose_scaling(
    x: Float[Tensor, "N D"],
    columns: ColumnStats,
    scale: str = "auto",
    *,
    image_shape: tuple[int, int] | None = None,
) -> Scaling:
    """The units in which to fit a table.

    ``"standardize"`` gives every column a scale of its own, ``"none"`` all columns one.
    ``"auto"`` standardises if the standard deviations of the columns that vary differ by more
    than ten times, and the rows are not images: those have one unit, and the small standard
    deviations of their edges mean something. Rows are images if ``image_shape`` says so, or if
    they look like grey values: all within 0..1, of which at least half of the columns that vary
    reach more than one half.

    Args:
        x: the training rows; NaN is a missing value.
        columns: what they hold.
        scale: one of ``SCALES``.
        image_shape: height and width, if rows are images.

    Raises:
        ValueError: if ``scale`` is not known, or x does not vary.
    """
    check_option("scale", scale, SCALES)
    common, varies = Units.of(x), ~columns.constant
    deviations = columns.variance.sqrt()[varies]
    low, high = float(deviations.min()), float(deviations.max())
    mixed = high > MAX_SCALE_RATIO * low
    spread = f"the standard deviations of the columns go from {low:.3g} to {high:.3g}"
    if scale == "auto" and mixed and image_shape is None and resembles_grey_values(x, varies):
        note = (
            f"the columns are not standardised, although {spread}: all values lie in 0..1, as "
            "grey values do; scale='standardize' (--scale standardize) standardises them"
        )
        return Scaling(common, scale, note)
    if scale == "none" or (scale == "auto" and not (mixed and image_shape is None)):
        return Scaling(common, scale, "")
    constant = len(varies) - int(varies.sum())
    left = f"; {constant} constant column(s) cannot be, and keep their scale" if constant else ""
    note = (
        f"the columns are standardised for every fit (scale={scale!r}): {spread}{left}. PPCA's "
        "noise is then in proportion to the columns' standard deviations, which is another model "
        "than PPCA of the columns as they are (scale='none', --scale none), and sigma is in "
        "standard deviations. Log p is in the units of the data"
    )
    return Scaling(Units.standardized(columns), scale, note)


def binarize(x: ArrayLike, generator: torch.Generator | None = None) -> Float[Tensor, "N D"]:
    """A coin for each entry of x, which is one with the probability that the entry states.

    Once, it makes a fixed binary data set of grey images; as ``fit_svi(...,
    epoch_transform=binarize)`` it makes one anew for each epoch.

    Args:
        x: (N, D), in 0..1; NaN stays NaN.
        generator: of the coins, on x's device; by default the global one.

    Raises:
        ValueError: if x has entries outside 0..1.
    """
    x = as_matrix(x)
    holes = x.isnan()
    if num_wrong := int((~holes & ((x < 0) | (x > 1))).sum()):
        raise ValueError(
            f"x has {num_wrong} entries outside 0..1, which are no probabilities; divide by the "
            "largest grey value"
        )
    coins = torch.bernoulli(x.nan_to_num(), generator=generator)
    return torch.where(holes, x, coins)


@dataclass(frozen=True)
class Dequantization:
    """Whole grey values made continuous by noise, and scaled to 0..1.

        y = (x + step u) / (levels step),  u ~ Uniform(0, 1) an entry,

    so y = (255 x + u) / 256 for 8-bit pixels given as k / 255, and (k + u) / 256 for ``step=1``.
    A density over whole values can be made as high as one likes; over y it cannot. log p(y) plus
    :meth:`log_jacobian` is log p in the units of x. In units of one grey level (add D log step to
    that) it is on average over u a lower bound of the log probability of the levels.

    Attributes:
        levels: how many grey values there are.
        step: how far apart they are in x.

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
        """y, from noise of this generator (by default the global one); NaN stays NaN.

        Raises:
            ValueError: if x is not made of the grey values 0, step .. (levels - 1) step.
        """
        x = as_matrix(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        level = (x / self.step).round()
        off = (x / self.step - level).abs() > 1e-3
        wrong = off | (level < 0) | (level >= self.levels)
        if num_wrong := int(wrong.sum()):
            raise ValueError(
                f"x has {num_wrong} entries that are none of the {self.levels} grey values "
                f"0..{(self.levels - 1) * self.step:g} in steps of {self.step:g}; give levels= "
                "and step= as they are in x"
            )
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        # In the middles of so many cells: rounding then takes no value over to the next level.
        cells = 2.0 ** math.floor(-math.log2(4 * self.levels * torch.finfo(x.dtype).eps))
        return (level + ((noise * cells).floor() + 0.5) / cells) / self.levels

    def undo(self, y: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The grey values, in x's units, that y lies above; what lies beyond 0..1 stays beyond."""
        return (y * self.levels).floor() * self.step

    def log_jacobian(self, x: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """What to add to log densities of y to get those of x, in nats per datum.

        Of each row's observed cells; only the missing values of x matter, not its values.
        """
        scale = torch.tensor(self.levels * self.step, dtype=torch.float64)
        return Units(torch.zeros_like(x[0]), scale).log_jacobian(x)
