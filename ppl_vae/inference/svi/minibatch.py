"""One step of SVI: the objective on a batch, and what its gradient does to the parameters."""

import copy
import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike, check_support, filter_kwargs
from ppl_vae.core.state import dry_run, isolated_store, precision, validation
from ppl_vae.core.traces import log_prob, sites
from ppl_vae.core.validation import check_int
from ppl_vae.inference.svi.schedule import PerDatumUpdate, table_rate
from ppl_vae.objectives.bounds import ELBO, IWAE, as_capturable, batch_keywords


class WeightedObjective:
    """An objective as a function of a batch, in nats per datum, its KL warmed up.

    Args:
        objective: one of the package's, or one of Pyro's own.
        warmup: steps in which the weight of the KL rises from zero to the objective's beta.
    """

    def __init__(self, objective: Any, warmup: int | None) -> None:
        if isinstance(objective, type) or not hasattr(objective, "differentiable_loss"):
            raise TypeError(
                "objective must be an instance with a differentiable_loss, such as ELBO(), "
                f"IWAE() or pyro.infer.Trace_ELBO(); got {objective!r}"
            )
        if warmup is not None and not isinstance(objective, ELBO):
            raise ValueError(
                f"warmup raises the weight of the KL, which {type(objective).__name__} has not; "
                "use objective=ELBO(...)"
            )
        self.objective = copy.copy(objective)
        self._recorded = as_capturable(self.objective)
        self.beta = getattr(objective, "beta", 1.0)
        self.warmup = None if warmup is None else check_int("warmup", warmup)
        self.is_ours = isinstance(objective, ELBO | IWAE)
        self._name = f"{repr(objective) if self.is_ours else type(objective).__name__}, {warmup=}"

    def __repr__(self) -> str:
        return self._name

    def __call__(
        self, model: ProgramLike, guide: ProgramLike, x: Tensor, step: int, **keywords: Any
    ) -> Tensor:
        """The objective on rows x, at the ``step``-th step (counted from 1)."""
        return self.weighted(model, guide, x, self.weight(step), **keywords)

    def weight(self, step: int) -> float:
        """Of the KL, at the ``step``-th step (counted from 1)."""
        return self.beta if self.warmup is None else self.beta * min(1.0, step / self.warmup)

    def recorded(
        self, model: ProgramLike, guide: ProgramLike, x: Tensor, beta: Tensor, **keywords: Any
    ) -> Tensor:
        """:meth:`weighted` where nothing may be read from tensors.

        Raises:
            ValueError: for objectives of Pyro's that have no equal here.
        """
        if self._recorded is None:
            raise ValueError(f"{type(self.objective).__name__} is none of the objectives known")
        if not isinstance(self._recorded, ELBO):
            return self._recorded.mean_value(model, guide, x, **keywords)[0]
        before = self._recorded.beta
        try:
            self._recorded.beta = cast(Any, beta)
            return self._recorded.mean_value(model, guide, x, **keywords)[0]
        finally:
            self._recorded.beta = before

    def weighted(
        self, model: ProgramLike, guide: ProgramLike, x: Tensor, beta: float, **keywords: Any
    ) -> Tensor:
        """The objective on rows x with this weight of the KL."""
        if isinstance(self.objective, ELBO):
            self.objective.beta = beta
        if isinstance(self.objective, ELBO | IWAE):
            return self.objective.mean_value(model, guide, x, **keywords)[0]
        # Pyro's own objectives pass every keyword to both programs, and sum over the plate.
        num_data = filter_kwargs(model, keywords).get("num_data", len(x))
        programs = [_only_accepted(program) for program in (model, guide)]
        loss = self.objective.differentiable_loss(*programs, x, **keywords)
        return -torch.as_tensor(loss) / num_data


def _only_accepted(program: ProgramLike) -> ProgramLike:
    return lambda x, **keywords: program(x, **filter_kwargs(program, keywords))


EachEpoch: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Makes an epoch's data of those given, with a generator on their device."""


