"""The ``ppl-vae`` command."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ppl_vae.arguments import at_least, choose_option
from ppl_vae.exhibits import Exhibits, exhibits
from ppl_vae.files import write_whole
from ppl_vae.lineage import Lineage, run_lineage
from ppl_vae.models.ppca import NOISES
from ppl_vae.report.archive import results, write_draws, write_report, write_results
from ppl_vae.report.evaluated import Evaluation
from ppl_vae.report.filled import FilledTable, check_suffix
from ppl_vae.report.table import filled, legend, lineage_table
from ppl_vae.report.terminal import Display
from ppl_vae.report.verdict import verdict
from ppl_vae.rungs import RUNGS, left_out
from ppl_vae.state import threads
from ppl_vae.tables import Table, digits_table, read_table

HELP = "From probabilistic PCA to the variational autoencoder, measured."
PIPED_WIDTH = 160
MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130
EXAMPLES = f"""
\b
Examples:
  ppl-vae lineage
      handwritten digits, all rungs
  ppl-vae lineage mine.csv --latent-dim 3 --out results
      your own table, one row a datum
  ppl-vae lineage iris.csv --label species --rungs px-em,linear-amortized,vae
      a column of classes colours pictures and is not modelled
  ppl-vae lineage images.npy --image-shape 28x28
      rows that are images
  ppl-vae lineage mine.csv --json | jq .about.seconds
      the numbers alone
  ppl-vae impute mine.csv --out filled.csv
      holes filled, and how sure
  ppl-vae evaluate vae-folder test.csv
      a model kept by save: log p with a verdict, gaps, what its codes hold

\b
Rungs: {", ".join(list(RUNGS)[:6])},
       {", ".join(list(RUNGS)[6:])}

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
had holes, its name with sd: the standard deviation of each filled cell, empty elsewhere.
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


