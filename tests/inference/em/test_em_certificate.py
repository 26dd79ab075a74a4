"""The maxima and certificates of EM, PX-EM and variational EM, on tables of all scales."""

import math
import types

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_linnerud, load_wine

import combinations
import lbfgs
import oracles
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.inference.em.closed_form import best_parameters
from ppl_vae.inference.em.expected_covariance import (
    expected_covariance_factor,
    expected_leading_eigenpairs,
)
from ppl_vae.inference.em.fit import fit_closed_form, fit_em, variational_em
from ppl_vae.inference.em.profile_likelihood import ProfileLikelihood, maximize_profile_likelihood
from ppl_vae.inference.em.run import NOT_CONVERGED, RESTARTED, EMRun
from ppl_vae.inference.em.state import ILL_CONDITIONED, LinearGaussianParameters
from ppl_vae.models.linear import sufficient_statistics
from ppl_vae.models.linear.eigen import right_singular_vectors
from ppl_vae.models.linear.sufficient_statistics import SampleCovariance
from ppl_vae.models.ppca import PPCA

TOLERANCE = 1e-8


def gaussian(shape, seed, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


def one_large_column():
    x = gaussian((300, 8), 1)
    x[:, 3] *= 1000
    return x


def with_outlier():
    x = gaussian((200, 6), 2)
    x[5] *= 1000
    return x


def collinear(size):
    x = gaussian((80, 5), 7)
    x[:, 4] = x[:, 0] + size * gaussian(80, 8)
    return x


TABLES = {
    "units of 100, 3, 1, 1": lambda: (
        np.random.default_rng(0).normal(size=(200, 4)) * [100, 3, 1, 1]
    ),
    "a column times 1000": one_large_column,
    "an outlying row": with_outlier,
    "an id column": lambda: np.c_[np.arange(150), load_iris().data],
    "units from 1e-6 to 1e6": lambda: gaussian(
        (120, 6), 3, 10.0 ** np.array([6, -3, 0, 3, -6, -1])
    ),
    "units up to 1e12": lambda: gaussian((100, 5), 5, 10.0 ** np.array([12, 0, 3, 6, 1])),
    "one column at 1e12": lambda: gaussian((100, 5), 5, np.array([1e12, 1, 1, 1, 1])),
    "Cauchy": lambda: np.random.default_rng(6).standard_cauchy(size=(150, 6)),
    "fewer rows than columns": lambda: gaussian((6, 15), 4),
    "raw wine": lambda: load_wine().data,
}
ALGORITHMS = {
    "EM": lambda ppca, x: fit_em(ppca, x, accelerate=False, max_iterations=60),
    "PX-EM": fit_em,
    "variational EM": variational_em,
}


def has_note(result, beginning):
    return any(note.startswith(beginning) for note in result.notes)


def assert_optimum_or_certificate(result, best):
    """The fit is within 1e-8 of the maximum, or reports its shortfall or a lack of precision."""
    short, ill = best - float(result.log_likelihood[-1]), has_note(result, ILL_CONDITIONED)
    slack = 1e-6 if ill else TOLERANCE
    assert short > -slack
    if result.converged:
        assert short < slack
        assert not has_note(result, NOT_CONVERGED)
    else:
        assert has_note(result, NOT_CONVERGED)
        assert result.certificate == pytest.approx(short, rel=1e-3, abs=slack)
    assert (result.objective[::2].diff() > -TOLERANCE).all()


# Complete data


@pytest.mark.parametrize(
    ("name", "algorithm", "seed"), combinations.one_in(2, TABLES, ALGORITHMS, range(2))
)
def test_every_fit_reaches_the_closed_form_or_reports_its_distance(name, algorithm, seed):
    x = TABLES[name]()
    values = oracles.long_spectrum(x)
    rank = min(x.shape[1], len(x) - 1)
    for latent_dim in sorted({1, 2, rank // 2, rank - 1}):
        best = oracles.long_closed_form_log_likelihood(values, latent_dim)
        result = ALGORITHMS[algorithm](PPCA.like(x, latent_dim, seed=seed), x)
        assert_optimum_or_certificate(result, best)


@pytest.mark.parametrize("name", TABLES)
def test_the_closed_form_is_accurate(name):
    x = TABLES[name]()
    values = oracles.long_spectrum(x)
    for latent_dim in range(1, min(x.shape[1], len(x) - 1)):
        best = oracles.long_closed_form_log_likelihood(values, latent_dim)
        ppca = PPCA.like(x, latent_dim, seed=0)
        result = fit_closed_form(ppca, x)
        slack = 1e-6 if has_note(result, ILL_CONDITIONED) else 1e-9
        assert float(result.log_likelihood[-1]) == pytest.approx(best, abs=slack)
        assert float(ppca.log_likelihood(x).mean().detach()) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_ten_seeds_escape_the_saddle_point(seed):
    x = one_large_column()
    result = fit_em(PPCA.like(x, 3, seed=seed), x)
    assert_optimum_or_certificate(
        result, oracles.long_closed_form_log_likelihood(oracles.long_spectrum(x), 3)
    )
    assert result.converged and has_note(result, RESTARTED)


@pytest.mark.parametrize(("fit", "latent_dim"), [(fit_em, 25), (variational_em, 8)])
def test_unscaled_breast_cancer_data(fit, latent_dim):
    x = load_breast_cancer().data
    result = fit(PPCA.like(x, latent_dim, seed=0), x)
    best = oracles.long_closed_form_log_likelihood(oracles.long_spectrum(x), latent_dim)
    assert_optimum_or_certificate(result, best)
    assert result.converged


def test_em_escapes_an_exact_saddle_point():
    """W on the second and third axis is a stationary point, which EM alone never leaves."""
    x = gaussian((100, 5), 0, np.array([5, 4.5, 4, 1, 1]))
    values, vectors = oracles.sample_spectrum(x)
    noise = np.delete(values, [1, 2]).mean()
    assert values[2] > noise
    loadings = vectors[:, 1:3] * np.sqrt(values[1:3] - noise)
    ppca = PPCA.like(x, 2, seed=0)
    ppca.assign(loadings=torch.from_numpy(loadings.copy()), noise_scale=noise**0.5)
    result = fit_em(ppca, x)
    assert float(result.log_likelihood[5]) - float(result.log_likelihood[0]) < 1e-9
    assert float(result.log_likelihood[-1]) == pytest.approx(
        oracles.closed_form_log_likelihood(values, 2), abs=TOLERANCE
    )
    (note,) = result.notes
    assert note.startswith(RESTARTED) and "once" in note


@pytest.mark.parametrize("exponent", [pytest.param(-150, marks=pytest.mark.slow), 20, 150])
@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
def test_scaling_all_columns_shifts_log_p_by_the_log_scale(exponent, missing, noise):
    x = oracles.with_missing_values(gaussian((60, 5), 3, np.array([5, 3, 1, 1, 1])), missing, 1)
    unit = 2.0 ** round(exponent / math.log10(2))
    plain, scaled = (
        PPCA.like(x, 1, noise=noise, seed=0),
        PPCA.like(x * unit, 1, noise=noise, seed=0),
    )
    ends = [fit_em(plain, x), fit_em(scaled, x * unit)]
    assert ends[0].converged and ends[1].converged
    cells = (~np.isnan(x)).sum() / len(x)
    shift = float(ends[0].log_likelihood[-1] - ends[1].log_likelihood[-1])
    assert shift == pytest.approx(cells * math.log(unit), rel=1e-13, abs=1e-8)
    assert float(scaled.loadings.detach().abs().max()) < 100 * unit
    torch.testing.assert_close(scaled.loadings / unit, plain.loadings, rtol=1e-3, atol=1e-4)


def test_missing_values_in_a_table_of_size_1e300():
    x = oracles.with_missing_values(gaussian((60, 5), 3), 0.3, 1) * 1e300
    ppca = PPCA.like(x, 2, seed=0)
    result = fit_em(ppca, x)
    assert result.converged and bool(result.log_likelihood.isfinite().all())
    own = fit_em(PPCA.like(x / 1e300, 2, seed=0), x / 1e300)
    cells = (~np.isnan(x)).sum() / len(x)
    moved = float(own.log_likelihood[-1]) - cells * math.log(1e300)
    assert float(result.log_likelihood[-1]) == pytest.approx(moved, abs=1e-7)


def test_a_start_without_a_finite_likelihood_is_rejected():
    x = oracles.with_missing_values(gaussian((60, 5), 3), 0.3, 1)
    ppca = PPCA.like(x, 2, seed=0).assign(noise_scale=1e-200)
    with pytest.raises((FloatingPointError, ValueError), match=r"start from PPCA\.like\(x\)"):
        fit_em(ppca, x)


@pytest.mark.parametrize("size", [1e-9, 1e-12])
@pytest.mark.parametrize("fit", [fit_em, variational_em])
@pytest.mark.parametrize("missing", [0.0, 0.05])
def test_the_bound_is_monotone_with_collinear_columns(size, fit, missing):
    x = oracles.with_missing_values(collinear(size), missing, 3)
    for latent_dim in (1, 3):
        result = fit(PPCA.like(x, latent_dim, seed=0), x)
        assert (result.objective[::2].diff() > -TOLERANCE).all()
        assert result.converged and not has_note(result, ILL_CONDITIONED)


@pytest.mark.parametrize("size", [1e-9, 1e-12])
@pytest.mark.parametrize("fit", [fit_em, variational_em])
@pytest.mark.parametrize("missing", [0.0, pytest.param(0.05, marks=pytest.mark.slow)])
def test_noise_of_the_size_of_rounding_is_noted(size, fit, missing):
    """With K = 4 the noise is the tiny difference of two columns."""
    x = oracles.with_missing_values(collinear(size), missing, 3)
    try:
        result = fit(PPCA.like(x, 4, seed=0), x)
    except ValueError as error:
        assert missing and "too little for float64" in str(error)
        return
    assert (result.objective[::2].diff() > -TOLERANCE).all()
    assert has_note(result, ILL_CONDITIONED)


def test_without_rotation_the_fit_does_not_restart_at_a_rotation():
    """Diagonal q converges slowly in the rotation, as in theory: the fit must not hide it."""
    x = oracles.simulate_ppca((16.0, 4.0), 1.0, 100, 6, seed=0)
    ppca = PPCA.like(x, 2, seed=0)
    result = variational_em(ppca, x, rotate=False, max_iterations=60)
    assert not has_note(result, RESTARTED) and not result.converged
    best = oracles.closed_form_log_likelihood(oracles.sample_spectrum(x)[0], 2)
    here = float(variational_em(ppca, x, rotate=False, max_iterations=1).objective[0])
    assert result.certificate == pytest.approx(best - here, rel=1e-6)


def test_the_certificate_at_max_iterations_is_the_remaining_gain():
    x = TABLES["raw wine"]()
    result = fit_em(PPCA.like(x, 4, seed=0), x, max_iterations=5)
    best = oracles.long_closed_form_log_likelihood(oracles.long_spectrum(x), 4)
    assert result.stopped == "after max_iterations=5" and not result.converged
    assert result.certificate == pytest.approx(best - float(result.log_likelihood[-1]), rel=1e-6)


@pytest.mark.parametrize("latent_dim", [2, 250])
def test_a_table_too_large_for_qr_reaches_the_closed_form(latent_dim, monkeypatch):
    """The scatter matrix is formed, and factored where its rounding would hide the noise."""
    monkeypatch.setattr(sufficient_statistics, "MAX_QR_COST", 0)
    monkeypatch.setattr(sufficient_statistics, "MAX_JACOBI_SIZE", 128)
    x = gaussian((400, 260), 0, np.linspace(5, 1, 260))
    x[:, :3] *= [1e4, 30, 10]
    best = oracles.closed_form_log_likelihood(oracles.sample_spectrum(x)[0], latent_dim)
    ends = [fit_closed_form(PPCA.like(x, latent_dim, seed=0), x)]
    ends.append(fit_em(PPCA.like(x, latent_dim, seed=0), x, tol=1e-6, max_iterations=2000))
    assert float(ends[0].log_likelihood[-1]) == pytest.approx(best, abs=1e-6)
    assert ends[1].converged
    assert float(ends[1].log_likelihood[-1]) == pytest.approx(best, abs=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("standard", [False, True], ids=["raw", "standardised"])
@pytest.mark.parametrize(
    "load", [load_wine, load_iris, load_diabetes, load_linnerud, load_breast_cancer]
)
def test_the_data_sets_of_scikit_learn(load, standard):
    x = load().data
    x = (x - x.mean(0)) / x.std(0) if standard else x
    values, worst, saddles = oracles.long_spectrum(x), 0.0, 0
    for latent_dim in range(1, x.shape[1]):
        best = oracles.long_closed_form_log_likelihood(values, latent_dim)
        for algorithm in ("PX-EM", "variational EM"):
            for seed in range(4):
                result = ALGORITHMS[algorithm](PPCA.like(x, latent_dim, seed=seed), x)
                assert_optimum_or_certificate(result, best)
                assert result.converged
                worst = max(worst, best - float(result.log_likelihood[-1]))
                saddles += has_note(result, RESTARTED)
    print(f"{load.__name__}, {'standardised' if standard else 'raw'}: at most {worst:.1e} nats "
          f"per datum below the closed form, {saddles} fits restarted")  # fmt: skip


# Missing values


def parameters(ppca):
    scale = ppca.noise_scale.detach().numpy()
    return ppca.loadings.detach().numpy(), ppca.loc.detach().numpy(), scale**2


def assert_no_improvement_by_lbfgs(x, latent_dim, noise, seeds):
    ends = []
    for seed in range(seeds):
        ppca = PPCA.like(x, latent_dim, noise=noise, seed=seed)
        result = fit_em(ppca, x)
        assert result.converged
        ends.append(float(result.log_likelihood[-1]))
    here, best = lbfgs.maximize_from(x, *parameters(ppca))
    assert here == pytest.approx(ends[-1], abs=1e-7)
    assert best - here < 1e-7
    return np.array(ends)


MISSING = {
    "wine, 5 %": (lambda: load_wine().data, 0.05, 7),
    "an id column, 30 %": (TABLES["an id column"], 0.3, 2),
    "a column times 1000, 30 %": (one_large_column, 0.3, 3),
    "mixed units, 5 %": (TABLES["units from 1e-6 to 1e6"], 0.05, 3),
    "Cauchy, 30 %": (TABLES["Cauchy"], 0.3, 2),
}


@pytest.mark.parametrize("name", combinations.one_in(2, MISSING))
def test_with_missing_values_seeds_agree_and_lbfgs_finds_no_improvement(name):
    table, fraction, latent_dim = MISSING[name]
    x = oracles.with_missing_values(table(), fraction, 42)
    assert np.ptp(assert_no_improvement_by_lbfgs(x, latent_dim, "isotropic", 3)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.05, 0.3])
@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
@pytest.mark.parametrize("load", [load_wine, load_iris, load_diabetes])
def test_with_missing_values_twenty_starts_and_lbfgs(load, noise, fraction):
    x = oracles.with_missing_values(load().data, fraction, 42)
    for latent_dim in (1, 2, 3):
        if latent_dim >= x.shape[1] - 1:
            continue
        ends = assert_no_improvement_by_lbfgs(x, latent_dim, noise, 20)
        num_lower = int((ends < ends.max() - TOLERANCE).sum())
        print(
            f"{load.__name__}, {noise}, {fraction:.0%}, K = {latent_dim}: {num_lower} of 20 "
            f"starts end lower, by {np.ptp(ends):.1e} nats per datum at most"
        )


def test_the_expected_covariance_matches_a_loop_over_rows():
    x = oracles.with_missing_values(gaussian((30, 6), 1), 0.3, 2)
    ppca = PPCA.like(x, 2, noise="diagonal", seed=0)
    loadings, loc, variance = parameters(ppca)
    C, total = loadings @ loadings.T + np.diag(variance), np.zeros((6, 6))
    for row in x:
        s, m = ~np.isnan(row), np.isnan(row)
        gain = C[np.ix_(m, s)] @ np.linalg.inv(C[np.ix_(s, s)])
        off = np.where(s, row - loc, 0.0)
        off[m] = gain @ off[s]
        total += np.outer(off, off)
        total[np.ix_(m, m)] += C[np.ix_(m, m)] - gain @ C[np.ix_(s, m)]
    tensors = LinearGaussianParameters(*(torch.from_numpy(v) for v in (loadings, loc, variance)))
    blocks = RowBlocks(torch.from_numpy(x))
    factor = expected_covariance_factor(blocks, tensors)
    np.testing.assert_allclose(factor.T @ factor, total / len(x), rtol=1e-9, atol=1e-12)
    whitened = total / len(x) / np.sqrt(np.outer(variance, variance))
    values, axes, rest = expected_leading_eigenpairs(blocks, tensors)
    expected = np.linalg.eigvalsh(whitened)[::-1]
    np.testing.assert_allclose(values, expected[:2], rtol=1e-9)
    assert float(rest) == pytest.approx(expected[2:].sum(), rel=1e-9)
    np.testing.assert_allclose(whitened @ axes.numpy(), (axes * values).numpy(), atol=1e-9)


def test_em_escapes_a_saddle_point_with_missing_values_in_many_columns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 3)) * [6, 4, 3] @ rng.normal(size=(3, 300)) + rng.normal(
        size=(120, 300)
    )
    x = oracles.with_missing_values(x, 0.2, 1)
    filled = np.where(np.isnan(x), np.nanmean(x, 0), x)
    axes = np.linalg.svd(filled - filled.mean(0))[2]
    ppca = PPCA.like(x, 2, seed=0)
    ppca.assign(loadings=torch.from_numpy(axes[1:3].T.copy() * 20.0))  # the first axis is missing
    ends = [fit_em(model, x, tol=1e-7) for model in (ppca, PPCA.like(x, 2, seed=1))]
    assert ends[0].converged and ends[1].converged
    assert float(ends[0].log_likelihood[-1]) == pytest.approx(
        float(ends[1].log_likelihood[-1]), abs=1e-5
    )


# Diagonal noise


def profile_log_likelihood(covariance, log_variance, latent_dim):
    """-1/2 (sum log psi + tr S* + sum over the first K t > 1 of log t + 1 - t), densely."""
    scale = np.exp(log_variance / 2)
    values = np.linalg.eigvalsh(covariance / np.outer(scale, scale))[::-1]
    kept = values[:latent_dim]
    kept = kept[kept > 1]
    return -0.5 * (log_variance.sum() + values.sum() + (np.log(kept) + 1 - kept).sum())


def test_the_profile_likelihood_and_its_derivatives_match_finite_differences():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 5)) + rng.normal(size=(50, 5))
    covariance = np.cov(x.T, bias=True)
    log_variance = np.log(np.diag(covariance) * rng.uniform(0.2, 0.8, size=5))
    factor = torch.from_numpy(np.linalg.cholesky(covariance).T.copy())
    profile = ProfileLikelihood.of(factor, torch.from_numpy(np.exp(log_variance)), 2)
    assert float(profile.log_likelihood) == pytest.approx(
        profile_log_likelihood(covariance, log_variance, 2), rel=1e-12
    )
    gradient, hessian = profile.derivatives()
    steps = 1e-4 * np.eye(5)
    for i in range(5):
        up, down = (
            profile_log_likelihood(covariance, log_variance + s * steps[i], 2) for s in (1, -1)
        )
        assert float(gradient[i]) == pytest.approx((up - down) / 2e-4, abs=1e-6)
        for j in range(5):
            corners = [
                profile_log_likelihood(covariance, log_variance + a * steps[i] + b * steps[j], 2)
                for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1))
            ]
            second = (corners[0] - corners[1] - corners[2] + corners[3]) / 4e-8
            assert float(hessian[i, j]) == pytest.approx(second, abs=1e-5)


