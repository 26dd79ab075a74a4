"""The commands ``lineage`` and ``impute``."""

from pathlib import Path
from typing import Annotated

import typer

from ppl_vae.cli.app import INTERRUPTED, TERMINATED, command
from ppl_vae.cli.commands import with_options
from ppl_vae.cli.options import (
    ImputationFlags,
    LineageFlags,
    Output,
    Seed,
    TableFlags,
    TableOut,
)
from ppl_vae.lineage.names import STAGE_NAMES

LINEAGE_EXAMPLES = f"""
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

\b
Stages: {", ".join(STAGE_NAMES[:6])},
       {", ".join(STAGE_NAMES[6:])}

\b
Exit status: 0 done; 1 a fit or a file failed; 2 the arguments or the data are invalid;
{INTERRUPTED} interrupted (Ctrl-C), {TERMINATED} terminated: what is finished is kept.
"""

IMPUTE_EXAMPLES = """
\b
Examples:
  ppl-vae impute mine.csv --out filled.csv
      the noise model and K are selected by the held-out likelihood of masked entries
  ppl-vae impute model mine.csv --out filled.csv
      by the model that ppl-vae fit wrote into the folder model
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


@command(epilog=IMPUTE_EXAMPLES, short_help="Fill the missing values of a table.")
@with_options
def impute(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[MODEL] TABLE",
            help="a table with missing values; before it, the folder of a fitted model, if the "
            "table is not to be fitted itself",
        ),
    ],
    table_flags: TableFlags,
    output: Output,
    settings: ImputationFlags,
    out: TableOut = Path("filled.csv"),
    seed: Seed = 0,
) -> None:
    """Fill the missing values of a table with their conditional means; write their sd beside."""
    from ppl_vae.cli import imputing

    imputing.write_filled_table(paths, table_flags, out, output, settings, seed=seed)


@command(epilog=LINEAGE_EXAMPLES, short_help="Run the lineage on one data set.")
@with_options
def lineage(
    table_flags: TableFlags,
    settings: LineageFlags,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("out"),
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="print the content of results.json instead of the table and the sentences; "
            "progress is shown on standard error",
        ),
    ] = False,
    table: Annotated[
        Path | None, typer.Argument(metavar="TABLE", help="a table; by default handwritten digits")
    ] = None,
) -> None:
    """Run the lineage on one data set: a table, a report, plots, and draws for ArviZ."""
    from ppl_vae.cli import lineage_run

    lineage_run.write_lineage(table, table_flags.options(), settings, out, as_json=as_json)
