"""Commands from functions whose parameters are groups of options; importing it needs no torch."""

import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer

from ppl_vae.cli.app import INTERRUPTED
from ppl_vae.cli.console import Verbosity, log_imports

Group = TypeVar("Group")


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters of an option class are replaced by the options of that class.

    Every command also gets ``--quiet`` and ``--verbose``, and runs with the logging that they
    ask for.
    """
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    hints = typing.get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint):
            groups[parameter.name] = hint
            parameters += _parameters(hint)
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=kind, annotation=hint))
    verbosity = _parameters(Verbosity)

    def run(**given: Any) -> None:
        with _built(Verbosity, given).logging(), interruptible():
            log_imports()
            _check_seed(given)
            built = {name: _built(group, given) for name, group in groups.items()}
            command(**given, **built)

    functools.update_wrapper(run, command)
    found: Any = run
    del found.__wrapped__  # typer would read the signature of the command itself
    found.__signature__ = inspect.Signature([*parameters, *verbosity])
    found.__annotations__ = {p.name: p.annotation for p in (*parameters, *verbosity)}
    return found


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C into one line and an exit status."""
    try:
        yield
    except KeyboardInterrupt as error:
        reason = " ".join(map(str, error.args)) or "no output was written"
        sys.stderr.write(f"interrupted: {reason}\n")
        raise typer.Exit(INTERRUPTED) from error


def _check_seed(given: dict[str, Any]) -> None:
    if given.get("seed") is not None:
        from ppl_vae.fitted.settings import check_seed

        check_seed(given["seed"])


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty
            if field.default is dataclasses.MISSING
            else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]


def _built(group: Callable[..., Group], given: dict[str, Any]) -> Group:
    fields = dataclasses.fields(group)  # pyright: ignore[reportArgumentType]
    return group(**{field.name: given.pop(field.name) for field in fields})
