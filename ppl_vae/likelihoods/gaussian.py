"""Gaussian likelihoods: fixed, learned, predicted by the network, or optimal noise scales."""

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
from ppl_vae.likelihoods.base import Likelihood, Mask, Means, Outputs, RowTensor, row_density
from ppl_vae.likelihoods.distributions import StandardizedNormal
from ppl_vae.likelihoods.running_mean import RunningMean, sum_and_count

SCALES = ("shared", "per-dim", "network")
NEAR_FLOOR = 1.01
"""Scales below this multiple of their floor count as having reached it."""


class NormalLikelihood(Likelihood):
    """Abstract: independent normal entries with means given by the outputs.

    Attributes:
        kind: where the scale comes from: ``"fixed"``, ``"shared"``, ``"per-dim"``, ``"network"``
            or ``"optimal"``.
        scale: sigma, () or (D,); None for ``"network"``.
        floor: lower bound of a scale that is not fixed.
        loc, unit: mean and standard deviation of each column, (D,); None if outputs are in the
            units of x.
    """

    kind: str
    scale: Tensor
    floor: float
    loc: Tensor | None
    unit: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self._running_mean: RunningMean | None = None
        self.register_buffer("loc", None)
        self.register_buffer("unit", None)

    def standardize(self, loc: Float[Tensor, " D"], scale: Float[Tensor, " D"]) -> None:
        """Interpret outputs, and scales that are not fixed, in units of the columns from now
        on."""
        self.register_buffer("loc", loc)
        self.register_buffer("unit", scale)

    @property
    def relative(self) -> bool:
        """Whether ``scale`` is in units of the columns rather than in those of x."""
        return self.unit is not None and self.kind != "fixed"

    def to_units(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """x in the units of the outputs."""
        return x if self.loc is None or self.unit is None else (x - self.loc) / self.unit

    def initial_outputs(self, means: Means, half_weight: Means) -> Float[Tensor, " O"]:
        """The means of the columns, in the units of the outputs."""
        return self.to_units(means)

    def _density(self, loc: Tensor, scale: Tensor | float, mask: Mask | None) -> Density:
        if self.loc is None or self.unit is None:
            return row_density(dist.Normal(loc, scale), mask)
        relative: Any = scale / self.unit if self.kind == "fixed" else scale
        return row_density(StandardizedNormal(loc, relative, self.loc, self.unit), mask)

    @contextmanager
    def _accumulate(self, device: torch.device) -> Iterator[RunningMean]:
        self._running_mean = RunningMean(device)
        try:
            yield self._running_mean
        finally:
            self._running_mean = None

    def _floor_notes(self, subject: str) -> list[str]:
        if not subject:
            return []
        floor = f"{self.floor:g}{self._unit_name()}"
        return [f"{subject} reached its floor, {floor}: lower floor= or check x"]

    def _unit_name(self) -> str:
        return " standard deviations of the column" if self.relative else ""


class Gaussian(NormalLikelihood):
    """x | z ~ N(G(z), diag(sigma^2)), with a fixed or learned sigma.

    In a VAE made from data (:meth:`ppl_vae.VAE.like`) the outputs are in units of the columns, and
    so is a learned sigma: x_d | z ~ N(loc_d + unit_d G_d(z), (unit_d sigma)^2), with ``loc`` and
    ``unit`` the means and standard deviations of the columns. The density is that of x in its own
    units, but computed from (x - loc) / unit, so that no square overflows.

    Args:
        scale: sigma: a positive number (fixed, in the units of x); ``"shared"``, one learned
            sigma; ``"per-dim"``, one per column; ``"network"``, where the second output of each
            entry is log(sigma / ``initial``), bounded beyond -30 and 15.
        initial: initial value of a learned sigma; for ``"network"`` sigma at output 0.
        floor: lower bound of a learned sigma; :meth:`notes` reports if it is reached.

    Attributes:
        scale: sigma, () or (D,); None for ``"network"``. A learned sigma is in units of ``unit``,
            if there are such units.
        loc, unit: mean and standard deviation of each column, (D,); None if outputs are in the
            units of x.
        share_at_floor: for ``"network"``, the share of entries with sigma at the floor, found by
            :meth:`collect_statistics`.
    """

    share_at_floor: Tensor

    @configurable
    def __init__(
        self, scale: float | str = "shared", *, initial: float = 1.0, floor: float = 1e-4
    ) -> None:
        super().__init__()
        self.kind = scale if isinstance(scale, str) else "fixed"
        self.floor, self.initial = floor, initial
        self.has_data_statistics = self.kind == "network"
        if self.kind == "fixed":
            if not scale > 0:  # pyright: ignore[reportOperatorIssue]
                known = ", ".join(map(repr, SCALES))
                raise ValueError(f"scale must be positive, or one of {known}; got {scale}")
            # A Python float is exact in every dtype, unlike a buffer.
            self.scale = cast(Any, float(scale))
            return
        if self.kind == "optimal":
            raise ValueError("the optimal scale has a class of its own: use OptimalGaussian()")
        check_option("scale", self.kind, SCALES)
        if not 0 <= floor < initial:
            raise ValueError(f"need 0 <= floor < initial; got floor={floor}, initial={initial}")
        if self.kind == "shared":
            self.scale = self._learned(torch.tensor(float(initial)))
        else:
            self.scale = cast(Any, None)
        if self.kind == "network":
            self.outputs_per_dim = 2
            self.register_buffer("share_at_floor", torch.tensor(0.0))

    def _learned(self, initial: Tensor) -> Any:
        return PyroParam(initial, constraints.greater_than(self.floor))

    def set_data_dim(self, data_dim: int) -> None:
        """Create the D scales of ``"per-dim"``.

        Raises:
            ValueError: if they were created for another D.
        """
        if self.kind != "per-dim":
            return
        if self.scale is None:
            self.scale = self._learned(torch.full((data_dim,), float(self.initial)))
        elif len(self.scale) != data_dim:
            raise ValueError(
                f"this Gaussian('per-dim') already has {len(self.scale)} columns, not {data_dim}; "
                "make another one"
            )

    def density(
        self, outputs: Outputs, x: RowTensor | None, mask: Mask | None, observe: bool
    ) -> Density:
        """Independent normal entries with means given by the outputs.

        Raises:
            ValueError: if D is unknown for ``"per-dim"``.
        """
        if self.kind == "network":
            loc, log_scale = outputs.unflatten(-1, (-1, 2)).unbind(-1)
            # soft_clamp bounds a log-variance, and the output is the logarithm of sigma.
            scale = self.floor + self.initial * (0.5 * soft_clamp(2 * log_scale)).exp()
            if self._running_mean is not None:
                self._running_mean.add(scale <= NEAR_FLOOR * self.floor, mask)
            return self._density(loc, scale, mask)
        if self.scale is None:
            raise ValueError(
                "Gaussian('per-dim') needs the number of columns of x; a VAE sets it, elsewhere "
                "call set_data_dim(data_dim)"
            )
        return self._density(outputs, self.scale, mask)

    @contextmanager
    def collect_statistics(self) -> Iterator[None]:
        """Context manager: find the share of entries with sigma at the floor, for
        ``"network"``."""
        if self.kind != "network":
            yield
            return
        with self._accumulate(self.share_at_floor.device) as mean:
            yield
        if mean.count > 0:
            self.share_at_floor.fill_(mean.total / mean.count)

    def initial_outputs(self, means: Means, half_weight: Means) -> Float[Tensor, " O"]:
        """The means of the columns; the scales of a network are ``initial``."""
        means = self.to_units(means)
        if self.kind != "network":
            return means
        return torch.stack([means, torch.zeros_like(means)], -1).flatten()

    def notes(self) -> list[str]:
        """Whether learned scales are at their floor."""
        if self.kind == "network":
            share = float(self.share_at_floor)
            subject = f"the noise scale of {share:.2g} of all entries has" if share else ""
            return self._floor_notes(subject)
        if self.kind == "fixed" or self.scale is None:
            return []
        num_low = int((self.scale <= NEAR_FLOOR * self.floor).sum())
        if not num_low:
            return []
        if self.kind == "shared":
            return self._floor_notes("the noise scale has")
        return self._floor_notes(f"the noise scale of {num_low} of {len(self.scale)} columns has")


class OptimalGaussian(NormalLikelihood):
    """x | z ~ N(G(z), sigma^2 I), with the sigma that maximises the likelihood.

    In training, sigma^2 is the mean squared residual of the batch. Such a sigma depends on the x
    that it scores, so that it defines no density, and the objective is no bound. Before anything
    is evaluated it must be frozen at the root mean squared residual over data and draws of z
    (:func:`ppl_vae.inference.freeze_scale`; ``fit_svi`` ends with it). It stays frozen, in
    training too, until ``fit_svi`` starts again.

    In a VAE made from data (:meth:`ppl_vae.VAE.like`) outputs and sigma are in units of the
    columns, as for :class:`Gaussian`.

    Args:
        floor: lower bound of sigma; :meth:`notes` reports if it is reached.

    Attributes:
        scale: sigma, (); NaN until frozen.
        loc, unit: mean and standard deviation of each column, (D,); None if outputs are in the
            units of x.

    References:
        Rybkin, Daniilidis, Levine: Simple and effective VAE training with calibrated decoders
        (2021).
    """

    kind = "optimal"
    has_data_statistics = True

    @configurable
    def __init__(self, *, floor: float = 1e-4) -> None:
        super().__init__()
        if not floor >= 0:
            raise ValueError(f"floor must not be negative; got {floor}")
        self.floor = floor
        self._frozen = self._use_dummy = False
        self.register_buffer("scale", torch.tensor(torch.nan))

    def density(
        self, outputs: Outputs, x: RowTensor | None, mask: Mask | None, observe: bool
    ) -> Density:
        """Independent normal entries with means given by the outputs.

        Raises:
            ValueError: if the scale is not frozen, unless x is scored in training.
        """
        return self._density(outputs, self._scale(outputs, x, mask, observe), mask)

    def _scale(self, loc: Tensor, x: Tensor | None, mask: Tensor | None, observe: bool) -> Tensor:
        if self._use_dummy:
            return torch.ones_like(self.scale)
        if x is not None and observe and (self.training or self._running_mean is not None):
            squares = (self.to_units(x) - loc).square()
            if self._running_mean is not None:
                self._running_mean.add(squares, mask)
            # Selected by torch.where: reading the value would synchronise with the device.
            optimal = self._root_mean(*sum_and_count(squares, mask))
            return torch.where(self.scale.isnan(), optimal, self.scale)
        if not self._frozen:
            raise ValueError(
                "the optimal scale is not frozen, and computed from the x that is scored it "
                "defines no density; call freeze_scale(model, guide, x) with the training data, "
                "as fit_svi does at its end"
            )
        return self.scale

    def _root_mean(self, total: Tensor, count: Tensor) -> Tensor:
        return (total / count).clamp(min=self.floor**2).sqrt()

    @contextmanager
    def collect_statistics(self) -> Iterator[None]:
        """Context manager: freeze the scale that is optimal for all rows scored inside."""
        with self._accumulate(self.scale.device) as mean:
            yield
        if mean.count > 0:
            self.scale.fill_(self._root_mean(mean.total, mean.count))
            self._frozen = True

    @contextmanager
    def dummy_scale(self) -> Iterator[None]:
        """Context manager: use a dummy scale, for shape inference, unless frozen."""
        self._use_dummy = not self._frozen
        try:
            yield
        finally:
            self._use_dummy = False

    def unfreeze(self) -> None:
        """Discard the frozen scale, as training starts."""
        self.scale.fill_(torch.nan)
        self._frozen = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._frozen = not bool(self.scale.isnan())

    def notes(self) -> list[str]:
        """How the scale was frozen, and whether it is at its floor."""
        if not self._frozen:
            return []
        note = (
            f"the noise scale is frozen at {self.scale:.4g}{self._unit_name()}, the optimum for "
            "all training rows; in training it was that of each batch, so the objective is no "
            "bound"
        )
        at_floor = bool(self.scale <= NEAR_FLOOR * self.floor)
        return [note, *self._floor_notes("the noise scale has" if at_floor else "")]