@app.command(epilog=EXAMPLES, short_help="Climb the ladder on one data set.")
def lineage(
    data: Annotated[
        Path | None, typer.Argument(help="a table, .csv or .npy; by default the embedded digits")
    ] = None,
    latent_dim: Annotated[
        int | None, typer.Option(help="K; by default 10, or less for a small table")
    ] = None,
    rungs: Annotated[
        str | None, typer.Option(help="names of rungs, separated by commas; by default all")
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
    as_json: Annotated[
        bool, typer.Option("--json", help="print results.json and nothing else")
    ] = False,
) -> None:
    """Climb the ladder on one data set: a table, a report, pictures, and draws for ArviZ."""
    shape = None if image_shape is None else _shape(image_shape)
    if data is None:
        table = digits_table()
    else:
        table = _read(data, header, delimiter, label, missing, shape)
    names = list(RUNGS) if rungs is None else [name.strip() for name in rungs.split(",")]
    k = latent_dim if latent_dim is not None else _default_latent_dim(table)
    _Run(table, k, names, seed, out, as_json).run()


@app.command(epilog=IMPUTE_EXAMPLES, short_help="Fill the holes of a table.")
def impute(
    data: Annotated[Path, typer.Argument(help="a table with holes, .csv, .tsv or .npy")],
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
    """Fill the holes of a table with their means given their rows, and say how sure."""
    if noise is not None:
        choose_option("noise", noise, NOISES)
    if check_suffix(out).resolve() == data.resolve():
        raise ValueError(f"--out must be another file than the table itself; got {out}")
    table = _read(data, header, delimiter, label, missing)
    _say(f"{_described(table)}, seed {seed}\n")
    for note in table.notes:
        _say(f"note: {note}")
    with threads(1):
        filled = FilledTable.of(table, latent_dim, noise, seed=seed)
    for text in (*([str(filled.search)] if filled.search else []), *filled.sentences()):
        _say(text)
    for note in filled.fit.notes:
        _say(f"note: {note}")
    filled.write(out)
    _say(f"wrote {out}")


@app.command(short_help="Look at a saved model with a table.")
def evaluate(
    model: Annotated[Path, typer.Argument(help="the folder of a saved PPCA or VAE")],
    data: Annotated[Path, typer.Argument(help="a table in the model's units, held out if it can")],
    out: Annotated[Path, typer.Option(help="every number, .json")] = Path("evaluation.json"),
    draws: Annotated[int, typer.Option(help="a row, where log p is estimated")] = 1000,
    refine: Annotated[int, typer.Option(help="steps of the search for each row's own q")] = 300,
    rows: Annotated[int, typer.Option(help="at most so many rows are looked at")] = 500,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    header: Header = None,
    delimiter: Delimiter = None,
    label: Label = None,
    missing: Missing = None,
) -> None:
    """Log p of a table's rows under a saved model, with a verdict; gaps; what the codes hold."""
    at_least("rows", rows)
    table = _read(data, header, delimiter, label, missing)
    for note in table.notes:
        _say(f"note: {note}")
    with threads(1):
        found = Evaluation.of(model, table, draws=draws, refine=refine, rows=rows, seed=seed)
    for text in found.sentences():
        _say(text)
    write_whole(out, (json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n").encode())
    _say(f"wrote {out}")


def _say(text: str) -> None:
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    Console(width=width, highlight=False).print(text, soft_wrap=True, markup=False)


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


def _described(table: Table) -> str:
    num_rows, width = table.values.shape
    missing = table.num_missing
    holes = f", {missing} of {num_rows * width} cells missing" if missing else ""
    return f"{table.name}: {num_rows} rows, {width} columns{holes}"


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


@dataclass
class _Run:
    """One run of the command, from the table to the files."""

    table: Table
    latent_dim: int
    names: list[str]
    seed: int
    out: Path
    as_json: bool

    def __post_init__(self) -> None:
        terminal = sys.stderr if self.as_json else sys.stdout
        width = None if terminal.isatty() else PIPED_WIDTH
        self.console = Console(width=width, highlight=False, stderr=self.as_json)
        without = left_out(self.names, self.table.num_missing > 0)
        self.display = Display(self.console, [n for n in self.names if n not in without])

    def run(self) -> None:
        """Climb, show, write.

        Raises:
            typer.Exit: with status 130 after an interrupt.
        """
        self._say(f"{self._opening()}\n")
        for note in self.table.notes:
            self._say(f"note: {note}")
        try:
            with self.display.shown(table=True):
                found = self._climb()
            self._show(found)
            with self.display.shown(table=False):
                shown = self._exhibits(found)
                self.display.watch("report", "written", 0, 0)
                files = self._write(found, shown)
        except KeyboardInterrupt:
            self._interrupted()
            raise typer.Exit(INTERRUPTED) from None
        for file in files:
            self._say(f"wrote {file}")
        self._say(f"climbed in {found.about['seconds']:.0f} s on one thread")
        if self.as_json:
            print(json.dumps(results(found, shown), allow_nan=False))

    def _say(self, text: str, style: str | None = None) -> None:
        if not self.as_json:
            self.console.print(text, style=style, soft_wrap=True, markup=False)

    def _opening(self) -> str:
        return f"{_described(self.table)}; K = {self.latent_dim}, seed {self.seed}"

    def _climb(self) -> Lineage:
        about: dict[str, Any] = {"data": self.table.name, "notes": list(self.table.notes)}
        return run_lineage(
            self.table.values,
            latent_dim=self.latent_dim,
            rungs=self.names,
            columns=self.table.columns,
            about=about,
            seed=self.seed,
            on_rung=self._keep,
            watch=self.display.watch,
        )

    def _keep(self, found: Lineage) -> None:
        self.display.add(found)
        write_results(self.out, found)

    def _show(self, found: Lineage) -> None:
        if self.as_json:
            return
        width = self.console.width
        self.console.print(lineage_table(found.rows, width=width))
        self._say(f"\n{filled(legend(found.about), width)}\n", "dim")
        for sentence in verdict(found):
            self._say(filled(sentence, width))
        self._say("")
        for note in found.notes():
            self._say(f"note: {note}")

    def _exhibits(self, found: Lineage) -> Exhibits:
        table = self.table
        return exhibits(
            found,
            labels=table.labels,
            label=table.label or "class",
            image_shape=table.image_shape,
            watch=self.display.watch,
        )

    def _write(self, found: Lineage, shown: Exhibits) -> list[Path]:
        results_file = write_results(self.out, found, shown)
        return [results_file, *write_report(self.out, found, shown), write_draws(self.out, found)]

    def _interrupted(self) -> None:
        found = self.display.lineage
        finished = 0 if found is None else len(found.rows)
        kept = f"kept in {self.out / 'results.json'}" if finished else "so nothing is written"
        if found is not None:
            self._show(found)
        print(
            f"interrupted: {finished} of {len(self.display.names)} rungs are finished, {kept}",
            file=sys.stderr,
        )


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
