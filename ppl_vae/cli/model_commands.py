"""The commands that fit a model to a table, and that apply and evaluate a fitted model."""

from pathlib import Path
from typing import Annotated

import typer

from ppl_vae.cli.app import command
from ppl_vae.cli.commands import with_options
from ppl_vae.cli.options import (
    Estimation,
    EvaluatedModel,
    FitFlags,
    Force,
    FullEstimation,
    Json,
    Model,
    ModelAndTable,
    Output,
    Seed,
    TableFlags,
    TableOut,
)

STANDARD_OUTPUT = Path("-")
FIT_EXAMPLES = """
\b
Examples:
  ppl-vae fit mine.csv --out model
      PPCA; K is selected by the likelihood of masked entries
  ppl-vae fit mine.csv --model vae --latent-dim 4 --out model
      a variational autoencoder
  ppl-vae fit counts.csv --model vae --likelihood poisson --latent-dim 4 --out model
      counts
  ppl-vae fit --resume --out model
      go on after Ctrl-C; all other options are those of the interrupted fit
  ppl-vae fit --config model/run.toml --seed 1 --out other
      the same fit with another seed

\b
The folder holds the program (config.json, model.safetensors; ppl_vae.load reads them),
fit.json (columns, units, rows held out, history, versions), run.toml (the options), and
README.md, a model card.
"""


@command(epilog=FIT_EXAMPLES, short_help="Fit a model to a table, and save it.")
@with_options
def fit(
    fit_flags: FitFlags,
    table_flags: TableFlags,
    table: Annotated[
        Path | None,
        typer.Argument(metavar="TABLE", help="a table; by default that of --config or --resume"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="a run.toml, whose options hold unless given here")
    ] = None,
    out: Annotated[Path, typer.Option(help="the folder of the model")] = Path("model"),
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the fit that was interrupted in --out")
    ] = False,
    as_json: Json = False,
    force: Annotated[
        bool, typer.Option("--force", help="write into a folder that holds something else")
    ] = False,
) -> None:
    """Fit a model to a table, estimate log p of held-out rows, and save it with its units."""
    from ppl_vae.cli import fitting

    fitting.fit_and_save(
        table,
        out,
        fit_flags.given(),
        table_flags.given(),
        config=config,
        resume=resume,
        as_json=as_json,
        force=force,
    )


@command(short_help="Write log p of each row of a table.")
@with_options
def score(applied: ModelAndTable, table_flags: TableFlags, estimation: Estimation) -> None:
    """Write log p of each row in nats, in the units of the table, with error and reliability."""
    from ppl_vae.cli import applying

    applying.write_scores(applying.Task(applied, table_flags), estimation)


@command(short_help="Write the latent codes of a table's rows.")
@with_options
def transform(applied: ModelAndTable, table_flags: TableFlags) -> None:
    """Write the posterior means of z for each row, and their standard deviations."""
    from ppl_vae.cli import applying

    applying.write_codes(applying.Task(applied, table_flags))


@command(short_help="Write the reconstructions of a table's rows.")
@with_options
def reconstruct(applied: ModelAndTable, table_flags: TableFlags) -> None:
    """Write the mean of x given the mean of z for each row, missing values included."""
    from ppl_vae.cli import applying

    applying.write_reconstructions(applying.Task(applied, table_flags))


@command(short_help="Draw rows from a model.")
@with_options
def sample(
    model: Model,
    output: Output,
    rows: Annotated[int, typer.Option("--rows", "-n", help="the number of rows")] = 100,
    out: TableOut = STANDARD_OUTPUT,
    seed: Seed = 0,
) -> None:
    """Write rows that are drawn from a model, noise included, in the units of its table."""
    from ppl_vae.cli import applying

    applying.write_samples(model, rows, out, output, seed=seed)


@command(short_help="Evaluate a model on a table: log p, gaps, collapse.")
@with_options
def evaluate(applied: EvaluatedModel, table_flags: TableFlags, estimation: FullEstimation) -> None:
    """Estimate log p of a table's rows under a saved model; report gaps and the latent space."""
    from ppl_vae.cli import applying

    applying.write_evaluation(applying.Task(applied, table_flags), estimation)


@command(short_help="Compare models by log p of the same rows.")
@with_options
def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL MODEL... TABLE", help="folders of models, and a table at the end"
        ),
    ],
    table_flags: TableFlags,
    estimation: Estimation,
    output: Output,
    out: Annotated[
        Path | None, typer.Option(help="the comparison as a table, .csv, .tsv or .parquet")
    ] = None,
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out", help="only rows that no fit used; TABLE must be the fitted one"
        ),
    ] = False,
) -> None:
    """Rank models by their mean log p of the same rows, with paired errors of the differences."""
    from ppl_vae.cli import comparing

    comparing.write_comparison(paths, table_flags, out, estimation, output, held_out=held_out)


@command(short_help="Write the HTML page of a fit or an evaluation.")
@with_options
def report(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="the folder of a model, or the .json file that evaluate wrote"
        ),
    ],
    table_flags: TableFlags,
    table: Annotated[
        Path | None,
        typer.Argument(
            metavar="TABLE", help="a table whose rows are reconstructed on the page of a model"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="the page, .html")] = Path("report.html"),
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Write one self-contained page: the findings in sentences, figures, and run details."""
    from ppl_vae.cli import reporting

    reporting.write_page(source, table, table_flags, out, seed=seed, force=force)
