"""Closed form, EM, PX-EM and variational EM of PPCA, against dense oracles and exact rates."""

import json

import combinations
import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from ppl_vae.inference.em.fit import fit_closed_form, fit_em, variational_em
from ppl_vae.models.linear.sufficient_statistics import SampleCovariance
from ppl_vae.models.ppca import PPCA

SPECTRUM, NOISE, D, K = (9.0, 4.0, 2.5), 0.8, 7, 3
ALGORITHMS = {
    "EM": lambda ppca, x, **options: fit_em(ppca, x, accelerate=False, **options),
    "PX-EM": fit_em,
    "diagonal": lambda ppca, x, **options: variational_em(ppca, x, rotate=False, **options),
    "diagonal, rotating": variational_em,
    "isotropic": lambda ppca, x, **options: variational_em(
        ppca, x, covariance="isotropic", **options
    ),
    "unit": lambda ppca, x, **options: variational_em(ppca, x, covariance="unit", **options),
    "full": lambda ppca, x, **options: variational_em(ppca, x, covariance="full", **options),
}
EXACT = ("EM", "PX-EM")


@pytest.fixture
def x():
    return oracles.simulate_ppca(SPECTRUM, NOISE, 60, D, seed=0)


def wide(N=20, D=45, seed=0):
    """Fewer rows than columns, correlated."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, 6)) @ rng.normal(size=(6, D)) + 0.5 * rng.normal(size=(N, D)) + 3


DATA = {
    "tall": lambda: oracles.simulate_ppca(SPECTRUM, NOISE, 60, D, seed=0),
    "general": lambda: (
        np.random.default_rng(1).normal(size=(40, 6)) @ np.diag([5, 3, 2, 1, 1, 0.5])
    ),
    "square": lambda: wide(12, 12),
    "wide": wide,
}


def parameters(ppca):
    """mu, W and the noise variance as arrays."""
    loc, loadings, scale = (
        p.detach().double().numpy().copy() for p in (ppca.loc, ppca.loadings, ppca.noise_scale)
    )
    return loc, loadings, float(scale) ** 2


def mean_log_likelihood(ppca, x):
    return float(ppca.log_likelihood(x).detach().mean())


def implied(ppca):
    loc, loadings, noise = parameters(ppca)
    return loc, oracles.ppca_covariance(loadings, noise)


def best_log_likelihood(x, latent_dim=K):
    return oracles.closed_form_log_likelihood(oracles.sample_spectrum(x)[0], latent_dim)


def rounding(x, *noises, largest=0.0):
    """The decreases that rounding can cause: 1e-15 (1 + l_1 / s2) D.

    ``largest``: a larger eigenvalue of the matrix M of an E-step.
    """
    values, _ = oracles.sample_spectrum(x)
    return 1e-15 * (1 + max(values[0], largest) / min(noises)) * x.shape[1]


def assigned(x, loadings, noise, latent_dim=K):
    """A model at these loadings and this noise variance, mu the sample mean."""
    ppca = PPCA.like(x, latent_dim, seed=0)
    return ppca.assign(loadings=torch.as_tensor(loadings), noise_scale=noise**0.5)


# Closed form


@pytest.mark.parametrize("data", DATA)
def test_the_closed_form_matches_the_eigendecomposition(data):
    x = DATA[data]()
    ppca = PPCA.like(x, K, seed=0)
    fit_closed_form(ppca, x)
    loadings, loc, noise = oracles.closed_form_ppca(x, K)
    np.testing.assert_allclose(parameters(ppca)[2], noise, rtol=1e-10)
    np.testing.assert_allclose(implied(ppca)[0], loc, rtol=1e-10)
    expected = oracles.ppca_covariance(loadings, noise)
    np.testing.assert_allclose(implied(ppca)[1], expected, rtol=1e-10, atol=1e-10 * expected.max())


@pytest.mark.parametrize("data", DATA)
def test_the_closed_form_agrees_with_scikit_learn(data):
    x = DATA[data]()
    N, D = x.shape
    ppca, pca = PPCA.like(x, K, seed=0), PCA(K, svd_solver="full").fit(x)
    fit_closed_form(ppca, x)
    loc, loadings, noise = parameters(ppca)
    # scikit-learn divides by N - 1 and averages over the remaining min(N, D) - K eigenvalues.
    correction = N / (N - 1) * (D - K) / (min(N, D) - K)
    assert pca.noise_variance_ == pytest.approx(noise * correction, rel=1e-10)
    np.testing.assert_allclose(loc, pca.mean_, rtol=1e-10)
    squared = np.linalg.eigvalsh(loadings.T @ loadings)
    variances = (squared[::-1] + noise) * N / (N - 1)
    np.testing.assert_allclose(variances, pca.explained_variance_, rtol=1e-10)
    assert np.sin(subspace_angles(loadings, pca.components_.T)).max() < 1e-10
    np.testing.assert_allclose(
        ppca.reconstruct(x, shrink=False).detach(),
        pca.inverse_transform(pca.transform(x)),
        rtol=1e-10,
    )


@pytest.mark.parametrize("data", DATA)
def test_the_closed_form_whitens_to_trace_D(data):
    x = DATA[data]()
    ppca = PPCA.like(x, K, seed=0)
    fit_closed_form(ppca, x)
    covariance = np.cov(x.T, bias=True)
    whitened = np.linalg.solve(implied(ppca)[1], covariance)
    assert np.trace(whitened) == pytest.approx(x.shape[1], rel=1e-10)


@pytest.mark.parametrize("data", DATA)
def test_the_closed_form_log_likelihood_matches_the_spectrum(data):
    x = DATA[data]()
    ppca = PPCA.like(x, K, seed=0)
    result = fit_closed_form(ppca, x)
    best = best_log_likelihood(x)
    assert float(result.objective[-1]) == pytest.approx(best, rel=1e-10)
    assert float(result.log_likelihood[-1]) == pytest.approx(best, rel=1e-10)
    assert mean_log_likelihood(ppca, x) == pytest.approx(best, rel=1e-10)
    assert oracles.mean_log_density(x, *parameters(ppca)) == pytest.approx(best, rel=1e-10)


def test_perturbed_closed_form_parameters_have_a_lower_likelihood(x):
    ppca = PPCA.like(x, K, seed=0)
    fit_closed_form(ppca, x)
    loc, loadings, noise = parameters(ppca)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 1e-1):
        for candidate in (
            (loc + size * rng.normal(size=D), loadings, noise),
            (loc, loadings + size * rng.normal(size=loadings.shape), noise),
            (loc, loadings, noise * np.exp(size * rng.normal())),
        ):
            assert oracles.mean_log_density(x, *candidate) < best_log_likelihood(x)


# One step


STEPS = {
    "EM": ("full", False),
    "PX-EM": ("full", True),
    "full": ("full", False),
    "diagonal": ("diagonal", False),
    "isotropic": ("isotropic", False),
    "unit": ("unit", False),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("data", DATA)
def test_one_step_matches_explicit_posteriors(name, data):
    x = DATA[data]()
    ppca = PPCA.like(x, K, seed=1)
    covariance, expand = STEPS[name]
    _, loadings, noise = parameters(ppca)
    for _ in range(2):
        result = ALGORITHMS[name](ppca, x, max_iterations=1)
        bound = oracles.mean_elbo(x, x.mean(0), loadings, noise, covariance)
        assert float(result.objective[0]) == pytest.approx(bound, rel=1e-10)
        loadings, noise = oracles.em_step(x, x.mean(0), loadings, noise, covariance, expand)
        np.testing.assert_allclose(parameters(ppca)[2], noise, rtol=1e-9)
        np.testing.assert_allclose(
            implied(ppca)[1], oracles.ppca_covariance(loadings, noise), rtol=1e-9, atol=1e-9
        )


def test_a_rotating_step_is_the_expanded_step_on_principal_axes(x):
    ppca = PPCA.like(x, K, seed=1)
    loc, loadings, noise = parameters(ppca)
    result = variational_em(ppca, x, max_iterations=1)
    expanded, noise = oracles.em_step(x, loc, loadings, noise, "diagonal", expand=True)
    turned = parameters(ppca)[1]
    np.testing.assert_allclose(turned @ turned.T, expanded @ expanded.T, rtol=1e-9, atol=1e-9)
    inner = turned.T @ turned
    np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0, atol=1e-12 * inner.max())
    assert parameters(ppca)[2] == pytest.approx(noise, rel=1e-10)
    # On principal axes the best diagonal q is exact, so the next E-step closes the gap.
    again = variational_em(ppca, x, max_iterations=1)
    assert float(again.objective[0]) == pytest.approx(float(again.log_likelihood[0]), rel=1e-12)
    assert float(again.objective[0]) >= float(result.objective[1])


# Monotone convergence to the closed form

EXTREME_STARTS = {
    "tiny loadings": (1e-3, 1.0),
    "huge loadings": (1e3, 1.0),
    "tiny noise": (1.0, 1e-6),
    "huge noise": (1.0, 1e6),
    "both tiny": (1e-3, 1e-4),
    "both huge": (1e3, 1e4),
}


def extreme_start(x, start, latent_dim=K):
    """Loadings in general position at some scale, and a noise variance."""
    scale, noise = EXTREME_STARTS[start]
    loadings = scale * np.random.default_rng(3).normal(size=(x.shape[1], latent_dim))
    return assigned(x, loadings, noise, latent_dim)


@pytest.mark.parametrize(("name", "start"), combinations.one_in(2, ALGORITHMS, EXTREME_STARTS))
def test_the_bound_is_monotone_and_below_the_log_likelihood(name, start, x):
    ppca = extreme_start(x, start)
    last, (_, loadings, noise) = -np.inf, parameters(ppca)
    for _ in range(10):  # the bound changes most in the first, from every start
        largest = np.linalg.norm(loadings, 2) ** 2
        result = ALGORITHMS[name](ppca, x, max_iterations=1)
        before, (_, loadings, noise) = noise, parameters(ppca)
        slack = rounding(x, before, noise)
        after_e, after_m = result.objective.tolist()
        assert after_e >= last - slack
        assert after_m >= after_e - slack
        solved = rounding(x, before, noise, largest=largest)
        assert (result.objective <= result.log_likelihood + solved).all()
        truth = oracles.mean_log_density(x, *parameters(ppca))
        assert float(result.log_likelihood[1]) == pytest.approx(truth, rel=1e-9)
        last = after_m


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("start", EXTREME_STARTS)
def test_the_bound_equals_the_log_likelihood_after_each_e_step(name, start, x):
    ppca = extreme_start(x, start)
    _, loadings, noise = parameters(ppca)
    result = ALGORITHMS[name](ppca, x, max_iterations=20)
    slack = rounding(x, noise, NOISE, largest=np.linalg.norm(loadings, 2) ** 2)
    exact = result.log_likelihood[::2]
    assert ((result.objective[::2] - exact).abs() <= slack + 1e-15 * exact.abs()).all()
    # After M-steps there is a gap, which the next E-step closes: the two are computed separately.
    gap = result.log_likelihood[1::2] - result.objective[1::2]
    assert (gap >= -slack).all()
    assert gap.max() > 1e-3


@pytest.mark.parametrize(
    ("name", "start", "data"), combinations.one_in(2, EXACT, EXTREME_STARTS, ["tall", "wide"])
)
def test_em_converges_to_the_closed_form(name, start, data):
    x = DATA[data]()
    ppca = extreme_start(x, start)
    result = ALGORITHMS[name](ppca, x, tol=1e-10, max_iterations=100_000)
    assert result.stopped.startswith("converged")
    best = best_log_likelihood(x)
    assert float(result.log_likelihood[-1]) == pytest.approx(best, abs=1e-8)
    assert oracles.mean_log_density(x, *parameters(ppca)) == pytest.approx(best, abs=1e-8)
    np.testing.assert_allclose(parameters(ppca)[0], x.mean(0), rtol=1e-12)


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-9])
def test_the_remaining_gain_at_the_end_is_about_tol(tol, x):
    # A slow fit, whose last gain alone would be far below the remaining one.
    x = oracles.simulate_ppca([20.0, 10.0, 1.1], 1.0, 60, D, seed=1)
    ppca = PPCA.like(x, K, seed=0)
    result = fit_em(ppca, x, accelerate=False, tol=tol)
    left = best_log_likelihood(x) - float(result.log_likelihood[-1])
    assert f"{tol:g} nats" in result.stopped
    assert 0 <= left < 2 * tol


@pytest.mark.parametrize("data", ["tall", "wide"])
@pytest.mark.parametrize("name", EXACT)
def test_em_and_px_em_are_subspace_iteration(name, data):
    x = DATA[data]()
    covariance = np.cov(x.T, bias=True)
    start = np.random.default_rng(4).normal(size=(x.shape[1], K))
    powers = start
    for t in range(1, 5):
        powers = covariance @ powers
        ppca = assigned(x, start, 1.0)
        ALGORITHMS[name](ppca, x, tol=0.0, max_iterations=t)
        moved = subspace_angles(parameters(ppca)[1], start).max()
        # Rounding in S^t W_0 grows with its condition number.
        slack = 1e-15 * np.linalg.cond(powers) * x.shape[1]
        assert subspace_angles(parameters(ppca)[1], powers).max() < slack < 1e-9 < moved


# Rates of convergence


@pytest.mark.slow
def test_px_em_is_fast_with_small_noise_where_em_is_slow():
    data_dim, latent_dim, ratio = 60, 5, 1e4
    x = oracles.simulate_ppca([ratio] * latent_dim, 1.0, 200, data_dim, seed=0)
    start = np.random.default_rng(0).normal(size=(data_dim, latent_dim))
    best = best_log_likelihood(x, latent_dim)
    left = {}
    for name, iterations in (("EM", 1000), ("PX-EM", 20)):
        ppca = assigned(x, start, 1.0, latent_dim)
        ALGORITHMS[name](ppca, x, tol=0.0, max_iterations=iterations)
        left[name] = best - oracles.mean_log_density(x, *parameters(ppca))
        print(
            f"l / s2 = {ratio:g}: {name} is {left[name]:.3g} nats per datum below the maximum "
            f"after {iterations} iterations"
        )
    assert left["EM"] > 2
    assert left["PX-EM"] < 1e-8


def scale_error_after_one_step(name, l_i, error):
    """The ratio by which one step contracts an error in an axis's length, at the optimal noise."""
    x = oracles.simulate_ppca([l_i], 1.0, 80, 20, seed=0)
    loadings, _, noise = oracles.closed_form_ppca(x, 1)
    ppca = assigned(x, loadings * (1 + error), noise, latent_dim=1)
    ALGORITHMS[name](ppca, x, tol=0.0, max_iterations=1)
    length = np.linalg.norm(loadings)
    return (np.linalg.norm(parameters(ppca)[1]) - length) / (error * length)


