"""Checkpoints of a stochastic fit: complete or not there, and nothing is executed on reading."""

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
    """The global generators' states, as tensors, lists and numbers."""
    kind, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return cuda | {
        "torch": torch.get_rng_state(),
        "numpy": [kind, keys.tolist(), *rest],  # pyright: ignore[reportAttributeAccessIssue]
        "python": [version, list(internal), gauss],
    }


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    """Put the global generators where :func:`generator_states` found them."""
    torch.set_rng_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is complete or not there: to a temporary name first, then renamed.

    A checksum stands before the content: torch's own format does not notice a changed number.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    write_whole(path, hashlib.sha256(data).digest() + data)


def read_checkpoint(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of the same fit; executes nothing.

    Raises:
        ValueError: if the file is damaged, or of another model or fit.
    """
    stored = b"" if path.is_dir() else path.read_bytes()
    digest, data = stored[:DIGEST_SIZE], stored[DIGEST_SIZE:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(
            f"checkpoint {path} cannot be read: it is damaged, or no checkpoint of fit_svi. "
            "Delete it to start anew, or give another checkpoint="
        )
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for key, value in fingerprint.items():
        found = content["fingerprint"].get(key)
        if found != value:
            raise ValueError(
                f"checkpoint {path} is of another fit: its {key} is {found}, here it is "
                f"{value}. Give another checkpoint=, or delete it to start anew"
            )
    return content


def place_to_go_on(content: dict[str, Any], num_steps: int, path: Path) -> dict[str, Any]:
    """Where a fit of so many steps goes on from a checkpoint: its end, or before it.

    A fit of another number of steps goes on from the last look that both have. What the fit of
    the checkpoint did after that, a look at its end among it, the other one does not do.

    Raises:
        ValueError: if more steps than these are done, or that look is not in the file.
    """
    done, planned = len(content["values"]), content["num_steps"]
    if num_steps == planned:
        return content
    if num_steps < done:
        raise ValueError(
            f"checkpoint {path} has done {done} steps, more than the {num_steps} asked for, and "
            "steps are not taken back. Give another checkpoint=, or delete it to start anew"
        )
    if not content["at_its_end"]:
        return content
    if content["before_its_end"] is None:
        raise ValueError(
            f"checkpoint {path} holds only the end of a fit of {planned} steps, because the file "
            "was removed while the fit ran. Give another checkpoint=, or delete it to start anew"
        )
    return content["before_its_end"]
