"""The loop around the steps of SVI: reading values, validation, checkpoints, stopping."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae.capture.graph import CaptureError
from ppl_vae.core.program import as_data_and_mask, notes_of, notes_on
from ppl_vae.core.results import FitResult
from ppl_vae.core.state import validation
from ppl_vae.core.validation import ArrayLike
from ppl_vae.inference.svi.calibration import calibrate, frozen, unfreeze
from ppl_vae.inference.svi.capture_policy import CapturePolicy
from ppl_vae.inference.svi.checkpoint import (
    generator_states,
    place_to_go_on,
    read_checkpoint,
    set_generator_states,
    write_checkpoint,
)
from ppl_vae.inference.svi.minibatch import MinibatchObjective, OptimizerStep
from ppl_vae.inference.svi.progress import Report
from ppl_vae.inference.svi.schedule import EarlyStopping, Schedule, Snapshot, epoch_generator
from ppl_vae.objectives.bounds import elbo

GOOD_STATE_EVERY = 100
READ_EVERY = {"cpu": 1, "cuda": 50}
"""Steps between readings of the objective: on a GPU a reading waits for the device."""
VALIDATION_DRAWS = 4
VALIDATION_SEED = 0


class Trainer:
    """Runs steps until the schedule's end, early stopping, or a loss that is not finite.

    Args:
        batch, update: the two halves of a step.
        schedule: which rows when.
        stopping: what to make of validation values.
        choice: of the path, eager or captured.
        x_val: validation rows, or None.
        checkpoint: a file to resume from if it is there, and to write; or None.
    """

    def __init__(
        self,
        batch: MinibatchObjective,
        update: OptimizerStep,
        schedule: Schedule,
        stopping: EarlyStopping,
        choice: CapturePolicy,
        x_val: ArrayLike | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.begun = time.perf_counter()
        self.batch, self.update, self.schedule, self.stopping = batch, update, schedule, stopping
        self.choice = choice
        self.x_val = None
        if x_val is not None:
            self.x_val = as_data_and_mask(
                x_val, model=batch.model, guide=batch.guide, name="x_val"
            )
        unfreeze(batch.model, batch.guide)
        self.order_seed = int(torch.randint(2**62, ()))
        self.pending: list[Tensor] = []
        self.values: list[float] = []
        self.elapsed: list[float] = []
        self.stopped = ""
        self.epoch = -1
        self.good = Snapshot(update.state)
        self.checkpoint = checkpoint
        if checkpoint is not None and checkpoint.exists():
            self._resume(read_checkpoint(checkpoint, self._fingerprint()), checkpoint)

    @property
    def done(self) -> int:
        """Steps, of which the last may not have been read."""
        return len(self.values) + len(self.pending)

    def run(self, report: Report) -> None:
        """Run from where the loop stands to the end."""
        if self.checkpoint is not None and not self.checkpoint.exists():
            write_checkpoint(self.checkpoint, self._content())
        if not self.values:
            self._look()
        with validation(False):
            for chunk in self._chunks():
                if self.stopped:
                    break
                self._begin_epoch()
                if not self._leap(chunk):
                    for rows in chunk:
                        self._step(rows)
                self._between_steps(report)
                self.choice.look(self.done, self.elapsed)
        if not all(tensor.isfinite().all() for tensor in self.update.parameters):
            self._fail(len(self.values), None)
        self.stopped = self.stopped or f"after {len(self.values)} steps, as asked"
        if self.stopping.best is not None:
            self.stopping.best.restore()
        calibrate(self.batch.model, self.batch.guide, self.batch.x, self.batch.mask)

    def _chunks(self) -> Iterator[list[Tensor | None]]:
        """Batches of one size that may go together: none across a look at validation rows, or
        across a change of the data.
        """
        schedule, chunk = self.schedule, []
        step = len(self.values)
        for rows in schedule.batches(self.order_seed, start=step, device=self.batch.x.device):
            odd = rows is not None and len(rows) != schedule.batch_size
            if odd and chunk:
                yield chunk
                chunk = []
            chunk.append(rows)
            step += 1
            ends = step % schedule.together == 0 or step == schedule.num_steps
            if odd or ends or len(chunk) >= self.choice.unroll:
                yield chunk
                chunk = []

    def _begin_epoch(self) -> None:
        """Data of its own for an epoch that begins, or that a resumed fit goes on with."""
        epoch = self.done // self.schedule.steps_per_epoch
        if self.schedule.anew and epoch != self.epoch:
            self.batch.refresh(epoch_generator(self.order_seed, epoch, self.batch.x.device))
            self.epoch = epoch

    def _leap(self, chunk: list[Tensor | None]) -> bool:
        """Whether the steps could be done in one call."""
        captured = self.choice.captured
        size = self.schedule.batch_size
        odd = any(rows is not None and len(rows) != size for rows in chunk)
        if captured is None or odd or len(chunk) != captured.unroll:
            return False
        try:
            values = captured.accelerate(chunk, self.done)
        except CaptureError as error:
            self.choice.refuse(error)
            return False
        if values.device.type == "cpu" and not values.isfinite().all():
            return False  # nothing was done: step by step, to find the one that does it
        self.pending += values.unbind()
        if len(self.pending) >= READ_EVERY.get(values.device.type, 1):
            self._read()
        return True

    def _step(self, rows: Tensor | None) -> None:
        step = self.done + 1
        try:
            with self.batch.rounding():
                value = self.batch.value(rows, step)
        except (RuntimeError, ValueError) as error:
            # A factorization can fail on parameters that are finite but far too large.
            factorization = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
            overflow = isinstance(error, factorization) and step > 1
            if not overflow and all(t.isfinite().all() for t in self.update.parameters):
                raise
            self._fail(step, rows)
            return
        self.pending.append(value.detach())
        if len(self.pending) >= READ_EVERY.get(value.device.type, 1):
            self._read(rows)
        with self.batch.rounding():
            self.update.apply(value, rows)

    def _read(self, rows: Tensor | None = None) -> None:
        if not self.pending:
            return
        values, self.pending = torch.stack(self.pending), []
        if not values.isfinite().all():
            first = int((~values.isfinite()).nonzero()[0])
            self._fail(len(self.values) + first + 1, rows)
        self.values += values.tolist()
        self.elapsed += [time.perf_counter() - self.begun] * len(values)
        if len(self.values) % GOOD_STATE_EVERY < len(values):
            self.good = Snapshot(self.update.state)

    def _fail(self, step: int, rows: Tensor | None) -> None:
        find_nonfinite_site = self.batch.find_nonfinite_site(rows)
        self.good.restore()
        raise FloatingPointError(
            f"the loss is not finite at step {step}: {find_nonfinite_site}. The last good state "
            "is restored; try a smaller lr, grad_clip=, or data on a smaller scale"
        )

    def _between_steps(self, report: Report) -> None:
        step = self.done
        at_its_end = step % self.schedule.check_every > 0
        if at_its_end and step < self.schedule.num_steps:
            return
        self._read()
        report(step, self.values[-1])
        self._look()
        if self.checkpoint is not None:
            write_checkpoint(self.checkpoint, self._content(at_its_end))

    def _look(self) -> None:
        if self.x_val is None:
            return
        x, mask = self.x_val
        pair, step = (self.batch.model, self.batch.guide), len(self.values)
        how = {"num_samples": VALIDATION_DRAWS, "seed": VALIDATION_SEED}
        with frozen(*pair, self.batch.x, self.batch.mask):
            values = elbo(*pair, x, mask=mask, **how)
        if self.stopping.look(step, float(values.double().mean()), self.update.state):
            waited = self.stopping.waited
            self.stopped = f"early at step {step}: x_val has not been better for {waited} looks"

    def _fingerprint(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "model": [list(tensor.shape) for tensor in self.update.state],
            "optimizer": type(self.update.optimizer).__name__,
            "objective": repr(self.batch.objective),
            "epoch_transform": self.batch.refresh_generator,
            "lr": self.update.lr,
            "grad_clip": self.update.grad_clip,
            "scheduler": None if self.update.scheduler is None else "given",
            "precision": self.batch.precision,
            "schedule": [schedule.num_data, schedule.batch_size, schedule.drop_last],
        }

    def _content(self, at_its_end: bool = False) -> dict[str, Any]:
        """What a fit goes on from; at an end without a regular look, that of the last one, too."""
        scheduler, best, before = self.update.scheduler, self.stopping.best, None
        if at_its_end and self.checkpoint is not None and self.checkpoint.exists():
            before = read_checkpoint(self.checkpoint, self._fingerprint())
        return {
            "fingerprint": self._fingerprint(),
            "num_steps": self.schedule.num_steps,
            "at_its_end": at_its_end,
            "before_its_end": before,
            "rates": self.update.rates,
            "state": [tensor.detach() for tensor in self.update.state],
            "optimizer": self.update.optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "generators": generator_states(self.batch.x.device),
            "order_seed": self.order_seed,
            "values": self.values,
            "elapsed": self.elapsed,
            "stopped": self.stopped,
            "captured": [self.choice.wanted, self.choice.why],
            "best": None if best is None else best.values,
            "looks": [self.stopping.values, self.stopping.steps, self.stopping.waited],
        }

    def _resume(self, content: dict[str, Any], path: Path) -> None:
        planned = content["num_steps"]
        content = place_to_go_on(content, self.schedule.num_steps, path)
        self._resume_update(content, planned, path)
        saved = Snapshot(self.update.state)
        saved.values = content["state"]
        saved.restore()
        self.order_seed = content["order_seed"]
        self.values, self.elapsed = content["values"], content["elapsed"]
        # The fit goes on as it was: a path chosen anew could be another.
        if self.values:
            self.choice.resume(*content["captured"])
            self.begun -= self.elapsed[-1]
        self.stopping.values, self.stopping.steps, self.stopping.waited = content["looks"]
        self.stopped = content["stopped"] if self.stopping.over else ""
        if content["best"] is not None:
            self.stopping.best = Snapshot(self.update.state)
            self.stopping.best.values = content["best"]
        self.good = Snapshot(self.update.state)
        set_generator_states(content["generators"], self.batch.x.device)

    def _resume_update(self, content: dict[str, Any], planned: int, path: Path) -> None:
        update, settings = self.update, None
        if update.scheduler is not None and planned != self.schedule.num_steps:
            # Its own state may depend on the number of steps, so it is not read from the file.
            settings = update.catch_up(content["rates"])
            if isinstance(settings, str):
                raise ValueError(
                    f"checkpoint {path} is of another fit: its schedule is of {planned} steps, "
                    f"here it is of {self.schedule.num_steps}, with which {settings}. A fit can "
                    "go on for longer with a scheduler of (optimizer) alone, or without one; give "
                    "another checkpoint=, or delete it to start anew"
                )
        update.optimizer.load_state_dict(content["optimizer"])
        if settings is not None:
            for group, setting in zip(update.optimizer.param_groups, settings, strict=True):
                group.update(setting)
        elif update.scheduler is not None:
            update.scheduler.load_state_dict(content["scheduler"])
        update.rates = content["rates"]

    def _notes(self) -> tuple[str, ...]:
        model, schedule = self.batch.model, self.schedule
        notes = notes_of(model, self.batch.guide) + notes_on(model, self.batch.x, self.batch.mask)
        if not (schedule.drop_last and schedule.left_over):
            return notes
        never = schedule.never_drawn(self.order_seed, self.batch.x.device)
        return (
            *notes,
            f"drop_last left {schedule.left_over} of {schedule.num_data} rows out of each epoch, "
            f"other ones in each; {never} were in no batch at all",
        )

    def result(self) -> FitResult:
        """What the fit gave."""
        looked = self.stopping.values
        return FitResult(
            algorithm="SVI",
            objective=torch.tensor(self.values, dtype=torch.float64),
            elapsed=torch.tensor(self.elapsed, dtype=torch.float64),
            steps=len(self.values),
            seconds=time.perf_counter() - self.begun,
            stopped=self.stopped,
            validation=torch.tensor(looked, dtype=torch.float64) if looked else None,
            validation_steps=torch.tensor(self.stopping.steps) if looked else None,
            restored=self.stopping.waited > 0,
            path=self.choice.why,
            notes=self._notes(),
        )
