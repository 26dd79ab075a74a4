"""Variational Bayes against a slow coordinate ascent, quadrature, and known limits."""

import inspect
import itertools

import bayesian_oracles
import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy.linalg import subspace_angles
from sklearn.datasets import load_iris

from ppl_vae import ELBO, PPCA, BayesianPPCA, fit_closed_form, fit_vb, log_likelihood
from ppl_vae.inference import VBResult
from ppl_vae.models import InverseGammaScale
from ppl_vae.models.linear.observed_gaussian import ObservedGaussian
from ppl_vae.models.linear.table_statistics import TableStatistics

N, D, K = 14, 4, 2
NOISES = ("isotropic", "diagonal")
PRIORS = ("normal", "ard")
TOL = 1e-12
EACH_MODEL = pytest.mark.parametrize(
    ("noise", "prior", "missing"), list(itertools.product(NOISES, PRIORS, (False, True)))
)


def data(missing=False, seed=0, N=N, D=D):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, 2)) @ rng.normal(size=(2, D)) + 0.4 * rng.normal(size=(N, D)) + 3
    return oracles.with_missing_values(x, 0.3, seed) if missing else x


def like(x, latent_dim=K, *, noise="isotropic", prior="normal", marginal=False):
    model = BayesianPPCA.like(x, latent_dim, noise=noise, prior=prior, marginal=marginal)
    return model.double()


def prior_arrays(model):
    """The priors of a model as the oracle takes them."""
    noise, loc, relevance = model.noise_prior, model.loc_prior, model.relevance_prior
    rate, shape = noise.rate.numpy(), noise.concentration.numpy()
    return {
        "s": model.loadings_prior.scale[:, 0].numpy(),
        "m": loc.loc.numpy(),
        "c": loc.scale.numpy(),
        "a": shape if model.noise == "diagonal" else float(shape),
        "b": rate if model.noise == "diagonal" else float(rate),
        "alpha": None if relevance is None else tuple(float(part) for part in relevance.buffers()),
    }


def oracle_at(guide, model, x):
    """The slow coordinate ascent, started from the posterior that a guide holds."""
    covariances = guide.row_tril @ guide.row_tril.mT
    noise = guide.noise_concentration.numpy(), guide.noise_rate.numpy()
    relevance = None
    if model.prior == "ard":
        relevance = guide.relevance_concentration.numpy(), guide.relevance_rate.numpy()
    rows = guide.row_mean.numpy().copy(), covariances.numpy().copy()
    return bayesian_oracles.MeanField(x, prior_arrays(model), *rows, noise, relevance)


# The bound and its maximum


@EACH_MODEL
def test_a_slow_coordinate_ascent_agrees_on_the_bound_and_its_maximum(noise, prior, missing):
    x = data(missing)
    model = like(x, noise=noise, prior=prior)
    fit = fit_vb(model, x, tol=TOL, seed=0)
    slow = oracle_at(fit.guide, model, x)
    # A relative error of 1e-12 in some 60 nats.
    assert abs(slow.bound() - fit.bound) < 1e-9
    rows = slow.rows.copy()
    slow.sweep()
    # At a maximum a step moves the parameters by the root of what it gains.
    assert 0 <= slow.bound() - fit.bound + 1e-10 < 1e-8
    np.testing.assert_allclose(slow.rows, rows, atol=1e-4)


