"""Progress bars on the terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@runtime_checkable
class ProgressCallback(Protocol):
    """A function of the number of steps made and the latest objective in nats per datum."""

    def __call__(self, step: int, value: float) -> None:
        """Report the progress."""


@contextmanager
def progress_bar(
    total: int, show: bool | str | ProgressCallback, label: str = "SVI"
) -> Iterator[ProgressCallback]:
    """Context manager: a bar on standard error with the objective and the remaining time.

    Args:
        total: number of steps.
        show: ``"auto"`` shows the bar if standard error is a terminal; a callable is called
            instead of it.
        label: the name of what is fitted.

    Raises:
        ValueError: if ``show`` is none of these.
    """
    if callable(show):
        yield show
        return
    if show not in (True, False, "auto"):
        raise ValueError(
            f"progress must be one of True, False, 'auto', or a callable of the steps made and "
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
