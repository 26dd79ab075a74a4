"""Finds the torch modules that a plain function uses, from its bytecode.

A user's program may be a function that reads its networks from around it, as ``decoder(z)`` or
``nets["mine"](z)``. Each such reading is a chain in the function's code: a name, then attributes
and constant subscripts. Only the object at the end of the chain counts as used.
"""

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

MISSING = object()
_NAMES = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_CONSTANTS = ("LOAD_CONST", "LOAD_SMALL_INT")
_LOCALS = ("LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK")


def used_modules(program: Callable[..., Any], home: str | None) -> list[nn.Module]:
    """The modules that a function, a bound method or a ``functools.partial`` uses, each once.

    Its default arguments and what a partial binds count as used. A container that is subscripted
    by anything but a constant counts as used as a whole.

    Args:
        program: the function.
        home: name of the Python module within which other functions and objects are followed.
    """
    found = _in_value(program, home, set())
    return list({id(module): module for module in found}.values())


def _in_value(value: Any, home: str | None, visited: set[int]) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
        return
    if isinstance(value, type) or id(value) in visited:
        return
    visited.add(id(value))
    for part in _parts(value, home, visited):
        yield from _in_value(part, home, visited)


def _parts(value: Any, home: str | None, visited: set[int]) -> list[Any]:
    """What a value holds or reads that may be, hold or use a module."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, list | tuple | set):
        return list(value)
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, types.MethodType) and inspect.isfunction(value.__func__):
        return [*_read_by(value.__func__, value.__self__), *_defaults(value.__func__)]
    if inspect.isfunction(value):
        # Functions are followed within the program's own Python module, not into libraries.
        return [*_read_by(value), *_defaults(value)] if value.__module__ == home else []
    if type(value).__module__ == home:  # an object of the user's own: its call, or all it holds
        call = inspect.getattr_static(type(value), "__call__", None)
        if inspect.isfunction(call):
            return _read_by(call, value)
        return list(getattr(value, "__dict__", {}).values())
    return []


def _defaults(function: types.FunctionType) -> list[Any]:
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _read_by(function: types.FunctionType, bound_to: Any = MISSING) -> list[Any]:
    """The values at the ends of the chains in a function's code, and in functions inside it."""
    wrapped = getattr(function, "__wrapped__", None)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    names = {name: _contents(cell) for name, cell in cells.items()}
    first = function.__code__.co_varnames[:1] if bound_to is not MISSING else ()
    found = _chains(function.__code__, names, function.__globals__, dict.fromkeys(first, bound_to))
    return [*found, *([wrapped] if inspect.isfunction(wrapped) else [])]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return MISSING


def _chains(
    code: types.CodeType,
    closure: Mapping[str, Any],
    outer: Mapping[str, Any],
    local: Mapping[str, Any],
) -> Iterator[Any]:
    instructions = [i for i in dis.get_instructions(code) if i.opname != "CACHE"]
    for place, instruction in enumerate(instructions):
        value = _named(instruction, closure, outer, local)
        if value is not MISSING:
            yield _followed(value, instructions[place + 1 :], closure, outer)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _chains(inner, closure, outer, {})


def _named(
    instruction: dis.Instruction,
    closure: Mapping[str, Any],
    outer: Mapping[str, Any],
    local: Mapping[str, Any],
) -> Any:
    name = instruction.argval
    if instruction.opname in _NAMES:
        return closure[name] if name in closure else outer.get(name, MISSING)
    if instruction.opname in _LOCALS:
        return local.get(name, MISSING)
    return MISSING


def _followed(
    value: Any,
    rest: list[dis.Instruction],
    closure: Mapping[str, Any],
    outer: Mapping[str, Any],
) -> Any:
    """The value after the attributes and constant subscripts that follow its name."""
    while rest and not isinstance(value, nn.Module):
        if rest[0].opname in _ATTRIBUTES:
            step, used = _attribute(value, rest[0].argval), 1
        elif len(rest) > 1 and _is_subscript(rest[1]):
            constant = rest[0].opname in _CONSTANTS
            key = rest[0].argval if constant else _named(rest[0], closure, outer, {})
            step, used = _item(value, key), 2
        else:
            break
        if step is MISSING:
            break
        value, rest = step, rest[used:]
    return value


def _is_subscript(instruction: dis.Instruction) -> bool:
    return instruction.opname == "BINARY_SUBSCR" or (
        instruction.opname == "BINARY_OP" and instruction.argrepr == "[]"
    )


def _attribute(value: Any, name: str) -> Any:
    """An attribute without running a user's code, as a property or ``__getattr__`` would."""
    held = getattr(value, "__dict__", {})
    if name in held:
        return held[name]
    static = inspect.getattr_static(type(value), name, MISSING)
    if inspect.isfunction(static) and not isinstance(value, type | types.ModuleType):
        return types.MethodType(static, value)
    return MISSING


def _item(value: Any, key: Any) -> Any:
    if key is MISSING or not isinstance(value, dict | list | tuple):
        return MISSING
    try:
        return value[key]
    except (LookupError, TypeError):
        return MISSING
