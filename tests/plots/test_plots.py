"""The figures of the report: readable, with units, and drawn from stored results alone."""

import dataclasses
import functools
import io
import itertools
import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.container import BarContainer, ErrorbarContainer

import lineages
from figures import assert_readable, texts
from lineage_rows import TABLES, lineage
from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.evaluation.calibration.result import SimulationBasedCalibration
from ppl_vae.evaluation.marginal_likelihood.compare import compare
from ppl_vae.lineage.latent_means import LatentMeans
from ppl_vae.lineage.report_data import ReportData, report_data
from ppl_vae.lineage.result import Lineage
from ppl_vae.plots.axes import image_grid_size, log_scale
from ppl_vae.plots.bounds import NUM_ITERATIONS
from ppl_vae.plots.calibration import plot_rank_ecdf
from ppl_vae.plots.estimates import plot_comparison
from ppl_vae.plots.fits import plot_log_p
from ppl_vae.plots.images import plot_samples
from ppl_vae.plots.latent_spaces import plot_kl_by_dimension, plot_latent_means, plot_spectrum
from ppl_vae.plots.lineage import gaps_size, plot_gaps, plot_objective
from ppl_vae.report.figures import ReportFigure, report_figures
from ppl_vae.report.verdict import verdict

NAMES = (
    *("gaps", "comparison", "objective-steps", "objective-seconds"),
    *("covariance-check", "quantile-check", "em", "svi"),
    *("bound-slice", "spectrum", "kl-by-dimension", "tail-index", "convergence", "cross-check"),
    *(
        "reconstructions",
        "samples",
        "latent-means-PPCA",
        "latent-means-VAE",
        "latent-means-a-user-s-pair",
    ),
    *("manifold", "interpolation"),
)


def stored(result, kind):
    return kind.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))


@pytest.fixture(scope="module")
def figures():
    """The figures of results that were written to JSON and read again."""
    results = (
        stored(lineages.small_lineage(), Lineage),
        stored(lineages.small_report_data(), ReportData),
    )
    return {figure.name: figure for figure in report_figures(*results)}


def test_all_figures_are_present(figures):
    assert tuple(figures) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_two_texts_overlap_and_axes_have_units(figures, name):
    assert_readable(figures[name].render())
    assert len(figures[name].caption) > 40


def test_figures_of_autoencoders_alone_are_readable():
    found = lineages.subset(lineages.small_lineage(), ["pca", "linear-autoencoder"])
    drawn = {figure.name: figure for figure in report_figures(found, report_data(found))}
    for name in ("gaps", "comparison", "objective-steps", "reconstructions", "samples"):
        assert_readable(drawn[name].render())
    assert len(verdict(found)) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_figures_of_stored_results_are_identical(figures, name):
    results = lineages.small_lineage(), lineages.small_report_data()
    original = {figure.name: figure for figure in report_figures(*results)}
    assert pixels(figures[name]) == pixels(original[name])


def pixels(figure):
    canvas = figure.render().canvas
    canvas.draw()
    return bytes(canvas.buffer_rgba())


def test_names_of_user_written_pairs_are_valid_names_of_files():
    data = lineages.small_report_data()
    means = dict.fromkeys(("a/b", "a b", "../c"), data.latent_means["VAE"])
    data = dataclasses.replace(data, latent_means=means)
    names = [figure.name for figure in report_figures(lineages.small_lineage(), data)]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]+", name) for name in names)


def test_a_lineage_of_one_stage_without_classes_or_images():
    data = lineages.single_stage_report_data()
    figures = report_figures(lineages.single_stage_lineage(), data)
    names = {figure.name for figure in figures}
    assert {"samples", "em"} <= names and names.isdisjoint({"comparison", "manifold", "svi"})
    for figure in figures:
        assert_readable(figure.render())
    assert any("fewer than two" in reason for reason in data.left_out)
    assert any("vae was not run" in reason for reason in data.left_out)


