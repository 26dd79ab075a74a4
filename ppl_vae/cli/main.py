"""The ``ppl-vae`` command."""

import os
import sys

import typer

from ppl_vae.cli import model_verbs, table_verbs
from ppl_vae.cli.app import FAILURE, MISTAKE, app
from ppl_vae.cli.console import guarded_output, terminable
from ppl_vae.cli.launched import error_prefix, has_nothing_to_do, launched_processes

__all__ = ["app", "main", "model_verbs", "table_verbs"]


def main() -> None:
    """Run the command; an error is one line on standard error and an exit status."""
    arguments = sys.argv[1:]
    if has_nothing_to_do(arguments):
        return
    with terminable(), guarded_output() as output:
        status = _run(arguments)
    if output.error is not None:
        _print_error(output.message())
        # The interpreter flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.descriptor)
    raise SystemExit(status or (FAILURE if output.error is not None else 0))


def _run(arguments: list[str]) -> int:
    try:
        with launched_processes(arguments):
            app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (ValueError, TypeError, FileNotFoundError) as error:
        return _fail(error, MISTAKE)
    # RuntimeError: torch's, such as a factorization that fails.
    except (ArithmeticError, OSError, RuntimeError, MemoryError, ImportError) as error:
        return _fail(error, FAILURE)
    return 0


def _fail(error: BaseException, status: int) -> int:
    lines = str(error).splitlines() or [type(error).__name__]
    _print_error(" ".join(line.strip() for line in lines))
    return status


def _print_error(text: str) -> None:
    typer.secho(
        f"{error_prefix()}error: {text}", fg="red" if sys.stderr.isatty() else None, err=True
    )
