"""Several processes that compute one result: ranks of ``torch.distributed``.

Under ``torchrun``, or in a script that has initialised ``torch.distributed``, functions of the
package share their work: each process holds some of the rows, sums over rows are added up over
the processes, and all of them get the same result. A single process has no messages to exchange,
and the functions of :class:`Processes` return what they are given, so that callers have one path.

Every process must call the same functions in the same order with the same arguments, apart from
the rows that are its own. What differs is an error that names the rank.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ppl_vae.core.errors import ProcessError
from ppl_vae.core.processes.messages import record
from ppl_vae.core.processes.others import announce, describe_others

_SINGLE: ContextVar[bool] = ContextVar("single process", default=False)


@contextmanager
def single_process() -> Iterator[None]:
    """Context manager: functions inside do not share their work with other processes.

    Use it where a process does something alone, such as an evaluation on rank 0 only, which would
    otherwise wait for the others; also as a decorator.
    """
    token = _SINGLE.set(True)
    try:
        yield
    finally:
        _SINGLE.reset(token)


@dataclass(frozen=True)
class Processes:
    """The processes that share a computation, and this one among them.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes, P.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Self:
        """The default group of ``torch.distributed``, or one process.

        It is one process where ``torch.distributed`` is not initialised, and inside
        :func:`single_process`.
        """
        if _SINGLE.get() or not (dist.is_available() and dist.is_initialized()):
            return cls()
        own = dist.get_rank()
        announce(own)
        return cls(own, dist.get_world_size())

    def share(self, num_rows: int) -> slice:
        """The consecutive rows of a table of N rows that are this process's share.

        The numbers of rows differ by at most one; with fewer rows than processes some have none.
        """
        small, larger = divmod(num_rows, self.size)
        start = self.rank * small + min(self.rank, larger)
        return slice(start, start + small + (self.rank < larger))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in the tensor's dtype, with the same bits on all of them.

        The order of the additions is fixed by the number of processes.
        """
        record("sum", tensor.nbytes)
        if self.size == 1:
            return tensor
        total = tensor.detach().to(_backend_device(tensor.device), copy=True).contiguous()
        with self._exchange():
            dist.all_reduce(total)
        return total.to(tensor.device)

    def wait(self) -> None:
        """Wait until all processes have called this function.

        Raises:
            ProcessError: if another process has ended.
        """
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(torch.zeros(1, device=_backend_device(torch.device("cpu"))))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0."""
        record("broadcast", tensor.nbytes)
        if self.size == 1:
            return tensor
        copy = tensor.detach().to(_backend_device(tensor.device), copy=True).contiguous()
        with self._exchange():
            dist.broadcast(copy, src=0)
        return copy.to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes by rank, of one dtype; their first dimensions may differ.

        Args:
            tensor: a tensor of at least one dimension.
        """
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        parts = self._gather_bytes(flat)
        shape = tensor.shape[1:]
        return [part.view(tensor.dtype).reshape(-1, *shape) for part in parts]

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, in order of the ranks."""
        return torch.cat(self.gather(tensor)) if self.size > 1 else self.gather(tensor)[0]

    def gather_text(self, text: str) -> list[str]:
        """The texts of all processes, by rank."""
        encoded = torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())
        return [part.numpy().tobytes().decode() for part in self._gather_bytes(encoded)]

    def replicate(self, tensors: Iterable[Tensor]) -> None:
        """Set tensors of any dtype to those of rank 0, in place."""
        for tensor in tensors if self.size > 1 else ():
            bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            value = self.broadcast(bits).view(tensor.dtype).reshape(tensor.shape)
            with torch.no_grad():
                tensor.copy_(value)

    def broadcast_bytes(self, data: bytes) -> bytes:
        """The bytes of rank 0."""
        given = data if self.rank == 0 else b""
        flat = torch.from_numpy(np.frombuffer(given, dtype=np.uint8).copy())
        length = int(self.broadcast(torch.tensor([len(flat)])))
        flat = flat if self.rank == 0 else torch.zeros(length, dtype=torch.uint8)
        return self.broadcast(flat).numpy().tobytes()

    def _gather_bytes(self, data: Tensor) -> list[Tensor]:
        record("gather", data.nbytes)
        if self.size == 1:
            return [data]
        device = _backend_device(data.device)
        length = torch.tensor([len(data)], device=device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        with self._exchange():
            dist.all_gather(lengths, length)
        longest = int(torch.cat(lengths).max())
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: len(data)] = data.to(device)
        parts = [torch.zeros_like(padded) for _ in range(self.size)]
        if longest:
            with self._exchange():
                dist.all_gather(parts, padded)
        return [
            part[: int(number)].to(data.device).clone()
            for part, number in zip(parts, lengths, strict=True)
        ]

    def agree(self, function: str, **arguments: Any) -> dict[str, str]:
        """Check that all processes call the same function with the same arguments.

        Args:
            function: its name.
            **arguments: what must be equal, compared by ``str``; a process may lack some.

        Returns:
            The arguments that any process has, as texts.

        Raises:
            ValueError: naming the first rank and argument that differ from those of a lower rank.
        """
        given = {name: str(value) for name, value in arguments.items()}
        if self.size == 1:
            return given
        known: dict[str, tuple[int, str]] = {}
        for rank, status in enumerate(self._exchange_status(call=function, arguments=given)):
            for name, value in status["arguments"].items():
                first, expected = known.setdefault(name, (rank, value))
                if value != expected:
                    raise ValueError(_difference(function, name, first, expected, rank, value))
        return {name: value for name, (_, value) in known.items()}

    def _exchange_status(
        self, call: str = "", arguments: dict[str, str] | None = None, error: str = ""
    ) -> list[dict[str, Any]]:
        # What each process does: the function that it begins, its arguments, or its error.
        own = {"call": call, "arguments": arguments or {}, "error": error}
        found = [json.loads(text) for text in self.gather_text(json.dumps(own))]
        if not error:
            self.raise_failure([each["error"] for each in found])
            for rank, each in enumerate(found):
                if each["call"] != found[0]["call"]:
                    called, expected = (
                        one["call"] or "another function" for one in (each, found[0])
                    )
                    raise ValueError(_other_call(rank, called, expected))
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context manager: an error inside, on one process, is an error on all of them.

        Without it the others would wait for messages that never come. The block must not exchange
        messages itself.

        Raises:
            ProcessError: on the other processes, naming the rank and its error.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            if not isinstance(error, ProcessError):
                self._exchange_status(error=describe_error(error))
            raise
        self._exchange_status()

    def raise_failure(self, texts: Sequence[str]) -> None:
        """Raise an error for the first process with a text, which describes its error.

        Raises:
            ProcessError: if there is one.
        """
        for rank, text in enumerate(texts):
            if text:
                raise ProcessError(f"rank {rank} of {self.size} failed: {text}")

    def common_seed(self, seed: int | None) -> int | None:
        """The given seed; if it is None and there are several processes, one that rank 0 draws."""
        if seed is not None or self.size == 1:
            return seed
        return int(self.broadcast(torch.randint(2**62, (1,))))

    def own_seed(self, seed: int | None, *counters: int) -> int | None:
        """The seed of this process's own draws; that of a single process is the given one.

        Args:
            seed: the same on all processes.
            *counters: distinguish several sequences of draws with one seed.
        """
        if seed is None or self.size == 1:
            return seed
        sequence = np.random.SeedSequence([seed % 2**64, self.rank, *counters])
        return int(sequence.generate_state(1, np.uint64)[0] >> 1)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        # Errors of the backend say which address is gone, and not which rank.
        try:
            yield
        except RuntimeError as error:
            cause = str(error).strip().splitlines()[0][:200]
            raise ProcessError(
                f"rank {self.rank} of {self.size} got no message from the others: "
                f"{describe_others(self.rank, self.size)} ({cause})"
            ) from error


SINGLE = Processes()
"""One process, which has all rows."""


def describe_error(error: BaseException) -> str:
    """The type and the message of an error."""
    return f"{type(error).__name__}: {error}"


def _backend_device(device: torch.device) -> torch.device:
    """The device itself if the backend takes its tensors, else one whose tensors it takes."""
    kinds = [part.split(":")[0] for part in dist.get_backend_config().split(",")]
    return device if device.type in kinds else torch.device(kinds[0])


def _difference(function: str, name: str, first: int, expected: str, rank: int, value: str) -> str:
    return (
        f"{function}: {name} is {value} on rank {rank} and {expected} on rank {first}; it must be "
        "the same on all processes"
    )


def _other_call(rank: int, called: str, expected: str) -> str:
    return (
        f"rank {rank} calls {called} where rank 0 calls {expected}; every process must call the "
        "same functions in the same order (ppl_vae.core.single_process lets one work alone)"
    )
