"""Saving and loading programs: a folder of ``config.json`` and ``model.safetensors``.

Loading executes nothing: the configuration names one of the package's own classes and its plain
arguments, the weights are numbers with a checksum.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from ppl_vae.core.files import write_whole
from ppl_vae.core.program import Program
from ppl_vae.guides.guides import PerDatumGuide
from ppl_vae.likelihoods.discrete import LIKELIHOODS
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.decoder_model import DecoderModel
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.topics import topic_vae
from ppl_vae.models.vae import VAE
from ppl_vae.networks.corruption import CORRUPTIONS

P = TypeVar("P", bound=Program)
FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
OF_ANY_LENGTH = {"undetermined"}
"""State of PPCA whose length is a matter of the data it was fitted to."""


_NETWORKS: dict[str, Callable[..., VAE]] = {
    "mlp": VAE.mlp,
    "conv": VAE.conv,
    "topics": topic_vae,
}


def _make_vae(likelihood: dict[str, Any], networks: str = "mlp", **sizes: Any) -> VAE:
    if networks != "topics":
        # Folders from before there was a choice: their encoders were trained on x itself.
        sizes = {"inputs": "identity"} | sizes
    return _NETWORKS[networks](**sizes, likelihood=_made(LIKELIHOODS, likelihood))


_AUTOENCODERS: dict[str, Callable[..., Autoencoder]] = {
    "mlp": Autoencoder.mlp,
    "masked": Autoencoder.masked,
}


def _make_autoencoder(
    likelihood: dict[str, Any],
    corruption: dict[str, Any] | None,
    networks: str = "mlp",
    **sizes: Any,
) -> Autoencoder:
    noise = None if corruption is None else _made(CORRUPTIONS, corruption)
    sizes = {"inputs": "identity"} | sizes
    make = _AUTOENCODERS[networks]
    return make(**sizes, likelihood=_made(LIKELIHOODS, likelihood), corruption=noise)


def _made(kinds: Mapping[str, Callable[..., Any]], described: dict[str, Any]) -> Any:
    return kinds[described["class"]](**described["config"])


_MAKERS: dict[str, Callable[..., Program]] = {
    "PPCA": PPCA,
    "VAE": _make_vae,
    "Autoencoder": _make_autoencoder,
    "PerDatumGuide": PerDatumGuide,
}


def save(program: Program, folder: str | Path) -> Path:
    """Write a model or guide into a folder, over what an earlier save left there.

    Args:
        program: any of the package's programs. One whose networks or corruption are the
            caller's own is saved too, but can be loaded only ``into`` one made by the caller.
        folder: made if it is not there.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, aliases = _distinct(program.state_dict())
    data = tensor_bytes(tensors)
    content = {
        "format": FORMAT,
        "ppl_vae": version("ppl_vae"),
        "class": type(program).__name__,
        "config": _config(program),
        "aliases": aliases,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_whole(folder / WEIGHTS, data)
    write_whole(folder / CONFIG, (json.dumps(content, indent=1) + "\n").encode())
    return folder


def _config(program: Program) -> dict[str, Any] | None:
    describe = getattr(program, "config", None)
    config = describe() if describe is not None else None
    if config is None or not isinstance(program, DecoderModel):
        return config
    config = config | {"likelihood": _described(program.likelihood)}
    if not isinstance(program, Autoencoder):
        return config
    noise = program.corruption
    if noise is not None and type(noise).__name__ not in CORRUPTIONS:
        return None  # the caller's own, which loading would have to execute
    return config | {"corruption": None if noise is None else _described(noise)}


def _described(part: Any) -> dict[str, Any]:
    return {"class": type(part).__name__, "config": part.config()}


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    # safetensors refuses tensors that share memory: one is stored, the others point to it.
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
        folder: what :func:`save` was given.
        into: a program of the same kind and sizes to load the state into; needed where networks
            are the caller's own. Its dtype and device stay.

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
        if name not in _MAKERS or content["config"] is None:
            raise ValueError(
                f"{folder} holds a {name} of networks that only its author can rebuild; make one "
                "and give it as into="
            )
        program = _make(folder, name, content["config"], state)
    elif type(program).__name__ != name:
        raise ValueError(f"{folder} holds a {name}, and into= is a {type(program).__name__}")
    _check_same(folder, program.state_dict(), state)
    program.load_state_dict(state)
    return program


def _make(folder: Path, name: str, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    try:
        made = _MAKERS[name](**config)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from error
    dtypes = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    return made.to(dtypes[0]) if dtypes else made


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = {"format", "class", "config", "aliases", "sha256"} - content.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if missing:
        raise ValueError(f"{path} is damaged: it has no {sorted(missing)}")
    if content["format"] != FORMAT:
        raise ValueError(f"{path} is of format {content['format']}, this version reads {FORMAT}")
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


def _check_same(folder: Path, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    mine, found = (
        {n: tuple(t.shape) for n, t in state.items() if n not in OF_ANY_LENGTH}
        for state in (ours, theirs)
    )
    if differing := sorted(mine.items() ^ found.items()):
        raise ValueError(
            f"{folder} holds another program than this one; they differ in {differing[:4]}"
        )
