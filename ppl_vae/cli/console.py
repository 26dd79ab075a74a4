"""Standard output and standard error: logging, progress, and output that cannot be written."""

import errno
import io
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Annotated, Any

import typer

LOG = logging.getLogger("ppl_vae")
BAR, NARROW_BAR = 30, 8
"""The width of a bar, and of one on a narrow terminal."""
WIDE = 80
"""The width of a terminal, in characters, from which on the objective is shown with its unit."""
SEND_AGAIN = 0.02
"""Seconds after which a signal that was lost is sent again."""


class _StandardErrorHandler(logging.Handler):
    # The stream is the one at the time of a message: a bar replaces it, to print above itself.
    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")


@contextmanager
def interrupting_signals(function: Callable[..., Any]) -> Iterator[list[int]]:
    """Raise a KeyboardInterrupt on SIGINT and SIGTERM inside a function, and only there.

    A signal that arrives before or after the function, where nothing would catch the exception,
    is only recorded. One that arrives in a destructor, from which no exception leaves, is sent
    again a moment later. Signals that are ignored stay ignored, as under ``nohup``.

    Args:
        function: called by the block that this context manager is around.

    Yields:
        the numbers of the signals received, in order.
    """
    received: list[int] = []
    code = function.__code__

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        if frame is not None:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        with _sent_again(received):
            yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _sent_again(received: list[int]) -> Iterator[None]:
    """Send a signal again whose KeyboardInterrupt was lost, in ``__del__`` or a callback of C.

    Python reports such an exception to ``sys.unraisablehook`` and goes on.
    """
    before, timers = sys.unraisablehook, []

    def hook(unraisable: Any) -> None:
        if not received or not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        timers.append(threading.Timer(SEND_AGAIN, os.kill, (os.getpid(), received[-1])))
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
        sys.unraisablehook = before


@dataclass(frozen=True)
class Verbosity:
    """How much a command reports on standard error."""

    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="report errors only on standard error")
    ] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="report details on standard error")
    ] = False

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Log to standard error while the block runs; warnings are logged as one line each.

        Raises:
            ValueError: if both options are given.
        """
        if self.quiet and self.verbose:
            raise ValueError("give --quiet or --verbose, not both")
        level = logging.ERROR if self.quiet else logging.DEBUG if self.verbose else logging.INFO
        handler = _StandardErrorHandler()
        before = LOG.level, LOG.propagate
        LOG.addHandler(handler)
        LOG.setLevel(level)
        LOG.propagate = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", UserWarning)
                warnings.showwarning = _log_warning
                yield
        finally:
            LOG.removeHandler(handler)
            LOG.level, LOG.propagate = before


def _log_warning(message: Any, *_: Any, **__: Any) -> None:
    LOG.warning("warning: %s", " ".join(str(message).split()))


def log_imports() -> None:
    """Log on a terminal that torch is imported, which takes seconds, if it has not been."""
    if "torch" not in sys.modules and sys.stderr.isatty():
        LOG.info("importing torch")


def log_notes(notes: tuple[str, ...]) -> None:
    """Log the caveats of a result."""
    for note in notes:
        LOG.warning("note: %s", note)


class StageDisplay:
    """The stages of a command on standard error: one line each, and on a terminal a bar."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None
        self._unit = ""

    def begin(self, text: str, total: int = 0) -> None:
        """Begin a stage.

        Args:
            text: what it does.
            total: the number of its steps; 0 if it is not known.
        """
        LOG.info("%s", text)
        if self._progress is not None:
            self._remove()
            self._task = self._progress.add_task("", total=total or None, value="")

    def update(self, step: int, value: float) -> None:
        """Update the number of steps made and the objective in nats per datum."""
        if self._progress is not None:
            shown = f"{value:.3f}{self._unit}"
            self._progress.update(self._task, completed=step, value=shown)

    def _remove(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)

    @contextmanager
    def live(self) -> Iterator["StageDisplay"]:
        """Draw the bar below the line of the stage, if standard error is a terminal.

        It has the objective, the time since the stage began and, where the number of steps is
        known, the time that is left.
        """
        if not (sys.stderr.isatty() and LOG.isEnabledFor(logging.INFO)):
            yield self
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        wide = console.width >= WIDE
        self._unit = " nats per datum" if wide else ""
        columns = (
            BarColumn(bar_width=BAR if wide else NARROW_BAR),
            TimeElapsedColumn(),
            _time_left(),
            TextColumn("{task.fields[value]}"),
        )
        with Progress(*columns, console=console, transient=True) as self._progress:
            try:
                yield self
            finally:
                self._progress = None


def _time_left() -> Any:
    """A column of a bar: "0:01:12 left"; empty until it is known. Fits may stop earlier."""
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            if task.time_remaining is None or task.total is None:
                return Text("")
            return Text(f"{timedelta(seconds=math.ceil(task.time_remaining))} left")

    return TimeLeft()


class GuardedOutput(io.RawIOBase):
    """Standard output or error that keeps the first error and drops what follows it.

    A closed pipe or a full disk under either must not prevent files from being written.

    Args:
        descriptor: the descriptor of the file.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self.descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self.descriptor)

    def write(self, data: Any) -> int:
        """Write bytes, or drop them after an error."""
        size = memoryview(data).nbytes
        if self.error is not None:
            return size
        try:
            return os.write(self.descriptor, data)
        except OSError as error:
            self.error = error
            return size

    def message(self) -> str:
        """The error in one line; empty if there was none."""
        if self.error is None:
            return ""
        reason = os.strerror(self.error.errno or errno.EIO)
        if self.error.errno == errno.EPIPE:
            reason = "its reader closed it"
        return f"standard output is incomplete: {reason}; what goes to files was written"


@contextmanager
def guarded_output(name: str) -> Iterator[GuardedOutput]:
    """Let standard output or error never raise while the block runs.

    Args:
        name: ``"stdout"`` or ``"stderr"``.
    """
    before = getattr(sys, name)
    try:
        before.flush()
        raw = GuardedOutput(before.fileno())
    except (OSError, ValueError, AttributeError):  # it is captured, or closed
        yield GuardedOutput(-1)
        return
    guarded = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=before.line_buffering,
    )
    setattr(sys, name, guarded)
    try:
        yield raw
    finally:
        guarded.flush()
        setattr(sys, name, before)
