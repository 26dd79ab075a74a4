"""Embeddings: codes, errors and nearest neighbours against numpy."""

import dataclasses
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.decomposition import PCA

import oracles
from figures import assert_texts_are_readable
from ppl_vae import PPCA, VAE, Autoencoder, ExactGuide, fit_closed_form
from ppl_vae.evaluation import Embeddings, compare_embeddings
from ppl_vae.plots import latent_spaces as latent_plots

N, D = 60, 5


@pytest.fixture(scope="module")
def table():
    x = oracles.simulate_ppca((16, 9), 0.5, 2 * N, D, seed=0)
    return x, np.where(PCA(2).fit_transform(x)[:, 0] > 0, "right", "left")


@pytest.fixture(scope="module")
def found(table):
    x, y = table
    ppca = PPCA.like(x[:N], 2)
    fit_closed_form(ppca, x[:N])
    vae, linear = VAE.mlp(D, 2, seed=0).double(), Autoencoder.linear(D, 2, seed=0).double()
    pairs = {
        "PPCA": (ppca.model, ExactGuide(ppca)),
        "VAE": (vae.model, vae.guide),
        "linear autoencoder": (linear.model, linear.guide),
    }
    return ppca, linear, compare_embeddings(pairs, x[:N], y[:N], x[N:], y[N:], neighbours=3)


def predicted_classes(train_codes, classes, codes, number):
    """The majority class of the nearest neighbours, by sorting all distances."""
    predicted = []
    for code in codes:
        near = np.argsort(((train_codes - code) ** 2).sum(1), kind="stable")[:number]
        names, counts = np.unique(classes[near], return_counts=True)
        predicted.append(names[counts.argmax()])
    return np.array(predicted)


def test_codes_errors_and_accuracies_agree_with_numpy(found, table):
    (x, y), (ppca, linear, result) = table, found
    first, _, last = result.embeddings
    np.testing.assert_allclose(first.codes, ppca.posterior_mean(x[N:]).detach(), atol=1e-12)
    back = ppca.reconstruct(x[N:]).detach().numpy()
    np.testing.assert_allclose(first.error, ((x[N:] - back) ** 2).sum(1))
    np.testing.assert_allclose(last.codes, linear.features(x[N:]))
    for each, train_codes in (
        (first, ppca.posterior_mean(x[:N]).detach()),
        (last, linear.features(x[:N])),
    ):
        predicted = predicted_classes(train_codes.numpy(), y[:N], each.codes.numpy(), 3)
        np.testing.assert_array_equal(each.correct.numpy() == 1, predicted == y[N:])
    assert first.accuracy[0] > 0.9
    mean, error = first.mean_squared_error
    assert mean == pytest.approx(float(first.error.mean()))
    assert error == pytest.approx(float(first.error.std()) / np.sqrt(N))


def test_the_printed_table_and_storage(found):
    result = found[2]
    text = repr(result)
    assert text.startswith("60 held-out rows, ± one standard error")
    for each in result.embeddings:
        line = next(line for line in text.splitlines() if line.startswith(f"{each.name} "))
        assert "{:.3f} ± {:.3f}".format(*each.mean_squared_error) in line
        assert f"{100 * each.accuracy[0]:.1f} ± " in line
    assert list(result.to_frame().index) == ["PPCA", "VAE", "linear autoencoder"]
    assert result.to_frame().loc["VAE", "accuracy"] == result.embeddings[1].accuracy[0]
    stored = Embeddings.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert repr(stored) == text


def test_bad_arguments(table):
    x, y = table
    vae = VAE.mlp(D, 3, seed=0).double()
    pairs = {"wide": (vae.model, vae.guide)}
    with pytest.raises(ValueError, match="wide has 3 latent dimensions; an embedding has two"):
        compare_embeddings(pairs, x, y, x, y)
    with pytest.raises(ValueError, match="give at least one pair"):
        compare_embeddings({}, x, y, x, y)
    with pytest.raises(
        ValueError, match="must have 120 and 120 entries, one per row; they have 3 and"
    ):
        compare_embeddings(pairs, x, y[:3], x, y)
    with pytest.raises(ValueError, match="neighbours must be a whole number >= 1; got 0"):
        compare_embeddings(pairs, x, y, x, y, neighbours=0)


# The plot


def test_the_plot_is_readable_and_shows_the_stored_values(found):
    for number in (1, 2, 3):
        part = dataclasses.replace(found[2], embeddings=found[2].embeddings[:number])
        stored = Embeddings.from_dict(json.loads(json.dumps(part.to_dict(), allow_nan=False)))
        figure = latent_plots.plot_embeddings(stored)
        assert_texts_are_readable(figure)
        assert len(figure.axes) == number and len(figure.legends) == 1
        for ax, each in zip(figure.axes, found[2].embeddings, strict=False):
            across, error, named = ax.get_xlabel().splitlines()
            assert across == "$z_1$, units of the code"
            assert error == "squared error {:.3f} ± {:.3f} per datum".format(
                *each.mean_squared_error
            )
            accuracy = f"{100 * each.accuracy[0]:.1f} ± "
            assert named.startswith(f"accuracy of 3 neighbours {accuracy}")
            assert named.endswith(" %")
            points = np.concatenate([c.get_offsets() for c in ax.collections])
            order = np.argsort(np.array(found[2].labels), kind="stable")
            np.testing.assert_allclose(points, each.codes.numpy()[order])
        plt.close(figure)


def test_one_latent_space_is_drawn_on_given_axes(found):
    figure, ax = plt.subplots(figsize=latent_plots.PANEL_SIZE, layout="constrained")
    assert latent_plots.plot_embedding(found[2].embeddings[0], found[2].labels, 3, ax) is ax
    assert_texts_are_readable(figure)
    plt.close(figure)