def test_newton_s_method_finds_a_maximum_above_the_floors():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 6)) + rng.normal(size=(60, 6))
    covariance = SampleCovariance.of(x)
    variance = covariance.diagonal
    profile = maximize_profile_likelihood(covariance.factor, variance / 2, variance * 0.3, 2)
    gradient, _ = profile.derivatives()
    free = profile.variance > variance * 0.3 * (1 + 1e-9)
    assert gradient[free].abs().max() < 1e-6
    assert (gradient[~free] < 0).all() and bool((~free).any()) and bool(free.any())


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_lbfgs_finds_no_improvement_of_factor_analysis(latent_dim):
    x = load_wine().data
    ppca = PPCA.like(x, latent_dim, noise="diagonal", seed=0)
    result = fit_em(ppca, x)
    here, best = lbfgs.maximize_from(x, *parameters(ppca))
    assert result.converged
    assert best - here == pytest.approx(result.certificate, abs=1e-9)
    assert best - here < TOLERANCE


def test_gains_of_the_size_of_the_tolerance_are_not_noted():
    run = object.__new__(EMRun)  # the notes depend on these fields only
    run.state, run.tol, run.converged = types.SimpleNamespace(notes=tuple), 1e-9, True
    run.restart_gains = (3e-9, 0.25)
    (note,) = run.notes()
    assert note.startswith(RESTARTED) and "once" in note and "(a gain of 0.25 nats" in note
    run.restart_gains = (3e-9,)
    assert run.notes() == ()


