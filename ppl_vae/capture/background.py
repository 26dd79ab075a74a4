"""Graphs that another process compiles, while this one goes on with its work.

The other process writes the code to the cache of torch's compiler, from which this process loads
it in about a second; nothing here waits for the compiler. It has a low priority, ends with
this process however that ends, and receives no interrupt from the keyboard.
"""

import contextlib
import copy
import importlib
import io
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from ppl_vae.capture import compile_worker
from ppl_vae.capture.graph import CompilationError

FlatFunction: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]
"""A function from a flat list of tensors to a flat sequence of tensors."""
WORKER = compile_worker.__file__
"""The program that compiles."""
MILLISECONDS_TO_END = 500
"""The time in which an abandoned compiler may remove its own temporary files."""


def can_compile_in_background(device: torch.device) -> bool:
    """Whether graphs on a device can be compiled by another process."""
    # Found without importing the compiler, which takes seconds.
    found = Path(torch.__file__).parent / "_inductor" / "standalone_compile.py"
    return device.type == "cpu" and os.name == "posix" and found.is_file()


class BackgroundCompilation:
    """The compilation of a graph by another process.

    Args:
        graph: a graph of tensor operations.
        flat: arguments of the shapes that it will be called with.
        options: options of the compiler.
        recording_seconds: the time in which the graph was recorded, to which that of compiling
            is compared; by default that is not done.

    Attributes:
        seconds: the seconds until it was found to be ready.
    """

    def __init__(
        self,
        graph: GraphModule,
        flat: Sequence[Tensor],
        options: dict[str, Any],
        recording_seconds: float = 0.0,
    ) -> None:
        lifted, self._constants = lift_constants(graph)
        self._start, self.seconds = time.perf_counter(), 0.0
        self._folder = Path(tempfile.mkdtemp(prefix="ppl_vae_compile_"))
        layouts = [(t.shape, t.stride(), t.dtype) for t in (*flat, *self._constants)]
        nodes, started_at = compile_worker.describe_graph(lifted), time.time()
        task = nodes, layouts, options, torch.get_num_threads(), started_at, recording_seconds
        (self._folder / compile_worker.TASK).write_bytes(pickle.dumps(task))
        self._process = _start_worker(self._folder)
        self.abandon = weakref.finalize(self, _end, self._process, self._folder, os.getpid())
        """End the compilation and remove its files; called at the latest when Python ends."""

    @property
    def is_ready(self) -> bool:
        """Whether the compiler has ended."""
        if self._process.poll() is None:
            return False
        self.seconds = self.seconds or time.perf_counter() - self._start
        return True

    def load(self) -> FlatFunction:
        """The compiled function, when the compiler has ended; it is waited for until then.

        Raises:
            CompilationError: if it has failed.
        """
        code = self._process.wait()
        self.seconds = self.seconds or time.perf_counter() - self._start
        try:
            if code:
                raise CompilationError(f"it cannot be compiled ({self._reason(code)})")
            run = _load(self._folder / compile_worker.CODE)
        finally:
            self.abandon()
        return lambda flat: run(*flat, *self._constants)

    def _reason(self, code: int) -> str:
        file = self._folder / compile_worker.FAILURE
        return file.read_text() if file.is_file() else f"the compiler ended with code {code}"


def lift_constants(graph: GraphModule) -> tuple[Graph, list[Tensor]]:
    """A graph whose constant tensors are its last arguments, and these tensors."""
    nodes = copy.deepcopy(graph.graph)
    last = [node for node in nodes.nodes if node.op == "placeholder"][-1]
    constants: list[Tensor] = []
    for number, node in enumerate(list(nodes.find_nodes(op="get_attr"))):
        constants.append(getattr(graph, str(node.target)))
        with nodes.inserting_after(last):
            last = nodes.placeholder(f"constant_{number}")
        node.replace_all_uses_with(last)
        nodes.erase_node(node)
    return nodes, constants


def _start_worker(folder: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": compile_worker.cache_dir(),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no further processes
        "TMPDIR": str(folder),
    }
    command = [sys.executable, "-P", WORKER, str(folder)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # which ends with this process
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Not a new session: Linux shares the processor evenly between sessions, and its low
        # priority would count only among the processes of its own.
        process_group=0,
        env=environment,
    )


CPP_EXTENSION = "torch.utils.cpp_extension"


def import_cpp_extension() -> None:
    """Import the module of the compiler that writes to standard error."""
    # The compiler imports this module, which reports at its import that there is no GPU, on
    # standard error, even if code is compiled for the CPU.
    if CPP_EXTENSION in sys.modules:
        return
    logger = logging.getLogger(CPP_EXTENSION)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(CPP_EXTENSION)
    finally:
        logger.setLevel(before)


def _load(path: Path) -> Callable[..., Any]:
    import_cpp_extension()
    from torch._inductor.standalone_compile import CompiledArtifact

    return CompiledArtifact.load(path=str(path), format="binary")


def _end(process: subprocess.Popen[bytes], folder: Path, owner: int) -> None:
    if os.getpid() != owner:  # a forked copy of the process that waits
        return
    # The signal goes to the group, since the worker runs a compiler of C++.
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        if _has_ended(process):
            break
    if process.stdin is not None:
        process.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether all processes of the worker's group end within a moment."""
    for _ in range(MILLISECONDS_TO_END // 5):
        if process.poll() is not None:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return True
        time.sleep(0.005)
    return False
