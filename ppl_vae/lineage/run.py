"""The lineage from the closed form to the variational autoencoder, on one data set.

Every stage is fitted to the same training rows and evaluated in one unit, nats per datum in the
units of the data. log p of PPCA is exact; that of a nonlinear decoder is estimated by importance
sampling from a Gaussian with full covariance that is optimized for each datum.
"""

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.inputs import as_data_and_mask, labels_of
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.introspection import bound_object
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import threads
from ppl_vae.core.validation import ArrayLike, as_matrix, check_option, check_rows_observed
from ppl_vae.data.column_stats import ColumnStats
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.data.splits import Split, split
from ppl_vae.data.units import SCALES, Scaling, Units, choose_scaling
from ppl_vae.lineage.metrics import EvaluationContext, Reference, has_parameters_per_row
from ppl_vae.lineage.posterior_metrics import posterior_row
from ppl_vae.lineage.posterior_stages import PosteriorFit, in_data_units
from ppl_vae.lineage.problem import LineageProblem, LineageSettings
from ppl_vae.lineage.result import CLOSED_FORM, Lineage
from ppl_vae.lineage.stage import Stage, StageProgress, no_progress, select_stages
from ppl_vae.lineage.stages import STAGES, StageFit, skipped_stages
from ppl_vae.models.linear.sufficient_statistics import summarize_table

AnyStage: TypeAlias = Stage[StageFit | PosteriorFit]
REFERENCES = {CLOSED_FORM: "the closed form", "px-em": "the result of PX-EM"}


def run_lineage(
    x: ArrayLike,
    *,
    x_test: ArrayLike | None = None,
    latent_dim: int,
    stages: Iterable[str] | None = None,
    extra: Mapping[str, tuple[ProgramLike, ProgramLike]] | None = None,
    columns: Iterable[Any] | None = None,
    scale: str = "auto",
    image_shape: tuple[int, int] | None = None,
    about: Mapping[str, Any] | None = None,
    seed: int = 0,
    settings: LineageSettings | None = None,
    after_stage: Callable[[Lineage], None] | None = None,
    progress: StageProgress | None = None,
) -> Lineage:
    """Fit and evaluate all stages of the lineage on one data set.

    The rows of x are split into training, validation and (without ``x_test``) test rows. The
    validation rows serve early stopping of the nonlinear decoders and of ``extra`` pairs; the test
    rows are used for held-out log p only. PPCA and VAE are fitted in units in which x has variance
    one on average, or each of its columns has (``scale``); the table is in the units of x.

    Args:
        x: (N, D); NaN marks a missing value.
        x_test: held-out rows; by default 17 % of x's.
        latent_dim: K.
        stages: names of stages of ``ppl_vae.lineage.stages.STAGES``; by default all but
            ``"nuts"``, which takes long.
        extra: user-defined pairs (model, guide) by name. They are fitted, in place, to the rows in
            the units of x, and evaluated like the others; PPCA among them is compared with the
            optimum of PPCA in these units.
        columns: names of x's columns; by default those of a DataFrame, or x1, x2, ...
        scale: ``"standardize"`` fits standardised columns, ``"none"`` columns with one common
            scale; ``"auto"`` standardises where the columns' standard deviations differ by more
            than a factor of ten and rows are not images, see
            :func:`ppl_vae.data.units.choose_scaling`. Validation and test rows are scaled as
            the training rows are.
        image_shape: height and width, if rows are images.
        about: further entries for the result's ``about``, e.g. the name of the data as ``"data"``.
        seed: the seed of the split, initial values and all draws.
        settings: the settings of fits and evaluation, the same for every stage.
        after_stage: called with the lineage so far after each stage, e.g. to save it.
        progress: a callback that receives the progress of each stage.

    Raises:
        ValueError: invalid data; a row, or a column of the training rows, without observed
            entries; an unknown scale or stage, or no stage that supports missing values; K >= the
            rank of the centred training rows.
    """
    chosen = select_stages(stages, STAGES)
    check_option("scale", scale, SCALES)
    extra = _checked_extra(extra or {})
    started = time.perf_counter()
    given_columns = labels_of(x).columns if columns is None else columns
    if x_test is not None:
        x_test = as_matrix(x_test, name="x_test", schema=TableSchema.of(x))
    x = _checked_rows(x, extra)
    names = _column_names(given_columns, x.shape[1])
    data = split(x, x_test, seed=seed)
    check_rows_observed(~data.test.isnan(), name="x_test")
    statistics = _column_stats(data.train, names)
    scaling = choose_scaling(data.train, statistics, scale, image_shape=image_shape)
    problem = LineageProblem(
        train=data.train,
        val=data.val,
        latent_dim=latent_dim,
        settings=settings or LineageSettings(),
        seed=seed,
    )
    internal = EvaluationContext.of(problem, data.test, scaling.units)
    external = EvaluationContext.of(problem, data.test, Units.none(data.train))
    skipped = skipped_stages([stage.name for stage in chosen], bool(x.isnan().any()))
    steps: list[tuple[AnyStage, EvaluationContext]]
    steps = [(stage, internal) for stage in chosen if stage.name not in skipped]
    steps += [(_extra_stage(name, *pair), external) for name, pair in extra.items()]
    _check_stages(steps, skipped)
    with threads(1):
        metadata = _describe_data(data, statistics, names)
        metadata |= _describe_fits(problem, len(data.test)) | dict(about or {})
        metadata |= {"stages": [stage.name for stage, _ in steps], "left_out": skipped}
        metadata |= _describe_scaling(scaling, bool(extra))
        empty = Lineage((), math.nan, metadata, data=data, units=scaling.units)
        references = _References.of(internal, external, list(extra))
        result = empty
        for result in _partial_results(empty, steps, references, progress or no_progress):
            result.about["seconds"] = time.perf_counter() - started
            if after_stage is not None:
                after_stage(result)
    return result


