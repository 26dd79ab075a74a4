"""The program of the process that compiles a graph for another one.

It is run as a script with the name of a folder, which holds the task and receives the code.
"""

import contextlib
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx.node import map_arg

REFERENCE = "node"
"""The first entry of a pair that stands for the result of another operation of a graph."""
TASK, CODE, FAILURE = "task.pkl", "code.bin", "failure.txt"
MEASURED = "ppl_vae_seconds_per_recorded_second.txt"
"""The file in the folder of the compiler's cache with the time that compiling took last, on this
machine, relative to that of recording. What was found in the cache does not count."""
NICENESS = 10
"""The lower priority of the compiler. On two cores whose threads all belonged to a fit, recorded
steps took an eighth longer and compiling 67 s; at 5 they took 45 % longer and it 40 s; at 19 it
did not end within 150 s."""


def cache_dir() -> str:
    """The folder of the compiler's cache."""
    # Imported where it is needed, since the compiler is not needed by most programs.
    from torch._inductor.runtime import cache_dir_utils

    return cache_dir_utils.cache_dir()


def describe_graph(graph: Graph) -> list[tuple[Any, ...]]:
    """The nodes of a graph without constants, as what can be pickled.

    torch pickles a graph as Python code that it runs again, in which random draws turn into
    constants.
    """

    def without_nodes(value: Any) -> Any:
        return map_arg(value, lambda node: (REFERENCE, node.name))  # pyright: ignore[reportArgumentType]

    return [
        (n.name, n.op, _name_of(n.target), without_nodes(n.args), without_nodes(n.kwargs))
        for n in graph.nodes
    ]


def _name_of(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return (*target._schema.name.split("::"), target._overloadname)
    return target


def build_graph(nodes: list[tuple[Any, ...]]) -> GraphModule:
    """The graph of :func:`describe_graph`."""
    graph, made = Graph(), {}

    def with_nodes(value: Any) -> Any:
        if isinstance(value, tuple) and len(value) == 2 and value[0] == REFERENCE:
            return made[value[1]]
        if isinstance(value, list | tuple):
            return type(value)(map(with_nodes, value))
        if isinstance(value, dict):
            return {key: with_nodes(inner) for key, inner in value.items()}
        return value

    for name, op, target, args, kwargs in nodes:
        if isinstance(target, tuple):
            namespace, packet, overload = target
            target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        made[name] = graph.create_node(op, target, with_nodes(args), with_nodes(kwargs), name)
    return GraphModule(nn.Module(), graph)


def main(folder: Path) -> None:
    """Compile the task in a folder."""
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    try:
        _compile(folder)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        (folder / FAILURE).write_text(f"{type(error).__name__}: {lines[0]}")
        sys.exit(1)


def _compile(folder: Path) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor import config, standalone_compile

    task = pickle.loads((folder / TASK).read_bytes())
    nodes, layouts, options, num_threads, started_at, recording_seconds = task
    torch.set_num_threads(num_threads)  # which the code will use
    examples: list[Any] = [
        torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in layouts
    ]
    with torch.no_grad(), config.patch(options):
        found = standalone_compile(
            build_graph(nodes), examples, dynamic_shapes="from_example_inputs", options={}
        )
    found.save(path=str(folder / CODE), format="binary")
    if recording_seconds > 0 and counters["inductor"]["fxgraph_cache_miss"]:
        note_measured_time((time.time() - started_at) / recording_seconds)


def note_measured_time(ratio: float) -> None:
    """Write the ratio of the times of compiling and recording, at once."""
    path = Path(cache_dir()) / MEASURED
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(f"{ratio:.1f}")
    partial.replace(path)


def measured_time() -> float | None:
    """The ratio of the times of compiling and recording on this machine, if it is known."""
    try:
        return float((Path(cache_dir()) / MEASURED).read_text())
    except (OSError, ValueError):
        return None


def _end_with_parent(folder: Path) -> None:
    # Standard input is a pipe from the process that waits for the code, and ends with it.
    while os.read(0, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
