"""A rung measured: its row of the table, in nats a datum, in the units of the data as given."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ppl_vae.data import Units
from ppl_vae.evaluation.ascent import Ascent
from ppl_vae.evaluation.estimates import LogLikelihood, exact_result
from ppl_vae.evaluation.gaps import Gaps, gaps
from ppl_vae.evaluation.likelihood import log_likelihood
from ppl_vae.evaluation.subspace import subspace
from ppl_vae.models.columns import CONSTANT_COLUMNS
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.standardization import MIXED_COLUMNS
from ppl_vae.objectives import elbo
from ppl_vae.program import ProgramLike, owner_of
from ppl_vae.results import Curve, FitResult, Result
from ppl_vae.rungs import Fitted, Rung, Task

ELBO_DRAWS = 20


@dataclass(frozen=True)
class Measure(Result):
    """A mean log-likelihood in nats a datum.

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
    """One rung: what it is, and what it gave, in nats a datum.

    Attributes:
        rung, model, q, algorithm: what it is.
        elbo: on the training rows; NaN, as are the gaps, where what was fitted has no bound, and
            log p is that of the Gaussian that it implies.
        log_p: on the training rows.
        approximation: log p - ELBO[q*], the price of q's family; NaN, as is the next, where the
            best q of the family cannot be sought.
        amortization: ELBO[q*] - ELBO[q], the price of how q is found.
        approximation_error, amortization_error: their standard errors, over the rows they are
            measured on, Monte Carlo part included.
        shortfall: by how much log p falls short of the best that the model can reach on the
            training rows; NaN where that is not known.
        test_log_p: on the held-out rows.
        noise_scale: of x given z, in the data's units; where each column was standardised, in
            standard deviations of the columns; NaN if the model has no such number.
        angle: largest principal angle to PPCA's optimum, in degrees; NaN for nonlinear decoders.
        fit: how the fit went, its objectives in the data's units.
        curve: the fit's objective for the eye.
        ascent: bound and log p as they rose, for rungs in which both are exact.
        held_out: log p of each scored test row; None where the guide has no q for them.
    """

    rung: str
    model: str
    q: str
    algorithm: str
    elbo: float
    log_p: Measure
    approximation: float
    amortization: float
    approximation_error: float
    amortization_error: float
    shortfall: float
    test_log_p: Measure
    noise_scale: float
    angle: float
    fit: FitResult
    curve: Curve
    ascent: Ascent | None
    held_out: LogLikelihood | None


def is_per_datum(guide: ProgramLike) -> bool:
    """Whether a guide has a q for training rows only."""
    # A guide with a q for each training row has none for validation or test rows.
    return callable(getattr(owner_of(guide), "tables", None))


@dataclass(frozen=True)
class Ground:
    """The data in the units that a pair is fitted in, and the way back to those of the data."""

    task: Task
    test: Tensor
    units: Units
    reference: PPCA

    @classmethod
    def of(cls, task: Task, test: Tensor, units: Units) -> Self:
        """The ground in these units with its reference, PPCA's optimum; all rows in the data's."""
        train, val = units.apply(task.train), units.apply(task.val)
        task = replace(task, train=train, val=val)
        return cls(task, units.apply(test), units, task.optimum())

    def measure(self, rung: Rung, fitted: Fitted) -> Row:
        """The rung's row of the table."""
        owner = owner_of(fitted.model)
        ppca = owner if isinstance(owner, PPCA) else None
        exact = None if ppca is None else ppca.log_likelihood(self.task.train).detach()
        found = self._gaps(fitted, exact)
        log_p, elbo = self._training(fitted, found, exact)
        bounded = 0.0 if fitted.bounded else math.nan
        held_out = self._held_out(fitted, ppca)
        fit = self._in_data_units(fitted.fit)
        return Row(
            rung=rung.name,
            model=rung.model,
            q=rung.q,
            algorithm=rung.algorithm,
            elbo=elbo + bounded,
            log_p=log_p,
            approximation=found.approximation + bounded,
            amortization=found.amortization + bounded,
            approximation_error=found.approximation_error + bounded,
            amortization_error=found.amortization_error + bounded,
            shortfall=self.best - log_p.value if ppca else math.nan,
            test_log_p=_mean_held_out(held_out),
            noise_scale=_noise_scale(owner) * self.units.common_scale,
            angle=subspace(self.reference, ppca).largest_angle if ppca else math.nan,
            fit=fit,
            curve=fit.curve(),
            ascent=fitted.ascent and fitted.ascent.shifted(self._shift(self.task.train)),
            held_out=held_out,
        )

    def _shift(self, x: Tensor) -> float:
        # From the mean log density of these rows in the ground's units to that in the data's.
        return float(self.units.log_jacobian(x).mean())

    def _in_data_units(self, fit: FitResult) -> FitResult:
        # Constant columns are the data's, and told once for all rungs, by name; so are the
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
    ) -> tuple[Measure, float]:
        """log p and the ELBO on all training rows: one is cheap there, the gap gives the other."""
        shift = self._shift(self.task.train)
        gap = found.total
        if exact is not None:
            log_p = float(exact.mean()) + shift
            return Measure(log_p), log_p - gap
        draws = {"num_samples": ELBO_DRAWS, "seed": self.task.seed}
        values = elbo(fitted.model, fitted.guide, self.task.train, **draws)
        bound = float(values.mean()) + shift
        assert found.estimate is not None
        return Measure(
            bound + gap, found.total_error, found.estimate.share_reliable, "estimated"
        ), bound

    @property
    def best(self) -> float:
        """The best log p of PPCA on the training rows, in the data's units."""
        best = self.reference.log_likelihood(self.task.train).detach()
        return float(best.mean()) + self._shift(self.task.train)

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


def _mean_held_out(estimate: LogLikelihood | None) -> Measure:
    if estimate is None:
        return Measure(math.nan, None, math.nan, "the guide has a q for training rows only")
    how = "exact" if estimate.method == "exact" else "estimated"
    return Measure(estimate.mean, estimate.mean_error, estimate.share_reliable, how)


def _noise_scale(owner: Any) -> float:
    likelihood = getattr(owner, "likelihood", None)
    if getattr(likelihood, "relative", False):
        return math.nan  # one number in units of the columns, and none in those of x
    scale = getattr(owner, "noise_scale", getattr(likelihood, "scale", None))
    if isinstance(scale, float):
        return scale
    return float(scale.detach()) if isinstance(scale, Tensor) and scale.numel() == 1 else math.nan
