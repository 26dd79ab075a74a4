"""Saving and loading programs: a folder of ``config.json`` and ``model.safetensors``.

Loading executes no code from the folder: the configuration names constructors of this package and
their plain arguments, and the weights are tensors with a checksum.

Saving is all or nothing. The tensors are first written into the same folder, in a file that has
their checksum in its name; ``config.json``, which states the checksum of its tensors, is then
replaced in one step; and only then the new file takes the place of ``model.safetensors``. A save
that was interrupted between these steps is completed by the next one, and :func:`ppl_vae.load`
reads either state.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from ppl_vae.core.config import constructor_call
from ppl_vae.core.errors import CheckpointError
from ppl_vae.core.files import exclusive_folder, read_regular, write_atomically
from ppl_vae.core.program import Program
from ppl_vae.likelihoods.gaussian import OptimalGaussian
from ppl_vae.models.stored_config import StoredConfig, constructor_to_json

P = TypeVar("P", bound=Program)
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PENDING = "model-{}.safetensors"
"""The name of new tensors, with their checksum, until ``config.json`` refers to them."""
VARIABLE_LENGTH = {"undetermined"}
"""Buffers whose length depends on the data that a model was fitted to."""


def save(program: Program, folder: str | Path) -> Path:
    """Write a model or guide into a folder, replacing what an earlier save wrote there.

    At any moment the folder holds the old program or the new one, whole: also if the process is
    killed, the disk is full, or two processes save into it at once (one of them wins).

    Args:
        program: any of the package's programs. One with user-written networks or corruption is
            saved too, but can only be loaded with ``into=``.
        folder: created if it does not exist.

    Returns:
        The folder.

    Raises:
        ValueError: if a parameter or buffer contains NaN, since such a program cannot be used.
        OSError: if the folder cannot be written; what it held before is kept.
    """
    folder = Path(folder)
    state = program.state_dict()
    if found := _names_with_nan(program, state):
        raise ValueError(f"the program is not saved: {found[:4]} contain NaN, and load refuses it")
    tensors, aliases = _deduplicated(state)
    data = tensor_bytes(tensors)
    config = StoredConfig(
        program=type(program).__name__,
        constructor=constructor_to_json(constructor_call(program)),
        aliases=aliases,
        frozen=[name for name, p in _parameters(program) if not p.requires_grad],
        sha256=hashlib.sha256(data).hexdigest(),
        version=version("ppl_vae"),
        schema=None if program.schema is None else program.schema.to_json(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_folder(folder):
        try:
            write_atomically(folder / PENDING.format(config.sha256), data)
            write_atomically(folder / CONFIG, config.to_bytes())
        finally:
            _complete(folder)
    return folder


def _complete(folder: Path) -> None:
    """Give the tensors that ``config.json`` refers to their name, and remove others."""
    try:
        current = PENDING.format(StoredConfig.read(folder / CONFIG).sha256)
    except (CheckpointError, FileNotFoundError):
        current = ""
    for pending in folder.glob(PENDING.format("*")):
        if pending.name == current:
            pending.replace(folder / WEIGHTS)
        else:
            pending.unlink(missing_ok=True)


def _deduplicated(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    # safetensors refuses tensors that share memory: one is stored, the others are aliases of it.
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().clone().contiguous()
    return tensors, aliases


def _parameters(program: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from program.named_parameters(remove_duplicate=False)


def _names_with_nan(program: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """The tensors that contain NaN, except optimal scales, which are NaN until frozen."""
    parts = program.named_modules(remove_duplicate=False)
    unset = {f"{name}.scale".lstrip(".") for name, p in parts if isinstance(p, OptimalGaussian)}
    return [n for n, tensor in state.items() if n not in unset and bool(tensor.isnan().any())]


def load(folder: str | Path, *, into: P | None = None) -> Any:
    """Read a program that :func:`save` wrote.

    Args:
        folder: the folder that was passed to :func:`save`.
        into: a program of the same class and sizes to load the state into; required for
            user-written networks. It keeps its dtypes and device.

    Returns:
        The program: ``into``, or a new one on the CPU, each tensor in the dtype it was saved with.
        The same parameters are frozen (``requires_grad``) as in the saved program.

    Raises:
        FileNotFoundError: if there is no such folder, or no program in it.
        CheckpointError: a ValueError, if a file is damaged, holds another program, or holds
            tensors with NaN or of another kind (integers in place of real numbers).
    """
    folder = Path(folder)
    config, state = _read(folder)
    program: Any = into
    if program is None:
        if config.constructor is None:
            raise CheckpointError(
                f"{folder} holds a {config.program} with parts that only its author can rebuild; "
                "make one and pass it as into="
            )
        num_elements = sum(tensor.numel() for tensor in state.values())
        program = config.rebuild(folder / CONFIG, num_elements)
    elif type(program).__name__ != config.program:
        raise CheckpointError(
            f"{folder} holds a {config.program}, and into= is a {type(program).__name__}"
        )
    _check_same_tensors(folder, program.state_dict(), state)
    if found := _names_with_nan(program, state):
        raise CheckpointError(f"{folder / WEIGHTS} holds tensors with NaN: {found[:4]}")
    if unknown := set(config.frozen) - {name for name, _ in _parameters(program)}:
        raise CheckpointError(f"{folder / CONFIG} is damaged: no parameters {sorted(unknown)}")
    if into is None:
        _set_dtypes(program, state)
    program.load_state_dict(state)
    program.schema = config.table_schema
    for name, parameter in _parameters(program):
        parameter.requires_grad_(name not in config.frozen)
    return program


def _read(folder: Path) -> tuple[StoredConfig, dict[str, Tensor]]:
    """The configuration and the tensors that belong to it, also while another process saves."""
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; load takes the folder that save wrote")
    earlier = None
    while True:
        config = StoredConfig.read(folder / CONFIG)
        data = _matching_tensors(folder, config.sha256)
        if data is not None:
            return config, _with_aliases(_parsed(folder / WEIGHTS, data), config, folder)
        if config == earlier:  # no other process is saving
            break
        earlier = config
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"there is no file {folder / WEIGHTS}")
    raise CheckpointError(
        f"{folder / WEIGHTS} is not what was saved: its checksum differs from {CONFIG}'s"
    )


def _matching_tensors(folder: Path, sha256: str) -> bytes | None:
    for path in (folder / WEIGHTS, folder / PENDING.format(sha256)):
        with suppress(FileNotFoundError):  # another process may rename it at this moment
            data = read_regular(path)
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
    return None


def _parsed(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return read_tensors(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _with_aliases(
    tensors: dict[str, Tensor], config: StoredConfig, folder: Path
) -> dict[str, Tensor]:
    if unknown := sorted({*config.aliases.values()} - tensors.keys()):
        raise CheckpointError(f"{folder / CONFIG} is damaged: no tensors {unknown[:4]}")
    return tensors | {name: tensors[other] for name, other in config.aliases.items()}


def _check_same_tensors(folder: Path, own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    own_shapes, saved_shapes = (
        {name: tuple(t.shape) for name, t in state.items() if name not in VARIABLE_LENGTH}
        for state in (own, saved)
    )
    if differing := sorted(own_shapes.items() ^ saved_shapes.items()):
        raise CheckpointError(
            f"{folder / WEIGHTS} holds other tensors than this program; they differ in "
            f"{differing[:4]}"
        )
    for name, tensor in saved.items():
        if name in own and _kind(own[name]) != _kind(tensor):
            raise CheckpointError(
                f"{folder / WEIGHTS} holds {_kind(tensor)} in {name}, which must be "
                f"{_kind(own[name])}"
            )


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "real numbers"
    if tensor.is_complex():
        return "complex numbers"
    return "truth values" if tensor.dtype == torch.bool else "integers"


def _set_dtypes(program: nn.Module, state: dict[str, Tensor]) -> None:
    for name, parameter in _parameters(program):
        parameter.data = parameter.data.to(state[name].dtype)
    for name, buffer in program.named_buffers(remove_duplicate=False):
        if name in state:
            owner, _, own_name = name.rpartition(".")
            program.get_submodule(owner)._buffers[own_name] = buffer.to(state[name].dtype)
