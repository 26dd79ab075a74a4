"""The oracles themselves: each formula against a numerical search or a dense computation."""

import numpy as np
import pytest
from scipy import optimize, stats

import oracles

EIGENVALUES = np.array([9.0, 4.0, 2.5])


def test_simulated_data_have_exactly_the_spectrum_asked_for():
    x = oracles.simulate_ppca([9.0, 4.0], noise=0.5, N=50, D=6, seed=0)
    values, _ = oracles.sample_spectrum(x)
    np.testing.assert_allclose(values, [9, 4, 0.5, 0.5, 0.5, 0.5], rtol=1e-12)


def test_simulated_data_repeat_with_the_seed():
    first, second, other = (oracles.simulate_ppca([3.0], 1.0, 20, 4, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.allclose(first, other)


def test_no_row_or_column_of_missing_values_is_empty():
    x = oracles.with_missing_values(np.ones((30, 4)), fraction=0.9, seed=0)
    assert np.isnan(x).mean() > 0.5
    assert (~np.isnan(x)).any(0).all()
    assert (~np.isnan(x)).any(1).all()


@pytest.fixture
def model():
    rng = np.random.default_rng(3)
    return rng.normal(size=(5, 2)), rng.normal(size=5), 0.7


def test_the_spectral_density_is_the_dense_one(model):
    loadings, loc, noise = model
    axes, s, _ = np.linalg.svd(loadings, full_matrices=False)
    x = np.random.default_rng(4).normal(size=(6, 5))
    np.testing.assert_allclose(
        oracles.spectral_log_density(x, loc, axes, s**2 + noise, noise),
        oracles.log_density(x, loc, loadings, noise),
        rtol=1e-12,
    )


def test_the_posterior_is_the_conditional_of_the_joint(model):
    loadings, loc, noise = model
    x = oracles.with_missing_values(np.random.default_rng(5).normal(size=(6, 5)), 0.3, seed=0)
    means, covariances = oracles.posterior(x, loc, loadings, noise)
    for row, mean, covariance in zip(x, means, covariances, strict=True):
        observed = ~np.isnan(row)
        block = oracles.ppca_covariance(loadings[observed], noise)
        gain = loadings[observed].T @ np.linalg.inv(block)
        np.testing.assert_allclose(mean, gain @ (row - loc)[observed], rtol=1e-10)
        np.testing.assert_allclose(covariance, np.eye(2) - gain @ loadings[observed], rtol=1e-10)


def test_imputation_is_the_posterior_predictive(model):
    loadings, loc, noise = model
    x = oracles.with_missing_values(np.random.default_rng(6).normal(size=(6, 5)), 0.4, seed=1)
    mean, sd = oracles.impute(x, loc, loadings, noise)
    z, covariances = oracles.posterior(x, loc, loadings, noise)
    missing = np.isnan(x)
    np.testing.assert_allclose(mean[missing], (z @ loadings.T + loc)[missing], rtol=1e-10)
    variances = np.einsum("dk,nkl,dl->nd", loadings, covariances, loadings) + noise
    np.testing.assert_allclose(sd[missing], np.sqrt(variances)[missing], rtol=1e-10)
    assert (sd[~missing] == 0).all()


def test_the_closed_form_has_its_stated_likelihood():
    x = oracles.simulate_ppca(EIGENVALUES, 0.8, 60, 7, seed=2)
    loadings, loc, noise = oracles.closed_form_ppca(x, 3)
    assert noise == pytest.approx(0.8, rel=1e-12)
    stated = oracles.closed_form_log_likelihood(oracles.sample_spectrum(x)[0], 3)
    assert oracles.log_density(x, loc, loadings, noise).mean() == pytest.approx(stated, rel=1e-12)
    means, covariances = oracles.posterior(x, loc, loadings, noise)
    prior = np.zeros(3), np.eye(3)
    kl = [oracles.gaussian_kl(m, S, *prior) for m, S in zip(means, covariances, strict=True)]
    assert np.mean(kl) == pytest.approx(oracles.mean_kl(EIGENVALUES, 0.8), rel=1e-10)
    np.testing.assert_allclose(
        np.sort(np.linalg.eigvalsh(np.cov(means.T, bias=True)))[::-1],
        oracles.posterior_mean_variance(EIGENVALUES, 0.8),
        rtol=1e-10,
    )


@pytest.mark.parametrize(("covariance", "width"), [("unit", 0), ("isotropic", 1), ("diagonal", 3)])
def test_no_other_q_of_a_family_is_better_than_its_best(covariance, width):
    loadings = np.random.default_rng(7).normal(size=(5, 3))
    precision = np.eye(3) + loadings.T @ loadings / 0.6
    exact = np.linalg.inv(precision)

    def gap(log_variances):
        spread = np.exp(np.broadcast_to(log_variances, 3)) if width else np.ones(3)
        return oracles.gaussian_kl(np.zeros(3), np.diag(spread), np.zeros(3), exact)

    found = optimize.minimize(gap, np.zeros(width)).fun if width else gap(None)
    assert oracles.best_q_gap(loadings, 0.6, covariance) == pytest.approx(found, abs=1e-8)
    best = np.log(oracles.best_q_variances(loadings, 0.6, covariance))
    assert gap(best) == pytest.approx(found, abs=1e-8)


def test_the_gap_of_two_rotated_axes():
    l_i, l_j, noise, angle = 5.0, 2.0, 0.5, 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    loadings = np.diag(np.sqrt([l_i - noise, l_j - noise])) @ turn
    assert oracles.rotated_pair_gap(l_i, l_j, angle) == pytest.approx(
        oracles.best_q_gap(loadings, noise, "diagonal"), rel=1e-12
    )


def best_bound(spectrum, K, covariance):
    """The best mean ELBO over W on the principal axes and s2, for q of a family, by search."""
    D = len(spectrum)

    def loss(parameters):
        noise = np.exp(parameters[0])
        squared = parameters[1:] ** 2
        implied = np.concatenate([squared + noise, np.full(D - K, noise)])
        log_p = -0.5 * (D * np.log(2 * np.pi) + np.log(implied).sum() + (spectrum / implied).sum())
        return oracles.best_q_gap(np.diag(np.sqrt(squared)), noise, covariance) - log_p

    start = np.concatenate([[np.log(spectrum[K:].mean())], np.sqrt(spectrum[:K])])
    return optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-9})


