"""The lineage of sparse codes: its numbers, its words, and its pictures."""

import dataclasses
import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_plots import check_texts

import oracles
from ppl_vae import SparseLineage, best_codes, elbo, run_sparse_lineage
from ppl_vae.data.transforms import split
from ppl_vae.evaluation.latent_space.atoms import Atoms, atoms
from ppl_vae.lineage.sparse_stages import REFERENCE, SPARSE_STAGES, SparseSettings, SparseTask
from ppl_vae.plots import dictionary as dictionary_plots

D, K, PENALTY, SIGMA = 6, 9, 1.0, 0.3
SETTINGS = SparseSettings(steps=40, batch_size=32, hidden=(8,), unrolled=2, iterations=15)
HOW = {"latent_dim": K, "penalty": PENALTY, "noise_scale": SIGMA, "settings": SETTINGS}
AMORTIZED = ("linear-encoder", "mlp-encoder", "unrolled-encoder")


def data(seed=0, N=40):
    return oracles.planted_dictionary(N, D, K, 0.25, 0.05, seed)[0]


@pytest.fixture(scope="module")
def ladder():
    return run_sparse_lineage(data(), x_test=data(1, 20), **HOW, seed=0)


def numbers(autoencoder, x, codes):
    """Minus the loss and the squared error at these codes, by numpy."""
    layer = autoencoder.decoder[0]
    W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    codes = codes.detach().numpy()
    loss = oracles.dictionary_loss(x, W, b, codes, PENALTY, SIGMA)
    return -loss, ((x - codes @ W.T - b) ** 2).sum(1).mean(), (codes == 0).mean()


def test_every_rung_is_there_and_starts_alike(ladder):
    assert [row.stage for row in ladder.rows] == list(SPARSE_STAGES) == list(ladder.pairs)
    steps = {row.stage: row.steps for row in ladder.rows}
    assert {name: steps[name] for name in ("per-datum-svi", *AMORTIZED)} == dict.fromkeys(
        ("per-datum-svi", *AMORTIZED), 40
    )
    assert steps["random-atoms"] == 0 and ladder.row("random-atoms").fit is None
    task = SparseTask(torch.as_tensor(data()), K, PENALTY, SIGMA, SETTINGS)
    starts = [task.autoencoder().decoder[0], task.autoencoder().decoder[0]]
    starts.append(ladder.pairs["random-atoms"].decoder[0])
    assert all(torch.equal(start.weight, starts[0].weight) for start in starts)
    np.testing.assert_allclose(starts[0].bias.detach(), data().mean(0), rtol=1e-12)


@pytest.mark.parametrize("part", ["train", "test"])
def test_what_is_lost_adds_up_and_is_what_numpy_says(ladder, part):
    x = data() if part == "train" else data(1, 20)
    order = np.argsort(x[:, 0])
    reference = best_codes(ladder.pairs[REFERENCE], x, tolerance=1e-7).log_joint
    for row in ladder.rows:
        found, model = getattr(row, part), ladder.pairs[row.stage]
        best = best_codes(model, x[order], tolerance=1e-7)
        log_joint, error, zeros = numbers(model, x[order], best.codes)
        assert found.best == pytest.approx(log_joint, abs=1e-6)
        assert found.best_zeros == pytest.approx(zeros, abs=2e-3)
        assert found.dictionary == pytest.approx(float(reference.mean()) - log_joint, abs=1e-6)
        if row.stage in AMORTIZED:
            log_joint, error, zeros = numbers(model, x, model.features(x))
            assert found.log_joint == pytest.approx(log_joint, rel=1e-9)
            assert found.zeros == pytest.approx(zeros)
            losses = best.log_joint - elbo(model.model, model.guide, x[order])
            assert found.amortization_error == pytest.approx(
                float(losses.std() / math.sqrt(len(x))), rel=1e-4
            )
            assert found.amortization == pytest.approx(found.best - found.log_joint, abs=1e-12)
            assert found.amortization > 1e-3
            assert found.lost == pytest.approx(float(reference.mean()) - log_joint, abs=1e-6)
        if (row.stage, part) != ("per-datum-svi", "train"):  # which has codes of its own
            assert found.squared_error == pytest.approx(error, rel=1e-4)


