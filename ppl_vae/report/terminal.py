"""The lineage on a terminal while it is climbed."""

import math
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn

from ppl_vae.lineage.run import Lineage
from ppl_vae.report.table import lineage_table

PIPED_WIDTH = 160
REFRESH_EVERY = 0.25
"""Seconds."""


def say(text: str) -> None:
    """A line on standard output."""
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    Console(width=width, highlight=False).print(text, soft_wrap=True, markup=False)


class Display:
    """The table as it grows and, under it, how far the present stage is; nothing when piped.

    Args:
        console: where to show it.
        names: of the stages that will be climbed.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console, self.names = console, names
        self.lineage: Lineage | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[left]}"),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=None, left="")
        self._doing = ""
        self._lock = threading.Lock()  # the picture is drawn in a thread of its own

    @contextmanager
    def shown(self, *, table: bool) -> Iterator[None]:
        """Show it while the block runs, with or without the table, if there is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        what = self._with_table if table else self._only_progress
        options = {"transient": True, "auto_refresh": False, "get_renderable": what}
        with Live(console=self.console, **options) as live, _refreshed(live):
            yield

    def add(self, lineage: Lineage) -> None:
        """Take the lineage as it is now."""
        self.lineage = lineage

    def watch(self, stage: str, doing: str, done: int, total: int) -> None:
        """Say how far a stage is."""
        number = self.names.index(stage) + 1 if stage in self.names else None
        place = f"stage {number} of {len(self.names)}, " if number else ""
        doing = f"{place}{stage}: {doing}"
        if doing != self._doing:
            self._doing = doing
            with self._lock:
                self._progress.remove_task(self._task)
                self._task = self._progress.add_task(doing, total=None, left="")
        if total:
            self._progress.update(self._task, completed=done, total=total)

    def _left(self) -> str:
        (task,) = self._progress.tasks
        if not task.total:
            return f"{task.elapsed or 0:.0f} s"
        if task.time_remaining is None:
            return f"{task.percentage:.0f} %"
        # An early stop may come before the last step.
        left = timedelta(seconds=math.ceil(task.time_remaining))
        return f"{task.percentage:.0f} %, at most {left} left"

    def _only_progress(self) -> RenderableType:
        with self._lock:
            self._progress.update(self._task, left=self._left())
        return self._progress

    def _with_table(self) -> RenderableType:
        rows = self.lineage.rows if self.lineage is not None else ()
        waiting = self.names[len(rows)] if len(rows) < len(self.names) else ""
        table = lineage_table(rows, width=self.console.width, waiting=waiting)
        return Group(table, "", self._only_progress())


@contextmanager
def _refreshed(live: Live) -> Iterator[None]:
    # rich's own thread is not waited for, and may meet the interpreter's end.
    done = threading.Event()

    def run() -> None:
        while not done.wait(REFRESH_EVERY):
            live.refresh()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
