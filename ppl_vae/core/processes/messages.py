"""A record of the messages that processes exchange: their kinds, sizes and numbers."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from ppl_vae.core.text_table import render

KINDS = ("sum", "broadcast", "gather")


@dataclass(frozen=True)
class MessageLog:
    """How often each message was exchanged, by its kind and the bytes that a process puts in.

    A single process exchanges nothing; what it would put in among others is recorded all the same.

    Attributes:
        counts: the number of messages of each (kind, bytes).
    """

    counts: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, kind: str, num_bytes: int) -> None:
        """Record one message."""
        self.counts[kind, num_bytes] += 1

    @property
    def num_messages(self) -> int:
        """The number of messages."""
        return self.counts.total()

    def sent_bytes(self, size: int) -> float:
        """The bytes that each of ``size`` processes sends in all.

        A sum of M bytes sends 2 (P - 1) / P M (a ring), a broadcast M from each process to the
        next, and a gathering (P - 1) M.

        Args:
            size: P.
        """
        factors = {"sum": 2 * (size - 1) / size, "broadcast": 1.0, "gather": size - 1.0}
        return sum(
            factors[kind] * num_bytes * number for (kind, num_bytes), number in self.counts.items()
        )

    def __str__(self) -> str:
        rows = [
            [kind, f"{num_bytes:,}", str(number)]
            for (kind, num_bytes), number in sorted(self.counts.items())
        ]
        return render(rows, ["message", "bytes", "number"])


_LOG: ContextVar[MessageLog | None] = ContextVar("message log", default=None)


@contextmanager
def record_messages() -> Iterator[MessageLog]:
    """Context manager: record the messages of this thread."""
    log = MessageLog()
    token = _LOG.set(log)
    try:
        yield log
    finally:
        _LOG.reset(token)


def record(kind: str, num_bytes: int) -> None:
    """Record a message, if messages are recorded."""
    if (log := _LOG.get()) is not None:
        log.add(kind, num_bytes)