@pytest.mark.parametrize("l_i", [1.5, 4.0, 20.0])
def test_the_rates_in_the_scale_of_an_axis(l_i):
    # Second-order terms are of the size of the error.
    assert scale_error_after_one_step("EM", l_i, 1e-5) == pytest.approx(
        oracles.em_scale_rate(l_i, 1.0), abs=1e-4
    )
    assert scale_error_after_one_step("PX-EM", l_i, 1e-5) == pytest.approx(
        oracles.px_em_scale_rate(l_i, 1.0), abs=1e-4
    )


@pytest.mark.parametrize("l_i", [1.5, 4.0, 20.0])
def test_the_rate_of_px_em_with_free_noise(l_i):
    """The noise absorbs 1 / D of the error: the rate is r^2 + (1 - r^2) / D."""
    x = oracles.simulate_ppca([l_i], 1.0, 80, 20, seed=0)
    loadings, _, noise = oracles.closed_form_ppca(x, 1)
    ppca, r = assigned(x, loadings * 1.001, noise, latent_dim=1), 1 / l_i
    errors = []
    for _ in range(4):
        fit_em(ppca, x, max_iterations=1)
        errors.append(np.linalg.norm(parameters(ppca)[1]) - np.linalg.norm(loadings))
    assert errors[-1] / errors[-2] == pytest.approx(r**2 + (1 - r**2) / 20, abs=1e-3)


