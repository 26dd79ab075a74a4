"""What a stage of the lineage is fitted to, and under which settings."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace

import pyro.infer
import torch
from torch import Tensor

from ppl_vae.core.program import ProgramLike, modules_of
from ppl_vae.core.results import FitResult
from ppl_vae.evaluation.inference_gaps.ascent import BoundMonitor
from ppl_vae.inference.em.fit import fit_closed_form, fit_em
from ppl_vae.inference.svi.convergence import Convergence, fit_in_cycles
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.inference.svi.progress import ProgressCallback
from ppl_vae.models.ppca import PPCA
from ppl_vae.objectives.bounds import elbo

ATTEMPTS = 4
"""So many times a pair is fitted whose loss becomes infinite, with ever smaller learning rates."""
VALUE_DRAWS = 20
"""Draws per datum with which an ELBO is compared with that of before, where it is not exact."""


@dataclass(frozen=True)
class Settings:
    """How SVI fits and how every stage is measured.

    Pairs with PPCA as the model, linear autoencoders and guides with one q per datum are trained
    in cosine cycles until one that is twice as long as the one before gains less than
    ``tolerance``, on batches of ``linear_batch_size`` rows. Their learning rates had the highest
    bound on the training rows of digits: for linear maps and tables among 0.01, 0.03, 0.1 and 0.3,
    for an encoder with hidden layers among 0.01 and 0.03. Other pairs stop early, on validation
    rows.

    Attributes:
        steps: at most.
        batch_size: rows per step at most, of pairs with a nonlinear decoder.
        lr: of Adam, falling to zero along a cosine, for pairs with a nonlinear decoder.
        patience: looks at the validation rows without a better one.
        tolerance: in nats per datum, on the training rows.
        linear_batch_size: rows per step at most, of pairs trained to the tolerance.
        linear_lr: at the start of each of their cycles.
        encoder_lr: the same where the encoder has hidden layers.
        gap_rows: at most so many rows are used to measure gaps, and to estimate held-out log p.
        draws: a datum, where log p is estimated.
        refine: steps of the search for each datum's best q.
        annealed_rows: at most so many held-out data get a cross-check, by annealing.
        temperatures: of these chains.
    """

    steps: int = 1500
    batch_size: int = 256
    lr: float = 1e-2
    patience: int = 20
    tolerance: float = 0.05
    linear_batch_size: int = 512
    linear_lr: float = 0.1
    encoder_lr: float = 0.03
    gap_rows: int = 500
    draws: int = 1000
    refine: int = 150
    annealed_rows: int = 40
    num_temperatures: int = 100


@dataclass(frozen=True)
class Task:
    """What a stage is fitted to.

    Attributes:
        train: rows to fit.
        val: rows for early stopping.
        latent_dim: K.
        settings: of SVI.
        seed: of starts, data order and draws.
        report: is told of the steps done while SVI runs.
    """

    train: Tensor
    val: Tensor
    latent_dim: int
    settings: Settings = field(default_factory=Settings)
    seed: int = 0
    report: ProgressCallback | None = None

    def stopped_early(
        self,
        model: ProgramLike,
        guide: ProgramLike,
        objective: pyro.infer.ELBO | None = None,
    ) -> tuple[FitResult, Convergence]:
        """Fit a pair by SVI until validation rows have waited for a better ELBO for so long.

        Where the loss becomes infinite, the modules of the pair begin anew with a third of the
        learning rate, at most :data:`ATTEMPTS` times in all; a note says so.

        Raises:
            FloatingPointError: if the loss becomes infinite each time.
        """
        settings, lr = self.settings, self.settings.lr
        modules = modules_of(model, guide)
        beginning = [deepcopy(module.state_dict()) for module in modules]
        notes: tuple[str, ...] = ()
        while True:
            try:
                fit = self._with_validation(model, guide, lr, objective)
                break
            except FloatingPointError as error:
                if len(notes) + 1 == ATTEMPTS:
                    raise
                what = str(error).split(":")[0]
                notes += (f"with a learning rate of {lr:.2g} {what}; it began anew with a third",)
                lr /= 3
                for module, state in zip(modules, beginning, strict=True):
                    module.load_state_dict(state)
        fit = replace(fit, notes=fit.notes + notes)
        met = fit.stopped.startswith("early")
        ended = "was not better" if met else f"was, after {fit.steps} steps, still better"
        rule = f"the ELBO of validation rows {ended} within {settings.patience} looks"
        return fit, Convergence(met, math.nan, math.nan, fit.steps, rule)

    def _with_validation(
        self, model: ProgramLike, guide: ProgramLike, lr: float, objective: pyro.infer.ELBO | None
    ) -> FitResult:
        settings = self.settings
        return fit_svi(
            model,
            guide,
            self.train,
            x_val=self.val,
            patience=settings.patience,
            steps=settings.steps,
            batch_size=min(settings.batch_size, len(self.train)),
            lr=lr,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
            objective=objective,
            progress=_all_told(self.report),
            seed=self.seed,
        )

    def to_tolerance(
        self,
        model: ProgramLike,
        guide: ProgramLike,
        lr: float,
        value: Callable[[], float] | None = None,
        recording: BoundMonitor | None = None,
    ) -> tuple[FitResult, Convergence]:
        """Fit a pair by SVI until the objective on the training rows settles.

        Args:
            model, guide: the pair.
            lr: learning rate at the start of each cycle.
            value: the pair's objective, exact; by default its ELBO, estimated on fixed draws.
            recording: is told of the steps.
        """

        def estimated() -> float:
            draws = {"num_samples": VALUE_DRAWS, "seed": self.seed}
            return float(elbo(model, guide, self.train, **draws).mean())

        settings = self.settings
        return fit_in_cycles(
            model,
            guide,
            self.train,
            value=value or estimated,
            tolerance=settings.tolerance,
            steps=settings.steps,
            batch_size=min(settings.linear_batch_size, len(self.train)),
            lr=lr,
            progress=_all_told(self.report, recording),
            seed=self.seed,
        )

    def ppca(self) -> PPCA:
        """Where every PPCA stage starts."""
        return PPCA.like(self.train, self.latent_dim, seed=self.seed)

    @property
    def holes(self) -> int:
        """How many cells of the training rows are missing."""
        return int(self.train.isnan().sum())

    @property
    def reference(self) -> str:
        """The stage whose fit :meth:`optimum` is."""
        return "px-em" if self.holes else "closed-form"

    def optimum(self) -> PPCA:
        """PPCA by the closed form, its maximum likelihood, or with missing values by PX-EM."""
        ppca = self.ppca()
        fit = fit_em if self.holes else fit_closed_form
        fit(ppca, self.train)
        return ppca


def _all_told(*listeners: ProgressCallback | None) -> ProgressCallback:
    def tell(step: int, value: float) -> None:
        for listener in listeners:
            if listener is not None:
                listener(step, value)

    return tell
