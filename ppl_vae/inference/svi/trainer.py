"""The training loop of SVI: steps, validation, checkpoints and stopping."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae.capture.graph import CaptureError
from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.processes.ranks import SINGLE, Processes
from ppl_vae.core.state import validation
from ppl_vae.data.sources.row_stream import Rows
from ppl_vae.inference.svi.batches.minibatch import FINITE, MinibatchObjective
from ppl_vae.inference.svi.batches.schedule import Schedule, epoch_generator
from ppl_vae.inference.svi.checkpoints.checkpoint import resumable_content
from ppl_vae.inference.svi.checkpoints.checkpoint_file import CheckpointFile
from ppl_vae.inference.svi.data_statistics import frozen_scale, set_data_statistics, unfreeze
from ppl_vae.inference.svi.early_stopping import EarlyStopping, Snapshot
from ppl_vae.inference.svi.notes import fit_notes
from ppl_vae.inference.svi.progress import ProgressCallback
from ppl_vae.inference.svi.steps.capture_policy import StepPolicy
from ppl_vae.inference.svi.steps.optimizer_step import OptimizerStep
from ppl_vae.inference.svi.steps.step_runner import StepRunner
from ppl_vae.objectives.bounds import elbo

SNAPSHOT_INTERVAL = 100
"""Steps between copies of the state, the last of which is restored if the loss diverges."""
READ_INTERVAL = 50
"""Steps between readings of the objective on an accelerator, where a reading waits for the device;
on a CPU each step is read."""
CHECKPOINT_INTERVAL = 1000
"""Steps between checkpoints within a long epoch."""
VALIDATION_DRAWS, VALIDATION_SEED = 4, 0
"""Draws per datum of the validation ELBO, and their seed, the same in each evaluation."""
validation_elbo = partial(
    elbo, num_samples=VALIDATION_DRAWS, global_kl=False, seed=VALIDATION_SEED
)


class Trainer:
    """Runs steps until the end of the schedule, early stopping, or a loss that is not finite.

    Args:
        minibatch: the objective on minibatches.
        optimizer_step: the update of the parameters.
        schedule: the rows of each step.
        stopping: early stopping by validation values.
        policy: whether steps run eagerly, recorded or compiled.
        x_val: validation rows, or None.
        checkpoint: a file to write, and to resume from if it exists; or None.
        seed: the seed of the fit, by which a checkpoint is recognised.
        processes: that share each batch, and have the same data and parameters.

    Raises:
        CheckpointError: if the checkpoint is damaged, or of another fit; the pair is unchanged.
    """

    def __init__(
        self,
        minibatch: MinibatchObjective,
        optimizer_step: OptimizerStep,
        schedule: Schedule,
        stopping: EarlyStopping,
        policy: StepPolicy,
        x_val: Rows | None = None,
        checkpoint: Path | None = None,
        seed: int | None = None,
        processes: Processes = SINGLE,
    ) -> None:
        self.start_time = time.perf_counter()
        self.minibatch, self.optimizer_step = minibatch, optimizer_step
        self.schedule, self.stopping, self.policy = schedule, stopping, policy
        self.x_val = x_val
        self.checkpoint, self.resumed, content = None, "", None
        if checkpoint is not None:
            self.checkpoint = CheckpointFile(
                checkpoint, processes, minibatch, optimizer_step, schedule, self.x_val, seed
            )
            content = self.checkpoint.read()
        unfreeze(minibatch.pair)
        self.order_seed = int(processes.broadcast(torch.randint(2**62, (1,))))
        self.runner = StepRunner(minibatch, optimizer_step, schedule, policy, processes)
        self.distributed = self.runner.distributed
        self.unread: list[Tensor] = []
        self.values: list[float] = []
        self.elapsed: list[float] = []
        self.stopped = ""
        self.epoch, self.written = -1, 0
        self.last_good = Snapshot(optimizer_step.state)
        if self.checkpoint is not None and content is not None:
            self._resume(self.checkpoint, content)

    @property
    def num_steps(self) -> int:
        """Steps made, including those whose objective has not been read yet."""
        return len(self.values) + len(self.unread)

    def run(self, progress: ProgressCallback) -> None:
        """Train from the current state to the end."""
        if self.checkpoint is not None and not self.resumed:
            self.checkpoint.write(self._content())
        if not self.values:
            self._validate()
        self.distributed.seed_own_draws(self.order_seed, len(self.values))
        with validation(False):
            for chunk in self._chunks():
                if self.stopped:
                    break
                self._begin_epoch()
                if not self._run_compiled(chunk):
                    for rows in chunk:
                        self._run_step(rows)
                self._after_chunk(progress)
                elapsed = self.elapsed
                if self.policy.mode == "auto":  # which all processes must decide alike
                    elapsed = self.distributed.of_rank_zero(elapsed)
                if not self._has_other_size(chunk[-1]):
                    self.policy.observe(self.num_steps, elapsed, chunk[-1])
        self._finish()

    def _finish(self) -> None:
        finite = [tensor.isfinite().all() for tensor in self.optimizer_step.parameters]
        if not bool(torch.stack(finite).all()):
            self._fail(len(self.values), None)
        self.stopped = self.stopped or "all requested"
        if self.stopping.best is not None:
            self.stopping.best.restore()
        set_data_statistics(self.minibatch.pair, self.minibatch.whole)

    def _chunks(self) -> Iterator[list[Tensor | None]]:
        """Consecutive batches of one size that may run in one call.

        A chunk ends before an evaluation of validation rows and before a change of the data.
        """
        schedule, chunk = self.schedule, []
        step = len(self.values)
        for rows in self.minibatch.batches(schedule, self.order_seed, step):
            other_size = self._has_other_size(rows)
            if other_size and chunk:
                yield chunk
                chunk = []
            chunk.append(rows)
            step += 1
            ends = step % schedule.chunk == 0 or step == schedule.num_steps
            if other_size or ends or len(chunk) >= self.policy.unroll:
                yield chunk
                chunk = []

    def _has_other_size(self, rows: Tensor | None) -> bool:
        return rows is not None and len(rows) != self.schedule.batch_size

    def _begin_epoch(self) -> None:
        """Transform the data for a new epoch, or for the epoch in which a fit is resumed."""
        epoch = self.num_steps // self.schedule.steps_per_epoch
        if self.schedule.refresh and epoch != self.epoch:
            device = self.minibatch.x.device
            self.minibatch.refresh(epoch_generator(self.order_seed, epoch, device))
            self.epoch = epoch

    def _run_compiled(self, chunk: list[Tensor | None]) -> bool:
        """Make the steps in one call of compiled code; returns whether that was possible."""
        compiled = self.policy.compiled
        if compiled is None or len(chunk) != compiled.unroll:
            return False
        if any(self._has_other_size(rows) for rows in chunk):
            return False
        try:
            values = compiled.run_steps(chunk, self.num_steps)
        except CaptureError as error:
            self.policy.disable(error)
            return False
        if values.device.type == "cpu" and not values.isfinite().all():
            return False  # nothing was updated: eager steps will find the one that diverges
        self.policy.num_run += len(chunk)
        self.unread += values.unbind()
        if self._is_time_to_read(values):
            self._read_values()
        return True

    def _run_step(self, rows: Tensor | None) -> None:
        """Make one step, recorded or eagerly."""
        value = self.runner.evaluate(rows, self.num_steps + 1)
        if value is None:
            self._read_values(rows)  # a step before may have been the first that failed
            self._fail(self.num_steps + 1, rows)
            return
        self.unread.append(value)
        if self._is_time_to_read(value):
            self._read_values(rows)
        self.runner.update()

    def _is_time_to_read(self, value: Tensor) -> bool:
        return value.device.type == "cpu" or len(self.unread) >= READ_INTERVAL

    def _read_values(self, rows: Tensor | None = None) -> None:
        """Read the objective of the last steps, and check that it is finite."""
        if not self.unread:
            return
        values, self.unread = torch.stack(self.unread).cpu(), []
        if not values.isfinite().all():
            first = int((~values.isfinite()).nonzero()[0])
            self._fail(len(self.values) + first + 1, rows, is_late=len(values) > 1)
        self.values += values.tolist()
        self.elapsed += [time.perf_counter() - self.start_time] * len(values)
        if len(self.values) % SNAPSHOT_INTERVAL < len(values):
            self.last_good = Snapshot(self.optimizer_step.state)

    def _fail(self, step: int, rows: Tensor | None, *, is_late: bool = False) -> None:
        # Parameters of later steps are NaN, and say less than those before the step that failed.
        site = self.runner.find_nonfinite_site(rows)
        self.last_good.restore()
        if is_late and (before := self.runner.find_nonfinite_site(rows)) != FINITE:
            site = before
        raise FloatingPointError(
            f"the loss is not finite at step {step}: {site}. The last good state is restored; "
            "try a smaller lr, grad_clip=, or data on a smaller scale"
        )

    def _after_chunk(self, progress: ProgressCallback) -> None:
        step = self.num_steps
        at_end = step % self.schedule.validation_interval > 0
        if at_end and step < self.schedule.num_steps:
            self._checkpoint_within_epoch(step)
            return
        self._read_values()
        progress(step, self.values[-1])
        self._validate()
        if self.checkpoint is not None:
            self._write_checkpoint(self.checkpoint, step, at_end=at_end)
        self.distributed.check_same_parameters(step)
        self.distributed.seed_own_draws(self.order_seed, step)

    def _checkpoint_within_epoch(self, step: int) -> None:
        if self.checkpoint is None or step - self.written < CHECKPOINT_INTERVAL:
            return
        self._read_values()
        self._write_checkpoint(self.checkpoint, step)

    def _write_checkpoint(self, file: CheckpointFile, step: int, *, at_end: bool = False) -> None:
        file.write(self._content(), at_end=at_end)
        self.distributed.seed_own_draws(self.order_seed, step)
        self.written = step

    def _validate(self) -> None:
        if self.x_val is None:
            return
        pair, step = self.minibatch.pair, len(self.values)
        try:
            with frozen_scale(pair, self.minibatch.whole):
                values = validation_elbo(pair.model, pair.guide, self.x_val)
        except ValueError as error:
            raise ValueError(f"x_val: {error}") from error
        except FloatingPointError as error:
            self.last_good.restore()
            raise FloatingPointError(
                f"x_val after step {step}: {error}. The last good state is restored; try a "
                "smaller lr, grad_clip=, or data on a smaller scale"
            ) from error
        mean = float(values.double().mean())
        if self.stopping.update(step, mean, self.optimizer_step.state):
            self.stopped = (
                f"early at step {step}: validation ELBO did not improve for "
                f"{self.stopping.num_without_improvement} evaluations"
            )

    def _content(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        scheduler, stopping = self.optimizer_step.scheduler, self.stopping
        return {
            "past_rates": self.optimizer_step.past_rates,
            "state": [tensor.detach() for tensor in self.optimizer_step.state],
            "optimizer": self.optimizer_step.optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "order_seed": self.order_seed,
            "values": self.values,
            "elapsed": self.elapsed,
            "stopped": self.stopped,
            "capture": self.policy.content,
            "best": None if stopping.best is None else stopping.best.values,
            "validation": [stopping.values, stopping.steps, stopping.num_without_improvement],
        }

    def _resume(self, file: CheckpointFile, content: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        with file.restored_on_failure(self.last_good):
            num_steps = content["num_steps"]
            content = resumable_content(content, self.schedule.num_steps, file.path)
            file.restore(content, num_steps)
            self._resume_history(content)
        self.last_good = Snapshot(self.optimizer_step.state)
        self.written = len(self.values)
        self.resumed = f"resumed from {file.path} after {len(self.values)} steps"

    def _resume_history(self, content: dict[str, Any]) -> None:
        self.order_seed = content["order_seed"]
        self.values, self.elapsed = content["values"], content["elapsed"]
        # A new decision between eager and compiled steps could differ from the first one.
        if self.values:
            self.policy.resume(*content["capture"])
            self.start_time -= self.elapsed[-1]
        stopping = self.stopping
        stopping.values, stopping.steps, stopping.num_without_improvement = content["validation"]
        self.stopped = content["stopped"] if stopping.should_stop else ""
        if content["best"] is not None:
            stopping.best = Snapshot(self.optimizer_step.state)
            stopping.best.values = content["best"]

    def result(self) -> FitResult:
        """The result of the fit."""
        values, steps = self.stopping.values, self.stopping.steps
        return FitResult(
            algorithm="SVI",
            objective=torch.tensor(self.values, dtype=torch.float64),
            elapsed=torch.tensor(self.elapsed, dtype=torch.float64),
            steps=len(self.values),
            seconds=time.perf_counter() - self.start_time,
            stopped=self.stopped,
            validation=torch.tensor(values, dtype=torch.float64) if values else None,
            validation_steps=torch.tensor(steps) if values else None,
            restored=self.stopping.num_without_improvement > 0,
            execution=self.policy.execution,
            notes=fit_notes(self.minibatch, self.schedule, self.order_seed, self.resumed),
        )