def test_the_rate_in_the_subspace():
    x = oracles.simulate_ppca([8.0, 4.0, 2.0], 1.0, 80, 6, seed=0)  # with K = 2, the rate is 2 / 4
    values, vectors = oracles.sample_spectrum(x)
    ppca = PPCA.like(x, 2, seed=0)
    fit_em(ppca, x, tol=0.0, max_iterations=12)
    best = best_log_likelihood(x, 2)
    left = best - fit_em(ppca, x, tol=0.0, max_iterations=3).log_likelihood[::2].numpy()
    assert left[2] / left[1] == pytest.approx(oracles.subspace_rate(values, 2), rel=1e-2)
    assert subspace_angles(parameters(ppca)[1], vectors[:, :2]).max() < 1e-3


# Variational EM


def test_diagonal_q_converges_in_the_rotation_at_the_known_rate():
    eigenvalues = (16.0, 4.0)
    x = oracles.simulate_ppca(eigenvalues, 1.0, 100, 6, seed=0)
    ppca = PPCA.like(x, 2, seed=0)
    result = variational_em(ppca, x, rotate=False, tol=0.0, max_iterations=90)
    left = best_log_likelihood(x, 2) - result.objective[1::2].numpy()
    rate = oracles.variational_em_rate(*eigenvalues, noise=1.0)
    measured = left[1:] / left[:-1]
    np.testing.assert_allclose(measured[50:80], rate**2, rtol=1e-3)


