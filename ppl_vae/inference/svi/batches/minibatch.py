"""The objective of a pair on minibatches of its data."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, cast

import torch
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.description import describe_callable
from ppl_vae.core.introspection import filter_kwargs, notes_on
from ppl_vae.core.nonfinite import describe_nonfinite_pair
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import isolated_store, precision, validation
from ppl_vae.core.validation import check_int
from ppl_vae.data.sources.row_stream import Rows, RowStream, describe_rows
from ppl_vae.inference.svi.batches.schedule import Schedule
from ppl_vae.objectives.bounds import ELBO, IWAE
from ppl_vae.objectives.pyro_objectives import as_capturable

FINITE = "every site is finite for another draw"
"""The description of a batch whose objective was not finite by chance."""


class WeightedObjective:
    """An objective of a batch in nats per datum, with warm-up of the weight of the KL.

    Args:
        objective: one of the package's objectives, or one of Pyro's.
        warmup: steps during which the weight of the KL rises from zero to the objective's beta.

    Raises:
        TypeError: if it is no instance of an objective.
        ValueError: if there is a warm-up and the objective has no weight of the KL.
    """

    def __init__(self, objective: Any, warmup: int | None) -> None:
        if isinstance(objective, type) or not hasattr(objective, "differentiable_loss"):
            raise TypeError(
                "objective must be an instance with a differentiable_loss, such as ELBO(), "
                f"IWAE() or pyro.infer.Trace_ELBO(); got {objective!r}"
            )
        if warmup is not None and not isinstance(objective, ELBO):
            raise ValueError(
                f"warmup changes the weight of the KL, which {type(objective).__name__} does not "
                "have; use objective=ELBO(...)"
            )
        self.objective = copy.copy(objective)
        self._capturable = as_capturable(self.objective)
        self.beta = getattr(objective, "beta", 1.0)
        self.warmup = None if warmup is None else check_int("warmup", warmup)
        self.is_ours = isinstance(objective, ELBO | IWAE)
        shown = repr(objective) if self.is_ours else describe_callable(objective)
        self._name = f"{shown}, {warmup=}"

    def __repr__(self) -> str:
        return self._name

    def __call__(self, pair: Pair, batch: Batch, step: int) -> Tensor:
        """The objective on a batch at step number ``step`` (counted from 1)."""
        return self.weighted(pair, batch, self.kl_weight(step))

    def kl_weight(self, step: int) -> float:
        """The weight of the KL at step number ``step`` (counted from 1)."""
        return self.beta if self.warmup is None else self.beta * min(1.0, step / self.warmup)

    def traced(self, pair: Pair, batch: Batch, beta: Tensor) -> Tensor:
        """The same as :meth:`weighted`, without reading values of tensors.

        Raises:
            ValueError: for objectives of Pyro without an equivalent in this package.
        """
        if self._capturable is None:
            raise ValueError(
                f"{type(self.objective).__name__} is none of the objectives that can be captured"
            )
        if not isinstance(self._capturable, ELBO):
            return self._capturable.value_of(pair, batch)[0]
        before = self._capturable.beta
        try:
            self._capturable.beta = cast(Any, beta)
            return self._capturable.value_of(pair, batch)[0]
        finally:
            self._capturable.beta = before

    def weighted(self, pair: Pair, batch: Batch, beta: float) -> Tensor:
        """The objective on a batch with this weight of the KL."""
        if isinstance(self.objective, ELBO):
            self.objective.beta = beta
        if isinstance(self.objective, ELBO | IWAE):
            return self.objective.value_of(pair, batch)[0]
        # Pyro's own objectives pass every keyword to both programs, and sum over the plate.
        num_data = filter_kwargs(pair.model, batch.keywords).get("num_data", len(batch))
        programs = [_ignoring_unknown_keywords(program) for program in (pair.model, pair.guide)]
        loss = self.objective.differentiable_loss(*programs, batch.x, **batch.keywords)
        return -torch.as_tensor(loss) / num_data


def _ignoring_unknown_keywords(program: ProgramLike) -> ProgramLike:
    return lambda x, **keywords: program(x, **filter_kwargs(program, keywords))


EpochTransform: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Computes the data of an epoch from the original data, with a generator on their device."""


