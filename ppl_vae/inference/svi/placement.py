"""The device of a fit: where the pair is moved to, and what stays behind."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ppl_vae.core.batch import Batch
from ppl_vae.core.devices.accelerators import automatic_device, available_device
from ppl_vae.core.devices.device_mix import is_device_mix
from ppl_vae.core.introspection import modules_of, tensors_of
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike


def move_to_device(model: ProgramLike, guide: ProgramLike, device: str | torch.device) -> None:
    """Move the modules of a pair.

    Args:
        model, guide: the pair.
        device: a device, or ``"auto"``, see
            :func:`ppl_vae.core.devices.accelerators.automatic_device`.

    Raises:
        ValueError: if the device is not available.
    """
    chosen = device
    if device == "auto":
        chosen = automatic_device(list(tensors_of(model, guide)))
    chosen = available_device(chosen)
    for module in modules_of(model, guide):
        module.to(chosen)


@contextmanager
def names_device_mix(pair: Pair, batch: Batch) -> Iterator[None]:
    """A mix of devices inside is reported as by a run of the pair, whatever the objective is.

    Raises:
        ValueError: see :func:`ppl_vae.core.devices.device_mix.describe_mix`.
    """
    try:
        yield
    except RuntimeError as error:
        if is_device_mix(error):
            pair.run(batch)
        raise