@pytest.mark.slow
def test_a_slow_coordinate_ascent_from_elsewhere_ends_at_the_same_bound():
    x = data(D=2, N=8)
    model = like(x, 1)
    slow = bayesian_oracles.MeanField(
        x,
        prior_arrays(model),
        np.array([[0.3, 2.0], [-0.4, 4.0]]),
        np.tile(np.eye(2), (2, 1, 1)),
        (1.0, 1.0),
        None,
    )
    bounds = []
    for _ in range(200):
        slow.sweep()
        bounds.append(slow.bound())
    assert min(np.diff(bounds)) > -1e-10
    fit = fit_vb(model, x, tol=TOL, seed=0)
    assert abs(fit.bound - bounds[-1]) < 1e-6
    np.testing.assert_allclose(fit.loc, slow.rows[:, 1], atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_the_bound_is_below_the_log_evidence(seed):
    x = data(D=2, N=25, seed=seed)
    model = like(x, 1)
    prior = prior_arrays(model)
    evidence = bayesian_oracles.log_evidence_by_quadrature(x, prior)
    coarse = bayesian_oracles.log_evidence_by_quadrature(x, prior, sizes=(61, 61, 61))
    assert abs(evidence - coarse) < 1e-3  # the quadrature has converged
    gap = evidence - fit_vb(model, x, seed=0).bound
    # At least log 2, because q describes one of the two signs of W; each of the four pairs of
    # factors that are taken to be independent costs less than one nat here.
    assert np.log(2) < gap < np.log(2) + 4


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("noise", NOISES)
def test_rotation_changes_the_number_of_iterations_and_not_the_end(noise, missing):
    x, tol = data(missing, N=30), 1e-8
    model = like(x, noise=noise)
    rotated, plain = (fit_vb(model, x, tol=tol, rotate=rotate, seed=0) for rotate in (True, False))
    assert rotated.converged and plain.converged and rotated.steps < plain.steps
    # ``tol`` is in nats per datum, and what is still to be gained is extrapolated.
    assert abs(float(rotated.objective[-1] - plain.objective[-1])) < 100 * tol


@pytest.mark.parametrize("noise", NOISES)
def test_under_ard_rotation_saves_most_iterations(noise):
    x = data(N=30)
    model = like(x, noise=noise, prior="ard")
    rotated = fit_vb(model, x, tol=1e-8, seed=0)
    more = 3 * rotated.steps
    plain = fit_vb(model, x, tol=1e-8, max_iterations=more, rotate=False, seed=0)
    assert rotated.converged and not plain.converged
    assert plain.objective[-1] < rotated.objective[-1]


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_under_ard_rotation_does_not_change_the_end(noise):
    x, tol = data(N=30), 1e-9
    model = like(x, noise=noise, prior="ard")
    rotated = fit_vb(model, x, tol=tol, seed=0)
    plain = fit_vb(model, x, tol=tol, max_iterations=50_000, rotate=False, seed=0)
    # Along rotations alone the gains of an iteration are a thousandth of those still to come.
    assert plain.converged
    assert 0 <= float(rotated.objective[-1] - plain.objective[-1]) < 1000 * tol


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("noise", NOISES)
def test_the_bound_never_decreases(noise, prior, rotate):
    x = data(missing=True)
    model = like(x, 3, noise=noise, prior=prior)
    fit = fit_vb(model, x, tol=1e-14, max_iterations=150, rotate=rotate, seed=0)
    assert float(fit.objective.diff().min()) > -1e-12
    # It did not stop because a decrease was taken for rounding.
    assert fit.stopped != "converged to rounding" or float(fit.objective.diff()[-1]) < 1e-11


def test_the_map_of_the_latent_variables_leaves_no_gain_to_a_numerical_search():
    """No matrix near the one in closed form has a higher bound."""
    x = data(N=30)
    for prior in PRIORS:
        model = like(x, prior=prior)
        fit = fit_vb(model, x, tol=TOL, seed=0)
        rng = np.random.default_rng(0)
        for size in (1e-1, 1e-2):
            for _ in range(10):
                moved = oracle_at(fit.guide, model, x)
                U = np.eye(K + 1)
                U[:K] += size * rng.normal(size=(K, K + 1))
                inverse = np.linalg.inv(U)
                moved.rows = moved.rows @ inverse
                moved.covariances = inverse.T @ moved.covariances @ inverse
                moved.update_latents()
                assert moved.bound() < fit.bound


# Limits


def test_narrow_priors_give_the_density_at_their_means():
    x = data()
    centre, sigma, width = np.full(D, 3.0), 0.8, 1e-6
    concentration = 1e12  # of sigma^-2: a relative standard deviation of 1e-6
    model = BayesianPPCA(
        D,
        K,
        loadings_prior=dist.Normal(0.0, width),
        loc_prior=dist.Normal(torch.tensor(centre), width),
        noise_prior=InverseGammaScale(concentration, concentration * sigma**2),
    ).double()
    expected = oracles.log_density(x, centre, np.zeros((D, 1)), sigma**2).sum()
    # log p at the means of the priors changes by about (width * its derivative)^2; the digits that
    # the gamma distributions lose are 1e12 times the rounding error.
    assert abs(fit_vb(model, x, seed=0).bound - expected) < 1e-2


def test_many_data_give_the_maximum_likelihood():
    x = oracles.simulate_ppca((9.0, 4.0), 0.5, 100_000, 6, seed=0)
    model = like(x, 2)
    fit, ppca = fit_vb(model, x, seed=0), PPCA.like(x, 2, seed=0).double()
    fit_closed_form(ppca, x)
    # Priors count as a few data.
    tolerance = 10 / len(x)
    angles = subspace_angles(fit.loadings.numpy(), ppca.loadings.detach().numpy())
    assert angles.max() < tolerance
    assert abs(fit.noise_scale / ppca.noise_scale.item() - 1) < tolerance
    np.testing.assert_allclose(fit.loc, x.mean(0), atol=tolerance)
    covariance = fit.loadings @ fit.loadings.T
    expected = (ppca.loadings @ ppca.loadings.T).detach()
    np.testing.assert_allclose(covariance, expected, rtol=2e-3, atol=2e-3)


def test_units_of_the_data_move_the_bound_by_their_jacobian():
    x = data(missing=True)
    for noise in NOISES:
        before = fit_vb(like(x, noise=noise, prior="ard"), x, tol=TOL, seed=0)
        after = fit_vb(like(10 * x, noise=noise, prior="ard"), 10 * x, tol=TOL, seed=0)
        jacobian = np.log(10) * (~np.isnan(x)).sum()
        assert abs(before.bound - after.bound - jacobian) < 1e-7
        np.testing.assert_allclose(after.active_share, before.active_share, atol=1e-4)


@pytest.mark.parametrize("noise", NOISES)
def test_ard_switches_off_the_columns_that_the_data_do_not_need(noise):
    x = oracles.simulate_ppca((9.0, 4.0), 0.5, 200, 6, seed=1)
    fit = fit_vb(like(x, 5, noise=noise, prior="ard"), x, seed=0)
    assert fit.active.tolist() == [True, True, False, False, False]
    assert "2 of 5 columns of W are active" in repr(fit)
    assert fit.relevance[2:].min() > 5 * fit.relevance[:2].max()
    white = oracles.simulate_ppca((1.1,), 1.0, 200, 6, seed=1)
    assert not fit_vb(like(white, 3, noise=noise, prior="ard"), white, seed=0).active.any()


def test_a_relevance_prior_of_small_rate_switches_columns_off_in_larger_tables():
    x = oracles.simulate_ppca((9.0, 4.0), 0.5, 2000, 6, seed=1) * np.arange(1, 7)
    x += np.random.default_rng(0).normal(size=x.shape)  # factors that explain chance alone
    wide = BayesianPPCA.like(x, 5, prior="ard", relevance_prior=dist.Gamma(1.0, 0.1)).double()
    sparse, dense = (fit_vb(m, x, seed=0) for m in (like(x, 5, prior="ard"), wide))
    assert int(sparse.active.sum()) <= int(dense.active.sum())
    assert sparse.relevance.max() > 100 > dense.relevance.max()


def test_iris_switches_one_axis_of_three_off():
    """Variational Bayes shrinks too much here: by bridge sampling p(K = 3 | x) is near one."""
    x = load_iris().data
    fit = fit_vb(like(x, 3, prior="ard"), x, seed=0)
    assert int(fit.active.sum()) == 2 and fit.converged and fit.steps < 100


# Data


def test_blocks_memory_maps_and_statistics_give_the_same(tmp_path):
    x = data(N=40)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    model = like(x, prior="ard")
    expected = fit_vb(model, x, tol=TOL, seed=0).bound
    for source in ([x[:7], x[7:]], mapped, TableStatistics.of(x), torch.tensor(x)):
        assert abs(fit_vb(model, source, tol=TOL, seed=0).bound - expected) < 1e-9


def test_a_mask_marks_missing_values_and_rows_have_no_order():
    x = data(missing=True)
    model, mask = like(x), ~np.isnan(x)
    expected = fit_vb(model, x, tol=TOL, seed=0).bound
    filled = np.where(mask, x, 7.0)
    assert abs(fit_vb(model, filled, mask=mask, tol=TOL, seed=0).bound - expected) < 1e-9
    order = np.random.default_rng(0).permutation(N)
    assert abs(fit_vb(model, x[order], tol=TOL, seed=0).bound - expected) < 1e-9
    complete = data()
    everything = np.ones_like(complete, dtype=bool)
    results = [fit_vb(like(complete), complete, mask=m, seed=0) for m in (None, everything)]
    assert results[0].bound == results[1].bound


def test_a_model_in_float32_is_fitted_in_float64():
    x = data()
    double, single = like(x), like(x).float()
    fits = [fit_vb(model, x, seed=0) for model in (double, single)]
    assert fits[1].loadings.dtype == torch.float64
    assert fits[1].guide.row_mean.dtype == torch.float32
    # The priors are rounded to float32.
    assert abs(fits[0].bound - fits[1].bound) < 1e-4


def test_seeds_repeat_and_leave_the_generators():
    x = data()
    before = torch.get_rng_state()
    first, second = (fit_vb(like(x), x, seed=3) for _ in range(2))
    assert torch.equal(first.objective, second.objective)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_result_is_saved_without_its_guide():
    x = data()
    fit = fit_vb(like(x, prior="ard"), x, seed=0)
    again = VBResult.from_dict(fit.to_dict())
    assert again.bound == fit.bound and again.guide is None
    assert torch.equal(again.active, fit.active) and torch.equal(again.loadings, fit.loadings)
    assert list(fit.to_frame()["relevance"][:K]) == fit.relevance.tolist()


# The guide


@EACH_MODEL
def test_pyros_elbo_of_the_guide_is_the_bound(noise, prior, missing):
    x = data(missing)
    model = like(x, noise=noise, prior=prior)
    fit = fit_vb(model, x, seed=0)
    mask = torch.tensor(~np.isnan(x)) if missing else None
    values = torch.tensor(x).nan_to_num()
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        pyro.set_rng_seed(0)
        estimates = [-elbo.loss(model.model, fit.guide, values, mask=mask) for _ in range(20)]
    error = np.std(estimates, ddof=1) / np.sqrt(len(estimates))
    # A t distribution of 19 degrees of freedom: 7.5 standard errors at the rate of failures.
    assert abs(np.mean(estimates) - fit.bound) < 7.5 * error
    assert error < 0.1


@pytest.mark.parametrize("noise", NOISES)
def test_the_packages_elbo_and_predictive_density_take_the_guide(noise):
    x, new = data(), torch.tensor(data(seed=1))
    model = like(x, noise=noise)
    fit = fit_vb(model, x, seed=0)
    pyro.set_rng_seed(0)
    elbo = ELBO(num_samples=500)
    with torch.no_grad():
        estimates = [-float(elbo.loss(model.model, fit.guide, torch.tensor(x))) for _ in range(20)]
    error = np.std(estimates, ddof=1) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - fit.bound) < 7.5 * error
    # The posterior predictive density, z integrated out by hand.
    draws = fit.guide.draw_parameters(4000, seed=0)
    scale = draws.noise_scale.reshape(4000, 1, -1).expand(4000, 1, D)
    density = ObservedGaussian(draws.loadings[:, None], draws.loc[:, None], scale)
    weights = density.log_prob(new).exp()
    expected = weights.mean(0).log()
    error = weights.std(0) / weights.mean(0) / 4000**0.5
    found = log_likelihood(model.model, fit.guide, new, num_samples=4000, seed=0)
    z = (found.value - expected) / (error.square() + found.standard_error.square()).sqrt()
    assert z.abs().max() < oracles.z_limit(N)