def test_the_gap_of_a_rotation_matches_the_formula(x):
    eigenvalues = (16.0, 4.0)
    x = oracles.simulate_ppca(eigenvalues, 1.0, 100, 6, seed=0)
    loadings, _, noise = oracles.closed_form_ppca(x, 2)
    angle = 0.4
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    ppca = assigned(x, loadings @ turn, noise, latent_dim=2)
    result = variational_em(ppca, x, rotate=False, max_iterations=1)
    gap = float(result.log_likelihood[0] - result.objective[0])
    assert gap == pytest.approx(oracles.rotated_pair_gap(*eigenvalues, angle), rel=1e-10)


def test_with_rotation_diagonal_q_reaches_the_closed_form_on_digits():
    x = load_digits().data / 16
    ppca = PPCA.like(x, 10, seed=0)
    result = variational_em(ppca, x, tol=1e-10)
    best = best_log_likelihood(x, 10)
    assert float(result.objective[-1]) == pytest.approx(best, abs=1e-8)
    assert result.steps < 100
    noise = min(0.5 * np.cov(x.T, bias=True).trace() / 64, parameters(ppca)[2])
    assert (result.objective.diff() >= -rounding(x, noise)).all()
    loadings = parameters(ppca)[1]
    cosines = loadings.T @ loadings / np.outer(*[np.linalg.norm(loadings, axis=0)] * 2)
    np.testing.assert_allclose(cosines, np.eye(10), atol=1e-10)
    assert any("0, 32, 39" in note for note in result.notes)


