"""What pictures show, computed once from a climbed lineage, so that drawing computes nothing."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.program import ProgramLike, bound_object
from ppl_vae.core.results import Result
from ppl_vae.core.state import threads
from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.data.transforms import Units
from ppl_vae.evaluation.inference_gaps.ascent import BoundSlice, bound_slice
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
from ppl_vae.guides.guides import ExactGuide
from ppl_vae.lineage.fitted_pair import FittedPair
from ppl_vae.lineage.problem import Settings, Task
from ppl_vae.lineage.run import Lineage, Watch
from ppl_vae.lineage.stages import STAGES
from ppl_vae.models.ppca import PPCA

ACROSS = 8
"""Data, draws and positions side by side."""
LEAPFROG = 5
"""Steps of a move of the chains that give held-out data a cross-check."""
FOR_PICTURES = "two latents, for pictures only"


@dataclass(frozen=True)
class LatentMeans(Result):
    """Means of q(z | x) of a pair with two latents.

    Attributes:
        means: (N, 2), in standard deviations of the prior.
        labels: a class for each, or None.
        label: what the classes are called.
        about: what else to know of the pair.
    """

    means: Float[Tensor, "N 2"]
    labels: tuple[Any, ...] | None
    label: str
    about: str


@dataclass(frozen=True)
class ReportData(Result):
    """The contents of the pictures that the lineage's rows do not hold themselves.

    Attributes:
        bound_slice: from PPCA's start to its maximum.
        spectrum: of the training rows.
        kl: KL a latent dimension over the training rows, by model.
        comparison: of held-out log p; None for fewer than two models.
        cross-checks: by model whose log p is estimated, of some held-out rows: importance sampling
            with a refined q, and annealing.
        latent_means: of pairs with two latents, by model, over the training rows.
        reconstructions: held-out rows over their reconstructions from the mean of q.
        samples: draws of x, noise included.
        manifold: mean of x over the latent plane of a VAE with two latents.
        interpolation: mean of x between the codes of held-out rows, in the same VAE.
        left_out: what is not there, and why.
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
    left_out: tuple[str, ...]


def report_data(
    lineage: Lineage,
    *,
    labels: Iterable[Any] | None = None,
    label: str = "class",
    image_shape: tuple[int, int] | None = None,
    watch: Watch | None = None,
) -> ReportData:
    """Compute what the pictures show.

    A PPCA and a VAE with two latents are fitted for pictures only, if the lineage has a VAE.

    Args:
        lineage: what :func:`ppl_vae.lineage.run.run_lineage` gave.
        labels: a class for each row of the data; only pictures see them.
        label: what the classes are called.
        image_shape: height and width, if a datum is an image.
        watch: called while the VAE for pictures is fitted.

    Raises:
        ValueError: if the lineage was read from a file and holds no data, if there are not as
            many labels as rows, or if image_shape does not hold a row's entries.
    """
    if lineage.data is None:
        raise ValueError("this lineage was read from a file and holds no data to look at")
    labels = None if labels is None else list(labels)
    _check(lineage, labels, image_shape)
    if labels is not None:
        chosen = (labels[row] for row in lineage.data.train_rows.tolist())
        labels = tuple(v.item() if isinstance(v, np.generic) else v for v in chosen)
    builder = _Builder(lineage, labels, label, image_shape, watch)
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
        raise ValueError(f"image_shape {image_shape} does not hold the {width} columns of a row")


