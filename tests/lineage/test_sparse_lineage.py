"""The sparse lineage: its numbers, its text and its plots."""

import dataclasses
import functools
import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import oracles
from figures import assert_texts_are_readable
from ppl_vae import elbo
from ppl_vae.data.splits import split
from ppl_vae.evaluation.latent_space.atoms import Atoms, atoms
from ppl_vae.inference import best_codes
from ppl_vae.lineage import SparseLineage, run_sparse_lineage
from ppl_vae.lineage.sparse_stages import REFERENCE, SPARSE_STAGES, SparseProblem, SparseSettings
from ppl_vae.plots.dictionary import plot_atoms, plot_sparse_lineage

D, K, PENALTY, SIGMA = 6, 9, 1.0, 0.3
SETTINGS = SparseSettings(steps=40, batch_size=32, hidden=(8,), unrolled=2, iterations=15)
ARGUMENTS = {"latent_dim": K, "penalty": PENALTY, "noise_scale": SIGMA, "settings": SETTINGS}
run = functools.partial(run_sparse_lineage, **ARGUMENTS)
AMORTIZED = ("linear-encoder", "mlp-encoder", "unrolled-encoder")


def data(seed=0, N=40):
    return oracles.planted_dictionary(N, D, K, 0.25, 0.05, seed)[0]


@pytest.fixture(scope="module")
def lineage():
    return run(data(), x_test=data(1, 20), seed=0)


def dense_metrics(autoencoder, x, codes):
    """Minus the loss and the squared error at these codes, by numpy."""
    layer = autoencoder.decoder[0]
    W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    codes = codes.detach().numpy()
    loss = oracles.dictionary_loss(x, W, b, codes, PENALTY, SIGMA)
    return -loss, ((x - codes @ W.T - b) ** 2).sum(1).mean(), (codes == 0).mean()


def test_all_stages_are_present_and_have_the_same_initial_dictionary(lineage):
    assert [row.stage for row in lineage.rows] == list(SPARSE_STAGES) == list(lineage.pairs)
    steps = {row.stage: row.steps for row in lineage.rows}
    assert {name: steps[name] for name in ("per-datum-svi", *AMORTIZED)} == dict.fromkeys(
        ("per-datum-svi", *AMORTIZED), 40
    )
    assert steps["random-atoms"] == 0 and lineage.row("random-atoms").fit is None
    problem = SparseProblem(
        train=torch.as_tensor(data()),
        latent_dim=K,
        penalty=PENALTY,
        noise_scale=SIGMA,
        settings=SETTINGS,
    )
    initial = [problem.autoencoder().decoder[0], problem.autoencoder().decoder[0]]
    initial.append(lineage.pairs["random-atoms"].decoder[0])
    assert all(torch.equal(layer.weight, initial[0].weight) for layer in initial)
    np.testing.assert_allclose(initial[0].bias.detach(), data().mean(0), rtol=1e-12)


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_loss_is_decomposed_and_agrees_with_numpy(lineage, part):
    x = data() if part == "train" else data(1, 20)
    order = np.argsort(x[:, 0])
    reference = best_codes(lineage.pairs[REFERENCE], x, tolerance=1e-7).log_joint
    for row in lineage.rows:
        found, model = getattr(row, part), lineage.pairs[row.stage]
        best = best_codes(model, x[order], tolerance=1e-7)
        log_joint, error, zeros = dense_metrics(model, x[order], best.codes)
        assert found.best == pytest.approx(log_joint, abs=1e-6)
        assert found.best_zeros == pytest.approx(zeros, abs=2e-3)
        assert found.dictionary == pytest.approx(float(reference.mean()) - log_joint, abs=1e-6)
        if row.stage in AMORTIZED:
            log_joint, error, zeros = dense_metrics(model, x, model.features(x))
            assert found.log_joint == pytest.approx(log_joint, rel=1e-9)
            assert found.zeros == pytest.approx(zeros)
            losses = best.log_joint - elbo(model.model, model.guide, x[order])
            assert found.amortization_error == pytest.approx(
                float(losses.std() / math.sqrt(len(x))), rel=1e-4
            )
            assert found.amortization == pytest.approx(found.best - found.log_joint, abs=1e-12)
            assert found.amortization > 1e-3
            assert found.loss == pytest.approx(float(reference.mean()) - log_joint, abs=1e-6)
        if (row.stage, part) != (
            "per-datum-svi",
            "train",
        ):  # the codes of this stage are free parameters
            assert found.squared_error == pytest.approx(error, rel=1e-4)


