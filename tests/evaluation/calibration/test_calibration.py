"""Simulation-based calibration: exact posteriors pass, and posteriors with known errors fail."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from scipy import stats

from global_pairs import NormalMean
from ppl_vae import BayesianPPCA, ExactGuide, fit_vb, sample_posterior
from ppl_vae import simulation_based_calibration as calibrate
from ppl_vae.evaluation.calibration.rank_uniformity import UniformRanks
from ppl_vae.evaluation.calibration.result import SimulationBasedCalibration
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.models.ppca import PPCA

D, N = 4, 5
MODEL = NormalMean().model  # theta ~ N(0, 2^2 I), x_n ~ N(theta, I)


def posterior(x, shift=0.0, scale=1.0):
    """The mean and the standard deviation of theta given x, with errors."""
    variance = 1 / (len(x) + 1 / 4)
    return variance * x.sum(0) + shift * variance**0.5, scale * variance**0.5


def draws_of(shift=0.0, scale=1.0):
    def fit(x):
        mean, sd = posterior(x, shift, scale)
        return {"theta": mean + sd * torch.randn(99, D)}

    return fit


def draws_of_prior(x):
    return {"theta": 2 * torch.randn(99, D)}


class Exact(PyroModule):
    """The exact posterior as a guide."""

    def forward(self, x, **_):
        mean, sd = posterior(x)
        pyro.sample("theta", dist.Normal(mean, sd).to_event(1))


def run(fit, **others):
    sizes = {"num_simulations": 150, "num_draws": 19, "num_data": N, "data_dim": D}
    others = {**sizes, "seed": 0, **others}
    return calibrate(MODEL, fit, **others)


# Global latent variables


@pytest.mark.parametrize(
    "fit",
    [
        draws_of(),
        pytest.param(Exact(), marks=pytest.mark.slow),
        pytest.param(lambda x: Exact(), marks=pytest.mark.slow),
    ],
    ids=["draws", "guide", "fit"],
)
def test_the_exact_posterior_passes(fit):
    found = run(fit)
    assert found.quantities == (*(f"theta[{k}]" for k in range(D)), "log_joint")
    assert found.ranks.shape == (150, D + 1) and found.ranks.min() >= 0 and found.ranks.max() <= 19
    assert found.rejected == () and found.verdict.startswith("calibrated: in 150 simulations")
    assert found.notes == () and bool(found.effective_draws.isnan().all())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ({"scale": 0.5}, "vary too little"),
        ({"scale": 2.0}, "vary too much"),
        ({"shift": 1.0}, "are too large"),
        ({"shift": -1.0}, "are too small"),
    ],
)
def test_errors_of_the_posterior_are_detected_and_named(error, text):
    found = run(draws_of(**error), quantities={"theta": lambda draws, x: draws["theta"]})
    assert len(found.rejected) == D and f"draws {text}" in found.verdict
    assert found.verdict.startswith("NOT calibrated")


def test_a_posterior_that_ignores_the_data_is_detected_by_the_density_alone():
    found = run(draws_of_prior)
    assert found.rejected == ("log_joint",)


def test_ranks_are_those_of_the_slow_definition():
    true, drawn, data = [], [], []

    def fit(x):
        data.append(x)
        return draws_of()(x)

    def theta(draws, x):
        (true if len(draws["theta"]) == 1 else drawn).append(draws["theta"].numpy())
        return draws["theta"]

    def density(draws, x):
        log_p = dist.Normal(0.0, 2.0).log_prob(draws["theta"]).sum(-1)
        return log_p + dist.Normal(draws["theta"][:, None], 1.0).log_prob(x).sum((1, 2))

    default = run(fit, num_simulations=10)
    found = run(fit, num_simulations=10, quantities={"theta": theta, "log_joint": density})
    assert torch.equal(found.ranks, default.ranks) and found.quantities == default.quantities
    assert torch.equal(data[3], data[13]) and data[3].shape == (N, D)
    for number in range(10):
        below = (drawn[number] < true[number]).sum(0)
        np.testing.assert_array_equal(found.ranks[number, :D], below)


def test_ties_are_broken_at_random():
    found = run(
        lambda x: {"theta": torch.zeros(20, D)},
        num_draws=20,
        quantities={"sign": lambda draws, x: 0 * draws["theta"][:, 0]},
    )
    assert found.rejected == () and len(found.ranks.unique()) == 21


def test_draws_repeat_for_a_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = run(draws_of(), num_simulations=10), run(draws_of(), num_simulations=10)
    assert torch.equal(first.ranks, second.ranks)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first.ranks, run(draws_of(), num_simulations=10, seed=1).ranks)


# Latent variables of each datum


def ppca_pair(scale=1.0, shift=0.0, ignore=False):
    """PPCA with known parameters, and its exact guide with errors."""
    ppca = PPCA(D, 2, seed=1).double()
    exact = ExactGuide(ppca)

    class Wrong(PyroModule):
        def forward(self, x, **_):
            with pyro.plate("data", len(x)):
                q = ppca.posterior(x)
                mean, tril = q.mean + shift, scale * q.scale_tril
                if ignore:
                    mean, tril = 0 * mean, torch.eye(2).to(mean)
                pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=tril))

    same = (scale, shift, ignore) == (1.0, 0.0, False)
    return ppca.model, exact if same else Wrong()


def test_an_exact_amortized_guide_passes_without_fits():
    found = calibrate(*ppca_pair(), num_simulations=1000, seed=0)
    assert found.quantities == ("z[0]", "z[1]", "log_joint") and found.ranks.shape == (1000, 3)
    assert found.rejected == () and found.num_data == 1


@pytest.mark.parametrize("error", [{"scale": 0.7}, {"scale": 1.4}, {"shift": 0.5}])
def test_errors_of_an_amortized_guide_are_detected(error):
    assert {"z[0]", "z[1]"} <= set(
        calibrate(*ppca_pair(**error), num_simulations=1000, seed=0).rejected
    )


def test_a_guide_that_ignores_x_is_detected_by_the_density_alone():
    found = calibrate(*ppca_pair(ignore=True), num_simulations=1000, seed=0)
    assert found.rejected == ("log_joint",)


# Markov chains


def chains(x, correlation):
    mean, sd = posterior(x)
    noise = torch.randn(4, 100, D)
    for place in range(1, 100):
        fresh = (1 - correlation**2) ** 0.5 * noise[:, place]
        noise[:, place] = correlation * noise[:, place - 1] + fresh
    return PosteriorSamples({"theta": mean + sd * noise}, "AR(1)", 0.0, len(x))


def test_chains_are_thinned_and_dependent_ones_noted():
    quantities = {"theta": lambda draws, x: draws["theta"]}
    sizes = {"num_simulations": 40, "num_draws": 99, "quantities": quantities}
    found = run(lambda x: chains(x, 0.0), **sizes)
    assert found.rejected == () and found.notes == ()
    assert bool(((found.effective_draws > 79) & (found.effective_draws < 130)).all())
    found = run(lambda x: chains(x, 0.98), **sizes)
    assert "are dependent" in found.notes[0] and "draw longer chains" in found.notes[0]


# The test of uniformity


def test_p_values_are_those_of_all_outcomes():
    num_ranks, num_draws = 4, 2
    uniform = UniformRanks(num_ranks, num_draws, size=200_000)
    ranks = np.array(list(itertools.product(range(3), repeat=num_ranks))).T  # (4, 81)
    levels = []
    for column in ranks.T:
        counts = [(column < k).sum() for k in (1, 2)]
        tails = [
            min(stats.binom.cdf(c, 4, k / 3), stats.binom.sf(c - 1, 4, k / 3))
            for c, k in zip(counts, (1, 2), strict=True)
        ]
        levels.append(2 * min(tails))
    levels = np.array(levels)
    exact = np.array([(levels <= level + 1e-12).mean() for level in levels])
    # Standard error of a proportion of 200,000 at most 0.0011.
    np.testing.assert_allclose(uniform.p_values(ranks), exact, atol=0.005)


@pytest.mark.parametrize("num_draws", [9, 99, 400])
def test_the_band_holds_all_of_the_function_as_often_as_stated(num_draws):
    uniform = UniformRanks(100, num_draws)
    ranks = np.random.default_rng(5).integers(0, num_draws + 1, size=(100, 4000))
    band, ecdf = uniform.band(0.05), uniform.counts_below(ranks) / 100
    assert len(band.probability) == min(num_draws, 99)
    inside = ((ecdf >= band.lower - 1e-12) & (ecdf <= band.upper + 1e-12)).all(1)
    np.testing.assert_array_equal(inside, uniform.p_values(ranks) >= 0.05)
    # Four standard errors of each of the two simulations above the level; ranks are discrete.
    assert 0.02 < 1 - inside.mean() < 0.05 + 4 * (0.05 * 0.95 * (1 / 4000 + 1 / 10_000)) ** 0.5


# The result


def test_the_result_is_readable_and_kept():
    found = run(draws_of(scale=0.5))
    text = repr(found)
    assert "150 simulations of 5 data points, 19 draws each" in text and "p-value" in text
    frame = found.to_frame()
    assert list(frame.index) == list(found.quantities)
    assert frame.loc["theta[0]", "spread"] > 1.2 and frame["p_value"].min() < 0.01
    again = SimulationBasedCalibration.from_dict(found.to_dict())
    assert torch.equal(again.ranks, found.ranks) and again.verdict == found.verdict


@pytest.mark.parametrize(
    ("fit", "others", "error", "text"),
    [
        (draws_of(), {"num_data": None}, ValueError, "num_data is missing"),
        (draws_of(), {"data_dim": None}, ValueError, "data_dim is missing"),
        (
            draws_of(),
            {"num_draws": 200},
            ValueError,
            "needs 200 draws of 'theta'; fit returned 99",
        ),
        (draws_of(), {"num_simulations": 3}, ValueError, "num_simulations must be a whole number"),
        (lambda x: 3.0, {}, TypeError, "fit must return PosteriorSamples, a guide"),
        (lambda x: {"mu": torch.zeros(99)}, {}, ValueError, r"draws of \['mu'\], which are no"),
        (lambda x: {"theta": torch.zeros(99, 2)}, {}, ValueError, r"shape \(2,\); the site has"),
        (
            lambda x: {"theta": torch.full((99, D), torch.nan)},
            {},
            FloatingPointError,
            "that are NaN or",
        ),
    ],
)
def test_invalid_arguments_are_named(fit, others, error, text):
    with pytest.raises(error, match=text):
        run(fit, **others)


def test_missing_sites_leave_no_density_and_a_note():
    bayesian = BayesianPPCA(D, 1).double()

    def fit(x):
        return {"loc": torch.randn(99, D).double()}

    found = calibrate(bayesian.model, fit, num_simulations=10, num_data=6)
    assert found.quantities == tuple(f"loc[{k}]" for k in range(D))
    assert "no draws of ['loadings', 'noise_scale', 'z']" in found.notes[0]


# Bayesian PPCA


def informative(latent_dim):
    """Priors from which data are drawn that are neither all noise nor without noise."""
    return BayesianPPCA(D, latent_dim, loc_prior=dist.Normal(0.0, 1.0)).double()


def gibbs(model, num_samples=50):
    def fit(x):
        return sample_posterior(
            model, x, num_samples=num_samples, warmup=100, chains=4, progress=False
        )

    return fit


def test_gibbs_sampling_has_the_quantities_of_ppca():
    model = informative(1)
    found = calibrate(model.model, gibbs(model), num_simulations=12, num_data=6, seed=0)
    assert found.quantities[:5] == ("loc[0]", "loc[1]", "loc[2]", "loc[3]", "noise_scale")
    assert found.quantities[5:8] == ("covariance[0, 0]", "covariance[1, 0]", "covariance[1, 1]")
    assert found.quantities[-1] == "log_likelihood" and len(found.quantities) == 16
    assert found.rejected == ()


@pytest.mark.slow
@pytest.mark.parametrize(("num_data", "latent_dim"), [(30, 1), (30, 2), (6, 1), (6, 2)])
def test_gibbs_sampling_is_calibrated(num_data, latent_dim):
    model = informative(latent_dim)
    found = calibrate(
        model.model, gibbs(model, 400), num_simulations=1000, num_data=num_data, seed=1
    )
    print(found)
    assert found.rejected == () and found.notes == ()


@pytest.mark.slow
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_nuts_is_calibrated(latent_dim):
    model = informative(latent_dim)

    def fit(x):
        return sample_posterior(
            model, x, num_samples=50, warmup=100, chains=2, sampler="nuts", progress=False
        )

    found = calibrate(model.model, fit, num_simulations=200, num_draws=49, num_data=30, seed=2)
    print(found)
    assert found.rejected == ()


@pytest.mark.slow
def test_variational_bayes_is_too_narrow():
    model = informative(2)
    found = calibrate(
        model.model,
        lambda x: fit_vb(model, x, seed=0).guide,
        num_simulations=50,
        num_data=6,
        seed=3,
    )
    print(found)
    assert found.rejected and "NOT calibrated" in found.verdict