@pytest.mark.slow
def test_without_rotation_digits_need_thousands_of_iterations():
    x = load_digits().data / 16
    ppca = PPCA.like(x, 10, seed=0)
    result = variational_em(ppca, x, rotate=False, tol=0.0, max_iterations=2000)
    left = best_log_likelihood(x, 10) - float(result.objective[-1])
    assert left > 1e-4


def test_rotation_is_the_default_for_diagonal_q_alone(x):
    fits = {
        covariance: variational_em(PPCA.like(x, K, seed=0), x, covariance=covariance)
        for covariance in ("diagonal", "isotropic", "unit", "full")
    }
    assert {c for c, fit in fits.items() if "rotating" in fit.algorithm} == {"diagonal"}


def test_the_loss_of_an_isotropic_q_matches_theory(x):
    ppca = PPCA.like(x, K, seed=0)
    result = variational_em(ppca, x, covariance="isotropic", tol=1e-12)
    price = best_log_likelihood(x) - float(result.objective[-1])
    assert price == pytest.approx(oracles.isotropic_price(SPECTRUM), abs=1e-9)
    assert parameters(ppca)[2] == pytest.approx(NOISE, rel=1e-5)


def test_the_optimum_of_a_unit_q_matches_theory(x):
    ppca = PPCA.like(x, K, seed=0)
    result = variational_em(ppca, x, covariance="unit", tol=1e-13)
    sigma, squared_norms, bound = oracles.optimal_unit_q(oracles.sample_spectrum(x)[0], K)
    assert float(result.objective[-1]) == pytest.approx(bound, abs=1e-9)
    _, loadings, noise = parameters(ppca)
    assert noise**0.5 == pytest.approx(sigma, rel=1e-5)
    norms = np.linalg.svd(loadings, compute_uv=False) ** 2
    np.testing.assert_allclose(norms, squared_norms, rtol=1e-5)