def test_a_guide_of_a_marginal_model_has_no_latent_variables():
    x = data()
    fit = fit_vb(like(x, marginal=True), x, seed=0)
    trace = poutine.trace(fit.guide).get_trace()
    assert set(trace.stochastic_nodes) == {"loadings", "loc", "noise_scale"}
    full = fit_vb(like(x), x, seed=0).guide
    assert "z" in poutine.trace(full).get_trace(torch.tensor(x)).stochastic_nodes
    with pytest.raises(ValueError, match="needs x"):
        full()


def test_the_density_of_the_rows_is_jointly_normal():
    x = data()
    guide = fit_vb(like(x), x, seed=0).guide
    pyro.set_rng_seed(0)
    trace = poutine.trace(guide).get_trace(torch.tensor(x))
    trace.compute_log_prob()
    nodes = trace.nodes
    rows = torch.cat([nodes["loadings"]["value"], nodes["loc"]["value"][:, None]], 1)
    joint = dist.MultivariateNormal(guide.row_mean, scale_tril=guide.row_tril)
    expected = joint.log_prob(rows).sum()
    found = nodes["loadings"]["log_prob_sum"] + nodes["loc"]["log_prob_sum"]
    assert abs(found - expected) < 1e-9


def test_draws_have_the_moments_of_the_posterior():
    x = data()
    fit = fit_vb(like(x, prior="ard", noise="diagonal"), x, seed=0)
    draws = fit.guide.draw_parameters(20_000, seed=0)
    again = fit.guide.draw_parameters(20_000, seed=0)
    assert torch.equal(draws.loadings, again.loadings)
    assertions = 2 * D + D * K + K
    for found, mean, sd in (
        (draws.loadings, fit.loadings, fit.loadings_sd),
        (draws.loc, fit.loc, fit.loc_sd),
        (draws.noise_scale, fit.noise_scale, fit.noise_scale_sd),
        (draws.relevance, fit.relevance, fit.relevance_sd),
    ):
        z = (found.mean(0) - mean) / (sd / len(found) ** 0.5)
        assert z.abs().max() < oracles.z_limit(assertions)
        np.testing.assert_allclose(found.std(0), sd, rtol=0.05)


