"""Functions of tensors recorded once and run as compiled code, on a GPU as one replayed graph."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from pyro import poutine
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from ppl_vae.capture.graph import CaptureError, first_line
from ppl_vae.capture.matmul import with_fastest_products
from ppl_vae.core.state import kept_generators, precision

MOST_SIGNATURES = 8
"""Shapes for which one function is compiled; the next is refused, as each costs much time."""
Run: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]


class Compiled:
    """A pure function of tensors, recorded and compiled for each shape that it meets.

    Args:
        recorder: what records it for arguments of some shapes: gives code from the flat list of
            their tensors, and how its results are nested (as :func:`.recording.record`).
        compiled: whether to compile what is recorded; without, it is slow, and the same.
        options: of the compiler.
        precision: of matrix products, see :func:`ppl_vae.core.state.precision`.
    """

    def __init__(
        self,
        recorder: Callable[..., tuple[GraphModule, Any]],
        *,
        compiled: bool = True,
        options: dict[str, Any] | None = None,
        precision: str = "float32",
    ) -> None:
        self.recorder, self.precision = recorder, precision
        self.compiled, self.options = compiled, options
        self._runs: dict[Any, tuple[Run, Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """The function's result; on a GPU its tensors are overwritten by the next call.

        Raises:
            CaptureError: at a first call, if the function cannot be recorded or compiled.
        """
        flat = pytree.tree_leaves(args)
        key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in flat)
        if key not in self._runs:
            if len(self._runs) >= MOST_SIGNATURES:
                raise CaptureError(f"it has met {MOST_SIGNATURES} shapes already")
            devices = list({t.device for t in flat if t.device.type == "cuda"})
            with kept_generators(devices), poutine.block():
                self._runs[key] = self._first(args, flat)
        run, structure = self._runs[key]
        with torch.no_grad(), self._setting(flat):
            return pytree.tree_unflatten(list(run(flat)), structure)

    def _first(self, args: Any, flat: list[Tensor]) -> tuple[Run, Any]:
        with precision(self.precision, flat[0].device):
            recorded, structure = self.recorder(*args)
        if not self.compiled:
            return (lambda tensors: recorded(*tensors)), structure
        try:
            run = _compile(recorded, flat, self.options)
            with torch.no_grad(), self._setting(flat):
                if flat[0].device.type == "cuda":
                    run = Replay(run, flat)
                run(flat)
        except Exception as error:  # no compiler, or one that fails
            raise CaptureError(f"it cannot be compiled ({first_line(error)})") from error
        return run, structure

    def _setting(self, flat: list[Tensor]) -> AbstractContextManager[None]:
        # What was recorded in bfloat16 rounds by itself; TF32 is a setting of the device.
        running = "float32" if self.precision == "bf16" else self.precision
        return precision(running, flat[0].device)


def _compile(recorded: GraphModule, flat: list[Tensor], options: dict[str, Any] | None) -> Run:
    recorded = with_fastest_products(recorded)
    for node in recorded.graph.nodes:  # of another recorder than the compiler's
        node.meta.pop("val", None)
        node.meta.pop("tensor_meta", None)
    from torch import _inductor  # takes a while to import
    from torch._dynamo.utils import get_metrics_context  # which torch 2.6 asks for

    # Without the sizes' environment the compiler does not look into its cache on disk.
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    with torch.no_grad(), tracing(context), get_metrics_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, which nobody can act on
        # Draws are those of an eager run from the same seed; the compiler's own are slower, too.
        options = {"fallback_random": True} | (options or {})
        code: Any = _inductor.compile(recorded, list(flat), options=options)
    return lambda tensors: code(*tensors)


def cuda_graph(call: Callable[[], Any]) -> Callable[[], None]:
    """The kernels that a call starts as one graph; returns what replays it.

    Random numbers are drawn anew at each replay, from the device's default generator.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up outside the graph
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Replay:
    """Calls of one function as replays of one graph, on tensors that stay where they are.

    Arguments are copied into the graph's own tensors, so a call costs one copy of each and one
    start on the device, whatever the number of kernels.

    Args:
        run: the function.
        flat: arguments of the shapes that it will get.
        graph_of: makes the graph; by default on CUDA.
    """

    def __init__(
        self,
        run: Run,
        flat: list[Tensor],
        graph_of: Callable[[Callable[[], Any]], Callable[[], None]] = cuda_graph,
    ) -> None:
        self.inputs = [tensor.detach().clone() for tensor in flat]
        self.outputs: Sequence[Tensor] = []

        def call() -> None:
            self.outputs = run(self.inputs)

        self.replay = graph_of(call)

    def __call__(self, flat: list[Tensor]) -> Sequence[Tensor]:
        """The function's results, which the next call overwrites."""
        with torch.no_grad():
            torch._foreach_copy_(self.inputs, flat)  # pyright: ignore[reportPrivateImportUsage]
        self.replay()
        return self.outputs
