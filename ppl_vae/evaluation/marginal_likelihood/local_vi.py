"""Variational inference for each datum separately, started at a guide's own q."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.fx import GraphModule

from ppl_vae.capture.compiled import CompiledFunction
from ppl_vae.capture.functional_gradient import (
    CapturedGradient,
    FunctionalGradient,
    LossInputs,
    TrainedTensors,
)
from ppl_vae.capture.graph import store_parameters
from ppl_vae.core.batch import Batch
from ppl_vae.core.nonfinite_pairs import nonfinite_sites_named
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import precision as matmul_precision
from ppl_vae.evaluation.local_guides.cosine_descent import cosine_rates, descend, store_gradient
from ppl_vae.evaluation.local_guides.local_guide import LocalGuide
from ppl_vae.evaluation.local_guides.parametrization import make_local_guide
from ppl_vae.evaluation.marginal_likelihood.batching import REFINEMENT_DRAWS, PairFunction
from ppl_vae.evaluation.marginal_likelihood.call_runner import CallRunner

LEARNING_RATE = 0.1
"""The initial learning rate, in standard deviations of the initial q."""
LossOfTensors: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""A loss as a function of the tensors of a batch, and of those of one step."""


class LocalVI:
    """Maximizes the ELBO of each datum over a family of q, by Adam from a guide's own q.

    Batches are refined one after another; the model and the guide are left unchanged.

    Args:
        steps: the number of steps of Adam; the learning rate falls to zero along a cosine.
        covariance: the family, see
            :func:`ppl_vae.evaluation.local_guides.parametrization.make_local_guide`.
        num_samples: draws per datum and step.
        runner: decides whether steps run eagerly, recorded or compiled; by default one for the
            steps of one batch.
    """

    def __init__(
        self,
        *,
        steps: int,
        covariance: str,
        num_samples: int = REFINEMENT_DRAWS,
        runner: CallRunner | None = None,
    ) -> None:
        self.covariance, self.num_samples = covariance, num_samples
        self.rates = cosine_rates(LEARNING_RATE, steps)
        self.runner = runner or CallRunner("auto", steps)

    def __call__(self, pair: Pair, batch: Batch) -> Pair:
        """The model with the refined guide of this batch, whose parameters are frozen."""
        with nonfinite_sites_named(pair, batch):
            guide, refined = self._refined(pair, batch)
        # In training mode Pyro warns of parameters without a gradient.
        guide.requires_grad_(False).eval()
        return refined

    def _refined(self, pair: Pair, batch: Batch) -> tuple[LocalGuide, Pair]:
        guide = make_local_guide(pair, batch, self.covariance)
        # Local guides have the plates of the guide, so that its sample dimension is theirs.
        refined = pair.with_guide(guide, sample_dim=pair.sample_dim(batch))
        function = PairFunction(refined, batch, several=self.num_samples > 1)

        def loss(tensors: Sequence[Tensor], _: Sequence[Tensor]) -> Tensor:
            # The terms of different data have no parameters in common.
            return -function.log_weights(tensors, self.num_samples).mean(0).sum()

        gradient = LocalGradient(guide, function, loss)
        steps = len(self.rates)
        with pair.eval_mode():
            descend(gradient.parameters, self.rates, lambda: gradient.store(self.runner, steps))
        guide.check_conditioning()
        return guide, refined


class LocalGradient:
    """The gradient of a loss of a batch in the free parameters of a local guide.

    Args:
        guide: the local guide.
        function: the model and the guide on the batch.
        loss: the loss, which runs them.

    Attributes:
        parameters: the free parameters.
    """

    def __init__(self, guide: LocalGuide, function: PairFunction, loss: LossOfTensors) -> None:
        self.function, self.loss = function, loss
        self.parameters = [p for p in guide.parameters() if p.numel()]
        self._captured: CapturedGradient | None = None

    def store(self, runner: CallRunner, repeats: int, per_step: Sequence[Tensor] = ()) -> None:
        """Store the gradient in the parameters.

        Args:
            runner: decides how it is computed.
            repeats: the number of steps with this batch.
            per_step: the tensors of this step.
        """
        tensors, own = self.function.batch.tensors, list(per_step)

        def eager() -> None:
            with matmul_precision(runner.precision, tensors[0].device):
                store_gradient(self.parameters, lambda: self.loss(tensors, own))

        def captured(run: CompiledFunction) -> None:
            if self._captured is None or self._captured.run is not run:
                self._captured = CapturedGradient(self._trained(own), run)
            self._captured(tensors, own)

        def capture(inputs: LossInputs) -> tuple[GraphModule, Any]:
            return FunctionalGradient(self._loss, self._trained(own)).capture(inputs)

        shapes = tuple(tensor.shape for tensor in own)
        key = "gradient", shapes, *self.function.key
        runner.run(key, eager, captured, capture, repeats=repeats)

    def _loss(self, common: list[Tensor], per_step: list[Tensor], beta: Tensor) -> Tensor:
        return self.loss(common, per_step)

    def _trained(self, per_step: Sequence[Tensor]) -> TrainedTensors:
        """The free parameters, distinguished from all others of the pair."""
        pair, tensors = self.function.pair, self.function.batch.tensors
        names = {f"local {k}": p for k, p in enumerate(self.parameters)}
        with pair.dry_run():
            bare = store_parameters(pair.modules, lambda: self.loss(tensors, per_step))
        return TrainedTensors(pair.modules, names, bare)
