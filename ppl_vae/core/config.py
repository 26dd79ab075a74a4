"""Recording of constructor arguments, for ``repr`` and for loading."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
import torch
from torch.distributions import Distribution

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")
Plain: TypeAlias = bool | int | float | str | None
"""Argument values that JSON can hold."""

NUM_SHOWN = 3
"""The number of entries of a tensor that ``repr`` shows."""
UNRECORDED_ARGUMENTS = ("seed",)
"""Arguments that are not recorded: a seed only determines initial weights."""


@dataclass(frozen=True)
class OpaqueValue:
    """An argument that cannot be rebuilt from its description, such as a user's own network.

    Attributes:
        name: what ``repr`` shows in its place.
    """

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ArrayValue:
    """A parameter of a distribution: a number or an array.

    Attributes:
        values: the number, or the entries as nested tuples.
    """

    values: Any

    def __repr__(self) -> str:
        entries = np.asarray(self.values)
        shown = ", ".join(f"{entry:.3g}" for entry in entries.ravel()[:NUM_SHOWN])
        more = ", ..." if entries.size > NUM_SHOWN else ""
        return f"[{shown}{more}]" if entries.ndim else shown


@dataclass(frozen=True)
class ConstructorCall:
    """A call that made an object: the name of the callable and its arguments, defaults included.

    It prints as the call itself, without the arguments that are None.

    Attributes:
        name: qualified name of a class, a class method or a function, such as ``"VAE.mlp"``.
        arguments: by name; each is a plain value, a tuple of values, an :class:`ArrayValue`,
            another call or an :class:`OpaqueValue`.

    Example:
        >>> ConstructorCall("PPCA", {"data_dim": 8, "latent_dim": 2, "noise": "isotropic"})
        PPCA(data_dim=8, latent_dim=2, noise="isotropic")
    """

    name: str
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        given = {name: value for name, value in self.arguments.items() if value is not None}
        return f"{self.name}({', '.join(f'{k}={_format(v)}' for k, v in given.items())})"


def _format(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return f"({', '.join(map(_format, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def configurable(constructor: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """Decorate a constructor so that the objects it makes record the call.

    It decorates an ``__init__`` method, the function of a class method (below ``@classmethod``),
    or a function that returns a new object. A subclass with an ``__init__`` of its own is not
    recorded under the arguments of its base class.
    """
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def recorded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        result = constructor(*args, **kwargs)
        if constructor.__name__ != "__init__":
            _record(result, _name_of(constructor, args), signature, args, kwargs)
        elif type(args[0]).__init__ is recorded:
            _record(args[0], type(args[0]).__name__, signature, args, kwargs)
        return result

    return recorded


def _name_of(constructor: Callable[..., Any], args: tuple[Any, ...]) -> str:
    if args and isinstance(args[0], type):
        return f"{args[0].__name__}.{constructor.__name__}"
    return constructor.__name__


def _record(
    made: Any,
    name: str,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    skipped = {"self", "cls", *UNRECORDED_ARGUMENTS}
    arguments = {k: describe(v) for k, v in bound.arguments.items() if k not in skipped}
    made._constructor_call = ConstructorCall(name, arguments)


def constructor_call(value: Any) -> ConstructorCall | None:
    """The call that made an object, or None if it was not recorded.

    A dataclass is described by its fields, a distribution by its parameters.
    """
    if isinstance(value, Distribution) and value.arg_constraints:
        parameters = {
            name: ArrayValue(_as_tuple(torch.as_tensor(getattr(value, name)).tolist()))
            for name in value.arg_constraints
        }
        return ConstructorCall(type(value).__name__, parameters)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        arguments = {name: describe(getattr(value, name)) for name in fields}
        return ConstructorCall(type(value).__name__, arguments)
    return getattr(value, "_constructor_call", None)


def describe(value: Any) -> Any:
    """An argument as a :class:`ConstructorCall` records it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Plain):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(describe, value))
    call = constructor_call(value)
    return call if call is not None else OpaqueValue(_short_name(value))


def _as_tuple(values: Any) -> Any:
    return tuple(map(_as_tuple, values)) if isinstance(values, list) else values


def _short_name(value: Any) -> str:
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else f"{type(value).__name__}(...)"
