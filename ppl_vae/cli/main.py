"""The ``ppl-vae`` command."""

import os
import re
import signal
import sys

import typer

from ppl_vae.cli import model_commands, table_commands
from ppl_vae.cli.app import FAILURE, INTERRUPTED, MISTAKE, TERMINATED, app
from ppl_vae.cli.console import guarded_output, interrupting_signals
from ppl_vae.cli.torchrun import error_prefix, has_nothing_to_do, launched_processes

__all__ = ["app", "main", "model_commands", "table_commands"]

ALLOCATION = re.compile(r"you tried to allocate (\d+) bytes")
"""What torch states where there is too little memory."""


def main() -> None:
    """Run the command; an error is one line on standard error and an exit status."""
    arguments = sys.argv[1:]
    if has_nothing_to_do(arguments):
        return
    with interrupting_signals(_run_guarded) as received:
        try:
            status = _run_guarded(arguments, received)
        except KeyboardInterrupt:  # before a command has begun, or while its output is flushed
            typer.echo("interrupted", err=True)
            status = INTERRUPTED
        if received and status:  # whatever else the signal led to
            status = TERMINATED if received[0] == signal.SIGTERM else INTERRUPTED
    raise SystemExit(status)


def _run_guarded(arguments: list[str], received: list[int]) -> int:
    if received:  # before this function was entered
        raise KeyboardInterrupt
    with guarded_output("stderr") as errors:
        with guarded_output("stdout") as output:
            status = _run(arguments)
        if output.error is not None:
            _print_error(output.message())
            status = status or FAILURE
    for stream in (output, errors):
        if stream.error is not None:  # the interpreter flushes it once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.descriptor)
    return status


def _run(arguments: list[str]) -> int:
    try:
        with launched_processes(arguments):
            app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # before a command has begun
        typer.echo("interrupted: no output was written", err=True)
        return INTERRUPTED
    except (ValueError, TypeError, FileNotFoundError) as error:
        return _fail(error, MISTAKE)
    # RuntimeError: torch's, such as a factorization that fails.
    except (ArithmeticError, OSError, RuntimeError, MemoryError, ImportError) as error:
        return _fail(error, FAILURE)
    return 0


def _fail(error: BaseException, status: int) -> int:
    lines = str(error).splitlines() or [type(error).__name__]
    if found := ALLOCATION.search(str(error)):
        lines = [
            f"there is too little memory for {int(found[1]) / 2**30:,.1f} GiB at once, which "
            "follow from the table and from --rows, --num-samples, --hidden and --batch-size, "
            "where the "
            "command has them"
        ]
    _print_error(" ".join(line.strip() for line in lines))
    return status


def _print_error(text: str) -> None:
    typer.secho(
        f"{error_prefix()}error: {text}", fg="red" if sys.stderr.isatty() else None, err=True
    )