@dataclass
class MinibatchObjective:
    """The objective of a pair on rows of its data.

    Attributes:
        pair: the pair.
        objective: what is maximised.
        x: the data of this epoch, (N, D); no rows, (0, D), if they are read in blocks.
        mask: True where observed; or None.
        stream: the rows that are read in blocks; or None.
        precision: the precision of matrix products, see :func:`ppl_vae.core.state.precision`.
        epoch_transform: computes the data of each epoch from the original x: once at
            construction, and again at each :meth:`refresh`.

    Raises:
        ValueError: if x's device has no such precision; as :meth:`refresh`.
    """

    pair: Pair
    objective: WeightedObjective
    x: Tensor
    mask: Tensor | None
    precision: str = "float32"
    epoch_transform: EpochTransform | None = None
    stream: RowStream | None = None

    @classmethod
    def of(
        cls,
        pair: Pair,
        objective: WeightedObjective,
        rows: Rows,
        precision: str = "float32",
        epoch_transform: EpochTransform | None = None,
    ) -> Self:
        """The objective on rows in memory or on those that are read in blocks."""
        x, mask, stream = (
            (rows.like, None, rows) if isinstance(rows, RowStream) else (rows.x, rows.mask, None)
        )
        return cls(pair, objective, x, mask, precision, epoch_transform, stream)

    def __post_init__(self) -> None:
        with self.rounding():
            pass
        self.original = self.x
        self.refresh(torch.Generator(self.x.device).manual_seed(0))

    @property
    def transform_name(self) -> str | None:
        """The name of ``epoch_transform``, if there is one."""
        transform = self.epoch_transform
        if transform is None:
            return None
        return getattr(transform, "__qualname__", type(transform).__name__)

    def refresh(self, generator: torch.Generator) -> None:
        """Compute the data of another epoch.

        Raises:
            ValueError: if ``epoch_transform`` does not return finite data of the same shape, dtype
                and device, within the model's support.
        """
        if self.epoch_transform is None:
            return
        x, like = self.epoch_transform(self.original, generator), self.original
        same = isinstance(x, Tensor) and (x.shape, x.dtype) == (like.shape, like.dtype)
        if not same or x.device != like.device or not bool(x.isfinite().all()):
            raise ValueError(
                f"epoch_transform must return finite data of shape {tuple(like.shape)}, "
                f"{like.dtype} and on {like.device}, as x is; {self.transform_name} did not"
            )
        self.pair.check_support(Batch(x, self.mask))
        self.x = x.contiguous()

    def rounding(self) -> AbstractContextManager[None]:
        """The context in which the value of a step and its gradient are computed."""
        return precision(self.precision, self.x.device)

    def value(self, rows: Tensor | None, step: int) -> Tensor:
        """The objective of these rows (None: all) in nats per datum."""
        return self.objective(self.pair, self.batch(rows), step)

    @property
    def whole(self) -> Rows:
        """All rows."""
        return Batch(self.x, self.mask) if self.stream is None else self.stream

    def all_rows(self, rows: Tensor | None) -> Tensor:
        """The numbers of these rows (None: all)."""
        return torch.arange(len(self.whole), device=self.whole.device) if rows is None else rows

    def batch(self, rows: Tensor | None) -> Batch:
        """These rows; None is all."""
        if rows is None:
            return Batch(self.x, self.mask)
        return self.whole.rows(rows)

    def batches(self, schedule: Schedule, order_seed: int, start: int) -> Iterator[Tensor | None]:
        """The row indices of each step from ``start`` on; what they need is read ahead."""
        if self.stream is None:
            return schedule.batches(order_seed, start, self.x.device)
        return schedule.batches(order_seed, start, announce=self.stream.announce)

    def notes(self) -> tuple[str, ...]:
        """Notes on the data."""
        if self.stream is None:
            return notes_on(self.pair.model, self.x, self.mask)
        first = self.stream.first_rows()
        return notes_on(self.pair.model, first.x, first.mask)

    def descriptions(self) -> tuple[str, str | None]:
        """Descriptions of x and of the mask, if there is one, with their checksums."""
        return describe_rows(self.stream or Batch(self.original, self.mask))

    @property
    def common_tensors(self) -> list[Tensor]:
        """The tensors that all steps of an epoch read: x, and the mask if there is one.

        There are none if rows are read in blocks.
        """
        if self.stream is not None:
            return []
        return [self.x] if self.mask is None else [self.x, self.mask]

    def step_tensors(self, rows: Tensor | None) -> list[Tensor]:
        """The tensors of a step, as :meth:`traced_value` needs them.

        Args:
            rows: the rows of the step; None is all rows.
        """
        if rows is None:
            return []
        if self.stream is None:
            return [rows]
        batch = self.stream.rows(rows)
        tensors = [batch.index, batch.x, batch.mask]
        return [tensor for tensor in tensors if tensor is not None]

    def traced_value(self, common: list[Tensor], per_step: list[Tensor], beta: Tensor) -> Tensor:
        """:meth:`value` as a function of tensors, whose operations do not depend on their values.

        Args:
            common: see :attr:`common_tensors`.
            per_step: those of one step, see :meth:`step_tensors`: the numbers of the rows of the
                batch, then, if rows are read in blocks, x and the mask if there is one. An empty
                list is all rows.
            beta: the weight of the KL, ().
        """
        tensors = common
        if per_step:
            rows, *own = per_step
            # index_select copies whole rows; indexing by a tensor copies single numbers.
            tensors = own or [tensor.index_select(0, rows) for tensor in common]
        x, mask = tensors if len(tensors) > 1 else (tensors[0], None)
        batch = Batch(x, mask)
        if per_step:
            batch = Batch(x, mask, per_step[0], len(self.whole))
        return self.objective.traced(self.pair, batch, beta)

    def prepare_tracing(self, rows: Tensor | None) -> None:
        """Run :meth:`traced_value` once, so that what it reads from values is cached."""
        per_step = self.step_tensors(rows)
        with isolated_store(), self.pair.dry_run():
            self.traced_value(self.common_tensors, per_step, torch.ones(()))

    def find_nonfinite_site(self, rows: Tensor | None) -> str:
        """Describe the first site whose log density is not finite."""
        if rows is None and self.stream is not None:
            batch = self.stream.first_rows()
        else:
            batch = self.batch(rows)
        try:
            with self.pair.dry_run(), validation(False):
                run = self.pair.run(batch)
        except (FloatingPointError, RuntimeError, ValueError) as error:
            return f"the programs raise {type(error).__name__} at these parameters"
        return describe_nonfinite_pair(run, batch) or FINITE