def test_free_codes_are_of_the_training_rows_alone(ladder):
    for name in ("random-atoms", REFERENCE, "per-datum-svi"):
        row = ladder.row(name)
        assert math.isnan(row.test.log_joint) and math.isnan(row.test.amortization)
        assert math.isnan(row.test.zeros) and row.test.lost == row.test.dictionary
        own = elbo(ladder.pairs[name].model, ladder.pairs[name].guide, data_in_order(ladder))
        assert row.train.log_joint == pytest.approx(float(own.mean()), rel=1e-12)
    assert ladder.row("random-atoms").train.amortization == pytest.approx(0, abs=1e-12)
    assert ladder.row(REFERENCE).train.amortization == pytest.approx(0, abs=1e-6)
    # Gradient steps do not end at zero.
    free, model = ladder.row("per-datum-svi").train, ladder.pairs["per-datum-svi"]
    x = data_in_order(ladder)
    _, error, zeros = numbers(model, x.numpy(), model.guide.loc)
    assert (free.squared_error, free.zeros) == pytest.approx((error, zeros))
    assert free.amortization > 0 and free.zeros < 0.01 < free.best_zeros


def data_in_order(ladder):
    """The training rows as the lineage has them: parted into training and validation rows."""
    parts = split(torch.as_tensor(data()), torch.as_tensor(data(1, 20)), seed=0)
    return torch.cat([parts.train, parts.val])


def test_learning_helps_a_dictionary(ladder):
    gaps = {row.stage: row.train.dictionary for row in ladder.rows}
    assert gaps[REFERENCE] == 0 and gaps["random-atoms"] == max(gaps.values())


def test_it_says_what_it_found(ladder):
    told = repr(ladder)
    assert "sparse codes of 6 columns by 9 atoms, penalty 1, noise 0.3; nats per datum" in told
    assert "40 training rows" in told and "20 held-out rows" in told
    for row in ladder.rows:
        assert f"{row.train.best:.3f}" in told and f"{row.test.best:.3f}" in told
    assert max(map(len, told.splitlines())) < 130
    best = min((ladder.row(name) for name in AMORTIZED), key=lambda row: row.test.lost)
    assert f"Of the encoders {best.stage} is the best on held-out rows" in " ".join(told.split())
    assert "no bound on log p(x) (alternating)" in " ".join(told.split())
    assert "-0.000" not in told


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (0.5, "No dictionary codes held-out rows better than that of alternating."),
        (
            -0.5,
            "On held-out rows the dictionary of mlp-encoder is better than that of alternating",
        ),
        (-0.15, "On held-out rows the dictionaries of mlp-encoder and alternating cannot be told"),
    ],
)
def test_it_says_which_dictionary_is_the_best_whichever_it_is(ladder, gap, expected):
    row = ladder.row("mlp-encoder")
    test = dataclasses.replace(row.test, dictionary=gap, dictionary_error=0.1)
    moved = dataclasses.replace(row, test=test)
    told = dataclasses.replace(ladder, rows=(ladder.row(REFERENCE), moved)).sentences()[0]
    assert told.startswith(expected)
    assert (f"{-gap:.3f} ± 0.100" in told) is (gap < 0)


def test_it_goes_to_json_and_to_a_frame(ladder):
    content = json.loads(json.dumps(ladder.to_dict(), allow_nan=False))
    again = SparseLineage.from_dict(content)
    assert repr(again) == repr(ladder) and again.pairs == {}
    frame = ladder.to_frame()
    assert list(frame.index) == list(SPARSE_STAGES)
    assert frame.loc["mlp-encoder", "test_best"] == ladder.row("mlp-encoder").test.best
    assert frame.loc["mlp-encoder", "steps"] == 40


