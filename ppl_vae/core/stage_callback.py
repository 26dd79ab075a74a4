"""Callbacks that receive what a long computation does next."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class StageCallback(Protocol):
    """A function that receives the next stage, and its number of steps, 0 if it is not known."""

    def __call__(self, text: str, total: int = 0) -> None:
        """Begin a stage."""


def ignore_stages(text: str, total: int = 0) -> None:
    """Do nothing."""
