"""The checkpoint file of one fit: what it writes, and what it accepts to resume from."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ppl_vae.core.errors import CheckpointError
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.data.sources.row_stream import Rows
from ppl_vae.inference.svi.batches.minibatch import MinibatchObjective
from ppl_vae.inference.svi.batches.schedule import Schedule
from ppl_vae.inference.svi.checkpoints.checkpoint import (
    damaged,
    generator_states,
    last_regular_content,
    read_checkpoint,
    read_stored,
    set_generator_states,
    write_checkpoint,
)
from ppl_vae.inference.svi.checkpoints.checkpoint_layout import FitLayout
from ppl_vae.inference.svi.checkpoints.fingerprint import fit_fingerprint
from ppl_vae.inference.svi.early_stopping import Snapshot
from ppl_vae.inference.svi.steps.optimizer_step import OptimizerStep


class CheckpointFile:
    """A file of checkpoints of one fit.

    Args:
        path: the file.
        processes: that share the fit.
        minibatch, optimizer_step, schedule, x_val, seed: the fit, see
            :func:`ppl_vae.inference.svi.checkpoints.fingerprint.fit_fingerprint`.
    """

    def __init__(
        self,
        path: Path,
        processes: Processes,
        minibatch: MinibatchObjective,
        optimizer_step: OptimizerStep,
        schedule: Schedule,
        x_val: Rows | None,
        seed: int | None,
    ) -> None:
        self.path, self.device, self.processes = path, minibatch.x.device, processes
        self._optimizer_step, self._has_validation = optimizer_step, x_val is not None
        self.num_steps = schedule.num_steps
        self.fingerprint = fit_fingerprint(minibatch, optimizer_step, schedule, x_val, seed)

    def read(self) -> dict[str, Any] | None:
        """The content of the file, which rank 0 reads; None if there is no file.

        Raises:
            CheckpointError: if the file is damaged, or of another fit.
        """
        with self.processes.together():
            stored = read_stored(self.path) if self.processes.rank == 0 else b""
        return self._parsed(self.processes.broadcast_bytes(stored))

    def _parsed(self, stored: bytes) -> dict[str, Any] | None:
        if not stored:
            return None
        return read_checkpoint(self.path, stored, self.fingerprint, self._layout)

    @cached_property
    def _layout(self) -> FitLayout:
        step = self._optimizer_step
        return FitLayout(
            state=step.state,
            optimizer=step.state_after_trial(),
            num_groups=len(step.settings),
            has_scheduler=step.scheduler is not None,
            has_validation=self._has_validation,
        )

    def write(self, content: dict[str, Any], *, at_end: bool = False) -> None:
        """Replace the file; among several processes rank 0 does.

        Args:
            content: the state of the fit.
            at_end: whether the fit ended between two regular evaluations. The file then includes
                the content after the last regular one, from which a longer fit continues.
        """
        with self.processes.together():
            if self.processes.rank == 0:
                self._write(content, at_end)

    def _write(self, content: dict[str, Any], at_end: bool) -> None:
        before = self._parsed(read_stored(self.path)) if at_end else None
        write_checkpoint(
            self.path,
            content
            | {
                "fingerprint": self.fingerprint,
                "num_steps": self.num_steps,
                "at_end": at_end,
                "before_end": None if before is None else last_regular_content(before),
                "generators": generator_states(self.device),
            },
        )

    @contextmanager
    def restored_on_failure(self, snapshot: Snapshot) -> Iterator[None]:
        """Context manager: an error in what restores a file's content is one of that file.

        The tensors of the snapshot and the generators are then as they were.
        """
        generators = generator_states(self.device)
        try:
            yield
        except Exception as error:  # of any part that restores what a file holds
            snapshot.restore()
            set_generator_states(generators, self.device)
            if isinstance(error, CheckpointError):
                raise
            raise damaged(self.path, f"its content cannot be restored: {error}") from error

    def restore(self, content: dict[str, Any], num_steps: int) -> None:
        """Restore the optimizer, the scheduler, the tensors of the pair and the generators.

        Args:
            content: the content of a checkpoint.
            num_steps: the number of steps of the fit that wrote it.

        Raises:
            CheckpointError: if it was written under another scheduler.
        """
        same_length = num_steps == self.num_steps
        difference = self._optimizer_step.resume(content, same_length=same_length)
        if difference:
            reason = f"its scheduler is another one: {difference}"
            if not same_length:
                reason = (
                    f"its schedule is of {num_steps} steps, here it is of {self.num_steps}, with "
                    f"which {difference}. A fit can be continued for longer with a scheduler of "
                    "(optimizer) alone, or without one"
                )
            raise CheckpointError(
                f"checkpoint {self.path} is of another fit: {reason}. Pass another checkpoint=, "
                "or delete it to start again"
            )
        with torch.no_grad():
            for tensor, value in zip(self._optimizer_step.state, content["state"], strict=True):
                tensor.copy_(value)
        set_generator_states(content["generators"], self.device)