@pytest.mark.parametrize("factor", [1.5, 3.02, 3.3, 4.5, 8, 12])
@pytest.mark.parametrize("low", [0.0021, 0.0029, 0.0041, 0.0053, 0.0058])
def test_logarithmic_axes_of_short_ranges_have_readable_ticks(low, factor):
    def draw(ax):
        ax.plot([low, factor * low], [1.0, 2.0])
        log_scale(ax, "x")
        ax.set_xlabel("seconds")
        ax.set_ylabel("objective, nats per datum")
        ax.set_title("short", loc="left")

    assert_readable(ReportFigure("", "", (6.4, 4.4), draw, "").render())


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_gaps_of_tables_of_all_sizes(rows):
    result = lineage(rows)
    plot = functools.partial(plot_gaps, result)
    figure = ReportFigure("", "", gaps_size(result), plot, "").render()
    assert_readable(figure)
    (axes,) = figure.axes
    stacked = [c for c in axes.containers if isinstance(c, BarContainer)]
    for part, bars in enumerate(stacked):
        for bar, r in zip(bars, rows, strict=True):
            expected = (r.shortfall, r.approximation, r.amortization)[part]
            assert bar.get_width() == pytest.approx(0 if math.isnan(expected) else expected)


def test_gaps_have_error_bars():
    rows = TABLES["large"]
    axes = plot_gaps(lineage(rows))
    found = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    for part, bars in enumerate(found):
        (collection,) = bars.lines[2]
        for start, end in collection.get_segments():
            r = rows[round(start[1])]
            error = (r.approximation_error, r.amortization_error)[part]
            place = (r.approximation, r.approximation + r.amortization)[part]
            place += 0.0 if math.isnan(r.shortfall) else r.shortfall
            assert (start[0], end[0]) == pytest.approx((place - error, place + error))
    # Error bars that are too short to be visible are not drawn.
    assert [len(bars.lines[2][0].get_segments()) for bars in found] == [2, 4]
    plt.close(axes.figure)


def test_the_cross_check_shows_annealing_minus_importance_sampling(figures):
    (axes,) = figures["cross-check"].render().axes
    comparisons = lineages.small_report_data().cross_check
    assert len(axes.containers) == len(comparisons) == 4
    assert all(float(tick).is_integer() for tick in axes.get_xticks())  # numbers of data
    for container, (name, pair) in zip(axes.containers, comparisons.items(), strict=True):
        difference = pair.estimates["annealed"].value - pair.estimates["importance"].value
        assert np.allclose(container.lines[0].get_ydata(), difference)
        assert container.get_label().startswith(f"{name}: mean {float(difference.mean()):.3f} ±")
        errors = [e.standard_error**2 for e in pair.estimates.values()]
        lengths = [end[1] - start[1] for start, end in container.lines[2][0].get_segments()]
        assert np.allclose(lengths, 2 * sum(errors).sqrt())


def test_numbers_of_rows_are_whole_on_the_axis():
    axes = plot_log_p(torch.tensor([-1.0, -3.0, -3.1, -9.0]))
    assert all(float(tick).is_integer() for tick in axes.get_yticks())
    plt.close(axes.figure)


def test_exact_zeros_are_marked(figures):
    words = [text for text, _ in texts(figures["gaps"].render())]
    assert words.count("0, exact") >= 4


def lines(figure):
    (axes,) = figure.render().axes
    return {line.get_label(): np.column_stack(line.get_data()) for line in axes.lines}


def test_the_figure_of_em_shows_its_history_and_labels_the_gap(figures):
    found = lines(figures["em"])
    ascent = lineages.small_lineage().row("em").ascent
    part = ascent.at <= NUM_ITERATIONS
    assert np.allclose(found["log p(x)"][:, 1], ascent.log_likelihood[part])
    assert np.allclose(found["bound (ELBO)"][:, 1], ascent.bound[part])
    touching = found["after an E-step: equal"]
    assert np.allclose(touching[:, 0], np.arange(len(touching)))
    words = [text for text, _ in texts(figures["em"].render())]
    assert "KL(q || p(z|x))" in words
    limits = [figures[name].render().axes[0].get_ylim() for name in ("em", "svi")]
    assert limits[0] == limits[1]


def test_the_objective_is_shown_for_every_stage_with_a_bound(figures):
    found = lines(figures["objective-steps"])
    bounded = lineages.bounded(lineages.small_lineage())
    names = {*(r.stage for r in bounded), "variational-bayes"}
    assert set(found) == names | {"optimum of PPCA"}
    assert np.allclose(found["optimum of PPCA"][:, 1], lineages.small_lineage().optimum)
    low, high = figures["objective-steps"].render().axes[0].get_ylim()
    elbos = [r.elbo for r in bounded]
    assert low > min(elbos) - 2 * (max(elbos) - min(elbos)) and high > max(elbos)
    row = lineages.small_lineage().row("vae")
    assert np.allclose(found["vae"], np.column_stack([row.curve.steps, row.curve.value]))
    seconds = lines(figures["objective-seconds"])["vae"]
    assert np.allclose(seconds[:, 0], row.curve.seconds)
    with pytest.raises(ValueError, match="against must be one of 'steps', 'seconds'; got 'time'"):
        plot_objective(lineages.small_lineage(), against="time")


