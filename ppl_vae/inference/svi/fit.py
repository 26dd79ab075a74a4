"""Stochastic variational inference for any pair."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ppl_vae.core.autoguides import automatic_guide, check_automatic_batch, is_per_datum
from ppl_vae.core.program import (
    ProgramLike,
    as_data_and_mask,
    bound_object,
    check_support,
    modules_of,
)
from ppl_vae.core.results import FitResult
from ppl_vae.core.state import isolated_store, mode, seeded
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.inference.svi.capture_policy import CapturePolicy
from ppl_vae.inference.svi.captured_step import Captured
from ppl_vae.inference.svi.embedding_lookup import check_lookup
from ppl_vae.inference.svi.minibatch import (
    EachEpoch,
    MinibatchObjective,
    OptimizerStep,
    WeightedObjective,
)
from ppl_vae.inference.svi.parameters import find_parameters
from ppl_vae.inference.svi.progress import Report, progress_bar
from ppl_vae.inference.svi.schedule import EarlyStopping, Schedule
from ppl_vae.inference.svi.trainer import Trainer
from ppl_vae.objectives.bounds import ELBO, batch_keywords


def fit_svi(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    x_val: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    objective: Any = None,
    lr: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    scheduler: Callable[..., Any] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    drop_last: bool = False,
    patience: int | None = None,
    grad_clip: float | None = None,
    warmup: int | None = None,
    epoch_transform: EachEpoch | None = None,
    device: str | torch.device = "auto",
    seed: int | None = None,
    capture: bool | str = "auto",
    precision: str = "float32",
    checkpoint: str | Path | None = None,
    progress: bool | str | Report = "auto",
) -> FitResult:
    """Fit a model/guide pair by stochastic variational inference, in place.

    What is minimised is minus the objective in nats per datum, so that learning rates do not
    depend on N. Each parameter of the pair must get a gradient from the first loss, or the fit
    refuses.

    Args:
        model, guide: any pair under the contract (:mod:`ppl_vae.core.program`).
        x: data, (N, D); NaN marks a missing value if the model takes ``mask``.
        x_val: rows for validation, not among x or the test rows. Their ELBO (beta = 1) is looked
            at once an epoch, at most every 25 steps, and the best state is put back at the end.
        mask: True where x is observed.
        objective: by default ``ELBO()``; ``IWAE(...)``, or an ELBO of Pyro's own.
        lr: learning rate. A row of a per-datum table (:class:`~ppl_vae.PerDatumGuide`) moves
            only when it is drawn, once in N / batch_size steps; unless the optimizer is SGD, it
            then moves N / batch_size times as far, at most ten times.
        optimizer: a callable of (parameters, lr).
        scheduler: a callable of (optimizer, number of steps) or of (optimizer), stepped after
            every step, e.g. ``torch.optim.lr_scheduler.CosineAnnealingLR``.
        epochs, steps: how long; exactly one of them.
        batch_size: rows per step, by default all. The rows left over at the end of an epoch make
            a smaller batch; a single one joins the batch before it, since batch normalisation
            needs two.
        drop_last: leave those rows out instead, so that all batches have ``batch_size`` rows. The
            order is new in each epoch, so they are other ones each time; ``FitResult.notes``
            counts the rows that were in no batch at all.
        patience: stop after so many looks at ``x_val`` without a better one.
        grad_clip: largest norm of the gradient.
        warmup: steps in which the weight of the KL rises from zero to the objective's beta.
        each_epoch: a callable of (x, generator) that makes each epoch's data of x, such as
            :func:`ppl_vae.data.transforms.binarize`; x has zeros in place of missing values there.
            It must draw from the generator alone, so that a fit repeats and resumes. ``x_val`` is
            taken as it is.
        device: where to fit; ``"auto"`` is a GPU if there is one. The pair's modules move there.
        seed: of data order and draws; global generators are left as they were.
        capture: record the step as tensor code and compile it, several steps per call: ``"auto"``
            if the steps left are worth the time that takes; True from the second step on. A step
            that cannot be captured runs eagerly, with a warning; ``FitResult.path`` says what
            was done and why. Captured and eager steps are the same in distribution.
        precision: of float32 matrix products and convolutions in the steps, not in looks at
            ``x_val``: ``"float32"``; ``"tf32"`` on a GPU; ``"bf16"``, whose gradients are
            noisier. See :func:`ppl_vae.core.state.precision`.
        checkpoint: a file to write once an epoch (at most every 25 steps) and to resume from if
            it is there; a resumed fit is the same, bit for bit on a CPU.
        progress: a bar on standard error; ``"auto"`` if that is a terminal. A callable of the
            steps done and the objective is called after every look instead.

    Raises:
        ValueError: bad data or arguments; a parameter without a gradient; what
            :func:`ppl_vae.core.traces.check_pair` refuses; a checkpoint of another fit.
        FloatingPointError: if the loss turns NaN or infinite: with the step and the site, the
            last good state restored.
    """
    _move(model, guide, device)
    x, mask = as_data_and_mask(x, mask, model=model, guide=guide)
    if epoch_transform is None:
        check_support(model, x, mask)
    anew = epoch_transform is not None
    schedule = Schedule.of(len(x), batch_size, epochs, steps, anew=anew, drop_last=drop_last)
    if patience is not None and x_val is None:
        raise ValueError("patience needs x_val, the rows whose ELBO it waits for")
    if x_val is not None:
        _check_validation(model, guide, x_val)
    stopping = EarlyStopping(None if patience is None else check_int("patience", patience))
    weighted = WeightedObjective(ELBO() if objective is None else objective, warmup)
    in_training = mode(model, guide, training=True)
    with seeded(seed), isolated_store(), in_training, _quiet_about_frozen():
        batch = MinibatchObjective(model, guide, weighted, x, mask, precision, epoch_transform)
        everything = torch.arange(schedule.batch_size, device=x.device)
        check_automatic_batch(guide, batch_keywords(x, mask, everything))
        with _hint_of_index(schedule.batch_size < len(x)):
            named = find_parameters(
                model, guide, lambda: batch.value(everything, schedule.num_steps)
            )
        if weighted.is_ours and schedule.batch_size < len(x):
            check_lookup(model, guide, named, batch.x, mask, schedule.batch_size)
        modules, epoch = modules_of(model, guide), schedule.steps_per_epoch
        update = OptimizerStep(named, modules, lr, optimizer, grad_clip, epoch)
        update.use_scheduler(scheduler, schedule.num_steps)
        file = None if checkpoint is None else Path(checkpoint)
        choice = CapturePolicy(
            capture, lambda unroll: Captured(batch, update, named, unroll), schedule
        )
        loop = Trainer(batch, update, schedule, stopping, choice, x_val, file)
        with progress_bar(schedule.num_steps, progress) as report:
            loop.run(report)
    return loop.result()


def _move(model: ProgramLike, guide: ProgramLike, device: str | torch.device) -> None:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(device)!r} is not there; use device='auto' or 'cpu'"
        ) from error
    for module in modules_of(model, guide):
        module.to(device)


def _check_validation(model: ProgramLike, guide: ProgramLike, x_val: ArrayLike) -> None:
    count = getattr(bound_object(guide), "num_data", None)
    if callable(getattr(bound_object(guide), "tables", None)):
        raise ValueError(
            f"x_val needs a guide that reads q off x; this {type(bound_object(guide)).__name__} "
            f"has one q per datum for {count} training rows and none for others. Use an "
            "AmortizedGuide"
        )
    if is_per_datum(guide):
        raise ValueError(
            f"x_val needs a guide that reads q off x; {type(automatic_guide(guide)).__name__} has "
            "one q per datum for the training rows and none for others. Use an AmortizedGuide"
        )
    rows, mask = as_data_and_mask(x_val, model=model, guide=guide, name="x_val")
    try:
        check_support(model, rows, mask)
    except ValueError as error:
        raise ValueError(f"x_val: {error}") from error


@contextmanager
def _hint_of_index(in_batches: bool) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if in_batches and "Shape mismatch inside plate" in str(error):
            error.add_note(
                "In minibatches a parameter with a row per datum must be read by the keyword "
                "index, as loc[index]."
            )
        raise


@contextmanager
def _quiet_about_frozen() -> Iterator[None]:
    # Pyro warns at every step of a parameter that its owner has frozen on purpose.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*requires_grad=False.*", category=UserWarning)
        yield
