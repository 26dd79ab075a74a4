"""The ladder from the closed form to the variational autoencoder, climbed on one data set.

Every rung is fitted to the same training rows and measured in one unit, nats a datum in the units
of the data as given. PPCA's log p is exact; that of a nonlinear decoder is estimated by importance
sampling with a refined full-covariance Gaussian a datum.
"""

import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Self

import torch
from torch import Tensor

from ppl_vae.arguments import ArrayLike, as_matrix, choose_option
from ppl_vae.data import Split, Units, split
from ppl_vae.evaluation.gaps import Gaps, gaps
from ppl_vae.evaluation.likelihood import log_likelihood
from ppl_vae.evaluation.subspace import subspace
from ppl_vae.inference.em import fit_closed_form
from ppl_vae.models.moments import check_complete
from ppl_vae.models.ppca import PPCA
from ppl_vae.objectives import elbo
from ppl_vae.program import ProgramLike, owner_of
from ppl_vae.results import FitResult, Result
from ppl_vae.rungs import RUNGS, Fitted, Rung, Settings, Task
from ppl_vae.state import threads

ELBO_DRAWS = 20


@dataclass(frozen=True)
class Measure(Result):
    """A mean log-likelihood in nats a datum.

    Attributes:
        value: the mean.
        error: its standard error: of the estimation on training rows, over the data on held-out
            rows (the Monte Carlo part included); None where it is exact.
        reliable: the share of data whose estimate is reliable; 1 where it is exact.
        how: ``"exact"``, ``"estimated"`` or why there is none.
    """

    value: float
    error: float | None = None
    reliable: float = 1.0
    how: str = "exact"


@dataclass(frozen=True)
class Row(Result):
    """One rung: what it is, and what it gave, in nats a datum.

    Attributes:
        rung, model, q, algorithm: what it is.
        elbo: on the training rows.
        log_p: on the training rows.
        approximation: log p - ELBO[q*], the price of q's family.
        amortization: ELBO[q*] - ELBO[q], the price of how q is found.
        shortfall: by how much log p falls short of the best that the model can reach on the
            training rows; NaN where that is not known.
        test_log_p: on the held-out rows.
        noise_scale: of x given z, in the data's units; NaN if the model has none.
        angle: largest principal angle to the closed form, in degrees; NaN for nonlinear decoders.
        fit: how the fit went.
    """

    rung: str
    model: str
    q: str
    algorithm: str
    elbo: float
    log_p: Measure
    approximation: float
    amortization: float
    shortfall: float
    test_log_p: Measure
    noise_scale: float
    angle: float
    fit: FitResult


@dataclass(frozen=True)
class Lineage(Result):
    """The table of the ladder, and what it was made of.

    Attributes:
        rows: one a rung, in order.
        about: the data, the split, the settings, versions.
        pairs: the fitted pairs by rung, in the internal units (``extra`` pairs: in the data's).
        data: the split, in the data's units.
        units: the internal units.
    """

    rows: tuple[Row, ...]
    about: dict[str, Any]
    pairs: dict[str, tuple[ProgramLike, ProgramLike]] = field(repr=False, compare=False)
    data: Split = field(repr=False, compare=False)
    units: Units = field(repr=False, compare=False)

    def row(self, rung: str) -> Row:
        """The row of a rung."""
        return next(row for row in self.rows if row.rung == rung)

    def to_dict(self) -> dict[str, Any]:
        """``about`` and the rows, as JSON can hold them."""
        return {
            "about": self.about,
            "rows": [row.to_dict() for row in self.rows],
        }


