"""The evaluation of a stage: its row of the table, in nats per datum, in the data's units."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.fit_result import Curve, FitResult
from ppl_vae.core.introspection import bound_object
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.data.column_scales import MIXED_COLUMNS
from ppl_vae.data.column_stats import CONSTANT_COLUMNS
from ppl_vae.data.units import Units
from ppl_vae.evaluation.inference_gaps.bound_history import Ascent
from ppl_vae.evaluation.inference_gaps.gaps import gaps
from ppl_vae.evaluation.inference_gaps.result import Gaps
from ppl_vae.evaluation.latent_space.subspace import subspace
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood, exact_result
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.inference.svi.convergence import Convergence
from ppl_vae.lineage.estimates import PREDICTIVE, MeanEstimate, PosteriorSummary, paired_gain
from ppl_vae.lineage.expected_loss import UNKNOWN, ExpectedLoss, expected_ppca_loss
from ppl_vae.lineage.problem import ELBO_SAMPLES, LineageProblem
from ppl_vae.lineage.stage import Stage
from ppl_vae.lineage.stages import NONLINEAR, StageFit
from ppl_vae.models.linear.sufficient_statistics import SampleCovariance
from ppl_vae.models.ppca import PPCA
from ppl_vae.objectives.bounds import elbo

ROUNDING = 1e-9
"""A fit replaces the reference if its log p is higher by more than this, in nats per datum."""


@dataclass(frozen=True)
class StageMetrics(Result):
    """The metrics of one stage, in nats per datum.

    Attributes:
        stage, model, q, algorithm: the stage and its labels.
        elbo: on the training rows. It is NaN, as are the gaps, where the fitted objective is no
            bound; log p is then that of the implied Gaussian.
        log_p: on the training rows.
        approximation: log p - ELBO[q*], the approximation gap, with q* the best q of the family
            for each datum; NaN, as is the next, where q* cannot be computed.
        amortization: ELBO[q*] - ELBO[q], the amortization gap.
        approximation_error, amortization_error: their standard errors over the rows on which they
            are measured, Monte Carlo error included.
        shortfall: the highest log p of PPCA with this latent_dim that is known on the training
            rows, minus log p; NaN for other models.
        expected_loss: the value of :attr:`loss` at the optimum within q's family; NaN where
            theory gives no value.
        expected_shortfall: the same for ``shortfall``.
        test_log_p: on the held-out rows.
        noise_scale: the standard deviation of x given z, in the data's units; in standard
            deviations of the columns where these were standardised; NaN if the model has no
            common noise scale.
        angle: largest principal angle to PPCA's optimum, in degrees; NaN for nonlinear decoders.
        fit: the fit, with its objectives in the data's units.
        convergence: whether the fit met its tolerance.
        curve: the fit's objective, averaged over spans of steps.
        ascent: bound and log p along the fit, for stages in which both are exact.
        held_out: log p of each scored test row; None where the guide has no q for them.
        posterior: for Bayesian stages, the gain over point estimates; else None. Their ``elbo`` is
            the bound of variational Bayes on the log evidence, over the number of rows, and
            ``log_p``, which would be the evidence itself, is NaN.
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
    expected_loss: float
    expected_shortfall: float
    test_log_p: MeanEstimate
    noise_scale: float
    angle: float
    fit: FitResult
    convergence: Convergence
    curve: Curve
    ascent: Ascent | None
    held_out: LogLikelihood | None
    posterior: PosteriorSummary | None = None

    @property
    def loss(self) -> float:
        """The highest known log p of PPCA, minus the ELBO, or minus log p if there is no bound.

        It is NaN for models other than PPCA.
        """
        gap = self.approximation + self.amortization
        return self.shortfall + (0.0 if math.isnan(gap) else gap)

    @property
    def excess(self) -> float:
        """The loss, minus its expected value for q's family; NaN where that is unknown."""
        no_bound = math.isnan(self.elbo)
        return self.loss - (self.expected_shortfall if no_bound else self.expected_loss)