def test_it_repeats_and_leaves_generators_as_they_were():
    before = torch.get_rng_state()
    how = HOW | {"settings": dataclasses.replace(SETTINGS, steps=5, iterations=5)}
    stages = ["linear-encoder"]
    first, second = (run_sparse_lineage(data(), stages=stages, **how, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert [row.stage for row in first.rows] == [REFERENCE, *stages]
    assert first.row(*stages).train == second.row(*stages).train
    other = run_sparse_lineage(data(), stages=stages, **how, seed=4)
    assert first.row(*stages).train != other.row(*stages).train
    assert (first.about["num_train"], first.about["num_test"]) == (33, 7)


def test_without_encoders_there_is_no_word_of_them():
    how = HOW | {"settings": dataclasses.replace(SETTINGS, iterations=5)}
    found = run_sparse_lineage(data(), stages=["random-atoms"], **how)
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
def test_bad_arguments_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        run_sparse_lineage(data(), **(HOW | arguments))


def test_holes_are_refused():
    x = data()
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match="x has 1 missing entries, and dictionary learning"):
        run_sparse_lineage(x, **HOW)


# Pictures


def coded_rows(ladder):
    return [coded for row in ladder.rows for coded in (row.train, row.test)]


def test_the_bars_are_what_is_lost(ladder):
    ax = dictionary_plots.plot_sparse_lineage(ladder)
    check_texts(ax.figure)
    assert "nats per datum" in ax.get_xlabel()
    bars = [patch for patch in ax.patches if abs(patch.get_width()) > 0]
    widths = sorted(bar.get_width() for bar in bars)
    expected = [
        value
        for coded in coded_rows(ladder)
        for value in (coded.dictionary, coded.amortization)
        if not math.isnan(value) and value != 0
    ]
    np.testing.assert_allclose(widths, sorted(expected))
    written = [text.get_text() for text in ax.texts]
    for text, coded in zip(written[4:], coded_rows(ladder)[4:], strict=True):
        assert text == f"{coded.lost:.2f}"
    assert written[2:4] == ["0", "0"]
    plt.close(ax.figure)


def test_bars_of_what_was_not_fitted_are_cut_and_better_dictionaries_are_left_of_zero(ladder):
    def with_gap(name, gap):
        row = ladder.row(name)
        parts = {
            part: dataclasses.replace(getattr(row, part), dictionary=gap)
            for part in ("train", "test")
        }
        return dataclasses.replace(row, **parts)

    rows = (with_gap("random-atoms", 500.0), ladder.row(REFERENCE), with_gap("mlp-encoder", -0.7))
    ax = dictionary_plots.plot_sparse_lineage(dataclasses.replace(ladder, rows=rows))
    check_texts(ax.figure)
    assert [text.get_text() for text in ax.texts][:2] == ["500.00 (cut)"] * 2
    low, high = ax.get_xlim()
    assert low < -0.7 and high < 100
    assert any(patch.get_width() == -0.7 for patch in ax.patches)
    plt.close(ax.figure)


@pytest.mark.parametrize(("number", "shape"), [(9, (2, 3)), (23, (3, 2)), (9, None), (40, None)])
def test_atoms_are_drawn_in_order(number, shape):
    values = torch.randn(number, D, generator=torch.Generator().manual_seed(0)).double()
    use = torch.linspace(1, 0, number).double()
    found = Atoms(values, use, use, torch.arange(number))
    ax = dictionary_plots.atoms(found, image_shape=shape, across=5)
    check_texts(ax.figure)
    drawn = np.ma.filled(ax.images[0].get_array(), np.nan)
    if shape is None:
        np.testing.assert_array_equal(drawn, values)
    else:
        high, wide = shape
        first = drawn[:high, wide + 1 : 2 * wide + 1]  # the second atom
        np.testing.assert_array_equal(first, values[1].reshape(shape))
        assert np.isnan(drawn[high]).all() and np.isnan(drawn[:, wide]).all()
    low, high = ax.images[0].get_clim()
    assert low == -high
    plt.close(ax.figure)


def test_atoms_of_a_rung_are_drawn_where_one_wants_them(ladder):
    ax = plt.figure().add_subplot()
    found = atoms(ladder.pairs[REFERENCE], data())
    assert dictionary_plots.atoms(found, ax, image_shape=(2, 3)) is ax
    assert dictionary_plots.plot_sparse_lineage(ladder, plt.figure().add_subplot()) is not ax
    plt.close("all")
