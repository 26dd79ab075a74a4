"""The ``ppl-vae`` command."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ppl_vae.core.files import write_whole
from ppl_vae.core.state import threads
from ppl_vae.core.validation import check_int, check_option
from ppl_vae.data.tables import Table, digits_table, read_table
from ppl_vae.data.transforms import SCALES
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.lineage.stages import STAGES
from ppl_vae.models.ppca import NOISES
from ppl_vae.report.evaluation import Evaluation
from ppl_vae.report.imputation import FilledTable, check_suffix
from ppl_vae.report.lineage_run import LineageRun, describe_table
from ppl_vae.report.terminal import print_line

HELP = "From probabilistic PCA to the variational autoencoder, measured."
MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130
EXAMPLES = f"""
\b
Examples:
  ppl-vae lineage
      handwritten digits, all stages
  ppl-vae lineage mine.csv --latent-dim 3 --out results
      your own table, one row a datum
  ppl-vae lineage iris.csv --label species --stages px-em,linear-amortized,vae
      a column of classes colours pictures and is not modelled
  ppl-vae lineage images.npy --image-shape 28x28
      rows that are images
  ppl-vae lineage mine.csv --scale none
      columns of very different scales as they are, not standardised
  ppl-vae lineage mine.csv --json | jq .about.seconds
      the numbers alone
  ppl-vae impute mine.csv --out filled.csv
      missing values filled, and how sure
  ppl-vae evaluate vae-folder test.csv
      a model kept by save: log p with a verdict, gaps, what its codes hold

\b
Stages: {", ".join(list(STAGES)[:6])},
       {", ".join(list(STAGES)[6:])}

\b
Exit status: 0 done; {FAILURE} a fit or a file failed; {MISTAKE} a mistake in the arguments
or the data; {INTERRUPTED} interrupted (Ctrl-C): what is finished is kept.
"""

IMPUTE_EXAMPLES = """
\b
Examples:
  ppl-vae impute mine.csv --out filled.csv
      the model is chosen by what it says of observed cells that are hidden from it
  ppl-vae impute mine.csv --latent-dim 3 --noise diagonal --out filled.csv
      factor analysis with three factors