def test_free_codes_exist_for_training_rows_only(lineage):
    for name in ("random-atoms", REFERENCE, "per-datum-svi"):
        row = lineage.row(name)
        assert math.isnan(row.test.log_joint) and math.isnan(row.test.amortization)
        assert math.isnan(row.test.zeros) and row.test.loss == row.test.dictionary
        own = elbo(lineage.pairs[name].model, lineage.pairs[name].guide, data_in_order(lineage))
        assert row.train.log_joint == pytest.approx(float(own.mean()), rel=1e-12)
    assert lineage.row("random-atoms").train.amortization == pytest.approx(0, abs=1e-12)
    assert lineage.row(REFERENCE).train.amortization == pytest.approx(0, abs=1e-6)
    # Gradient steps do not attain exact zeros.
    free, model = lineage.row("per-datum-svi").train, lineage.pairs["per-datum-svi"]
    x = data_in_order(lineage)
    _, error, zeros = dense_metrics(model, x.numpy(), model.guide.loc)
    assert (free.squared_error, free.zeros) == pytest.approx((error, zeros))
    assert free.amortization > 0 and free.zeros < 0.01 < free.best_zeros


def data_in_order(lineage):
    """The training rows in the order of the lineage: training rows, then validation rows."""
    parts = split(torch.as_tensor(data()), torch.as_tensor(data(1, 20)), seed=0)
    return torch.cat([parts.train, parts.val])


def test_learning_improves_a_dictionary(lineage):
    gaps = {row.stage: row.train.dictionary for row in lineage.rows}
    assert gaps[REFERENCE] == 0 and gaps["random-atoms"] == max(gaps.values())


def test_its_text_reports_the_results(lineage):
    text = repr(lineage)
    assert "sparse codes of 6 columns by 9 atoms, penalty 1, noise 0.3; nats per datum" in text
    assert "40 training rows" in text and "20 held-out rows" in text
    for row in lineage.rows:
        assert f"{row.train.best:.3f}" in text and f"{row.test.best:.3f}" in text
    assert max(map(len, text.splitlines())) < 130
    best = min((lineage.row(name) for name in AMORTIZED), key=lambda row: row.test.loss)
    assert f"On held-out rows the best encoder is that of {best.stage}" in " ".join(text.split())
    assert "no bound on log p(x) (alternating)" in " ".join(text.split())
    assert "-0.000" not in text


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (0.5, "On held-out rows no dictionary is better than that of alternating."),
        (
            -0.5,
            "On held-out rows the dictionary of mlp-encoder is better than that of alternating",
        ),
        (-0.15, "On held-out rows the dictionaries of mlp-encoder and alternating do not differ"),
    ],
)
def test_its_text_names_the_best_dictionary(lineage, gap, expected):
    row = lineage.row("mlp-encoder")
    test = dataclasses.replace(row.test, dictionary=gap, dictionary_error=0.1)
    moved = dataclasses.replace(row, test=test)
    text = dataclasses.replace(lineage, rows=(lineage.row(REFERENCE), moved)).sentences()[0]
    assert text.startswith(expected)
    assert (f"{-gap:.3f} ± 0.100" in text) is (gap < 0)


def test_it_is_converted_to_json_and_to_a_frame(lineage):
    content = json.loads(json.dumps(lineage.to_dict(), allow_nan=False))
    again = SparseLineage.from_dict(content)
    assert repr(again) == repr(lineage) and again.pairs == {}
    frame = lineage.to_frame()
    assert list(frame.index) == list(SPARSE_STAGES)
    assert frame.loc["mlp-encoder", "test_best"] == lineage.row("mlp-encoder").test.best
    assert frame.loc["mlp-encoder", "steps"] == 40