def test_a_unit_q_sets_axes_below_the_noise_to_zero():
    """For a spectrum without structure, every column of W is zero with a unit q."""
    x = oracles.simulate_ppca([1.02, 1.01], 1.0, 60, 6, seed=0)
    ppca = PPCA.like(x, 2, seed=0)
    variational_em(ppca, x, covariance="unit", tol=1e-11)
    _, squared_norms, _ = oracles.optimal_unit_q(oracles.sample_spectrum(x)[0], 2)
    norms = np.linalg.svd(parameters(ppca)[1], compute_uv=False) ** 2
    np.testing.assert_allclose(norms, np.maximum(squared_norms, 0), atol=1e-4)


# Data of other kinds and scales


@pytest.mark.parametrize("value", [0.0, 3.0, 0.1, 1 / 3, -1e6 / 7, 1e-9])
@pytest.mark.parametrize("fit", [fit_closed_form, fit_em, variational_em])
def test_constant_columns_are_noted(fit, value):
    x = np.random.default_rng(0).normal(size=(97, 5)) * [3, 2, 1, 1, 1]
    x[:, 1] = x[:, 3] = value
    result = fit(PPCA.like(x, 1, seed=0), x)
    assert result.notes == ("constant columns: 1, 3",)
    assert "constant columns: 1, 3" in repr(result)


def test_a_column_of_tiny_variance_is_not_constant():
    x = np.random.default_rng(0).normal(size=(97, 5)) * [3, 2, 1, 1e-6, 1] + 1
    assert fit_closed_form(PPCA.like(x, 1, seed=0), x).notes == ()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("data", ["tall", "wide"])
def test_float32_models_are_fitted_with_float64_sums(name, data):
    x = DATA[data]()
    x += 1000.0 * np.sign(x.mean(0))  # sums of float32 would lose the variances
    ppca = PPCA(x.shape[1], K, seed=0)
    assert ppca.loadings.dtype == torch.float32
    result = ALGORITHMS[name](ppca, x, tol=1e-10)
    assert ppca.loadings.dtype == ppca.noise_scale.dtype == torch.float32
    assert float(result.log_likelihood[-1]) == pytest.approx(best_log_likelihood(x), abs=1e-7)
    # The parameters have float32's 24 bits, and log p is flat around them, except in mu.
    _, loadings, noise = parameters(ppca)
    value = oracles.mean_log_density(x, x.mean(0), loadings, noise)
    assert value == pytest.approx(best_log_likelihood(x), abs=1e-5)