\b
The filled table has the columns of the file under their names, and then, for each column that
had missing values, its name with sd: the standard deviation of each filled cell. It is empty
where the cell was observed, and where it is not known (this is said, with the columns).
Standard deviations take the fitted parameters as known: with few rows, intervals made of
them are too narrow.
"""
Header = Annotated[
    bool | None, typer.Option("--header/--no-header", help="of the file; by default found")
]
Delimiter = Annotated[str | None, typer.Option(help="between the file's cells; by default found")]
Label = Annotated[
    str | None,
    typer.Option(help="column of classes, or 'none'; by default found. It is not modelled"),
]
Missing = Annotated[str | None, typer.Option(help="what marks a missing cell; by commas several")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(epilog=EXAMPLES)
def _group() -> None:
    """From probabilistic PCA to the variational autoencoder, measured."""


@app.command(epilog=EXAMPLES, short_help="LineageRun the lineage on one data set.")
def lineage(
    data: Annotated[
        Path | None, typer.Argument(help="a table, .csv or .npy; by default the embedded digits")
    ] = None,
    latent_dim: Annotated[
        int | None, typer.Option(help="K; by default 10, or less for a small table")
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="names of stages, separated by commas; by default all")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for what is written")] = Path("out"),
    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 0,
    header: Header = None,
    delimiter: Delimiter = None,
    label: Label = None,
    missing: Missing = None,
    image_shape: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH, if a row is an image")
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="auto, none or standardize: whether each column is fitted in its standard "
            "deviations; auto does so if they differ by more than ten times and rows are no images"
        ),
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="print results.json and nothing else")
    ] = False,
) -> None:
    """LineageRun the lineage on one data set: a table, a report, pictures, and draws for ArviZ."""
    check_option("--scale", scale, SCALES)
    shape = None if image_shape is None else _shape(image_shape)
    if data is None:
        table = digits_table()
    else:
        table = _read(data, header, delimiter, label, missing, shape)
    names = list(STAGES) if stages is None else [name.strip() for name in stages.split(",")]
    k = latent_dim if latent_dim is not None else _default_latent_dim(table)
    if not LineageRun(table, k, names, seed, scale, out, as_json).run():
        raise typer.Exit(INTERRUPTED)


@app.command(epilog=IMPUTE_EXAMPLES, short_help="Fill the missing values of a table.")
def impute(
    data: Annotated[Path, typer.Argument(help="a table with missing values, .csv, .tsv or .npy")],
    out: Annotated[Path, typer.Option(help="the filled table, .csv or .tsv")] = Path("filled.csv"),
    latent_dim: Annotated[
        int | None, typer.Option(help="K; by default chosen on hidden cells")
    ] = None,
    noise: Annotated[
        str | None, typer.Option(help="isotropic or diagonal; by default chosen likewise")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the hidden cells and of the start")] = 0,
    header: Header = None,
    delimiter: Delimiter = None,
    label: Label = None,
    missing: Missing = None,
) -> None:
    """Fill the missing values of a table with their means given their rows, and say how sure."""
    if noise is not None:
        check_option("noise", noise, NOISES)
    if check_suffix(out).resolve() == data.resolve():
        raise ValueError(f"--out must be another file than the table itself; got {out}")
    table = _read(data, header, delimiter, label, missing)
    print_line(f"{describe_table(table)}, seed {seed}\n")
    for note in table.notes:
        print_line(f"note: {note}")
    with threads(1):
        filled = FilledTable.of(table, latent_dim, noise, seed=seed)
    for text in (*([str(filled.search)] if filled.search else []), *filled.sentences()):
        print_line(text)
    for note in filled.notes():
        print_line(f"note: {note}")
    filled.write(out)
    print_line(f"wrote {out}")


@app.command(short_help="Look at a saved model with a table.")
def evaluate(
    model: Annotated[Path, typer.Argument(help="the folder of a saved PPCA or VAE")],
    data: Annotated[Path, typer.Argument(help="a table in the model's units, held out if it can")],
    out: Annotated[Path, typer.Option(help="every number, .json")] = Path("evaluation.json"),
    draws: Annotated[int, typer.Option(help="a row, where log p is estimated")] = 1000,
    refine: Annotated[int, typer.Option(help="steps of the search for each row's own q")] = 300,
    rows: Annotated[int, typer.Option(help="at most so many rows are looked at")] = 500,
    annealed: Annotated[
        int, typer.Option(help="at most so many rows get a cross-check, by annealing")
    ] = 40,
    num_temperatures: Annotated[int, typer.Option(help="of the annealing")] = 200,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    header: Header = None,
    delimiter: Delimiter = None,
    label: Label = None,
    missing: Missing = None,
) -> None:
    """Log p of a table's rows under a saved model, with a verdict; gaps; what the codes hold."""
    check_int("rows", rows)
    looks: dict[str, Any] = {"rows": rows, "annealed": check_int("annealed", annealed, 0)}
    looks["annealing"] = Annealing(num_temperatures)
    table = _read(data, header, delimiter, label, missing)
    for note in table.notes:
        print_line(f"note: {note}")
    with threads(1):
        found = Evaluation.of(model, table, draws=draws, refine=refine, **looks, seed=seed)
    for text in found.sentences():
        print_line(text)
    write_whole(out, (json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n").encode())
    print_line(f"wrote {out}")


def _read(
    path: Path,
    header: bool | None,
    delimiter: str | None,
    label: str | None,
    missing: str | None,
    image_shape: tuple[int, int] | None = None,
) -> Table:
    markers = None if missing is None else missing.split(",")
    how: dict[str, Any] = {"header": header, "delimiter": delimiter, "label": label}
    return read_table(path, **how, missing=markers, image_shape=image_shape)


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--image-shape must be HEIGHTxWIDTH, such as 28x28; got {text!r}")
    return int(parts[0]), int(parts[1])


def _default_latent_dim(table: Table) -> int:
    # Below the rank of the training rows, which are three quarters of all, and below half of the
    # cells that a row has.
    num_rows, width = table.values.shape
    seen = width - table.num_missing // num_rows
    return max(1, min(10, seen // 2, num_rows // 3))


def main() -> None:
    """Run the command; what goes wrong is one line on standard error and an exit status."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError) as error:
        _fail(error, MISTAKE)
    except (FloatingPointError, OSError) as error:
        _fail(error, FAILURE)


def _fail(error: Exception, status: int) -> None:
    console = Console(stderr=True)
    console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
    raise SystemExit(status)
