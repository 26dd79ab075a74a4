"""The ladder from the closed form to the variational autoencoder, climbed on one data set.

Every rung is fitted to the same training rows and measured in one unit, nats a datum in the units
of the data as given. PPCA's log p is exact; that of a nonlinear decoder is estimated by importance
sampling with a refined full-covariance Gaussian a datum.
"""

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from ppl_vae.arguments import ArrayLike, as_matrix, choose_option
from ppl_vae.data import Split, Units, split
from ppl_vae.measured import Ground, Row, is_per_datum
from ppl_vae.models.moments import CONSTANT_COLUMNS
from ppl_vae.program import ProgramLike, owner_of
from ppl_vae.results import Result, plain
from ppl_vae.rungs import RUNGS, Fitted, Rung, Settings, Task
from ppl_vae.state import threads

LISTED = 10
"""So many columns are named in a note; ``about`` has all."""


@runtime_checkable
class Watch(Protocol):
    """Is told how far a rung is."""

    def __call__(self, rung: str, doing: str, done: int, total: int) -> None:
        """``doing`` is ``"fitting"`` or ``"measuring"``; ``total`` is 0 where it is not known."""


@dataclass(frozen=True)
class Lineage(Result):
    """The table of the ladder, and what it was made of.

    Attributes:
        rows: one a rung, in order.
        optimum: the best log p that PPCA can reach on the training rows, in nats a datum.
        about: the data, the split, the settings, versions.
        pairs: the fitted pairs by rung, in the internal units (``extra`` pairs: in the data's).
        data: the split, in the data's units.
        units: the internal units.

    The last three are None or empty in a lineage read back by :meth:`from_dict`.
    """

    rows: tuple[Row, ...]
    optimum: float
    about: dict[str, Any]
    pairs: dict[str, tuple[ProgramLike, ProgramLike]] = field(
        default_factory=dict, repr=False, compare=False
    )
    data: Split | None = field(default=None, repr=False, compare=False)
    units: Units | None = field(default=None, repr=False, compare=False)

    def row(self, rung: str) -> Row:
        """The row of a rung."""
        return next(row for row in self.rows if row.rung == rung)

    @property
    def finished(self) -> bool:
        """Whether all rungs that were asked for are there."""
        return len(self.rows) == len(self.about["rungs"])

    def notes(self) -> list[str]:
        """What a person should know: constant columns, and what fits noted, each once."""
        by_note: dict[str, list[str]] = {}
        for row in self.rows:
            for note in row.fit.notes:
                by_note.setdefault(note, []).append(row.rung)
        constant = self.about["constant_columns"]
        listed = ", ".join(constant[:LISTED])
        if len(constant) > LISTED:
            listed += f", ... ({len(constant)} in all)"
        found = [f"{CONSTANT_COLUMNS}: {listed}"] if constant else []
        return found + [f"{note} ({', '.join(names)})" for note, names in by_note.items()]

    def to_dict(self) -> dict[str, Any]:
        """``about``, the optimum and the rows, as JSON can hold them."""
        return {name: plain(getattr(self, name)) for name in ("about", "optimum", "rows")}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The lineage without its pairs and data, from what :meth:`to_dict` gave."""
        rows = tuple(Row.from_dict(row) for row in content["rows"])
        return cls(rows, content["optimum"], content["about"])


def run_lineage(
    x: ArrayLike,
    *,
    x_test: ArrayLike | None = None,
    latent_dim: int,
    rungs: Iterable[str] | None = None,
    extra: Mapping[str, tuple[ProgramLike, ProgramLike]] | None = None,
    columns: Iterable[Any] | None = None,
    about: Mapping[str, Any] | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    on_rung: Callable[[Lineage], None] | None = None,
    watch: Watch | None = None,
) -> Lineage:
    """Climb the ladder on one data set.

    Rows of x are parted into training, validation and (without ``x_test``) test rows. Validation
    rows serve early stopping of the nonlinear decoders and of ``extra`` pairs, test rows nothing
    but the last column. PPCA and VAE are fitted in units in which x has variance one on average.

    Args:
        x: complete data, (N, D).
        x_test: held-out rows; by default 17 % of x's.
        latent_dim: K.
        rungs: names of rungs, by default all of ``ppl_vae.rungs.RUNGS``.
        extra: your own pairs (model, guide) by name. They are fitted, in place, to the rows in
            the units of x as given, and measured like the others.
        columns: names of x's columns; by default those of a DataFrame, or x1, x2, ...
        about: what else the results should say of the data, e.g. its name as ``"data"``.
        seed: of everything that is drawn.
        settings: of fitting and measuring, the same for every rung.
        on_rung: called with the ladder so far after each rung, e.g. to keep what is finished.
        watch: called while a rung is fitted and measured.

    Raises:
        ValueError: bad data; an unknown rung; K >= the rank of the centred training rows.
    """
    chosen = [RUNGS[choose_option("rungs", name, RUNGS)] for name in (rungs or RUNGS)]
    extra = dict(extra or {})
    if taken := sorted(extra.keys() & RUNGS.keys()):
        raise ValueError(f"extra pairs must not have the names of rungs: {taken}")
    started = time.perf_counter()
    names = _column_names(x, columns)
    x = as_matrix(x)
    _check_holes(x, names)
    data = split(x, x_test, seed=seed)
    units = Units.of(data.train)
    settings = settings or Settings()
    common = {"latent_dim": latent_dim, "settings": settings, "seed": seed}
    inner = Task(units.apply(data.train), units.apply(data.val), **common)
    own = Ground.of(inner, units.apply(data.test), units.log_jacobian, float(units.scale))
    outer = Ground.of(Task(data.train, data.val, **common), data.test) if extra else own
    steps = [(rung, own) for rung in chosen]
    steps += [(_extra_rung(name, *pair), outer) for name, pair in extra.items()]
    with threads(1):
        told = _about(data, names, latent_dim, settings, seed) | dict(about or {})
        told["rungs"] = [rung.name for rung, _ in steps]
        result = Lineage((), own.best, told, {}, data, units)
        for rung, ground in steps:
            result = _climbed(result, rung, ground, watch or _unwatched)
            told["seconds"] = time.perf_counter() - started
            if on_rung is not None:
                on_rung(result)
    return result


def _climbed(result: Lineage, rung: Rung, ground: Ground, watch: Watch) -> Lineage:
    total = ground.task.settings.steps

    def report(step: int, value: float) -> None:
        watch(rung.name, "fitting", step, total)

    watch(rung.name, "fitting", 0, 0)
    fitted = rung.climb(replace(ground.task, report=report))
    watch(rung.name, "measuring", 0, 0)
    row = ground.measure(rung, fitted)
    pairs = result.pairs | {rung.name: (fitted.model, fitted.guide)}
    return replace(result, rows=(*result.rows, row), pairs=pairs)


def _unwatched(rung: str, doing: str, done: int, total: int) -> None:
    pass


def _column_names(x: ArrayLike, columns: Iterable[Any] | None) -> list[str]:
    width = as_matrix(x).shape[1]
    if columns is None:
        columns = getattr(x, "columns", None)
    names = [f"x{k + 1}" for k in range(width)] if columns is None else list(map(str, columns))
    if len(names) != width:
        raise ValueError(f"columns must name each of x's {width} columns; it has {len(names)}")
    return names


def _check_holes(x: Tensor, names: list[str]) -> None:
    holes = x.isnan().sum(0)
    if not holes.any():
        return
    which = [f"{names[k]} ({int(holes[k])})" for k in holes.nonzero().flatten().tolist()]
    listed = ", ".join(which[:5]) + (", ..." if len(which) > 5 else "")
    raise ValueError(
        f"x has {int(holes.sum())} missing entries, in the columns {listed}. The ladder needs "
        "complete data: leave out those rows or columns, or fill them in first"
    )


def _about(
    data: Split, names: list[str], latent_dim: int, settings: Settings, seed: int
) -> dict[str, Any]:
    train = data.train
    constant = (train == train[0]).all(0).nonzero().flatten().tolist()
    return {
        "num_train": len(train),
        "num_val": len(data.val),
        "num_test": len(data.test),
        "num_scored": min(settings.gap_rows, len(data.test)),
        "data_dim": train.shape[1],
        "columns": names,
        "constant_columns": [names[k] for k in constant],
        "latent_dim": latent_dim,
        "seed": seed,
        "settings": asdict(settings),
        "gap_rows": min(settings.gap_rows, len(train)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "pyro-ppl", "numpy", "arviz")},
        "date": time.strftime("%Y-%m-%d"),
    }


def _extra_rung(name: str, model: ProgramLike, guide: ProgramLike) -> Rung:
    def climb(task: Task) -> Fitted:
        return Fitted(model, guide, task.svi(model, guide, early_stopping=not is_per_datum(guide)))

    def label(program: ProgramLike) -> str:
        owner = owner_of(program)
        return getattr(owner, "__name__", type(owner).__name__)

    return Rung(name, label(model), label(guide), "SVI", climb)