@pytest.mark.parametrize(
    "convert",
    [
        pd.DataFrame,
        torch.from_numpy,
        lambda x: x.tolist(),
        lambda x: x.astype("f4"),
        lambda x: x.astype("i4"),
        lambda x: torch.from_numpy(x).requires_grad_(),
    ],
    ids=["pandas", "torch", "list", "float32", "integers", "with gradient"],
)
@pytest.mark.parametrize("fit", [fit_closed_form, fit_em])
def test_all_data_types_are_accepted(fit, convert):
    x = np.round(10 * oracles.simulate_ppca(SPECTRUM, NOISE, 60, D, seed=0))
    ppca = PPCA(D, K, seed=0).double()
    fit(ppca, convert(x))
    assert mean_log_likelihood(ppca, x) == pytest.approx(best_log_likelihood(x), abs=1e-7)
    assert all(p.grad is None and p.requires_grad for p in ppca.parameters())


@pytest.mark.parametrize("fit", [fit_closed_form, fit_em, variational_em])
def test_parameter_objects_are_kept(fit, x):
    ppca = PPCA.like(x, K, seed=0)
    before = {name: id(p) for name, p in ppca.named_parameters()}
    fit(ppca, x)
    assert {name: id(p) for name, p in ppca.named_parameters()} == before


@pytest.mark.parametrize("fit", [fit_closed_form, fit_em, variational_em])
def test_permuting_rows_and_rotating_or_scaling_axes_transforms_the_fit(fit, x):
    ppca = PPCA.like(x, K, seed=0)
    fit(ppca, x)
    loc, covariance = implied(ppca)
    turn, order = oracles.rotation(D, seed=1), np.random.default_rng(0).permutation(len(x))
    other = PPCA.like(x, K, seed=0)
    fit(other, 10 * (x[order] @ turn.T) + 5)
    np.testing.assert_allclose(implied(other)[0], 10 * turn @ loc + 5, rtol=1e-8)
    expected = 100 * turn @ covariance @ turn.T
    # A fit that stops within 1e-9 nats of its optimum is within about 1e-4 of it.
    np.testing.assert_allclose(implied(other)[1], expected, atol=1e-3 * expected.max())
    shift = mean_log_likelihood(ppca, x) - mean_log_likelihood(other, 10 * x @ turn.T + 5)
    assert shift == pytest.approx(D * np.log(10), abs=1e-7)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (9, 9)])
def test_the_statistics_match_the_dense_covariance(shape):
    x = np.random.default_rng(0).normal(size=shape) + 4
    statistics = SampleCovariance.of(x)
    dense = np.cov(x.T, bias=True)
    values, vectors = statistics.eigh()
    assert len(values) == min(shape)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[::-1][: min(shape)], atol=1e-12)
    positive = values > 1e-10  # the eigenvector of a zero eigenvalue is not unique
    np.testing.assert_allclose(
        (dense @ vectors.numpy())[:, positive], (vectors * values).numpy()[:, positive], atol=1e-12
    )
    other = np.random.default_rng(1).normal(size=(shape[1], 3))
    np.testing.assert_allclose(statistics @ torch.from_numpy(other), dense @ other, atol=1e-12)
    assert float(statistics.trace) == pytest.approx(np.trace(dense), rel=1e-12)


def test_a_noise_scale_given_as_a_float_is_not_rounded(x):
    """A Python float must not be rounded to float32 before it enters a float64 model."""
    ppca = PPCA.like(x, K, seed=0).assign(noise_scale=0.1)
    assert float(ppca.noise_scale.detach()) == pytest.approx(0.1, rel=1e-14)


# Invalid arguments

FITS = [fit_closed_form, fit_em, variational_em]


def test_the_closed_form_rejects_missing_values(x):
    ppca = PPCA.like(x, K, seed=0)
    x[2, 3] = x[4, 1] = np.nan
    message = "x has 2 missing entries, and this needs complete data; use fit_em"
    with pytest.raises(ValueError, match=message):
        fit_closed_form(ppca, x)


@pytest.mark.parametrize("fit", FITS)
def test_a_model_of_another_data_dim_is_rejected(fit, x):
    with pytest.raises(ValueError, match="x has 7 columns, the model data_dim=6"):
        fit(PPCA(6, 2, seed=0), x)


