"""A stage of the lineage of sparse codes, measured: its row of the table, in nats per datum."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import FitResult, Result
from ppl_vae.lineage.metrics import is_per_datum
from ppl_vae.lineage.sparse_stages import SparseStage, SparseTask
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.objectives.bounds import elbo


@dataclass(frozen=True)
class Coded(Result):
    """What a stage makes of some rows; means over them, in nats per datum unless said otherwise.

    Attributes:
        log_joint: log p(x, f(x)) at the stage's own codes; NaN if it has none for these rows.
        best: log p(x, z*) at the best codes under its dictionary.
        dictionary: what these lose against the best codes under the reference's dictionary;
            negative where the stage's own is the better one.
        amortization: best - log_joint, the price of how codes are found: a point has no family,
            so nothing else is lost.
        dictionary_error, amortization_error: their standard errors over the rows.
        zeros, best_zeros: shares of exact zeros of the stage's own codes and of the best.
        squared_error: |x - G(f(x))|^2 a datum, in squared units of x; at the best codes, if the
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
    def lost(self) -> float:
        """What the stage loses in all, against the best codes under the reference's dictionary."""
        return self.dictionary + (0.0 if math.isnan(self.amortization) else self.amortization)


@dataclass(frozen=True)
class SparseRow(Result):
    """One stage of the lineage.

    Attributes:
        stage, codes, algorithm: what it is.
        train, test: what it makes of the training rows and of held-out ones.
        fit: how the fit went; None if nothing was fitted.
    """

    stage: str
    codes: str
    algorithm: str
    train: Coded
    test: Coded
    fit: FitResult | None

    @property
    def steps(self) -> int:
        """Iterations done."""
        return 0 if self.fit is None else self.fit.steps

    @property
    def seconds(self) -> float:
        """What the fit took."""
        return 0.0 if self.fit is None else self.fit.seconds


@dataclass(frozen=True)
class Look:
    """What codes make of some rows, each by itself.

    Attributes:
        own: log p(x_n, f(x_n)); None if the stage has no codes of its own for these rows.
        best: log p(x_n, z*_n).
        zeros, best_zeros, squared_error: as in :class:`Coded`.
    """

    own: Float[Tensor, " N"] | None
    best: Float[Tensor, " N"]
    zeros: float
    best_zeros: float
    squared_error: float

    def coded(self, reference: "Look") -> Coded:
        """The means, and what is lost against the reference's best codes of the same rows."""
        dictionary, dictionary_error = _mean(reference.best - self.best)
        gap = None if self.own is None else self.best - self.own
        amortization, amortization_error = (math.nan, math.nan) if gap is None else _mean(gap)
        return Coded(
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


def _mean(values: Float[Tensor, " N"]) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


@dataclass(frozen=True)
class FittedStage:
    """A stage after its fit.

    Attributes:
        autoencoder: what was fitted.
        fit: how it went; None if nothing was fitted.
        train, test: what it makes of the rows.
    """

    autoencoder: Autoencoder
    fit: FitResult | None
    train: Look
    test: Look

    def row(self, stage: SparseStage, reference: "FittedStage") -> SparseRow:
        """The stage's row of the table."""
        parts = self.train.coded(reference.train), self.test.coded(reference.test)
        return SparseRow(stage.name, stage.codes, stage.algorithm, *parts, self.fit)


@dataclass(frozen=True)
class EvaluationContext:
    """The task and the held-out rows that every stage is measured on.

    Attributes:
        task: what the stages are fitted to.
        test: held-out rows.
    """

    task: SparseTask
    test: Float[Tensor, "N D"]

    def run(self, stage: SparseStage) -> FittedStage:
        """Fit a stage, and look at what it makes of training and held-out rows."""
        autoencoder, fit = stage.run(self.task)
        own = not is_per_datum(autoencoder.guide)
        looks = self._look(autoencoder, self.task.train), self._look(autoencoder, self.test, own)
        return FittedStage(autoencoder, fit, *looks)

    def _look(self, autoencoder: Autoencoder, x: Tensor, own: bool = True) -> Look:
        best = self.task.best(autoencoder, x)
        codes = autoencoder.features(x) if own else best.codes
        error = (autoencoder.decode(codes).mean - x.to(codes)).square().sum(1).mean()
        values = elbo(autoencoder.model, autoencoder.guide, x).cpu() if own else None
        zeros = float((codes == 0).double().mean()) if own else math.nan
        found = best.log_joint.cpu(), zeros, best.share_of_zeros, float(error)
        return Look(values, *found)
