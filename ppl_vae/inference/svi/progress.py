"""Progress on the terminal, for fits that take a while."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@runtime_checkable
class Report(Protocol):
    """Takes the number of steps done and the latest objective in nats per datum."""

    def __call__(self, step: int, value: float) -> None:
        """Show it."""


@contextmanager
def progress_bar(total: int, show: bool | str | Report, label: str = "SVI") -> Iterator[Report]:
    """A bar on standard error with the objective and the time left.

    Args:
        total: steps.
        show: ``"auto"`` shows it if standard error is a terminal; a callable is told instead.
        label: what is fitted.
    """
    if callable(show):
        yield show
        return
    if show not in (True, False, "auto"):
        raise ValueError(
            f"progress must be one of True, False, 'auto', or a callable of the steps done and "
            f"the objective; got {show!r}"
        )
    if not (sys.stderr.isatty() if show == "auto" else show):
        yield lambda step, value: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[value]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, value="")
        yield lambda step, value: bar.update(
            task, completed=step, value=f"{value:.3f} nats per datum"
        )
