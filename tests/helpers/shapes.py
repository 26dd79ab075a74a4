"""Types and shapes of the package's arguments and results, checked whenever its functions run.

jaxtyping's import hook decorates every function. Its own decorator checks the arguments twice and
binds them by name in each call, which doubles the time of the tests. The one below checks once and
binds nothing, which only shapes that name an argument need; the package has none.
A local function is made anew whenever the function around it runs, and decorating it took a fifth
of the time of a lineage: it is checked the first time that it is made.
"""

import dataclasses
import functools
import inspect
import random
import typing
from typing import Any, Self

import beartype
import jaxtyping
from beartype._check.code import codemain

# beartype checks one entry of a list, at random: by a generator of its own, not Python's
# global one, which tests compare.
assert codemain.getrandbits.__self__ is random._inst
codemain.getrandbits = random.Random(0).getrandbits

jaxtyped = jaxtyping.jaxtyped
# An int will do where a float is asked for.
with_types = beartype.beartype(
    conf=beartype.BeartypeConf(is_pep484_tower=True, violation_type=TypeError)
)


_made = set()
"""The code of the local functions that were made before."""


def has_shape(hint):
    """Whether an annotation may contain a shape; one that is a string may."""
    if isinstance(hint, str):
        return True
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(has_shape(part) for part in typing.get_args(hint))


def with_shapes(function):
    """The function with sizes of its own: the same letter means the same size in one call."""

    @functools.wraps(function)
    def in_one_call(*args, **kwargs):
        with jaxtyped("context"):
            return function(*args, **kwargs)

    return in_one_call


def checked(target, **_):
    """A function with its types and shapes checked, or a dataclass with those of its fields."""
    if inspect.isclass(target):
        if dataclasses.is_dataclass(target) and "__init__" in vars(target):
            target.__init__ = checked(target.__init__)
        return target
    if "<locals>" in target.__qualname__:
        if target.__code__ in _made:
            return target
        _made.add(target.__code__)
    # beartype cannot read Self in methods that are decorated one by one.
    hints = target.__annotations__
    target.__annotations__ = {k: Any if hint is Self else hint for k, hint in hints.items()}
    function = with_types(target)
    target.__annotations__ = hints
    if any(map(has_shape, hints.values())):
        return with_shapes(function)
    return function


def check_package(name):
    """Check the functions of a package, which must not have been imported before."""
    jaxtyping.jaxtyped = lambda **_: checked
    jaxtyping.install_import_hook(name, None)