@dataclass(frozen=True)
class Reference:
    """The best known fit of PPCA to the training rows.

    Attributes:
        name: the stage of the fit.
        ppca: the fitted model.
        log_p: its exact log p, in nats per datum, in the data's units.
        held_out: log p of each scored test row, in the data's units.
        gain: ``log_p`` minus that of the initial reference.
    """

    name: str
    ppca: PPCA
    log_p: float
    held_out: Float[Tensor, " N"]
    gain: float = 0.0

    def updated(self, row: StageMetrics, model: ProgramLike) -> "Reference":
        """The better one of this reference and the fit of a row."""
        if not row.shortfall < -ROUNDING:
            return self
        assert row.held_out is not None
        return Reference(
            row.stage,
            bound_object(model),
            row.log_p.value,
            row.held_out.value,
            self.gain + row.log_p.value - self.log_p,
        )

    def compare(self, row: StageMetrics, model: ProgramLike | None) -> StageMetrics:
        """The row with its shortfall and angle, or its predictive gain, over this reference."""
        if row.posterior is not None and row.held_out is not None:
            gain = paired_gain(row.held_out, self.held_out)
            return replace(row, posterior=replace(row.posterior, over_optimum=gain))
        ppca = None if model is None else bound_object(model)
        if not isinstance(ppca, PPCA):
            return row
        comparable = ppca.noise == "isotropic" and ppca.latent_dim == self.ppca.latent_dim
        shortfall = self.log_p - row.log_p.value if comparable else math.nan
        return replace(row, shortfall=shortfall, angle=subspace(self.ppca, ppca).largest_angle)


def has_parameters_per_row(guide: ProgramLike) -> bool:
    """Whether a guide has one q per training row, and none for validation or test rows."""
    return callable(getattr(bound_object(guide), "tables", None))


