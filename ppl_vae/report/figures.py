"""The figures of a lineage's report, each with its size and a caption."""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.evaluation.inference_gaps.bound_history import Ascent
from ppl_vae.evaluation.marginal_likelihood.cross_check import EstimatorComparison
from ppl_vae.lineage.report_data import ReportData
from ppl_vae.lineage.result import Lineage
from ppl_vae.lineage.table import is_compiled
from ppl_vae.plots.axes import SIZE, image_grid_size
from ppl_vae.plots.bounds import plot_bound_slice, plot_em, plot_svi
from ppl_vae.plots.estimates import (
    comparison_size,
    plot_comparison,
    plot_convergence,
    plot_cross_check,
    plot_tail_index,
)
from ppl_vae.plots.images import (
    plot_interpolation,
    plot_manifold,
    plot_reconstructions,
    plot_samples,
)
from ppl_vae.plots.latent_spaces import (
    MEANS_SIZE,
    plot_kl_by_dimension,
    plot_latent_means,
    plot_spectrum,
)
from ppl_vae.plots.lineage import OBJECTIVE_SIZE, gaps_size, plot_gaps, plot_objective
from ppl_vae.plots.predictive_checks import (
    CHECK_SIZE,
    plot_covariance_check,
    plot_quantile_check,
)

