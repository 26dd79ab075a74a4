"""Saving and loading programs: a folder of ``config.json`` and ``model.safetensors``.

Loading executes no code from the folder: the configuration names constructors of this package and
their plain arguments, and the weights are tensors with a checksum.
"""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from ppl_vae.core.config import ArrayValue, ConstructorCall, OpaqueValue, constructor_call
from ppl_vae.core.files import write_whole
from ppl_vae.core.program import Program
from ppl_vae.core.schema import TableSchema
from ppl_vae.guides.guides import PerDatumGuide
from ppl_vae.likelihoods.discrete import LIKELIHOODS
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.priors import PRIOR_FAMILIES
from ppl_vae.models.topics import topic_vae
from ppl_vae.models.vae import VAE
from ppl_vae.models.variational_posterior import VBPosterior
from ppl_vae.networks.corruption import CORRUPTIONS

P = TypeVar("P", bound=Program)
FORMAT = 2
"""Version of the folder's layout."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
VARIABLE_LENGTH = {"undetermined"}
"""Buffers whose length depends on the data that a model was fitted to."""

_MODEL_CONSTRUCTORS: tuple[Callable[..., Any], ...] = (
    PPCA,
    BayesianPPCA,
    VBPosterior,
    VAE.mlp,
    VAE.conv,
    topic_vae,
    Autoencoder.mlp,
    Autoencoder.masked,
    PerDatumGuide,
)
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    **{constructor.__qualname__: constructor for constructor in _MODEL_CONSTRUCTORS},
    **LIKELIHOODS,
    **CORRUPTIONS,
    **{family.__name__: family for family in PRIOR_FAMILIES},
}
"""The constructors that loading may call, by the names under which calls are recorded."""


def save(program: Program, folder: str | Path) -> Path:
    """Write a model or guide into a folder, replacing what an earlier save wrote there.

    Args:
        program: any of the package's programs. One with user-written networks or corruption is
            saved too, but can only be loaded with ``into=``.
        folder: created if it does not exist.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, aliases = _deduplicated(program.state_dict())
    data = tensor_bytes(tensors)
    call = constructor_call(program)
    content = {
        "format": FORMAT,
        "ppl_vae": version("ppl_vae"),
        "class": type(program).__name__,
        "constructor": _to_json(call) if _can_rebuild(call) else None,
        "aliases": aliases,
        "schema": None if program.schema is None else program.schema.to_json(),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_whole(folder / WEIGHTS, data)
    write_whole(folder / CONFIG, (json.dumps(content, indent=1) + "\n").encode())
    return folder


def _can_rebuild(value: Any) -> bool:
    if isinstance(value, ConstructorCall):
        return value.name in _CONSTRUCTORS and all(map(_can_rebuild, value.arguments.values()))
    if isinstance(value, tuple):
        return all(map(_can_rebuild, value))
    return not isinstance(value, OpaqueValue)


def _to_json(value: Any) -> Any:
    if isinstance(value, ConstructorCall):
        arguments = {name: _to_json(argument) for name, argument in value.arguments.items()}
        return {"name": value.name, "arguments": arguments}
    if isinstance(value, ArrayValue):
        return {"values": value.values}
    return list(map(_to_json, value)) if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and "values" in value:
        return torch.tensor(value["values"], dtype=torch.float64)
    if isinstance(value, dict):
        arguments = {name: _from_json(argument) for name, argument in value["arguments"].items()}
        return _CONSTRUCTORS[value["name"]](**arguments)
    return list(map(_from_json, value)) if isinstance(value, list) else value


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


def load(folder: str | Path, *, into: P | None = None) -> Any:
    """Read a program that :func:`save` wrote.

    Args:
        folder: the folder that was passed to :func:`save`.
        into: a program of the same class and sizes to load the state into; required for
            user-written networks. It keeps its dtype and device.

    Returns:
        The program: ``into``, or a new one on the CPU in the dtype it was saved with.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if a file is damaged, or holds another program.
    """
    folder = Path(folder)
    content = _read_config(folder / CONFIG)
    state = _read_state(folder / WEIGHTS, content)
    name = content["class"]
    program: Any = into
    if program is None:
        if content["constructor"] is None:
            raise ValueError(
                f"{folder} holds a {name} with parts that only its author can rebuild; make one "
                "and pass it as into="
            )
        program = _rebuild(folder, content, state)
    elif type(program).__name__ != name:
        raise ValueError(f"{folder} holds a {name}, and into= is a {type(program).__name__}")
    _check_same_shapes(folder, program.state_dict(), state)
    program.load_state_dict(state)
    program.schema = _schema(folder / CONFIG, content)
    return program


def _schema(path: Path, content: dict[str, Any]) -> TableSchema | None:
    if content.get("schema") is None:
        return None
    try:
        return TableSchema.from_json(content["schema"])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _rebuild(folder: Path, content: dict[str, Any], state: dict[str, Tensor]) -> Any:
    try:
        program = _from_json(content["constructor"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from error
    if type(program).__name__ != content["class"]:
        raise ValueError(
            f"{folder / CONFIG} is damaged: its constructor makes a {type(program).__name__}, and "
            f"its class is {content['class']}"
        )
    dtypes = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    return program.to(dtypes[0]) if dtypes else program


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = {"format", "class", "constructor", "aliases", "sha256"} - content.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if "format" in content and content["format"] != FORMAT:
        raise ValueError(f"{path} is of format {content['format']}, this version reads {FORMAT}")
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {sorted(missing)}")
    return content


def _read_state(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != content["sha256"]:
        raise ValueError(f"{path} is not what was saved: its checksum differs from {CONFIG}'s")
    try:
        tensors = read_tensors(data)
        return tensors | {name: tensors[other] for name, other in content["aliases"].items()}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _check_same_shapes(folder: Path, own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    own_shapes, saved_shapes = (
        {name: tuple(t.shape) for name, t in state.items() if name not in VARIABLE_LENGTH}
        for state in (own, saved)
    )
    if differing := sorted(own_shapes.items() ^ saved_shapes.items()):
        raise ValueError(
            f"{folder} holds a program with other tensors than this one; they differ in "
            f"{differing[:4]}"
        )
