"""The application of the command line, its help and its exit statuses."""

import functools
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ppl_vae import __version__

HELP = "Fit, apply and evaluate probabilistic PCA, variational autoencoders, and their lineage."
MISTAKE, FAILURE, INTERRUPTED, TERMINATED = 2, 1, 130, 143
EXAMPLES = f"""
\b
From a table to a fitted, scored, completed and reported model:
  ppl-vae fit mine.csv --out model
  ppl-vae score model mine.csv --out scores.csv
  ppl-vae impute model mine.csv --out filled.csv
  ppl-vae evaluate model mine.csv --held-out --out evaluation.json
  ppl-vae report model --out report.html

\b
MODEL is the folder that fit writes, or ppl_vae.save. TABLE is a file with a row per
datum: .csv, .tsv, .parquet, .npy and others, also compressed. Tables are written as
.csv, .tsv or .parquet by the suffix; - is standard output.

\b
Exit status: 0 done; {FAILURE} a fit or a file failed; {MISTAKE} the arguments or the
data are invalid; {INTERRUPTED} interrupted (Ctrl-C), {TERMINATED} terminated: what is
finished is kept.
"""


class _Command(TyperCommand):
    """A command whose usage line has ``MODEL TABLE``, optional arguments in brackets."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The options and the arguments, in their order."""
        names = [
            (param.metavar or str(param.name).upper(), param.required)
            for param in self.get_params(ctx)
            if param.param_type_name == "argument"
        ]
        return ["[OPTIONS]", *(name if needed else f"[{name}]" for name, needed in names)]


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
)
command = functools.partial(app.command, cls=_Command)
"""The decorator that adds a function to the application."""


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
    """Fit, apply and evaluate probabilistic PCA, variational autoencoders, and their lineage."""
