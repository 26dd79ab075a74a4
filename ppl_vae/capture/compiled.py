"""Pure functions of tensors, captured once per shape and compiled; on a GPU as one CUDA graph."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ppl_vae.capture.background import (
    BackgroundCompilation,
    FlatFunction,
    can_compile_in_background,
    import_cpp_extension,
)
from ppl_vae.capture.device_graph import check_graph, move_constants
from ppl_vae.capture.graph import CaptureError, CompilationError, summarize_error
from ppl_vae.capture.matmul import select_fastest_matmul
from ppl_vae.capture.recorded import recorded_function
from ppl_vae.core.state import kept_generators, precision, validation, validation_enabled

MAX_SIGNATURES = 8
"""Shapes for which one function is compiled; further ones are refused, since each takes long."""


class CompiledFunction:
    """A pure function of tensors that is captured and compiled for each shape of its arguments.

    Args:
        capture: captures the function for given arguments; returns the graph and the structure
            of its results, as :func:`.graph.capture_graph` does.
        compiled: whether to compile the graph; without, it gives the same results slowly.
            ``"background"``: the graph runs as it was recorded while another process compiles it,
            and the code takes over when it is ready.
        options: options of ``torch.compile``.
        precision: the precision of matrix products, see :func:`ppl_vae.core.state.precision`.
        autotune_matmul: whether to time two BLAS libraries for each matrix product on a CPU and
            use the faster, see :mod:`ppl_vae.capture.matmul`. Results may then differ in the
            last digits from run to run.

    Attributes:
        recording_seconds: the time that the last recording took, NaN before it.
        compiles_in_background: whether another process can compile what was recorded last.
        compilation: the last compilation by another process, if there is one.
        failure: why that failed, or None.
    """

    def __init__(
        self,
        capture: Callable[..., tuple[GraphModule, Any]],
        *,
        compiled: bool | str = True,
        options: dict[str, Any] | None = None,
        precision: str = "float32",
        autotune_matmul: bool = False,
    ) -> None:
        self.capture, self.precision = capture, precision
        # With fallback_random, draws are those of an eager run with the same seed; the compiler's
        # own generator is also slower.
        self.compiled, self.options = compiled, {"fallback_random": True} | (options or {})
        self.autotune_matmul = autotune_matmul
        self.recording_seconds, self.compiles_in_background = math.nan, False
        self.compilation: BackgroundCompilation | None = None
        self.failure: CompilationError | None = None
        self._functions: dict[Any, tuple[FlatFunction, Any]] = {}
        self._graphs: dict[Any, GraphModule] = {}
        self._pending: Any = None
        self._requested = False

    def __call__(self, *args: Any) -> Any:
        """The function's result; on a GPU its tensors are overwritten by the next call.

        Raises:
            CaptureError: at the first call with these shapes, if the function cannot be captured
                or compiled.
        """
        flat = pytree.tree_leaves(args)
        key = self._key(args, flat)
        if self._requested:
            self.start(*args)
        if self._pending is not None and self.is_ready:
            self.finish()
        function, structure = self._functions[key]
        with torch.no_grad(), self._device_precision(flat):
            return pytree.tree_unflatten(list(function(flat)), structure)

    @property
    def is_ready(self) -> bool:
        """Whether no process is compiling."""
        return self._pending is None or (
            self.compilation is not None and self.compilation.is_ready
        )

    @property
    def is_compiled(self) -> bool:
        """Whether what another process has compiled is in use."""
        has_ended = self.compilation is not None and self._pending is None
        return has_ended and self.failure is None

    def request(self) -> None:
        """Let the next call start to compile the function, where another process can do so."""
        self._requested = self.compiles_in_background

    def start(self, *args: Any) -> None:
        """Record the function for arguments of these shapes, and start to compile it.

        Raises:
            CaptureError: if it cannot be captured.
        """
        self._requested = False
        key = self._key(args, flat := pytree.tree_leaves(args))
        if self.compiles_in_background and self.compilation is None:
            self._pending, graph = key, self._graphs[key]
            self.compilation = BackgroundCompilation(
                graph, flat, self.options, self.recording_seconds
            )

    def finish(self) -> None:
        """Take what another process compiles, which is waited for; the reason if it fails."""
        if self.compilation is None or self._pending is None:
            return
        key, self._pending = self._pending, None
        try:
            self._functions[key] = self.compilation.load(), self._functions[key][1]
        except Exception as error:  # the compiler's, of any kind
            self.failure = CompilationError(summarize_error(error))

    def abandon(self) -> None:
        """End what is being compiled."""
        if self.compilation is not None and self._pending is not None:
            self.compilation.abandon()
            self.compilation, self._pending = None, None

    def _key(self, args: Any, flat: list[Tensor]) -> Any:
        key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in flat)
        if key not in self._functions:
            if len(self._functions) >= MAX_SIGNATURES:
                raise CaptureError(
                    f"it has already been compiled for {MAX_SIGNATURES} combinations of shapes"
                )
            devices = list({t.device for t in flat if t.device.type != "cpu"})
            with kept_generators(devices), poutine.block():
                self._functions[key] = self._build(key, args, flat)
        return key

    def _build(self, key: Any, args: Any, flat: list[Tensor]) -> tuple[FlatFunction, Any]:
        start = time.perf_counter()
        with precision(self.precision, flat[0].device):
            graph, structure = self.capture(*args)
        self.recording_seconds = time.perf_counter() - start
        if flat[0].device.type != "cpu":
            move_constants(graph)
            if self.compiled is True:  # and replayed
                check_graph(graph, flat[0].device)
        self.compiles_in_background = self.compiled == "background" and can_compile_in_background(
            flat[0].device
        )
        if self.compiles_in_background:
            self._graphs = {key: graph}
        if self.compiled is not True:
            with torch.no_grad(), self._device_precision(flat):
                return recorded_function(graph, flat), structure
        if self.autotune_matmul:
            graph = select_fastest_matmul(graph)
        try:
            import_cpp_extension()
            function = _compile(graph, self.options)
            with torch.no_grad(), self._device_precision(flat), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own, which users cannot act on
                function(flat)  # compiles
                if flat[0].device.type == "cuda":
                    function = GraphReplay(function, flat)
        except Exception as error:  # there is no compiler, or it fails
            raise CompilationError(f"it cannot be compiled ({summarize_error(error)})") from error
        return function, structure

    def _device_precision(self, flat: list[Tensor]) -> AbstractContextManager[None]:
        # A graph captured in bfloat16 contains the rounding; TF32 is a setting of the device.
        setting = "float32" if self.precision == "bf16" else self.precision
        return precision(setting, flat[0].device)


def _compile(graph: GraphModule, options: dict[str, Any]) -> FlatFunction:
    for node in graph.graph.nodes:  # values of another tracer than the compiler's
        node.meta.pop("val", None)
        node.meta.pop("tensor_meta", None)
    # Dynamo switches the validation of distributions off for the whole process when it starts.
    with validation(validation_enabled()):
        function: Any = torch.compile(
            graph.forward, fullgraph=True, dynamic=False, options=options
        )

    def run(tensors: Sequence[Tensor]) -> Any:
        with validation(validation_enabled()):
            return function(*tensors)

    return run


def cuda_graph(call: Callable[[], Any]) -> Callable[[], None]:
    """Capture the kernels that a call launches as one CUDA graph; returns its replay.

    Random numbers are new at each replay, from the device's default generator.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries initialise themselves outside the graph
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class GraphReplay:
    """A function whose calls are replays of one graph that reads and writes fixed tensors.

    Arguments are copied to the tensors that the graph reads. A call thus costs one copy of all
    arguments and one launch, whatever the number of kernels.

    ``torch.cuda.make_graphed_callables`` is not used: it captures the forward and the backward
    pass of a part of a network for use inside autograd. Here the function is a complete step
    that contains its own gradients and optimizer and is called without autograd. Moreover that
    function makes the sample arguments themselves the fixed inputs, so that parameters of the
    pair would be overwritten by each call, and copies arguments one by one.

    Args:
        function: the function.
        flat: arguments of the shapes that it will be called with.
        make_graph: captures a call; by default as a CUDA graph.
    """

    def __init__(
        self,
        function: FlatFunction,
        flat: list[Tensor],
        make_graph: Callable[[Callable[[], Any]], Callable[[], None]] = cuda_graph,
    ) -> None:
        self.inputs = [tensor.detach().clone() for tensor in flat]
        self.outputs: Sequence[Tensor] = []

        def call() -> None:
            self.outputs = function(self.inputs)

        self.replay = make_graph(call)

    def __call__(self, flat: list[Tensor]) -> Sequence[Tensor]:
        """The function's results, which the next call overwrites."""
        with torch.no_grad():
            torch._foreach_copy_(self.inputs, flat)  # pyright: ignore[reportPrivateImportUsage]
        self.replay()
        return self.outputs
