"""Progress bars on the terminal and in notebooks."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from ppl_vae.core.processes.ranks import Processes

REFRESH_SECONDS = 0.1
"""The shortest time between two updates of a bar in a notebook."""


@runtime_checkable
class ProgressCallback(Protocol):
    """A function of the number of steps made and the latest objective in nats per datum."""

    def __call__(self, step: int, value: float) -> None:
        """Report the progress."""


@contextmanager
def progress_bar(
    total: int, show: bool | str | ProgressCallback, label: str = "SVI"
) -> Iterator[ProgressCallback]:
    """Context manager: a bar with the objective and the remaining time.

    It is drawn on standard error and erased at the end; in a notebook it is the output of the
    cell, and keeps its last state.

    Args:
        total: number of steps.
        show: ``"auto"`` shows the bar if standard error is a terminal, or in a notebook; a
            callable is called instead of it.
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
    notebook = _in_notebook()
    if Processes.current().rank:
        show = False  # the bar of rank 0 is that of all processes
    if not (sys.stderr.isatty() or notebook if show == "auto" else show):
        yield lambda step, value: None
    elif notebook:
        bar = _NotebookBar(label, total)
        try:
            yield bar
        finally:
            bar.show(at_end=True)
    else:
        with _rich_bar() as bar:
            task = bar.add_task(label, total=total, value="")
            yield lambda step, value: bar.update(task, completed=step, value=_text(value))


def _text(value: float) -> str:
    return f"{value:.3f} nats per datum"


def _in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return type(running).__name__ == "ZMQInteractiveShell"


class _NotebookBar:
    # rich needs ipywidgets in a notebook, and leaves an empty output there.
    def __init__(self, label: str, total: int) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        self.label, self.total = label, total
        self.step, self.value = 0, ""
        self._start = self._shown = time.monotonic()
        self._handle = display(self._content(at_end=False), raw=True, display_id=True)

    def __call__(self, step: int, value: float) -> None:
        """Report the progress."""
        self.step, self.value = step, _text(value)
        if time.monotonic() - self._shown >= REFRESH_SECONDS:
            self.show(at_end=False)

    def show(self, *, at_end: bool) -> None:
        """Show the current state, with the remaining time unless the fit has ended."""
        self._shown = time.monotonic()
        self._handle.update(self._content(at_end=at_end), raw=True)

    def _content(self, *, at_end: bool) -> dict[str, str]:
        parts = [f"{self.step}/{self.total}", self.value]
        if self.step and not at_end:
            remaining = (self._shown - self._start) * (self.total / self.step - 1)
            parts.append(f"{remaining:.0f} s left")
        text = ", ".join(filter(None, parts))
        bar = f'<progress value="{self.step}" max="{self.total}"></progress>'
        return {
            "text/plain": f"{self.label}: {text}",
            "text/html": f"<pre>{self.label} {bar} {text}</pre>",
        }


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
