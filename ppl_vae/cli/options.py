"""Options that several commands share, each declared once; importing them needs no torch."""

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from ppl_vae.core.text import listed
from ppl_vae.fitted.names import LIKELIHOOD_NAMES, MODEL_NAMES, NETWORK_MODELS

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="the folder of a model that fit or save wrote")
]
Data = Annotated[
    Path, typer.Argument(metavar="TABLE", help="a table: .csv, .tsv, .parquet, .npy, ...")
]
Seed = Annotated[int, typer.Option(help="seed of all random numbers")]
NumStarts = Annotated[
    int, typer.Option(help="starts of EM: the given one, and random ones; the best fit is kept")
]
NumSamples = Annotated[int, typer.Option(help="draws per row, where log p is estimated")]
Refine = Annotated[int, typer.Option(help="steps that refine each row's own q")]
Json = Annotated[bool, typer.Option("--json", help="print the results as JSON on standard output")]
Force = Annotated[
    bool, typer.Option("--force", help="overwrite an existing output of another kind")
]
TableOut = Annotated[
    Path, typer.Option(help="the table to write, .csv, .tsv or .parquet; - is standard output")
]
HeldOutRows = Annotated[
    bool,
    typer.Option(
        "--held-out", help="only the rows that the fit held out; TABLE must be the fitted one"
    ),
]


SCALE_HELP = (
    "auto, none or standardize; auto{default} standardises the columns if their standard "
    "deviations differ by more than ten times and rows are not images"
)
Scale = Annotated[str, typer.Option(help=SCALE_HELP.format(default=""))]


@dataclasses.dataclass(frozen=True)
class Output:
    """How a command prints and writes its result."""

    as_json: Json = False
    force: Force = False


@dataclasses.dataclass(frozen=True)
class ModelAndTable:
    """A fitted model, the table that a command applies it to, and where the result goes."""

    model: Model
    table: Data
    held_out: HeldOutRows = False
    out: TableOut = Path("-")
    as_json: Json = False
    force: Force = False


@dataclasses.dataclass(frozen=True)
class EvaluatedModel(ModelAndTable):
    """A fitted model, the table that it is evaluated on, and the file of the numbers."""

    out: Annotated[Path, typer.Option(help="file of the numbers, .json")] = Path("evaluation.json")


@dataclasses.dataclass(frozen=True)
class Estimation:
    """How log p of each row is estimated where it is not exact."""

    num_samples: NumSamples = 1000
    refine: Refine = 150
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class FullEstimation(Estimation):
    """How much of a table is evaluated, and the settings of the estimates."""

    refine: Refine = 300
    rows: Annotated[int, typer.Option(help="largest number of rows to evaluate")] = 500
    annealed: Annotated[
        int, typer.Option(help="largest number of rows to cross-check by annealing")
    ] = 40
    num_temperatures: Annotated[int, typer.Option(help="temperatures of the annealing")] = 200


@dataclasses.dataclass(frozen=True)
class LineageFlags:
    """What a lineage is, apart from its table."""

    latent_dim: Annotated[
        int | None, typer.Option(help="K; by default 10, or less for a small table")
    ] = None
    stages: Annotated[
        str | None,
        typer.Option(help="names of stages, separated by commas; by default all but nuts"),
    ] = None
    seed: Seed = 0
    scale: Scale = "auto"
    starts: NumStarts = 1


