"""The ladder on a terminal while it is climbed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ppl_vae.lineage import Lineage
from ppl_vae.report.table import lineage_table


class Display:
    """The table as it grows and, under it, how far the present rung is; nothing when piped.

    Args:
        console: where to show it.
        names: of the rungs that will be climbed.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console, self.names = console, names
        self.lineage: Lineage | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=None, left="")
        self._doing = ""
        self._live = Live(console=console, transient=True, get_renderable=self._renderable)

    @contextmanager
    def shown(self) -> Iterator["Display"]:
        """Show it while the block runs, if there is a terminal."""
        if not self.console.is_terminal:
            yield self
            return
        with self._live:
            yield self

    def add(self, lineage: Lineage) -> None:
        """Take the ladder as it is now."""
        self.lineage = lineage

    def watch(self, rung: str, doing: str, done: int, total: int) -> None:
        """Say how far a rung is."""
        number = self.names.index(rung) + 1 if rung in self.names else None
        place = f"rung {number} of {len(self.names)}, " if number else ""
        doing = f"{place}{rung}: {doing}"
        if doing != self._doing:
            self._doing = doing
            self._progress.reset(self._task, description=doing, total=None, left="")
        if total:
            # An early stop may come before the last step.
            self._progress.update(self._task, completed=done, total=total, left="left, at most")

    def _renderable(self) -> RenderableType:
        rows = self.lineage.rows if self.lineage is not None else ()
        waiting = self.names[len(rows)] if len(rows) < len(self.names) else ""
        table = lineage_table(rows, width=self.console.width, waiting=waiting)
        return Group(table, "", self._progress)