def test_the_price_of_an_isotropic_q():
    spectrum = np.concatenate([EIGENVALUES, np.full(4, 0.8)])
    found = best_bound(spectrum, 3, "isotropic")
    exact = oracles.closed_form_log_likelihood(spectrum, 3)
    assert exact + found.fun == pytest.approx(oracles.isotropic_price(EIGENVALUES), abs=1e-7)
    assert np.exp(found.x[0]) == pytest.approx(0.8, rel=1e-4)


def test_the_optimum_of_a_unit_q():
    spectrum = np.concatenate([EIGENVALUES, np.full(4, 0.8)])
    sigma, squared_norms, bound = oracles.optimal_unit_q(spectrum, 3)
    found = best_bound(spectrum, 3, "unit")
    assert bound == pytest.approx(-found.fun, abs=1e-7)
    assert sigma**2 == pytest.approx(np.exp(found.x[0]), rel=1e-3)
    np.testing.assert_allclose(squared_norms, found.x[1:] ** 2, rtol=1e-3)


def test_the_second_moment_of_a_gaussian_proposal():
    cov_q, cov_p, offset = 1.5, 1.0, 0.4
    q, p = stats.norm(offset, cov_q**0.5), stats.norm(0, cov_p**0.5)
    z = np.linspace(-30, 30, 200_001)
    direct = np.trapezoid(p.pdf(z) ** 2 / q.pdf(z), z)
    stated = oracles.proposal_second_moment(
        np.array([[cov_q]]), np.array([[cov_p]]), np.array([offset])
    )
    assert stated == pytest.approx(direct, rel=1e-9)
    assert oracles.proposal_second_moment(np.eye(1) * 0.5, np.eye(1), np.zeros(1)) == np.inf


def test_the_tail_index_of_the_best_diagonal_q():
    loadings = np.random.default_rng(8).normal(size=(4, 2))
    M = loadings.T @ loadings + 0.3 * np.eye(2)
    exact, best = 0.3 * np.linalg.inv(M), np.diag(0.3 / np.diag(M))
    stated = oracles.diagonal_q_tail_index(M)
    assert oracles.proposal_tail_index(best, exact) == pytest.approx(stated, rel=1e-10)
    assert stated == pytest.approx(abs(M[0, 1]) / np.sqrt(M[0, 0] * M[1, 1]), rel=1e-10)


def test_the_kl_of_a_scaled_proposal():
    assert oracles.scaled_proposal_kl(0.4, 3) == pytest.approx(
        oracles.gaussian_kl(np.zeros(3), 0.4 * np.eye(3), np.zeros(3), np.eye(3)), rel=1e-12
    )


def em_step(S, W, noise):
    """One EM step on complete data in the covariance alone (Tipping & Bishop, eq. 29, 30)."""
    M_inverse = np.linalg.inv(W.T @ W + noise * np.eye(W.shape[1]))
    SW = S @ W
    return SW @ np.linalg.inv(noise * np.eye(W.shape[1]) + M_inverse @ W.T @ SW)


def test_the_rates_of_em():
    l_i, noise = 4.0, 1.0
    target = np.sqrt(l_i - noise)
    errors = [1e-4]
    for _ in range(2):
        W = em_step(np.array([[l_i]]), np.array([[target + errors[-1]]]), noise)
        errors.append(W[0, 0] - target)
    assert errors[1] / errors[0] == pytest.approx(oracles.em_scale_rate(l_i, noise), rel=1e-3)
    assert oracles.px_em_scale_rate(l_i, noise) == 1 / 16 < oracles.em_scale_rate(l_i, noise)
    assert oracles.subspace_rate(np.array([4.0, 2.0, 1.0]), 2) == 1 / 4


def test_the_rate_of_variational_em_in_the_rotation():
    spectrum, noise, angle = np.array([5.0, 2.0]), 0.5, 1e-2
    W = np.diag(np.sqrt(spectrum - noise)) @ np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    )

    def step(W):
        M_inverse = np.linalg.inv(W.T @ W + noise * np.eye(2))
        second = M_inverse @ W.T @ np.diag(spectrum) @ W @ M_inverse
        second += np.diag(oracles.best_q_variances(W, noise, "diagonal"))
        return np.diag(spectrum) @ W @ M_inverse @ np.linalg.inv(second)

    for _ in range(30):  # until the slowest mode is left
        W = step(W)
    gaps = [oracles.best_q_gap(V, noise, "diagonal") for V in (W, step(W))]
    rate = oracles.variational_em_rate(*spectrum, noise)
    assert gaps[1] / gaps[0] == pytest.approx(rate**2, rel=1e-2)
