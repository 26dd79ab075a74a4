"""Variational inference for each datum separately, started at a guide's own q."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_vae.capture.compiled import CompiledFunction
from ppl_vae.capture.functional_optim import (
    FunctionalOptimizer,
    functional_optimizer,
    optimizer_state,
)
from ppl_vae.capture.functional_step import FunctionalStep, StepInputs, TrainState, to_device
from ppl_vae.capture.graph import store_parameters
from ppl_vae.core.batch import Batch
from ppl_vae.core.nonfinite_pairs import nonfinite_sites_named
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import precision as matmul_precision
from ppl_vae.evaluation.local_guides.cosine_descent import cosine_rates, descend
from ppl_vae.evaluation.local_guides.local_guide import LocalGuide
from ppl_vae.evaluation.local_guides.parametrization import make_local_guide
from ppl_vae.evaluation.marginal_likelihood.batching import BlockRunner, PairFunction

LEARNING_RATE = 0.1
"""The initial learning rate, in standard deviations of the initial q."""
STEPS_AT_ONCE = 4
"""The number of optimization steps that are compiled together."""


class LocalVI:
    """Maximizes the ELBO of each datum over a family of q, by Adam from a guide's own q.

    Batches are refined one after another; the model and the guide are left unchanged.

    Args:
        steps: the number of steps of Adam; the learning rate falls to zero along a cosine.
        covariance: the family, see
            :func:`ppl_vae.evaluation.local_guides.parametrization.make_local_guide`.
        num_samples: draws per datum and step.
        runner: decides between eager and compiled execution.
        precision: precision of matrix products, see :func:`ppl_vae.core.state.precision`.
    """

    def __init__(
        self,
        *,
        steps: int,
        covariance: str,
        num_samples: int = 8,
        runner: BlockRunner | None = None,
        precision: str = "float32",
    ) -> None:
        self.covariance, self.num_samples = covariance, num_samples
        self.rates = cosine_rates(LEARNING_RATE, steps)
        self.runner, self.precision = runner or BlockRunner(False, 1), precision
        self._compiled: dict[Any, CompiledFunction] = {}

    def __call__(self, pair: Pair, batch: Batch) -> Pair:
        """The model with the refined guide of this batch, whose parameters are frozen."""
        with nonfinite_sites_named(pair, batch):
            guide, local = self._refined(pair, batch)
        # In training mode Pyro warns of parameters without a gradient.
        guide.requires_grad_(False).eval()
        return local.pair

    def _refined(self, pair: Pair, batch: Batch) -> tuple[LocalGuide, "_LocalELBO"]:
        guide = make_local_guide(pair, batch, self.covariance)
        # Local guides have the plates of the guide, so that its sample dimension is theirs.
        refined = pair.with_guide(guide, sample_dim=pair.sample_dim(batch))
        local = _LocalELBO(refined, guide, batch, self.num_samples)
        with pair.eval_mode(), torch.enable_grad():
            # Code is compiled for the first shape alone; a smaller last batch runs eagerly.
            if not self._compiled or local.key in self._compiled:
                self.runner.run(lambda: self._captured(local), lambda: self._eager(local))
            else:
                self._eager(local)
        guide.check_conditioning()
        return guide, local

    def _eager(self, local: "_LocalELBO") -> None:
        with matmul_precision(self.precision, local.batch.x.device):
            descend(local.optimizer, self.rates, lambda: local.loss(local.batch.tensors))

    def _captured(self, local: "_LocalELBO") -> None:
        rule: Any = functional_optimizer(local.optimizer)
        train_state = local.train_state(rule)
        parameters, tensors = train_state.parameters, local.batch.tensors
        states = [optimizer_state(local.optimizer, p, rule) for p in parameters]
        state, _ = train_state.read(states)
        size = next(k for k in range(STEPS_AT_ONCE, 0, -1) if len(self.rates) % k == 0)
        if local.key not in self._compiled:
            step = FunctionalStep(lambda values, each, beta: local.loss(values), train_state)
            self._compiled[local.key] = CompiledFunction(
                step.capture, compiled=self.runner.compiled, precision=self.precision
            )
        fixed, weight = train_state.frozen_parameters(), to_device([1.0] * size, parameters[0])
        for start in range(0, len(self.rates), size):
            rates = to_device(self.rates[start : start + size], parameters[0])
            inputs = StepInputs(fixed, tensors, [], rates, weight)
            state, _ = self._compiled[local.key](state, inputs)
        train_state.write(states, state, len(self.rates))


class _LocalELBO(PairFunction):
    """The negative ELBO of a batch under a local guide, with the optimizer of that guide."""

    def __init__(self, pair: Pair, guide: LocalGuide, batch: Batch, num_samples: int) -> None:
        super().__init__(pair, batch, several=num_samples > 1)
        self.num_samples = num_samples
        self.parameters = [p for p in guide.parameters() if p.numel()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1.0)

    def loss(self, tensors: Sequence[Tensor]) -> Tensor:
        """Minus the sum of the data's ELBOs, whose terms have no parameters in common."""
        return -self.log_weights(tensors, self.num_samples).mean(0).sum()

    def train_state(self, rule: FunctionalOptimizer) -> TrainState:
        """The local guide's parameters, distinguished from all others of the pair."""
        names = {f"local {k}": p for k, p in enumerate(self.parameters)}
        with self.pair.dry_run():
            bare = store_parameters(self.pair.modules, lambda: self.loss(self.batch.tensors))
        return TrainState(self.pair.modules, names, rule, bare)
