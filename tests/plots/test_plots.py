"""Pictures: every one readable, with units, and drawn from what is stored alone."""

import dataclasses
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
from matplotlib.text import Text
from test_table import TABLES, lineage

import lineages
from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.evaluation.marginal_likelihood.compare import compare
from ppl_vae.lineage.report_data import LatentMeans, ReportData, report_data
from ppl_vae.lineage.run import Lineage, run_lineage
from ppl_vae.plots import images as tile_plots
from ppl_vae.plots import lineage as plots
from ppl_vae.plots.drawing import log_scale, tile_size
from ppl_vae.report.figures import Picture, pictures
from ppl_vae.report.verdict import verdict

NAMES = (
    *("gap-staircase", "comparison", "objective-steps", "objective-seconds", "em-staircase"),
    *("svi-ascent", "bound-slice", "spectrum", "kl-by-dimension", "k-hat", "convergence"),
    "annealing",
    *(
        "reconstructions",
        "samples",
        "latent-means-PPCA",
        "latent-means-VAE",
        "latent-means-a-pair-of-mine",
    ),
    *("manifold", "interpolation"),
)
UNITS = re.compile(
    r"nats per datum|iterations|steps|seconds|squared units|standard deviations|no unit|axis|datum"
    r"|row|draw|position|dimension|PPCA's start"
)


def stored(result, kind):
    return kind.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))


@pytest.fixture(scope="module")
def drawn():
    """The pictures of results that were written to JSON and read again."""
    found = stored(lineages.ladder(), Lineage), stored(lineages.shown(), ReportData)
    return {picture.name: picture for picture in pictures(*found)}


@pytest.fixture(scope="module")
def plain():
    return {p.name: p for p in pictures(lineages.plain_ladder(), lineages.plain_shown())}