class _Builder:
    """Computes exhibits one by one; what cannot be had is noted and left out."""

    def __init__(
        self,
        lineage: Lineage,
        labels: tuple[Any, ...] | None,
        label: str,
        image_shape: tuple[int, int] | None,
        watch: Watch | None,
    ) -> None:
        assert lineage.data is not None and lineage.units is not None
        self.lineage, self.data, self.units = lineage, lineage.data, lineage.units
        self.labels, self.label, self.image_shape, self.watch = labels, label, image_shape, watch
        self.seed = int(lineage.about["seed"])
        settings = Settings(**lineage.about["settings"])
        self.task = Task(
            self.units.apply(self.data.train),
            self.units.apply(self.data.val),
            int(lineage.about["latent_dim"]),
            settings,
            self.seed,
        )
        reference = lineage.pairs.get(lineage.reference) if lineage.reference in STAGES else None
        self.best: PPCA = bound_object(reference[0]) if reference else self.task.optimum()
        self.left_out: list[str] = []
        self.fitted_pair = self._pictured()

    def build(self) -> ReportData:
        """All of them."""
        plane = self._plane()
        vae = next((p for p in plane if p.name == "VAE"), None)
        return ReportData(
            bound_slice=self._slice(),
            spectrum=self._spectrum(),
            kl=self._kl(),
            comparison=self._comparison(),
            cross_check=self._opinions(),
            latent_means=self._latent_means(plane),
            reconstructions=self._reconstructions(),
            samples=self._samples(),
            manifold=self._manifold(vae) if vae else None,
            interpolation=self._interpolation(vae) if vae else None,
            left_out=tuple(self.left_out),
        )

    def _pictured(self) -> list[FittedPair]:
        rows = [row for row in self.lineage.rows if row.stage in STAGES]
        linear = [row for row in rows if row.model == "PPCA"]
        found = []
        if linear:
            best = min(linear, key=lambda row: row.shortfall).stage
            found.append(self._of_pair("PPCA", *self.lineage.pairs[best]))
        else:
            self.left_out.append("PPCA: no stage with it was climbed")
        if any(row.stage == "vae" for row in rows):
            found.append(self._of_pair("VAE", *self.lineage.pairs["vae"]))
        else:
            self.left_out.append("VAE and its latent plane: the stage vae was not climbed")
        mine = [name for name in self.lineage.pairs if name not in STAGES]
        return found + [self._of_rung(name) for name in mine]

    def _of_rung(self, name: str) -> FittedPair:
        # Pairs of one's own were fitted to the data as given.
        units = self.units if name in STAGES else Units.none(self.data.train)
        return FittedPair(name, *self.lineage.pairs[name], units)

    def _of_pair(self, name: str, model: ProgramLike, guide: ProgramLike) -> FittedPair:
        return FittedPair(name, model, guide, self.units)

    def _each(
        self, pairs: list[FittedPair], look: Callable[[FittedPair], Any], what: str
    ) -> dict[str, Any]:
        found = {}
        for pair in pairs:
            try:
                found[pair.name] = look(pair)
            except (ValueError, RuntimeError, NotImplementedError, IndexError) as error:
                self.left_out.append(f"{what} of {pair.name}: {error}")
        return found

    def _slice(self) -> BoundSlice:
        shown = bound_slice(self.task.ppca(), self.best, self.task.train)
        shift = self.units.log_jacobian(self.task.train).mean()
        log_p, bounds = shown.log_likelihood + shift, shown.bounds + shift
        return replace(shown, log_likelihood=log_p, bounds=bounds)

    def _spectrum(self) -> Spectrum:
        scales = {"PPCA": float(self.best.noise_scale.detach()) * self.units.common_scale}
        for row in self.lineage.rows:
            if row.stage == "vae":
                scales["VAE"] = row.noise_scale
        noise = {name: scale**2 for name, scale in scales.items()}
        # Eigenvalues do not see the shift of the units, and see their scale squared.
        model = self.best if self.task.holes else None
        found = spectrum(self.task.train, self.task.latent_dim, noise, ppca=model)
        values = found.eigenvalues * self.units.common_scale**2
        return replace(found, eigenvalues=values, standardized=self.units.per_column)

    def _kl(self) -> dict[str, Tensor]:
        def look(pair: FittedPair) -> Tensor:
            model, guide, owner = pair.model, pair.guide, bound_object(pair.model)
            if isinstance(owner, PPCA) and isinstance(guide, ExactGuide):
                # On the principal axes the posterior is a product, and nowhere else.
                turned = owner.canonical()
                model, guide = turned.model, ExactGuide(turned, covariance="diagonal")
            x = pair.units.apply(self.data.train)
            return kl_by_dimension(model, guide, x, seed=self.seed)

        return self._each(self.fitted_pair, look, "KL per dimension")

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

    def _opinions(self) -> dict[str, EstimatorComparison]:
        settings = self.task.settings
        number = settings.annealed_rows
        scored = {row.stage: row.held_out for row in self.lineage.rows if row.held_out is not None}
        estimated = {n: found.first(number) for n, found in scored.items() if found.num_samples}
        annealing = Annealing(settings.num_temperatures, leapfrog=LEAPFROG)

        def look(pair: FittedPair) -> EstimatorComparison:
            x = self.data.test[:number]
            annealed = pair.annealed(x, NUM_CHAINS, annealing, self.seed)
            return EstimatorComparison.of(
                {"importance": estimated[pair.name], "annealed": annealed}
            )

        pairs = [self._of_rung(name) for name in estimated]
        return self._each(pairs, look, "annealing")

    def _plane(self) -> list[FittedPair]:
        """Pairs with two latents."""
        if "VAE" not in (pair.name for pair in self.fitted_pair):
            return []
        return [pair for pair in (self._plane_ppca(), self._plane_vae()) if pair is not None]

    def _plane_ppca(self) -> FittedPair | None:
        try:
            ppca = replace(self.task, latent_dim=2).optimum().canonical()
        except ValueError as error:
            self.left_out.append(f"latent plane of PPCA: {error}")
            return None
        return self._of_pair("PPCA", ppca.model, ExactGuide(ppca))

    def _plane_vae(self) -> FittedPair:
        def report(step: int, value: float) -> None:
            if self.watch is not None:
                total = self.task.settings.steps
                self.watch("a VAE with two latents, for pictures", "fitting", step, total)

        fitted = STAGES["vae"].run(replace(self.task, latent_dim=2, report=report))
        return self._of_pair("VAE", fitted.model, fitted.guide)

    def _latent_means(self, plane: list[FittedPair]) -> dict[str, LatentMeans]:
        found = {}
        mine = [pair for pair in self.fitted_pair if pair.name not in ("PPCA", "VAE")]
        for pairs, about in ((plane, FOR_PICTURES), (mine, "its own two latents")):
            means = self._each(pairs, self._mean_of_site, "latent means")
            for name, values in means.items():
                if values.shape[1:] == (2,):
                    found[name] = LatentMeans(values.double(), self.labels, self.label, about)
        return found

    def _mean_of_site(self, pair: FittedPair) -> Tensor:
        return next(iter(pair.latent_means(self.data.train).values()))

    def _tiles(self, values: Tensor, down: Sequence[str], across: Sequence[str]) -> ImageGrid:
        return ImageGrid.of(values, down, across, self.data.train, self.image_shape)

    def _reconstructions(self) -> ImageGrid | None:
        x = self.data.test[:ACROSS]
        found = self._each(self.fitted_pair, lambda pair: pair.reconstruct(x), "reconstructions")
        if not found:
            return None
        values = torch.stack([x, *found.values()])
        rows = [str(row) for row in self.data.test_rows[:ACROSS].tolist()]
        return self._tiles(values, ["original", *found], rows)

    def _samples(self) -> ImageGrid | None:
        like = self.data.train[:1].expand(ACROSS, -1)
        found = self._each(self.fitted_pair, lambda p: p.sample(like, self.seed), "samples")
        if not found:
            return None
        numbers = [str(number + 1) for number in range(ACROSS)]
        return self._tiles(torch.stack(list(found.values())), list(found), numbers)

    def _manifold(self, vae: FittedPair) -> ImageGrid:
        at = normal_quantiles(GRID_SIZE)
        inner = decode_grid(vae.model, vae.units.apply(self.data.train[:1]), values=at)
        values = vae.units.undo(inner)
        ticks = [f"{float(value):.1f}" for value in at]
        return self._tiles(values, ticks[::-1], ticks)

    def _interpolation(self, vae: FittedPair) -> ImageGrid:
        pairs = min(3, len(self.data.test) // 2)
        x = vae.units.apply(self.data.test[: 2 * pairs])
        ends, how = (x[::2], x[1::2]), {"guide": vae.guide, "num_steps": ACROSS}
        values = vae.units.undo(interpolate(vae.model, *ends, **how))
        rows = self.data.test_rows.tolist()
        names = [f"{rows[2 * i]} to {rows[2 * i + 1]}" for i in range(pairs)]
        place = torch.linspace(0, 1, ACROSS)
        return self._tiles(values, names, [f"{float(p):.2f}" for p in place])
