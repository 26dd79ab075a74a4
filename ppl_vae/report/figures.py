"""Which pictures a lineage has, each with its size and a sentence that says what to see."""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.evaluation.inference_gaps.ascent import Ascent
from ppl_vae.evaluation.marginal_likelihood.cross_check import EstimatorComparison
from ppl_vae.lineage.report_data import ReportData
from ppl_vae.lineage.run import Lineage
from ppl_vae.plots import estimates as estimate_plots
from ppl_vae.plots import images as tile_plots
from ppl_vae.plots import lineage as plots
from ppl_vae.plots.drawing import SIZE, tile_size

DOTS_PER_INCH = 160


@dataclass(frozen=True)
class Picture:
    """A picture to be drawn.

    Attributes:
        name: of its file.
        sentence: what to see.
        size: width and height in inches.
        draw: draws it on axes.
        group: pictures of one group stand together under this heading.
    """

    name: str
    sentence: str
    size: tuple[float, float]
    draw: Callable[[Axes], Axes]
    group: str

    def figure(self) -> Figure:
        """The picture drawn."""
        figure = Figure(figsize=self.size, layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure.add_subplot())
        return figure

    def png(self) -> bytes:
        """The picture as a file's content."""
        target = io.BytesIO()
        self.figure().savefig(target, dpi=DOTS_PER_INCH)
        return target.getvalue()


def pictures(lineage: Lineage, shown: ReportData) -> list[Picture]:
    """The pictures that these results have, in the order of the page."""
    groups = (_ladder, _bounds, _latents, _estimates, _data, _plane)
    found: dict[str, Picture] = {}
    for picture in (picture for group in groups for picture in group(lineage, shown)):
        name = re.sub(r"[^\w]+", "-", picture.name)
        while name in found:
            name += "-"
        found[name] = replace(picture, name=name)
    return list(found.values())


def _ladder(lineage: Lineage, shown: ReportData) -> Iterator[Picture]:
    group = "The lineage"
    yield Picture(
        "gap-staircase",
        "What each step away from the exact posterior costs: zero where q is exact and the fit "
        "has converged. Lines at the ends of the gaps are one standard error to each side.",
        plots.gaps_size(lineage),
        partial(plots.plot_gaps, lineage),
        group,
    )
    if shown.comparison is not None:
        yield Picture(
            "comparison",
            "Held-out log p, row by row against the best model's; bars are one paired standard "
            "error.",
            plots.comparison_size(shown.comparison),
            partial(plots.comparison, shown.comparison),
            group,
        )
    size = (SIZE[0], 4.4)
    for against, sentence in (
        (
            "steps",
            "Each stage's objective against its own count of work; EM needs few iterations.",
        ),
        ("seconds", "The same against the clock: what an iteration costs is part of the answer."),
    ):
        draw = partial(plots.objective, lineage, against=against)
        yield Picture(f"objective-{against}", sentence, size, draw, group)


def _bounds(lineage: Lineage, shown: ReportData) -> Iterator[Picture]:
    group = "The bound"
    em, svi = _first_ascent(lineage, "iterations"), _first_ascent(lineage, "steps")
    if em is not None:
        sentence = (
            "After each E-step the bound is log p (dots); each M-step raises both, log p more. "
            "The shaded distance is KL(q || p(z|x))."
        )
        yield Picture(
            "em-staircase", sentence, SIZE, _on_one_scale(plots.plot_em, em, em, svi), group
        )
    if svi is not None:
        sentence = (
            "Stochastic gradients move model and guide at once: no step closes the gap, and a "
            "restricted q leaves one at the end."
        )
        yield Picture(
            "svi-ascent", sentence, SIZE, _on_one_scale(plots.plot_svi, svi, em, svi), group
        )
    yield Picture(
        "bound-slice",
        "With q fixed, the bound touches log p where q is exact, with the same slope there, and "
        "stays below it elsewhere: that is why raising the bound raises log p.",
        SIZE,
        partial(plots.bound_slice, shown.bound_slice),
        group,
    )


def _first_ascent(lineage: Lineage, unit: str) -> Ascent | None:
    """EM's own; of SVI's, one whose q is not the exact posterior, so that there is a gap."""
    found = [r for r in lineage.rows if r.ascent is not None and r.ascent.unit == unit]
    wanted = {"iterations": ("em",), "steps": ("linear-amortized", "deep-amortized")}[unit]
    ranked = sorted(found, key=lambda row: row.stage not in wanted)
    return ranked[0].ascent if ranked else None


