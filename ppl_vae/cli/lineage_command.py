"""The lineage of a table, from its stages to the files of results."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ppl_vae.cli.options import LineageFlags
from ppl_vae.data.files.tables import Table
from ppl_vae.lineage.problem import LineageSettings
from ppl_vae.lineage.report_data import ReportData, report_data
from ppl_vae.lineage.result import Lineage
from ppl_vae.lineage.run import run_lineage
from ppl_vae.lineage.stages import skipped_stages
from ppl_vae.lineage.table import legend
from ppl_vae.report.archive import results, write_draws, write_report, write_results
from ppl_vae.report.table import lineage_table, omitted_columns, wrap
from ppl_vae.report.terminal import NON_TERMINAL_WIDTH, Display
from ppl_vae.report.verdict import verdict


@dataclass
class LineageRun:
    """One run of the command.

    Attributes:
        table: the data.
        latent_dim: K.
        names: the names of the requested stages.
        settings: the seed of the split, initial values and all draws; the scaling, see
            :func:`ppl_vae.data.units.choose_scaling`; and the number of starts of EM, of
            which the best is kept.
        out: the folder of the files.
        as_json: whether standard output has the content of results.json only.
    """

    table: Table
    latent_dim: int
    names: list[str]
    settings: LineageFlags
    out: Path
    as_json: bool

    def __post_init__(self) -> None:
        terminal = sys.stderr if self.as_json else sys.stdout
        width = None if terminal.isatty() else NON_TERMINAL_WIDTH
        self.console = Console(width=width, highlight=False, stderr=self.as_json)
        skipped = skipped_stages(self.names, self.table.num_missing > 0)
        self.display = Display(self.console, [n for n in self.names if n not in skipped])

    def run(self) -> None:
        """Fit, show and write the lineage.

        Raises:
            KeyboardInterrupt: if one is received, with a sentence on what is finished and saved.
        """
        try:
            self._run()
        except KeyboardInterrupt as error:
            lineage = self.display.lineage
            if lineage is not None and not lineage.finished:
                self._show(lineage)
            error.args = (self._saved(lineage),)
            raise

    def _run(self) -> None:
        with self.display.live(table=True):
            lineage = self._fit()
        self._show(lineage)
        with self.display.live(table=False):
            data = self._report_data(lineage)
            self.display.update("report", "writing", 0, 0)
            files = self._write(lineage, data)
        for file in files:
            self._print(f"wrote {file}")
        self._print(f"fitted in {lineage.about['seconds']:.0f} s on one thread")
        if self.as_json:
            sys.stdout.write(json.dumps(results(lineage, data), allow_nan=False) + "\n")

    def _print(self, text: str, style: str | None = None) -> None:
        if not self.as_json:
            self.console.print(text, style=style, soft_wrap=True, markup=False)

    def _fit(self) -> Lineage:
        about: dict[str, Any] = {"data": self.table.name, "notes": list(self.table.notes)}
        return run_lineage(
            self.table.values,
            latent_dim=self.latent_dim,
            stages=self.names,
            columns=self.table.columns,
            scale=self.settings.scale,
            image_shape=self.table.image_shape,
            about=about,
            seed=self.settings.seed,
            settings=LineageSettings(starts=self.settings.starts),
            after_stage=self._save,
            progress=self.display.update,
        )

    def _save(self, lineage: Lineage) -> None:
        write_results(self.out, lineage, new_run=self.display.lineage is None)
        self.display.add(lineage)

    def _show(self, lineage: Lineage) -> None:
        if self.as_json:
            return
        width = self.console.width
        self.console.print(lineage_table(lineage.rows, width=width))
        if omitted := omitted_columns(lineage.rows, width):
            self._print(wrap(omitted, width), "dim")
        self._print(f"\n{wrap(legend(lineage.about), width)}\n", "dim")
        for sentence in verdict(lineage):
            self._print(wrap(sentence, width))
        self._print("")
        for note in lineage.notes():
            self._print(f"note: {note}")

    def _report_data(self, lineage: Lineage) -> ReportData:
        table = self.table
        return report_data(
            lineage,
            labels=table.labels,
            label=table.label or "class",
            image_shape=table.image_shape,
            progress=self.display.update,
        )

    def _write(self, lineage: Lineage, data: ReportData) -> list[Path]:
        files = [*write_report(self.out, lineage, data), write_draws(self.out, lineage)]
        # The data of the figures are in results.json when all other files are there.
        return [write_results(self.out, lineage, data), *files]

    def _saved(self, lineage: Lineage | None) -> str:
        # The sentence says what an interrupted run leaves.
        finished = 0 if lineage is None else len(lineage.rows)
        saved = f"saved in {self.out / 'results.json'}" if finished else "nothing is saved"
        return f"{finished} of {len(self.display.names)} stages are finished, {saved}"