def _partial_results(
    result: Lineage,
    steps: list[tuple[AnyStage, EvaluationContext]],
    references: "_References",
    progress: StageProgress,
) -> Iterator[Lineage]:
    """The lineage after each of its stages."""
    result = references.applied_to(result)
    for stage, context in steps:
        result = _with_stage(result, stage, context, progress)
        references = references.updated(result)
        result = references.applied_to(result)
        yield result


def _checked_extra(
    extra: Mapping[str, tuple[ProgramLike, ProgramLike]],
) -> dict[str, tuple[ProgramLike, ProgramLike]]:
    if taken := sorted(extra.keys() & STAGES.keys()):
        raise ValueError(f"extra pairs must not have the names of stages: {taken}")
    return dict(extra)


def _checked_rows(
    x: ArrayLike, extra: Mapping[str, tuple[ProgramLike, ProgramLike]]
) -> Float[Tensor, "N D"]:
    x = as_matrix(x)
    check_rows_observed(~x.isnan())
    for model, guide in extra.values():
        as_data_and_mask(x, model=model, guide=guide)  # refuses unsupported missing values
    return x


def _check_stages(steps: Sequence[tuple[AnyStage, Any]], skipped: dict[str, str]) -> None:
    if not steps:
        raise ValueError(
            f"none of the requested stages supports missing values: {list(skipped)}; "
            f"{next(iter(skipped.values()))}"
        )


def _with_stage(
    result: Lineage,
    stage: AnyStage,
    context: EvaluationContext,
    progress: StageProgress,
) -> Lineage:
    total = context.problem.settings.steps

    def report_step(step: int, value: float) -> None:
        progress(stage.name, "fitting", step, total)

    progress(stage.name, "fitting", 0, 0)
    fitted = stage.run(replace(context.problem, progress=report_step))
    progress(stage.name, "evaluating", 0, 0)
    if isinstance(fitted, PosteriorFit):
        row = posterior_row(context, stage, fitted)
        samples = dict(result.samples)
        if fitted.diagnosis:
            samples[stage.name] = in_data_units(fitted.samples, context.units)
        return replace(result, rows=(*result.rows, row), samples=samples)
    row = context.evaluate(stage, fitted)
    pairs = result.pairs | {stage.name: (fitted.pair.model, fitted.pair.guide)}
    return replace(result, rows=(*result.rows, row), pairs=pairs)


