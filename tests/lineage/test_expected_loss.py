"""The price of each family of q in PPCA, against a slow numerical optimisation."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

import oracles
from ppl_vae.lineage.expected_loss import ppca_price

SPECTRA = {
    "two strong axes": ([9.0, 4.0, 1.0, 0.6, 0.4], 2),
    "an axis near the noise": ([9.0, 1.2, 1.0, 0.9, 0.8], 2),
    "all alike but one": ([5.0, 1.01, 1.0, 1.0, 1.0], 3),
    "small noise": ([30.0, 8.0, 2.0, 0.01, 0.02], 3),
    "in other units": ([9e6, 4e6, 1e6, 0.6e6, 0.4e6], 2),
}
SLOW = ("all alike but one", "small noise")
QUICK = [name for name in SPECTRA if name not in SLOW]


def log_p_and_bound(eigenvalues, loadings, noise, covariance):
    """Mean log p of data with this (diagonal) covariance, and the ELBO of the family's best q."""
    values = np.asarray(eigenvalues)
    model = oracles.ppca_covariance(loadings, noise)
    log_det = np.linalg.slogdet(model)[1]
    trace = np.trace(np.linalg.solve(model, np.diag(values)))
    log_p = -0.5 * (len(values) * math.log(2 * math.pi) + log_det + trace)
    return log_p, log_p - oracles.best_q_gap(loadings, noise, covariance)


def searched(eigenvalues, K, covariance, starts=3):
    """The best ELBO over W and sigma^2 by L-BFGS from random starts, and log p there."""
    D, unit = len(eigenvalues), np.mean(eigenvalues)
    scaled = np.asarray(eigenvalues) / unit  # so that steps of the search have a sensible size

    def parts(theta):
        return theta[: D * K].reshape(D, K), math.exp(theta[-1])

    def loss(theta):
        return -log_p_and_bound(scaled, *parts(theta), covariance)[1]

    rng = np.random.default_rng(0)
    guesses = [np.append(rng.normal(size=D * K), -1.0) for _ in range(starts)]
    options = {"maxiter": 2000, "ftol": 1e-13, "gtol": 1e-8}
    found = [minimize(loss, guess, method="L-BFGS-B", options=options) for guess in guesses]
    best = min(found, key=lambda result: result.fun)
    values = log_p_and_bound(scaled, *parts(best.x), covariance)
    return [value - D / 2 * math.log(unit) for value in values]


@pytest.mark.parametrize("covariance", ["unit", "isotropic", "diagonal"])
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_a_search_finds_no_better_bound_and_the_same_price(name, covariance):
    eigenvalues, K = SPECTRA[name]
    best = oracles.closed_form_log_likelihood(np.sort(eigenvalues)[::-1], K)
    log_p, bound = searched(eigenvalues, K, covariance)
    price = ppca_price(eigenvalues, K, covariance)
    assert price.bound == pytest.approx(best - bound, abs=2e-6)
    assert price.bound <= best - bound + 1e-9  # the search may stop short, never beyond
    assert price.log_p == pytest.approx(best - log_p, abs=2e-3)


def test_axes_below_the_noise_of_a_unit_q_are_off():
    eigenvalues, K = SPECTRA["an axis near the noise"]
    naive = oracles.optimal_unit_q(np.array(eigenvalues), K)
    assert naive[1].min() < 0  # the formula for all axes would need a negative column norm
    best = oracles.closed_form_log_likelihood(np.array(eigenvalues), K)
    assert ppca_price(eigenvalues, K, "unit").bound > best - naive[2] + 1e-3
    on, K = SPECTRA["two strong axes"]
    best = oracles.closed_form_log_likelihood(np.array(on), K)
    price = ppca_price(on, K, "unit")
    assert price.bound == pytest.approx(best - oracles.optimal_unit_q(np.array(on), K)[2])


def test_isotropic_q_pays_in_halves():
    eigenvalues, K = SPECTRA["two strong axes"]
    price = ppca_price(eigenvalues, K, "isotropic")
    assert price.bound == pytest.approx(oracles.isotropic_price(eigenvalues[:K]), abs=1e-12)
    assert price.log_p == pytest.approx(price.bound / 2, abs=1e-12)
    assert ppca_price([4.0, 4.0, 1.0], 2, "isotropic").bound == pytest.approx(0, abs=1e-12)


def test_pca_as_a_density_counts_noise_twice():
    x = oracles.simulate_ppca((16, 8, 3), 1, 100, 7, seed=0)
    values, _ = oracles.sample_spectrum(x)
    for K in (1, 2, 3, 5):
        best = oracles.closed_form_log_likelihood(values, K)
        price = ppca_price(values.copy(), K, "delta")
        assert price.log_p == pytest.approx(best - oracles.implied_by_pca(x, K), abs=1e-9)
        assert math.isnan(price.bound) and price.log_p > 0


def test_what_costs_nothing_and_what_has_no_price():
    for covariance in ("full", "diagonal"):
        price = ppca_price([3.0, 2.0, 1.0], 1, covariance)
        assert (price.bound, price.log_p) == (0.0, 0.0)
    with pytest.raises(ValueError, match="latent_dim=2 must be smaller than the number of pos"):
        ppca_price([3.0, 2.0, 0.0], 2, "unit")
    with pytest.raises(ValueError, match="covariance must be one of"):
        ppca_price([3.0, 2.0], 1, "round")
