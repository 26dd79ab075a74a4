"""The settings of a fit to a table, and the file ``run.toml`` that holds them."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ppl_vae.core.files import read_regular
from ppl_vae.core.validation import check_int, check_option
from ppl_vae.data.units import SCALES
from ppl_vae.fitted.names import LIKELIHOOD_NAMES, MODEL_NAMES, NETWORK_MODELS

LARGEST_SEED = 2**32 - 1
"""The largest seed that every generator in use accepts."""
AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How a model is fitted to a table.

    Attributes:
        model: one of ``ppl_vae.fitted.names.MODEL_NAMES``.
        latent_dim: K; None selects it by the likelihood of masked entries under PPCA, or under
            factor analysis if the noise is diagonal.
        likelihood: one of ``ppl_vae.fitted.names.LIKELIHOOD_NAMES``.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse order.
        epochs: the largest number of passes over the training rows; None makes at least 3,000
            steps.
        batch_size: rows per step.
        learning_rate: the learning rate of Adam.
        patience: evaluations of the validation rows without improvement before the fit stops.
        scale: ``"auto"``, ``"none"`` or ``"standardize"``, see
            :func:`~ppl_vae.data.units.choose_scaling`.
        starts: the number of starts of EM, of which the best is kept.
        held_out: the share of rows that are not fitted, on which log p is estimated.
        device: ``"auto"``, ``"cpu"`` or an accelerator's name; of models with networks.
        seed: the seed of the split, the initial values and all draws.
        threads: the number of threads of torch.
        compile: whether the steps of models with networks are compiled. It is never decided by
            timing, so that a run can be repeated bit for bit.

    Raises:
        ValueError: if a setting is out of range or of another type.
    """

    model: str = "ppca"
    latent_dim: int | None = None
    likelihood: str = "gaussian"
    hidden: tuple[int, ...] = (128,)
    epochs: int | None = None
    batch_size: int = 256
    learning_rate: float = 1e-3
    patience: int = 40
    scale: str = AUTO
    starts: int = 1
    held_out: float = 0.2
    device: str = AUTO
    seed: int = 0
    threads: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        check_option("--model", self.model, MODEL_NAMES)
        check_option("--likelihood", self.likelihood, LIKELIHOOD_NAMES)
        check_option("--scale", self.scale, SCALES)
        for name in ("latent_dim", "epochs"):
            if getattr(self, name) is not None:
                check_int(_option(name), getattr(self, name))
        for name in ("batch_size", "patience", "starts", "threads"):
            check_int(_option(name), getattr(self, name))
        for width in self.hidden:
            check_int("--hidden", width)
        check_seed(self.seed)
        _check_number("--learning-rate", self.learning_rate, 0.0, float("inf"))
        if self.held_out != 0:
            _check_number("--held-out", self.held_out, 0.0, 1.0)
        if not self.has_networks and self.likelihood != "gaussian":
            raise ValueError(
                f"--likelihood {self.likelihood} needs a model with a decoder, "
                f"{' or '.join(NETWORK_MODELS)}; --model is {self.model}"
            )

    @property
    def has_networks(self) -> bool:
        """Whether the model has an encoder and a decoder."""
        return self.model in NETWORK_MODELS

    @property
    def noise(self) -> str:
        """The noise of PPCA and factor analysis; for other models that of PPCA."""
        return "diagonal" if self.model.endswith("factor-analysis") else "isotropic"

    def to_plain(self) -> dict[str, Any]:
        """The settings as TOML holds them: None is ``"auto"``, a tuple is a list."""
        found = dataclasses.asdict(self)
        return {
            name: AUTO if value is None else list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
        }

    @classmethod
    def from_plain(cls, content: Mapping[str, Any], source: str) -> Self:
        """The inverse of :meth:`to_plain`; what is missing has its default.

        Args:
            content: settings by name.
            source: where they come from, for messages.

        Raises:
            ValueError: if a name is unknown, or a value is of another type or out of range.
        """
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        if unknown := sorted(content.keys() - fields.keys()):
            raise ValueError(f"{source} has unknown settings {unknown}; known are {[*fields]}")
        return cls(
            **{name: _of_type(name, v, fields[name], source) for name, v in content.items()}
        )


def check_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        ValueError: if it is not within 0..2^32 - 1.
    """
    if check_int("--seed", seed, 0) > LARGEST_SEED:
        raise ValueError(f"--seed must be a whole number within 0..{LARGEST_SEED}; got {seed}")
    return seed


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        bounds = (
            f"finite and above {low:g}"
            if high == float("inf")
            else f"between {low:g} and {high:g}"
        )
        raise ValueError(f"{name} must be {bounds}; got {value}")


def _of_type(name: str, value: Any, default: Any, source: str) -> Any:
    if name in ("latent_dim", "epochs") and value == AUTO:
        return None
    if name == "hidden" and isinstance(value, list):
        return tuple(value)
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise ValueError(f"{source}: {name} must be true or false; got {value!r}")
    wanted = int if default is None else type(default)
    accepted = (int, float) if wanted is float else (wanted,)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ValueError(f"{source}: {name} must be {_article(wanted)}; got {value!r}")
    return float(value) if wanted is float else value


def _article(kind: type) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", tuple: "a list"}
    return names[kind]


@dataclasses.dataclass(frozen=True)
class Run:
    """What ``ppl-vae fit`` was asked to do.

    Attributes:
        table: the file; None if a configuration does not name it.
        options: how it is read, by name, without those that have their default.
        settings: the settings of the fit, by name, without those that were not given.
        digest: the checksum of the table, see :func:`~ppl_vae.fitted.metadata.digest_table`.
    """

    table: str | None
    options: dict[str, Any]
    settings: dict[str, Any]
    digest: str | None = None

    def to_toml(self) -> str:
        """The text of ``run.toml``."""
        lines = ["# ppl-vae fit --config FILE repeats this run."]
        if self.table is not None:
            lines.append(f"table = {_toml(self.table)}")
        if self.digest is not None:
            lines.append(f"digest = {_toml(self.digest)}")
        for name, content in (("fit", self.settings), ("read", self.options)):
            lines += ["", f"[{name}]"] if content else []
            lines += [f"{key} = {_toml(value)}" for key, value in content.items()]
        return "\n".join(lines) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a ``run.toml``.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a configuration.
        """
        data = read_regular(path)
        try:
            content = tomllib.loads(data.decode())
        except (ValueError, RecursionError) as error:  # ValueError: of long numbers, too
            raise ValueError(f"{path} is not TOML: {error}") from error
        known = {"table": str, "digest": str, "read": dict, "fit": dict}
        if unknown := sorted(content.keys() - known.keys()):
            raise ValueError(f"{path} has unknown entries {unknown}; known are {[*known]}")
        for name, value in content.items():
            if not isinstance(value, known[name]):
                raise ValueError(f"{path}: {name} cannot be {value!r}")
        return cls(
            content.get("table"),
            content.get("read", {}),
            content.get("fit", {}),
            content.get("digest"),
        )


def _toml(value: Any) -> str:
    # Numbers, texts and lists of JSON are those of TOML, but for the character DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
