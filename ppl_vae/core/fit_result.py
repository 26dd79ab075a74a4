"""The result of a fit, and its objective along the fit."""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.text import counted


@dataclasses.dataclass(frozen=True)
class Curve(Result):
    """An objective along a fit, averaged over spans of equal length, for plots.

    Attributes:
        steps: the number of steps at the end of each span.
        seconds: the time at the end of each span.
        value: the mean objective over each span, in nats per datum.
    """

    steps: Tensor
    seconds: Tensor
    value: Tensor


@dataclasses.dataclass(frozen=True, repr=False)
class FitResult(Result):
    """The result of a fit.

    Attributes:
        algorithm: the name of the algorithm.
        objective: the maximised objective, in nats per datum. SVI: its estimate at each
            step, (T,). EM: the bound after each E-step and each M-step in turn, (2 T,).
        elapsed: seconds since the start for each entry of ``objective``, of its shape.
        steps: the number of iterations.
        seconds: the total time.
        stopped: the reason why the fit stopped.
        log_likelihood: EM: exact log p where ``objective`` has the bound; equal after E-steps.
        validation: SVI with ``x_val``: the ELBO (beta = 1) of its rows at ``validation_steps``,
            (V,), in nats per datum.
        validation_steps: the numbers of steps before these evaluations.
        restored: whether the state with the best validation ELBO was restored.
        notes: caveats.
        converged: whether the result satisfies the optimality condition up to the tolerance; None
            where no condition is known, as for SVI.
        certificate: EM: the objective at the best parameters for the covariance of the data (with
            missing values, for the expected one), minus the objective, in nats per datum: it is
            zero at a maximum and positive at a saddle point.
        execution: SVI: whether steps ran eagerly, recorded or compiled, and why.
    """

    algorithm: str
    objective: Tensor
    elapsed: Tensor
    steps: int
    seconds: float
    stopped: str
    log_likelihood: Tensor | None = None
    validation: Tensor | None = None
    validation_steps: Tensor | None = None
    restored: bool = False
    notes: tuple[str, ...] = ()
    converged: bool | None = None
    certificate: float | None = None
    execution: str = ""

    def shifted(self, nats: float, validation: float) -> Self:
        """The same fit with its objectives converted to other units of the data.

        Args:
            nats: what to add to the mean log density of the training rows.
            validation: what to add to that of the validation rows; with missing values the two
                differ.
        """
        moved = {"objective": self.objective + nats}
        if self.log_likelihood is not None:
            moved["log_likelihood"] = self.log_likelihood + nats
        if self.validation is not None:
            moved["validation"] = self.validation + validation
        return dataclasses.replace(self, **moved)

    def curve(self, points: int = 100) -> Curve:
        """The objective averaged over at most ``points`` spans; for EM, after E-steps only."""
        value, elapsed = self.objective.double(), self.elapsed.double()
        if len(value) == 2 * self.steps:
            value, elapsed = value[::2], elapsed[::2]
        size = -(-len(value) // points)
        spans = [slice(start, start + size) for start in range(0, len(value), size)]
        return Curve(
            steps=torch.tensor([min(span.stop, len(value)) for span in spans]),
            seconds=torch.tensor([float(elapsed[span][-1]) for span in spans]),
            value=torch.tensor([float(value[span].mean()) for span in spans]),
        )

    def __repr__(self) -> str:
        last = self.objective[-min(len(self.objective), 50) :] if self.steps else torch.zeros(0)
        value, mean = last[-1:].sum(), ""
        if self.algorithm == "SVI" and len(last) > 1:
            value, mean = last.mean(), f", the mean over the last {len(last)} steps"
        steps = counted(self.steps, "step")
        lines = [
            f"{self.algorithm}: {steps} in {self.seconds:.2f} s, {self.stopped}",
            f"  objective {value:.4f} nats per datum{mean}",
        ]
        if self.validation is not None and len(self.validation):
            best = f"  validation ELBO {self.validation.max():.4f} nats per datum at best"
            lines.append(best + (", restored" if self.restored else ""))
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
