"""What fits and estimates return: frozen dataclasses of tensors that a person can read."""

import dataclasses
from typing import Any

import pandas as pd
import torch
from torch import Tensor


class Result:
    """Base of the result dataclasses: conversion to plain Python and to pandas."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as numbers, strings and lists; what JSON cannot hold (NaN, inf) is None."""
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        return {field.name: plain(getattr(self, field.name)) for field in fields}

    def to_frame(self) -> pd.DataFrame:
        """The fields with one value a row (a datum, a step) as columns; NaN ends shorter ones."""
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        columns = {field.name: getattr(self, field.name) for field in fields}
        return pd.DataFrame(
            {
                name: pd.Series(value.detach().cpu().numpy())
                for name, value in columns.items()
                if isinstance(value, Tensor) and value.dim() == 1
            }
        )


def plain(value: Any) -> Any:
    """Tensors, results and containers of them as what JSON can hold."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return None
    return value


@dataclasses.dataclass(frozen=True, repr=False)
class FitResult(Result):
    """How a fit went.

    Attributes:
        algorithm: what fitted.
        objective: what was maximised, in nats a datum. SVI: its estimate at each step. EM: the
            bound after each E- and each M-step in turn, (2 T,).
        elapsed: seconds since the start, one for each entry of ``objective``.
        steps: iterations done.
        seconds: in all.
        stopped: why it stopped.
        log_likelihood: EM: exact log p where ``objective`` has the bound; equal after E-steps.
        validation: SVI with ``x_val``: the ELBO (beta = 1) of its rows at ``validation_steps``.
        validation_steps: after how many steps.
        restored: whether the state with the best validation ELBO was put back.
        notes: what else a person should know.
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

    def __repr__(self) -> str:
        last = self.objective[-min(len(self.objective), 50) :] if self.steps else torch.zeros(0)
        value = last.mean() if self.algorithm == "SVI" else last[-1:].sum()
        lines = [
            f"{self.algorithm}: {self.steps} steps in {self.seconds:.2f} s, {self.stopped}",
            f"  objective {value:.4f} nats a datum",
        ]
        if self.validation is not None and len(self.validation):
            best = f"  validation ELBO {self.validation.max():.4f} nats a datum at best"
            lines.append(best + (", restored" if self.restored else ""))
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
