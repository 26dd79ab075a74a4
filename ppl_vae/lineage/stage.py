"""Base classes of the two lineages: settings, problem, stages and table of results."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.validation import check_option
from ppl_vae.inference.svi.convergence import Convergence
from ppl_vae.inference.svi.fit import fit_svi

Fitted = TypeVar("Fitted", covariant=True)


@runtime_checkable
class StageRow(Protocol):
    """A row of a lineage's table."""

    @property
    def stage(self) -> str:
        """The name of the stage."""
        ...

    @property
    def fit(self) -> FitResult | None:
        """The fit; None if nothing was fitted."""
        ...


AnyRow = TypeVar("AnyRow", bound=StageRow)


@dataclass(frozen=True)
class SVISettings:
    """Settings of SVI with Adam.

    Attributes:
        steps: maximal number of steps.
        batch_size: maximal number of rows per step.
        lr: initial learning rate, which decreases to zero along a cosine.
    """

    steps: int = 1500
    batch_size: int = 256
    lr: float = 1e-2


@dataclass(frozen=True, kw_only=True)
class StageProblem:
    """The data and settings that every stage of a lineage is fitted with.

    Attributes:
        train: training rows, (N, D).
        latent_dim: K.
        seed: the seed of initial values, data order and draws.
    """

    train: Tensor
    latent_dim: int
    seed: int = 0

    def fit_svi(
        self, model: ProgramLike, guide: ProgramLike, settings: SVISettings, **options: Any
    ) -> FitResult:
        """Fit a pair by SVI with Adam, the learning rate decreasing along a cosine.

        The pair is moved to the device of the training rows, with which it is evaluated.

        Args:
            model, guide: the pair, fitted in place.
            settings: steps, batch size and learning rate.
            **options: further arguments of :func:`ppl_vae.fit_svi`.
        """
        return fit_svi(
            model,
            guide,
            self.train,
            steps=settings.steps,
            batch_size=min(settings.batch_size, len(self.train)),
            lr=settings.lr,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
            seed=self.seed,
            device=self.train.device,
            **options,
        )


@dataclass(frozen=True)
class Stage(Generic[Fitted]):
    """A stage of a lineage: a model, a guide and an algorithm, with a function that fits them.

    Attributes:
        name: the name by which users select the stage.
        model, q, algorithm: labels for the table; in the sparse lineage ``q`` is the method that
            computes the codes.
        run: fits the stage to a problem.
        family: the family of q if the model is PPCA, see :mod:`ppl_vae.guides.families`; it
            determines the expected loss.
        needs_complete: the reason why the stage needs complete data; empty if it does not.
        on_request: whether the stage is run only if its name is given.
    """

    name: str
    model: str
    q: str
    algorithm: str
    run: Callable[[Any], Fitted]
    family: str = ""
    needs_complete: str = ""
    on_request: bool = False

    @property
    def labels(self) -> tuple[str, str, str, str]:
        """The name, the model, q and the algorithm, as the first columns of a table."""
        return self.name, self.model, self.q, self.algorithm


def select_stages(
    names: Iterable[str] | None, known: Mapping[str, Stage[Fitted]]
) -> list[Stage[Fitted]]:
    """The stages with these names, by default all that are not run on request only.

    Raises:
        ValueError: if a name is unknown.
    """
    if not names:
        return [stage for stage in known.values() if not stage.on_request]
    return [known[check_option("stages", name, known)] for name in names]


def own_convergence(fit: FitResult) -> Convergence:
    """The convergence of an algorithm that has its own tolerance, or needs none."""
    return Convergence(fit.converged is not False, math.nan, math.nan, fit.steps, fit.stopped)


class StageTable(Result, Generic[AnyRow]):
    """Base of the results of a lineage, which have one row per stage."""

    rows: tuple[AnyRow, ...]

    def row(self, stage: str) -> AnyRow:
        """The row of a stage.

        Raises:
            KeyError: if there is no such stage.
        """
        return {row.stage: row for row in self.rows}[stage]

    def fit_notes(self) -> list[str]:
        """The notes of the fits, each once with the names of its stages."""
        by_note: dict[str, list[str]] = {}
        for row in self.rows:
            for note in () if row.fit is None else row.fit.notes:
                by_note.setdefault(note, []).append(row.stage)
        return [f"{note} ({', '.join(names)})" for note, names in by_note.items()]


@runtime_checkable
class StageProgress(Protocol):
    """A callback that receives the progress of a stage."""

    def __call__(self, stage: str, phase: str, step: int, num_steps: int) -> None:
        """Receive the number of finished steps.

        Args:
            stage: its name.
            phase: ``"fitting"`` or ``"evaluating"``.
            step: finished steps.
            num_steps: the total; 0 where it is unknown.
        """


def no_progress(stage: str, phase: str, step: int, num_steps: int) -> None:
    """A :class:`StageProgress` that does nothing."""
