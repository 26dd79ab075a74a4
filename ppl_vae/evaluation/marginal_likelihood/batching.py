"""Log weights computed batch by batch, with bounded memory, eagerly, recorded or compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule

from ppl_vae.capture.compiled import CompiledFunction
from ppl_vae.capture.graph import ModuleTensors, store_parameters
from ppl_vae.core.batch import Batch
from ppl_vae.core.nonfinite import name_rows
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import precision as matmul_precision
from ppl_vae.core.traces import PairTraces
from ppl_vae.evaluation.local_guides.local_guide import LocalGuide
from ppl_vae.evaluation.marginal_likelihood.call_runner import CallRunner, record_with_modules

ROWS_AT_ONCE = {"cpu": 2**13, "accelerator": 2**17}
"""The number of rows (draws times data) that go through the programs at once."""
ENTRIES_AT_ONCE = {"cpu": 2**20, "accelerator": 2**22}
"""The largest number of entries of one tensor of draws or data: on a CPU those that its cache
holds, since an operation on more takes up to three times as long an entry."""
WEIGHTS_AT_ONCE = 2**22
"""The largest number of weights that are held together."""
DRAWS_AT_ONCE = 32
"""The number of draws of each datum that are made together from a guide that is not refined."""
REFINEMENT_DRAWS = 8
"""The number of draws of each datum in a step of a refinement."""


def rows_at_once(x: Tensor) -> int:
    """The number of rows that may go through a pair at once on x's device, to bound memory."""
    kind = "cpu" if x.device.type == "cpu" else "accelerator"
    return max(1, min(ROWS_AT_ONCE[kind], ENTRIES_AT_ONCE[kind] // x.shape[1]))


def block_size(x: Tensor, num_samples: int, *, refined: bool) -> int:
    """The number of data whose weights, for all draws, are held together.

    Args:
        x: the data.
        num_samples: draws per datum.
        refined: whether a local guide is optimized for each batch, with a few draws per step.
            Otherwise an encoder runs once for all draws that are made together, so that many
            draws are efficient.
    """
    most_draws = REFINEMENT_DRAWS if refined else min(num_samples, DRAWS_AT_ONCE)
    return max(1, min(rows_at_once(x) // most_draws, WEIGHTS_AT_ONCE // num_samples))


def check_log_weights(log_weights: Float[Tensor, "S B"], batch: Batch) -> None:
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
        runner: decides whether batches are computed eagerly, recorded or compiled.
    """

    def __init__(self, runner: CallRunner) -> None:
        self.runner = runner
        self._last: tuple[Pair, ModuleTensors] | None = None

    @property
    def execution(self) -> str:
        """Whether the weights were computed eagerly, recorded or compiled, and why."""
        return self.runner.execution

    def __call__(self, pair: Pair, batch: Batch, num_samples: int) -> Float[Tensor, "S B"]:
        """log p(x, z) - log q(z | x) for S draws of the guide for each of B data, in float64."""
        draws = max(1, min(num_samples, rows_at_once(batch.x) // len(batch)))
        function = PairFunction(pair, batch, several=num_samples > 1)
        number, rest = divmod(num_samples, draws)

        def part() -> Tensor:
            def log_weights(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
                return (_expanded_log_weights(function, tensors, draws),)

            return self.run(function, (draws,), log_weights, batch.tensors, number)[0]

        parts = [part() for _ in range(number)]
        if rest:
            with matmul_precision(self.runner.precision, batch.x.device):
                parts.append(_expanded_log_weights(function, batch.tensors, rest))
        return torch.cat(parts)

    def run(
        self,
        function: "PairFunction",
        sizes: tuple[Any, ...],
        compute: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
        tensors: list[Tensor],
        repeats: int,
        *,
        usual: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """The results of a function of tensors that runs the pair.

        Args:
            function: the pair on a batch.
            sizes: what identifies captured code apart from the pair and the batch.
            compute: computes the results from tensors.
            tensors: the tensors.
            repeats, usual: see :meth:`.call_runner.CallRunner.run`.
        """

        def eager() -> tuple[Tensor, ...]:
            with matmul_precision(self.runner.precision, tensors[0].device):
                return compute(tensors)

        def module_tensors() -> ModuleTensors:
            return self._module_tensors(function.pair, eager)

        def captured(run: CompiledFunction) -> tuple[Tensor, ...]:
            held = module_tensors()
            results = run([p.detach() for p in held.parameters], held.buffers, tensors)
            return tuple(result.clone() for result in results)

        def capture(*args: Any) -> tuple[GraphModule, Any]:
            return record_with_modules(compute, module_tensors(), *args)

        key = *sizes, *function.key
        return self.runner.run(key, eager, captured, capture, repeats=repeats, usual=usual)

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
