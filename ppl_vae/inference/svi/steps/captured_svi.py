"""``pyro.infer.SVI`` with captured steps, for users who write their own training loops."""

import math
import time
from collections.abc import Callable
from typing import Any

import pyro
from pyro.infer import ELBO, SVI
from pyro.optim import PyroOptim
from torch import Tensor, optim

from ppl_vae.capture.compiled import CompiledFunction
from ppl_vae.capture.functional_gradient import (
    CapturedGradient,
    FunctionalGradient,
    TrainedTensors,
)
from ppl_vae.capture.functional_optim import functional_optimizer, optimizer_state
from ppl_vae.capture.functional_step import FunctionalStep, StepInputs, StepState, TrainState
from ppl_vae.capture.graph import (
    CaptureError,
    CompilationError,
    capture_graph,
    permuted,
    perturbed,
)
from ppl_vae.capture.policy import CapturePolicy, background_seconds
from ppl_vae.core.autoguides import RowCheck
from ppl_vae.core.introspection import modules_of
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import dry_run, isolated_store
from ppl_vae.inference.svi.steps.step_arguments import StepArguments
from ppl_vae.objectives.pyro_objectives import as_capturable

MAX_SIGNATURES = 8
"""Kinds of arguments (shapes, numbers) for which steps are captured; more disable capturing."""


