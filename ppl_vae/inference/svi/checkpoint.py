"""Checkpoint files of a stochastic fit, written atomically and read without executing code."""

import hashlib
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppl_vae.core.files import write_whole

DIGEST_SIZE = hashlib.sha256().digest_size


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of the global generators as tensors, lists and numbers."""
    kind, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return cuda | {
        "torch": torch.get_rng_state(),
        "numpy": [kind, keys.tolist(), *rest],  # pyright: ignore[reportAttributeAccessIssue]
        "python": [version, list(internal), gauss],
    }


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore the states of the global generators from :func:`generator_states`."""
    torch.set_rng_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint to a temporary file, which then takes the place of the old one.

    The content is preceded by a checksum: torch's own format does not detect a changed number.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    write_whole(path, hashlib.sha256(data).digest() + data)


def read_checkpoint(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of the same fit, without executing code of the file.

    Raises:
        ValueError: if the file is damaged, or belongs to another model or fit.
    """
    stored = b"" if path.is_dir() else path.read_bytes()
    digest, data = stored[:DIGEST_SIZE], stored[DIGEST_SIZE:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(
            f"checkpoint {path} cannot be read: it is damaged, or no checkpoint of fit_svi. "
            "Delete it to start again, or pass another checkpoint="
        )
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for key, value in fingerprint.items():
        found = content["fingerprint"].get(key)
        if found != value:
            raise ValueError(
                f"checkpoint {path} is of another fit: its {key} is {found}, here it is "
                f"{value}. Pass another checkpoint=, or delete it to start again"
            )
    return content


def resumable_content(content: dict[str, Any], num_steps: int, path: Path) -> dict[str, Any]:
    """The part of a checkpoint from which a fit of ``num_steps`` steps continues.

    A fit with the same number of steps continues from the end. One with another number continues
    from the last regular evaluation, which both fits have in common; the additional evaluation
    at the end of the shorter fit is not part of the longer one.

    Raises:
        ValueError: if the checkpoint has made more steps, or does not contain that evaluation.
    """
    done, planned = len(content["values"]), content["num_steps"]
    if num_steps == planned:
        return content
    if num_steps < done:
        raise ValueError(
            f"checkpoint {path} has made {done} steps, more than the {num_steps} requested, and "
            "steps cannot be undone. Pass another checkpoint=, or delete it to start again"
        )
    if not content["at_end"]:
        return content
    if content["before_end"] is None:
        raise ValueError(
            f"checkpoint {path} holds only the end of a fit of {planned} steps, because the file "
            "was removed while the fit ran. Pass another checkpoint=, or delete it to start again"
        )
    return content["before_end"]