def test_the_guide_takes_minibatches_and_new_data():
    x = data(missing=True)
    guide = fit_vb(like(x), x, seed=0).guide
    mask, values = torch.tensor(~np.isnan(x)), torch.tensor(x).nan_to_num()
    rows = torch.tensor([5, 2])
    part = guide.distribution(values[rows], mask=mask[rows])
    torch.testing.assert_close(part.mean, guide.distribution(values, mask=mask).mean[rows])
    trace = poutine.trace(guide).get_trace(values[rows], mask=mask[rows], index=rows, num_data=N)
    assert trace.nodes["z"]["scale"] == N / 2
    with pytest.raises(ValueError, match=r"shape \(rows, 4\)"):
        guide.distribution(torch.zeros(3, 5))


# Bad input


def test_priors_that_are_not_conjugate_are_named():
    x = data()
    model = BayesianPPCA(D, K, noise_prior=dist.HalfNormal(1.0), loc_prior=dist.Cauchy(0.0, 1.0))
    with pytest.raises(ValueError, match=r"loc_prior, noise_prior of the model are not.*nuts"):
        fit_vb(model, x)
    slanted = BayesianPPCA(D, K, loadings_prior=dist.Normal(0.0, torch.tensor([1.0, 2.0])))
    with pytest.raises(ValueError, match="loadings_prior of the model is not"):
        fit_vb(slanted, x)


