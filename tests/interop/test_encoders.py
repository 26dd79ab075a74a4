"""scikit-learn estimators from encoders: its own checks, agreement with pairs, and errors."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ppl_vae import PPCA, VAE, Autoencoder, fit_svi
from ppl_vae.interop import EncoderClassifier, FeatureTransformer
from ppl_vae.models import SupervisedEncoder

N, D, K = 80, 6, 3


@parametrize_with_checks([FeatureTransformer(epochs=1)])
def test_all_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.slow  # the classifier shares its input and output with the transformer
@parametrize_with_checks([EncoderClassifier(epochs=8, batch_size=100, lr=0.02)])
def test_all_checks_of_scikit_learn_of_the_classifier(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([FeatureTransformer(), EncoderClassifier()])
def test_all_checks_of_scikit_learn_with_default_arguments(estimator, check):
    check(estimator)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(N, D)) + 3


@pytest.fixture
def y(x):
    return np.where(x[:, 0] + x[:, 1] > 6, "large", "small")


@pytest.fixture
def incomplete(x):
    missing = np.random.default_rng(1).random(x.shape) < 0.2
    missing[:, 0] = False
    return np.where(missing, np.nan, x)


def fitted(x, missing="zeros"):
    pair = Autoencoder.mlp(D, K, hidden=(8,), missing=missing, seed=0).double()
    fit_svi(pair.model, pair.guide, x, steps=20, lr=0.01, seed=0)
    return pair


def vae(data_dim, seed):
    return VAE.mlp(data_dim, K, hidden=(5,), seed=seed)


def state(pair):
    return {name: value.clone() for name, value in pair.state_dict().items()}


# Agreement with pairs


def test_a_fitted_pair_is_not_trained_again(x):
    pair = fitted(x)
    before = state(pair)
    transformer = FeatureTransformer(pair).fit(x[:2])
    assert transformer.model_ is pair and transformer.fit_result_ is None
    z = transformer.transform(x)
    np.testing.assert_array_equal(z, pair.features(x))
    mean = pair.decode(torch.as_tensor(z)).mean
    np.testing.assert_array_equal(transformer.inverse_transform(z), mean)
    assert all(torch.equal(before[name], value) for name, value in state(pair).items())


def test_a_new_pair_is_fitted_as_by_fit_svi(x):
    seed = np.random.RandomState(0).randint(2**31 - 1)
    pair = vae(D, seed).double()
    fit = fit_svi(pair.model, pair.guide, x, epochs=2, batch_size=30, lr=0.01, seed=seed)
    transformer = FeatureTransformer(vae, epochs=2, batch_size=30, lr=0.01).fit(x)
    np.testing.assert_array_equal(transformer.transform(x), pair.features(x))
    assert torch.equal(transformer.fit_result_.objective, fit.objective)


def test_the_default_autoencoder_reconstructs_its_input(x):
    transformer = FeatureTransformer(n_components=D, epochs=80, lr=0.01).fit(x)
    reconstruction = transformer.inverse_transform(transformer.transform(x))
    assert ((reconstruction - x) ** 2).sum() < 0.5 * ((x - x.mean(0)) ** 2).sum()
    assert FeatureTransformer(epochs=2).fit(x).n_components_ == D
    wide = np.random.default_rng(0).normal(size=(20, 30))
    assert FeatureTransformer(epochs=2).fit(wide).n_components_ == 8


def test_a_classifier_agrees_with_its_network(x, y):
    pair = fitted(x)
    before = state(pair)
    for encoder in ("fine-tuned", "frozen", "scratch"):
        classifier = EncoderClassifier(pair, encoder=encoder, epochs=3, batch_size=40).fit(x, y)
        seed = np.random.RandomState(0).randint(2**31 - 1)
        network = SupervisedEncoder(
            pair, classifier.network_.likelihood.__class__(2), encoder=encoder, seed=seed
        )
        rows = network.rows(x, y == "small")
        fit_svi(network.model, network.guide, rows, epochs=3, batch_size=40, lr=3e-3, seed=seed)
        expected = network.predict(x).base_dist.probs[:, 0].numpy()
        np.testing.assert_array_equal(classifier.predict_proba(x), expected)
        predicted = np.array(["large", "small"])[expected.argmax(1)]
        np.testing.assert_array_equal(classifier.predict(x), predicted)
        assert classifier.score(x, y) == (predicted == y).mean()
    assert all(torch.equal(before[name], value) for name, value in state(pair).items())


def test_a_classifier_is_accurate_on_separable_classes(x, y):
    classifier = EncoderClassifier(vae, epochs=80, batch_size=80, lr=0.03).fit(x, y)
    assert classifier.classes_.tolist() == ["large", "small"]
    assert classifier.score(x, y) > 0.9


# Types of input


@pytest.mark.parametrize("model", [None, "pair"])
def test_missing_values(x, y, incomplete, model):
    model = model and fitted(incomplete, missing="zeros+mask")
    transformer = FeatureTransformer(model, epochs=2).fit(incomplete)
    z = transformer.transform(incomplete)
    np.testing.assert_array_equal(z, transformer.model_.features(incomplete))
    assert np.isfinite(z).all() and not np.array_equal(z, transformer.transform(x))
    assert transformer.model_.guide.missing == "zeros+mask"
    classifier = EncoderClassifier(model, epochs=2).fit(incomplete, y)
    assert np.isfinite(classifier.predict_proba(incomplete)).all()


def test_data_frames_are_supported(x, y):
    frame = pd.DataFrame(x, columns=list("abcdef"), index=range(5, N + 5))
    transformer = FeatureTransformer(n_components=2, epochs=2).set_output(transform="pandas")
    found = transformer.fit_transform(frame)
    assert list(found.columns) == ["featuretransformer0", "featuretransformer1"]
    assert list(found.index) == list(frame.index)
    assert list(transformer.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        transformer.transform(frame[list("fedcba")])
    EncoderClassifier(epochs=2).fit(frame, y).predict(frame)


def test_float32_is_preserved(x, y):
    single = x.astype(np.float32)
    for model in (None, vae):
        transformer = FeatureTransformer(model, epochs=2).fit(single)
        z = transformer.transform(single)
        assert z.dtype == transformer.inverse_transform(z).dtype == np.float32
        assert next(transformer.model_.parameters()).dtype == torch.float32
    pair = fitted(x)  # whose float64 parameters are kept
    assert FeatureTransformer(pair).fit(single).transform(single).dtype == np.float32
    assert next(pair.parameters()).dtype == torch.float64
    assert EncoderClassifier(epochs=2).fit(single, y).predict_proba(single).dtype == np.float32


# Searches, clones and pickles


@pytest.mark.slow
def test_grid_search_over_sizes_and_pairs(x, y):
    pipe = make_pipeline(
        StandardScaler(), FeatureTransformer(epochs=15, lr=0.02), LogisticRegression()
    )
    search = GridSearchCV(pipe, {"featuretransformer__n_components": [1, 4]}, cv=2).fit(x, y)
    assert search.best_params_ == {"featuretransformer__n_components": 4}
    pairs = {"model": [fitted(x), vae], "encoder": ["fine-tuned", "frozen"]}
    search = GridSearchCV(EncoderClassifier(epochs=2), pairs, cv=2, scoring="neg_log_loss")
    assert np.isfinite(search.fit(x, y).cv_results_["mean_test_score"]).all()


def test_clones_and_pickles_give_the_same_results(x, y):
    for estimator in (FeatureTransformer(fitted(x)), EncoderClassifier(fitted(x), epochs=2)):
        method = "transform" if isinstance(estimator, FeatureTransformer) else "predict_proba"
        expected = getattr(estimator.fit(x, y), method)(x)
        copied = clone(estimator)
        assert copied.model is not estimator.model
        np.testing.assert_array_equal(getattr(copied.fit(x, y), method)(x), expected)
        again = pickle.loads(pickle.dumps(estimator))
        np.testing.assert_array_equal(getattr(again, method)(x), expected)


def test_fits_are_reproducible_and_leave_global_generators_unchanged(x, y):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for make in (lambda: FeatureTransformer(vae, epochs=2), lambda: EncoderClassifier(epochs=2)):
        one, two = make().fit(x, y), make().fit(x, y)
        assert torch.equal(one.fit_result_.objective, two.fit_result_.objective)
        other = make().set_params(random_state=1).fit(x, y)
        assert not torch.equal(one.fit_result_.objective, other.fit_result_.objective)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


# Errors


def test_bad_arguments(x, y):
    for arguments, match in (
        (
            {"model": vae, "n_components": 2},
            r"n_components= is for model=None; .*search over model",
        ),
        ({"n_components": 0}, "n_components must be a whole number >= 1; got 0"),
        (
            {"model": lambda width, seed: vae(D + 1, seed)},
            "X has 6 columns, but the pair has data_dim=7",
        ),
        ({"model": vae(5, 0)}, "X has 6 columns, but the pair has data_dim=5"),
        ({"epochs": 0}, "epochs must be a whole number >= 1; got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1; got 0"),
        ({"lr": 0.0}, r"must be positive; got lr=0\.0"),
    ):
        with pytest.raises(ValueError, match=match):
            FeatureTransformer(**arguments).fit(x)
    for model in ("vae", lambda width, seed: PPCA(width, 2)):
        with pytest.raises(
            TypeError, match=r"model must be a pair .*of \(data_dim, seed\) that returns one"
        ):
            FeatureTransformer(model).fit(x)
    with pytest.raises(ValueError, match="encoder must be one of 'fine-tuned', 'frozen', 's"):
        EncoderClassifier(encoder="new").fit(x, y)
    with pytest.raises(ValueError, match="at least two classes; it has one class"):
        EncoderClassifier().fit(x, np.ones(N))


def test_bad_data(x, y):
    empty = np.where(np.arange(N)[:, None] == 3, np.nan, x)
    transformer = FeatureTransformer(n_components=2, epochs=2).fit(x)
    classifier = EncoderClassifier(epochs=2).fit(x, y)
    for call in (
        lambda: classifier.predict(empty),
        lambda: EncoderClassifier(epochs=2).fit(empty, y),
    ):
        with pytest.raises(ValueError, match=r"rows with nothing observed: \[3\]; drop them"):
            call()
    with pytest.raises(ValueError, match=r"must have n_components_=2 columns.*it has 3"):
        transformer.inverse_transform(np.zeros((4, 3)))
    for estimator in (FeatureTransformer(), FeatureTransformer(vae(D, 0))):
        with pytest.raises(NotFittedError):
            estimator.transform(x)
