"""PPCATransformer: scikit-learn's checks, agreement with its estimators and with PPCA."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import oracles
from ppl_vae import PPCA, PPCATransformer, fit_closed_form, fit_em

SPECTRUM, NOISE, D, K = (9.0, 4.0, 2.5), 0.8, 7, 3
NOISES = ("isotropic", "diagonal")


@parametrize_with_checks([PPCATransformer(), PPCATransformer(noise="diagonal")])
def test_all_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture
def x():
    return oracles.simulate_ppca(SPECTRUM, NOISE, 60, D, seed=0)


@pytest.fixture
def incomplete(x):
    return oracles.with_missing_values(x, 0.2, seed=1)


def factors(N=400, seed=0):
    """Two factors, and a noise variance for each column."""
    rng = np.random.default_rng(seed)
    z, W = rng.normal(size=(N, 2)), rng.normal(size=(2, D))
    return z @ W + rng.normal(size=(N, D)) * rng.uniform(0.5, 1.5, D) + 3


def start(x, latent_dim=K, noise="isotropic"):
    """The default initial model of PX-EM in the transformer."""
    seed = np.random.RandomState(0).randint(2**31 - 1)
    return PPCA.like(x, latent_dim, noise=noise, seed=seed)


def assert_agrees(transformer, ppca, x, tol=1e-10):
    """All results of the transformer agree with those of the model."""
    ppca = ppca.canonical()
    with torch.no_grad():
        expected = {
            "components_": ppca.loadings.mT,
            "mean_": ppca.loc,
            "noise_variance_": ppca.noise_scale.square(),
            "transform": ppca.posterior(x).mean,
            "score_samples": ppca.log_likelihood(x),
            "get_covariance": ppca.covariance(),
            "impute": ppca.impute(x).mean,
        }
    for name, value in expected.items():
        found = getattr(transformer, name)
        if callable(found):
            found = found() if name == "get_covariance" else found(x)
        np.testing.assert_allclose(found, value.detach().numpy(), rtol=tol, atol=tol, err_msg=name)


# Agreement with PPCA


def test_complete_data_with_isotropic_noise_are_fitted_in_closed_form(x):
    ppca = PPCA.like(x, K, seed=5)
    fit_closed_form(ppca, x)
    transformer = PPCATransformer(K).fit(x)
    assert_agrees(transformer, ppca, x)
    assert (transformer.n_components_, transformer.n_iter_) == (K, 1)
    assert isinstance(transformer.noise_variance_, float)


@pytest.mark.parametrize("noise", NOISES)
def test_missing_values_are_fitted_by_px_em(incomplete, noise):
    ppca = start(incomplete, noise=noise)
    fit = fit_em(ppca, incomplete, tol=1e-8)
    transformer = PPCATransformer(K, noise=noise, tol=1e-8).fit(incomplete)
    assert_agrees(transformer, ppca, incomplete)
    assert transformer.n_iter_ == fit.steps > 1


def test_diagonal_noise_is_fitted_by_px_em():
    x = factors()
    ppca = start(x, 2, "diagonal")
    fit_em(ppca, x, tol=1e-6)
    assert_agrees(PPCATransformer(2, noise="diagonal").fit(x), ppca, x)


def test_one_missing_value_changes_little(x):
    one = x.copy()
    one[0, 0] = np.nan
    by_em, exact = PPCATransformer(K).fit(one), PPCATransformer(K).fit(x)
    assert by_em.score(x) == pytest.approx(exact.score(x), abs=0.01)
    assert by_em.score(x) <= exact.score(x)


def test_the_transform_of_a_row_with_missing_values_is_the_exact_posterior_mean(x, incomplete):
    transformer = PPCATransformer(K).fit(x)
    W, noise = transformer.components_.T, transformer.noise_variance_
    found = transformer.transform(incomplete)
    for row, mean in zip(incomplete, found, strict=True):
        observed = ~np.isnan(row)
        w = W[observed]
        C = w @ w.T + noise * np.eye(observed.sum())
        expected = w.T @ np.linalg.solve(C, row[observed] - transformer.mean_[observed])
        np.testing.assert_allclose(mean, expected, rtol=1e-9, atol=1e-9)


def test_missing_values_are_imputed_and_observed_values_unchanged(x, incomplete):
    imputed = PPCATransformer(K).fit(incomplete).impute(incomplete)
    observed = ~np.isnan(incomplete)
    np.testing.assert_array_equal(imputed[observed], incomplete[observed])
    error = (imputed - x)[~observed].std()
    assert error < 0.9 * (np.broadcast_to(x.mean(0), x.shape) - x)[~observed].std()


def test_draws_have_the_covariance_of_the_model(x):
    transformer = PPCATransformer(K).fit(x)
    draws = transformer.sample(20_000, random_state=0)
    white = np.linalg.solve(
        np.linalg.cholesky(transformer.get_covariance()), (draws - draws.mean(0)).T
    )
    assert np.abs(np.cov(white) - np.eye(D)).max() < oracles.z_limit(D * D) * (2 / 20_000) ** 0.5
    np.testing.assert_array_equal(draws, transformer.sample(20_000, random_state=0))
    assert transformer.sample().shape == (1, D)


# Agreement with scikit-learn's estimators


def test_several_starts_of_px_em(incomplete):
    several = PPCATransformer(2, noise="diagonal", n_init=3).fit(incomplete)
    assert any("3 starts end" in note for note in several.notes_)
    one = PPCATransformer(2, noise="diagonal").fit(incomplete)
    assert several.score(incomplete) >= one.score(incomplete) - 1e-6
    with pytest.raises(ValueError, match="n_init must be a whole number >= 1"):
        PPCATransformer(2, n_init=0).fit(incomplete)


def test_it_agrees_with_pca(x):
    """The noise variance of PCA has the denominator N - 1; otherwise the maxima are the same."""
    N = len(x)
    pca, ours = PCA(K, svd_solver="full").fit(x), PPCATransformer(K).fit(x)
    assert ours.noise_variance_ * N / (N - 1) == pytest.approx(pca.noise_variance_, rel=1e-10)
    np.testing.assert_allclose(ours.mean_, pca.mean_, rtol=1e-10)
    lengths = np.linalg.norm(ours.components_, axis=1, keepdims=True)
    cosines = ours.components_ / lengths @ pca.components_.T
    np.testing.assert_allclose(np.abs(cosines), np.eye(K), atol=1e-10)
    np.testing.assert_allclose(
        ours.get_covariance() * N / (N - 1), pca.get_covariance(), rtol=1e-9, atol=1e-12
    )
    # The codes are the scores of PCA, shrunk.
    values = lengths[:, 0] ** 2 + ours.noise_variance_
    shrunk = pca.transform(x) * lengths[:, 0] / values * np.sign(np.diag(cosines))
    np.testing.assert_allclose(ours.transform(x), shrunk, rtol=1e-9, atol=1e-10)
    # With PCA's covariance C N / (N - 1) the quadratic form shrinks, and log det grows.
    quadratic = -2 * ours.score_samples(x) - D * np.log(2 * np.pi)
    log_det = np.linalg.slogdet(ours.get_covariance())[1]
    ratio = N / (N - 1)
    theirs = (quadratic - log_det) / ratio + log_det + D * np.log(ratio) + D * np.log(2 * np.pi)
    np.testing.assert_allclose(pca.score_samples(x), -theirs / 2, rtol=1e-9)


def test_it_agrees_with_factor_analysis():
    x = factors()
    theirs = FactorAnalysis(2, tol=1e-10, max_iter=10_000, svd_method="lapack").fit(x)
    ours = PPCATransformer(2, noise="diagonal", tol=1e-10).fit(x)
    assert ours.score(x) == pytest.approx(theirs.score(x), abs=1e-7)
    np.testing.assert_allclose(ours.score_samples(x), theirs.score_samples(x), atol=1e-3)
    np.testing.assert_allclose(ours.noise_variance_, theirs.noise_variance_, rtol=1e-3)
    np.testing.assert_allclose(ours.get_covariance(), theirs.get_covariance(), atol=1e-2)


def test_grid_search_finds_the_number_of_components():
    W = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 3)))[0] * [3, 2.5, 2]
    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, 3)) @ W.T + 0.5 * rng.normal(size=(300, 8))
    folds = KFold(5, shuffle=True, random_state=0)
    search = GridSearchCV(PPCATransformer(), {"n_components": range(1, 8)}, cv=folds).fit(x)
    assert search.best_params_ == {"n_components": 3}
    held_out = [PPCATransformer(3).fit(x[fit]).score(x[test]) for fit, test in folds.split(x)]
    assert search.best_score_ == pytest.approx(np.mean(held_out), abs=1e-12)


def test_in_a_pipeline(incomplete):
    y = (np.nan_to_num(incomplete).sum(1) > np.nan_to_num(incomplete).sum(1).mean()).astype(int)
    pipeline = make_pipeline(StandardScaler(), PPCATransformer(2), GaussianNB())
    search = GridSearchCV(pipeline, {"ppcatransformer__n_components": [1, 3]}, cv=3).fit(
        incomplete, y
    )
    assert search.score(incomplete, y) > 0.6
    assert set(clone(pipeline).get_params()) == set(pipeline.get_params())


# Types of input


def test_data_frames_are_supported(incomplete):
    frame = pd.DataFrame(incomplete, columns=list("abcdefg"), index=range(10, 70))
    transformer = PPCATransformer(K).set_output(transform="pandas").fit(frame)
    found = transformer.transform(frame)
    names = [f"ppcatransformer{k}" for k in range(K)]
    assert list(transformer.get_feature_names_out()) == names == list(found.columns)
    assert list(transformer.feature_names_in_) == list("abcdefg")
    assert list(found.index) == list(frame.index)
    plain = PPCATransformer(K).fit(incomplete)
    np.testing.assert_array_equal(found.to_numpy(), plain.transform(incomplete))
    assert transformer.inverse_transform(found).shape == frame.shape
    with pytest.raises(ValueError, match="feature names should match"):
        transformer.transform(frame[list("gfedcba")])


def test_nullable_columns_and_integers_are_supported(x):
    frame = pd.DataFrame(np.round(10 * x).astype(int)).astype("Int64")
    transformer = PPCATransformer(K).fit(frame)
    assert_agrees(transformer, PPCATransformer(K).fit(np.round(10 * x)).model_, np.round(10 * x))
    frame.iloc[0, 0] = pd.NA
    assert np.isfinite(transformer.transform(frame)).all()


def test_float32_is_preserved_except_for_sums_and_parameters(x):
    single = x.astype(np.float32)
    transformer = PPCATransformer(K).fit(single)
    z = transformer.transform(single)
    assert z.dtype == transformer.inverse_transform(z).dtype == np.float32
    assert transformer.impute(single).dtype == np.float32
    assert transformer.score_samples(single).dtype == transformer.components_.dtype == np.float64
    assert_agrees(
        PPCATransformer(K).fit(single.astype(float)), transformer.model_, single.astype(float)
    )


def test_insufficient_precision_is_warned_of():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) + np.float32(1e7)
    with pytest.warns(UserWarning, match="give x and model in float64"):
        PPCATransformer(2).fit(x)


# Small data


def small_data():
    """Data of small shapes, complete and, if there are several columns, with missing values."""
    for rows in (2, 3, 4, 8):
        for width in (1, 2, 5):
            x = np.random.default_rng(rows + 10 * width).normal(size=(rows, width)) + 1
            yield x
            for seed in range(2 if width > 1 else 0):
                yield oracles.with_missing_values(x, 0.3, seed)


@pytest.mark.parametrize(
    "noise", [pytest.param("isotropic"), pytest.param("diagonal", marks=pytest.mark.slow)]
)
def test_the_default_supports_all_shapes(noise):
    for x in small_data():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings have a test of their own
            transformer = PPCATransformer(noise=noise, max_iter=100)
            try:
                found = transformer.fit_transform(x)
            except ValueError as error:
                # A column with a single observed value is constant.
                assert noise == "diagonal" and "constant columns" in str(error)
                continue
        assert 1 <= transformer.n_components_ <= max(1, min(len(x) - 2, x.shape[1] - 1))
        assert np.isfinite(found).all() and np.isfinite(transformer.score(x))
        assert np.min(transformer.noise_variance_) > 0


@pytest.mark.parametrize(
    ("x", "components"),
    [
        (np.random.default_rng(0).normal(size=(30, 5)), 4),
        (np.random.default_rng(0).normal(size=(4, 9)), 2),
        (np.random.default_rng(0).normal(size=(30, 3)) @ np.ones((3, 6)).cumsum(1), 1),
        (np.random.default_rng(0).normal(size=(30, 4))[:, [0, 1, 2, 3, 3, 0]], 3),
        (np.random.default_rng(0).normal(size=(30, 2)), 1),
    ],
)
def test_the_default_is_one_less_than_the_rank(x, components):
    rank = np.linalg.matrix_rank(x - x.mean(0))
    assert components == max(1, rank - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if rank > 1 else "ignore")
        assert PPCATransformer().fit(x).n_components_ == components


@pytest.mark.parametrize("n_components", [None, 1])
@pytest.mark.parametrize("noise", NOISES)
def test_the_variance_of_one_column_is_halved(n_components, noise):
    x = np.random.default_rng(0).normal(2, 3, size=(50, 1))
    transformer = PPCATransformer(n_components, noise=noise).fit(x)
    np.testing.assert_allclose(transformer.components_**2, x.var() / 2)
    np.testing.assert_allclose(transformer.noise_variance_, x.var() / 2)
    best = -0.5 * (np.log(2 * np.pi * x.var()) + 1)
    assert transformer.score(x) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("noise", NOISES)
def test_the_variance_is_halved_with_a_warning_if_one_component_is_undetermined(noise):
    x = np.outer([1.0, 3, 2], [1.0, -2, 2]) + 5
    with pytest.warns(UserWarning, match=r"shape \(3, 3\), does not determine one component"):
        transformer = PPCATransformer(noise=noise).fit(x)
    assert np.trace(transformer.get_covariance()) == pytest.approx(x.var(0).sum())
    np.testing.assert_allclose(np.sum(transformer.components_**2), x.var(0).sum() / 2)
    along = np.abs(transformer.components_[0] / np.linalg.norm(transformer.components_))
    np.testing.assert_allclose(along, [1 / 3, 2 / 3, 2 / 3])
    with pytest.raises(
        ValueError, match=r"the rank .*, 1 \(X has .*got 1\. n_components=None chooses"
    ):
        PPCATransformer(1, noise=noise).fit(x)


# Reproducibility, pickles and notes


@pytest.mark.parametrize("noise", NOISES)
def test_fits_are_reproducible_and_leave_global_generators_unchanged(incomplete, noise):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    transformers = [PPCATransformer(2, noise=noise).fit(incomplete) for _ in range(2)]
    np.testing.assert_array_equal(transformers[0].components_, transformers[1].components_)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_a_pickle_gives_the_same_results(incomplete):
    transformer = PPCATransformer(2).fit(incomplete)
    again = pickle.loads(pickle.dumps(transformer))
    np.testing.assert_array_equal(again.transform(incomplete), transformer.transform(incomplete))
    np.testing.assert_array_equal(again.sample(3, 0), transformer.sample(3, 0))
    assert repr(again) == "PPCATransformer(n_components=2)"


def test_constant_columns_are_noted(x):
    x[:, 2] = 4
    assert PPCATransformer(2).fit(x).notes_ == ("constant columns: 2",)


# Errors


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n_components": 0}, "n_components must be a whole number >= 1; got 0"),
        ({"n_components": D}, rf"n_components must be smaller than the rank .*, {D} \(X has shape "
         rf"\(60, {D}\)\): the noise would be zero; got {D}. n_components=None chooses the"),
        ({"noise": "full"}, "noise must be one of 'isotropic', 'diagonal'; got 'full'"),
        ({"tol": -1.0}, "tol must be >= 0, in nats per datum; got -1.0"),
        ({"max_iter": 0}, "max_iter must be a whole number >= 1; got 0"),
        ({"random_state": "0", "noise": "diagonal"}, "cannot be used to seed"),
    ],
)  # fmt: skip
def test_bad_arguments(x, arguments, match):
    with pytest.raises(ValueError, match=match):
        PPCATransformer(**{"n_components": 2} | arguments).fit(x)


def test_the_rank_is_only_bounded_if_values_are_missing(incomplete):
    with pytest.raises(ValueError, match=f"rank of the centred data, at most {D} .*got {D}"):
        PPCATransformer(D).fit(incomplete)


def test_the_error_of_too_many_components_names_n_components():
    x = np.random.default_rng(0).normal(size=(30, 2)) @ np.random.default_rng(1).normal(
        size=(2, 5)
    )
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"^n_components=3 leaves no noise.*smaller n_components"):
        PPCATransformer(3).fit(x)


def test_bad_data(x, incomplete):
    transformer = PPCATransformer(2).fit(incomplete)
    empty = np.where(np.arange(60)[:, None] == 3, np.nan, x)
    for method in (transformer.fit, transformer.transform, transformer.score_samples):
        with pytest.raises(ValueError, match="infinity"):
            method(np.where(empty != empty, np.inf, x))
    with pytest.raises(ValueError, match=r"columns with nothing observed: \[1\]; drop them"):
        PPCATransformer(2).fit(np.where(np.arange(D) == 1, np.nan, x))
    with pytest.raises(ValueError, match="only constant columns"):
        PPCATransformer().fit(np.ones((5, 3)))
    with pytest.raises(ValueError, match="1 sample"):
        PPCATransformer().fit(x[:1])
    with pytest.raises(ValueError, match=r"constant columns.*noise='isotropic'"):
        PPCATransformer(2, noise="diagonal").fit(x * (np.arange(D) != 2))
    with pytest.raises(ValueError, match=r"must have n_components_=2 columns.*it has 3"):
        transformer.inverse_transform(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="n_samples must be a whole number >= 1; got 0"):
        transformer.sample(0)
    with pytest.raises(NotFittedError):
        PPCATransformer().score_samples(x)


def test_an_unconverged_fit_is_warned_of(incomplete):
    with pytest.warns(
        ConvergenceWarning,
        match=r"after max_iter=3, at least .*tol=1e-06.*raise max_iter or tol",
    ):
        transformer = PPCATransformer(2, max_iter=3).fit(incomplete)
    assert transformer.n_iter_ == 3
