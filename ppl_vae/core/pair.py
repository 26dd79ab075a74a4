"""A pair: a model and a guide as one object, with cached facts about both.

Everything that takes ``model, guide`` makes one :class:`Pair` of them, and passes it on. A fact
about a pair that costs runs of its programs, such as the dimension at which a plate of samples
fits, is then found once.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn

from ppl_vae.core.arrays.inputs import as_data_and_mask, check_support
from ppl_vae.core.autoguides import check_automatic, check_parts_not_joint, without_data
from ppl_vae.core.batch import Batch
from ppl_vae.core.devices.accelerators import accelerators_in_use
from ppl_vae.core.devices.device_mix import describe_mix, find_misplaced_site, is_device_mix
from ppl_vae.core.handlers import CheckedReplay, DistinctNames
from ppl_vae.core.introspection import (
    accepted_kwargs,
    bound_object,
    filter_kwargs,
    modules_of,
    notes_of,
    placement,
)
from ppl_vae.core.nonfinite import CONSTRAINT_MESSAGE, describe_nonfinite
from ppl_vae.core.program import Program, ProgramLike
from ppl_vae.core.stacked_draws import stack_runs
from ppl_vae.core.state import (
    dry_run,
    dry_run_eval,
    eval_mode,
    kept_generators,
    train_mode,
    validation,
)
from ppl_vae.core.traces import SAMPLE_PLATE, PairTraces, check_pair, free_dim, global_sites, sites
from ppl_vae.core.validation import ArrayLike


@dataclass(frozen=True)
class Pair:
    """A model and a guide, and the facts about them that evaluation and inference need.

    Two pairs of the same programs are equal. Facts are computed when they are first asked for.

    Attributes:
        model: a program, see :mod:`ppl_vae.core.program`.
        guide: a program that draws the model's latent variables.
    """

    model: ProgramLike
    guide: ProgramLike
    _sample_dim: list[int | None] = field(
        default_factory=list, init=False, repr=False, compare=False
    )
    _has_globals: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)
    _inspected: list[PairTraces] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name, program in (("model", self.model), ("guide", self.guide)):
            if isinstance(program, Program) and _holds_programs(program):
                kind = type(program).__name__
                raise TypeError(
                    f"{name} must be a Pyro program; got the {kind} object, which holds two: pass "
                    f"its .{name}, as {kind.lower()}.{name}"
                )

    @cached_property
    def modules(self) -> list[nn.Module]:
        """The modules of both programs."""
        return modules_of(self.model, self.guide)

    @cached_property
    def placement(self) -> dict[str, Any]:
        """``dtype`` and ``device`` of the pair's tensors; empty without one."""
        return placement(self.model, self.guide)

    @cached_property
    def model_owner(self) -> Any:
        """The object whose method the model is, or the model itself."""
        return bound_object(self.model)

    @cached_property
    def guide_owner(self) -> Any:
        """The object whose method the guide is, or the guide itself."""
        return bound_object(self.guide)

    @cached_property
    def takes_mask(self) -> bool:
        """Whether the model has a keyword ``mask``, so that x may have missing values."""
        named, any_other = accepted_kwargs(self.model)
        return any_other or "mask" in named

    def notes(self) -> tuple[str, ...]:
        """The caveats that the pair's modules state about numbers of it, each once."""
        return notes_of(self.model, self.guide)

    def observe(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        name: str = "x",
        allow_empty_rows: bool = False,
    ) -> Batch:
        """Data as a batch on the pair's device, checked at the boundary.

        Args: as :func:`ppl_vae.core.arrays.inputs.as_data_and_mask`.

        Raises:
            ValueError: as :func:`ppl_vae.core.arrays.inputs.as_data_and_mask`.
        """
        values, observed = as_data_and_mask(
            x,
            mask,
            model=self.model,
            guide=self.guide,
            name=name,
            allow_empty_rows=allow_empty_rows,
        )
        return Batch(values, observed)

    def check_support(self, batch: Batch) -> None:
        """Let the model refuse data outside its support.

        Raises:
            ValueError: as the model's ``check_data``.
        """
        check_support(self.model, batch.x, batch.mask)

    def with_guide(self, guide: ProgramLike, *, sample_dim: int | None = None) -> "Pair":
        """The same model under another guide.

        Args:
            guide: the other guide.
            sample_dim: the :meth:`sample_dim` of the new pair, where it is known, since the guide
                has the plates of the present one; None: it is found when it is first needed.
        """
        pair = Pair(self.model, guide)
        pair._has_globals.extend(self._has_globals)
        if sample_dim is not None:
            pair._sample_dim.append(sample_dim)
        return pair

    def eval_mode(self) -> AbstractContextManager[None]:
        """Evaluation mode in which nothing is masked, see :func:`ppl_vae.core.state.eval_mode`."""
        return eval_mode(self.model, self.guide)

    def train_mode(self, training: bool = True) -> AbstractContextManager[None]:
        """Training or evaluation mode of the pair's modules."""
        return train_mode(self.model, self.guide, training=training)

    def dry_run(self) -> AbstractContextManager[None]:
        """Runs inside leave generators and buffers as they were."""
        return dry_run(self.model, self.guide)

    def run(self, batch: Batch, *, num_samples: int = 1, dim: int | None = None) -> PairTraces:
        """Run the guide, and the model replayed on its draws; check both against the contract.

        Args:
            batch: the rows, of which each program is given the keywords that its signature takes.
            num_samples: draws per datum: under a plate of samples, or, for programs that cannot
                have one (``dim`` None), by running each row that often, or, if they have global
                latent variables too, by one run per draw.
            dim: the dimension of the plate of samples, see :meth:`sample_dim`.

        Raises:
            ValueError: as :func:`ppl_vae.core.traces.check_pair`.
        """
        if num_samples > 1 and dim is None and self.has_globals(batch):
            return stack_runs([self._run(batch, 1, None) for _ in range(num_samples)])
        return self._run(batch, num_samples, dim)

    def _run(self, batch: Batch, num_samples: int, dim: int | None) -> PairTraces:
        repeats = num_samples if dim is None else 1
        num_data = filter_kwargs(self.model, batch.keywords).get("num_data")
        rows, once = len(batch), batch
        guide_trace, batch = _traced_guide(self.guide, batch, num_samples, dim)
        with CheckedReplay(trace=guide_trace):
            model_trace = _traced(self.model, batch, num_samples, dim, "model")
        traces = PairTraces(model_trace, guide_trace, num_data, repeats)
        check_pair(traces, rows * repeats)
        if any(site["infer"].get("is_auxiliary") for site in global_sites(guide_trace).values()):
            check_parts_not_joint(self.modules, once)
        if not self._has_globals:
            self._has_globals.append(bool(traces.global_latent))
        return traces

    def inspect(self, batch: Batch) -> PairTraces:
        """A run in evaluation mode from which properties of the sites are read.

        It is made once, with the first batch, since they are properties of the programs.

        Raises:
            ValueError: as :func:`ppl_vae.core.traces.check_pair`.
        """
        if not self._inspected:
            with dry_run_eval(self.model, self.guide):
                self._inspected.append(self.run(batch))
        return self._inspected[0]

    def sample_dim(self, batch: Batch) -> int | None:
        """The dimension at which a plate of samples fits: one left of the programs' own nesting.

        It is found once, with the first batch, since the nesting is a property of the programs.

        Returns:
            The dimension, or None if the programs run alone but not under a further plate, or
            have other densities there (a network that takes 2-d input only, a ``softmax(dim=1)``):
            such a pair is run on repeated rows, or once per draw.
        """
        if not self._sample_dim:
            with dry_run_eval(self.model, self.guide):
                self._sample_dim.append(_find_sample_dim(self, batch))
        return self._sample_dim[0]

    def has_globals(self, batch: Batch) -> bool:
        """Whether latent variables are outside the plate over data.

        It is found in the first run of the pair, or else by a run of the guide.
        """
        if not self._has_globals:
            with dry_run_eval(self.guide):
                trace, _ = _traced_guide(self.guide, batch, 1, None)
            self._has_globals.append(bool(global_sites(trace)))
        return self._has_globals[0]


