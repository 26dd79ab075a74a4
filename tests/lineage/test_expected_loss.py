"""The expected loss of each family of q in PPCA, against a slow numerical optimisation."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

import oracles
from ppl_vae.lineage.expected_loss import expected_ppca_loss

SPECTRA = {
    "two large axes": ([9.0, 4.0, 1.0, 0.6, 0.4], 2),
    "an axis near the noise": ([9.0, 1.2, 1.0, 0.9, 0.8], 2),
    "equal except one": ([5.0, 1.01, 1.0, 1.0, 1.0], 3),
    "small noise": ([30.0, 8.0, 2.0, 0.01, 0.02], 3),
    "in other units": ([9e6, 4e6, 1e6, 0.6e6, 0.4e6], 2),
}
SLOW = ("equal except one", "small noise")
QUICK = [name for name in SPECTRA if name not in SLOW]


def log_p_and_bound(eigenvalues, loadings, noise, covariance):
    """Mean log p of data with this (diagonal) covariance, and the ELBO of the family's best q."""
    values = np.asarray(eigenvalues)
    model = oracles.ppca_covariance(loadings, noise)
    log_det = np.linalg.slogdet(model)[1]
    trace = np.trace(np.linalg.solve(model, np.diag(values)))
    log_p = -0.5 * (len(values) * math.log(2 * math.pi) + log_det + trace)
    return log_p, log_p - oracles.best_q_gap(loadings, noise, covariance)


def optimize(eigenvalues, K, covariance, starts=3):
    """The best ELBO over W and sigma^2 by L-BFGS from random starts, and log p there."""
    D, unit = len(eigenvalues), np.mean(eigenvalues)
    scaled = np.asarray(eigenvalues) / unit  # gives steps of the optimizer a suitable size

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
def test_numerical_optimisation_attains_the_expected_loss(name, covariance):
    eigenvalues, K = SPECTRA[name]
    best = oracles.closed_form_log_likelihood(np.sort(eigenvalues)[::-1], K)
    log_p, bound = optimize(eigenvalues, K, covariance)
    expected = expected_ppca_loss(eigenvalues, K, covariance)
    assert expected.loss == pytest.approx(best - bound, abs=2e-6)
    assert expected.loss <= best - bound + 1e-9  # the optimizer may stop early
    assert expected.shortfall == pytest.approx(best - log_p, abs=2e-3)


def test_axes_below_the_noise_of_a_unit_q_have_zero_columns():
    eigenvalues, K = SPECTRA["an axis near the noise"]
    naive = oracles.optimal_unit_q(np.array(eigenvalues), K)
    assert naive[1].min() < 0  # the formula for all axes would need a negative column norm
    best = oracles.closed_form_log_likelihood(np.array(eigenvalues), K)
    assert expected_ppca_loss(eigenvalues, K, "unit").loss > best - naive[2] + 1e-3
    active, K = SPECTRA["two large axes"]
    best = oracles.closed_form_log_likelihood(np.array(active), K)
    expected = expected_ppca_loss(active, K, "unit")
    assert expected.loss == pytest.approx(best - oracles.optimal_unit_q(np.array(active), K)[2])


def test_half_of_the_loss_of_an_isotropic_q_is_in_log_p():
    eigenvalues, K = SPECTRA["two large axes"]
    expected = expected_ppca_loss(eigenvalues, K, "isotropic")
    assert expected.loss == pytest.approx(oracles.isotropic_price(eigenvalues[:K]), abs=1e-12)
    assert expected.shortfall == pytest.approx(expected.loss / 2, abs=1e-12)
    assert expected_ppca_loss([4.0, 4.0, 1.0], 2, "isotropic").loss == pytest.approx(0, abs=1e-12)


def test_pca_as_a_density_counts_the_noise_twice():
    x = oracles.simulate_ppca((16, 8, 3), 1, 100, 7, seed=0)
    values, _ = oracles.sample_spectrum(x)
    for K in (1, 2, 3, 5):
        best = oracles.closed_form_log_likelihood(values, K)
        expected = expected_ppca_loss(values.copy(), K, "delta")
        assert expected.shortfall == pytest.approx(best - oracles.implied_by_pca(x, K), abs=1e-9)
        assert math.isnan(expected.loss) and expected.shortfall > 0


def test_families_without_loss_and_invalid_arguments():
    for covariance in ("full", "diagonal"):
        expected = expected_ppca_loss([3.0, 2.0, 1.0], 1, covariance)
        assert (expected.loss, expected.shortfall) == (0.0, 0.0)
    with pytest.raises(ValueError, match="latent_dim=2 must be smaller than the number of pos"):
        expected_ppca_loss([3.0, 2.0, 0.0], 2, "unit")
    with pytest.raises(ValueError, match="covariance must be one of"):
        expected_ppca_loss([3.0, 2.0], 1, "round")
