"""The arguments of :func:`ppl_vae.fit_svi`, grouped by what they govern."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ppl_vae.core.validation import check_int
from ppl_vae.data.sources.row_stream import Rows
from ppl_vae.inference.svi.progress import ProgressCallback

OptimizerFactory: TypeAlias = Callable[..., torch.optim.Optimizer]
"""A callable of (parameters, lr), such as the class ``torch.optim.Adam``."""
SchedulerFactory: TypeAlias = Callable[..., Any]
"""A callable of (optimizer, number of steps) or of (optimizer), such as the class
``torch.optim.lr_scheduler.CosineAnnealingLR``."""


@dataclass(frozen=True)
class Optimization:
    """What is optimised, and how.

    Attributes:
        objective: what is maximised; None is the ELBO.
        lr: learning rate.
        optimizer: a callable of (parameters, lr).
        scheduler: a callable of (optimizer, number of steps) or of (optimizer); or None.
        grad_clip: largest norm of the gradient, or None.
        warmup: steps during which the weight of the KL rises to the objective's beta, or None.
    """

    objective: Any = None
    lr: float = 1e-3
    optimizer: OptimizerFactory = torch.optim.Adam
    scheduler: SchedulerFactory | None = None
    grad_clip: float | None = None
    warmup: int | None = None


@dataclass(frozen=True)
class Stopping:
    """Validation rows and the patience of early stopping.

    Attributes:
        x_val: validation rows, or None.
        patience: evaluations without improvement before the fit stops; None never stops it.

    Raises:
        ValueError: if there is a patience and no validation rows, or it is not positive.
    """

    x_val: Rows | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.patience is None:
            return
        if self.x_val is None:
            raise ValueError("patience needs x_val, the rows whose ELBO is evaluated")
        check_int("patience", self.patience)


@dataclass(frozen=True)
class Runtime:
    """How the steps are executed; nothing here changes the distribution of the result.

    Attributes:
        seed: the seed of data order and draws; None uses the global generators.
        capture: True, False or ``"auto"``.
        autotune_matmul: whether compiled steps use the faster of two BLAS libraries.
        precision: the precision of matrix products, see :func:`ppl_vae.core.state.precision`.
        checkpoint: a file to write and to resume from, or None.
        progress: whether to show a progress bar, or a callback.
    """

    seed: int | None = None
    capture: bool | str = "auto"
    autotune_matmul: bool = False
    precision: str = "float32"
    checkpoint: str | Path | None = None
    progress: bool | str | ProgressCallback = "auto"

    @property
    def checkpoint_file(self) -> Path | None:
        """The path of the checkpoint, if there is one."""
        return None if self.checkpoint is None else Path(self.checkpoint)