def test_other_models_and_other_widths_are_refused():
    x = data()
    with pytest.raises(TypeError, match="model is a PPCA"):
        inspect.unwrap(fit_vb)(PPCA(D, K), x)
    with pytest.raises(ValueError, match="x must have 5 columns, as the model has; it has 4"):
        fit_vb(BayesianPPCA(5, 2), x)
    with pytest.raises(ValueError, match="latent_dim must be smaller than data_dim"):
        fit_vb(BayesianPPCA(4, 4), x)
    with pytest.raises(ValueError, match="max_iterations must be a whole number"):
        fit_vb(BayesianPPCA(4, 2), x, max_iterations=0)


def test_what_limits_a_fit_is_noted():
    x = data()
    fit = fit_vb(like(x), x, max_iterations=2, seed=0)
    assert not fit.converged and fit.stopped == "after max_iterations=2"
    assert "not converged: the last iteration still gained" in fit.notes[-1]
    few = fit_vb(like(x, 3), x[:3], seed=0)
    assert "is not smaller than the rank" in few.notes[0]
    assert "contradicts the units" in fit_vb(like(1000 * x), x, seed=0).notes[0]
    constant = np.where(np.arange(D) == 1, 5.0, x)
    assert "constant columns: 1" in fit_vb(like(x), constant, seed=0).notes


@pytest.mark.parametrize("seed", range(12))
def test_tables_of_all_shapes_and_units_are_fitted(seed):
    """Draws from the prior: few rows, more columns than rows, missing values, other units."""
    rng = np.random.default_rng(seed)
    N, D = int(rng.integers(3, 30)), int(rng.integers(2, 9))
    K = int(rng.integers(1, D))
    model = BayesianPPCA(D, K, noise=NOISES[seed % 2], prior=PRIORS[seed // 2 % 2]).double()
    pyro.set_rng_seed(seed)
    x = model.model(num_data=N).numpy() * 10 ** rng.uniform(-2, 2)
    x = oracles.with_missing_values(x, 0.3, seed) if seed % 3 == 0 else x
    fit = fit_vb(model, x, max_iterations=300, seed=seed)
    assert fit.converged and np.isfinite(fit.bound)
    assert fit.objective.diff().min() > 0


def test_relevances_may_have_priors_of_their_own():
    x = data(N=30)
    relevance = dist.Gamma(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.5]))
    model = BayesianPPCA(D, K, prior="ard", relevance_prior=relevance).double()
    fits = [fit_vb(model, x, tol=1e-9, rotate=rotate, seed=0) for rotate in (True, False)]
    assert float(fits[0].objective.diff().min()) > -1e-12
    assert fits[0].bound > fits[1].bound - 1e-4