def texts(figure):
    """What is written, with where: tick labels outside the axes' limits are not drawn."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    hidden = set()
    for ax in figure.axes:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            low, high = sorted((low, high))
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                inside = low - 1e-9 <= tick.get_loc() <= high + 1e-9
                if not inside:
                    hidden |= {tick.label1, tick.label2}
    found = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in found if t not in hidden]


def check_texts(figure):
    """No two texts overlap, and all are within the figure."""
    boxes = texts(figure)
    assert len(boxes) > 4
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        across = min(box.x1, other.x1) - max(box.x0, other.x0)
        down = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert across <= 0.5 or down <= 0.5, (a, b)
    whole = figure.bbox
    for text, box in boxes:
        assert box.x0 >= -0.5 and box.x1 <= whole.x1 + 0.5, text
        assert box.y0 >= -0.5 and box.y1 <= whole.y1 + 0.5, text


def check_readable(figure):
    check_texts(figure)
    (ax,) = figure.axes
    assert ax.get_title(loc="left")
    assert UNITS.search(ax.get_xlabel()), ax.get_xlabel()
    assert ax.get_ylabel() in ("stage", "model", "rows of the data") or UNITS.search(
        ax.get_ylabel()
    )


def test_every_picture_is_there(drawn):
    assert tuple(drawn) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_two_texts_overlap_and_axes_have_units(drawn, name):
    check_readable(drawn[name].figure())
    assert len(drawn[name].sentence) > 40


def test_autoencoders_alone_make_readable_pictures():
    stages = ["pca", "linear-autoencoder"]
    found = run_lineage(lineages.table(), latent_dim=2, stages=stages, settings=lineages.SHORT)
    drawn = {picture.name: picture for picture in pictures(found, report_data(found))}
    for name in ("gap-staircase", "comparison", "objective-steps", "reconstructions", "samples"):
        check_readable(drawn[name].figure())
    assert len(verdict(found)) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_stored_results_are_all_that_is_drawn(drawn, name):
    live = {p.name: p for p in pictures(lineages.ladder(), lineages.shown())}
    assert drawn[name].png() == live[name].png()


def test_names_of_ones_own_are_names_of_files():
    shown = lineages.shown()
    means = dict.fromkeys(("a/b", "a b", "../c"), shown.latent_means["VAE"])
    found = pictures(lineages.ladder(), dataclasses.replace(shown, latent_means=means))
    names = [p.name for p in found]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]+", name) for name in names)


def test_a_ladder_of_one_rung_without_classes_or_images(plain):
    assert "samples" in plain and "comparison" not in plain and "manifold" not in plain
    assert "em-staircase" in plain and "svi-ascent" not in plain
    for picture in plain.values():
        check_readable(picture.figure())
    assert any("fewer than two" in why for why in lineages.plain_shown().left_out)
    assert any("vae was not climbed" in why for why in lineages.plain_shown().left_out)


@pytest.mark.parametrize("factor", [1.5, 3.02, 3.3, 4.5, 8, 12])
@pytest.mark.parametrize("low", [0.0021, 0.0029, 0.0041, 0.0053, 0.0058])
def test_axes_of_short_times_have_room_for_their_ticks(low, factor):
    def draw(ax):
        ax.plot([low, factor * low], [1.0, 2.0])
        log_scale(ax, "x")
        ax.set_xlabel("seconds")
        ax.set_ylabel("objective, nats per datum")
        ax.set_title("short", loc="left")

    check_readable(Picture("", "", (6.4, 4.4), draw, "").figure())


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_the_staircase_of_tables_of_all_sizes(rows):
    result = lineage(rows)
    draw = lambda ax: plots.plot_gaps(result, ax)  # noqa: E731
    figure = Picture("", "", plots.gaps_size(result), draw, "").figure()
    check_readable(figure)
    (axes,) = figure.axes
    stacked = [c for c in axes.containers if isinstance(c, BarContainer)]
    for part, bars in enumerate(stacked):
        for bar, r in zip(bars, rows, strict=True):
            expected = (r.shortfall, r.approximation, r.amortization)[part]
            assert bar.get_width() == pytest.approx(0 if math.isnan(expected) else expected)


def test_the_ends_of_gaps_have_their_errors():
    rows = TABLES["large"]
    axes = plots.plot_gaps(lineage(rows))
    found = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    for part, bars in enumerate(found):
        (collection,) = bars.lines[2]
        for start, end in collection.get_segments():
            r = rows[round(start[1])]
            error = (r.approximation_error, r.amortization_error)[part]
            place = (r.approximation, r.approximation + r.amortization)[part]
            place += 0.0 if math.isnan(r.shortfall) else r.shortfall
            assert (start[0], end[0]) == pytest.approx((place - error, place + error))
    # What the widest bar leaves no room to see is not drawn.
    assert [len(bars.lines[2][0].get_segments()) for bars in found] == [2, 4]
    plt.close(axes.figure)


def test_annealing_is_drawn_less_importance_sampling(drawn):
    (axes,) = drawn["annealing"].figure().axes
    told = lineages.shown().cross_check
    assert len(axes.containers) == len(told) == 4
    for container, (name, pair) in zip(axes.containers, told.items(), strict=True):
        less = pair.estimates["annealed"].value - pair.estimates["importance"].value
        assert np.allclose(container.lines[0].get_ydata(), less)
        assert container.get_label().startswith(f"{name}: mean {float(less.mean()):.3f} ±")
        errors = [e.standard_error**2 for e in pair.estimates.values()]
        lengths = [end[1] - start[1] for start, end in container.lines[2][0].get_segments()]
        assert np.allclose(lengths, 2 * sum(errors).sqrt())


def test_zeros_that_are_exact_say_so(drawn):
    words = [text for text, _ in texts(drawn["gap-staircase"].figure())]
    assert words.count("0, exact") >= 4


def lines(picture):
    (axes,) = picture.figure().axes
    return {line.get_label(): np.column_stack(line.get_data()) for line in axes.lines}


def test_the_em_staircase_draws_the_trace_and_labels_the_distance(drawn):
    found = lines(drawn["em-staircase"])
    ascent = lineages.ladder().row("em").ascent
    part = ascent.at <= plots.SHOWN_ITERATIONS
    assert np.allclose(found["log p(x)"][:, 1], ascent.log_likelihood[part])
    assert np.allclose(found["bound (ELBO)"][:, 1], ascent.bound[part])
    touching = found["after an E-step: equal"]
    assert np.allclose(touching[:, 0], np.arange(len(touching)))
    words = [text for text, _ in texts(drawn["em-staircase"].figure())]
    assert "KL(q || p(z|x))" in words
    limits = [drawn[name].figure().axes[0].get_ylim() for name in ("em-staircase", "svi-ascent")]
    assert limits[0] == limits[1]


def test_the_objective_has_every_rung_with_a_bound_and_the_exact_optimum(drawn):
    found = lines(drawn["objective-steps"])
    bounded = lineages.bounded(lineages.ladder())
    assert set(found) == {*(r.stage for r in bounded), "PPCA's optimum"}
    assert np.allclose(found["PPCA's optimum"][:, 1], lineages.ladder().optimum)
    low, high = drawn["objective-steps"].figure().axes[0].get_ylim()
    elbos = [r.elbo for r in bounded]
    assert low > min(elbos) - 2 * (max(elbos) - min(elbos)) and high > max(elbos)
    row = lineages.ladder().row("vae")
    assert np.allclose(found["vae"], np.column_stack([row.curve.steps, row.curve.value]))
    seconds = lines(drawn["objective-seconds"])["vae"]
    assert np.allclose(seconds[:, 0], row.curve.seconds)
    with pytest.raises(ValueError, match="against must be one of 'steps', 'seconds'; got 'time'"):
        plots.objective(lineages.ladder(), against="time")


def test_the_pooled_tail_index_of_every_datum_is_shown_with_its_limit(drawn):
    found = lines(drawn["k-hat"])
    row = lineages.ladder().row("vae")
    share = math.floor(100 * row.held_out.share_reliable)
    pooled = row.held_out.tail_index
    assert np.allclose(found[f"vae: {share} % reliable"][:, 1], pooled, equal_nan=True)
    limit = float(row.held_out.limit.nanmedian())
    assert found[f"its limit, {limit:.2f}"][0, 1] == pytest.approx(limit)


def test_a_comparison_marks_lower_bounds():
    first = lineages.ladder().row("vae").held_out
    unsure = dataclasses.replace(first, reliable=torch.zeros_like(first.reliable))
    axes = plots.comparison(compare({"sure": first.value + 1, "unsure": unsure}))
    assert "no more than a lower bound" in axes.get_legend_handles_labels()[1]
    plt.close(axes.figure)


def test_many_classes_are_not_coloured_and_few_are_in_their_order():
    means = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    for labels, shown in (
        (tuple(range(60)), []),
        (("b", "a", 10, 9) * 15, ["9", "10", "a", "b"]),
        (None, []),
    ):
        axes = plots.latent_means(LatentMeans(means, labels, "class", "two latents"))
        assert axes.get_legend_handles_labels()[1] == shown
        assert sum(len(points.get_offsets()) for points in axes.collections) == 60
        plt.close(axes.figure)


@pytest.mark.parametrize("shape", [None, (2, 3), (3, 2), (1, 6)])
@pytest.mark.parametrize("grid", [(1, 8), (3, 8), (9, 9), (2, 1)])
def test_tiles_of_all_shapes(shape, grid):
    values = torch.randn(*grid, 6, generator=torch.Generator().manual_seed(0))
    train = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    down, across = ([f"{k:.2f}" for k in range(n)] for n in grid)
    image_grid = ImageGrid.of(values, down, across, train, shape)
    figure = Picture(
        "", "", tile_size(image_grid), lambda ax: tile_plots.samples(image_grid, ax), ""
    ).figure()
    check_readable(figure)


def test_without_axes_it_makes_a_figure_and_on_axes_it_draws_there():
    plt.switch_backend("Agg")
    before = plt.get_fignums()
    axes = plots.plot_gaps(lineages.ladder())
    assert axes.figure.number not in before
    plt.close(axes.figure)
    figure, two = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    assert plots.kl_by_dimension(lineages.shown().kl, two[0]) is two[0]
    plots.spectrum(lineages.shown().spectrum, two[1])
    figure.savefig(io.BytesIO())
    boxes = texts(figure)
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        assert not box.shrunk(0.98, 0.9).overlaps(other.shrunk(0.98, 0.9)), (a, b)
    plt.close(figure)