def test_the_best_of_several_starts_is_returned():
    x = gaussian((40, 6), 4)  # white noise, for which factor analysis has several maxima
    ends = []
    for seed in range(4):
        fit = fit_em(PPCA.like(x, 2, noise="diagonal", seed=seed), x, tol=1e-6, max_iterations=300)
        ends.append(float(fit.objective[-1]))
    assert np.ptp(ends) > 1e-3
    worst = PPCA.like(x, 2, noise="diagonal", seed=int(np.argmin(ends)))
    result = fit_em(worst, x, starts=6, tol=1e-6, max_iterations=300)
    assert float(result.objective[-1]) > min(ends) + 1e-3
    assert float(worst.log_likelihood(x).mean().detach()) == pytest.approx(
        float(result.log_likelihood[-1]), abs=1e-6
    )
    assert any("of 6 starts end at lower maxima, up to" in note for note in result.notes)
    with pytest.raises(ValueError, match="starts must be a whole number >= 1; got 0"):
        fit_em(PPCA.like(x, 2, seed=0), x, starts=0)


# The best parameters for a covariance


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_the_best_parameters_of_each_family_match_theory(latent_dim):
    x = gaussian((80, 6), 3, np.array([5, 4, 3, 0.5, 0.4, 0.3]))
    values, _ = oracles.sample_spectrum(x)
    top = oracles.closed_form_log_likelihood(values, latent_dim)
    expected = {
        "full": top,
        "diagonal": top,
        "isotropic": top - oracles.isotropic_price(values[:latent_dim]),
        "unit": oracles.optimal_unit_q(values, latent_dim)[2],
    }
    leading = SampleCovariance.of(x).leading(latent_dim, torch.ones(6, dtype=torch.float64))
    for family, best in expected.items():
        loadings, variance = best_parameters(
            leading, torch.ones(6, dtype=torch.float64), isotropic=True, family=family
        )
        found = oracles.mean_elbo(x, x.mean(0), loadings.numpy(), float(variance[0]), family)
        assert found == pytest.approx(best, rel=1e-12)


