"""The lineage on a terminal, from a table to the files."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ppl_vae.data.tables import Table
from ppl_vae.lineage.report_data import ReportData, report_data
from ppl_vae.lineage.run import Lineage, run_lineage
from ppl_vae.lineage.stages import left_out
from ppl_vae.report.archive import results, write_draws, write_report, write_results
from ppl_vae.report.table import filled, legend, lineage_table
from ppl_vae.report.terminal import PIPED_WIDTH, Display
from ppl_vae.report.verdict import verdict


def described(table: Table) -> str:
    """Its name, size and missing values."""
    num_rows, width = table.values.shape
    missing = table.num_missing
    holes = f", {missing} of {num_rows * width} cells missing" if missing else ""
    return f"{table.name}: {num_rows} rows, {width} columns{holes}"


@dataclass
class LineageRun:
    """One run of the command, from the table to the files.

    Attributes:
        table: the data.
        latent_dim: K.
        names: of the stages asked for.
        seed: of everything that is drawn.
        scale: ``"auto"``, ``"none"`` or ``"standardize"``, see
            :func:`ppl_vae.data.transforms.choose_scaling`.
        out: folder for what is written.
        as_json: print results.json on standard output and nothing else.
    """

    table: Table
    latent_dim: int
    names: list[str]
    seed: int
    scale: str
    out: Path
    as_json: bool

    def __post_init__(self) -> None:
        terminal = sys.stderr if self.as_json else sys.stdout
        width = None if terminal.isatty() else PIPED_WIDTH
        self.console = Console(width=width, highlight=False, stderr=self.as_json)
        without = left_out(self.names, self.table.num_missing > 0)
        self.display = Display(self.console, [n for n in self.names if n not in without])

    def run(self) -> bool:
        """Climb, show, write; False after an interrupt, with what was finished kept."""
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
            return False
        for file in files:
            self._say(f"wrote {file}")
        self._say(f"climbed in {found.about['seconds']:.0f} s on one thread")
        if self.as_json:
            sys.stdout.write(json.dumps(results(found, shown), allow_nan=False) + "\n")
        return True

    def _say(self, text: str, style: str | None = None) -> None:
        if not self.as_json:
            self.console.print(text, style=style, soft_wrap=True, markup=False)

    def _opening(self) -> str:
        return f"{described(self.table)}; K = {self.latent_dim}, seed {self.seed}"

    def _climb(self) -> Lineage:
        about: dict[str, Any] = {"data": self.table.name, "notes": list(self.table.notes)}
        return run_lineage(
            self.table.values,
            latent_dim=self.latent_dim,
            stages=self.names,
            columns=self.table.columns,
            scale=self.scale,
            image_shape=self.table.image_shape,
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

    def _exhibits(self, found: Lineage) -> ReportData:
        table = self.table
        return report_data(
            found,
            labels=table.labels,
            label=table.label or "class",
            image_shape=table.image_shape,
            watch=self.display.watch,
        )

    def _write(self, found: Lineage, shown: ReportData) -> list[Path]:
        results_file = write_results(self.out, found, shown)
        return [results_file, *write_report(self.out, found, shown), write_draws(self.out, found)]

    def _interrupted(self) -> None:
        found = self.display.lineage
        finished = 0 if found is None else len(found.rows)
        kept = f"kept in {self.out / 'results.json'}" if finished else "so nothing is written"
        if found is not None:
            self._show(found)
        number = len(self.display.names)
        sys.stderr.write(f"interrupted: {finished} of {number} stages are finished, {kept}\n")
