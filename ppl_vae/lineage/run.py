"""The lineage from the closed form to the variational autoencoder, climbed on one data set.

Every stage is fitted to the same training rows and measured in one unit, nats per datum in the
units of the data as given. PPCA's log p is exact; that of a nonlinear decoder is estimated by
importance sampling with a refined full-covariance Gaussian a datum.
"""

import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from ppl_vae.core.program import ProgramLike, as_data_and_mask, bound_object
from ppl_vae.core.results import Result, plain
from ppl_vae.core.state import threads
from ppl_vae.core.validation import ArrayLike, as_matrix, check_option, check_rows_observed
from ppl_vae.data.column_stats import CONSTANT_COLUMNS, ColumnStats
from ppl_vae.data.row_blocks import RowBlocks
from ppl_vae.data.transforms import SCALES, Scaling, Split, Units, choose_scaling, split
from ppl_vae.lineage.metrics import EvaluationContext, Reference, Row, is_per_datum
from ppl_vae.lineage.problem import Settings, Task
from ppl_vae.lineage.stages import STAGES, Fitted, Stage, left_out
from ppl_vae.models.sufficient_statistics import summarize

CLOSED_FORM = "closed-form"
REFERENCES = {CLOSED_FORM: "the closed form", "px-em": "where PX-EM ends"}
LISTED = 10
"""So many columns are named in a note; ``about`` has all."""


@runtime_checkable
class Watch(Protocol):
    """Is told how far a stage is."""

    def __call__(self, stage: str, doing: str, done: int, total: int) -> None:
        """``doing`` is ``"fitting"`` or ``"measuring"``; ``total`` is 0 where it is not known."""


