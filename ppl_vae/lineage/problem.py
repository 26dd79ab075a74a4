"""The problem that a stage of the lineage is fitted to, and the settings of fit and evaluation."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import pyro.infer
from torch import Tensor

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.introspection import modules_of
from ppl_vae.core.program import ProgramLike
from ppl_vae.evaluation.inference_gaps.bound_history import BoundMonitor
from ppl_vae.inference.em.fit import fit_closed_form, fit_em
from ppl_vae.inference.svi.convergence import Convergence, fit_in_cycles
from ppl_vae.inference.svi.progress import ProgressCallback
from ppl_vae.lineage.stage import StageProblem, SVISettings
from ppl_vae.models.ppca import PPCA
from ppl_vae.objectives.bounds import elbo

MAX_ATTEMPTS = 4
"""Maximal number of fits with decreasing learning rates for a pair whose loss becomes infinite."""
ELBO_SAMPLES = 20
"""Draws per datum for estimates of the ELBO."""


@dataclass(frozen=True)
class LineageSettings(SVISettings):
    """Settings of SVI and of the evaluation, the same for every stage.

    Pairs with PPCA as the model, linear autoencoders and guides with one q per datum are trained
    in cosine cycles until one that is twice as long as the previous one gains less than
    ``tolerance``, on batches of ``linear_batch_size`` rows. Their learning rates had the highest
    bound on the training rows of digits: for linear maps and tables among 0.01, 0.03, 0.1 and 0.3,
    for an encoder with hidden layers among 0.01 and 0.03. Other pairs are stopped early, on
    validation rows.

    Attributes:
        steps: maximal number of steps.
        batch_size: maximal number of rows per step, for pairs with a nonlinear decoder.
        lr: initial learning rate of Adam for pairs with a nonlinear decoder; it decreases to zero
            along a cosine.
        patience: evaluations of the validation rows without improvement before a fit stops.
        tolerance: in nats per datum, on the training rows.
        linear_batch_size: maximal number of rows per step, for pairs trained to the tolerance.
        linear_lr: initial learning rate of each of their cycles.
        encoder_lr: the same where the encoder has hidden layers.
        gap_rows: maximal number of rows on which gaps are measured and held-out log p is
            estimated.
        num_samples: draws per datum for estimates of log p.
        refine: steps of the optimization of each datum's q.
        cross_check_rows: maximal number of held-out data whose log p is also estimated by
            annealed importance sampling.
        num_temperatures: the number of temperatures of its chains.
        posterior_draws: draws of each of the four chains that sample the posterior of PPCA's
            parameters, after half as many iterations of warm-up; variational Bayes makes as many
            draws in all.
        starts: the number of starts of EM, PX-EM and variational EM, of which the best is kept;
            see :func:`~ppl_vae.inference.em.fit.fit_em`.
    """

    patience: int = 20
    tolerance: float = 0.05
    linear_batch_size: int = 512
    linear_lr: float = 0.1
    encoder_lr: float = 0.03
    gap_rows: int = 500
    num_samples: int = 1000
    refine: int = 150
    cross_check_rows: int = 40
    num_temperatures: int = 100
    posterior_draws: int = 1000
    starts: int = 1


@dataclass(frozen=True, kw_only=True)
class LineageProblem(StageProblem):
    """The data and settings that a stage is fitted with.

    Attributes:
        train: training rows.
        val: validation rows, for early stopping.
        latent_dim: K.
        settings: the settings of SVI.
        seed: the seed of initial values, data order and draws.
        progress: a callback that receives the number of finished steps of SVI.
    """

    val: Tensor
    settings: LineageSettings = field(default_factory=LineageSettings)
    progress: ProgressCallback | None = None

    def fit_early_stopping(
        self,
        model: ProgramLike,
        guide: ProgramLike,
        objective: pyro.infer.ELBO | None = None,
    ) -> tuple[FitResult, Convergence]:
        """Fit a pair by SVI until the ELBO of the validation rows stops improving.

        If the loss becomes infinite, the fit restarts from the initial parameters with a third of
        the learning rate, at most :data:`MAX_ATTEMPTS` times in all; a note reports it.

        Raises:
            FloatingPointError: if the loss becomes infinite each time.
        """
        settings, lr = self.settings, self.settings.lr
        modules = modules_of(model, guide)
        initial = [deepcopy(module.state_dict()) for module in modules]
        notes: tuple[str, ...] = ()
        while True:
            try:
                fit = self._fit_with_validation(model, guide, lr, objective)
                break
            except FloatingPointError as error:
                if len(notes) + 1 == MAX_ATTEMPTS:
                    raise
                cause = str(error).split(":")[0]
                notes += (
                    f"with a learning rate of {lr:.2g} {cause}; restarted with a third of it",
                )
                lr /= 3
                for module, state in zip(modules, initial, strict=True):
                    module.load_state_dict(state)
        fit = replace(fit, notes=fit.notes + notes)
        met = fit.stopped.startswith("early")
        rule = f"validation ELBO still improved after {fit.steps} steps"
        if met:
            rule = f"validation ELBO did not improve for {settings.patience} evaluations"
        return fit, Convergence(met, math.nan, math.nan, fit.steps, rule)

    def _fit_with_validation(
        self, model: ProgramLike, guide: ProgramLike, lr: float, objective: pyro.infer.ELBO | None
    ) -> FitResult:
        return self.fit_svi(
            model,
            guide,
            replace(self.settings, lr=lr),
            x_val=self.val,
            patience=self.settings.patience,
            objective=objective,
            progress=_call_each(self.progress),
        )

    def fit_to_tolerance(
        self,
        model: ProgramLike,
        guide: ProgramLike,
        lr: float,
        value: Callable[[], float] | None = None,
        monitor: BoundMonitor | None = None,
    ) -> tuple[FitResult, Convergence]:
        """Fit a pair by SVI until the objective on the training rows has converged.

        Args:
            model, guide: the pair.
            lr: learning rate at the start of each cycle.
            value: computes the pair's objective exactly; by default its ELBO is estimated with
                common random numbers.
            monitor: evaluates the bound during the fit.
        """
        settings = self.settings
        return fit_in_cycles(
            model,
            guide,
            self.train,
            value=value or partial(self._estimate_elbo, model, guide),
            tolerance=settings.tolerance,
            steps=settings.steps,
            batch_size=min(settings.linear_batch_size, len(self.train)),
            lr=lr,
            progress=_call_each(self.progress, monitor),
            seed=self.seed,
            device=self.train.device,
        )

    def _estimate_elbo(self, model: ProgramLike, guide: ProgramLike) -> float:
        values = elbo(model, guide, self.train, num_samples=ELBO_SAMPLES, seed=self.seed)
        return float(values.mean())

    def initial_ppca(self) -> PPCA:
        """The model that every PPCA stage starts from."""
        return PPCA.like(self.train, self.latent_dim, seed=self.seed)

    @property
    def num_missing(self) -> int:
        """The number of missing values in the training rows."""
        return int(self.train.isnan().sum())

    @property
    def reference_stage(self) -> str:
        """The stage whose fit is :meth:`optimal_ppca`."""
        return "px-em" if self.num_missing else "closed-form"

    def optimal_ppca(self) -> PPCA:
        """PPCA at its maximum likelihood: in closed form, or by PX-EM with missing values."""
        ppca = self.initial_ppca()
        if self.num_missing:
            fit_em(ppca, self.train, starts=self.settings.starts)
        else:
            fit_closed_form(ppca, self.train)
        return ppca


def _call_each(*callbacks: ProgressCallback | None) -> ProgressCallback:
    def progress(step: int, value: float) -> None:
        for callback in callbacks:
            if callback is not None:
                callback(step, value)

    return progress