def _on_one_scale(
    plot: Callable[..., Axes], ascent: Ascent, em: Ascent | None, svi: Ascent | None
) -> Callable[[Axes], Axes]:
    def draw(ax: Axes) -> Axes:
        plot(ascent, ax)
        both = [part for part in (em, svi) if part is not None]
        low = min(float(part.bound[part.at > 0].min()) for part in both)
        high = max(float(part.log_likelihood.max()) for part in both)
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        return ax

    return draw


def _latents(lineage: Lineage, shown: ReportData) -> Iterator[Picture]:
    group = "The latent dimensions"
    holes = ", expected given what was observed" if lineage.about["num_missing"] else ""
    yield Picture(
        "spectrum",
        f"Variance along each principal axis{holes}. An axis below a model's noise variance "
        "(dashed) has nothing to gain and should collapse: by theorem for PPCA, as a guide for "
        "the VAE.",
        SIZE,
        partial(plots.spectrum, shown.spectrum),
        group,
    )
    if shown.kl:
        yield Picture(
            "kl-by-dimension",
            "How many nats each latent dimension carries. One at zero has collapsed: its q is the "
            "prior, whatever the datum.",
            SIZE,
            partial(plots.kl_by_dimension, shown.kl),
            group,
        )


def _estimates(lineage: Lineage, shown: ReportData) -> Iterator[Picture]:
    group = "Whether estimates are to be believed"
    scored = {row.stage: row.held_out for row in lineage.rows if row.held_out is not None}
    estimates = {name: found for name, found in scored.items() if found.method != "exact"}
    if estimates:
        yield Picture(
            "k-hat",
            "The Pareto tail index of each held-out datum's weights under the refined q, pooled "
            "over data whose weights are alike: above the dotted line log p is no more than a "
            "lower bound.",
            SIZE,
            partial(estimate_plots.tail_index, estimates),
            group,
        )
        yield Picture(
            "convergence",
            "Held-out log p from the first 1/64, 1/16 and 1/4 of the draws, and from all. A curve "
            "that still rises at its end is a lower bound still.",
            SIZE,
            partial(estimate_plots.convergence, estimates),
            group,
        )
    if shown.cross_check:
        yield Picture(
            "annealing",
            f"Log p of {_most(shown.cross_check)} held-out rows by annealed importance sampling, "
            "less that by importance sampling from the refined q. Both are lower bounds in "
            "expectation: above zero importance sampling falls short, below zero annealing.",
            SIZE,
            partial(estimate_plots.annealing, shown.cross_check),
            group,
        )


def _most(told: Mapping[str, EstimatorComparison]) -> int:
    return max(len(pair.estimates["annealed"].value) for pair in told.values())


def _data(lineage: Lineage, shown: ReportData) -> Iterator[Picture]:
    group = "The data as the models see them"
    sentence = "Held-out rows over the mean of x at q's mean. What K numbers do not hold is gone."
    yield from _tiles("reconstructions", shown.reconstructions, sentence, group)
    sentence = "New rows: z from the prior, x from the model, its noise included."
    yield from _tiles("samples", shown.samples, sentence, group)


def _tiles(
    name: str, image_grid: ImageGrid | None, sentence: str, group: str
) -> Iterator[Picture]:
    if image_grid is not None:
        yield Picture(
            name, sentence, tile_size(image_grid), partial(TILED[name], image_grid), group
        )


TILED = {
    plot.__name__: plot
    for plot in (
        tile_plots.reconstructions,
        tile_plots.samples,
        tile_plots.manifold,
        tile_plots.interpolation,
    )
}


def _plane(lineage: Lineage, shown: ReportData) -> Iterator[Picture]:
    group = "Two latents, for pictures only"
    for name, means in shown.latent_means.items():
        blind = "" if means.labels is None else " It was not told the classes."
        yield Picture(
            f"latent-means-{name}",
            f"Where the training rows lie: means of q(z|x) of {name} ({means.about}).{blind}",
            (SIZE[0], 4.6),
            partial(plots.latent_means, means, name=name),
            group,
        )
    sentence = (
        "The mean of x over the middle nine tenths of the prior in both directions, from a second "
        "VAE with two latents that was fitted for pictures only."
    )
    yield from _tiles("manifold", shown.manifold, sentence, group)
    sentence = "The mean of x on straight lines between codes of held-out rows, in the same VAE."
    yield from _tiles("interpolation", shown.interpolation, sentence, group)
