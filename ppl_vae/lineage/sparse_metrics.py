"""The evaluation of a stage of the sparse lineage: its row of the table, in nats per datum."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.results import Result
from ppl_vae.core.stats import mean_and_error
from ppl_vae.lineage.metrics import has_parameters_per_row
from ppl_vae.lineage.sparse_stages import SparseFit, SparseProblem
from ppl_vae.lineage.stage import Stage
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.objectives.bounds import elbo


@dataclass(frozen=True)
class CodeMetrics(Result):
    """Means over some rows of the metrics of a stage's codes, in nats per datum.

    Attributes:
        log_joint: log p(x, f(x)) at the stage's own codes; NaN if it has none for these rows.
        best: log p(x, z*) at the MAP codes z* under its dictionary.
        dictionary: ``best`` of the reference's dictionary minus that of the stage's own; negative
            where the stage's own is the better one.
        amortization: best - log_joint, the amortization gap. Since q is a point, there is no
            approximation gap.
        dictionary_error, amortization_error: their standard errors over the rows.
        zeros, best_zeros: shares of exact zeros in the stage's own codes and in the MAP codes.
        squared_error: |x - G(f(x))|^2 per datum, in squared units of x; at the MAP codes if the
            stage has none of its own.
    """

    log_joint: float
    best: float
    dictionary: float
    amortization: float
    dictionary_error: float
    amortization_error: float
    zeros: float
    best_zeros: float
    squared_error: float

    @property
    def loss(self) -> float:
        """log p(x, z*) of the reference's dictionary, minus log p(x, z) at the stage's codes."""
        return self.dictionary + (0.0 if math.isnan(self.amortization) else self.amortization)


@dataclass(frozen=True)
class SparseRow(Result):
    """The metrics of one stage.

    Attributes:
        stage, codes, algorithm: the stage and its labels.
        train, test: metrics on the training rows and on held-out ones.
        fit: the fit; None if nothing was fitted.
    """

    stage: str
    codes: str
    algorithm: str
    train: CodeMetrics
    test: CodeMetrics
    fit: FitResult | None

    @property
    def steps(self) -> int:
        """The number of iterations or steps of the fit."""
        return 0 if self.fit is None else self.fit.steps

    @property
    def seconds(self) -> float:
        """The duration of the fit."""
        return 0.0 if self.fit is None else self.fit.seconds


@dataclass(frozen=True)
class CodeEvaluation:
    """The codes of some rows, evaluated row by row.

    Attributes:
        own: log p(x_n, f(x_n)); None if the stage has no codes of its own for these rows.
        best: log p(x_n, z*_n).
        zeros, best_zeros, squared_error: as in :class:`CodeMetrics`.
    """

    own: Float[Tensor, " N"] | None
    best: Float[Tensor, " N"]
    zeros: float
    best_zeros: float
    squared_error: float

    def metrics(self, reference: "CodeEvaluation") -> CodeMetrics:
        """Means over the rows, relative to the reference's MAP codes of the same rows."""
        dictionary, dictionary_error = mean_and_error(reference.best - self.best)
        amortization, amortization_error = math.nan, math.nan
        if self.own is not None:
            amortization, amortization_error = mean_and_error(self.best - self.own)
        return CodeMetrics(
            log_joint=math.nan if self.own is None else float(self.own.mean()),
            best=float(self.best.mean()),
            dictionary=dictionary,
            amortization=amortization,
            dictionary_error=dictionary_error,
            amortization_error=amortization_error,
            zeros=self.zeros,
            best_zeros=self.best_zeros,
            squared_error=self.squared_error,
        )


@dataclass(frozen=True)
class EvaluatedStage:
    """A fitted stage with the evaluation of its codes.

    Attributes:
        autoencoder: the fitted model.
        fit: the fit; None if nothing was fitted.
        train, test: evaluations of the codes of training and held-out rows.
    """

    autoencoder: Autoencoder
    fit: FitResult | None
    train: CodeEvaluation
    test: CodeEvaluation

    def row(self, stage: Stage[SparseFit], reference: "EvaluatedStage") -> SparseRow:
        """The stage's row of the table."""
        train, test = self.train.metrics(reference.train), self.test.metrics(reference.test)
        return SparseRow(stage.name, stage.q, stage.algorithm, train, test, self.fit)


@dataclass(frozen=True)
class SparseEvaluationContext:
    """The problem, and the held-out rows on which every stage is evaluated.

    Attributes:
        problem: the problem that the stages are fitted to.
        test: held-out rows.
    """

    problem: SparseProblem
    test: Float[Tensor, "N D"]

    def fit_and_evaluate(self, stage: Stage[SparseFit]) -> EvaluatedStage:
        """Fit a stage, and evaluate its codes of training and held-out rows."""
        fitted = stage.run(self.problem)
        autoencoder = fitted.autoencoder
        has_test_codes = not has_parameters_per_row(autoencoder.guide)
        train = self._evaluate(autoencoder, self.problem.train)
        test = self._evaluate(autoencoder, self.test, has_test_codes)
        return EvaluatedStage(autoencoder, fitted.fit, train, test)

    def _evaluate(
        self, autoencoder: Autoencoder, x: Tensor, has_codes: bool = True
    ) -> CodeEvaluation:
        best = self.problem.map_codes(autoencoder, x)
        codes = autoencoder.features(x) if has_codes else best.codes
        error = (autoencoder.decode(codes).mean - x.to(codes)).square().sum(1).mean()
        own = elbo(autoencoder.model, autoencoder.guide, x).cpu() if has_codes else None
        zeros = float((codes == 0).double().mean()) if has_codes else math.nan
        return CodeEvaluation(
            own=own,
            best=best.log_joint.cpu(),
            zeros=zeros,
            best_zeros=best.share_of_zeros,
            squared_error=float(error),
        )
