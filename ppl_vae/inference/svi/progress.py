"""Progress bars on the terminal."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable


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
        show: ``"auto"`` shows the bar if standard error is a terminal, or in a notebook with
            ipywidgets; a callable is called
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
    if not (sys.stderr.isatty() or _in_notebook() if show == "auto" else show):
        yield lambda step, value: None
        return
    with _rich_bar() as bar:
        task = bar.add_task(label, total=total, value="")
        yield lambda step, value: bar.update(
            task, completed=step, value=f"{value:.3f} nats per datum"
        )


def _in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel, where rich draws bars with ipywidgets."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    if type(running).__name__ != "ZMQInteractiveShell":
        return False
    return importlib.util.find_spec("ipywidgets") is not None


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[value]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