def _holds_programs(module: nn.Module) -> bool:
    """Whether an object of the package is no program itself, but has a method ``model``."""
    unimplemented = type(module).forward is nn.Module.forward
    return unimplemented and callable(getattr(module, "model", None))


def run_guide(
    guide: ProgramLike, batch: Batch, *, num_samples: int = 1, dim: int | None = None
) -> PairTraces:
    """Run a guide alone, as :meth:`Pair.run` does; its trace stands for the model's, too."""
    trace, _ = _traced_guide(guide, batch, num_samples, dim)
    return PairTraces(trace, trace, None, num_samples if dim is None else 1)


def _traced_guide(
    guide: ProgramLike, batch: Batch, num_samples: int, dim: int | None
) -> tuple[Trace, Batch]:
    """The guide's trace, and the batch it was run on: with repeated rows where ``dim`` is None."""
    repeats = num_samples if dim is None else 1
    check_automatic(guide, batch, repeats)
    batch = batch.repeated(repeats) if repeats > 1 else batch
    return _traced(without_data(guide), batch, num_samples, dim, "guide"), batch


def _traced(
    program: ProgramLike, batch: Batch, num_samples: int, dim: int | None, name: str
) -> Trace:
    under = program if dim is None else pyro.plate(SAMPLE_PLATE, num_samples, dim=dim)(program)
    keywords = filter_kwargs(program, batch.keywords)

    def run() -> Trace:
        with DistinctNames():
            return poutine.trace(under).get_trace(batch.x, **keywords)

    def mix() -> str:
        with kept_generators(accelerators_in_use()), validation(False):
            return describe_mix(name, program, run, batch.x.device)

    try:
        trace = run()
    except RuntimeError as error:
        if is_device_mix(error):
            raise ValueError(mix()) from error
        raise
    except ValueError as error:
        if CONSTRAINT_MESSAGE not in str(error):
            raise
        with torch.no_grad(), kept_generators([]), validation(False):
            trace = poutine.trace(under).get_trace(batch.x, **keywords)
            found = describe_nonfinite(trace, name, batch)
        if found is None:
            raise
        raise ValueError(f"{found}; are x and the parameters of the pair finite?") from error
    if find_misplaced_site(trace, batch.x.device) is not None:
        raise ValueError(mix())
    return trace