@dataclass(frozen=True)
class EvaluationContext:
    """The data in the units of a fit, with the conversion of results to the data's units.

    Attributes:
        problem: training and validation rows, in the units of the fit.
        test: held-out rows, in the same units.
        units: the units of the fit.
    """

    problem: LineageProblem
    test: Tensor
    units: Units

    @classmethod
    def of(cls, problem: LineageProblem, test: Tensor, units: Units) -> Self:
        """The context for fits in these units; the arguments are in the data's units."""
        train, val = units.apply(problem.train), units.apply(problem.val)
        return cls(replace(problem, train=train, val=val), units.apply(test), units)

    def reference(self) -> Reference:
        """The initial reference: the closed form, or with missing values the result of PX-EM."""
        problem = self.problem
        ppca = problem.optimal_ppca()
        log_p = float(ppca.log_likelihood(problem.train).detach().mean())
        log_p += self.log_jacobian(problem.train)
        held_out = self.exact_held_out(ppca)
        return Reference(problem.reference_stage, ppca, log_p, held_out.value)

    @property
    def scored(self) -> Tensor:
        """The test rows on which held-out log p is computed, in the units of the fit."""
        return self.test[: self.problem.settings.gap_rows]

    def exact_held_out(self, ppca: PPCA) -> LogLikelihood:
        """log p of the scored test rows under PPCA, in the data's units."""
        estimate = exact_result(ppca.log_likelihood(self.scored).detach())
        return estimate.shifted(self.units.log_jacobian(self.scored))

    @cached_property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues of the sample covariance of the (complete) training rows, (D,)."""
        return SampleCovariance.of(self.problem.train).eigh()[0]

    def expected_loss(self, family: str) -> ExpectedLoss:
        """The expected loss of PPCA with this family of q."""
        if family == NONLINEAR or self.problem.num_missing:
            return UNKNOWN
        return expected_ppca_loss(self.eigenvalues, self.problem.latent_dim, family)

    def evaluate(self, stage: Stage[Any], fitted: StageFit) -> StageMetrics:
        """The stage's row of the table, without its distances to a reference."""
        owner = bound_object(fitted.pair.model)
        ppca = owner if isinstance(owner, PPCA) else None
        exact = None if ppca is None else ppca.log_likelihood(self.problem.train).detach()
        found = self._gaps(fitted, exact)
        log_p, elbo = self._training_metrics(fitted, found, exact)
        bounded = 0.0 if fitted.bounded else math.nan
        held_out = self._held_out(fitted, ppca)
        expected = self.expected_loss(stage.family)
        fit = self.in_data_units(fitted.fit)
        return StageMetrics(
            *stage.labels,
            elbo=elbo + bounded,
            log_p=log_p,
            approximation=found.approximation + bounded,
            amortization=found.amortization + bounded,
            approximation_error=found.approximation_error + bounded,
            amortization_error=found.amortization_error + bounded,
            shortfall=math.nan,
            expected_loss=expected.loss,
            expected_shortfall=expected.shortfall,
            test_log_p=mean_estimate(held_out),
            noise_scale=_noise_scale(owner) * self.units.common_scale,
            angle=math.nan,
            fit=fit,
            convergence=fitted.convergence,
            curve=fit.curve(),
            ascent=fitted.ascent and fitted.ascent.shifted(self.log_jacobian(self.problem.train)),
            held_out=held_out,
        )

    def log_jacobian(self, x: Tensor) -> float:
        """What converts the mean log density of these rows to the data's units."""
        return float(self.units.log_jacobian(x).mean())

    def in_data_units(self, fit: FitResult) -> FitResult:
        """The fit with its objectives in the data's units, without notes that are made once."""
        # The lineage reports constant columns once for all stages, by name; it also reports the
        # columns' scales, unless the pair was fitted in the data's own units.
        rescaled = bool(self.units.loc.any())
        reported = (CONSTANT_COLUMNS, MIXED_COLUMNS) if rescaled else (CONSTANT_COLUMNS,)
        notes = tuple(note for note in fit.notes if not note.startswith(reported))
        problem = self.problem
        shifts = self.log_jacobian(problem.train), self.log_jacobian(problem.val)
        return replace(fit.shifted(*shifts), notes=notes)

    def _gaps(self, fitted: StageFit, exact: Tensor | None) -> Gaps:
        settings = self.problem.settings
        rows = torch.arange(min(settings.gap_rows, len(self.problem.train)))
        return gaps(
            fitted.pair.model,
            fitted.pair.guide,
            self.problem.train,
            log_p=None if exact is None else exact[rows],
            best=fitted.best,
            steps=settings.refine,
            tolerance=None,  # exactly as many steps as the estimate of held-out log p takes
            num_samples=settings.num_samples,
            rows=rows,
            seed=self.problem.seed,
        )

    def _training_metrics(
        self, fitted: StageFit, found: Gaps, exact: Tensor | None
    ) -> tuple[MeanEstimate, float]:
        """log p and the ELBO on all training rows.

        log p of PPCA and the ELBO of the others are computed on all rows; the gap, measured on
        some of the rows, gives the other number.
        """
        x, gap = self.problem.train, found.total
        shift = self.log_jacobian(x)
        if exact is not None:
            log_p = float(exact.mean()) + shift
            return MeanEstimate(log_p), log_p - gap
        pair, seed = fitted.pair, self.problem.seed
        values = elbo(pair.model, pair.guide, x, num_samples=ELBO_SAMPLES, seed=seed)
        bound = float(values.mean()) + shift
        assert found.estimate is not None
        reliable = found.estimate.share_reliable
        return MeanEstimate(bound + gap, found.total_error, reliable, "estimated"), bound

    def _held_out(self, fitted: StageFit, ppca: PPCA | None) -> LogLikelihood | None:
        """log p of the scored test rows, in the data's units."""
        settings, test = self.problem.settings, self.scored
        if ppca is not None:
            return self.exact_held_out(ppca)
        if has_parameters_per_row(fitted.pair.guide):
            return None
        estimate = log_likelihood(
            fitted.pair.model,
            fitted.pair.guide,
            test,
            settings.num_samples,
            refine=settings.refine,
            seed=self.problem.seed,
        )
        return estimate.shifted(self.units.log_jacobian(test))


def mean_estimate(estimate: LogLikelihood | None) -> MeanEstimate:
    """The mean over the rows with its error, or the reason why there is none."""
    if estimate is None:
        return MeanEstimate(math.nan, None, math.nan, "the guide has a q for training rows only")
    method = estimate.method if estimate.method in ("exact", PREDICTIVE) else "estimated"
    return MeanEstimate(estimate.mean, estimate.mean_error, estimate.share_reliable, method)


def _noise_scale(owner: Any) -> float:
    likelihood = getattr(owner, "likelihood", None)
    if getattr(likelihood, "relative", False):
        return math.nan  # relative to the columns' scales: there is no number in units of x
    scale = getattr(owner, "noise_scale", getattr(likelihood, "scale", None))
    if isinstance(scale, float):
        return scale
    return float(scale.detach()) if isinstance(scale, Tensor) and scale.numel() == 1 else math.nan
