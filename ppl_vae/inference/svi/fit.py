"""Stochastic variational inference for any pair."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae.core.autoguides import automatic_guide, check_automatic_batch, is_per_datum
from ppl_vae.core.batch import Batch
from ppl_vae.core.digest import describe_tensor
from ppl_vae.core.files import check_writable
from ppl_vae.core.inputs import as_data_and_mask, check_support, learn_schema, schema_of
from ppl_vae.core.introspection import bound_object, modules_of
from ppl_vae.core.processes import Processes
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import FitResult
from ppl_vae.core.schema import TableSchema
from ppl_vae.core.state import isolated_store, seeded, train_mode
from ppl_vae.core.text import counted
from ppl_vae.core.validation import ArrayLike, as_matrix, check_rows_observed
from ppl_vae.inference.svi.capture_policy import CapturePolicy
from ppl_vae.inference.svi.captured_step import CapturedSteps
from ppl_vae.inference.svi.early_stopping import EarlyStopping
from ppl_vae.inference.svi.embedding_lookup import check_lookup
from ppl_vae.inference.svi.fingerprint import fit_fingerprint
from ppl_vae.inference.svi.minibatch import (
    EpochTransform,
    MinibatchObjective,
    WeightedObjective,
)
from ppl_vae.inference.svi.optimizer_step import OptimizerStep
from ppl_vae.inference.svi.parameters import find_parameters
from ppl_vae.inference.svi.progress import ProgressCallback, progress_bar
from ppl_vae.inference.svi.schedule import Schedule
from ppl_vae.inference.svi.settings import (
    Optimization,
    OptimizerFactory,
    Runtime,
    SchedulerFactory,
    Stopping,
)
from ppl_vae.inference.svi.trainer import Trainer
from ppl_vae.objectives.bounds import ELBO


def fit_svi(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    x_val: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    objective: Any = None,
    lr: float = 1e-3,
    optimizer: OptimizerFactory = torch.optim.Adam,
    scheduler: SchedulerFactory | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    drop_last: bool = False,
    patience: int | None = None,
    grad_clip: float | None = None,
    warmup: int | None = None,
    epoch_transform: EpochTransform | None = None,
    device: str | torch.device = "auto",
    seed: int | None = None,
    capture: bool | str = "auto",
    autotune_matmul: bool = False,
    precision: str = "float32",
    checkpoint: str | Path | None = None,
    progress: bool | str | ProgressCallback = "auto",
) -> FitResult:
    """Fit a model/guide pair by stochastic variational inference, in place.

    The loss is minus the objective in nats per datum, so that learning rates do not depend on N.
    Each parameter of the pair must get a gradient from the first loss; otherwise the fit raises
    an error. Fits in several threads of one process run one after another
    (:func:`ppl_vae.core.state.exclusive`).

    Args:
        model, guide: any pair under the contract (:mod:`ppl_vae.core.program`).
        x: data, (N, D); NaN marks a missing value if the model takes ``mask``.
        x_val: validation rows, which are neither in x nor test rows. Their ELBO (beta = 1) is
            evaluated once per epoch, at most every 25 steps, and the best state is restored at
            the end.
        mask: True where x is observed.
        objective: by default ``ELBO()``; ``IWAE(...)``, or an ELBO of Pyro.
        lr: learning rate. A row of a per-datum parameter (:class:`~ppl_vae.PerDatumGuide`) is
            updated only when it is drawn, once in N / batch_size steps; unless the optimizer is
            SGD, its updates are multiplied by N / batch_size, at most by ten.
        optimizer: a callable of (parameters, lr).
        scheduler: a callable of (optimizer, number of steps) or of (optimizer), stepped after
            every step, e.g. ``torch.optim.lr_scheduler.CosineAnnealingLR``.
        epochs, steps: the length of the fit; exactly one of them.
        batch_size: rows per step, by default all. The rows that remain at the end of an epoch
            form a smaller batch; a single one joins the batch before it, since batch
            normalisation needs two.
        drop_last: leave those rows out instead, so that all batches have ``batch_size`` rows. The
            order is new in each epoch, so different rows are left out each time;
            ``FitResult.notes`` counts the rows that were in no batch at all.
        patience: stop after this number of evaluations of ``x_val`` without improvement.
        grad_clip: largest norm of the gradient.
        warmup: steps during which the weight of the KL rises from zero to the objective's beta.
        epoch_transform: a callable of (x, generator) that computes the data of each epoch, such
            as :func:`ppl_vae.data.transforms.binarize`; x has zeros in place of missing values.
            It must draw from the generator only, so that a fit can be repeated and resumed. It
            is not applied to ``x_val``.
        device: where to fit; ``"auto"`` is a GPU if there is one. The modules of the pair are
            moved there.
        seed: of data order and draws; global generators are left unchanged.
        capture: whether to capture the step as a tensor graph and compile it, several steps per
            call: ``"auto"`` does so if the remaining steps are worth the time it takes; True from
            the second step on. A step that cannot be captured runs eagerly, with a warning;
            ``FitResult.execution`` states what was done and why. Captured and eager steps are
            equal in distribution.
        autotune_matmul: whether captured steps on a CPU use the faster of two BLAS libraries for
            each matrix product, by timing; results may then differ in the last digits from run
            to run.
        precision: of float32 matrix products and convolutions in the steps, but not in
            evaluations of ``x_val``: ``"float32"``; ``"tf32"`` on a GPU; ``"bf16"``, whose
            gradients are noisier. See :func:`ppl_vae.core.state.precision`.
        checkpoint: a file that is written once per epoch (at most every 25 steps), and from which
            the fit resumes if it exists; a resumed fit is identical bit for bit on a CPU. Only
            the same fit resumes: data, masks, networks, objective, optimizer and its settings,
            scheduler, seed, precision and batches are compared, and what differs is named in an
            error. The number of steps may be larger, and patience, device and ``capture`` may
            be others.
        progress: whether to show a bar on standard error, or in the output of a notebook's cell;
            ``"auto"`` does in a notebook, and if standard error is a terminal. A callable of the
            number of steps made and the objective is called after every evaluation instead.

    Raises:
        ValueError: bad data or arguments; a parameter without a gradient; the cases of
            :func:`ppl_vae.core.traces.check_pair`.
        CheckpointError: a ValueError, if the checkpoint is damaged or of another fit.
        OSError: if the checkpoint cannot be written; found before the first step.
        FloatingPointError: if the loss becomes NaN or infinite, with the step, the site and the
            rows; the last good state is restored.
    """
    processes = Processes.current()
    with processes.together():
        runtime = Runtime(seed, capture, autotune_matmul, precision, checkpoint, progress)
        if runtime.checkpoint_file is not None and processes.rank == 0:
            check_writable(runtime.checkpoint_file)
        _move_to_device(model, guide, device)
        schema = schema_of(model) or TableSchema.of(x)
        if x_val is not None:
            x_val = as_matrix(x_val, name="x_val", schema=schema)
        x, mask = as_data_and_mask(x, mask, model=model, guide=guide, allow_empty_rows=True)
        if mask is not None and not bool(mask.any()):
            check_rows_observed(mask)
        if epoch_transform is None:
            check_support(model, x, mask)
        refresh = epoch_transform is not None
        schedule = Schedule.of(
            len(x), batch_size, epochs, steps, refresh=refresh, drop_last=drop_last
        )
        optimization = Optimization(objective, lr, optimizer, scheduler, grad_clip, warmup)
        stopping = Stopping(x_val, patience)
        if x_val is not None:
            _check_validation(model, guide, x_val)
        weighted = WeightedObjective(ELBO() if objective is None else objective, warmup)
    with _training_context(model, guide, processes.common_seed(seed)):
        with processes.together():
            minibatch = MinibatchObjective(
                model, guide, weighted, x, mask, precision, epoch_transform
            )
            named = _check_parameters(minibatch, schedule)
        trainer = _build_trainer(
            minibatch, named, schedule, optimization, stopping, runtime, processes
        )
        with progress_bar(schedule.num_steps, progress) as report_progress:
            trainer.run(report_progress)
    learn_schema(model, schema)
    learn_schema(guide, schema)
    result = trainer.result()
    return replace(result, notes=result.notes + _empty_rows_note(mask))


def _empty_rows_note(mask: Tensor | None) -> tuple[str, ...]:
    if mask is None or not (number := int((~mask.any(1)).sum())):
        return ()
    return (
        f"{counted(number, 'row')} with nothing observed took part: the bound of such a row is "
        "minus the KL of q(z | x) from p(z), at most zero, and counts in averages per datum",
    )


def _build_trainer(
    minibatch: MinibatchObjective,
    named: dict[str, Tensor],
    schedule: Schedule,
    optimization: Optimization,
    stopping: Stopping,
    runtime: Runtime,
    processes: Processes,
) -> Trainer:
    modules = modules_of(minibatch.model, minibatch.guide)
    with processes.together():
        optimizer_step = OptimizerStep(named, modules, optimization, schedule.steps_per_epoch)
        optimizer_step.use_scheduler(optimization.scheduler, schedule.num_steps)
    if processes.size > 1:
        x_val = stopping.x_val
        processes.agree(
            "fit_svi",
            **fit_fingerprint(minibatch, optimizer_step, schedule, None, runtime.seed)
            | {"x_val": None if x_val is None else describe_tensor(x_val)},
            steps=schedule.num_steps,
            patience=stopping.patience,
            capture=runtime.capture,
            checkpoint=runtime.checkpoint is not None,
        )
        processes.replicate(optimizer_step.state)
    make_captured = partial(
        CapturedSteps, minibatch, optimizer_step, named, autotune_matmul=runtime.autotune_matmul
    )
    return Trainer(
        minibatch,
        optimizer_step,
        schedule,
        EarlyStopping(stopping.patience),
        CapturePolicy(runtime.capture, make_captured, schedule, shared=processes.size > 1),
        stopping.x_val,
        runtime.checkpoint_file,
        runtime.seed,
        processes,
    )


def _check_parameters(minibatch: MinibatchObjective, schedule: Schedule) -> dict[str, Tensor]:
    """The parameters of the pair by name, after the checks that need a first batch."""
    model, guide, x, mask = minibatch.model, minibatch.guide, minibatch.x, minibatch.mask
    rows = torch.arange(schedule.batch_size, device=x.device)
    check_automatic_batch(guide, Batch(x, mask).rows(rows))
    with _hint_at_index(schedule.batch_size < len(x)):
        named = find_parameters(model, guide, lambda: minibatch.value(rows, schedule.num_steps))
    if minibatch.objective.is_ours and schedule.batch_size < len(x):
        check_lookup(model, guide, named, x, mask, schedule.batch_size)
    return named


@contextmanager
def _training_context(model: ProgramLike, guide: ProgramLike, seed: int | None) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(seeded(seed))
        stack.enter_context(isolated_store())
        stack.enter_context(train_mode(model, guide, training=True))
        # Pyro warns at every step about parameters that the user has frozen on purpose.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*requires_grad=False.*", category=UserWarning)
        yield


def _move_to_device(model: ProgramLike, guide: ProgramLike, device: str | torch.device) -> None:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(device)!r} is not available; use device='auto' or 'cpu'"
        ) from error
    for module in modules_of(model, guide):
        module.to(device)


def _check_validation(model: ProgramLike, guide: ProgramLike, x_val: ArrayLike) -> None:
    owner = bound_object(guide)
    if callable(getattr(owner, "tables", None)):
        raise ValueError(
            f"x_val needs a guide that computes q from x; this {type(owner).__name__} has one q "
            f"per datum for {getattr(owner, 'num_data', None)} training rows and none for others. "
            "Use an AmortizedGuide"
        )
    rows, mask = as_data_and_mask(x_val, model=model, guide=guide, name="x_val")
    if is_per_datum(guide, Batch(rows, mask)):
        raise ValueError(
            f"x_val needs a guide that computes q from x; {type(automatic_guide(guide)).__name__} "
            "has one q per datum for the training rows and none for others. Use an AmortizedGuide"
        )
    try:
        check_support(model, rows, mask)
    except ValueError as error:
        raise ValueError(f"x_val: {error}") from error


@contextmanager
def _hint_at_index(in_minibatches: bool) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if in_minibatches and "Shape mismatch inside plate" in str(error):
            error.add_note(
                "In minibatches a parameter with a row per datum must be read by the keyword "
                "index, as loc[index]."
            )
        raise
