"""Stochastic variational inference for any pair."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae.capture.background import can_compile_in_background
from ppl_vae.core.arrays.inputs import learn_schema, schema_of
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.autoguides import automatic_guide, check_automatic_batch, is_per_datum
from ppl_vae.core.files import check_writable
from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.introspection import bound_object
from ppl_vae.core.pair import Pair
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.core.validation import ArrayLike, as_matrix, check_rows_observed
from ppl_vae.data.sources.observed_rows import closed_after_use, observe_rows, open_source
from ppl_vae.data.sources.row_blocks import RowSource
from ppl_vae.data.sources.row_sources import row_source
from ppl_vae.data.sources.row_stream import Rows, RowStream
from ppl_vae.inference.svi.batches.embedding_lookup import check_lookup
from ppl_vae.inference.svi.batches.minibatch import (
    EpochTransform,
    MinibatchObjective,
    WeightedObjective,
)
from ppl_vae.inference.svi.batches.row_schedule import empty_rows_kept_note, schedule_of
from ppl_vae.inference.svi.batches.schedule import Schedule
from ppl_vae.inference.svi.checkpoints.fingerprint import fit_fingerprint
from ppl_vae.inference.svi.early_stopping import EarlyStopping
from ppl_vae.inference.svi.parameters import find_parameters
from ppl_vae.inference.svi.placement import move_to_device, names_device_mix
from ppl_vae.inference.svi.progress import ProgressCallback, progress_bar
from ppl_vae.inference.svi.settings import (
    Optimization,
    OptimizerFactory,
    Runtime,
    SchedulerFactory,
    Stopping,
)
from ppl_vae.inference.svi.steps.capture_policy import StepPolicy
from ppl_vae.inference.svi.steps.captured_step import CapturedSteps
from ppl_vae.inference.svi.steps.optimizer_step import OptimizerStep
from ppl_vae.inference.svi.steps.recorded_gradient import RecordedGradient
from ppl_vae.inference.svi.trainer import Trainer
from ppl_vae.objectives.bounds import ELBO


def fit_svi(
    model: ProgramLike,
    guide: ProgramLike,
    x: RowSource,
    *,
    x_val: RowSource | None = None,
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
        x: data, (N, D); NaN marks a missing value if the model takes ``mask``. A memory map,
            Parquet files, a list of blocks, a ``Dataset`` or a ``DataLoader`` of torch
            (:func:`~ppl_vae.data.sources.row_sources.row_source`) may be larger than memory: it is
            read in blocks, of which a few are in memory, and shuffled by blocks and within them. A
            source of at most 2^26 numbers is loaded. Labels are not used.
        x_val: validation rows, which are neither in x nor test rows. Their ELBO (beta = 1) is
            evaluated once per epoch, at most every 25 steps, and the best state is restored at
            the end.
        mask: True where x is observed.
        objective: by default ``ELBO()``; ``IWAE(...)``, or an ELBO of Pyro.
        lr: learning rate. A row of a per-datum parameter (:class:`~ppl_vae.PerDatumGuide`) is
            updated only when it is drawn, once in N / batch_size steps; unless the optimizer is
            SGD, its updates are multiplied by N / batch_size, at most by ten.
        optimizer: a callable of (parameters, lr). torch's classes ``Adam``, ``AdamW`` and ``SGD``
            are made with ``fused=True`` where the device has it.
        scheduler: a callable of (optimizer, number of steps) or of (optimizer), stepped after
            every step, e.g. ``torch.optim.lr_scheduler.CosineAnnealingLR``.
        epochs, steps: the length of the fit; exactly one of them.
        batch_size: rows per step, by default all, or those of the DataLoader. The rows that remain
            at the end of an epoch form a smaller batch; a single one joins the batch before it,
            since batch normalisation needs two.
        drop_last: leave those rows out instead, so that all batches have ``batch_size`` rows. The
            order is new in each epoch, so different rows are left out each time;
            ``FitResult.notes`` counts the rows that were in no batch at all.
        patience: stop after this number of evaluations of ``x_val`` without improvement.
        grad_clip: largest norm of the gradient.
        warmup: steps during which the weight of the KL rises from zero to the objective's beta.
        epoch_transform: for rows in memory, a callable of (x, generator) that computes the data of
            each epoch, such as :func:`ppl_vae.data.grey_values.binarize`; x has zeros in place of
            missing values. It must draw from the generator only, so that a fit can be repeated and
            resumed. It is not applied to ``x_val``.
        device: where to fit. The modules of the pair are moved there. ``"auto"`` is the
            accelerator of the pair's parameters, or else ``torch.accelerator``'s current one, of
            any kind with float64, or else the CPU.
        seed: the seed of data order and draws; global generators are left unchanged.
        capture: how steps run: False, eagerly, by Pyro's handlers; ``"recorded"``, by the tensor
            operations that were recorded in the second step, which are those of an eager step;
            True, from the second step on by code that is compiled from such a recording, several
            steps per call. ``"auto"`` begins eagerly and takes what is worth its time for the
            remaining steps: recording takes about a second; on a CPU another process compiles
            while recorded steps go on, and its code takes over when it is ready. A step that
            cannot be recorded runs eagerly, with a warning; ``FitResult.execution`` states what
            was done and why. Recorded steps give the numbers of eager ones (with an objective of
            Pyro's, up to rounding); on a CPU those of compiled steps differ in the last digits.
        autotune_matmul: whether compiled steps on a CPU use the faster of two BLAS libraries for
            each matrix product, by timing; results may then differ in the last digits from run
            to run.
        precision: the precision of float32 matrix products and convolutions in the steps, but not
            in evaluations of ``x_val``: ``"float32"``; ``"tf32"`` on a GPU of NVIDIA's;
            ``"bf16"``, whose gradients are noisier. See :func:`ppl_vae.core.state.precision`.
        checkpoint: a file that is written once per epoch (at most every 25 steps, and at least
            every 1,000), and from which the fit resumes if it exists; a resumed fit is identical
            bit for bit on a CPU. Only the same fit resumes: data, masks, networks, objective,
            optimizer and its settings, scheduler, seed, precision and batches are compared, and
            what differs is named in an error. The number of steps may be larger, and patience,
            device and ``capture`` may be others.
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
    with ExitStack() as stack:
        with processes.together():
            runtime = Runtime(seed, capture, autotune_matmul, precision, checkpoint, progress)
            if (resumable := runtime.checkpoint_file is not None) and processes.rank == 0:
                check_writable(runtime.checkpoint_file)
            move_to_device(model, guide, device)
            source = open_source(x, mask, model=model, guide=guide)
            schema = schema_of(model) or (TableSchema.of(x) if source is None else source.schema)
            validation_rows = _validation_rows(model, guide, x_val, schema)
            rows = observe_rows(
                x, mask, model=model, guide=guide, source=source, allow_empty_rows=True,
                check=epoch_transform is None, with_digest=resumable,
            )  # fmt: skip
            if isinstance(rows, RowStream):
                stack.enter_context(rows)
            elif rows.mask is not None and not bool(rows.mask.any()):
                check_rows_observed(rows.mask)
            schedule = schedule_of(
                rows, source, batch_size, epochs, steps,
                refresh=epoch_transform is not None, drop_last=drop_last, resumable=resumable,
            )  # fmt: skip
            optimization = Optimization(objective, lr, optimizer, scheduler, grad_clip, warmup)
            stopping = Stopping(stack.enter_context(validation_rows), patience)
            weighted = WeightedObjective(ELBO() if objective is None else objective, warmup)
        pair = Pair(model, guide)
        stack.enter_context(_training_context(pair, processes.common_seed(seed)))
        trainer = _build_trainer(
            partial(MinibatchObjective.of, pair, weighted, rows),
            epoch_transform, schedule, optimization, stopping, runtime, processes,
        )  # fmt: skip
        with closing(trainer.policy), progress_bar(schedule.num_steps, progress) as report:
            trainer.run(report)
        result = trainer.result()
    learn_schema(model, schema)
    learn_schema(guide, schema)
    notes = () if source is None else source.notes()
    return replace(result, notes=result.notes + empty_rows_kept_note(rows) + notes)


def _build_trainer(
    make_minibatch: Callable[..., MinibatchObjective],
    epoch_transform: EpochTransform | None,
    schedule: Schedule,
    optimization: Optimization,
    stopping: Stopping,
    runtime: Runtime,
    processes: Processes,
) -> Trainer:
    with processes.together():
        minibatch = make_minibatch(runtime.precision, epoch_transform)
        named = _check_parameters(minibatch, schedule)
        modules = minibatch.pair.modules
        optimizer_step = OptimizerStep(named, modules, optimization, schedule.steps_per_epoch)
        optimizer_step.use_scheduler(optimization.scheduler, schedule.num_steps)
    if processes.size > 1:
        _agree(minibatch, optimizer_step, schedule, stopping, runtime, processes)
        processes.replicate(optimizer_step.state)
    make_compiled = partial(
        CapturedSteps, minibatch, optimizer_step, named, autotune_matmul=runtime.autotune_matmul
    )
    policy = StepPolicy(
        runtime.capture,
        partial(RecordedGradient, minibatch, named),
        make_compiled,
        schedule,
        distributed=processes.size > 1,
        in_background=_can_compile_in_background(minibatch, runtime, processes),
    )
    return Trainer(
        minibatch,
        optimizer_step,
        schedule,
        EarlyStopping(stopping.patience),
        policy,
        stopping.x_val,
        runtime.checkpoint_file,
        runtime.seed,
        processes,
    )


def _can_compile_in_background(
    minibatch: MinibatchObjective, runtime: Runtime, processes: Processes
) -> bool:
    alone = processes.size == 1 and not runtime.autotune_matmul
    return alone and can_compile_in_background(minibatch.whole.device)


def _agree(
    minibatch: MinibatchObjective,
    optimizer_step: OptimizerStep,
    schedule: Schedule,
    stopping: Stopping,
    runtime: Runtime,
    processes: Processes,
) -> None:
    """Check that all processes make the same fit.

    Raises:
        ValueError: naming the rank and the argument that differ.
    """
    processes.agree(
        "fit_svi",
        **fit_fingerprint(minibatch, optimizer_step, schedule, stopping.x_val, runtime.seed),
        steps=schedule.num_steps,
        patience=stopping.patience,
        capture=runtime.capture,
        checkpoint=runtime.checkpoint is not None,
    )


def _check_parameters(minibatch: MinibatchObjective, schedule: Schedule) -> dict[str, Tensor]:
    """The parameters of the pair by name, after the checks that need a first batch."""
    pair, whole = minibatch.pair, minibatch.whole
    rows = torch.arange(schedule.batch_size, device=whole.device)
    check_automatic_batch(pair.guide, whole.rows(rows))
    in_minibatches = schedule.batch_size < len(whole)
    with _hint_at_index(in_minibatches), names_device_mix(pair, whole.rows(rows)):
        named = find_parameters(pair, lambda: minibatch.value(rows, schedule.num_steps))
    if minibatch.objective.is_ours and in_minibatches:
        check_lookup(pair, named, whole, schedule.batch_size)
    return named


@contextmanager
def _training_context(pair: Pair, seed: int | None) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(seeded(seed))
        stack.enter_context(isolated_store())
        stack.enter_context(pair.train_mode(True))
        # Pyro warns at every step about parameters that the user has frozen on purpose.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*requires_grad=False.*", category=UserWarning)
        yield


@contextmanager
def _validation_rows(
    model: ProgramLike, guide: ProgramLike, x_val: Any, schema: TableSchema | None
) -> Iterator[Rows | None]:
    """The rows of ``x_val`` for a pair, after the checks of both; None without them."""
    if x_val is None:
        yield None
        return
    owner = bound_object(guide)
    if callable(getattr(owner, "tables", None)):
        raise ValueError(
            f"x_val needs a guide that computes q from x; this {type(owner).__name__} has one q "
            f"per datum for {getattr(owner, 'num_data', None)} training rows and none for others. "
            "Use an AmortizedGuide"
        )
    source = row_source(x_val, schema=schema, name="x_val")
    x_val = as_matrix(x_val, name="x_val", schema=schema) if source is None else source
    observed = observe_rows(x_val, model=model, guide=guide, name="x_val")
    with closed_after_use(observed, x_val) as rows:
        some = rows.first_rows() if isinstance(rows, RowStream) else rows
        if is_per_datum(guide, some):
            kind = type(automatic_guide(guide)).__name__
            raise ValueError(
                f"x_val needs a guide that computes q from x; {kind} has one q per datum for the "
                "training rows and none for others. Use an AmortizedGuide"
            )
        yield rows


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
