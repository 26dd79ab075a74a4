"""``pyro.infer.SVI`` with captured steps, for people with loops of their own."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ppl_vae.capture.compiled import Compiled
from ppl_vae.capture.functional_optim import functional_optimizer, optimizer_state
from ppl_vae.capture.functional_step import Inputs, Step, TrainState, to_device
from ppl_vae.capture.graph import CaptureError, permuted, perturbed, record
from ppl_vae.core.program import ProgramLike, modules_of
from ppl_vae.core.state import dry_run, isolated_store
from ppl_vae.objectives.bounds import as_capturable

MOST_KINDS = 8
"""Kinds of arguments (shapes, numbers) that one object takes before it gives up."""


class CapturedSVI(SVI):
    """A drop-in for ``pyro.infer.SVI`` whose steps run as compiled tensor code.

    The first step with arguments of some shapes runs in Pyro, which makes the parameters, their
    optimizers, and its own messages; the second is recorded and compiled (seconds), and from then
    on each is one call. Parameters and optimizers are where Pyro keeps them, so that the store,
    ``optim.save`` and steps of other optimizers see them. Tensors among the arguments may change
    from step to step, anything else (a number, None) is compiled in. A step that cannot be
    captured runs in Pyro, with one warning; :attr:`path` says which way is taken.

    Args:
        model, guide: any pair under the contract (others run in Pyro).
        optim: a ``PyroOptim`` of Adam, AdamW or SGD, one learning rate for all parameters;
            others run in Pyro.
        loss: :class:`~ppl_vae.ELBO`, :class:`~ppl_vae.IWAE`, ``Trace_ELBO`` or
            ``TraceMeanField_ELBO``; others run in Pyro.
        compiled: whether to compile what is recorded; without, it is slow, and the same.
        options: of the compiler.

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
        compiled: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, guide, optim, loss)
        self.path = "eager: no step has been captured yet"
        self._objective = as_capturable(loss)
        self._how: dict[str, Any] = {"compiled": compiled, "options": options}
        self._modules = modules_of(model, guide)
        self._met: set[Any] = set()
        self._trained: TrainState | None = None
        self._runs: dict[Any, Compiled] = {}
        self._refused = False
        if self._objective is None:
            self._refuse(f"{type(loss).__name__} is none of the losses that can be captured")

    def step(self, *args: Any, **kwargs: Any) -> float:
        """A gradient step on the loss of the data, in place; the loss before it, in nats."""
        eagerly = super().step
        return self._either(self._step, eagerly, args, kwargs)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss of the data, in nats; nothing changes."""
        eagerly = super().evaluate_loss
        return self._either(self._evaluate, eagerly, args, kwargs)

    def _either(
        self, captured: Callable[..., float], eagerly: Callable[..., Any], args: Any, kwargs: Any
    ) -> float:
        if self._refused:
            return eagerly(*args, **kwargs)
        call = _Call(captured.__name__, args, kwargs, self._modules)
        try:
            if self._is_new(call.key):
                return eagerly(*args, **kwargs)
            if not self.optim.optim_objs:
                raise CaptureError(
                    "Pyro has found no parameters: pyro.module registers a network's"
                )
            loss = captured(call)
        except CaptureError as error:
            self._refuse(str(error))
            return eagerly(*args, **kwargs)
        self.path = "captured"
        return loss

    def _is_new(self, key: Any) -> bool:
        if key in self._met:
            return False
        if len(self._met) >= MOST_KINDS:
            raise CaptureError(
                f"its arguments have come in {MOST_KINDS} kinds; a number that changes from step "
                "to step must be a tensor"
            )
        self._met.add(key)
        return True

    def _refuse(self, why: str) -> None:
        self._refused, self._runs = True, {}
        self.path = f"eager: the step could not be captured: {why}"
        warnings.warn(f"the step could not be captured, so Pyro runs it: {why}", stacklevel=4)

    def _step(self, call: "_Call") -> float:
        trained, rate, states = self._parameters()
        try:
            state, count = trained.read(states)
        except ValueError as error:
            raise CaptureError(str(error)) from error
        like = trained.parameters[0]
        inputs = Inputs(
            trained.fixed(), call.tensors, [], to_device([rate], like), like.new_ones(1)
        )

        def loss(whole: list[Tensor], each: list[Tensor], beta: Tensor) -> Tensor:
            return self._loss(call, whole)

        run = self._compiled(call, Step(loss, trained).record)
        after, losses = run(state, inputs)
        trained.write(states, after, count + 1)
        return float(losses[0])

    def _evaluate(self, call: "_Call") -> float:
        held = self._parameters()[0].held

        def loss(parameters: list[Tensor], buffers: list[Tensor], whole: list[Tensor]) -> Tensor:
            with held.replaced(parameters, [buffer.clone() for buffer in buffers]):
                return self._loss(call, whole)

        def recorder(parameters: list[Tensor], buffers: list[Tensor], whole: list[Tensor]) -> Any:
            others = perturbed(parameters), buffers, permuted(whole)
            return record(loss, (parameters, buffers, whole), others)

        run = self._compiled(call, recorder)
        return float(run([p.detach() for p in held.parameters], held.buffers, call.tensors))

    def _loss(self, call: "_Call", tensors: list[Tensor]) -> Tensor:
        args, kwargs = call.arguments(tensors)
        if self._objective is None:
            raise CaptureError("its loss cannot be captured")
        return self._objective.differentiable_loss(self.model, self.guide, *args, **kwargs)

    def _compiled(self, call: "_Call", recorder: Callable[..., Any]) -> Compiled:
        if call.key not in self._runs:
            with isolated_store(), dry_run(self.model, self.guide):
                self._loss(call, call.tensors)  # where the plate of particles fits is found once
            self._runs[call.key] = Compiled(recorder, **self._how)
        return self._runs[call.key]

    def _parameters(self) -> tuple[TrainState, float, list[Any]]:
        """What trains, at which rate, and what its optimizers remember."""
        store = pyro.get_param_store()
        own = {id(p) for module in self._modules for p in module.parameters()}
        named: dict[str, Tensor] = {}
        for p in self.optim.optim_objs:
            name = store.param_name(p)
            if name is None and id(p) not in own:
                continue  # the store was cleared since
            named[name or f"parameter {len(named)}"] = p
        optimizers = [_inside(self.optim.optim_objs[p]) for p in named.values()]
        rules = {functional_optimizer(optimizer) for optimizer in optimizers}
        rates = {float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers}
        clipped = any(self.optim.grad_clip[p] is not None for p in named.values())
        if len(rules) != 1 or len(rates) != 1 or clipped:
            raise CaptureError("the parameters have several rules or rates, or are clipped")
        rule = rules.pop()
        if isinstance(rule, str):
            raise CaptureError(rule)
        known = self._trained
        same = known is not None and {id(p) for p in known.parameters} == set(
            map(id, named.values())
        )
        if known is None or not same or known.rule != rule:
            known, self._runs = TrainState(self._modules, named, rule), {}
            self._trained = known
        objects = [_inside(self.optim.optim_objs[p]) for p in known.parameters]
        states = [
            optimizer_state(o, p, rule) for o, p in zip(objects, known.parameters, strict=True)
        ]
        return known, rates.pop(), states


class _Call:
    """The arguments of a step: tensors, and all else, which is compiled in."""

    def __init__(self, kind: str, args: Any, kwargs: Any, modules: list[nn.Module]) -> None:
        flat, self.nested = pytree.tree_flatten((args, kwargs))
        self.tensors = [value for value in flat if isinstance(value, Tensor)]
        self.others = [None if isinstance(value, Tensor) else (value,) for value in flat]
        modes = tuple(part.training for module in modules for part in module.modules())
        shapes = tuple((t.shape, t.dtype, t.device) for t in self.tensors)
        self.key = kind, repr(self.nested), _hashable(self.others), modes, shapes

    def arguments(self, tensors: list[Tensor]) -> tuple[Any, Any]:
        """The arguments with other tensors."""
        given = iter(tensors)
        flat = [next(given) if other is None else other[0] for other in self.others]
        return pytree.tree_unflatten(flat, self.nested)


def _hashable(others: list[Any]) -> Any:
    try:
        hash(tuple(others))
    except TypeError:
        return repr(others)
    return tuple(others)


def _inside(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # Pyro's schedulers hold theirs
