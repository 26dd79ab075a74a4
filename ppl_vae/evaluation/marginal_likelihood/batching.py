"""Log weights computed batch by batch, with bounded memory, eagerly or as compiled code."""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.capture.compiled import CompiledFunction
from ppl_vae.capture.graph import (
    CaptureError,
    ModuleTensors,
    capture_graph,
    permuted,
    perturbed,
    store_parameters,
)
from ppl_vae.core.batch import Batch
from ppl_vae.core.devices.accelerators import synchronize
from ppl_vae.core.nonfinite import name_rows
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import precision as matmul_precision
from ppl_vae.core.traces import PairTraces
from ppl_vae.evaluation.local_guides.local_guide import LocalGuide
from ppl_vae.inference.svi.capture_policy import check_capture, is_worth_compiling

ROWS_AT_ONCE = {"cpu": 2**13, "accelerator": 2**17}
"""The number of rows (draws times data) that go through the programs at once."""
ENTRIES_AT_ONCE = 2**22
"""The largest number of entries of one tensor of draws, data or weights."""
DRAWS_AT_ONCE = 32
"""The number of draws of each datum that are made together from a guide that is not refined."""


def rows_at_once(x: Tensor) -> int:
    """The number of rows that may go through a pair at once on x's device, to bound memory."""
    rows = ROWS_AT_ONCE["cpu" if x.device.type == "cpu" else "accelerator"]
    return max(1, min(rows, ENTRIES_AT_ONCE // x.shape[1]))


def block_size(x: Tensor, num_samples: int, *, refined: bool) -> int:
    """The number of data whose weights, for all draws, are held together.

    Args:
        x: the data.
        num_samples: draws per datum.
        refined: whether a local guide is optimized for each batch. Large batches make these steps
            efficient; otherwise an encoder runs once for all draws that are made together, so
            that many draws do.
    """
    draws = 1 if refined else min(num_samples, DRAWS_AT_ONCE)
    return max(1, min(rows_at_once(x) // draws, ENTRIES_AT_ONCE // num_samples))


def check_no_nan(log_weights: Float[Tensor, "S B"], batch: Batch) -> None:
    """Check that no log weight of a batch is NaN.

    Raises:
        FloatingPointError: if one is, naming the rows.
    """
    wrong = log_weights.isnan().any(0)
    if bool(wrong.any()):
        raise FloatingPointError(
            f"log weights are NaN in {name_rows(wrong, batch)}; do the model and the guide give "
            "finite densities on these data?"
        )


class BlockRunner:
    """Runs the computation for each batch eagerly or compiled, and records which and why.

    Args:
        capture: ``"auto"`` (compiled if the remaining work is worth it), True or False.
        num_calls: the number of calls, all of about one size.
        compiled: whether captured code is compiled, or only run as a recorded graph.

    Attributes:
        execution: ``"captured"``, or ``"eager: "`` and the reason.
    """

    def __init__(self, capture: bool | str, num_calls: int, *, compiled: bool = True) -> None:
        self.capture, self.calls_left = check_capture(capture), num_calls
        self.compiled = compiled
        self.execution = (
            "eager: as requested"
            if capture is False
            else "eager: too little work to amortize compilation"
        )
        self._num_timed = 0

    def run(self, captured: Callable[[], Any], eager: Callable[[], Any]) -> Any:
        """The result of ``captured`` where that is chosen and possible, else of ``eager``."""
        self.calls_left -= 1
        if self.capture is True:
            try:
                result = captured()
                self.execution = "captured"
                return result
            except CaptureError as error:
                self.capture = False
                self.execution = f"eager: it could not be captured: {error}"
                warnings.warn(
                    f"the evaluation could not be captured, so it runs eagerly: {error}",
                    stacklevel=2,
                )
        if self.capture is False:
            return eager()
        return self._timed(eager)

    def _timed(self, eager: Callable[[], Any]) -> Any:
        start = self._clock()
        result = eager()
        self._num_timed += 1
        if self._num_timed > 1:  # the first call includes one-time costs
            seconds_left = (self._clock() - start) * self.calls_left
            self.capture, comparison = is_worth_compiling(seconds_left)
            self.execution = f"eager: {comparison}"
        return result

    def _clock(self) -> float:
        synchronize()
        return time.perf_counter()


class PairFunction:
    """A pair on one batch, as a function of the batch's tensors that can be captured.

    Args:
        pair: the pair.
        batch: the batch.
        several: whether several draws per datum will be made at once.

    Attributes:
        dim: the dimension of the plate of samples, see :meth:`ppl_vae.core.pair.Pair.sample_dim`.
        key: identifies the batches that can share captured code.
    """

    def __init__(self, pair: Pair, batch: Batch, *, several: bool) -> None:
        self.pair, self.batch = pair, batch
        self.dim = pair.sample_dim(batch) if several else None
        # Local guides of all batches have one structure; only their tensors differ.
        guide = LocalGuide if isinstance(pair.guide, LocalGuide) else pair.guide
        given = batch.mask is not None, batch.index is not None
        self.key = pair.model, guide, len(batch), self.dim, *given, batch.num_data

    def run(self, tensors: Sequence[Tensor], num_samples: int) -> PairTraces:
        """Run the pair on other tensors of the shapes of the batch's."""
        batch = self.batch.with_tensors(tensors)
        return self.pair.run(batch, num_samples=num_samples, dim=self.dim)

    def log_weights(self, tensors: Sequence[Tensor], num_samples: int) -> Float[Tensor, "S B"]:
        """log p(x, z) - log q(z | x) for S draws, on other tensors of the same shapes."""
        return self.run(tensors, num_samples).log_weights()


class LogWeightSampler:
    """Computes log importance weights of batches of data under a pair.

    Args:
        runner: decides between eager and compiled execution.
        precision: precision of matrix products, see :func:`ppl_vae.core.state.precision`.
    """

    def __init__(self, runner: BlockRunner, precision: str = "float32") -> None:
        self.runner, self.precision = runner, precision
        self._compiled: dict[Any, CompiledFunction] = {}
        self._last: tuple[Pair, ModuleTensors] | None = None

    @property
    def execution(self) -> str:
        """Whether the weights were computed eagerly or compiled, and why."""
        return self.runner.execution

    def __call__(self, pair: Pair, batch: Batch, num_samples: int) -> Float[Tensor, "S B"]:
        """log p(x, z) - log q(z | x) for S draws of the guide for each of B data, in float64."""
        draws = max(1, min(num_samples, rows_at_once(batch.x) // len(batch)))
        function = PairFunction(pair, batch, several=num_samples > 1)
        key = draws, *function.key
        # Code is compiled for the first shape alone; a smaller last batch runs eagerly.
        capturable = not self._compiled or key in self._compiled

        def eager(number: int = draws) -> Tensor:
            with matmul_precision(self.precision, batch.x.device):
                return _expanded_log_weights(function, batch.tensors, number)

        def captured() -> Tensor:
            module_tensors = self._module_tensors(pair, eager)
            if key not in self._compiled:
                trace = partial(_record_log_weights, function, module_tensors, draws)
                self._compiled[key] = CompiledFunction(
                    trace, compiled=self.runner.compiled, precision=self.precision
                )
            parameters = [p.detach() for p in module_tensors.parameters]
            return self._compiled[key](parameters, module_tensors.buffers, batch.tensors).clone()

        parts = [
            self.runner.run(captured, eager) if capturable else eager()
            for _ in range(num_samples // draws)
        ]
        if rest := num_samples % draws:
            parts.append(eager(rest))
        return torch.cat(parts)

    def _module_tensors(self, pair: Pair, run: Callable[[], Any]) -> ModuleTensors:
        if self._last is None or self._last[0] is not pair:
            with pair.dry_run():
                bare = store_parameters(pair.modules, run)
            self._last = pair, ModuleTensors.of(pair.modules, bare)
        return self._last[1]


def _expanded_log_weights(
    function: PairFunction, tensors: Sequence[Tensor], num_samples: int
) -> Float[Tensor, "S B"]:
    return function.log_weights(tensors, num_samples).double().expand(num_samples, -1)


def _record_log_weights(
    function: PairFunction,
    module_tensors: ModuleTensors,
    num_samples: int,
    parameters: Any,
    buffers: Any,
    tensors: list[Tensor],
) -> Any:
    def run(tensors: list[Tensor]) -> Tensor:
        return _expanded_log_weights(function, tensors, num_samples)

    return record_with_modules(run, module_tensors, parameters, buffers, tensors)


def record_with_modules(
    function: Callable[[list[Tensor]], Any],
    module_tensors: ModuleTensors,
    parameters: Any,
    buffers: Any,
    tensors: list[Tensor],
) -> Any:
    """Record a function of tensors as a graph that takes the modules' tensors as inputs too."""

    def pure(parameters: Any, buffers: Any, tensors: list[Tensor]) -> Any:
        with module_tensors.substituted(parameters, [buffer.clone() for buffer in buffers]):
            return function(tensors)

    others = perturbed(parameters), buffers, permuted(tensors)
    return capture_graph(pure, (parameters, buffers, tensors), others)