def run_lineage(
    x: ArrayLike,
    *,
    x_test: ArrayLike | None = None,
    latent_dim: int,
    rungs: Iterable[str] | None = None,
    extra: Mapping[str, tuple[ProgramLike, ProgramLike]] | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    on_row: Callable[[Row], None] | None = None,
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
        seed: of everything that is drawn.
        settings: of fitting and measuring, the same for every rung.
        on_row: called with each row as soon as it is there.

    Raises:
        ValueError: bad data; an unknown rung; K >= the rank of the centred training rows.
    """
    chosen = [RUNGS[choose_option("rungs", name, RUNGS)] for name in (rungs or RUNGS)]
    extra = dict(extra or {})
    if taken := sorted(extra.keys() & RUNGS.keys()):
        raise ValueError(f"extra pairs must not have the names of rungs: {taken}")
    started = time.perf_counter()
    x = as_matrix(x)
    check_complete(x)
    data = split(x, x_test, seed=seed)
    units = Units.of(data.train)
    settings = settings or Settings()
    common = {"latent_dim": latent_dim, "settings": settings, "seed": seed}
    inner = Task(units.apply(data.train), units.apply(data.val), **common)
    own = _Ground.of(inner, units.apply(data.test), units.log_jacobian, float(units.scale))
    outer = _Ground.of(Task(data.train, data.val, **common), data.test) if extra else own
    steps = [(rung, own) for rung in chosen]
    steps += [(_extra_rung(name, *pair), outer) for name, pair in extra.items()]
    rows, pairs = [], {}
    with threads(1):
        for rung, ground in steps:
            fitted = rung.climb(ground.task)
            row = ground.measure(rung, fitted)
            pairs[rung.name] = (fitted.model, fitted.guide)
            rows.append(row)
            if on_row is not None:
                on_row(row)
        about = _about(data, latent_dim, settings, seed)
    about["seconds"] = time.perf_counter() - started
    return Lineage(tuple(rows), about, pairs, data, units)


def _about(data: Split, latent_dim: int, settings: Settings, seed: int) -> dict[str, Any]:
    return {
        "num_train": len(data.train),
        "num_val": len(data.val),
        "num_test": len(data.test),
        "data_dim": data.train.shape[1],
        "latent_dim": latent_dim,
        "seed": seed,
        "settings": asdict(settings),
        "gap_rows": min(settings.gap_rows, len(data.train)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "pyro-ppl", "numpy")},
    }


def _extra_rung(name: str, model: ProgramLike, guide: ProgramLike) -> Rung:
    def climb(task: Task) -> Fitted:
        return Fitted(model, guide, task.svi(model, guide, early_stopping=not _per_datum(guide)))

    def label(program: ProgramLike) -> str:
        owner = owner_of(program)
        return getattr(owner, "__name__", type(owner).__name__)

    return Rung(name, label(model), label(guide), "SVI", climb)


def _per_datum(guide: ProgramLike) -> bool:
    # A guide with a q for each training row has none for validation or test rows.
    return callable(getattr(owner_of(guide), "tables", None))


@dataclass(frozen=True)
class _Ground:
    """The data in the units that a pair is fitted in, and the way back to those of the data."""

    task: Task
    test: Tensor
    reference: PPCA
    log_jacobian: float
    unit: float

    @classmethod
    def of(cls, task: Task, test: Tensor, log_jacobian: float = 0.0, unit: float = 1.0) -> Self:
        reference = task.ppca()
        fit_closed_form(reference, task.train)
        return cls(task, test, reference, log_jacobian, unit)

    def measure(self, rung: Rung, fitted: Fitted) -> Row:
        """The rung's row of the table."""
        owner = owner_of(fitted.model)
        ppca = owner if isinstance(owner, PPCA) else None
        exact = None if ppca is None else ppca.log_likelihood(self.task.train).detach()
        found = self._gaps(fitted, exact)
        log_p, elbo = self._training(fitted, found, exact)
        return Row(
            rung=rung.name,
            model=rung.model,
            q=rung.q,
            algorithm=rung.algorithm,
            elbo=elbo,
            log_p=log_p,
            approximation=found.approximation,
            amortization=found.amortization,
            shortfall=self._best() - log_p.value if ppca else math.nan,
            test_log_p=self._held_out(fitted, ppca),
            noise_scale=_noise_scale(owner) * self.unit,
            angle=subspace(self.reference, ppca).largest_angle if ppca else math.nan,
            fit=fitted.fit,
        )

    def _gaps(self, fitted: Fitted, exact: Tensor | None) -> Gaps:
        rows = torch.arange(min(self.task.settings.gap_rows, len(self.task.train)))
        return gaps(
            fitted.model,
            fitted.guide,
            self.task.train,
            log_p=None if exact is None else exact[rows],
            best=fitted.best,
            steps=self.task.settings.refine,
            num_samples=self.task.settings.draws,
            rows=rows,
            seed=self.task.seed,
        )

    def _training(
        self, fitted: Fitted, found: Gaps, exact: Tensor | None
    ) -> tuple[Measure, float]:
        """log p and the ELBO on all training rows: one is cheap there, the gap gives the other."""
        gap = found.approximation + found.amortization
        if exact is not None:
            log_p = float(exact.mean()) + self.log_jacobian
            return Measure(log_p), log_p - gap
        draws = {"num_samples": ELBO_DRAWS, "seed": self.task.seed}
        values = elbo(fitted.model, fitted.guide, self.task.train, **draws)
        bound = float(values.mean()) + self.log_jacobian
        error = float((found.log_likelihood - found.elbo).std() / math.sqrt(len(found.elbo)))
        assert found.estimate is not None
        return Measure(bound + gap, error, found.estimate.share_reliable, "estimated"), bound

    def _best(self) -> float:
        best = self.reference.log_likelihood(self.task.train).detach()
        return float(best.mean()) + self.log_jacobian

    def _held_out(self, fitted: Fitted, ppca: PPCA | None) -> Measure:
        if ppca is not None:
            values = ppca.log_likelihood(self.test).detach()
            error = float(values.std() / math.sqrt(len(values)))
            return Measure(float(values.mean()) + self.log_jacobian, error)
        if _per_datum(fitted.guide):
            return Measure(math.nan, None, math.nan, "the guide has a q for training rows only")
        estimate = log_likelihood(
            fitted.model,
            fitted.guide,
            self.test[: self.task.settings.gap_rows],
            self.task.settings.draws,
            refine=self.task.settings.refine,
            seed=self.task.seed,
        )
        value = estimate.mean + self.log_jacobian
        return Measure(value, estimate.mean_error, estimate.share_reliable, "estimated")


def _noise_scale(owner: Any) -> float:
    scale = getattr(
        owner, "noise_scale", getattr(getattr(owner, "likelihood", None), "scale", None)
    )
    if isinstance(scale, float):
        return scale
    return float(scale.detach()) if isinstance(scale, Tensor) and scale.numel() == 1 else math.nan