def test_the_pooled_tail_index_of_every_datum_is_shown_with_its_limit(figures):
    found = lines(figures["tail-index"])
    row = lineages.small_lineage().row("vae")
    share = math.floor(100 * row.held_out.share_reliable)
    pooled = row.held_out.tail_index
    assert np.allclose(found[f"vae: {share} % reliable"][:, 1], pooled, equal_nan=True)
    limit = float(row.held_out.limit.nanmedian())
    assert found[f"its limit, {limit:.2f}"][0, 1] == pytest.approx(limit)


def test_a_comparison_marks_lower_bounds():
    first = lineages.small_lineage().row("vae").held_out
    unreliable = dataclasses.replace(first, reliable=torch.zeros_like(first.reliable))
    axes = plot_comparison(compare({"reliable": first.value + 1, "unreliable": unreliable}))
    assert "lower bound" in axes.get_legend_handles_labels()[1]
    plt.close(axes.figure)


def test_only_few_classes_are_coloured_and_sorted():
    means = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    for labels, expected in (
        (tuple(range(60)), []),
        (("b", "a", 10, 9) * 15, ["9", "10", "a", "b"]),
        (None, []),
    ):
        axes = plot_latent_means(LatentMeans(means, labels, "class", "K = 2"))
        assert axes.get_legend_handles_labels()[1] == expected
        assert sum(len(points.get_offsets()) for points in axes.collections) == 60
        plt.close(axes.figure)


@pytest.mark.parametrize("shape", [None, (2, 3), (3, 2), (1, 6)])
@pytest.mark.parametrize("grid", [(1, 8), (3, 8), (9, 9), (2, 1)])
def test_image_grids_of_all_shapes(shape, grid):
    values = torch.randn(*grid, 6, generator=torch.Generator().manual_seed(0))
    train = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    rows, columns = ([f"{k:.2f}" for k in range(n)] for n in grid)
    image_grid = ImageGrid.of(values, rows, columns, train, shape)
    plot = functools.partial(plot_samples, image_grid)
    assert_readable(ReportFigure("", "", image_grid_size(image_grid), plot, "").render())


def test_without_axes_a_figure_is_created():
    plt.switch_backend("Agg")
    before = plt.get_fignums()
    axes = plot_gaps(lineages.small_lineage())
    assert axes.figure.number not in before
    plt.close(axes.figure)
    figure, two = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    data = lineages.small_report_data()
    assert plot_kl_by_dimension(data.kl, two[0]) is two[0]
    plot_spectrum(data.spectrum, two[1])
    figure.savefig(io.BytesIO())
    boxes = texts(figure)
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        assert not box.shrunk(0.98, 0.9).overlaps(other.shrunk(0.98, 0.9)), (a, b)
    plt.close(figure)


def test_the_plot_of_ranks_has_the_curves_and_the_band():
    ranks = torch.from_numpy(np.random.default_rng(0).integers(0, 20, size=(50, 8)))
    ranks[:, 3] //= 4
    names = tuple(f"theta[{k}]" for k in range(8))
    unknown = torch.full((8,), math.nan, dtype=torch.float64)
    result = stored(
        SimulationBasedCalibration(names, ranks, 19, 5, unknown), SimulationBasedCalibration
    )
    ax = plot_rank_ecdf(result)
    assert_readable(ax.figure)
    labels = ax.get_legend_handles_labels()[1]
    assert labels[:2] == ["95 % band", "theta[3]"] and len(labels) == 7
    line = next(line for line in ax.lines if line.get_label() == "theta[3]")
    at, difference = line.get_data()
    expected = [(ranks[:, 3] < 20 * p).double().mean() - p for p in at]
    np.testing.assert_allclose(difference, expected, atol=1e-12)
    assert len(plot_rank_ecdf(result, ["theta[1]"]).lines) == 2
    with pytest.raises(ValueError, match="quantities must be one of"):
        plot_rank_ecdf(result, ["z"])
    plt.close("all")
