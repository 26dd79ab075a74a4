"""A stage measured: its row of the table, in nats per datum, in the units of the data as given."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from ppl_vae.core.program import ProgramLike, bound_object
from ppl_vae.core.results import Curve, FitResult, Result
from ppl_vae.data.column_scales import MIXED_COLUMNS
from ppl_vae.data.column_stats import CONSTANT_COLUMNS
from ppl_vae.data.transforms import Units
from ppl_vae.evaluation.inference_gaps.ascent import Ascent
from ppl_vae.evaluation.inference_gaps.gaps import Gaps, gaps
from ppl_vae.evaluation.latent_space.subspace import subspace
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood, exact_result
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.inference.svi.convergence import Convergence
from ppl_vae.lineage.expected_loss import UNKNOWN, Price, ppca_price
from ppl_vae.lineage.problem import Task
from ppl_vae.lineage.stages import NONLINEAR, Fitted, Stage
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.sufficient_statistics import SampleCovariance
from ppl_vae.objectives.bounds import elbo

ELBO_DRAWS = 20
ROUNDING = 1e-9
"""A fit is better than the reference if log p is more than so many nats per datum above it."""


@dataclass(frozen=True)
class MeanEstimate(Result):
    """A mean log-likelihood in nats per datum.

    Attributes:
        value: the mean.
        error: its standard error: of the estimation on training rows, over the data on held-out
            rows (the Monte Carlo part included); None where it is exact.
        reliable: the share of data whose estimate is reliable; 1 where it is exact.
        how: ``"exact"``, ``"estimated"`` or why there is none.
    """

    value: float
    error: float | None = None
    reliable: float = 1.0
    how: str = "exact"


@dataclass(frozen=True)
class Row(Result):
    """One stage: what it is, and what it gave, in nats per datum.

    Attributes:
        stage, model, q, algorithm: what it is.
        elbo: on the training rows; NaN, as are the gaps, where what was fitted has no bound, and
            log p is that of the Gaussian that it implies.
        log_p: on the training rows.
        approximation: log p - ELBO[q*], the price of q's family; NaN, as is the next, where the
            best q of the family cannot be sought.
        amortization: ELBO[q*] - ELBO[q], the price of how q is found.
        approximation_error, amortization_error: their standard errors, over the rows they are
            measured on, Monte Carlo part included.
        shortfall: by how much log p falls short of the best that PPCA of this latent_dim is known
            to reach on the training rows; NaN for other models.
        price: what theory says that :attr:`loss` is at the optimum of q's family; NaN where
            nothing is known.
        log_p_price: the same of ``shortfall``.
        test_log_p: on the held-out rows.
        noise_scale: of x given z, in the data's units; where each column was standardised, in
            standard deviations of the columns; NaN if the model has no such number.
        angle: largest principal angle to PPCA's optimum, in degrees; NaN for nonlinear decoders.
        fit: how the fit went, its objectives in the data's units.
        convergence: whether it went on until its tolerance was met.
        curve: the fit's objective for the eye.
        ascent: bound and log p as they rose, for stages in which both are exact.
        held_out: log p of each scored test row; None where the guide has no q for them.
    """

    stage: str
    model: str
    q: str
    algorithm: str
    elbo: float
    log_p: MeanEstimate
    approximation: float
    amortization: float
    approximation_error: float
    amortization_error: float
    shortfall: float
    price: float
    log_p_price: float
    test_log_p: MeanEstimate
    noise_scale: float
    angle: float
    fit: FitResult
    convergence: Convergence
    curve: Curve
    ascent: Ascent | None
    held_out: LogLikelihood | None

    @property
    def loss(self) -> float:
        """By how much the ELBO falls short of the best log p that PPCA is known to reach; log p,
        where there is no bound. NaN where that best log p is not known.
        """
        gap = self.approximation + self.amortization
        return self.shortfall + (0.0 if math.isnan(gap) else gap)

    @property
    def excess(self) -> float:
        """The loss beyond what theory says that q's family costs; NaN where that is unknown."""
        return self.loss - (self.log_p_price if math.isnan(self.elbo) else self.price)


@dataclass(frozen=True)
class Reference:
    """The best fit of PPCA to the training rows that is known.

    Attributes:
        name: of the stage whose fit it is.
        ppca: the fit.
        log_p: its exact log p, in nats per datum, in the data's units.
        gain: how far that is above the fit which was the reference at first.
    """

    name: str
    ppca: PPCA
    log_p: float
    gain: float = 0.0

    def or_better(self, row: Row, model: ProgramLike) -> "Reference":
        """This one, or the fit of a row, if that is better."""
        if not row.shortfall < -ROUNDING:
            return self
        return Reference(
            row.stage,
            bound_object(model),
            row.log_p.value,
            self.gain + row.log_p.value - self.log_p,
        )

    def seen_by(self, row: Row, model: ProgramLike) -> Row:
        """The row with its distances to this reference."""
        ppca = bound_object(model)
        if not isinstance(ppca, PPCA):
            return row
        same = ppca.noise == "isotropic" and ppca.latent_dim == self.ppca.latent_dim
        shortfall = self.log_p - row.log_p.value if same else math.nan
        return replace(row, shortfall=shortfall, angle=subspace(self.ppca, ppca).largest_angle)


def is_per_datum(guide: ProgramLike) -> bool:
    """Whether a guide has a q for training rows only."""
    # A guide with a q for each training row has none for validation or test rows.
    return callable(getattr(bound_object(guide), "tables", None))