def test_results_are_reproducible_and_leave_the_generators_unchanged():
    before = torch.get_rng_state()
    settings = dataclasses.replace(SETTINGS, steps=5, iterations=5)
    short_run = functools.partial(run, data(), stages=["linear-encoder"], settings=settings)
    first, second = short_run(seed=3), short_run(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert [row.stage for row in first.rows] == [REFERENCE, "linear-encoder"]
    assert first.row("linear-encoder").train == second.row("linear-encoder").train
    other = short_run(seed=4)
    assert first.row("linear-encoder").train != other.row("linear-encoder").train
    assert (first.about["num_train"], first.about["num_test"]) == (33, 7)


def test_without_encoders_none_is_reported():
    settings = dataclasses.replace(SETTINGS, iterations=5)
    found = run(data(), stages=["random-atoms"], settings=settings)
    assert len(found.sentences()) == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"stages": ["deep"]}, "stages must be one of 'random-atoms', 'alternating'"),
        ({"penalty": 0.0}, "penalty must be positive; got 0.0"),
        ({"noise_scale": -1.0}, "scale must be positive"),
        ({"latent_dim": 0}, "latent_dim must be a whole number >= 1; got 0"),
        ({"x_test": [[math.nan] * D]}, "x_test has 6 missing entries, and dictionary learning"),
        ({"x_test": [[0.0]]}, "x_test has 1 columns, x 6"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, match):
    with pytest.raises(ValueError, match=match):
        run(data(), **arguments)


def test_missing_values_are_rejected():
    x = data()
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match="x has 1 missing entries, and dictionary learning"):
        run(x)


# Plots


def metrics_of(lineage):
    return [metrics for row in lineage.rows for metrics in (row.train, row.test)]


def test_the_bars_show_the_loss(lineage):
    ax = plot_sparse_lineage(lineage)
    assert_texts_are_readable(ax.figure)
    assert "nats per datum" in ax.get_xlabel()
    bars = [patch for patch in ax.patches if abs(patch.get_width()) > 0]
    widths = sorted(bar.get_width() for bar in bars)
    expected = [
        value
        for metrics in metrics_of(lineage)
        for value in (metrics.dictionary, metrics.amortization)
        if not math.isnan(value) and value != 0
    ]
    np.testing.assert_allclose(widths, sorted(expected))
    written = [text.get_text() for text in ax.texts]
    for text, metrics in zip(written[4:], metrics_of(lineage)[4:], strict=True):
        assert text == f"{metrics.loss:.2f}"
    assert written[2:4] == ["0", "0"]
    plt.close(ax.figure)


def test_long_bars_are_truncated_and_better_dictionaries_are_left_of_zero(lineage):
    def with_gap(name, gap):
        row = lineage.row(name)
        parts = {
            part: dataclasses.replace(getattr(row, part), dictionary=gap)
            for part in ("train", "test")
        }
        return dataclasses.replace(row, **parts)

    rows = (with_gap("random-atoms", 500.0), lineage.row(REFERENCE), with_gap("mlp-encoder", -0.7))
    ax = plot_sparse_lineage(dataclasses.replace(lineage, rows=rows))
    assert_texts_are_readable(ax.figure)
    assert [text.get_text() for text in ax.texts][:2] == ["500.00 (truncated)"] * 2
    low, high = ax.get_xlim()
    assert low < -0.7 and high < 100
    assert any(patch.get_width() == -0.7 for patch in ax.patches)
    plt.close(ax.figure)


@pytest.mark.parametrize(("number", "shape"), [(9, (2, 3)), (23, (3, 2)), (9, None), (40, None)])
def test_atoms_are_drawn_in_order(number, shape):
    values = torch.randn(number, D, generator=torch.Generator().manual_seed(0)).double()
    use = torch.linspace(1, 0, number).double()
    found = Atoms(values, use, use, torch.arange(number))
    ax = plot_atoms(found, image_shape=shape, num_columns=5)
    assert_texts_are_readable(ax.figure)
    drawn = np.ma.filled(ax.images[0].get_array(), np.nan)
    if shape is None:
        np.testing.assert_array_equal(drawn, values)
    else:
        height, width = shape
        second = drawn[:height, width + 1 : 2 * width + 1]
        np.testing.assert_array_equal(second, values[1].reshape(shape))
        assert np.isnan(drawn[height]).all() and np.isnan(drawn[:, width]).all()
    low, high = ax.images[0].get_clim()
    assert low == -high
    plt.close(ax.figure)


def test_plots_use_the_given_axes(lineage):
    ax = plt.figure().add_subplot()
    found = atoms(lineage.pairs[REFERENCE], data())
    assert plot_atoms(found, ax, image_shape=(2, 3)) is ax
    assert plot_sparse_lineage(lineage, plt.figure().add_subplot()) is not ax
    plt.close("all")
