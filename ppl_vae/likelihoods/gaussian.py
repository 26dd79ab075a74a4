"""Gaussian noise about a decoder's outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.core.config import configurable
from ppl_vae.core.program import Density
from ppl_vae.core.validation import check_option
from ppl_vae.guides.families import soft_clamp
from ppl_vae.likelihoods.base import Likelihood, Mask, Outputs, Rows, by_cell
from ppl_vae.likelihoods.distributions import StandardizedNormal

SCALES = ("shared", "per-dim", "network", "optimal")
NEAR_FLOOR = 1.01


class Gaussian(Likelihood):
    """x | z ~ N(G(z), diag(sigma^2)).

    ``"optimal"``: in training, sigma^2 is the mean squared residual of the batch, at which its
    density is highest. Such a sigma depends on the x that it scores, so it makes no density, and
    the objective no bound; for all else it must be frozen, at the root mean square residual over
    data and draws of z (:func:`ppl_vae.freeze_scale`; ``fit_svi`` ends with it). Frozen it stays
    as it is, in training too, until ``fit_svi`` starts anew.

    In a VAE made from data (:meth:`ppl_vae.VAE.like`) the outputs are in units of the columns, and
    so is a learned sigma: x_d | z ~ N(loc_d + unit_d G_d(z), (unit_d sigma)^2), with ``loc`` and
    ``unit`` the means and standard deviations of the columns. The density is of x as it is given,
    and computed from (x - loc) / unit, so that no square overflows.

    Args:
        scale: sigma: a positive number (fixed, always in the units of x); ``"shared"``, one
            learned sigma; ``"per-dim"``, one for each column; ``"network"``, its logarithm is each
            cell's second output (in units of ``initial``, bounded beyond -30 and 15);
            ``"optimal"``.
        initial: where a learned sigma starts; for ``"network"`` sigma at output 0.
        floor: a learned sigma stays above it; :meth:`notes` says when it was reached.

    Attributes:
        scale: sigma, () or (D,); None for ``"network"``; NaN for ``"optimal"`` until frozen. A
            learned one is in units of ``unit``, where there is one.
        loc, unit: mean and standard deviation of each column, (D,); None for outputs in the units
            of x.

    References:
        Rybkin, Daniilidis, Levine: Simple and effective VAE training with calibrated decoders
        (2021): the optimal sigma.
    """

    scale: Tensor
    loc: Tensor | None
    unit: Tensor | None
    share_at_floor: Tensor

    @configurable
    def __init__(
        self, scale: float | str = "shared", *, initial: float = 1.0, floor: float = 1e-4
    ) -> None:
        super().__init__()
        self.kind = scale if isinstance(scale, str) else "fixed"
        self.floor, self.initial = floor, initial
        self.needs_calibration = self.kind in ("network", "optimal")
        self._frozen = self._standing_in = False
        self._sums: list[Tensor] | None = None
        self.register_buffer("loc", None)
        self.register_buffer("unit", None)
        if self.kind == "fixed":
            if not scale > 0:  # pyright: ignore[reportOperatorIssue]
                known = ", ".join(map(repr, SCALES))
                raise ValueError(f"scale must be positive, or one of {known}; got {scale}")
            # Exact in every dtype, which a buffer is not.
            self.scale = cast(Any, float(scale))
            return
        check_option("scale", self.kind, SCALES)
        if not 0 <= floor < initial:
            raise ValueError(f"need 0 <= floor < initial; got floor={floor}, initial={initial}")
        if self.kind == "shared":
            self.scale = self._learned(torch.tensor(float(initial)))
        elif self.kind == "optimal":
            self.register_buffer("scale", torch.tensor(torch.nan))
        else:
            self.scale = cast(Any, None)
        if self.kind == "network":
            self.outputs_per_dim = 2
            self.register_buffer("share_at_floor", torch.tensor(0.0))

    def _learned(self, start: Tensor) -> Any:
        return PyroParam(start, constraints.greater_than(self.floor))

    def set_data_dim(self, data_dim: int) -> None:
        """Be told D, of which ``"per-dim"`` needs a sigma for each.

        Raises:
            ValueError: if it was told another one before.
        """
        if self.kind != "per-dim":
            return
        if self.scale is None:
            self.scale = self._learned(torch.full((data_dim,), float(self.initial)))
        elif len(self.scale) != data_dim:
            raise ValueError(
                f"this Gaussian('per-dim') has {len(self.scale)} columns already, not {data_dim}; "
                "make another one"
            )

    def standardize(self, loc: Float[Tensor, " D"], scale: Float[Tensor, " D"]) -> None:
        """Take outputs, and a learned sigma, to be in units of the columns from now on."""
        self.register_buffer("loc", loc)
        self.register_buffer("unit", scale)

    def forward(
        self,
        outputs: Outputs,
        x: Rows | None = None,
        mask: Mask | None = None,
        *,
        observe: bool = True,
    ) -> Density:
        """Normal cells about the outputs.

        Raises:
            ValueError: if an optimal scale is not frozen and x is not being trained on; if
                ``"per-dim"`` was not told D.
        """
        if self.kind == "network":
            loc, raw = outputs.unflatten(-1, (-1, 2)).unbind(-1)
            # The output is a logarithm of sigma, and what is bounded one of a variance.
            scale = self.floor + self.initial * (0.5 * soft_clamp(2 * raw)).exp()
            if self._sums is not None:
                self._note(scale <= NEAR_FLOOR * self.floor, mask)
        elif self.kind == "optimal":
            loc, scale = outputs, self._optimal(outputs, x, mask, observe)
        else:
            loc, scale = outputs, self.scale
        if scale is None:
            raise ValueError(
                "Gaussian('per-dim') does not know how many columns x has; a VAE says so, "
                "elsewhere call its sized(data_dim)"
            )
        return by_cell(self._cells(loc, scale), mask)

    def _cells(self, loc: Tensor, scale: Tensor | float) -> Density:
        if self.loc is None or self.unit is None:
            return dist.Normal(loc, scale)
        relative: Any = scale / self.unit if self.kind == "fixed" else scale
        return StandardizedNormal(loc, relative, self.loc, self.unit)

    @property
    def relative(self) -> bool:
        """Whether ``scale`` is in units of the columns, and not in those of x."""
        return self.unit is not None and self.kind != "fixed"

    def to_units(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """x in the units that the outputs have."""
        return x if self.loc is None or self.unit is None else (x - self.loc) / self.unit

    def _optimal(
        self, loc: Tensor, x: Tensor | None, mask: Tensor | None, observe: bool
    ) -> Tensor:
        if self._standing_in:
            return torch.ones_like(self.scale)
        if x is not None and observe and (self.training or self._sums is not None):
            squares = (self.to_units(x) - loc).square()
            if self._sums is not None:
                self._note(squares, mask)
            # A frozen scale is taken without a look at its value, which a device would wait for.
            best = self._root(*_sum_and_number(squares, mask))
            return torch.where(self.scale.isnan(), best, self.scale)
        if not self._frozen:
            raise ValueError(
                "the optimal scale is not frozen, and taken from the x that is scored it makes no "
                "density; call freeze_scale(model, guide, x) with the training data, as fit_svi "
                "does at its end"
            )
        return self.scale

    def _root(self, total: Tensor, number: Tensor) -> Tensor:
        return (total / number).clamp(min=self.floor**2).sqrt()

    def _note(self, values: Tensor, mask: Tensor | None) -> None:
        assert self._sums is not None
        both = _sum_and_number(values.double(), mask)
        self._sums = [old + new for old, new in zip(self._sums, both, strict=True)]

    @contextmanager
    def calibrate(self) -> Iterator[None]:
        """Runs of a pair on all rows inside tell what is to be known of them.

        That is the optimal scale, frozen at the end; of a network's scales, how many stand on
        their floor.
        """
        known = self.share_at_floor if self.kind == "network" else self.scale
        nothing = torch.zeros((), dtype=torch.float64, device=known.device)
        self._sums = [nothing, nothing]
        try:
            yield
            total, number = self._sums
        finally:
            self._sums = None
        if number > 0:
            known.fill_(total / number if self.kind == "network" else self._root(total, number))
            self._frozen = True

    @contextmanager
    def dummy_scale(self) -> Iterator[None]:
        """Any number will do for an optimal scale, in runs of which only shapes are looked at."""
        self._standing_in = not self._frozen
        try:
            yield
        finally:
            self._standing_in = False

    def unfreeze(self) -> None:
        """Let an optimal scale be that of each batch again."""
        if self.kind == "optimal":
            self.scale.fill_(torch.nan)
            self._frozen = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.kind == "optimal":
            self._frozen = not bool(self.scale.isnan())

    def check(self, x: Rows, mask: Mask | None = None) -> None:
        """Nothing to check: every real number is in the support."""

    def outputs_at(
        self, means: Float[Tensor, " D"], half: Float[Tensor, " D"]
    ) -> Float[Tensor, " O"]:
        """The means of the columns; a network's scales start at ``initial``."""
        means = self.to_units(means)
        if self.kind != "network":
            return means
        return torch.stack([means, torch.zeros_like(means)], -1).flatten()

    def notes(self) -> list[str]:
        """Whether learned scales stand on their floor; where an optimal one is from."""
        found = []
        if self.kind == "optimal" and self._frozen:
            found.append(
                f"the noise scale is frozen at {self.scale:.4g}{self._in_units()}, the best for "
                "all training rows; in training it was that of each batch, and the objective "
                "there is no bound"
            )
        if where := self._at_floor():
            floor = f"{self.floor:g}{self._in_units()}"
            found.append(f"{where} reached its floor, {floor}: lower floor= or check x")
        return found

    def _in_units(self) -> str:
        return " standard deviations of the column" if self.relative else ""

    def _at_floor(self) -> str:
        if self.kind == "network":
            share = float(self.share_at_floor)
            return f"the noise scale of {share:.2g} of all cells has" if share else ""
        if self.kind == "fixed" or self.scale is None:
            return ""
        low = int((self.scale <= NEAR_FLOOR * self.floor).sum())
        if self.kind != "per-dim":
            return "the noise scale has" if low else ""
        return f"the noise scale of {low} of {len(self.scale)} columns has" if low else ""


def _sum_and_number(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is None:
        return values.sum(), torch.full_like(values.sum(), values.numel())
    return torch.where(mask, values, 0.0).sum(), mask.expand_as(values).sum()