@dataclass(frozen=True)
class _References:
    """The best known fits of PPCA.

    Attributes:
        internal: in the internal units, for the stages.
        external: in the data's units, for the user's pairs. It is None where both units have one
            scale for all columns: the models are equivalent then, and share one reference.
        external_names: the names of these pairs, if they have a separate reference.
    """

    internal: Reference
    external: Reference | None
    external_names: frozenset[str]

    @classmethod
    def of(
        cls, internal: EvaluationContext, external: EvaluationContext, extra: list[str]
    ) -> Self:
        scale = internal.units.scale.flatten()
        if not extra or bool((scale == scale[0]).all()):
            return cls(internal.reference(), None, frozenset())
        return cls(internal.reference(), external.reference(), frozenset(extra))

    def _for_stage(self, name: str) -> Reference:
        separate = self.external is not None and name in self.external_names
        return self.external if separate and self.external is not None else self.internal

    def updated(self, result: Lineage) -> Self:
        """These references, or the fit of the table's last row where it is better."""
        row = result.rows[-1]
        if row.posterior is not None:
            return self
        model, reference = result.pairs[row.stage][0], self._for_stage(row.stage)
        better = reference.updated(reference.compare(row, model), model)
        if reference is self.internal:
            return replace(self, internal=better)
        return replace(self, external=better)

    def applied_to(self, result: Lineage) -> Lineage:
        """The table with all distances relative to these references."""
        rows = tuple(
            self._for_stage(row.stage).compare(row, result.pairs.get(row.stage, (None,))[0])
            for row in result.rows
        )
        name = self.internal.name
        described = REFERENCES.get(name, f"the result of {name}")
        return replace(
            result,
            rows=rows,
            optimum=self.internal.log_p,
            about=result.about | {"reference": described},
            reference=name,
            reference_gain=self.internal.gain,
        )


def _column_names(columns: Iterable[Any] | None, width: int) -> list[str]:
    names = [f"x{k + 1}" for k in range(width)] if columns is None else list(map(str, columns))
    if len(names) != width:
        raise ValueError(f"columns must name each of x's {width} columns; it has {len(names)}")
    return names


def _column_stats(train: Tensor, names: list[str]) -> ColumnStats:
    statistics, _ = summarize_table(RowBlocks(train))
    unobserved = (statistics.count == 0).nonzero().flatten().tolist()
    if empty := [names[k] for k in unobserved]:
        raise ValueError(
            f"the training rows of x have nothing observed in the columns {empty[:5]}; drop them, "
            "or choose another seed if other rows have"
        )
    return statistics


def _describe_data(data: Split, statistics: ColumnStats, names: list[str]) -> dict[str, Any]:
    parts = (data.train, data.val, data.test)
    return {
        "num_train": len(data.train),
        "num_val": len(data.val),
        "num_test": len(data.test),
        "data_dim": data.train.shape[1],
        "columns": names,
        "constant_columns": [names[k] for k in statistics.constant_columns()],
        "num_missing": sum(int(part.isnan().sum()) for part in parts),
    }


def _describe_fits(problem: LineageProblem, num_test: int) -> dict[str, Any]:
    settings = problem.settings
    return {
        "num_scored": min(settings.gap_rows, num_test),
        "latent_dim": problem.latent_dim,
        "seed": problem.seed,
        "settings": asdict(settings),
        "gap_rows": min(settings.gap_rows, len(problem.train)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "pyro-ppl", "numpy", "arviz")},
        "date": time.strftime("%Y-%m-%d"),
    }


def _describe_scaling(scaling: Scaling, extra: bool) -> dict[str, Any]:
    units, note = scaling.units, scaling.note
    if extra and units.per_column:
        note += ". Pairs of your own are fitted in the units of the data"
    return {
        "scale": scaling.applied,
        "scale_requested": scaling.requested,
        "scale_note": note,
        "column_scales": units.scale.tolist() if units.per_column else None,
    }


def _extra_stage(name: str, model: ProgramLike, guide: ProgramLike) -> Stage[StageFit]:
    def run(problem: LineageProblem) -> StageFit:
        if has_parameters_per_row(guide):
            fit = problem.fit_to_tolerance(model, guide, problem.settings.encoder_lr)
        else:
            fit = problem.fit_early_stopping(model, guide)
        return StageFit(Pair(model, guide), *fit)

    return Stage(name, _label(model), _label(guide), "SVI", run)


def _label(program: ProgramLike) -> str:
    owner = bound_object(program)
    return getattr(owner, "__name__", type(owner).__name__)
