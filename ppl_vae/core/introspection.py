"""What a program is made of: the keywords in its signature, its modules, their placement and
notes."""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import _bound_partial
from torch import Tensor, nn

from ppl_vae.core.closures import used_modules
from ppl_vae.core.program import ProgramLike


def accepted_kwargs(program: ProgramLike) -> tuple[set[str], bool]:
    """The keywords in a program's signature, and whether it takes any others (``**kwargs``)."""
    program = _inside_handlers(program)
    if isinstance(program, AutoGuide | GuideMessenger) and program._model is not None:
        return accepted_kwargs(program.model)  # they pass all keywords on to it
    target = program.forward if isinstance(program, nn.Module) else program
    parameters = inspect.signature(target).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def filter_kwargs(program: ProgramLike, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``keywords`` that are not None and that the program's signature takes."""
    named, anything = accepted_kwargs(program)
    return {k: v for k, v in keywords.items() if v is not None and (anything or k in named)}


def bound_object(program: ProgramLike) -> Any:
    """The object of a bound method, a module, or the function itself.

    ``functools.partial`` and Pyro's handlers (``poutine.condition(model, ...)``) are unwrapped.
    """
    while not isinstance(program := _inside_handlers(program), nn.Module):
        bound_to = getattr(program, "__self__", None)
        if bound_to is not None:
            return bound_to
        # A handler is a partial too, but of Pyro's own function: what it wraps comes first.
        inner = getattr(program, "__wrapped__", None) or getattr(program, "func", None)
        if inner is None:
            return program
        program = inner
    return program


def _inside_handlers(program: Any) -> Any:
    # A handler or plate called on a program gives _bound_partial(partial(wrap, handler, program)).
    while isinstance(program, _bound_partial):
        inner: Any = program.func
        program = inner.args[1]
    return program


def own_modules(*programs: ProgramLike) -> list[nn.Module]:
    """The modules that programs are, are methods of, or hold (as an ``ExactGuide`` its model)."""
    owners = [bound_object(program) for program in programs]
    parts = [part for owner in owners for part in (owner, *getattr(owner, "_held", ()))]
    return _distinct(part for part in parts if isinstance(part, nn.Module))


def modules_of(*programs: ProgramLike) -> list[nn.Module]:
    """:func:`own_modules`, and the modules that a plain function uses from around it."""
    around = [part for p in programs for part in used_modules(p, _home(p))]
    return _distinct([*own_modules(*programs), *around])


def _home(program: ProgramLike) -> str | None:
    return getattr(bound_object(program), "__module__", None)


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())


def notes_of(*programs: ProgramLike) -> tuple[str, ...]:
    """The caveats (``notes()``) that the programs' modules state about their numbers, each
    once."""
    parts = [part for module in modules_of(*programs) for part in module.modules()]
    owners = [bound_object(program) for program in programs]
    methods: list[Any] = [getattr(part, "notes", None) for part in (*owners, *parts)]
    lists: list[Any] = [notes() for notes in methods if callable(notes)]
    return tuple(dict.fromkeys(itertools.chain.from_iterable(lists)))


def notes_on(model: ProgramLike, x: Tensor, mask: Tensor | None) -> tuple[str, ...]:
    """The caveats of a model's ``notes_on(x, mask)`` about a fit to these data, if it has one."""
    notes = getattr(bound_object(model), "notes_on", None)
    return () if notes is None else tuple(notes(x, mask))


def tensors_of(*programs: ProgramLike) -> Iterator[Tensor]:
    """Parameters and buffers of the programs' modules, in order."""
    for module in modules_of(*programs):
        yield from itertools.chain(module.parameters(), module.buffers())


def placement(*programs: ProgramLike) -> dict[str, Any]:
    """``dtype`` and ``device`` of the programs' first floating-point tensor; empty without one."""
    for tensor in tensors_of(*programs):
        if tensor.is_floating_point():
            return {"dtype": tensor.dtype, "device": tensor.device}
    return {}