class CapturedSVI(SVI):
    """A drop-in for ``pyro.infer.SVI`` whose steps run as tensor code.

    The first step with arguments of new shapes runs in Pyro, which creates the parameters and
    their optimizers and raises its own errors. In the second one the operations of the loss and
    its gradient are recorded, in about a second, and from then on they run without the programs;
    the optimizer remains Pyro's, of any kind. Once the recorded steps have taken as long as
    compiling would, another process compiles whole steps, with their optimizer, which take over
    when they are ready. Parameters and optimizers
    remain where Pyro keeps them, so that the store, ``optim.save`` and steps of other optimizers
    see them. Tensors among the arguments may change from step to step; anything else (a number,
    None) is a constant of the recorded code. A step that cannot be recorded runs in Pyro, with
    one warning.

    Args:
        model, guide: any pair under the contract (others run in Pyro).
        optim: any ``PyroOptim``. Steps can be compiled with Adam, AdamW or SGD of one learning
            rate for all parameters; with others they run as recorded.
        loss: :class:`~ppl_vae.ELBO`, :class:`~ppl_vae.IWAE`, ``Trace_ELBO`` or
            ``TraceMeanField_ELBO``; others run in Pyro.
        compiled: whether steps are compiled: True, from the second step on, which waits for the
            compiler; False, never; by default as described.
        options: options of ``torch.compile``.
        autotune_matmul: whether to time two BLAS libraries for each matrix product on a CPU and
            use the faster; results may then differ in the last digits from run to run.

    Attributes:
        execution: whether steps are compiled, recorded or run in Pyro, and why.

    Example:
        >>> svi = CapturedSVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        >>> for rows in batches:
        ...     loss = svi.step(x[rows])
    """

    def __init__(
        self,
        model: ProgramLike,
        guide: ProgramLike,
        optim: PyroOptim,
        loss: ELBO,
        *,
        compiled: bool | str = "auto",
        options: dict[str, Any] | None = None,
        autotune_matmul: bool = False,
    ) -> None:
        super().__init__(model, guide, optim, loss)
        if compiled not in (True, False, "auto"):
            raise ValueError(f"compiled must be True, False or 'auto'; got {compiled!r}")
        self.policy = CapturePolicy(True if compiled is True else "recorded", "the step")
        self.policy.reason = "compiled" if compiled is True else "recorded"
        self.execution = "eager: no step has been captured yet"
        self._may_compile = compiled == "auto" and not autotune_matmul
        self._seconds: dict[Any, float] = {}
        self.options, self.autotune_matmul = options, autotune_matmul
        self._objective = as_capturable(loss)
        self._modules = modules_of(model, guide)
        self._check_rows = RowCheck(guide)
        self._signatures: set[Any] = set()
        self._train_state: TrainState | None = None
        self._trained: TrainedTensors | None = None
        self._functions: dict[Any, CompiledFunction] = {}
        if self._objective is None:
            self._disable(
                CaptureError(f"{type(loss).__name__} is none of the losses that can be captured")
            )

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Make a gradient step on the loss of the data, in place; returns the loss in nats.

        Raises:
            ValueError: if Pyro's automatic guide has one q per row of the first step, and the
                rows are others, without ``index``.
        """
        eager_step = super().step
        return self._run(self._step, eager_step, args, kwargs)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss of the data in nats; nothing is changed."""
        eager_evaluation = super().evaluate_loss
        return self._run(self._evaluate, eager_evaluation, args, kwargs)

    def _run(
        self, captured: Callable[..., float], eager: Callable[..., Any], args: Any, kwargs: Any
    ) -> float:
        self._check_rows(args, kwargs)
        if self.policy.mode is False:
            return eager(*args, **kwargs)
        call = StepArguments(captured.__name__, args, kwargs, self._modules)
        try:
            if self._is_new(call.signature):
                return eager(*args, **kwargs)
            if not self.optim.optim_objs:
                raise CaptureError(
                    "Pyro has found no parameters: pyro.module registers a network's"
                )
            loss = captured(call)
        except CaptureError as error:
            self._disable(error)
            return self._run(captured, eager, args, kwargs)
        self.execution = self.policy.reason
        return loss

    def _is_new(self, signature: Any) -> bool:
        if signature in self._signatures:
            return False
        if len(self._signatures) >= MAX_SIGNATURES:
            raise CaptureError(
                f"it was called with {MAX_SIGNATURES} kinds of arguments; a number that changes "
                "from step to step must be a tensor"
            )
        self._signatures.add(signature)
        return True

    def _disable(self, error: CaptureError) -> None:
        self._may_compile = False
        self.policy.disable(error)
        self.execution = self.policy.reason

    def _step(self, call: StepArguments) -> float:
        if self.policy.mode is True:
            return self._compiled_step(call, compiled=True)
        if self._may_compile and self._is_compiled(call):
            return self._compiled_step(call, compiled="background")
        start = time.perf_counter()
        loss = self._recorded_step(call)
        seconds = time.perf_counter() - start
        self._seconds[call.signature] = self._seconds.get(call.signature, 0.0) + seconds
        return loss

    def _is_compiled(self, call: StepArguments) -> bool:
        """Whether another process has compiled steps of this kind; it begins where they pay."""
        run = self._functions.get(("background", call.signature))
        if run is None:
            recorded = self._functions.get((False, call.signature))
            cost = background_seconds(recorded.recording_seconds) if recorded else math.inf
            # The work that is left is expected to take as long as the work so far.
            if self._seconds.get(call.signature, 0.0) > cost:
                try:
                    run, arguments, _ = self._compilable(call, compiled="background")
                    run.start(*arguments)
                except CaptureError as error:
                    self._keep_recorded(error)
            return False
        if not run.is_ready:
            return False
        run.finish()
        if run.failure is not None:
            self._keep_recorded(run.failure)
            return False
        self.policy.reason = "compiled"
        return True

    def _keep_recorded(self, error: CaptureError) -> None:
        self._may_compile = False
        self.policy.reason = f"recorded: it could not be compiled: {error}"

    def _recorded_step(self, call: StepArguments) -> float:
        """The gradient by recorded operations, and the step by Pyro's own optimizers."""
        trained = self._trained_tensors()

        def loss(common: list[Tensor], per_step: list[Tensor], beta: Tensor) -> Tensor:
            return self._loss(call, common)

        run = self._function(call, FunctionalGradient(loss, trained).capture, compiled=False)
        value = CapturedGradient(trained, run)(call.tensors, [])
        self.optim(trained.parameters)
        for parameter in trained.parameters:
            parameter.grad = None
        return float(value)

    def _compiled_step(self, call: StepArguments, *, compiled: bool | str) -> float:
        run, (state, inputs), write = self._compilable(call, compiled=compiled)
        after, losses = run(state, inputs)
        write(after)
        return float(losses[0])

    def _compilable(
        self, call: StepArguments, *, compiled: bool | str
    ) -> tuple[CompiledFunction, tuple[StepState, StepInputs], Callable[[StepState], None]]:
        """A whole step as a function, its arguments, and what writes its result."""
        train_state, rate, opt_states = self._training()
        try:
            state, num_steps = train_state.read(opt_states)
        except ValueError as error:
            raise CompilationError(str(error)) from error
        inputs = StepInputs(
            frozen=train_state.frozen_parameters(),
            common=call.tensors,
            steps=train_state.inputs_of([[]], num_steps, [rate], [1.0]),
        )

        def loss(common: list[Tensor], per_step: list[Tensor], beta: Tensor) -> Tensor:
            return self._loss(call, common)

        def write(after: StepState) -> None:
            train_state.write(opt_states, after, num_steps + 1)

        run = self._function(call, FunctionalStep(loss, train_state).capture, compiled=compiled)
        return run, (state, inputs), write

    def _evaluate(self, call: StepArguments) -> float:
        tensors = self._trained_tensors().tensors

        def loss(parameters: list[Tensor], buffers: list[Tensor], data: list[Tensor]) -> Tensor:
            with tensors.substituted(parameters, [buffer.clone() for buffer in buffers]):
                return self._loss(call, data)

        def capture(parameters: list[Tensor], buffers: list[Tensor], data: list[Tensor]) -> Any:
            other_args = perturbed(parameters), buffers, permuted(data)
            return capture_graph(loss, (parameters, buffers, data), other_args)

        run = self._function(call, capture, compiled=self.policy.mode is True)
        parameters = [p.detach() for p in tensors.parameters]
        return float(run(parameters, tensors.buffers, call.tensors))

    def _loss(self, call: StepArguments, tensors: list[Tensor]) -> Tensor:
        args, kwargs = call.arguments(tensors)
        if self._objective is None:
            raise CaptureError("its loss cannot be captured")
        return self._objective.differentiable_loss(self.model, self.guide, *args, **kwargs)

    def _function(
        self, call: StepArguments, capture: Callable[..., Any], *, compiled: bool | str
    ) -> CompiledFunction:
        key = compiled, call.signature
        if key not in self._functions:
            with isolated_store(), dry_run(self.model, self.guide):
                self._loss(call, call.tensors)  # caches the dimension of the plate of particles
            self._functions[key] = CompiledFunction(
                capture,
                compiled=compiled,
                options=self.options,
                autotune_matmul=self.autotune_matmul,
            )
        return self._functions[key]

    def _training(self) -> tuple[TrainState, float, list[Any]]:
        """The trained parameters, their learning rate, and the state of their optimizers."""
        named = self._trained_parameters()
        optimizers = [self._optimizer(p) for p in named.values()]
        functional = {functional_optimizer(optimizer) for optimizer in optimizers}
        rates = {float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers}
        clipped = any(self.optim.grad_clip[p] is not None for p in named.values())
        if len(functional) != 1 or len(rates) != 1 or clipped:
            raise CompilationError(
                "the parameters have several optimizers or learning rates, or are clipped"
            )
        (optimizer,), (rate,) = functional, rates
        train_state = self._train_state
        if (
            train_state is None
            or set(map(id, train_state.parameters)) != set(map(id, named.values()))
            or train_state.optimizer != optimizer
        ):
            train_state = self._train_state = TrainState(self._modules, named, optimizer)
            self._functions = {key: f for key, f in self._functions.items() if key[0] is False}
        opt_states = [
            optimizer_state(self._optimizer(p), p, optimizer) for p in train_state.parameters
        ]
        return train_state, rate, opt_states

    def _trained_tensors(self) -> TrainedTensors:
        named, found = self._trained_parameters(), self._trained
        if found is None or set(map(id, found.parameters)) != set(map(id, named.values())):
            found, self._functions = TrainedTensors(self._modules, named), {}
            self._trained = found
        return found

    def _trained_parameters(self) -> dict[str, Tensor]:
        """The parameters for which Pyro has created optimizers, by name."""
        store = pyro.get_param_store()
        own = {id(p) for module in self._modules for p in module.parameters()}
        named: dict[str, Tensor] = {}
        for p in self.optim.optim_objs:
            name = store.param_name(p)
            if name is None and id(p) not in own:
                continue  # the store has been cleared since
            named[name or f"parameter {len(named)}"] = p
        return named

    def _optimizer(self, parameter: Tensor) -> optim.Optimizer:
        optimizer: Any = self.optim.optim_objs[parameter]
        return getattr(optimizer, "optimizer", optimizer)  # Pyro's schedulers wrap theirs