@dataclass
class MinibatchObjective:
    """The objective of a pair on rows of its data.

    Attributes:
        model, guide: the pair.
        objective: what is maximised.
        x, mask: the whole data; x as it is in this epoch.
        precision: of matrix products, see :func:`ppl_vae.core.state.precision`.
        each_epoch: makes x of the x given here, once now, and anew with :meth:`refresh`.

    Raises:
        ValueError: if there is no such precision on x's device; as :meth:`refresh`.
    """

    model: ProgramLike
    guide: ProgramLike
    objective: WeightedObjective
    x: Tensor
    mask: Tensor | None
    precision: str = "float32"
    epoch_transform: EachEpoch | None = None

    def __post_init__(self) -> None:
        with self.rounding():
            pass
        self._given = self.x
        self.refresh(torch.Generator(self.x.device).manual_seed(0))

    @property
    def refresh_generator(self) -> str | None:
        """What ``epoch_transform`` is called, if there is one."""
        made = self.epoch_transform
        return None if made is None else getattr(made, "__qualname__", type(made).__name__)

    def refresh(self, generator: torch.Generator) -> None:
        """Make the data of another epoch.

        Raises:
            ValueError: if ``epoch_transform`` does not return finite data of the same shape, dtype
                and device, within the model's support.
        """
        if self.epoch_transform is None:
            return
        made = self.epoch_transform(self._given, generator)
        like = self._given
        same = isinstance(made, Tensor) and (made.shape, made.dtype) == (like.shape, like.dtype)
        if not same or made.device != like.device or not bool(made.isfinite().all()):
            raise ValueError(
                f"each_epoch must return finite data of shape {tuple(like.shape)}, {like.dtype} "
                f"and on {like.device}, as x is; {self.refresh_generator} did not"
            )
        check_support(self.model, made, self.mask)
        self.x = made.contiguous()

    def rounding(self) -> AbstractContextManager[None]:
        """The context in which a step runs: its value and its gradient."""
        return precision(self.precision, self.x.device)

    def value(self, rows: Tensor | None, step: int) -> Tensor:
        """The objective in nats per datum; ``rows`` None is all of them."""
        x, keywords = self._of(rows)
        return self.objective(self.model, self.guide, x, step, **keywords)

    def _of(self, rows: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        if rows is None:
            return self.x, {} if self.mask is None else {"mask": self.mask}
        return self.x[rows], batch_keywords(self.x, self.mask, rows)

    def recorded_value(self, whole: list[Tensor], each: list[Tensor], beta: Tensor) -> Tensor:
        """:meth:`value` as a function of tensors alone: (x, mask) and (rows,), one of them each.

        Nothing here depends on what the tensors hold.
        """
        names = ("x", "mask")[: len(whole)]
        given: dict[str, Any] = dict(zip(names, whole, strict=True))
        if each:
            (rows,) = each
            given = {name: tensor[rows] for name, tensor in given.items()}
            given |= {"index": rows, "num_data": len(self.x)}
        x = given.pop("x")
        return self.objective.recorded(self.model, self.guide, x, beta, **given)

    def prepare(self, rows: Tensor | None) -> None:
        """What :meth:`recorded_value` must find out of the pair by reading values, once."""
        whole = [self.x] if self.mask is None else [self.x, self.mask]
        with isolated_store(), dry_run(self.model, self.guide):
            self.recorded_value(whole, [] if rows is None else [rows], torch.ones(()))

    def find_nonfinite_site(self, rows: Tensor | None) -> str:
        """The first site whose log density is not finite."""
        x, keywords = self._of(rows)
        try:
            with dry_run(self.model, self.guide), validation(False):
                run = Pair(self.model, self.guide).run(Batch(x, **keywords))
        except (RuntimeError, ValueError) as error:
            return f"the programs cannot run any more ({type(error).__name__})"
        for program, trace in (("guide", run.guide), ("model", run.model)):
            for name, site in sites(trace).items():
                if not log_prob(site).isfinite().all():
                    return f"site {name!r} of the {program} has a log density that is not"
        return "each site is finite on another draw"


class OptimizerStep:
    """What a gradient does to the parameters: clipping, optimizer, scheduler.

    Args:
        named: the parameters by name.
        modules: the pair's modules, for their buffers and their per-datum tables.
        lr: learning rate.
        optimizer: a callable of (parameters, lr).
        grad_clip: largest norm of the gradient.
        steps_per_epoch: between two visits of a row of a per-datum table.
    """

    def __init__(
        self,
        named: dict[str, Tensor],
        modules: list[nn.Module],
        lr: float,
        optimizer: Callable[..., torch.optim.Optimizer],
        grad_clip: float | None,
        steps_per_epoch: int = 1,
    ) -> None:
        if lr <= 0 or (grad_clip is not None and grad_clip <= 0):
            raise ValueError(f"lr and grad_clip must be positive; got {lr=} and {grad_clip=}")
        self.lr, self.grad_clip = lr, grad_clip
        self.parameters = list(named.values())
        self.buffers = [buffer for module in modules for buffer in module.buffers()]
        self.optimizer = optimizer(self.parameters, lr=lr)
        self.scheduler: Any = None
        self.rates: list[list[float]] = []  # of each step, where there is a scheduler
        tables = [t for m in modules for part in m.modules() for t in _tables(part)]
        rate = table_rate(self.optimizer, steps_per_epoch)
        self.tables = PerDatumUpdate(self.optimizer, tables, rate)

    def use_scheduler(self, scheduler: Callable[..., Any] | None, num_steps: int) -> None:
        """Make the scheduler, from (optimizer, number of steps) or from (optimizer)."""
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

    def learning_rates(self, steps: int) -> list[float]:
        """Of the next steps; nothing changes.

        Raises:
            ValueError: if the scheduler moves more than the learning rate.
        """
        group = self.optimizer.param_groups[0]
        if self.scheduler is None:
            return [float(group["lr"])] * steps
        now, before = copy.deepcopy(self.scheduler.state_dict()), dict(group)
        rates = []
        for _ in range(steps):
            rates.append(float(group["lr"]))
            self.scheduler.step()
        moved = [k for k in before if k not in ("lr", "params") and group[k] != before[k]]
        self.scheduler.load_state_dict(now)
        group.update(before)
        if moved:
            raise ValueError(f"the scheduler moves more than the learning rate: {moved}")
        return rates

    def advance(self, steps: int) -> None:
        """Let the scheduler know of steps that were done elsewhere."""
        for _ in range(steps):
            self._schedule()

    def catch_up(self, rates: list[list[float]]) -> list[dict[str, Any]] | str:
        """Let the scheduler know of steps that another one was asked for, made at these rates.

        Returns:
            The settings of the optimizer's groups that follow; or how the rates differ.
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
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def _schedule(self) -> None:
        if self.scheduler is not None:
            self.rates.append([float(group["lr"]) for group in self.optimizer.param_groups])
            self.scheduler.step()

    def apply(self, value: Tensor, rows: Tensor | None) -> None:
        """Step up the gradient of the objective."""
        self.optimizer.zero_grad(set_to_none=True)
        (-value).backward()
        if self.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.tables.step(rows)
        self._schedule()


def _tables(module: nn.Module) -> list[nn.Parameter]:
    declared: Any = getattr(module, "tables", None)
    if not callable(declared):
        return []
    tables: Any = declared()
    return list(tables)
