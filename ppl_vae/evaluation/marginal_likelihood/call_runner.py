"""The calls of an evaluation: eager, recorded or compiled."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

from torch import Tensor
from torch.fx import GraphModule

from ppl_vae.capture.compiled import MAX_SIGNATURES, CompiledFunction
from ppl_vae.capture.graph import (
    CaptureError,
    ModuleTensors,
    capture_graph,
    permuted,
    perturbed,
)
from ppl_vae.capture.policy import RECORDING_CALLS, CapturePolicy, is_worth_compiling
from ppl_vae.core.devices.accelerators import synchronize
from ppl_vae.core.devices.freed_memory import keep_freed_memory

Returned = TypeVar("Returned")
Capture: TypeAlias = Callable[..., tuple[GraphModule, Any]]
"""Captures a function for given arguments, see :func:`ppl_vae.capture.graph.capture_graph`."""


class CallRunner(CapturePolicy):
    """Runs the calls of an evaluation eagerly, recorded or compiled, and records how and why.

    Args:
        capture: see :class:`ppl_vae.capture.policy.CapturePolicy`.
        num_calls: the expected number of calls.
        precision: the precision of matrix products, see :func:`ppl_vae.core.state.precision`.
        compiled: whether what is to be compiled is, or is only run as recorded.
    """

    def __init__(
        self,
        capture: bool | str,
        num_calls: int,
        *,
        precision: str = "float32",
        compiled: bool = True,
    ) -> None:
        super().__init__(capture)
        keep_freed_memory()
        self.calls_left, self.precision, self.compiled = num_calls, precision, compiled
        self._functions: dict[Any, CompiledFunction] = {}
        self._usual: Any = None
        self._elapsed: list[float] = []

    @property
    def execution(self) -> str:
        """How calls ran, and why."""
        ready = [f.compilation for f in self._functions.values() if f.is_compiled]
        found = [compilation for compilation in ready if compilation is not None]
        if not found:
            return self.reason
        return f"{self.reason}; compiled in the background in {found[0].seconds:.0f} s"

    def run(
        self,
        key: Any,
        eager: Callable[[], Returned],
        captured: Callable[[CompiledFunction], Returned],
        capture: Capture,
        *,
        repeats: int,
        usual: bool | None = None,
    ) -> Returned:
        """The result of a call.

        Args:
            key: identifies the calls that can share captured code.
            eager: makes the call eagerly.
            captured: makes it by the captured function.
            capture: captures that function.
            repeats: the number of consecutive calls with this key; with few of them, calls of an
                unusual size run eagerly.
            usual: whether most calls have this size; by default those of the first call's.
        """
        self.calls_left -= 1
        self._usual = key if self._usual is None else self._usual
        is_usual = key == self._usual if usual is None else usual
        if not is_usual and repeats < RECORDING_CALLS:
            return eager()
        while self.mode in (True, "recorded"):
            try:
                function = self._function(key, capture, usual=is_usual)
                return self._timed(partial(captured, function))
            except CaptureError as error:
                self.disable(error)
        return self._timed(eager)

    def consider_compiling(self, seconds_left: float) -> None:
        """Begin to compile if that is worth its time; see the base class."""
        functions = [f for f in self._functions.values() if f.compiled == "background"]
        for function in functions:
            in_background, seconds = function.compiles_in_background, function.recording_seconds
            if not is_worth_compiling(seconds_left, seconds, in_background=in_background):
                continue
            if in_background:
                function.request()
            else:
                self.enable(True, f"about {seconds_left:.1f} s of recorded work were left")

    def close(self) -> None:
        """Abandon what is being compiled."""
        for function in self._functions.values():
            function.abandon()

    def _function(self, key: Any, capture: Capture, *, usual: bool) -> CompiledFunction:
        compiled: bool | str = self.compiled and usual and (self.mode is True or "background")
        if (self.mode, key) not in self._functions:
            if len(self._functions) >= MAX_SIGNATURES:
                self._functions.pop(next(iter(self._functions))).abandon()
            self._functions[self.mode, key] = CompiledFunction(
                capture, compiled=compiled, precision=self.precision
            )
        return self._functions[self.mode, key]

    def _timed(self, call: Callable[[], Returned]) -> Returned:
        if not self._undecided:
            return call()
        start = self._clock()
        result = call()
        before = self._elapsed[-1] if self._elapsed else 0.0
        self._elapsed.append(before + self._clock() - start)
        self.update(self.calls_left, self._elapsed)
        return result

    def _clock(self) -> float:
        synchronize()
        return time.perf_counter()


def record_with_modules(
    function: Callable[[list[Tensor]], Any],
    module_tensors: ModuleTensors,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    tensors: list[Tensor],
) -> tuple[GraphModule, Any]:
    """Record a function of tensors as a graph that takes the modules' tensors as inputs too."""

    def pure(parameters: Any, buffers: Any, tensors: list[Tensor]) -> Any:
        with module_tensors.substituted(parameters, [buffer.clone() for buffer in buffers]):
            return function(tensors)

    others = perturbed(parameters), buffers, permuted(tensors)
    return capture_graph(pure, (parameters, buffers, tensors), others)
