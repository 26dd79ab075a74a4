"""Rows of one table that several processes evaluate in shares; all of them get all results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from jaxtyping import Int
from torch import Tensor

from ppl_vae.core.arrays.digest import describe_tensor, tensor_digest
from ppl_vae.core.pair import Pair
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.state import seed_generators, seeded

TensorTuple = TypeVar("TensorTuple", bound=tuple[Any, ...])
"""A named tuple of tensors."""


@dataclass(frozen=True)
class DividedRows:
    """Rows that are evaluated, and the share of this process.

    A process without a share evaluates one row, whose result is dropped.

    Attributes:
        processes: the processes.
        own: the rows of this process.
        number: how many of them are its share.
        seed: the seed of draws that all processes have in common.
    """

    processes: Processes
    own: Int[Tensor, " R"]
    number: int
    seed: int | None

    @classmethod
    def of(
        cls,
        function: str,
        pair: Pair | None,
        describe: Callable[[], tuple[str, str | None]],
        rows: Int[Tensor, " N"],
        seed: int | None,
        **arguments: Any,
    ) -> Self:
        """This process's share of the rows, after a check that all processes agree.

        Args:
            function: the name of the public function.
            pair: the pair, whose parameters must be the same; None if there is no pair.
            describe: describes the whole table and its mask, with checksums.
            rows: the rows to evaluate.
            seed: the seed of the draws; None draws a seed on rank 0.
            **arguments: what must be the same on all processes.

        Raises:
            ValueError: naming the rank and the argument that differ.
        """
        processes = Processes.current()
        if processes.size == 1:
            return cls(processes, rows, len(rows), seed)
        x, mask = describe()
        processes.agree(
            function,
            x=x,
            mask=mask,
            rows=describe_tensor(rows),
            parameters=None if pair is None else _describe_parameters(pair),
            seed=seed,
            **arguments,
        )
        own = rows[processes.share(len(rows))]
        some = own if len(own) else rows[:1]
        return cls(processes, some, len(own), processes.common_seed(seed))

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Context manager: draws inside repeat for the seed, and differ between processes."""
        with seeded(self.seed):
            self.seed_own_draws()
            yield

    def seed_own_draws(self) -> None:
        """Let draws differ between processes from here on; inside a block of ``seeded``."""
        own = self.processes.own_seed(self.seed)
        if self.processes.size > 1 and own is not None:
            seed_generators(own)

    def gather(self, values: Tensor) -> Tensor:
        """The values of all rows, from those of this process's rows, in order."""
        if self.processes.size == 1:
            return values
        return self.processes.gather_rows(values[: self.number])

    def gather_columns(self, columns: TensorTuple) -> TensorTuple:
        """The same for several values of each row."""
        return type(columns)(*map(self.gather, columns))

    def complete(self, whole: Tensor, rows: Int[Tensor, " N"]) -> None:
        """Set rows of a table, of which this process has computed its own, to those of all.

        Args:
            whole: the table, (rows of the table, ...).
            rows: the rows that are evaluated.
        """
        if self.processes.size > 1:
            whole[rows] = self.gather(whole[self.own])


def _describe_parameters(pair: Pair) -> str:
    tensors = [p for module in pair.modules for p in (*module.parameters(), *module.buffers())]
    return f"of checksum {tensor_digest(tensors)[:16]}"
