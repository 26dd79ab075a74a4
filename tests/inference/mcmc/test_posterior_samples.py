"""Draws from a posterior: invariants, diagnostics, densities and their export to ArviZ."""

import math

import numpy as np
import pytest
import torch

import oracles
from ppl_vae.core.installed_arviz import installed_arviz
from ppl_vae.inference.mcmc.convergence import diagnose
from ppl_vae.inference.mcmc.gibbs import sample_gibbs
from ppl_vae.inference.mcmc.invariants import (
    canonical_loadings,
    covariance,
    mean_parameters,
    subspace_projection,
)
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.inference.mcmc.settings import ChainSettings
from ppl_vae.models.bayesian_ppca import BayesianPPCA, ParameterDraws


def random_parameters(noise="diagonal", shape=(2, 30), data_dim=5, latent_dim=2, spread=0.05):
    """Draws around one point, rotated at random."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    axes = torch.linalg.qr(normal(data_dim, latent_dim)).Q
    loadings = axes * torch.tensor([3.0, 1.5, 1.0][:latent_dim])
    loadings = loadings + spread * normal(*shape, data_dim, latent_dim)
    rotations = torch.linalg.qr(normal(*shape, latent_dim, latent_dim)).Q
    noise_size = () if noise == "isotropic" else (data_dim,)
    scale = (0.1 * normal(*shape, *noise_size) - 1).exp()
    return ParameterDraws(loadings @ rotations, normal(*shape, data_dim), scale, None)


def as_samples(parameters, **values):
    return PosteriorSamples(
        draws=parameters.sites(), sampler="Gibbs", seconds=1.0, num_data=10, **values
    )


@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
def test_invariants_do_not_change_under_rotations(noise):
    parameters = random_parameters(noise)
    angle = torch.tensor(0.7).double()
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    rotated = parameters._replace(loadings=parameters.loadings @ rotation)
    for function in (covariance, subspace_projection, lambda p: canonical_loadings(p).loadings):
        torch.testing.assert_close(function(rotated), function(parameters))


def test_invariants_are_what_their_names_say():
    parameters = random_parameters()
    found = as_samples(parameters).invariants()
    loadings, scale = parameters.loadings[1, 2].numpy(), parameters.noise_scale[1, 2].numpy()
    expected = oracles.ppca_covariance(loadings, scale**2)
    np.testing.assert_allclose(found["covariance"][1, 2].numpy(), expected)
    projection = loadings @ np.linalg.inv(loadings.T @ loadings) @ loadings.T
    np.testing.assert_allclose(found["subspace"][1, 2].numpy(), projection, atol=1e-12)
    canonical = found["canonical_loadings"][1, 2].numpy()
    np.testing.assert_allclose(canonical @ canonical.T, loadings @ loadings.T, atol=1e-12)
    scaled = canonical / scale[:, None]
    off_diagonal = (scaled.T @ scaled)[0, 1]
    assert abs(off_diagonal) < 1e-12 and np.linalg.norm(scaled[:, 0]) > np.linalg.norm(
        scaled[:, 1]
    )


def test_signs_of_canonical_columns_agree_among_draws():
    canonical = canonical_loadings(random_parameters()).loadings.flatten(0, 1)
    mean = canonical.mean(0)
    assert bool(((canonical * mean).sum(1) > 0).all())


def test_the_mean_of_loadings_is_that_of_aligned_draws():
    parameters = random_parameters(spread=0.02)
    flat = ParameterDraws(*(p if p is None else p.flatten(0, 1) for p in parameters))
    mean = mean_parameters(flat)
    outer = (flat.loadings @ flat.loadings.mT).mean(0)
    # E W W' exceeds that of the mean by the variance of W, two columns of 0.02^2.
    torch.testing.assert_close(mean.loadings @ mean.loadings.mT, outer, rtol=0, atol=5e-3)
    assert flat.loadings.mean(0).norm() < 0.7 * mean.loadings.norm()
    torch.testing.assert_close(mean.loc, flat.loc.mean(0))
    assert mean.relevance is None and mean.noise_scale.shape == (5,)
    angle = torch.tensor(0.4).double()
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    again = mean_parameters(flat._replace(loadings=flat.loadings @ rotation)).loadings
    torch.testing.assert_close(again @ again.mT, mean.loadings @ mean.loadings.mT)


def test_canonical_columns_of_equal_strength_are_left_out():
    parameters = random_parameters(latent_dim=3)
    equal = torch.linalg.qr(parameters.loadings).Q  # three singular values of one
    equal = parameters._replace(
        loadings=equal * 2, noise_scale=torch.ones_like(parameters.noise_scale)
    )
    assert canonical_loadings(equal).columns == ()
    assert "canonical_loadings" not in as_samples(equal).invariants()
    assert "3 of 3 canonical columns of the loadings are left out" in repr(as_samples(equal))


def test_log_likelihood_is_the_marginal_one_of_each_row_and_draw():
    parameters = random_parameters("isotropic", shape=(2, 3))
    x = oracles.with_missing_values(np.random.default_rng(0).normal(size=(6, 5)), 0.2, 0)
    value = as_samples(parameters).log_likelihood(x)
    expected = oracles.log_density(
        x,
        parameters.loc[1, 2].numpy(),
        parameters.loadings[1, 2].numpy(),
        float(parameters.noise_scale[1, 2]) ** 2,
    )
    assert value.shape == (2, 3, 6)
    np.testing.assert_allclose(value[1, 2].numpy(), expected)


def test_the_predictive_density_is_the_mean_over_draws_with_its_error():
    x = np.random.default_rng(0).normal(size=(4, 5))
    samples = as_samples(random_parameters("isotropic", shape=(4, 400)))
    found = samples.log_predictive(x)
    log_p = samples.log_likelihood(x).flatten(0, 1)
    expected = log_p.logsumexp(0) - math.log(1600)
    torch.testing.assert_close(found.value, expected)
    # These draws are independent, for which the error is known.
    weights = (log_p - expected).exp()
    exact = weights.std(0) / 40
    assert bool(((found.standard_error / exact).log().abs() < math.log(1.5)).all())


def test_the_predictive_density_of_the_exact_posterior_is_calibrated():
    # A normal mean with known variance: loc has a conjugate posterior, W is zero.
    torch.manual_seed(0)
    loc = torch.randn(4, 20_000, 2).double() * 0.5
    draws = ParameterDraws(
        torch.zeros(4, 20_000, 2, 1).double(), loc, torch.ones(4, 20_000).double(), None
    )
    found = as_samples(draws).log_predictive([[0.3, -1.0]])
    expected = oracles.log_density(np.array([[0.3, -1.0]]), np.zeros(2), np.zeros((2, 1)), 1.25)
    assert abs(float(found.value) - expected[0]) < oracles.z_limit() * float(found.standard_error)


def test_thinning_keeps_every_nth_draw():
    samples = as_samples(random_parameters())
    thinned = samples.thin(7)
    assert thinned.num_samples == 5 and thinned.num_chains == 2
    assert torch.equal(thinned.draws["loc"][:, 1], samples.draws["loc"][:, 7])
    assert samples.parameters().loadings.shape == (60, 5, 2)


def independent(chains=4, number=500, shift=0.0):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(chains, number, 3, dtype=torch.float64, generator=generator)
    draws[0, :, 1] += shift
    return draws


def test_diagnostics_equal_those_of_arviz():
    arviz = installed_arviz()

    draws = independent()
    table = diagnose({"a": draws}).to_frame()
    dataset = arviz.convert_to_dataset(draws.numpy())
    assert table.loc["a", "r_hat"] == pytest.approx(float(arviz.rhat(dataset).x.max()), abs=1e-6)
    bulk = float(arviz.ess(dataset).x.min())
    assert table.loc["a", "ess_bulk"] == pytest.approx(bulk, rel=1e-6)


@pytest.mark.parametrize(
    ("draws", "divergences", "said"),
    [
        (independent(), 0, "^reliable: R-hat is at most 1.00"),
        (independent(shift=1.0), 0, r"^NOT reliable: R-hat of a\[1\] is 1\.\d+, where 1.01"),
        (independent(), 3, "^NOT reliable: 3 transitions diverged"),
        (
            independent(chains=3, number=125),
            0,
            "^NOT reliable: the smallest effective sample size is",
        ),
        (independent(chains=1), 0, "^NOT assessed: R-hat compares chains"),
    ],
)
def test_the_verdict_names_what_fails(draws, divergences, said):
    import re

    assert re.search(said, diagnose({"a": draws}).verdict(divergences))


def test_of_many_elements_some_are_examined_and_their_number_is_stated():
    draws = torch.randn(2, 20, 40, 40, dtype=torch.float64)
    found = diagnose({"covariance": draws}, max_elements=50)
    assert found.elements.tolist() == [50] and found.available.tolist() == [820]
    assert "50 of 820" in repr(found)


@pytest.fixture(scope="module")
def iris_samples():
    from sklearn.datasets import load_iris

    x = load_iris().data[::3]
    model = BayesianPPCA.like(x, 1)
    return x, sample_gibbs(
        model, x, settings=ChainSettings(num_samples=300, warmup=50, seed=0, progress=False)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ArviZ with a new matplotlib
def test_arviz_takes_the_draws(iris_samples):
    arviz = installed_arviz()
    import matplotlib

    matplotlib.use("Agg")
    x, samples = iris_samples
    data = samples.to_arviz(x)
    summary = arviz.summary(data, var_names=["loc", "noise_scale", "canonical_loadings"])
    assert len(summary) == 9
    loo = arviz.loo(data)
    exact = samples.log_predictive(x).value.sum()
    assert float(exact) - 20 < loo.elpd_loo < float(exact)
    mean = samples.draws["loc"].mean((0, 1)).numpy()
    np.testing.assert_allclose(summary["mean"].to_numpy()[:4], mean, atol=1e-3)
    for plot in (arviz.plot_trace, arviz.plot_rank, arviz.plot_forest):
        drawn = plot(data, var_names=["noise_scale"])
        figure = np.asarray(drawn).flat[0].figure
        assert any(ax.lines or ax.collections or ax.patches for ax in figure.axes)
    matplotlib.pyplot.close("all")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_sets_drawn_from_the_posterior_are_given_to_arviz(iris_samples):
    arviz = installed_arviz()
    import matplotlib

    matplotlib.use("Agg")
    x, samples = iris_samples
    data = samples.thin(10).to_arviz(x, predictive=True, seed=0)
    drawn = data["posterior_predictive"]["x"].to_numpy()
    assert drawn.shape == (4, 30, *x.shape)
    np.testing.assert_array_equal(data["observed_data"]["x"].to_numpy(), x)
    # The covariance of all drawn rows is the mean of W W' + Psi plus the variance of mu. With
    # 3,600 rows the relative standard error of a variance is 2.4 %; four of them are allowed.
    found = np.cov(drawn.reshape(-1, 4).T)
    expected = samples.thin(10).invariants()["covariance"].mean((0, 1)).numpy()
    expected = expected + np.cov(samples.thin(10).draws["loc"].flatten(0, 1).T.numpy())
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.05 * expected.max())
    arviz.plot_ppc(data, num_pp_samples=20)
    matplotlib.pyplot.close("all")
    with pytest.raises(ValueError, match="predictive=True needs x"):
        samples.to_arviz(predictive=True)


def test_the_representation_has_verdict_and_table(iris_samples):
    text = repr(iris_samples[1])
    assert (
        "Gibbs, 4 chains of 300 draws of loadings, loc, noise_scale given 50 data points" in text
    )
    assert "reliable" in text and "canonical_loadings" in text and "ESS bulk" in text


def test_saved_draws_come_back(iris_samples):
    samples = iris_samples[1].thin(50)
    again = PosteriorSamples.from_dict(samples.to_dict())
    torch.testing.assert_close(again.draws, samples.draws)
    assert again.model is None and again.parameters().loadings.shape == (24, 4, 1)


def test_data_of_another_width_and_sites_of_other_models_are_refused(iris_samples):
    x, samples = iris_samples
    with pytest.raises(ValueError, match="x must have 4 columns, as many as the data of the fit"):
        samples.log_likelihood(x[:, :3])
    other = PosteriorSamples({"a": torch.zeros(2, 5)}, "NUTS", 1.0, 3)
    with pytest.raises(ValueError, match=r"parameters needs the sites of BayesianPPCA.*\['a'\]"):
        other.parameters()
    assert list(other.invariants()) == ["a"]
