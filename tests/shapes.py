"""The type checker behind the import hook: beartype, which alone cannot read ``typing.Self``."""

import random
from typing import Any, Self

import beartype
from beartype._check.code import codemain

# beartype evaluations at one entry of a list, at random: by a generator of its own, not Python's
# global one, which tests compare.
assert codemain.getrandbits.__self__ is random._inst
codemain.getrandbits = random.Random(0).getrandbits


# An int will do where a float is asked for.
_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def checked(function):
    """``beartype.beartype``, with ``Self`` read as ``Any``: methods are decorated one by one."""
    hints = getattr(function, "__annotations__", {})
    hints.update({name: Any for name, hint in hints.items() if hint is Self})
    return _beartype(function)