def of_rank(rank, shape=(30, 8), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1])) + 100


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("x", "latent_dim", "rank"),
    [
        (of_rank(3), 3, 3),
        (of_rank(3), 5, 3),
        (of_rank(8), 8, 8),
        (wide(6, 20), 5, 5),
        (np.ones((5, 3)), 1, 0),
        (np.ones((1, 3)), 1, 0),
        (np.repeat(of_rank(4, (2, 6)), 9, axis=0), 1, 1),
    ],
)
def test_latent_dim_must_be_below_the_rank(fit, x, latent_dim, rank):
    message = f"smaller than the rank of the centred data, {rank} .*got {latent_dim}"
    with pytest.raises(ValueError, match=message):
        fit(PPCA(x.shape[1], latent_dim, seed=0), x)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (np.ones(3), "x must be 2-d"),
        (np.ones((0, 7)), "x is empty"),
        (np.full((4, 7), np.inf), "x has 28 infinite entries"),
    ],
)
def test_invalid_matrices_are_rejected(fit, bad, match):
    with pytest.raises(ValueError, match=match):
        fit(PPCA(D, K, seed=0), bad)


def test_a_rejected_fit_leaves_the_model_unchanged(x):
    ppca = PPCA.like(x, K, seed=0)
    before = parameters(ppca)
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="missing"):
        fit_closed_form(ppca, x)
    x[:, 0] = np.nan
    for fit in FITS:
        with pytest.raises(ValueError, match=r"columns with nothing observed: \[0\]; drop them"):
            fit(ppca, x)
    for old, new in zip(before, parameters(ppca), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("bad", [0, -1, 2.5])
def test_max_iterations_must_be_a_positive_integer(name, bad, x):
    with pytest.raises((ValueError, TypeError), match="max_iterations"):
        ALGORITHMS[name](PPCA.like(x, K, seed=0), x, max_iterations=bad)


def test_an_unknown_family_is_rejected(x):
    with pytest.raises(
        ValueError, match="covariance must be one of 'unit', 'isotropic', 'diagonal'"
    ):
        variational_em(PPCA.like(x, K, seed=0), x, covariance="spherical")


@pytest.mark.parametrize("covariance", ["unit", "isotropic", "full"])
def test_rotation_is_rejected_where_it_would_not_be_monotone(covariance, x):
    with pytest.raises(ValueError, match="rotate=True needs covariance='diagonal'"):
        variational_em(PPCA.like(x, K, seed=0), x, covariance=covariance, rotate=True)


# Results


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_result_has_two_values_per_iteration(name, x):
    result = ALGORITHMS[name](PPCA.like(x, K, seed=0), x, tol=0.0, max_iterations=7)
    assert result.steps == 7
    assert result.stopped == "after max_iterations=7"
    assert len(result.objective) == len(result.log_likelihood) == len(result.elapsed) == 14
    assert (result.elapsed.diff() >= 0).all()
    assert 0 < float(result.elapsed[-1]) <= result.seconds
    frame = result.to_frame()
    assert len(frame) == 14
    assert {"objective", "log_likelihood", "elapsed"} <= set(frame.columns)
    np.testing.assert_array_equal(frame["objective"], result.objective)
    as_json = json.loads(json.dumps(result.to_dict()))
    assert as_json["objective"] == result.objective.tolist()
    assert as_json["steps"] == 7
    assert as_json["validation"] is None


def test_the_repr_of_a_result(x):
    result = fit_em(PPCA.like(x, K, seed=0), x, tol=1e-7)
    text = repr(result)
    assert text.startswith(f"PX-EM: {result.steps} steps in ")
    assert "converged: under 1e-07 nats per datum to gain" in text
    assert f"objective {best_log_likelihood(x):.4f} nats per datum" in text
    closed = fit_closed_form(PPCA.like(x, K, seed=0), x)
    assert closed.algorithm == "closed form"
    assert closed.stopped == "exact"
    assert f"objective {best_log_likelihood(x):.4f} nats per datum" in repr(closed)
    assert "tensor(" not in repr(closed) + text
