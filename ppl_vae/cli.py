"""The ``ppl-vae`` command."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.live import Live

from ppl_vae.data import digits, read_table
from ppl_vae.lineage import Lineage, Row, run_lineage
from ppl_vae.report.plots import gap_staircase, staircase_size
from ppl_vae.report.table import legend, lineage_table
from ppl_vae.rungs import RUNGS

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From probabilistic PCA to the variational autoencoder, measured.",
)
PIPED_WIDTH = 160


@app.callback()
def _group() -> None:
    """From probabilistic PCA to the variational autoencoder, measured."""


@app.command()
def lineage(
    data: Annotated[
        Path | None, typer.Argument(help="a .csv or .npy table; by default the embedded digits")
    ] = None,
    latent_dim: Annotated[
        int | None, typer.Option(help="K; by default 10, or half the columns if that is fewer")
    ] = None,
    rungs: Annotated[
        str | None, typer.Option(help="names of rungs, separated by commas; by default all")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for results.json and the picture")] = Path(
        "out"
    ),
    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 0,
) -> None:
    """Climb the ladder on one data set: a table, results.json, and the gap staircase."""
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)
    names = list(RUNGS) if rungs is None else [name.strip() for name in rungs.split(",")]
    rows: list[Row] = []

    def waiting() -> str:
        return names[len(rows)] if len(rows) < len(names) else ""

    x = digits() if data is None else read_table(data)
    k = latent_dim if latent_dim is not None else min(10, max(1, x.shape[1] // 2))
    source = "digits / 16" if data is None else data.name
    console.print(f"{source}: {x.shape[0]} rows, {x.shape[1]} columns; K = {k}, seed {seed}\n")
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(row: Row) -> None:
            rows.append(row)
            if console.is_terminal:
                live.update(
                    lineage_table(rows, width=console.width, waiting=waiting()), refresh=True
                )

        if console.is_terminal:
            live.update(lineage_table(rows, width=console.width, waiting=waiting()), refresh=True)
        result = run_lineage(x, latent_dim=k, rungs=names, seed=seed, on_row=show)
    console.print(lineage_table(rows, width=console.width))
    key = legend(result.about["gap_rows"], console.width)
    console.print(f"\n{key}\n", style="dim")
    for note in _notes(rows):
        console.print(note, soft_wrap=True)
    for file in _write(result, {"data": source}, out):
        console.print(f"wrote {file}", soft_wrap=True)
    console.print(f"{result.about['seconds']:.0f} s on one thread")


def _notes(rows: list[Row]) -> list[str]:
    by_note: dict[str, list[str]] = {}
    for row in rows:
        for note in row.fit.notes:
            by_note.setdefault(note, []).append(row.rung)
    return [f"note: {note} ({', '.join(names)})" for note, names in by_note.items()]


def _write(result: Lineage, about: dict[str, str], out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    content = result.to_dict()
    content["about"] |= about
    table, picture = out / "results.json", out / "gap_staircase.png"
    table.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    figure = Figure(figsize=staircase_size(result), layout="constrained")
    gap_staircase(result, figure.add_subplot())
    figure.savefig(picture, dpi=150)
    return [table, picture]


def main() -> None:
    """Run the command; a mistake in its arguments or data is one line and exit status 2."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        raise SystemExit(2) from None
