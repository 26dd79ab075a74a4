"""Processes of ``torch.distributed`` for tests: they run functions, and never outlive them.

A broken collective waits instead of failing. Therefore messages have a timeout, results are waited
for with a timeout, and the processes are daemons that are terminated in the end.
"""

import atexit
import multiprocessing
import tempfile
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

SECONDS = 60
"""The largest number of seconds that a message, or the result of a function, may take."""
LOST = "got no message from the others"
"""Errors with these words are those of processes whose connections are gone."""
SECONDS_TO_START = 300
"""The largest number of seconds for importing the package, on a machine that does much else."""


def serve(rank, size, store, pipe):
    import warnings

    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS),
    )
    import svi_cases  # noqa: F401 - the package and the cases, before the first of them is timed

    pipe.send("ready")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            pipe.send((False, text))
            if LOST in text:  # the process ends, as a script would
                return


class Workers:
    """Processes that have initialised ``torch.distributed``."""

    def __init__(self, size):
        self.size, self.processes, self.pipes = size, [], []
        self.folder = tempfile.TemporaryDirectory()
        self.store = str(Path(self.folder.name) / "store")
        atexit.register(self.close)

    def start(self):
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            arguments = (rank, self.size, self.store, theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)
        for rank in range(self.size):
            assert self.receive(rank, SECONDS_TO_START) == "ready"

    def receive(self, rank, seconds=2 * SECONDS):
        if not self.pipes[rank].poll(seconds):
            self.close()
            raise TimeoutError(f"rank {rank} gives no result")
        return self.pipes[rank].recv()

    def outcomes(self, function, *args, each=None):
        """What the function returns or raises on each rank, as (returned, value or text).

        Args:
            function: a function at the top level of a module.
            *args: its arguments on all ranks.
            each: further arguments, one tuple for each rank.
        """
        if not self.processes:
            self.start()
        for rank, pipe in enumerate(self.pipes):
            pipe.send((function, (*args, *(each[rank] if each else ()))))
        found = [self.receive(rank) for rank in range(self.size)]
        if any(not returned and LOST in value for returned, value in found):
            self.close()  # the next function begins with new processes
        return found

    def run(self, function, *args, each=None):
        """What the function returns on each rank."""
        found = self.outcomes(function, *args, each=each)
        for rank, (returned, value) in enumerate(found):
            assert returned, f"rank {rank}: {value}"
        return [value for _, value in found]

    def errors(self, function, *args, each=None):
        """The text of the error that the function raises on each rank."""
        found = self.outcomes(function, *args, each=each)
        for rank, (returned, value) in enumerate(found):
            assert not returned, f"rank {rank} raises nothing and returns {value}"
        return [text for _, text in found]

    def close(self):
        for process in self.processes:
            process.terminate()
            process.join(5)
            if process.is_alive():
                process.kill()
        self.processes, self.pipes = [], []
        with suppress(OSError):
            Path(self.store).unlink()
