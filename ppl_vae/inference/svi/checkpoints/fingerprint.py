"""What identifies a fit: a checkpoint is resumed only if all of it is the same."""

from typing import Any

from ppl_vae.core.arrays.digest import tensor_digest
from ppl_vae.core.description import describe_callable, describe_modules, describe_program
from ppl_vae.data.sources.row_stream import Rows, describe_rows
from ppl_vae.inference.svi.batches.minibatch import MinibatchObjective
from ppl_vae.inference.svi.batches.schedule import Schedule
from ppl_vae.inference.svi.steps.optimizer_step import OptimizerStep


def fit_fingerprint(
    minibatch: MinibatchObjective,
    optimizer_step: OptimizerStep,
    schedule: Schedule,
    x_val: Rows | None,
    seed: int | None,
) -> dict[str, str]:
    """What must be equal in a fit that resumes from a checkpoint, by name, as texts.

    Not included is what may change: the number of steps, the patience of early stopping, the
    device, whether steps are compiled; and the scheduler, whose learning rates are compared step
    by step.
    """
    pair, transform = minibatch.pair, minibatch.epoch_transform
    modules = pair.modules
    trained = {id(tensor) for tensor in optimizer_step.state}
    constant = [p for part in modules for p in part.parameters() if id(p) not in trained]
    x, mask = minibatch.descriptions()
    x_val_digest, x_val_mask = (None, None) if x_val is None else describe_rows(x_val)
    order = {} if schedule.order is None else {"order": repr(schedule.order)}
    state = [f"{list(t.shape)} {t.dtype}" for t in optimizer_step.state]
    found: dict[str, Any] = {
        "model": ", ".join(state).replace("torch.", ""),
        "optimizer": type(optimizer_step.optimizer).__name__,
        "objective": repr(minibatch.objective),
        "epoch_transform": None if transform is None else describe_callable(transform),
        "lr": optimizer_step.lr,
        "grad_clip": optimizer_step.grad_clip,
        "scheduler": None if optimizer_step.scheduler is None else "given",
        "precision": minibatch.precision,
        "schedule": [schedule.num_data, schedule.batch_size, schedule.drop_last],
        "seed": seed,
        **_describe_settings(optimizer_step),
        **{f"network {k}": v for k, v in describe_modules(modules).items()},
        "model's program": describe_program(pair.model),
        "guide's program": describe_program(pair.guide),
        "frozen parameters": tensor_digest(constant)[:16] if constant else None,
        "x": x,
        "mask": mask,
        **order,
        "x_val": x_val_digest,
        "mask of x_val": x_val_mask,
    }
    return {name: str(value) for name, value in found.items()}


def _describe_settings(optimizer_step: OptimizerStep) -> dict[str, str]:
    return {
        f"optimizer's {name}" + (f" of group {number}" if number else ""): repr(value)
        for number, settings in enumerate(optimizer_step.settings)
        for name, value in settings.items()
    }
