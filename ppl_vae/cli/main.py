"""The ``ppl-vae`` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ppl_vae import __version__
from ppl_vae.lineage.names import STAGE_NAMES

HELP = "From probabilistic PCA to the variational autoencoder, measured."
MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130
EXAMPLES = f"""
\b
Examples:
  ppl-vae lineage
      handwritten digits, all stages
  ppl-vae lineage mine.csv --latent-dim 3 --out results
      your own table, one row per datum
  ppl-vae lineage iris.csv --label species --stages px-em,linear-amortized,vae
      a column of classes colours the plots and is not modelled
  ppl-vae lineage images.npy --image-shape 28x28
      rows that are images
  ppl-vae lineage mine.csv --scale none
      columns of very different scales are not standardised
  ppl-vae lineage mine.csv --json | jq .about.seconds
      the results as JSON, for another program to read; here, the seconds they took
  ppl-vae impute mine.csv --out filled.csv
      missing values are filled, with standard deviations
  ppl-vae evaluate vae-folder test.csv
      evaluate a saved model: log p with its reliability, gaps, the latent space

\b
Stages: {", ".join(STAGE_NAMES[:6])},
       {", ".join(STAGE_NAMES[6:])}

\b
Exit status: 0 done; {FAILURE} a fit or a file failed; {MISTAKE} the arguments or the
data are invalid; {INTERRUPTED} interrupted (Ctrl-C): what is finished is kept.
"""

IMPUTE_EXAMPLES = """
\b
Examples:
  ppl-vae impute mine.csv --out filled.csv
      the noise model and K are selected by the held-out likelihood of masked entries
  ppl-vae impute mine.csv --latent-dim 3 --noise diagonal --out filled.csv
      factor analysis with three factors
  ppl-vae impute mine.csv --no-parameter-uncertainty --out filled.csv
      the fitted parameters are taken as known

\b
The filled table has the columns of the file under their names, and then, for each column that
had missing values, its name with sd: the standard deviation of each filled cell. It is empty
where the cell was observed, and where it is not determined (a note names the columns).
Where observed values are few, standard deviations include the uncertainty of the
parameters; otherwise they take the fitted parameters as known, and the output says so.
"""
Header = Annotated[
    bool | None,
    typer.Option(
        "--header/--no-header", help="whether the file has a header; by default detected"
    ),
]
Delimiter = Annotated[str | None, typer.Option(help="separates the cells; by default detected")]
Label = Annotated[
    str | None,
    typer.Option(help="column of classes, or 'none'; by default detected. It is not modelled"),
]
Starts = Annotated[
    int, typer.Option(help="starts of EM: the given one, and random ones; the best fit is kept")
]
Missing = Annotated[
    str | None, typer.Option(help="markers of missing values, separated by commas")
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(epilog=EXAMPLES)
def _group(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", help="print the version", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """From probabilistic PCA to the variational autoencoder, measured."""


@app.command(epilog=EXAMPLES, short_help="Run the lineage on one data set.")
def lineage(
    data: Annotated[
        Path | None, typer.Argument(help="a table, .csv or .npy; by default handwritten digits")
    ] = None,
    latent_dim: Annotated[
        int | None, typer.Option(help="K; by default 10, or less for a small table")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(help="names of stages, separated by commas; by default all but nuts"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("out"),
    seed: Annotated[int, typer.Option(help="seed of all random numbers")] = 0,
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
            help="auto, none or standardize; auto standardises the columns if their standard "
            "deviations differ by more than ten times and rows are not images"
        ),
    ] = "auto",
    starts: Starts = 1,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="print the content of results.json instead of the table and the sentences; "
            "progress is shown on standard error",
        ),
    ] = False,
) -> None:
    """Run the lineage on one data set: a table, a report, plots, and draws for ArviZ."""
    from ppl_vae.cli import commands

    finished = commands.run_lineage(
        data,
        latent_dim,
        stages,
        out,
        seed,
        scale,
        as_json,
        starts,
        header=header,
        delimiter=delimiter,
        label=label,
        missing=missing,
        image_shape=image_shape,
    )
    if not finished:
        raise typer.Exit(INTERRUPTED)


@app.command(epilog=IMPUTE_EXAMPLES, short_help="Fill the missing values of a table.")
def impute(
    data: Annotated[Path, typer.Argument(help="a table with missing values, .csv, .tsv or .npy")],
    out: Annotated[Path, typer.Option(help="the filled table, .csv or .tsv")] = Path("filled.csv"),
    latent_dim: Annotated[
        int | None, typer.Option(help="K; by default selected on masked entries")
    ] = None,
    noise: Annotated[
        str | None, typer.Option(help="isotropic or diagonal; by default selected likewise")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of masks, of starting values and of draws")] = 0,
    starts: Starts = 1,
    parameter_uncertainty: Annotated[
        bool | None,
        typer.Option(
            "--parameter-uncertainty/--no-parameter-uncertainty",
            help="whether the imputation is averaged over draws of the parameters; by default "
            "where there are fewer than 50 observed values per parameter",
        ),
    ] = None,
    header: Header = None,
    delimiter: Delimiter = None,
    label: Label = None,
    missing: Missing = None,
) -> None:
    """Fill the missing values of a table with their conditional means; write their sd beside."""
    from ppl_vae.cli import commands

    table = commands.read(data, header, delimiter, label, missing)
    commands.impute(table, data, out, latent_dim, noise, seed, starts, parameter_uncertainty)


@app.command(short_help="Evaluate a saved model on a table.")
def evaluate(
    model: Annotated[Path, typer.Argument(help="the folder of a saved PPCA or VAE")],
    data: Annotated[
        Path, typer.Argument(help="a table in the model's units, preferably held out")
    ],
    out: Annotated[Path, typer.Option(help="file of the numbers, .json")] = Path(
        "evaluation.json"
    ),
    draws: Annotated[int, typer.Option(help="draws per row, where log p is estimated")] = 1000,
    refine: Annotated[int, typer.Option(help="steps that refine each row's own q")] = 300,
    rows: Annotated[int, typer.Option(help="largest number of rows to evaluate")] = 500,
    annealed: Annotated[
        int, typer.Option(help="largest number of rows to cross-check by annealing")
    ] = 40,
    num_temperatures: Annotated[int, typer.Option(help="temperatures of the annealing")] = 200,
    seed: Annotated[int, typer.Option(help="seed of the draws")] = 0,
    header: Header = None,
    delimiter: Delimiter = None,
    label: Label = None,
    missing: Missing = None,
) -> None:
    """Estimate log p of a table's rows under a saved model; report gaps and the latent space."""
    from ppl_vae.cli import commands

    table = commands.read(data, header, delimiter, label, missing)
    commands.evaluate(
        model,
        table,
        out,
        draws=draws,
        refine=refine,
        rows=rows,
        annealed=annealed,
        num_temperatures=num_temperatures,
        seed=seed,
    )


def main() -> None:
    """Run the command; an error is one line on standard error and an exit status."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError) as error:
        _fail(error, MISTAKE)
    except (FloatingPointError, OSError) as error:
        _fail(error, FAILURE)


def _fail(error: Exception, status: int) -> None:
    typer.secho(f"error: {error}", fg="red" if sys.stderr.isatty() else None, err=True)
    raise SystemExit(status)
