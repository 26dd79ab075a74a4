"""Descriptions of programs, networks and functions, which differ where their behaviour does.

They hold names of classes, settings and checksums of the code that a user wrote, but no tensors.
"""

import functools
import hashlib
import inspect
from types import CodeType
from typing import Any

from torch import nn

from ppl_vae.core.config import constructor_call
from ppl_vae.core.introspection import bound_object
from ppl_vae.core.program import ProgramLike

LIBRARIES = ("torch", "pyro", "ppl_vae", "numpy", "builtins", "functools", "math")
"""Packages whose code is described by its name: a user does not change it."""
MAX_DEPTH = 3
"""How far functions that a function uses are followed."""


def describe_modules(modules: list[nn.Module]) -> dict[str, str]:
    """The class and the settings of every part of these modules, by its name in them."""
    found: dict[str, str] = {}
    for number, module in enumerate(modules):
        for name, part in module.named_modules():
            key = ".".join(filter(None, (type(module).__name__, name)))
            found[key if key not in found else f"{key} ({number})"] = _describe_module(part)
    return found


def _describe_module(part: nn.Module) -> str:
    call = constructor_call(part)
    name = repr(call) if call is not None else f"{type(part).__name__}({part.extra_repr()})"
    settings = ", ".join(_settings(part))
    code = "" if _is_of_library(type(part)) else _describe_method(type(part).forward)
    return " ".join(filter(None, (name, settings and f"with {settings}", code)))


def describe_program(program: ProgramLike) -> str:
    """A program: the class of its object and the code of its method, or the code of a function."""
    owner = bound_object(program)
    if isinstance(owner, nn.Module) or not callable(owner):
        method = getattr(program, "__func__", None)
        code = "" if method is None else _describe_method(method)
        return f"{type(owner).__name__} {code}".strip()
    return describe_callable(owner)


def describe_callable(value: Any, depth: int = 0) -> str:
    """A function, class, partial function or object, with the settings that it holds."""
    if isinstance(value, functools.partial):
        arguments = [*map(_describe_value, value.args)]
        arguments += [f"{k}={_describe_value(v)}" for k, v in value.keywords.items()]
        return f"{describe_callable(value.func, depth)}({', '.join(arguments)})"
    if isinstance(value, type):
        return value.__name__
    if inspect.ismethod(value):
        owner = _describe_object(value.__self__)
        return f"{owner} {_describe_method(value.__func__, depth)}"
    if inspect.isroutine(value):
        return _describe_method(value, depth)
    return _describe_object(value)


def _describe_object(value: Any) -> str:
    return f"{type(value).__name__}({', '.join(_settings(value))})"


def _describe_method(function: Any, depth: int = 0) -> str:
    name = getattr(function, "__qualname__", type(function).__name__)
    code = getattr(function, "__code__", None)
    if code is None or _is_of_library(function):
        return name
    checksum = hashlib.sha256(_code_text(code).encode()).hexdigest()[:8]
    used = [f"{k}={_describe_value(v, depth + 1)}" for k, v in _used_values(function, depth)]
    return f"{name} {checksum}" + (f" with {', '.join(used)}" if used else "")


def _used_values(function: Any, depth: int) -> list[tuple[str, Any]]:
    """Numbers, texts and functions that a function uses from around it."""
    try:
        around = inspect.getclosurevars(function)
    except (TypeError, ValueError):
        return []
    values = {**around.globals, **around.nonlocals}
    kept = (bool, int, float, str, functools.partial)
    return [
        (name, value)
        for name, value in sorted(values.items())
        if isinstance(value, kept) or (inspect.isroutine(value) and depth < MAX_DEPTH)
    ]


def _code_text(code: CodeType) -> str:
    """The instructions and constants of a function, without its place in a file."""
    constants = [
        _code_text(constant) if isinstance(constant, CodeType) else _constant_text(constant)
        for constant in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _constant_text(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _settings(owner: Any) -> list[str]:
    """The public attributes of an object that are numbers, texts or functions."""
    kept = (bool, int, float, str, tuple)
    return [
        f"{name}={_describe_value(value)}"
        for name, value in sorted(getattr(owner, "__dict__", {}).items())
        if not name.startswith("_") and name != "training"
        if isinstance(value, kept) or inspect.isroutine(value)
    ]


def _describe_value(value: Any, depth: int = MAX_DEPTH) -> str:
    if inspect.isroutine(value) or isinstance(value, functools.partial | type):
        return describe_callable(value, depth)
    plain = value is None or isinstance(value, bool | int | float | str | tuple)
    return repr(value) if plain else type(value).__name__


def _is_of_library(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "builtins").split(".")[0] in LIBRARIES
