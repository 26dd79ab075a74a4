"""The gradient of a step as recorded tensor operations, without Pyro's handlers."""

from torch import Tensor

from ppl_vae.capture.compiled import CompiledFunction
from ppl_vae.capture.functional_gradient import (
    CapturedGradient,
    FunctionalGradient,
    TrainedTensors,
)
from ppl_vae.capture.graph import CaptureError
from ppl_vae.inference.svi.batches.minibatch import MinibatchObjective


class RecordedGradient:
    """The gradient of the objective on minibatches, by the operations that an eager step makes.

    The pair's programs run twice, while their operations are recorded; after that no program runs
    any more. The operations, and so the numbers, are those of eager steps.

    Args:
        minibatch: the objective, as it is evaluated eagerly.
        named: the parameters by name.
        compiled: whether the recorded operations are compiled.
    """

    def __init__(
        self, minibatch: MinibatchObjective, named: dict[str, Tensor], *, compiled: bool = False
    ) -> None:
        self.minibatch = minibatch
        trained = TrainedTensors(minibatch.pair.modules, named)
        self._prepared = False
        self.run = CompiledFunction(
            FunctionalGradient(self._loss, trained).capture,
            compiled=compiled,
            precision=minibatch.precision,
        )
        self._gradient = CapturedGradient(trained, self.run)

    def _loss(self, common: list[Tensor], per_step: list[Tensor], beta: Tensor) -> Tensor:
        return -self.minibatch.traced_value(common, per_step, beta)

    def value(self, rows: Tensor | None, step: int) -> Tensor:
        """The objective of these rows (None: all) in nats per datum; its gradient is stored.

        The parameters hold the gradient of the loss, minus the objective, afterwards. Buffers are
        updated.

        Args:
            rows: the rows of the batch.
            step: the number of this step, counted from 1.

        Raises:
            CaptureError: at the first call, if the step cannot be recorded; nothing is changed.
        """
        try:
            if not self._prepared:
                self.minibatch.prepare_tracing(rows)
                self._prepared = True
        except ValueError as error:
            raise CaptureError(str(error)) from error
        per_step = self.minibatch.step_tensors(rows)
        beta = self.minibatch.objective.kl_weight(step)
        return -self._gradient(self.minibatch.common_tensors, per_step, beta)
