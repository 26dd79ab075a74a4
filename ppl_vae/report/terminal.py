"""The lineage's table and progress on a terminal during the run."""

import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from ppl_vae.lineage.result import Lineage
from ppl_vae.report.table import lineage_table

LOG = logging.getLogger("ppl_vae")
NON_TERMINAL_WIDTH = 200
"""The width of the output, in characters, if it is not a terminal."""
BAR, NARROW_BAR, WIDE = 30, 8, 60
"""The widths of a bar, and of a terminal from which on it has the first of them."""
REFRESH_INTERVAL = 0.25
"""Seconds between updates of the display."""


def print_line(text: str) -> None:
    """Print a line on standard output."""
    width = None if sys.stdout.isatty() else NON_TERMINAL_WIDTH
    Console(width=width, highlight=False).print(text, soft_wrap=True, markup=False)


class Display:
    """The growing table and, below it, the progress of the current stage; only on a terminal.

    Args:
        console: the console to write to.
        names: the names of the requested stages.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console, self.names = console, names
        self.lineage: Lineage | None = None
        bar = BarColumn(bar_width=BAR if console.width >= WIDE else NARROW_BAR)
        columns = (bar, TextColumn("{task.fields[remaining]}"))
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=None, remaining="")
        self._description = self._stage = ""
        self._lock = threading.Lock()  # a separate thread updates the display

    @contextmanager
    def live(self, *, table: bool) -> Iterator[None]:
        """Show the display while the block runs, with or without the table, on a terminal."""
        if not self.console.is_terminal:
            yield
            return
        render: Callable[[], RenderableType] = self._with_table if table else self._only_progress
        display = Live(
            console=self.console, transient=True, auto_refresh=False, get_renderable=render
        )
        with display as live, _refreshed(live):
            yield

    def add(self, lineage: Lineage) -> None:
        """Replace the lineage by its present state."""
        self.lineage = lineage

    def update(self, stage: str, phase: str, step: int, num_steps: int) -> None:
        """Update the progress of a stage, see :class:`ppl_vae.lineage.stage.StageProgress`."""
        number = self.names.index(stage) + 1 if stage in self.names else None
        place = f"stage {number} of {len(self.names)}, " if number else ""
        if stage != self._stage and not self.console.is_terminal:
            LOG.info("%s%s", place, stage)
        self._stage = stage
        description = f"{place}{stage}: {phase}"
        if description != self._description:
            self._description = description
            with self._lock:
                self._progress.remove_task(self._task)
                self._task = self._progress.add_task(description, total=None, remaining="")
        if num_steps:
            self._progress.update(self._task, completed=step, total=num_steps)

    def _remaining(self) -> str:
        (task,) = self._progress.tasks
        if not task.total:
            return f"{task.elapsed or 0:.0f} s"
        if task.time_remaining is None:
            return f"{task.percentage:.0f} %"
        # Early stopping may end the fit before its last step.
        left = timedelta(seconds=math.ceil(task.time_remaining))
        return f"{task.percentage:.0f} %, at most {left} left"

    def _only_progress(self) -> RenderableType:
        with self._lock:
            self._progress.update(self._task, remaining=self._remaining())
        return Group(Text(self._description), self._progress)

    def _with_table(self) -> RenderableType:
        rows = self.lineage.rows if self.lineage is not None else ()
        pending = self.names[len(rows)] if len(rows) < len(self.names) else ""
        table = lineage_table(rows, width=self.console.width, pending=pending)
        return Group(table, "", self._only_progress())


@contextmanager
def _refreshed(live: Live) -> Iterator[None]:
    # rich does not join its own refresh thread, which may still run at the interpreter's exit.
    finished = threading.Event()

    def run() -> None:
        while not finished.wait(REFRESH_INTERVAL):
            live.refresh()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
