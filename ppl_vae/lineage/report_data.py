"""The data of the report's figures, computed once from a lineage: plots compute nothing."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_vae.core.introspection import bound_object
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.state import threads
from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.data.units import Units
from ppl_vae.evaluation.inference_gaps.bound_history import BoundSlice, bound_slice
from ppl_vae.evaluation.latent_space.collapse import kl_by_dimension
from ppl_vae.evaluation.latent_space.spectrum import Spectrum, spectrum
from ppl_vae.evaluation.latent_space.traversal import (
    GRID_SIZE,
    decode_grid,
    interpolate,
    normal_quantiles,
)
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.evaluation.marginal_likelihood.compare import Comparison, compare
from ppl_vae.evaluation.marginal_likelihood.cross_check import NUM_CHAINS, EstimatorComparison
from ppl_vae.evaluation.prediction.predictive_checks import PredictiveCheck
from ppl_vae.guides.guides import ExactGuide
from ppl_vae.lineage.fitted_pair import FittedPair
from ppl_vae.lineage.latent_means import LatentMeans
from ppl_vae.lineage.posterior_checks import posterior_check
from ppl_vae.lineage.problem import LineageProblem, LineageSettings
from ppl_vae.lineage.result import Lineage
from ppl_vae.lineage.stage import StageProgress, no_progress
from ppl_vae.lineage.stages import STAGES, StageFit
from ppl_vae.models.ppca import PPCA

NUM_COLUMNS = 8
"""The number of data, draws or positions in a row of images."""
LEAPFROG_STEPS = 5
"""Leapfrog steps per transition of the annealed importance sampling of held-out data."""
FOR_FIGURES = "K = 2, for figures only"


@dataclass(frozen=True)
class ReportData(Result):
    """The data of figures that the lineage's rows do not contain.

    Attributes:
        bound_slice: from PPCA's initial parameters to its maximum likelihood.
        spectrum: the spectrum of the training rows.
        kl: KL of each latent dimension over the training rows, by model.
        comparison: the comparison of held-out log p; None for fewer than two models.
        cross_check: for each model whose log p is estimated, log p of some held-out rows by
            importance sampling with an optimized q and by annealed importance sampling.
        latent_means: the means of pairs with two latent dimensions, by model.
        reconstructions: held-out rows above their reconstructions from the mean of q.
        samples: draws of x, noise included.
        manifold: mean of x over the latent plane of a VAE with two latent dimensions.
        interpolation: mean of x between the codes of held-out rows, in the same VAE.
        covariance_check, quantile_check: the checks of the training rows against data that
            PPCA's posterior and prior predict; None if no stage sampled the posterior.
        left_out: what could not be computed, with the reason.
    """

    bound_slice: BoundSlice
    spectrum: Spectrum
    kl: dict[str, Tensor]
    comparison: Comparison | None
    cross_check: dict[str, EstimatorComparison]
    latent_means: dict[str, LatentMeans]
    reconstructions: ImageGrid | None
    samples: ImageGrid | None
    manifold: ImageGrid | None
    interpolation: ImageGrid | None
    covariance_check: PredictiveCheck | None
    quantile_check: PredictiveCheck | None
    left_out: tuple[str, ...]


def report_data(
    lineage: Lineage,
    *,
    labels: Iterable[Any] | None = None,
    label: str = "class",
    image_shape: tuple[int, int] | None = None,
    progress: StageProgress | None = None,
) -> ReportData:
    """Compute the data of the report's figures.

    If the lineage has a VAE, a PPCA and a VAE with two latent dimensions are fitted for figures.

    Args:
        lineage: a result of :func:`ppl_vae.lineage.run.run_lineage`.
        labels: the class of each row of the data, used in figures only.
        label: the name of the class variable.
        image_shape: height and width, if a datum is an image.
        progress: a callback that receives the progress of the fit of that VAE.

    Raises:
        ValueError: if the lineage was read from a file and has no data, if there are fewer labels
            than rows, or if image_shape does not match the number of columns.
    """
    if lineage.data is None:
        raise ValueError("this lineage was read from a file and has no data; run it again")
    labels = None if labels is None else list(labels)
    _check(lineage, labels, image_shape)
    if labels is not None:
        chosen = (labels[row] for row in lineage.data.train_rows.tolist())
        labels = tuple(v.item() if isinstance(v, np.generic) else v for v in chosen)
    builder = _Builder(lineage, labels, label, image_shape, progress or no_progress)
    with threads(1):
        return builder.build()


def _check(
    lineage: Lineage, labels: Sequence[Any] | None, image_shape: tuple[int, int] | None
) -> None:
    data = lineage.data
    assert data is not None
    num_rows = 1 + max(int(rows.max()) for rows in (data.train_rows, data.val_rows))
    if labels is not None and len(labels) < num_rows:
        raise ValueError(f"labels has {len(labels)} entries for at least {num_rows} rows of data")
    width = data.train.shape[1]
    if image_shape is not None and image_shape[0] * image_shape[1] != width:
        raise ValueError(f"image_shape {image_shape} does not match the {width} columns of x")


class _Builder:
    """Computes the data of each figure; what cannot be computed is noted in ``left_out``."""

    def __init__(
        self,
        lineage: Lineage,
        labels: tuple[Any, ...] | None,
        label: str,
        image_shape: tuple[int, int] | None,
        progress: StageProgress,
    ) -> None:
        assert lineage.data is not None and lineage.units is not None
        self.lineage, self.data, self.units = lineage, lineage.data, lineage.units
        self.labels, self.label, self.image_shape = labels, label, image_shape
        self.progress = progress
        self.seed = int(lineage.about["seed"])
        self.problem = LineageProblem(
            train=self.units.apply(self.data.train),
            val=self.units.apply(self.data.val),
            latent_dim=int(lineage.about["latent_dim"]),
            settings=LineageSettings(**lineage.about["settings"]),
            seed=self.seed,
        )
        self.ppca = self._reference_ppca()
        self.left_out: list[str] = []
        self.pairs = self._select_pairs()

    def build(self) -> ReportData:
        """The data of all figures."""
        planar = self._planar_pairs()
        vae = next((pair for pair in planar if pair.name == "VAE"), None)
        check = partial(posterior_check, self.lineage, self.problem, self.data.train)
        return ReportData(
            bound_slice=self._bound_slice(),
            spectrum=self._spectrum(),
            kl=self._for_each(self.pairs, self._kl, "KL per dimension"),
            comparison=self._comparison(),
            cross_check=self._cross_checks(),
            latent_means=self._latent_means(planar),
            reconstructions=self._reconstructions(),
            samples=self._samples(),
            manifold=self._manifold(vae) if vae else None,
            interpolation=self._interpolation(vae) if vae else None,
            covariance_check=check("covariance"),
            quantile_check=check("quantiles"),
            left_out=tuple(self.left_out),
        )

    def _reference_ppca(self) -> PPCA:
        name = self.lineage.reference
        if name in STAGES and name in self.lineage.pairs:
            return bound_object(self.lineage.pairs[name][0])
        return self.problem.optimal_ppca()

    def _select_pairs(self) -> list[FittedPair]:
        """The best PPCA, the VAE and the user's pairs."""
        rows = [row for row in self.lineage.rows if row.stage in STAGES]
        linear = [row for row in rows if row.model == "PPCA"]
        found = []
        if linear:
            best = min(linear, key=lambda row: row.shortfall).stage
            found.append(self._internal_pair("PPCA", *self.lineage.pairs[best]))
        else:
            self.left_out.append("PPCA: none of its stages was run")
        if any(row.stage == "vae" for row in rows):
            found.append(self._internal_pair("VAE", *self.lineage.pairs["vae"]))
        else:
            self.left_out.append("VAE and its latent plane: the stage vae was not run")
        extra = [name for name in self.lineage.pairs if name not in STAGES]
        return found + [self._pair_of_stage(name) for name in extra]

    def _pair_of_stage(self, name: str) -> FittedPair:
        # The user's pairs were fitted in the units of the data.
        units = self.units if name in STAGES else Units.none(self.data.train)
        return FittedPair(name, *self.lineage.pairs[name], units)

    def _internal_pair(self, name: str, model: ProgramLike, guide: ProgramLike) -> FittedPair:
        return FittedPair(name, model, guide, self.units)

    def _for_each(
        self, pairs: list[FittedPair], compute: Callable[[FittedPair], Any], what: str
    ) -> dict[str, Any]:
        found = {}
        for pair in pairs:
            try:
                found[pair.name] = compute(pair)
            except (ValueError, RuntimeError, NotImplementedError, IndexError) as error:
                self.left_out.append(f"{what} of {pair.name}: {error}")
        return found

    def _bound_slice(self) -> BoundSlice:
        x = self.problem.train
        found = bound_slice(self.problem.initial_ppca(), self.ppca, x)
        shift = self.units.log_jacobian(x).mean()
        log_p, bounds = found.log_likelihood + shift, found.bounds + shift
        return replace(found, log_likelihood=log_p, bounds=bounds)

    def _spectrum(self) -> Spectrum:
        scales = {"PPCA": float(self.ppca.noise_scale.detach()) * self.units.common_scale}
        for row in self.lineage.rows:
            if row.stage == "vae":
                scales["VAE"] = row.noise_scale
        noise = {name: scale**2 for name, scale in scales.items()}
        problem = self.problem
        model = self.ppca if problem.num_missing else None
        found = spectrum(problem.train, problem.latent_dim, noise, ppca=model)
        # Eigenvalues are invariant to the shift of the units and proportional to scale^2.
        values = found.eigenvalues * self.units.common_scale**2
        return replace(found, eigenvalues=values, standardized=self.units.per_column)

    def _kl(self, pair: FittedPair) -> Tensor:
        model, guide, owner = pair.model, pair.guide, bound_object(pair.model)
        if isinstance(owner, PPCA) and isinstance(guide, ExactGuide):
            # The posterior is a product on the principal axes only.
            canonical = owner.canonical()
            model, guide = canonical.model, ExactGuide(canonical, covariance="diagonal")
        return kl_by_dimension(model, guide, pair.units.apply(self.data.train), seed=self.seed)

    def _comparison(self) -> Comparison | None:
        estimates = {}
        for row in self.lineage.rows:
            if row.held_out is not None and row.held_out.value.isfinite().all():
                estimates[row.stage] = row.held_out
            else:
                self.left_out.append(f"{row.stage} in the comparison: it has no held-out log p")
        if len(estimates) < 2 or len(self.data.test) < 2:
            self.left_out.append("comparison: fewer than two models or two held-out rows")
            return None
        return compare(estimates)

    def _cross_checks(self) -> dict[str, EstimatorComparison]:
        num_rows = self.problem.settings.cross_check_rows
        scored = {row.stage: row.held_out for row in self.lineage.rows if row.held_out is not None}
        estimates = {n: found.first(num_rows) for n, found in scored.items() if found.is_weighted}
        annealing = Annealing(self.problem.settings.num_temperatures, leapfrog=LEAPFROG_STEPS)
        x = self.data.test[:num_rows]

        def cross_check(pair: FittedPair) -> EstimatorComparison:
            annealed = pair.annealed_log_likelihood(x, NUM_CHAINS, annealing, self.seed)
            by_method = {"importance": estimates[pair.name], "annealed": annealed}
            return EstimatorComparison.of(by_method)

        pairs = [self._pair_of_stage(name) for name in estimates]
        return self._for_each(pairs, cross_check, "annealing")

    def _planar_pairs(self) -> list[FittedPair]:
        """A PPCA and a VAE with two latent dimensions, if the lineage has a VAE."""
        if "VAE" not in (pair.name for pair in self.pairs):
            return []
        ppca = self._planar_ppca()
        return [*([] if ppca is None else [ppca]), self._planar_vae()]

    def _planar_ppca(self) -> FittedPair | None:
        try:
            ppca = replace(self.problem, latent_dim=2).optimal_ppca().canonical()
        except ValueError as error:
            self.left_out.append(f"latent plane of PPCA: {error}")
            return None
        return self._internal_pair("PPCA", ppca.model, ExactGuide(ppca))

    def _planar_vae(self) -> FittedPair:
        def report_step(step: int, value: float) -> None:
            total = self.problem.settings.steps
            self.progress("a VAE with two latent dimensions, for figures", "fitting", step, total)

        problem = replace(self.problem, latent_dim=2, progress=report_step)
        fitted = STAGES["vae"].run(problem)
        assert isinstance(fitted, StageFit)
        return self._internal_pair("VAE", fitted.pair.model, fitted.pair.guide)

    def _latent_means(self, planar: list[FittedPair]) -> dict[str, LatentMeans]:
        found = {}
        extra = [pair for pair in self.pairs if pair.name not in ("PPCA", "VAE")]
        for pairs, remark in ((planar, FOR_FIGURES), (extra, "its own K = 2")):
            means = self._for_each(pairs, self._first_latent_means, "latent means")
            for name, values in means.items():
                if values.shape[1:] == (2,):
                    found[name] = LatentMeans(values.double(), self.labels, self.label, remark)
        return found

    def _first_latent_means(self, pair: FittedPair) -> Tensor:
        return next(iter(pair.latent_means(self.data.train).values()))

    def _grid(self, values: Tensor, rows: Sequence[str], columns: Sequence[str]) -> ImageGrid:
        names = self.lineage.about["columns"]
        return ImageGrid.of(values, rows, columns, self.data.train, self.image_shape, names)

    def _reconstructions(self) -> ImageGrid | None:
        x = self.data.test[:NUM_COLUMNS]
        found = self._for_each(self.pairs, partial(FittedPair.reconstruct, x=x), "reconstructions")
        if not found:
            return None
        values = torch.stack([x, *found.values()])
        columns = [str(row) for row in self.data.test_rows[:NUM_COLUMNS].tolist()]
        return self._grid(values, ["original", *found], columns)

    def _samples(self) -> ImageGrid | None:
        like = self.data.train[:1].expand(NUM_COLUMNS, -1)
        sample = partial(FittedPair.sample, like=like, seed=self.seed)
        found = self._for_each(self.pairs, sample, "samples")
        if not found:
            return None
        columns = [str(number + 1) for number in range(NUM_COLUMNS)]
        return self._grid(torch.stack(list(found.values())), list(found), columns)

    def _manifold(self, vae: FittedPair) -> ImageGrid:
        at = normal_quantiles(GRID_SIZE)
        means = decode_grid(vae.model, vae.units.apply(self.data.train[:1]), values=at)
        ticks = [f"{float(value):.1f}" for value in at]
        return self._grid(vae.units.undo(means), ticks[::-1], ticks)

    def _interpolation(self, vae: FittedPair) -> ImageGrid:
        num_pairs = min(3, len(self.data.test) // 2)
        x = vae.units.apply(self.data.test[: 2 * num_pairs])
        means = interpolate(vae.model, x[::2], x[1::2], guide=vae.guide, num_steps=NUM_COLUMNS)
        rows = self.data.test_rows.tolist()
        names = [f"{rows[2 * i]} to {rows[2 * i + 1]}" for i in range(num_pairs)]
        fractions = [f"{float(p):.2f}" for p in torch.linspace(0, 1, NUM_COLUMNS)]
        return self._grid(vae.units.undo(means), names, fractions)
