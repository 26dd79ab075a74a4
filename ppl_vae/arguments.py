"""Checks of plain arguments, with messages that say what would do."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def choose_option(name: str, value: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """The option itself, if it is a known one.

    Raises:
        ValueError: if it is not; the message lists the known ones.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
    return value


def at_least(name: str, value: int, smallest: int = 1) -> int:
    """The whole number itself, if it is not too small.

    Raises:
        ValueError: if it is smaller than ``smallest`` or not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < smallest:
        raise ValueError(f"{name} must be a whole number >= {smallest}; got {value!r}")
    return int(value)
