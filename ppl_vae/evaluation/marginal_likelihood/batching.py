"""Work on data block by block, eagerly or as compiled code: log weights, and refined guides."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.capture.compiled import Compiled
from ppl_vae.capture.functional_optim import (
    FunctionalOptimizer,
    functional_optimizer,
    optimizer_state,
)
from ppl_vae.capture.functional_step import Inputs, Step, TrainState, to_device
from ppl_vae.capture.graph import (
    CaptureError,
    ModuleTensors,
    bare_parameters,
    permuted,
    perturbed,
    record,
)
from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike, modules_of
from ppl_vae.core.state import dry_run, eval_mode, precision
from ppl_vae.evaluation.local_guides.distribution_forms import per_datum
from ppl_vae.evaluation.local_guides.local_guide import LocalGuide
from ppl_vae.inference.svi.capture_policy import check_capture, weighed

ROWS_AT_ONCE = {"cpu": 2**13, "cuda": 2**17}
"""Rows (draws times data) that go through the programs at once."""
NUMBERS_AT_ONCE = 2**22
"""Entries that one tensor of draws, data or weights may have."""
DRAWS_AT_ONCE = 32
"""Draws of a datum that go together, without a refined guide."""
STEPS_AT_ONCE = 4
"""Steps of a refinement that are compiled together."""


def rows_at_once(x: Tensor) -> int:
    """How many rows may go through a pair at once on x's device, so that memory stays fixed."""
    rows = ROWS_AT_ONCE.get(x.device.type, ROWS_AT_ONCE["cpu"])
    return max(1, min(rows, NUMBERS_AT_ONCE // x.shape[1]))


def block_size(x: Tensor, num_samples: int, *, refined: bool) -> int:
    """How many data make a block, whose weights for all draws are held together.

    Args:
        x: data.
        num_samples: draws per datum.
        refined: whether each block gets a guide of its own, for whose steps large blocks are
            better; an encoder runs once for all draws that go together, so that many are.
    """
    together = 1 if refined else min(num_samples, DRAWS_AT_ONCE)
    return max(1, min(rows_at_once(x) // together, NUMBERS_AT_ONCE // num_samples))


class BlockRunner:
    """Which way work on blocks is done, eagerly or compiled, and why.

    Args:
        wanted: ``"auto"`` (compiled if the time left is worth it), True or False.
        calls: how many there will be, of about one size.

    Attributes:
        why: the way and the reason, for a person.
    """

    def __init__(self, wanted: bool | str, calls: int, *, compiled: bool = True) -> None:
        self.wanted, self.left, self.compiled = check_capture(wanted), calls, compiled
        self.why = "eager: as asked" if wanted is False else "eager: it was over soon"
        self._calls = 0

    def do(self, fast: Callable[[], Any], eager: Callable[[], Any]) -> Any:
        """A call: ``fast`` if that way is taken and possible, else ``eager``."""
        self.left -= 1
        if self.wanted is True:
            try:
                result = fast()
                self.why = "captured"
                return result
            except CaptureError as error:
                self.wanted = False
                self.why = f"eager: it could not be captured: {error}"
                warnings.warn(
                    f"the evaluation could not be captured, so it runs eagerly: {error}",
                    stacklevel=2,
                )
        if self.wanted is False:
            return eager()
        return self._timed(eager)

    def _timed(self, eager: Callable[[], Any]) -> Any:
        begun = self._clock()
        result = eager()
        self._calls += 1
        if self._calls > 1:  # the first is slow
            left = (self._clock() - begun) * self.left
            self.wanted, compared = weighed(left)
            self.why = f"eager: {compared}"
        return result

    def _clock(self) -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


class LogWeightSampler:
    """Log weights of blocks of data under a model and a proposal.

    Args:
        model: of the pair.
        rails: which way it is done.
        numbers: precision of matrix products, see :func:`ppl_vae.core.state.precision`.
    """

    def __init__(self, model: ProgramLike, runner: BlockRunner, numbers: str = "float32") -> None:
        self.model, self.runner, self.numbers = model, runner, numbers
        self._runs: dict[Any, Compiled] = {}
        self._last: tuple[ProgramLike, ModuleTensors] | None = None

    @property
    def why(self) -> str:
        """Which way it was done, and the reason."""
        return self.runner.why

    def __call__(
        self, guide: ProgramLike, x: Tensor, keywords: dict[str, Any], num_samples: int
    ) -> Float[Tensor, "S B"]:
        """log p(x, z) - log q(z | x) for S draws of the guide for each of B data, in float64."""
        draws = max(1, min(num_samples, rows_at_once(x) // len(x)))
        block = Block(self.model, guide, x, keywords, several=num_samples > 1)
        key = draws, *block.key
        usual = not self._runs or key in self._runs  # a last block is not worth compiling for

        def eager(number: int = draws) -> Tensor:
            with precision(self.numbers, x.device):
                return block.log_weights(block.tensors, number).double().expand(number, -1)

        def fast() -> Tensor:
            held = self._held(guide, eager)
            if key not in self._runs:
                how = {"compiled": self.runner.compiled, "precision": self.numbers}
                self._runs[key] = Compiled(partial(_record, block, held, draws), **how)
            values = [p.detach() for p in held.parameters]
            return self._runs[key](values, held.buffers, block.tensors).clone()

        calls = range(num_samples // draws)
        found = [self.runner.do(fast, eager) if usual else eager() for _ in calls]
        if rest := num_samples % draws:
            found.append(eager(rest))
        return torch.cat(found)

    def _held(self, guide: ProgramLike, run: Callable[[], Any]) -> ModuleTensors:
        if self._last is None or self._last[0] is not guide:
            modules = modules_of(self.model, guide)
            with dry_run(self.model, guide):
                self._last = guide, ModuleTensors.by(modules, bare_parameters(modules, run))
        return self._last[1]


def _record(
    block: "Block",
    held: ModuleTensors,
    draws: int,
    parameters: Any,
    buffers: Any,
    tensors: list[Tensor],
) -> Any:
    def pure(parameters: Any, buffers: Any, tensors: list[Tensor]) -> Tensor:
        with held.replaced(parameters, [buffer.clone() for buffer in buffers]):
            return block.log_weights(tensors, draws).double().expand(draws, -1)

    others = perturbed(parameters), buffers, permuted(tensors)
    return record(pure, (parameters, buffers, tensors), others)


class LocalVI:
    """The q of a family that maximises each datum's ELBO, started from a guide's, by Adam.

    Blocks are refined one after another; the model and the guide are left as they are.

    Args:
        model: of the pair.
        steps: of Adam, its rate falling to zero along a cosine.
        covariance: the family, see
            :func:`ppl_vae.evaluation.local_guides.distribution_forms.per_datum`.
        num_samples: draws per datum and step.
        lr: in standard deviations of the start a step, at first.
        rails: which way it is done.
        numbers: precision of matrix products, see :func:`ppl_vae.core.state.precision`.
    """

    def __init__(
        self,
        model: ProgramLike,
        *,
        steps: int,
        covariance: str,
        num_samples: int = 8,
        lr: float = 0.1,
        runner: BlockRunner | None = None,
        numbers: str = "float32",
    ) -> None:
        self.model, self.covariance, self.num_samples = model, covariance, num_samples
        self.rates = [lr * (1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps)]
        self.runner, self.numbers = runner or BlockRunner(False, 1), numbers
        self._runs: dict[Any, Compiled] = {}

    def __call__(self, guide: ProgramLike, x: Tensor, keywords: dict[str, Any]) -> LocalGuide:
        """The refined guide of these rows, whose parameters do not train any more."""
        local = per_datum(self.model, guide, x, keywords, self.covariance)
        block = _Search(self, local, x, keywords)
        with eval_mode(self.model, guide), torch.enable_grad():
            if not self._runs or block.key in self._runs:
                self.runner.do(lambda: self._fast(block), lambda: self._eager(block))
            else:  # a last block is not worth compiling for
                self._eager(block)
        local.check_figures()
        # In training mode Pyro warns of parameters without a gradient.
        return local.requires_grad_(False).eval()

    def _eager(self, block: "_Search") -> None:
        with precision(self.numbers, block.tensors[0].device):
            for rate in self.rates:
                block.optimizer.param_groups[0]["lr"] = rate
                loss = block.loss(block.tensors)
                gradients = torch.autograd.grad(loss, block.parameters)
                for parameter, gradient in zip(block.parameters, gradients, strict=True):
                    parameter.grad = gradient
                block.optimizer.step()

    def _fast(self, block: "_Search") -> None:
        rule: Any = functional_optimizer(block.optimizer)
        trained = block.trained(rule)
        states = [optimizer_state(block.optimizer, p, rule) for p in trained.parameters]
        state, _ = trained.read(states)
        step = Step(lambda values, each, beta: block.loss(values), trained)
        size = next(k for k in range(STEPS_AT_ONCE, 0, -1) if len(self.rates) % k == 0)
        if block.key not in self._runs:
            how = {"compiled": self.runner.compiled, "precision": self.numbers}
            self._runs[block.key] = Compiled(step.record, **how)
        fixed, weight = trained.fixed(), to_device([1.0] * size, trained.parameters[0])
        for start in range(0, len(self.rates), size):
            rates = to_device(self.rates[start : start + size], trained.parameters[0])
            state, _ = self._runs[block.key](
                state, Inputs(fixed, block.tensors, [], rates, weight)
            )
        trained.write(states, state, len(self.rates))


class Block:
    """A block of data under a pair, as a function of tensors.

    Attributes:
        tensors: x, and what else the programs are told that is a tensor.
        key: what distinguishes blocks that need code of their own.
    """

    def __init__(
        self,
        model: ProgramLike,
        guide: ProgramLike,
        x: Tensor,
        keywords: dict[str, Any],
        *,
        several: bool,
    ) -> None:
        self.model, self.guide = model, guide
        named = {name: value for name, value in keywords.items() if isinstance(value, Tensor)}
        self.others = {name: value for name, value in keywords.items() if name not in named}
        self.names, self.tensors = list(named), [x, *named.values()]
        self.dim = Pair(model, guide).sample_dim(Batch(x, **keywords)) if several else None
        # Local guides are of one make; only their tensors differ from block to block.
        kind = LocalGuide if isinstance(guide, LocalGuide) else guide
        self.key = kind, len(x), self.dim, *named, *self.others.items()

    def log_weights(self, tensors: Sequence[Tensor], number: int) -> Float[Tensor, "S B"]:
        """log p(x, z) - log q(z | x) for so many draws, at other tensors of the same shapes."""
        x, *given = tensors
        told: dict[str, Any] = self.others | dict(zip(self.names, given, strict=True))
        run = Pair(self.model, self.guide).run(Batch(x, **told), num_samples=number, dim=self.dim)
        return run.log_weights()


class _Search(Block):
    """A block of data and its local guide, on their way to be refined."""

    def __init__(
        self, refiner: LocalVI, local: LocalGuide, x: Tensor, keywords: dict[str, Any]
    ) -> None:
        number = refiner.num_samples
        super().__init__(refiner.model, local, x, keywords, several=number > 1)
        self.number = number
        self.parameters = [p for p in local.parameters() if p.numel()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1.0)

    def loss(self, tensors: Sequence[Tensor]) -> Tensor:
        """Minus the sum of the data's ELBOs; they share no parameters, so each has its own."""
        return -self.log_weights(tensors, self.number).mean(0).sum()

    def trained(self, rule: FunctionalOptimizer) -> TrainState:
        """The local guide's parameters among all that the pair holds."""
        names = {f"local {k}": p for k, p in enumerate(self.parameters)}
        modules = modules_of(self.model, self.guide)
        with dry_run(self.model, self.guide):
            bare = bare_parameters(modules, lambda: self.loss(self.tensors))
        return TrainState(modules, names, rule, bare)
