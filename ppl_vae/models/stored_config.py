"""The file ``config.json`` of a saved program: what made it, and what its tensors are."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.config import ArrayValue, ConstructorCall, OpaqueValue
from ppl_vae.core.devices.allocation import AllocationLimit
from ppl_vae.core.errors import CheckpointError
from ppl_vae.core.files import read_regular
from ppl_vae.core.program import Program
from ppl_vae.core.state import seeded
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

FORMAT = 3
"""Version of the folder's layout."""
CHECKSUM = re.compile("[0-9a-f]{64}")

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


@dataclass(frozen=True)
class StoredConfig:
    """The content of ``config.json``.

    Attributes:
        program: the name of the program's class.
        constructor: the call that makes such a program, or None if it has parts that only its
            author can rebuild.
        aliases: names of tensors that share the memory of another one, with the other's name.
        frozen: names of the parameters that require no gradient.
        sha256: checksum of the file of the tensors.
        version: the version of the package that wrote it.
        schema: the schema of the data frame that the program was fitted to, as by
            :meth:`~ppl_vae.core.arrays.schema.TableSchema.to_json`; None after arrays.
    """

    program: str
    constructor: dict[str, Any] | None
    aliases: dict[str, str]
    frozen: list[str]
    sha256: str
    version: str
    schema: dict[str, Any] | None

    def to_bytes(self) -> bytes:
        """The content of the file."""
        content = {"format": FORMAT, **asdict(self)}
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> "StoredConfig":
        """Read the file.

        Raises:
            FileNotFoundError: if there is none.
            CheckpointError: if it is damaged, or of another format.
        """
        try:
            content = json.loads(read_regular(path))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        found = content.pop("format", FORMAT) if isinstance(content, dict) else FORMAT
        if found != FORMAT:
            raise CheckpointError(
                f"{path} is of format {found}, and this version of ppl_vae reads {FORMAT}; fit "
                "the model and save it again, or load it with the version that wrote it"
            )
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or content.keys() != names:
            raise CheckpointError(f"{path} is damaged: it must be a mapping of {sorted(names)}")
        if wrong := _of_wrong_type(content):
            raise CheckpointError(f"{path} is damaged: {wrong} has a value of the wrong type")
        return cls(**content)

    @property
    def table_schema(self) -> TableSchema | None:
        """The schema of the data frame that the program was fitted to."""
        return None if self.schema is None else TableSchema.from_json(self.schema)

    def rebuild(self, path: Path, num_elements: int) -> Program:
        """Make the program again, with initial weights.

        Args:
            path: the file, for messages.
            num_elements: the number of elements of all saved tensors, by which the memory that
                the constructor may take is limited.

        Raises:
            CheckpointError: if that fails, or makes another program than the file states.
        """
        try:
            with seeded(0), AllocationLimit(num_elements):
                program = _from_json(self.constructor)
        except Exception as error:  # of any constructor, for arguments that it was not made for
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"{path} is damaged: its constructor cannot be called: {reason}"
            ) from error
        if not isinstance(program, Program) or type(program).__name__ != self.program:
            raise CheckpointError(
                f"{path} is damaged: its constructor makes a {type(program).__name__}, and its "
                f"program is {self.program!r}"
            )
        return program


def _of_wrong_type(content: dict[str, Any]) -> str | None:
    """The name of the first field whose value cannot be one."""
    aliases, frozen = content["aliases"], content["frozen"]
    right = {
        "program": isinstance(content["program"], str),
        "constructor": isinstance(content["constructor"], dict | None),
        "aliases": isinstance(aliases, dict) and _are_texts(aliases.values()),
        "frozen": isinstance(frozen, list) and _are_texts(frozen),
        "sha256": _are_texts([content["sha256"]]) and CHECKSUM.fullmatch(content["sha256"]),
        "version": isinstance(content["version"], str),
        "schema": _is_schema(content["schema"]),
    }
    return next((name for name, is_right in right.items() if not is_right), None)


def _is_schema(value: Any) -> bool:
    try:
        return value is None or TableSchema.from_json(value) is not None
    except ValueError:
        return False


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def constructor_to_json(call: ConstructorCall | None) -> dict[str, Any] | None:
    """A recorded call in a form that JSON can hold; None if it cannot be repeated."""
    return _to_json(call) if call is not None and _can_rebuild(call) else None


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
