"""Label efficiency: equal rows and steps for all methods, Student intervals, and the verdict."""

import copy
import dataclasses
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from figures import assert_texts_are_readable
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss

from ppl_vae import VAE, Autoencoder, Categorical, digits, fit_svi
from ppl_vae.evaluation import LabelEfficiency, label_efficiency
from ppl_vae.evaluation.prediction.label_efficiency import PairedDifference, draw_labels
from ppl_vae.models import SupervisedEncoder
from ppl_vae.networks import GaussianNoise
from ppl_vae.plots import label_efficiency as label_plots

N, D, K, C = 90, 6, 4, 3
NAMES = np.array(["a", "b", "c"])
METHODS = ("fine-tuned", "frozen", "scratch")


def table(seed=0):
    """Three clusters and their class names."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, N)
    return rng.normal(size=(N, D)) + 1.5 * np.eye(C, D)[y], NAMES[y]


@pytest.fixture(scope="module")
def pair():
    x = torch.as_tensor(table()[0])
    made = Autoencoder.mlp(D, K, hidden=(8,), corruption=GaussianNoise(0.3), seed=0).double()
    fit_svi(made.model, made.guide, x, steps=30, lr=0.01, seed=0)
    return made


@pytest.fixture(scope="module")
def found(pair):
    return label_efficiency(
        pair, *table(), *table(1), num_labels=9, seeds=range(3), steps=15, lr=0.02
    )


@pytest.mark.slow
def test_scores_agree_with_separate_fits(found, pair):
    (x, y), (x_test, y_test) = table(), table(1)
    codes = torch.as_tensor(np.searchsorted(NAMES, y))
    for draw, seed in enumerate(found.seeds):
        rows = draw_labels(codes, 9, seed).numpy()
        probabilities = {}
        for encoder in ("fine-tuned", "frozen", "scratch"):
            made = SupervisedEncoder(pair, Categorical(C), encoder=encoder, seed=seed)
            labelled = made.rows(x[rows], codes[rows])
            fit_svi(made.model, made.guide, labelled, steps=15, lr=0.02, seed=seed)
            probabilities[encoder] = made.predict(x_test).base_dist.probs[:, 0].numpy()
        linear = LogisticRegression(max_iter=10_000).fit(x[rows], y[rows])
        probabilities["logistic regression"] = linear.predict_proba(x_test)
        assert set(found.methods) == set(probabilities)
        for place, method in enumerate(found.methods):
            predicted = NAMES[probabilities[method].argmax(1)]
            accuracy = accuracy_score(y_test, predicted)
            assert found.accuracy[place, draw] == pytest.approx(accuracy)
            loss = log_loss(y_test, probabilities[method])
            assert found.log_loss[place, draw] == pytest.approx(loss, abs=1e-9)


def test_labels_are_drawn_in_proportion_to_classes():
    classes = torch.as_tensor(np.repeat([0, 1, 2], [700, 250, 50]))
    rows = draw_labels(classes, 20, 0)
    assert torch.bincount(classes[rows]).tolist() == [14, 5, 1]
    assert len(set(rows.tolist())) == 20
    assert torch.equal(rows, draw_labels(classes, 20, 0))
    assert not torch.equal(rows, draw_labels(classes, 20, 1))
    assert torch.bincount(classes[draw_labels(classes, 3, 0)]).tolist() == [1, 1, 1]
    assert sorted(draw_labels(classes, 1000, 0).tolist()) == list(range(1000))


def test_intervals_agree_with_a_t_test():
    values = torch.as_tensor(np.random.default_rng(0).normal(0.3, 1, 10))
    made = PairedDifference.of(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (made.mean, made.low, made.high) == pytest.approx((float(values.mean()), *expected))
    assert PairedDifference(1, 0.1, 2).sign == 1
    assert PairedDifference(-1, -2, -0.1).sign == -1
    assert PairedDifference(0, -1, 1).sign == 0


def shifted(found, points):
    """The same result with the accuracy of fine-tuning shifted by ``points``."""
    accuracy = found.accuracy.clone()
    accuracy[found.methods.index("fine-tuned")] = (
        accuracy[found.methods.index("scratch")] + points + torch.tensor([-0.01, 0.0, 0.01])
    )
    return dataclasses.replace(found, accuracy=accuracy)


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        (
            0.1,
            r"\+10.00 percentage points .*\(95% interval \+7.52 to \+12.48\): fine-tuning is more",
        ),
        (
            -0.1,
            r"-10.00 percentage points \(95% interval -12.48 to -7.52\): training from scratch",
        ),
        (
            0.0,
            r"\+0.00 percentage points \(95% interval -2.48 to \+2.48\): no significant diff",
        ),
    ],
)
def test_the_verdict_states_the_significant_difference(found, points, sentence):
    assert re.search(sentence, shifted(found, points).verdict)


def test_the_printed_table(found):
    text = repr(found)
    assert "3 draws of 9 labels of 3 classes, scored on 90 held-out rows" in text
    for place, method in enumerate(found.methods):
        line = next(line for line in text.splitlines() if line.startswith(f"{method} "))
        mean, sd = 100 * found.accuracy[place].mean(), 100 * found.accuracy[place].std()
        assert f"{mean:.1f} ± {sd:.1f}" in line
        assert f"{found.log_loss[place].mean():.3f} ± " in line
        nats = found.difference(method, metric="log_loss")
        assert (f"{nats.mean:+.3f} ({nats.low:+.3f} to" in line) == (method != "scratch")
    best = found.methods[int(found.accuracy.mean(1).argmax())]
    assert f"Most accurate: {best}, {100 * found.accuracy.mean(1).max():.1f} %." in text
    assert text.endswith(found.verdict) and "nats per datum" in text
    frame = found.to_frame()
    assert list(frame.columns) == ["method", "seed", "accuracy", "log_loss"]
    assert len(frame) == 12
    for row in frame.itertuples():
        assert row.accuracy == found.accuracy[found.methods.index(row.method), row.seed]


def test_it_can_be_stored(found):
    again = LabelEfficiency.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert repr(again) == repr(found) and torch.equal(again.accuracy, found.accuracy)


def test_results_are_reproducible_and_pair_and_generators_are_unchanged(found, pair):
    state, generator = copy.deepcopy(pair.state_dict()), torch.get_rng_state()
    again = label_efficiency(
        pair, *table(), *table(1), num_labels=9, seeds=(0, 2), steps=15, lr=0.02
    )
    assert torch.equal(again.accuracy, found.accuracy[:, [0, 2]])
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(state[name], value) for name, value in pair.state_dict().items())


def test_an_untrained_encoder_equals_one_from_scratch_up_to_its_initial_weights():
    """With negligible training, fine-tuning equals freezing, but not another initialisation."""
    made = Autoencoder.mlp(D, K, hidden=(8,), seed=5).double()
    result = label_efficiency(
        made, *table(), *table(1), num_labels=9, seeds=(0, 1), steps=1, lr=1e-9
    )
    difference = result.accuracy[1] - result.accuracy[0]
    assert torch.equal(result.accuracy[1], result.accuracy[2])  # hardly trained, as if frozen
    assert float(difference.abs().max()) > 0


def test_missing_values_and_a_vae():
    x, y = table()
    x[np.random.default_rng(0).random(x.shape) < 0.2] = np.nan
    x = x[kept := (~np.isnan(x)).any(1)]
    vae = VAE.mlp(D, K, hidden=(8,), missing="zeros+mask", seed=0).double()
    result = label_efficiency(vae, x, y[kept], *table(1), num_labels=6, seeds=(0, 1), steps=5)
    assert result.methods == ("scratch", "fine-tuned", "frozen")
    assert "note: x has missing values, which logistic regression does not support; it" in repr(
        result
    )


def test_bad_arguments(pair, found):
    good = (*table(), *table(1))
    for arguments, match in (
        ({"num_labels": 2}, "at least the number of classes, 3, and at most .*, 90; got 2"),
        ({"num_labels": 91}, "got 91"),
        ({"seeds": [1]}, r"at least two seeds; got \(1,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            label_efficiency(pair, *good, **arguments)
    x, y = table()
    with pytest.raises(ValueError, match=r"y_test has classes that are not in y: \['d'\]"):
        label_efficiency(pair, x, y, x, np.where(y == "a", "d", y))
    with pytest.raises(ValueError, match="at least two classes; it has one"):
        label_efficiency(pair, x, np.zeros(N), x, np.zeros(N))
    with pytest.raises(
        ValueError, match=r"one class per row, \(90, 90\); their shapes: .*\(80,\)"
    ):
        label_efficiency(pair, x, y[:80], x, y)
    with pytest.raises(ValueError, match=r"method must be one of 'scratch'.*got 'tuned'"):
        found.difference("tuned")
    with pytest.raises(ValueError, match="metric must be one of 'accuracy', 'log_loss'"):
        found.difference("frozen", metric="loss")


@pytest.mark.slow
def test_fifty_labels_of_digits():
    """The comparison is printed; only that every method beats chance is asserted."""
    x, y = torch.as_tensor(digits(), dtype=torch.float32), load_digits().target
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    for name, corruption in (("autoencoder", None), ("denoising", GaussianNoise(0.3))):
        made = Autoencoder.mlp(64, 32, hidden=(128,), corruption=corruption, seed=0)
        fit_svi(
            made.center(x[:1200]).model,
            made.guide,
            x[:1200],
            x_val=x[1200:1297],
            epochs=200,
            batch_size=100,
            lr=2e-3,
            seed=0,
        )
        result = label_efficiency(made, x[:1200], y[:1200], x[1297:], y[1297:], num_labels=50)
        print(f"\n{name}\n{result}")
        assert result.accuracy.shape == (4, 10)
        # Guessing is correct for a tenth of the rows.
        assert float(result.accuracy.min()) > 0.4
        assert float(result.log_loss.mean(1).max()) < np.log(10)


# The plot


def test_the_plot_is_readable_and_shows_every_draw(found):
    stored = LabelEfficiency.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    figure = label_plots.plot_label_efficiency(stored)
    assert_texts_are_readable(figure)
    left, right = figure.axes
    assert left.get_ylabel().endswith("%")
    assert right.get_xlabel().endswith("percentage points")
    *draws, means = left.lines
    for draw, line in enumerate(draws):
        np.testing.assert_allclose(line.get_ydata(), 100 * found.accuracy[:, draw])
    np.testing.assert_allclose(means.get_ydata(), 100 * found.accuracy.mean(1))
    for bars, method in zip(
        right.containers, ("fine-tuned", "frozen", "logistic regression"), strict=True
    ):
        ((start, end),) = bars.lines[2][0].get_segments()
        mean = found.difference(method)
        np.testing.assert_allclose((start[0], end[0]), (100 * mean.low, 100 * mean.high))
    plt.close(figure)


@pytest.mark.parametrize("draw", [label_plots.plot_accuracy, label_plots.plot_accuracy_gain])
def test_each_is_drawn_alone(found, draw):
    axes = draw(found)
    assert_texts_are_readable(axes.figure)
    plt.close(axes.figure)


def test_a_masked_autoencoder_is_fine_tuned_on_whole_images():
    x, y = table()
    pair = Autoencoder.masked((1, 2, 3), (1, 1), width=4, depth=1, heads=2, seed=0).double()
    found = label_efficiency(
        pair, x, y, *table(1), num_labels=9, seeds=range(2), steps=15, lr=0.02
    )
    assert bool(found.accuracy.isfinite().all())
    made = {
        name: SupervisedEncoder(pair, Categorical(C), encoder=name, seed=0) for name in METHODS
    }
    rows = torch.as_tensor(x)
    codes = [made[name].code_guide.distribution(rows).mean for name in METHODS]
    torch.testing.assert_close(codes[0], pair.features(rows))
    torch.testing.assert_close(codes[1], codes[0])
    assert not torch.allclose(codes[0], codes[2])
    positions = [made[name].code_guide.encoder.positions for name in ("fine-tuned", "scratch")]
    assert not torch.equal(*positions)
