"""Combinations of parameters, of which the default tests run a part."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def one_in(number: int, *parameters: Iterable[Any]) -> list[Any]:
    """All combinations; those that the default tests leave out are slow.

    Args:
        number: n; the default tests run one combination in n. They are spread as in a Latin
            square, so that each value of each parameter with at least ``number`` partners is among
            them.
        parameters: the values of each parameter.
    """
    found = []
    for pairs in itertools.product(*(enumerate(values) for values in parameters)):
        default = sum(position for position, _ in pairs) % number == 0
        marks = () if default else pytest.mark.slow
        found.append(pytest.param(*(value for _, value in pairs), marks=marks))
    return found