DOTS_PER_INCH = 160


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report.

    Attributes:
        name: the name of its file.
        caption: what it shows, and how to read it.
        size: width and height in inches.
        plot: plots it on axes.
        group: the heading under which it is placed.
    """

    name: str
    caption: str
    size: tuple[float, float]
    plot: Callable[[Axes], Axes]
    group: str

    def render(self) -> Figure:
        """The figure with its plot."""
        figure = Figure(figsize=self.size, layout="constrained")
        FigureCanvasAgg(figure)
        self.plot(figure.add_subplot())
        return figure

    def png(self) -> bytes:
        """The figure as the content of a PNG file."""
        target = io.BytesIO()
        self.render().savefig(target, dpi=DOTS_PER_INCH)
        return target.getvalue()


def report_figures(lineage: Lineage, data: ReportData) -> list[ReportFigure]:
    """The figures for these results, in the order of the page, with unique names."""
    groups = (
        _lineage,
        _posterior,
        _bounds,
        _latent_dimensions,
        _reliability,
        _data,
        _latent_plane,
    )
    found: dict[str, ReportFigure] = {}
    for figure in (figure for group in groups for figure in group(lineage, data)):
        name = re.sub(r"[^\w]+", "-", figure.name)
        while name in found:
            name += "-"
        found[name] = replace(figure, name=name)
    return list(found.values())


def _lineage(lineage: Lineage, data: ReportData) -> Iterator[ReportFigure]:
    group = "The lineage"
    yield ReportFigure(
        "gaps",
        "The loss of each stage: the shortfall of log p, the approximation gap and the "
        "amortization gap. It is zero where q is exact and the fit has converged. Error bars are "
        "plus and minus one standard error.",
        gaps_size(lineage),
        partial(plot_gaps, lineage),
        group,
    )
    if data.comparison is not None:
        yield ReportFigure(
            "comparison",
            "Held-out log p minus that of the best model; the differences are paired by row, and "
            "the error bars are their standard errors.",
            comparison_size(data.comparison),
            partial(plot_comparison, data.comparison),
            group,
        )
    for against, caption in (
        ("steps", "The objective of each stage against iterations of EM or steps of SVI."),
        (
            "seconds",
            "The objective of each stage against the time of the fit, in seconds. "
            f"{_compiled(lineage)}",
        ),
    ):
        plot = partial(plot_objective, lineage, against=against)
        yield ReportFigure(f"objective-{against}", caption, OBJECTIVE_SIZE, plot, group)


def _compiled(lineage: Lineage) -> str:
    names = [row.stage for row in lineage.rows if is_compiled(row)]
    if not names:
        return "No stage was compiled."
    return f"Compiled stages, whose time includes the compilation: {', '.join(names)}."


def _posterior(lineage: Lineage, data: ReportData) -> Iterator[ReportFigure]:
    group = "The posterior of the parameters"
    reading = (
        "Intervals of 90 % over data sets drawn from the posterior predictive distribution of "
        "Bayesian PPCA, and (grey) from its prior. On the dotted line the data sets agree with "
        "the data; orange elements have a posterior predictive p-value below 0.025 or above "
        "0.975."
    )
    if (check := data.covariance_check) is not None:
        caption = (
            f"Covariances of the training rows. {reading} If K is too small, many elements are "
            "orange."
        )
        plot = partial(plot_covariance_check, check)
        yield ReportFigure("covariance-check", caption, CHECK_SIZE, plot, group)
    if (check := data.quantile_check) is not None:
        caption = (
            "The 5, 25, 50, 75 and 95 % quantiles of each column of the training rows, as above. "
            "PPCA is Gaussian: where columns are not, quantiles deviate."
        )
        plot = partial(plot_quantile_check, check)
        yield ReportFigure("quantile-check", caption, CHECK_SIZE, plot, group)


def _bounds(lineage: Lineage, data: ReportData) -> Iterator[ReportFigure]:
    group = "The bound"
    em, svi = _first_ascent(lineage, "iterations"), _first_ascent(lineage, "steps")
    if em is not None:
        caption = (
            "After each E-step the bound equals log p (dots); each M-step increases both, log p "
            "by more. The shaded distance is KL(q || p(z|x))."
        )
        yield ReportFigure("em", caption, SIZE, _on_common_scale(plot_em, em, em, svi), group)
    if svi is not None:
        caption = (
            "Stochastic gradients update model and guide jointly: no step closes the gap, and a "
            "restricted q leaves a gap at convergence."
        )
        yield ReportFigure("svi", caption, SIZE, _on_common_scale(plot_svi, svi, em, svi), group)
    yield ReportFigure(
        "bound-slice",
        "With q fixed, the bound is tangent to log p at the parameters where q is exact, and "
        "below it elsewhere: therefore a step that increases this bound increases log p.",
        SIZE,
        partial(plot_bound_slice, data.bound_slice),
        group,
    )


def _first_ascent(lineage: Lineage, unit: str) -> Ascent | None:
    """Plain EM, or SVI with a q that is not the exact posterior, so that there is a gap."""
    found = [r for r in lineage.rows if r.ascent is not None and r.ascent.unit == unit]
    preferred = {"iterations": ("em",), "steps": ("linear-amortized", "deep-amortized")}[unit]
    ranked = sorted(found, key=lambda row: row.stage not in preferred)
    return ranked[0].ascent if ranked else None


def _on_common_scale(
    plot: Callable[..., Axes], ascent: Ascent, em: Ascent | None, svi: Ascent | None
) -> Callable[[Axes], Axes]:
    def plot_with_limits(ax: Axes) -> Axes:
        plot(ascent, ax)
        both = [part for part in (em, svi) if part is not None]
        low = min(float(part.bound[part.at > 0].min()) for part in both)
        high = max(float(part.log_likelihood.max()) for part in both)
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        return ax

    return plot_with_limits


def _latent_dimensions(lineage: Lineage, data: ReportData) -> Iterator[ReportFigure]:
    group = "The latent dimensions"
    missing = ", expected given the observed entries" if lineage.about["num_missing"] else ""
    yield ReportFigure(
        "spectrum",
        f"Variance along each principal axis{missing}. An axis whose variance is below a model's "
        "noise variance (dashed) is expected to collapse: this is a theorem for PPCA and a "
        "heuristic for the VAE.",
        SIZE,
        partial(plot_spectrum, data.spectrum),
        group,
    )
    if data.kl:
        yield ReportFigure(
            "kl-by-dimension",
            "KL of each latent dimension, averaged over the training rows. A dimension with zero "
            "KL has collapsed: its q equals the prior for every datum.",
            SIZE,
            partial(plot_kl_by_dimension, data.kl),
            group,
        )


def _reliability(lineage: Lineage, data: ReportData) -> Iterator[ReportFigure]:
    group = "Reliability of the estimates of log p"
    scored = {row.stage: row.held_out for row in lineage.rows if row.held_out is not None}
    estimates = {name: found for name, found in scored.items() if found.is_weighted}
    if estimates:
        yield ReportFigure(
            "tail-index",
            "The Pareto tail index of each held-out datum's importance weights under the "
            "optimized q, pooled over data with similar weights: above the dotted line the "
            "estimate of log p is only a lower bound.",
            SIZE,
            partial(plot_tail_index, estimates),
            group,
        )
        yield ReportFigure(
            "convergence",
            "Held-out log p from the first 1/64, 1/16 and 1/4 of the draws, and from all. A curve "
            "that still increases at its end indicates an estimate that is too low.",
            SIZE,
            partial(plot_convergence, estimates),
            group,
        )
    if data.cross_check:
        yield ReportFigure(
            "cross-check",
            f"log p of {_max_rows(data.cross_check)} held-out rows by annealed importance "
            "sampling, minus that by importance sampling from the optimized q. Both are lower "
            "bounds in expectation: positive values mean that importance sampling is too low, "
            "negative values that annealing is.",
            SIZE,
            partial(plot_cross_check, data.cross_check),
            group,
        )


def _max_rows(comparisons: Mapping[str, EstimatorComparison]) -> int:
    return max(len(pair.estimates["annealed"].value) for pair in comparisons.values())


def _data(lineage: Lineage, data: ReportData) -> Iterator[ReportFigure]:
    group = "Reconstructions and samples"
    caption = "Held-out rows above the mean of x given the mean of q."
    yield from _grid("reconstructions", data.reconstructions, plot_reconstructions, caption, group)
    caption = "Draws of z from the prior and of x given z, noise included."
    yield from _grid("samples", data.samples, plot_samples, caption, group)


def _grid(
    name: str,
    image_grid: ImageGrid | None,
    plot: Callable[[ImageGrid, Axes], Axes],
    caption: str,
    group: str,
) -> Iterator[ReportFigure]:
    if image_grid is not None:
        size = image_grid_size(image_grid)
        yield ReportFigure(name, caption, size, partial(plot, image_grid), group)


def _latent_plane(lineage: Lineage, data: ReportData) -> Iterator[ReportFigure]:
    group = "Two latent dimensions, for figures only"
    for name, means in data.latent_means.items():
        unlabelled = "" if means.labels is None else " The fit did not use the classes."
        yield ReportFigure(
            f"latent-means-{name}",
            f"Means of q(z|x) of {name} for the training rows ({means.remark}).{unlabelled}",
            MEANS_SIZE,
            partial(plot_latent_means, means, name=name),
            group,
        )
    caption = (
        "The mean of x over the central nine tenths of the prior in both directions, from a "
        "second VAE with two latent dimensions that was fitted for figures only."
    )
    yield from _grid("manifold", data.manifold, plot_manifold, caption, group)
    caption = "The mean of x on straight lines between codes of held-out rows, in the same VAE."
    yield from _grid("interpolation", data.interpolation, plot_interpolation, caption, group)
