"""The calls of an evaluation: eager, recorded or compiled."""

import time
from collections.abc import Callable, Sequence
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
from ppl_vae.capture.policy import RECORDING_CALLS, CapturePolicy, seconds_per_call
from ppl_vae.core.devices.accelerators import synchronize

Result = TypeVar("Result")
Capture: TypeAlias = Callable[..., tuple[GraphModule, Any]]
"""Captures a function for given arguments, see :func:`ppl_vae.capture.graph.capture_graph`."""


class CallRunner:
    """Runs the calls of an evaluation eagerly, recorded or compiled, and records how and why.

    Args:
        capture: see :class:`ppl_vae.capture.policy.CapturePolicy`.
        num_calls: the expected number of calls.
        precision: of matrix products, see :func:`ppl_vae.core.state.precision`.
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
        self.policy, self.calls_left = CapturePolicy(capture), num_calls
        self.precision, self.compiled = precision, compiled
        self._functions: dict[Any, CompiledFunction] = {}
        self._usual: Any = None
        self._elapsed: list[float] = []

    @property
    def execution(self) -> str:
        """How calls ran, and why."""
        return self.policy.reason

    def run(
        self,
        key: Any,
        eager: Callable[[], Result],
        captured: Callable[[CompiledFunction], Result],
        capture: Capture,
        *,
        repeats: int,
        usual: bool | None = None,
    ) -> Result:
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
        while self.policy.mode in (True, "recorded") and (is_usual or repeats >= RECORDING_CALLS):
            try:
                return captured(self._function(key, capture, usual=is_usual))
            except CaptureError as error:
                self.policy.disable(error)
        if self.policy.mode == "auto":
            return self._timed(eager)
        return eager()

    def _function(self, key: Any, capture: Capture, *, usual: bool) -> CompiledFunction:
        compiled = self.policy.mode is True and self.compiled and usual
        if (compiled, key) not in self._functions:
            if len(self._functions) >= MAX_SIGNATURES:
                self._functions.pop(next(iter(self._functions)))
            self._functions[compiled, key] = CompiledFunction(
                capture, compiled=compiled, precision=self.precision
            )
        return self._functions[compiled, key]

    def _timed(self, eager: Callable[[], Result]) -> Result:
        start = self._clock()
        result = eager()
        before = self._elapsed[-1] if self._elapsed else 0.0
        self._elapsed.append(before + self._clock() - start)
        if (seconds := seconds_per_call(self._elapsed)) > 0:  # or NaN
            self.policy.decide(self.calls_left, seconds)
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
