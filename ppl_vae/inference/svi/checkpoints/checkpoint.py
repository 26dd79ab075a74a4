"""Checkpoint files of a stochastic fit, written atomically and read without executing code."""

import hashlib
import io
import itertools
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppl_vae.core.devices.accelerators import generator_state, set_generator_state
from ppl_vae.core.errors import CheckpointError
from ppl_vae.core.files import read_regular, write_atomically
from ppl_vae.inference.svi.checkpoints.checkpoint_layout import FitLayout

DIGEST_SIZE = hashlib.sha256().digest_size
MAX_SHOWN = 200
"""The number of characters of a setting that messages show."""


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of the global generators as tensors, lists and numbers."""
    kind, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "accelerator": generator_state(device),
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
    if states["accelerator"] is not None and device.type != "cpu":
        set_generator_state(states["accelerator"], device)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint to a temporary file, which then takes the place of the old one.

    The content is preceded by a checksum: torch's own format does not detect a changed number.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    write_atomically(path, hashlib.sha256(data).digest() + data)


def read_checkpoint(
    path: Path, stored: bytes, fingerprint: dict[str, str], layout: FitLayout
) -> dict[str, Any]:
    """Parse a checkpoint of the same fit, without executing code of the file.

    Args:
        path: the file.
        stored: its bytes.
        fingerprint: what must be equal in both fits.
        layout: what the content must fit to.

    Raises:
        CheckpointError: if the file is damaged, or belongs to another model or fit.
    """
    content = _parsed(path, stored)
    found = content["fingerprint"]
    for key in (*fingerprint, *found.keys() - fingerprint.keys()):
        if found.get(key) != fingerprint.get(key):
            there, here = _around_difference(str(found.get(key)), str(fingerprint.get(key)))
            raise CheckpointError(
                f"checkpoint {path} is of another fit: its {key} is {there}, here it is {here}. "
                "Pass another checkpoint=, or delete it to start again"
            )
    if wrong := layout.wrong_entry(content):
        raise damaged(path, f"its entry {wrong!r} cannot be restored")
    return content


def damaged(path: Path, reason: str) -> CheckpointError:
    """The error of a file that is no checkpoint."""
    return CheckpointError(
        f"checkpoint {path} cannot be read: {reason}. Delete it to start again, or pass another "
        "checkpoint="
    )


def read_stored(path: Path) -> bytes:
    """The bytes of a checkpoint; none if there is no file.

    Raises:
        CheckpointError: if the file is no regular file.
    """
    if not (path.exists() or path.is_symlink()):
        return b""
    try:
        return read_regular(path) or b"\0"
    except CheckpointError as error:
        raise damaged(path, str(error)) from error


def _parsed(path: Path, stored: bytes) -> dict[str, Any]:
    digest, data = stored[:DIGEST_SIZE], stored[DIGEST_SIZE:]
    if hashlib.sha256(data).digest() != digest:
        raise damaged(path, "it is damaged, or no checkpoint of fit_svi")
    try:
        _check_expanded_size(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of torch's reader, for any content
        raise damaged(path, f"it is damaged, or no checkpoint of fit_svi: {error}") from error
    if not isinstance(content, dict) or not _is_fingerprint(content.get("fingerprint")):
        raise damaged(path, "it is no checkpoint of fit_svi")
    return content


def _check_expanded_size(data: bytes) -> None:
    """Check that the parts of an archive, which torch does not compress, are in the file.

    Raises:
        ValueError: if they are larger than the file.
        BadZipFile: if it is no archive.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > len(data):
        raise ValueError(f"it states {size:,} bytes and has {len(data):,}")


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(t, str) for t in (*value, *value.values()))


def _around_difference(*texts: str) -> Iterator[str]:
    """Long texts, shortened to where they begin to differ."""
    pairs = enumerate(itertools.zip_longest(*texts))
    first = next(place for place, (there, here) in pairs if there != here)
    start = max(0, first - MAX_SHOWN // 3) if max(map(len, texts)) > MAX_SHOWN else 0
    for text in texts:
        shown = text[start : start + MAX_SHOWN]
        yield "..." * (start > 0) + shown + "..." * (len(text) > start + MAX_SHOWN)


def resumable_content(content: dict[str, Any], num_steps: int, path: Path) -> dict[str, Any]:
    """The part of a checkpoint from which a fit of ``num_steps`` steps continues.

    A fit with the same number of steps continues from the end. One with another number continues
    from the last regular evaluation, which both fits have in common; the additional evaluation
    at the end of the shorter fit is not part of the longer one.

    Raises:
        CheckpointError: if the checkpoint has made more steps, or does not contain that
            evaluation.
    """
    done, planned = len(content["values"]), content["num_steps"]
    if num_steps == planned:
        return content
    if num_steps < done:
        raise CheckpointError(
            f"checkpoint {path} has made {done} steps, more than the {num_steps} requested, and "
            "steps cannot be undone. Pass another checkpoint=, or delete it to start again"
        )
    if not content["at_end"]:
        return content
    if content["before_end"] is None:
        raise CheckpointError(
            f"checkpoint {path} holds only the end of a fit of {planned} steps, because the file "
            "was removed while the fit ran. Pass another checkpoint=, or delete it to start again"
        )
    return content["before_end"]


def last_regular_content(content: dict[str, Any]) -> dict[str, Any] | None:
    """The content after the last regular evaluation, with which a longer fit continues."""
    return content["before_end"] if content["at_end"] else content