@dataclasses.dataclass(frozen=True)
class ImputationFlags:
    """How a table is fitted whose missing values are imputed."""

    latent_dim: Annotated[
        int | None, typer.Option(help="K; by default selected on masked entries")
    ] = None
    noise: Annotated[
        str | None, typer.Option(help="isotropic or diagonal; by default selected likewise")
    ] = None
    starts: NumStarts = 1
    scale: Scale = "auto"
    parameter_uncertainty: Annotated[
        bool | None,
        typer.Option(
            "--parameter-uncertainty/--no-parameter-uncertainty",
            help="whether the imputation is averaged over draws of the parameters; by default "
            "where there are fewer than 50 observed values per parameter",
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class TableFlags:
    """How a table is read; the options of every command that takes one."""

    header: Annotated[
        bool | None,
        typer.Option("--header/--no-header", help="whether there is a header; detected"),
    ] = None
    delimiter: Annotated[str | None, typer.Option(help="separates the cells; detected")] = None
    label: Annotated[
        str | None,
        typer.Option(help="column of classes, or 'none'; detected. It is not modelled"),
    ] = None
    missing: Annotated[
        str | None,
        typer.Option(
            help="markers of missing values, separated by commas, instead of NA, ?, - and others; "
            "empty cells always are missing"
        ),
    ] = None
    image_shape: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH, if a row is an image")] = (
        None
    )
    columns: Annotated[
        str | None, typer.Option(help="the columns to read, separated by commas")
    ] = None
    drop: Annotated[
        str | None, typer.Option(help="the columns to leave out, separated by commas")
    ] = None
    index: Annotated[str | None, typer.Option(help="the column of row names")] = None
    encoding: Annotated[
        str | None, typer.Option(help="encoding of the text; by default detected")
    ] = None
    decimal: Annotated[str | None, typer.Option(help="the decimal mark; by default detected")] = (
        None
    )
    thousands: Annotated[
        str | None, typer.Option(help="the mark between thousands; none by default")
    ] = None
    skip_rows: Annotated[int, typer.Option(help="lines to skip at the beginning")] = 0
    comment: Annotated[str | None, typer.Option(help="the start of comment lines")] = None
    max_bytes: Annotated[
        int | None, typer.Option(help="the largest size of the table, uncompressed")
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        found = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in found if value != field.default}

    @classmethod
    def from_given(cls, content: dict[str, Any], source: Path) -> "TableFlags":
        """The inverse of :meth:`given`.

        Args:
            content: options by name.
            source: the file they come from, for messages.

        Raises:
            ValueError: if an option is unknown, or of another type.
        """
        hints = typing.get_type_hints(cls)
        for name, value in content.items():
            if name not in hints:
                raise ValueError(f"{source} has an unknown option of reading, {name!r}")
            if type(value) not in (typing.get_args(hints[name]) or (hints[name],)):
                raise ValueError(f"{source}: {name} cannot be {value!r}")
        return cls(**content)

    def options(self) -> Any:
        """The options as :class:`~ppl_vae.data.files.table_options.TableOptions`.

        Raises:
            ValueError: if the shape of images cannot be understood.
        """
        from ppl_vae.data.files.table_options import TableOptions

        options = TableOptions(
            header=self.header,
            delimiter=self.delimiter,
            label=self.label,
            missing=None if self.missing is None else listed(self.missing),
            image_shape=None if self.image_shape is None else _shape(self.image_shape),
            encoding=self.encoding,
            decimal=self.decimal,
            thousands=self.thousands,
            skip_rows=self.skip_rows,
            comment=self.comment,
            columns=None if self.columns is None else listed(self.columns),
            drop=listed(self.drop or ""),
            index=self.index,
        )
        if self.max_bytes is None:
            return options
        return dataclasses.replace(options, max_bytes=self.max_bytes)


@dataclasses.dataclass(frozen=True)
class FitFlags:
    """The settings of ``fit``; what is not given is None."""

    model: Annotated[
        str | None, typer.Option(help=f"{', '.join(MODEL_NAMES)}; by default ppca")
    ] = None
    latent_dim: Annotated[
        str | None, typer.Option(help="K, or auto: selected by the likelihood of masked entries")
    ] = None
    likelihood: Annotated[
        str | None,
        typer.Option(
            help=f"likelihood of {', '.join(NETWORK_MODELS)}: {', '.join(LIKELIHOOD_NAMES)}; by "
            "default gaussian"
        ),
    ] = None
    hidden: Annotated[
        str | None, typer.Option(help="widths of hidden layers, by commas; by default 128")
    ] = None
    epochs: Annotated[
        str | None,
        typer.Option(help="largest number of passes over the rows; by default 3,000 steps"),
    ] = None
    batch_size: Annotated[int | None, typer.Option(help="rows per step; by default 256")] = None
    learning_rate: Annotated[
        float | None, typer.Option(help="learning rate of Adam; by default 0.001")
    ] = None
    patience: Annotated[
        int | None,
        typer.Option(help="evaluations without improvement before a stop; by default 40"),
    ] = None
    scale: Annotated[
        str | None, typer.Option(help=SCALE_HELP.format(default=", the default,"))
    ] = None
    starts: Annotated[
        int | None, typer.Option(help="starts of EM, of which the best is kept; by default 1")
    ] = None
    held_out: Annotated[
        float | None,
        typer.Option(help="share of rows held out to estimate log p; by default 0.2, 0 for none"),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            help="for networks: auto, cpu, or an accelerator's name (cuda); by default auto"
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(help="seed of all random numbers; by default 0")] = (
        None
    )
    threads: Annotated[int | None, typer.Option(help="threads of torch; by default 1")] = None
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="compile the steps of networks; not by default"
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """The settings that were given, as they stand in ``run.toml``.

        Raises:
            ValueError: if a number cannot be read.
        """
        found = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        }
        for name in ("latent_dim", "epochs"):
            if name in found and found[name] != "auto":
                found[name] = _whole(name, found[name])
        if "hidden" in found:
            parts = found["hidden"].split(",") if found["hidden"].strip() else []
            found["hidden"] = [_whole("hidden", part) for part in parts]
        return found


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        option = f"--{name.replace('_', '-')}"
        also = "" if name == "hidden" else ", or auto"
        raise ValueError(f"{option} must be a whole number{also}; got {text!r}") from None


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--image-shape must be HEIGHTxWIDTH, such as 28x28; got {text!r}")
    return int(parts[0]), int(parts[1])