def _find_sample_dim(pair: Pair, batch: Batch) -> int | None:
    alone = [pair.run(batch), pair.run(batch)]
    dim = free_dim(alone[0])
    try:
        same = _same_draw_by_draw(pair, batch, alone, dim)
    except Exception:  # any error that a user's program raises on a further dimension
        same = False
    if not same:
        pair.run(batch, num_samples=2)
    return dim if same else None


def _same_draw_by_draw(pair: Pair, batch: Batch, alone: list[PairTraces], dim: int) -> bool:
    """Whether two draws have the log weights under a plate at ``dim`` that they have alone."""
    local = torch.cat([run.log_weights() for run in alone])
    shared = torch.cat([run.global_log_weights() for run in alone])
    first, second = (run.guide for run in alone)
    for name, site in sites(first).items():
        values = site["value"], sites(second)[name]["value"]
        rank = -dim - 1 + len(site["fn"].event_shape)
        site["value"] = torch.stack([v.reshape((1,) * (rank - v.dim()) + v.shape) for v in values])
    replayed = pair.with_guide(poutine.replay(pair.guide, trace=first))
    together = replayed.run(batch, num_samples=2, dim=dim)
    if not _close(together.log_weights(), local):
        return False
    return _close(together.global_log_weights().expand(2), shared)


def _close(together: Tensor, separate: Tensor) -> bool:
    return together.shape == separate.shape and torch.allclose(
        together, separate, rtol=1e-3, atol=1e-3, equal_nan=True
    )