@dataclass(frozen=True)
class EvaluationContext:
    """The data in the units that a pair is fitted in, and the way back to those of the data."""

    task: Task
    test: Tensor
    units: Units

    @classmethod
    def of(cls, task: Task, test: Tensor, units: Units) -> Self:
        """The ground in these units, of rows in the data's."""
        train, val = units.apply(task.train), units.apply(task.val)
        return cls(replace(task, train=train, val=val), units.apply(test), units)

    def reference(self) -> Reference:
        """The one to begin with: the closed form, or with missing values PX-EM's end."""
        ppca = self.task.optimum()
        log_p = float(ppca.log_likelihood(self.task.train).detach().mean())
        return Reference(self.task.reference, ppca, log_p + self._shift(self.task.train))

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Of the sample covariance of the training rows, which are complete, (D,)."""
        return SampleCovariance.of(self.task.train).eigh()[0]

    def price(self, family: str) -> Price:
        """What theory says that this family of q costs PPCA."""
        if family == NONLINEAR or self.task.holes:
            return UNKNOWN
        return ppca_price(self.eigenvalues, self.task.latent_dim, family)

    def measure(self, stage: Stage, fitted: Fitted) -> Row:
        """The stage's row of the table, which no reference has seen."""
        owner = bound_object(fitted.model)
        ppca = owner if isinstance(owner, PPCA) else None
        exact = None if ppca is None else ppca.log_likelihood(self.task.train).detach()
        found = self._gaps(fitted, exact)
        log_p, elbo = self._training(fitted, found, exact)
        bounded = 0.0 if fitted.bounded else math.nan
        held_out = self._held_out(fitted, ppca)
        price = self.price(stage.family)
        fit = self._in_data_units(fitted.fit)
        return Row(
            stage=stage.name,
            model=stage.model,
            q=stage.q,
            algorithm=stage.algorithm,
            elbo=elbo + bounded,
            log_p=log_p,
            approximation=found.approximation + bounded,
            amortization=found.amortization + bounded,
            approximation_error=found.approximation_error + bounded,
            amortization_error=found.amortization_error + bounded,
            shortfall=math.nan,
            price=price.bound,
            log_p_price=price.log_p,
            test_log_p=_mean_held_out(held_out),
            noise_scale=_noise_scale(owner) * self.units.common_scale,
            angle=math.nan,
            fit=fit,
            convergence=fitted.convergence,
            curve=fit.curve(),
            ascent=fitted.ascent and fitted.ascent.shifted(self._shift(self.task.train)),
            held_out=held_out,
        )

    def _shift(self, x: Tensor) -> float:
        # From the mean log density of these rows in the ground's units to that in the data's.
        return float(self.units.log_jacobian(x).mean())

    def _in_data_units(self, fit: FitResult) -> FitResult:
        # Constant columns are the data's, and told once for all stages, by name; so are the
        # columns' scales, unless the pair was fitted in the data's own units.
        moved = bool(self.units.loc.any())
        told = (CONSTANT_COLUMNS, MIXED_COLUMNS) if moved else (CONSTANT_COLUMNS,)
        notes = tuple(note for note in fit.notes if not note.startswith(told))
        shifts = self._shift(self.task.train), self._shift(self.task.val)
        return replace(fit.shifted(*shifts), notes=notes)

    def _gaps(self, fitted: Fitted, exact: Tensor | None) -> Gaps:
        rows = torch.arange(min(self.task.settings.gap_rows, len(self.task.train)))
        return gaps(
            fitted.model,
            fitted.guide,
            self.task.train,
            log_p=None if exact is None else exact[rows],
            best=fitted.best,
            steps=self.task.settings.refine,
            tolerance=None,  # as long as the estimates of held-out log p search, and no longer
            num_samples=self.task.settings.draws,
            rows=rows,
            seed=self.task.seed,
        )

    def _training(
        self, fitted: Fitted, found: Gaps, exact: Tensor | None
    ) -> tuple[MeanEstimate, float]:
        """log p and the ELBO on all training rows: one is cheap there, the gap gives the other."""
        shift = self._shift(self.task.train)
        gap = found.total
        if exact is not None:
            log_p = float(exact.mean()) + shift
            return MeanEstimate(log_p), log_p - gap
        draws = {"num_samples": ELBO_DRAWS, "seed": self.task.seed}
        values = elbo(fitted.model, fitted.guide, self.task.train, **draws)
        bound = float(values.mean()) + shift
        assert found.estimate is not None
        return MeanEstimate(
            bound + gap, found.total_error, found.estimate.share_reliable, "estimated"
        ), bound

    def _held_out(self, fitted: Fitted, ppca: PPCA | None) -> LogLikelihood | None:
        """log p of the scored test rows, in the data's units."""
        settings = self.task.settings
        test = self.test[: settings.gap_rows]
        if ppca is not None:
            estimate = exact_result(ppca.log_likelihood(test).detach())
        elif is_per_datum(fitted.guide):
            return None
        else:
            estimate = log_likelihood(
                fitted.model,
                fitted.guide,
                test,
                settings.draws,
                refine=settings.refine,
                seed=self.task.seed,
            )
        return estimate.shifted(self.units.log_jacobian(test))


def _mean_held_out(estimate: LogLikelihood | None) -> MeanEstimate:
    if estimate is None:
        return MeanEstimate(math.nan, None, math.nan, "the guide has a q for training rows only")
    how = "exact" if estimate.method == "exact" else "estimated"
    return MeanEstimate(estimate.mean, estimate.mean_error, estimate.share_reliable, how)


def _noise_scale(owner: Any) -> float:
    likelihood = getattr(owner, "likelihood", None)
    if getattr(likelihood, "relative", False):
        return math.nan  # one number in units of the columns, and none in those of x
    scale = getattr(owner, "noise_scale", getattr(likelihood, "scale", None))
    if isinstance(scale, float):
        return scale
    return float(scale.detach()) if isinstance(scale, Tensor) and scale.numel() == 1 else math.nan
