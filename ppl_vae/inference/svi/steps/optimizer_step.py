"""What the gradient of a step does to the parameters: clipping, optimizer, scheduler."""

import copy
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ppl_vae.core.state import kept_generators
from ppl_vae.inference.svi.settings import Optimization, OptimizerFactory, SchedulerFactory

MAX_TABLE_RATE = 10.0
"""The largest factor by which updates of per-datum parameters are multiplied."""


def per_datum_rate(optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> float:
    """The factor by which updates of per-datum parameters are multiplied.

    A row of such a parameter is drawn only once in N / B steps, with N / B times the gradient
    that the whole data would give it. For SGD the larger gradient compensates for the rarity.
    Adam and similar optimizers divide by the size of the gradient, and so the rows would learn
    N / B times more slowly than all other parameters. Their updates are multiplied by N / B, up
    to a bound: a row does not converge if each of its updates is larger than the width of its
    posterior.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return 1.0
    return min(float(steps_per_epoch), MAX_TABLE_RATE)


class PerDatumUpdate:
    """An optimizer step that updates only some rows of per-datum parameters and of their state.

    Without it, an optimizer with momentum also updates q_i of data that are not in the batch.

    Args:
        optimizer: the optimizer of all parameters.
        tables: the parameters with one row per datum.
        rate: the factor by which updates of their rows are multiplied, see
            :func:`per_datum_rate`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, tables: Sequence[nn.Parameter], rate: float = 1.0
    ) -> None:
        self.optimizer, self.tables, self.rate = optimizer, tables, rate

    def step(self, rows: Tensor | None) -> None:
        """Make a step of the optimizer; of the tables, only ``rows`` (None: all) change."""
        if rows is None or not self.tables:
            self.optimizer.step()
            return
        before = {
            (id(table), key): value.detach().clone() for table, key, value in self._tensors()
        }
        self.optimizer.step()
        with torch.no_grad():
            for table, key, value in self._tensors():
                old = before.get((id(table), key), torch.zeros_like(value))
                updated = value[rows].clone()
                if not key:
                    updated = torch.lerp(old[rows], updated, self.rate)
                value.copy_(old)
                value[rows] = updated

    def _tensors(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Each table with the key "", and its optimizer state with the optimizer's keys."""
        for table in self.tables:
            yield table, "", table
            for key, value in self.optimizer.state.get(table, {}).items():
                if isinstance(value, Tensor) and value.shape == table.shape:
                    yield table, key, value


class OptimizerStep:
    """Updates the parameters of a pair by the gradient of its objective.

    Args:
        named: the parameters by name.
        modules: the modules of the pair, with its buffers and its per-datum parameters.
        settings: learning rate, optimizer and gradient clipping.
        steps_per_epoch: steps between two updates of a row of a per-datum parameter.

    Raises:
        ValueError: if the learning rate or the norm for clipping is not positive.
    """

    def __init__(
        self,
        named: dict[str, Tensor],
        modules: list[nn.Module],
        settings: Optimization,
        steps_per_epoch: int = 1,
    ) -> None:
        lr, grad_clip = settings.lr, settings.grad_clip
        if lr <= 0 or (grad_clip is not None and grad_clip <= 0):
            raise ValueError(f"lr and grad_clip must be positive; got {lr=} and {grad_clip=}")
        self.lr, self.grad_clip = float(lr), grad_clip
        self.parameters = list(named.values())
        self.buffers = [buffer for module in modules for buffer in module.buffers()]
        self._make = settings.optimizer
        self.optimizer = _make_optimizer(settings.optimizer, self.parameters, self.lr)
        self.settings = [_settings(group) for group in self.optimizer.param_groups]
        self.scheduler: Any = None
        self.past_rates: list[list[float]] = []  # of each step, if there is a scheduler
        tables = [t for m in modules for part in m.modules() for t in _embedding_tables(part)]
        rate = per_datum_rate(self.optimizer, steps_per_epoch)
        self.per_datum = PerDatumUpdate(self.optimizer, tables, rate)

    def use_scheduler(self, scheduler: SchedulerFactory | None, num_steps: int) -> None:
        """Create the scheduler from (optimizer, number of steps) or from (optimizer)."""
        if scheduler is None:
            return
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(scheduler).parameters.values()
        required = [p for p in parameters if p.default is p.empty and p.kind in positional]
        arguments = (self.optimizer, num_steps)[: max(1, len(required))]
        self.scheduler = scheduler(*arguments)

    @property
    def state(self) -> list[Tensor]:
        """Every tensor of the pair that a fit changes."""
        return [*self.parameters, *self.buffers]

    def learning_rates(self, num_steps: int) -> list[float]:
        """The learning rates of the next steps; nothing is changed.

        Raises:
            ValueError: if the scheduler changes more than the learning rate.
        """
        group = self.optimizer.param_groups[0]
        if self.scheduler is None:
            return [float(group["lr"])] * num_steps
        scheduler_state, before = copy.deepcopy(self.scheduler.state_dict()), dict(group)
        rates = []
        for _ in range(num_steps):
            rates.append(float(group["lr"]))
            self.scheduler.step()
        changed = [k for k in before if k not in ("lr", "params") and group[k] != before[k]]
        self.scheduler.load_state_dict(scheduler_state)
        group.update(before)
        if changed:
            raise ValueError(f"the scheduler changes more than the learning rate: {changed}")
        return rates

    def advance_scheduler(self, num_steps: int) -> None:
        """Advance the scheduler by steps whose updates were computed elsewhere."""
        for _ in range(num_steps):
            self._step_scheduler()

    def replay_rates(self, rates: list[list[float]]) -> list[dict[str, Any]] | str:
        """Advance the scheduler by steps that were made with given learning rates.

        Args:
            rates: the learning rates of each step, of each group of parameters.

        Returns:
            The resulting settings of the optimizer's groups; or a text that states the first
            difference between the given rates and those of the scheduler.
        """
        groups = self.optimizer.param_groups
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer has made no steps yet
            for step, before in enumerate(rates, 1):
                now = [float(group["lr"]) for group in groups]
                if now != before:
                    return (
                        f"the learning rate of step {step} is {now[0]:g} instead of {before[0]:g}"
                    )
                self.scheduler.step()
        return [_settings(group) for group in groups]

    def state_after_trial(self) -> dict[str, Any] | None:
        """The state that such an optimizer has after a step on copies of the parameters.

        Its structure is that of any later state. Its tensors have shapes and dtypes, but no values
        (torch's device ``"meta"``). None if the optimizer cannot make such a step.
        """
        copies = [p.detach().clone().requires_grad_() for p in self.parameters]
        for parameter in copies:
            parameter.grad = torch.zeros_like(parameter)
        try:
            with kept_generators([p.device for p in copies[:1] if p.device.type != "cpu"]):
                optimizer = _make_optimizer(self._make, copies, self.lr)
                optimizer.step()
        except (TypeError, ValueError, RuntimeError):
            return None
        return tree_map_only(Tensor, lambda t: t.to("meta"), optimizer.state_dict())

    def resume(self, content: dict[str, Any], *, same_length: bool) -> str:
        """Restore the state of the optimizer and of the scheduler from a checkpoint.

        Args:
            content: that of the checkpoint.
            same_length: whether both fits have the same number of steps. Otherwise the state of
                the scheduler may depend on that number, and is computed anew.

        Returns:
            The first difference between this scheduler and that of the checkpoint, or "".
        """
        groups: list[dict[str, Any]] | str = [_settings(g) for g in self.optimizer.param_groups]
        if self.scheduler is not None:
            groups = self.replay_rates(content["past_rates"])
            if isinstance(groups, str):
                return groups
            difference = _first_difference(content["scheduler"], self.scheduler.state_dict())
            if same_length and difference:
                return difference
        self.optimizer.load_state_dict(content["optimizer"])
        for group, setting in zip(self.optimizer.param_groups, groups, strict=True):
            if same_length and group["lr"] != setting["lr"]:
                return f"its next learning rate is {group['lr']} instead of {setting['lr']}"
            if self.scheduler is not None and not same_length:
                group.update(setting)
        self.past_rates = content["past_rates"]
        return ""

    def _step_scheduler(self) -> None:
        if self.scheduler is not None:
            rates = [float(group["lr"]) for group in self.optimizer.param_groups]
            self.past_rates.append(rates)
            self.scheduler.step()

    def apply(self, value: Tensor, rows: Tensor | None) -> None:
        """Make a step that increases the objective.

        Args:
            value: the objective, with its graph.
            rows: the rows of the batch; None is all.
        """
        self.optimizer.zero_grad(set_to_none=True)
        (-value).backward()
        self.update(rows)

    def update(self, rows: Tensor | None) -> None:
        """Make a step with the gradients that the parameters hold.

        Args:
            rows: the rows of the batch; None is all.
        """
        if self.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.per_datum.step(rows)
        self._step_scheduler()


FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers that torch can run as one operation on all parameters, on a CPU too."""


def _make_optimizer(
    make: OptimizerFactory, parameters: list[Tensor], lr: float
) -> torch.optim.Optimizer:
    # The fused version of Adam performs one operation where the other performs ten a parameter.
    if make not in FUSED or not all(p.is_floating_point() for p in parameters):
        return make(parameters, lr=lr)
    try:
        return make(parameters, lr=lr, fused=True)
    except RuntimeError:  # the device of the parameters has no fused optimizer
        return make(parameters, lr=lr)


def _embedding_tables(module: nn.Module) -> list[nn.Parameter]:
    declared: Any = getattr(module, "tables", None)
    if not callable(declared):
        return []
    tables: Any = declared()
    return list(tables)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _first_difference(found: dict[str, Any], here: dict[str, Any]) -> str:
    for name in sorted(found.keys() | here.keys()):
        first, second = found.get(name), here.get(name)
        if not _is_same(first, second):
            return f"its {name} is {first} instead of {second}"
    return ""


def _is_same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        both = isinstance(first, Tensor) and isinstance(second, Tensor)
        return both and torch.equal(first, second)
    return first == second