@dataclass(frozen=True)
class Lineage(Result):
    """The table of the lineage, and what it was made of.

    Attributes:
        rows: one a stage, in order.
        optimum: the best log p that PPCA is known to reach on the training rows, in nats per
            datum: the highest exact log p of all its fits.
        reference: the stage whose fit that is. At first it is ``"closed-form"``, or with missing
            values ``"px-em"``, whether that stage is asked for or not; a better fit takes its
            place, and all shortfalls and angles are those to the present one.
        reference_gain: how far it is above the first one, in nats per datum.
        about: the data, the split, the settings, versions.
        pairs: the fitted pairs by stage, in the internal units (``extra`` pairs: in the data's).
        data: the split, in the data's units.
        units: the internal units.

    The last three are None or empty in a lineage read back by :meth:`from_dict`.
    """

    rows: tuple[Row, ...]
    optimum: float
    about: dict[str, Any]
    reference: str = CLOSED_FORM
    reference_gain: float = 0.0
    pairs: dict[str, tuple[ProgramLike, ProgramLike]] = field(
        default_factory=dict, repr=False, compare=False
    )
    data: Split | None = field(default=None, repr=False, compare=False)
    units: Units | None = field(default=None, repr=False, compare=False)

    def row(self, stage: str) -> Row:
        """The row of a stage."""
        return next(row for row in self.rows if row.stage == stage)

    @property
    def finished(self) -> bool:
        """Whether all stages that were asked for are there."""
        return len(self.rows) == len(self.about["stages"])

    @property
    def exact_optimum(self) -> bool:
        """Whether the optimum is that of the closed form."""
        return self.reference == CLOSED_FORM

    def notes(self) -> list[str]:
        """What a person should know: stages left out, constant columns, each fit's note once."""
        by_note: dict[str, list[str]] = {}
        for row in self.rows:
            for note in row.fit.notes:
                by_note.setdefault(note, []).append(row.stage)
        constant = self.about["constant_columns"]
        listed = ", ".join(constant[:LISTED])
        if len(constant) > LISTED:
            listed += f", ... ({len(constant)} in all)"
        without = self.about.get("left_out", {})
        found = [f"{name} is left out: {why}" for name, why in without.items()]
        found += [f"{CONSTANT_COLUMNS}: {listed}"] if constant else []
        found += [note] if (note := self.about.get("scale_note")) else []
        return found + [f"{note} ({', '.join(names)})" for note, names in by_note.items()]

    def to_dict(self) -> dict[str, Any]:
        """``about``, the optimum, its reference and the rows, as JSON can hold them."""
        names = ("about", "optimum", "reference", "reference_gain", "rows")
        return {name: plain(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The lineage without its pairs and data, from what :meth:`to_dict` gave."""
        rows = tuple(Row.from_dict(row) for row in content["rows"])
        reference = content["reference"], content["reference_gain"]
        return cls(rows, content["optimum"], content["about"], *reference)


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
    settings: Settings | None = None,
    on_rung: Callable[[Lineage], None] | None = None,
    watch: Watch | None = None,
) -> Lineage:
    """Climb the lineage on one data set.

    Rows of x are parted into training, validation and (without ``x_test``) test rows. Validation
    rows serve early stopping of the nonlinear decoders and of ``extra`` pairs, test rows nothing
    but the last column. PPCA and VAE are fitted in units in which x has variance one on average,
    or each of its columns has (``scale``); the table is in the units of x as given.

    Args:
        x: (N, D); NaN marks a missing value.
        x_test: held-out rows; by default 17 % of x's.
        latent_dim: K.
        stages: names of stages, by default all of ``ppl_vae.lineage.stages.STAGES``.
        extra: your own pairs (model, guide) by name. They are fitted, in place, to the rows in
            the units of x as given, and measured like the others; PPCA among them against
            the optimum of PPCA in these units.
        columns: names of x's columns; by default those of a DataFrame, or x1, x2, ...
        scale: ``"standardize"`` fits standardised columns, ``"none"`` columns with one common
            scale; ``"auto"`` standardises where the columns' standard deviations differ by more
            than ten times and rows are not images, see
            :func:`ppl_vae.data.transforms.choose_scaling`. Validation and test rows are scaled as
            the training rows are.
        image_shape: height and width, if rows are images.
        about: what else the results should say of the data, e.g. its name as ``"data"``.
        seed: of everything that is drawn.
        settings: of fitting and measuring, the same for every stage.
        on_rung: called with the lineage so far after each stage, e.g. to keep what is finished.
        watch: called while a stage is fitted and measured.

    Raises:
        ValueError: bad data; a row, or a column of the training rows, with nothing observed; an
            unknown scale or stage, or no stage that takes missing values; K >= the rank of the
            centred training rows.
    """
    chosen = [STAGES[check_option("stages", name, STAGES)] for name in (stages or STAGES)]
    check_option("scale", scale, SCALES)
    extra = dict(extra or {})
    if taken := sorted(extra.keys() & STAGES.keys()):
        raise ValueError(f"extra pairs must not have the names of stages: {taken}")
    started = time.perf_counter()
    names = _column_names(x, columns)
    x = as_matrix(x)
    check_rows_observed(~x.isnan())
    for model, guide in extra.values():
        as_data_and_mask(
            x, model=model, guide=guide
        )  # refuses missing values that a pair cannot take
    data = split(x, x_test, seed=seed)
    check_rows_observed(~data.test.isnan(), name="x_test")
    seen = _columns_of(data.train, names)
    scaling = choose_scaling(data.train, seen, scale, image_shape=image_shape)
    units = scaling.units
    settings = settings or Settings()
    task = Task(data.train, data.val, latent_dim, settings, seed)
    own = EvaluationContext.of(task, data.test, units)
    outer = EvaluationContext.of(task, data.test, Units.none(data.train))
    without = left_out([stage.name for stage in chosen], bool(x.isnan().any()))
    steps = [(stage, own) for stage in chosen if stage.name not in without]
    steps += [(_extra_rung(name, *pair), outer) for name, pair in extra.items()]
    if not steps:
        raise ValueError(f"no stage is left without {list(without)}: {without[chosen[0].name]}")
    with threads(1):
        told = _about(data, seen, names, latent_dim, settings, seed) | dict(about or {})
        told |= {"stages": [stage.name for stage, _ in steps], "left_out": without}
        told |= _about_scaling(scaling, bool(extra))
        known = _Known.of(own, outer, [stage.name for stage, ground in steps if ground is not own])
        result = known.table(Lineage((), math.nan, told, data=data, units=units))
        for stage, ground in steps:
            result = _climbed(result, stage, ground, watch or _unwatched)
            known = known.with_last(result)
            result = known.table(result)
            result.about["seconds"] = time.perf_counter() - started
            if on_rung is not None:
                on_rung(result)
    return result


def _climbed(result: Lineage, stage: Stage, ground: EvaluationContext, watch: Watch) -> Lineage:
    total = ground.task.settings.steps

    def report(step: int, value: float) -> None:
        watch(stage.name, "fitting", step, total)

    watch(stage.name, "fitting", 0, 0)
    fitted = stage.run(replace(ground.task, report=report))
    watch(stage.name, "measuring", 0, 0)
    row = ground.measure(stage, fitted)
    pairs = result.pairs | {stage.name: (fitted.model, fitted.guide)}
    return replace(result, rows=(*result.rows, row), pairs=pairs)


@dataclass(frozen=True)
class _Known:
    """The best fits of PPCA so far.

    Attributes:
        inner: of the stages, in the internal units.
        outer: of the pairs of one's own, in the data's units. None where both have one scale for
            all columns: it is the same model then, and has one reference.
        apart: the names of these pairs, if they have a reference of their own.
    """

    inner: Reference
    outer: Reference | None
    apart: frozenset[str]

    @classmethod
    def of(cls, own: EvaluationContext, outer: EvaluationContext, extra: list[str]) -> Self:
        scale = own.units.scale.flatten()
        if not extra or bool((scale == scale[0]).all()):
            return cls(own.reference(), None, frozenset())
        return cls(own.reference(), outer.reference(), frozenset(extra))

    def _of(self, name: str) -> Reference:
        return self.outer if self.outer is not None and name in self.apart else self.inner

    def with_last(self, result: Lineage) -> Self:
        """With the fit of the table's last row, if it is better."""
        row = result.rows[-1]
        model, reference = result.pairs[row.stage][0], self._of(row.stage)
        better = reference.or_better(reference.seen_by(row, model), model)
        return replace(self, **{"inner" if reference is self.inner else "outer": better})

    def table(self, result: Lineage) -> Lineage:
        """The table with all distances to these references."""
        rows = [
            self._of(row.stage).seen_by(row, result.pairs[row.stage][0]) for row in result.rows
        ]
        place = REFERENCES.get(self.inner.name, f"where {self.inner.name} ends")
        return replace(
            result,
            rows=tuple(rows),
            optimum=self.inner.log_p,
            about=result.about | {"reference": place},
            reference=self.inner.name,
            reference_gain=self.inner.gain,
        )


def _unwatched(stage: str, doing: str, done: int, total: int) -> None:
    pass


def _column_names(x: ArrayLike, columns: Iterable[Any] | None) -> list[str]:
    width = as_matrix(x).shape[1]
    if columns is None:
        columns = getattr(x, "columns", None)
    names = [f"x{k + 1}" for k in range(width)] if columns is None else list(map(str, columns))
    if len(names) != width:
        raise ValueError(f"columns must name each of x's {width} columns; it has {len(names)}")
    return names


def _columns_of(train: Tensor, names: list[str]) -> ColumnStats:
    columns, _ = summarize(RowBlocks(train))
    if empty := [names[k] for k in (columns.count == 0).nonzero().flatten().tolist()]:
        raise ValueError(
            f"the training rows of x have nothing observed in the columns {empty[:5]}; drop them, "
            "or choose another seed if other rows have"
        )
    return columns


def _about(
    data: Split,
    found: ColumnStats,
    names: list[str],
    latent_dim: int,
    settings: Settings,
    seed: int,
) -> dict[str, Any]:
    train, parts = data.train, (data.train, data.val, data.test)
    return {
        "num_train": len(train),
        "num_val": len(data.val),
        "num_test": len(data.test),
        "num_scored": min(settings.gap_rows, len(data.test)),
        "data_dim": train.shape[1],
        "columns": names,
        "constant_columns": [names[k] for k in found.constant_columns()],
        "num_missing": sum(int(part.isnan().sum()) for part in parts),
        "latent_dim": latent_dim,
        "seed": seed,
        "settings": asdict(settings),
        "gap_rows": min(settings.gap_rows, len(train)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "pyro-ppl", "numpy", "arviz")},
        "date": time.strftime("%Y-%m-%d"),
    }


def _about_scaling(scaling: Scaling, extra: bool) -> dict[str, Any]:
    units = scaling.units
    own = ". Pairs of your own are fitted in the units of the data" if extra else ""
    return {
        "scale": scaling.applied,
        "scale_asked": scaling.requested,
        "scale_note": scaling.note + own * units.per_column,
        "column_scales": units.scale.tolist() if units.per_column else None,
    }


def _extra_rung(name: str, model: ProgramLike, guide: ProgramLike) -> Stage:
    def run(task: Task) -> Fitted:
        if is_per_datum(guide):
            found = task.to_tolerance(model, guide, task.settings.encoder_lr)
        else:
            found = task.stopped_early(model, guide)
        return Fitted(model, guide, *found)

    def label(program: ProgramLike) -> str:
        owner = bound_object(program)
        return getattr(owner, "__name__", type(owner).__name__)

    return Stage(name, label(model), label(guide), "SVI", run)