def test_an_axis_below_the_noise_of_a_unit_q_is_zero():
    """The formula for all axes would give a column a negative squared norm."""
    x = gaussian((80, 6), 3, np.array([5, 3, 2, 1.5, 1, 0.5]))
    values, _ = oracles.sample_spectrum(x)
    assert (oracles.optimal_unit_q(values, 4)[1] < 0).any()
    ones = torch.ones(6, dtype=torch.float64)
    leading = SampleCovariance.of(x).leading(4, ones)
    loadings, variance = best_parameters(leading, ones, isotropic=True, family="unit")
    norms = loadings.square().sum(0).numpy()
    assert norms[3] == norms[2] == 0 and (norms[:2] > 0).all()

    def bound(W, noise):
        return oracles.mean_elbo(x, x.mean(0), W, noise, "unit")

    top, W, noise = (
        bound(loadings.numpy(), float(variance[0])),
        loadings.numpy(),
        float(variance[0]),
    )
    assert top == pytest.approx(oracles.optimal_unit_q(values, 2)[2], rel=1e-12)
    fourth = np.linalg.svd(x - x.mean(0))[2][3]
    for size in (1e-3, 1e-2, 0.1):
        moved = W.copy()
        moved[:, 3] = size * fourth
        assert bound(moved, noise) < top
        assert max(bound(W * (1 + size), noise), bound(W * (1 - size), noise)) < top
        assert max(bound(W, noise * (1 + size)), bound(W, noise * (1 - size))) < top


def test_singular_values_are_accurate_for_columns_of_any_unit():
    x = gaussian((30, 6), 0, 10.0 ** np.array([12, 0, 3, 6, 9, -3]))
    values, axes = right_singular_vectors(torch.from_numpy(x - x.mean(0)))
    expected = np.sqrt((oracles.long_spectrum(x) * len(x)).astype(float))
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    torch.testing.assert_close(axes.T @ axes, torch.eye(6, dtype=torch.float64))
