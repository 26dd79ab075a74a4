"""The ELBO of each datum, and where it loses its nats."""

import json

import numpy as np
import oracles
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import user_pairs
from unchanged import assert_unchanged

from ppl_vae import Gaussian, fit_svi
from ppl_vae.core.state import seeded
from ppl_vae.evaluation.inference_gaps.gaps import gaps
from ppl_vae.evaluation.inference_gaps.local_optimum import SphericalRadialRule
from ppl_vae.evaluation.inference_gaps.result import Gaps
from ppl_vae.evaluation.marginal_likelihood import batching
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, PerDatumGuide
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp, zero_output
from ppl_vae.objectives.bounds import elbo, log_weights

N, D, K = 50, 6, 3
ELBO_DRAWS = 200


def make(K=K, D=D, noise=0.6, seed=0):
    """A model in general position (W rotated), its data and parameters (loc, loadings, noise)."""
    rng = np.random.default_rng(seed)
    loc, loadings = 3 * rng.normal(size=D), rng.normal(size=(D, K))
    scale = torch.tensor(noise**0.5, dtype=torch.float64)
    ppca = PPCA.from_parameters(torch.tensor(loadings), torch.tensor(loc), scale)
    return ppca, ppca.sample(N, seed=seed).numpy(), (loc, loadings, noise)


def log_p(x, parameters):
    return torch.from_numpy(oracles.log_density(x, *parameters))


def sampling_error(parameters, covariance, num_draws):
    """The standard deviation of a mean over draws of log w, with q the best of a family.

    q has the posterior's mean, so log w is quadratic: Var = 1/2 tr((Sp^-1 Sq - I)^2).
    """
    _, covariances = oracles.posterior(parameters[0][None], *parameters)
    best = np.diag(oracles.best_q_variances(*parameters[1:], covariance))
    variance = oracles.proposal_log_weight_variance(best, covariances[0])
    return np.sqrt(variance / num_draws)


def optimal_linear(ppca, parameters):
    """The linear encoder that reads the best diagonal q off x: V = M^-1 W', b = -V mu."""
    loc, loadings, noise = parameters
    M = loadings.T @ loadings + noise * np.eye(K)
    V = np.linalg.solve(M, loadings.T)
    encoder = mlp(D, K, seed=0).double()
    guide = AmortizedGuide(encoder, K, homoscedastic=True).double()
    variances = torch.from_numpy(oracles.best_q_variances(loadings, noise, "diagonal"))
    with torch.no_grad():
        encoder[0].weight.copy_(torch.from_numpy(V))
        encoder[0].bias.copy_(torch.from_numpy(-V @ loc))
        guide.unconstrained_scale.copy_(variances.log())
    return guide


# The ELBO of each datum


@pytest.mark.parametrize("covariance", ["unit", "isotropic", "diagonal"])
def test_the_elbo_of_a_restricted_posterior_is_its_gap_below_the_log_likelihood(covariance):
    ppca, x, parameters = make()
    guide, draws = ExactGuide(ppca, covariance=covariance), 500
    values = elbo(ppca.model, guide, x, num_samples=draws, seed=0).numpy()
    gap = oracles.best_q_gap(*parameters[1:], covariance)
    # E_q[log p(x | z)] varies with the draws by W alone, the KL not at all.
    _, loadings, noise = parameters
    best = np.diag(oracles.best_q_variances(loadings, noise, covariance))
    inner = loadings.T @ loadings / noise
    residual = x - parameters[0] - oracles.posterior(x, *parameters)[0] @ loadings.T
    linear = residual @ loadings / noise
    variance = 0.5 * np.trace(inner @ best @ inner @ best)
    variance = variance + np.einsum("nk,kl,nl->n", linear, best, linear)
    z = (values - (log_p(x, parameters).numpy() - gap)) / np.sqrt(variance / draws)
    assert np.abs(z).max() < oracles.z_limit(N)
    assert abs(z.mean()) < oracles.z_limit() / np.sqrt(N)


def test_the_elbo_of_the_exact_guide_is_the_log_likelihood_on_average():
    ppca, x, parameters = make()
    values = elbo(ppca.model, ExactGuide(ppca), x, num_samples=4000, seed=0)
    # The reconstruction term has a variance of about K / 2 per draw.
    difference = values - log_p(x, parameters)
    assert abs(float(difference.mean())) < 0.02
    assert float(difference.abs().max()) < 0.2


@pytest.mark.parametrize("batch_size", [1, 7, 50, 4096])
def test_the_elbo_does_not_depend_on_the_batch_size(batch_size):
    ppca, x, parameters = make()
    values = elbo(
        ppca.model, ExactGuide(ppca, covariance="diagonal"), x,
        num_samples=300, batch_size=batch_size, seed=0,
    )  # fmt: skip
    assert values.shape == (N,)
    expected = log_p(x, parameters) - oracles.best_q_gap(*parameters[1:], "diagonal")
    assert float((values - expected).abs().max()) < 0.7
    assert float((values - expected).mean().abs()) < 0.06


def test_rows_of_a_table_are_looked_up_by_their_index():
    ppca, x, _ = make()
    guide = PerDatumGuide(N, K).double()
    with torch.no_grad():
        guide.loc.copy_(torch.linspace(-9, 9, N * K).reshape(N, K))
        guide.unconstrained_scale.fill_(-15.0)
    whole = elbo(ppca.model, guide, x, seed=0)
    # q is narrow, so that rows in a wrong order would change the values.
    torch.testing.assert_close(
        elbo(ppca.model, guide, x, batch_size=7, seed=1), whole, rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_every_pair_has_an_elbo_below_its_log_likelihood(name, float64):
    model, guide, x = user_pairs.PAIRS[name]()
    values = elbo(model, guide, x, num_samples=1, seed=0)
    assert values.shape == (24,)
    assert values.isfinite().all()
    assert not values.requires_grad
    again = elbo(model, guide, x, num_samples=1, seed=0)
    assert torch.equal(values, again)


@pytest.mark.parametrize("bad", [0, -1])
def test_invalid_numbers_raise(bad):
    ppca, x, _ = make()
    with pytest.raises(ValueError, match=f"num_samples must be a whole number >= 1; got {bad}"):
        elbo(ppca.model, ExactGuide(ppca), x, num_samples=bad)
    with pytest.raises(ValueError, match=f"batch_size must be a whole number >= 1; got {bad}"):
        elbo(ppca.model, ExactGuide(ppca), x, batch_size=bad)


# Gaps of known size


@pytest.mark.slow
@pytest.mark.parametrize("covariance", ["unit", "isotropic", "diagonal"])
def test_the_best_q_that_is_found_is_optimal(covariance):
    """A search from N(0, I) finds the restriction of the posterior, on a rotated W."""
    ppca, x, parameters = make()
    width = {"unit": 0, "isotropic": 1, "diagonal": K}[covariance]
    guide = AmortizedGuide(
        zero_output(mlp(D, K + width, seed=0)), K, covariance=covariance
    ).double()
    found = gaps(ppca.model, guide, x, log_p=log_p(x, parameters), steps=200, seed=0)
    assert found.covariance == covariance
    gap = oracles.best_q_gap(*parameters[1:], covariance)
    each = sampling_error(parameters, covariance, ELBO_DRAWS)
    # The search stops within less than a percent of the gap.
    slack = oracles.z_limit(3) * each / np.sqrt(N) + 0.01 * gap
    assert found.approximation == pytest.approx(gap, abs=slack)
    z = (found.log_likelihood - found.best_elbo - gap).abs() / (each + 0.01 * gap)
    assert float(z.max()) < oracles.z_limit(3 * N)
    known = gaps(
        ppca.model, guide, x,
        log_p=log_p(x, parameters), best=ExactGuide(ppca, covariance=covariance), seed=0,
    )  # fmt: skip
    assert known.approximation == pytest.approx(gap, abs=slack)


def test_a_full_q_leaves_no_approximation_gap():
    ppca, x, parameters = make()
    guide = ExactGuide(ppca, covariance="unit")
    options = {"log_p": log_p(x, parameters), "covariance": "full", "seed": 0}
    found = gaps(ppca.model, guide, x, steps=150, **options)
    assert found.covariance == "full"
    assert abs(found.approximation) < 1e-3
    gap = oracles.best_q_gap(*parameters[1:], "unit")
    error = sampling_error(parameters, "unit", ELBO_DRAWS * N)
    assert found.amortization == pytest.approx(gap, abs=oracles.z_limit() * error + 1e-3)


def test_the_exact_guide_has_no_gaps():
    ppca, x, parameters = make()
    guide = ExactGuide(ppca)
    known = gaps(ppca.model, guide, x, log_p=log_p(x, parameters), best=guide, seed=0)
    np.testing.assert_allclose(known.elbo, known.log_likelihood, rtol=0, atol=1e-9)
    assert abs(known.approximation) < 1e-9
    assert known.amortization == 0
    found = gaps(ppca.model, guide, x, log_p=log_p(x, parameters), steps=60, seed=0)
    assert abs(found.approximation) < 1e-4
    assert abs(found.amortization) < 1e-4


def test_a_linear_encoder_at_its_optimum_has_no_amortization_gap():
    """The posterior mean of PPCA is linear in x: V = M^-1 W', variances s2 / M_kk."""
    ppca, x, parameters = make()
    guide = optimal_linear(ppca, parameters)
    options = {"log_p": log_p(x, parameters), "seed": 0}
    known = gaps(ppca.model, guide, x, best=ExactGuide(ppca, covariance="diagonal"), **options)
    assert abs(known.amortization) < 1e-9
    assert float((known.best_elbo - known.elbo).abs().max()) < 1e-9
    found = gaps(ppca.model, guide, x, steps=60, **options)
    gap = oracles.best_q_gap(*parameters[1:], "diagonal")
    assert abs(found.amortization) < 0.01 * gap
    error = oracles.z_limit() * sampling_error(parameters, "diagonal", ELBO_DRAWS * N)
    assert found.approximation == pytest.approx(gap, abs=error + 0.01 * gap)


def test_a_shifted_encoder_has_the_amortization_gap_of_its_shift():
    """A shift of q by d costs 1/2 d' P d, with P = M / s2 the posterior's precision."""
    ppca, x, parameters = make()
    guide, (_, loadings, noise) = optimal_linear(ppca, parameters), parameters
    shift = np.array([0.3, -0.2, 0.1])
    with torch.no_grad():
        guide.encoder[0].bias.add_(torch.from_numpy(shift))
    best = ExactGuide(ppca, covariance="diagonal")
    found = gaps(ppca.model, guide, x, log_p=log_p(x, parameters), best=best, seed=0)
    precision = loadings.T @ loadings / noise + np.eye(K)
    cost = 0.5 * shift @ precision @ shift
    # Common draws: the difference is linear in them, of variance d' P Sq P d a draw.
    q = np.diag(oracles.best_q_variances(loadings, noise, "diagonal"))
    error = np.sqrt(shift @ precision @ q @ precision @ shift / (ELBO_DRAWS * N))
    assert found.amortization == pytest.approx(cost, abs=oracles.z_limit() * error)


def test_the_gaps_add_up_exactly():
    vae = VAE.mlp(D, 2, hidden=(5,), seed=0).double()
    x = vae.sample(20, seed=0)
    found = gaps(vae.model, vae.guide, x, steps=20, num_samples=50, seed=0)
    total = float((found.log_likelihood - found.elbo).mean())
    assert found.total == total
    spread = (found.log_likelihood - found.elbo).std() / 20**0.5
    assert found.total_error == pytest.approx(float(spread), rel=1e-12)
    assert found.approximation + found.amortization == pytest.approx(total, rel=1e-12, abs=1e-12)
    assert found.approximation == float((found.log_likelihood - found.best_elbo).mean())
    assert found.amortization == float((found.best_elbo - found.elbo).mean())
    spread = (found.best_elbo - found.elbo).std() / 20**0.5
    assert found.amortization_error == pytest.approx(float(spread), rel=1e-12)
    spread = (found.log_likelihood - found.best_elbo).std() / 20**0.5
    assert found.approximation_error == pytest.approx(float(spread), rel=1e-12)


def test_the_estimated_log_likelihood_is_the_exact_one():
    ppca, x, parameters = make()
    found = gaps(ppca.model, ExactGuide(ppca, covariance="unit"), x, steps=200, seed=0)
    assert isinstance(found.estimate, LogLikelihood)
    assert torch.equal(found.estimate.value, found.log_likelihood)
    assert found.estimate.reliable.all()
    error = found.estimate.standard_error + 1e-9
    z = (found.log_likelihood - log_p(x, parameters)).abs() / error
    assert float(z.max()) < oracles.z_limit(N)
    assert float(error.max()) < 0.01


def test_gaps_do_not_depend_on_batches(monkeypatch):
    ppca, x, parameters = make()
    guide, truth = optimal_linear(ppca, parameters), log_p(x, parameters)
    gap = oracles.best_q_gap(*parameters[1:], "diagonal")
    monkeypatch.setattr(batching, "ROWS_AT_ONCE", dict.fromkeys(batching.ROWS_AT_ONCE, 40))
    found = gaps(ppca.model, guide, x, log_p=truth, steps=5, tolerance=None, seed=0)
    assert found.elbo.shape == (N,)
    each = sampling_error(parameters, "diagonal", ELBO_DRAWS)
    z = (truth - found.elbo - gap).abs() / each
    assert float(z.max()) < oracles.z_limit(N)


@pytest.mark.slow
def test_rows_select_data():
    ppca, x, parameters = make(K=1)
    means, covariances = oracles.posterior(x, *parameters)
    guide = PerDatumGuide(N, 1).double()
    with torch.no_grad():
        guide.loc.copy_(torch.from_numpy(means))
        guide.unconstrained_scale.copy_(torch.from_numpy(np.log(covariances[:, 0])))
    truth = log_p(x, parameters)
    for rows in (torch.tensor([4, 0, 49]), torch.arange(N).flip(0)):
        given = {"log_p": truth[rows], "rows": rows, "tolerance": None}
        found = gaps(ppca.model, guide, x, steps=3, seed=0, **given)
        np.testing.assert_allclose(found.elbo, truth[rows], atol=1e-9)
        estimated = gaps(
            ppca.model, guide, x, rows=rows, steps=100, num_samples=30, tolerance=None, seed=0
        )
        np.testing.assert_allclose(estimated.log_likelihood, truth[rows], atol=1e-3)


def test_missing_values_are_marginalized():
    ppca, x, parameters = make(K=1)
    x = oracles.with_missing_values(x, 0.3, seed=0)
    guide = AmortizedGuide(zero_output(mlp(D, 2, seed=0)), 1).double()
    truth = log_p(x, parameters)
    options = {"log_p": truth, "steps": 50, "seed": 0}
    found = gaps(ppca.model, guide, x, **options)
    # With K = 1 a diagonal q is exact.
    np.testing.assert_allclose(found.best_elbo, truth, atol=1e-3)
    filled, mask = np.nan_to_num(x, nan=50.0), ~np.isnan(x)
    masked = gaps(ppca.model, guide, filled, mask=mask, **options)
    assert torch.equal(masked.best_elbo, found.best_elbo)


# To a tolerance, with errors


@pytest.mark.parametrize(
    "covariance",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "diagonal")) for name in COVARIANCES],
)
def test_the_approximation_gap_agrees_with_the_formula(covariance):
    """They agree from N(0, I), on a rotated W, up to the tolerance of the search."""
    ppca, x, parameters = make()
    width = {"unit": 0, "isotropic": 1, "diagonal": K, "full": K * (K + 1) // 2}[covariance]
    encoder = zero_output(mlp(D, K + width, seed=0))
    guide = AmortizedGuide(encoder, K, covariance=covariance).double()
    options = {"log_p": log_p(x, parameters), "steps": 50, "tolerance": 1e-5, "seed": 0}
    found = gaps(ppca.model, guide, x, **options)
    gap = oracles.best_q_gap(*parameters[1:], covariance)
    assert found.approximation == pytest.approx(gap, abs=1e-4)
    assert float((found.log_likelihood - found.best_elbo - gap).abs().max()) < 1e-3
    assert found.remaining < 1e-5
    assert found.approximation_error < 1e-5 and found.approximation_monte_carlo < 1e-9


def test_the_distance_to_the_optimum_is_reported_and_one_sided():
    ppca, x, parameters = make()
    guide = AmortizedGuide(zero_output(mlp(D, 2 * K, seed=0)), K).double()
    options = {"log_p": log_p(x, parameters), "steps": 2, "seed": 0}
    gap = oracles.best_q_gap(*parameters[1:], "diagonal")
    once = gaps(ppca.model, guide, x, tolerance=None, **options)
    assert np.isnan(once.remaining) and once.approximation > gap + 0.1
    rounds = gaps(ppca.model, guide, x, tolerance=1e3, **options)
    assert rounds.remaining > 0.1 and gap < rounds.approximation < once.approximation
    lowest, highest = rounds.approximation_range
    assert lowest < gap < highest
    width = 1.96 * rounds.approximation_error
    assert lowest == pytest.approx(rounds.approximation - width - rounds.remaining)
    assert highest == pytest.approx(rounds.approximation + width)
    width = 1.96 * rounds.amortization_error
    ends = rounds.amortization - width, rounds.amortization + width + rounds.remaining
    assert rounds.amortization_range == pytest.approx(ends)
    assert "may belong to the amortization gap" in repr(rounds)


@pytest.mark.slow
def test_a_deep_encoders_amortization_gap_shrinks_as_it_learns():
    ppca, x, _ = make()
    more = ppca.sample(400, seed=1)
    guide = AmortizedGuide(mlp(D, 2 * K, hidden=(32,), seed=0), K).double()
    sizes = []
    for epochs in (1, 30):
        ppca.requires_grad_(False)
        fit_svi(ppca.model, guide, more, epochs=epochs, batch_size=50, lr=5e-3, seed=0)
        truth = ppca.log_likelihood(x)
        found = gaps(ppca.model, guide, x, log_p=truth, steps=50, seed=0)
        sizes.append(found.amortization)
        assert found.amortization > 5 * found.amortization_error > 0
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("size", [1, 3, 20])
def test_the_rule_is_exact_for_quadratics_and_unbiased_for_other_functions(size):
    x, matrix = torch.zeros(100, 2).double(), torch.randn(size, size, generator=generator_of(0))
    with seeded(0):
        rule = SphericalRadialRule.draw(size, x)
    noise = rule.noise
    assert noise.shape == ({1: 33, 3: 28, 20: 33}[size], 100, size)
    quadratic = (noise @ matrix.double() * noise).sum(-1) + 3 * noise[..., 0] - 2
    error = (rule.means(quadratic) - (float(matrix.trace()) - 2)).abs().max()
    assert error < 1e-9 if size <= 16 else error > 0.1
    # E cos(b + a z) = cos(b) exp(-a^2 / 2).
    with seeded(1):
        many = [SphericalRadialRule.draw(size, x) for _ in range(20)]
    found = torch.cat([each.means(torch.cos(1 + each.noise.sum(-1) / size**0.5)) for each in many])
    found = found.flatten()
    z = (found.mean() - np.cos(1) * np.exp(-0.5)) / (found.std() / len(found) ** 0.5)
    assert abs(float(z)) < oracles.z_limit()


def generator_of(number):
    return torch.Generator().manual_seed(number)


@pytest.mark.slow
def test_monte_carlo_errors_agree_with_repetitions():
    vae = VAE.mlp(D, 2, hidden=(5,), likelihood=Gaussian(0.3), seed=0).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(2)
    x = torch.from_numpy(make()[1][:20])
    best = AmortizedGuide(mlp(D, 4, seed=1), 2).double()
    options = {"log_p": torch.zeros(20), "best": best}
    runs = [gaps(vae.model, vae.guide, x, seed=seed, **options) for seed in range(16)]
    for parts, noise in (
        ([r.best_elbo for r in runs], [r.approximation_mc_error for r in runs]),
        ([r.best_elbo - r.elbo for r in runs], [r.amortization_mc_error for r in runs]),
    ):
        observed = torch.stack(parts).var(0)
        expected = torch.stack(noise).square().mean(0)
        assert float(expected.min()) > 1e-5
        assert float((observed / expected).mean()) == pytest.approx(1, abs=0.35)
    plain = log_weights(vae.model, vae.guide, x, 10_000, seed=0).detach()
    spread = torch.stack([r.elbo for r in runs])
    error = (spread.var(0) / len(runs) + plain.var(0) / len(plain)).sqrt()
    assert float(((spread.mean(0) - plain.mean(0)) / error).abs().max()) < oracles.z_limit(20)
    first, noise = runs[0], runs[0].amortization_mc_error
    expected = float(noise.square().sum().sqrt() / 20)
    assert first.amortization_monte_carlo == pytest.approx(expected)
    assert first.amortization_monte_carlo < first.amortization_error
    one = gaps(
        vae.model, vae.guide, x, rows=torch.tensor([3]), seed=0, best=best, log_p=torch.zeros(1)
    )
    assert one.amortization_error == one.amortization_monte_carlo > 0


@pytest.mark.slow
def test_the_error_of_an_estimated_log_p_is_included():
    vae = VAE.mlp(D, 2, hidden=(5,), seed=0).double()
    x = vae.sample(10, seed=0)
    found = gaps(vae.model, vae.guide, x, steps=20, num_samples=50, seed=0)
    given = gaps(vae.model, vae.guide, x, steps=20, log_p=torch.zeros(10), seed=0)
    # The ELBO's part alone, of another run: about as large.
    parts = (found.approximation_mc_error**2 - found.estimate.standard_error**2).sqrt()
    assert float((parts / given.approximation_mc_error).median()) == pytest.approx(1, abs=0.4)


def test_guides_without_normal_noise_share_their_seeds():
    """Without normal noise both ELBOs are means over draws, equal for equal guides."""
    model, guide = user_pairs.without_parameters()
    x = torch.rand(7, 2)
    found = gaps(model, guide, x, log_p=torch.zeros(7), best=guide, seed=0)
    assert torch.equal(found.elbo, found.best_elbo) and (found.approximation_mc_error > 0.01).all()
    assert found.amortization_error == 0
    searched = gaps(model, guide, x, steps=20, num_samples=30, tolerance=10, seed=0)
    assert searched.amortization > 0


# Any pair


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (k % 3 > 0))
        for k, n in enumerate(user_pairs.PAIRS)
    ],
)
def test_every_pair_has_gaps_and_is_left_unchanged(name, float64):
    model, guide, x = user_pairs.PAIRS[name]()
    bare = user_pairs.BARE_PARAMETERS if name == "param_only" else ()
    with assert_unchanged(model, guide, new_parameters=bare):
        found = gaps(model, guide, x[:8], steps=30, num_samples=50, tolerance=10, seed=0)
    assert len(found.elbo) == len(found.best_elbo) == len(found.log_likelihood) == 8
    if name == "two_level":  # where the second level's q depends on a draw of the first
        assert found.best_elbo.isnan().all() and np.isnan(found.amortization)
        assert found.total > 0
        return
    assert found.covariance == "diagonal"
    # The best q of each datum improves on the guide, and its ELBO is below log p.
    assert found.amortization > 0
    assert found.approximation > -0.1


ONE_LEVEL = sorted(user_pairs.PAIRS.keys() - {"two_level"})


@pytest.mark.parametrize(
    "name",
    [n if n in ONE_LEVEL[::3] else pytest.param(n, marks=pytest.mark.slow) for n in ONE_LEVEL],
)
def test_the_search_starts_at_the_guides_own_q(name, float64):
    """One step, of at most a tenth of a standard deviation, costs little.

    With two levels the second level's q depends on a draw of the first, so that there is no q*.
    """
    model, guide, x = user_pairs.PAIRS[name]()
    found = gaps(model, guide, x[:8], steps=1, num_samples=2, tolerance=None, seed=0)
    assert found.amortization > -0.5


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_family_is_the_guides_own_or_the_requested_one(covariance):
    ppca, x, parameters = make()
    options = {"log_p": log_p(x, parameters), "steps": 2, "tolerance": None, "seed": 0}
    guide = ExactGuide(ppca, covariance=covariance)
    assert gaps(ppca.model, guide, x, **options).covariance == covariance
    other = gaps(ppca.model, ExactGuide(ppca), x, covariance=covariance, **options)
    assert other.covariance == covariance


def test_the_family_of_a_user_written_guide_is_that_of_its_distributions():
    ppca, x, parameters = make()

    def full(x, index=None, num_data=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", ppca.posterior(x))

    def independent(x, index=None, num_data=None):
        posterior = ppca.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(posterior.mean, 0.5).to_event(1))

    options = {"log_p": log_p(x, parameters), "steps": 2, "tolerance": None, "seed": 0}
    assert gaps(ppca.model, full, x, **options).covariance == "full"
    assert gaps(ppca.model, independent, x, **options).covariance == "diagonal"


@pytest.mark.parametrize("convert", [pd.DataFrame, torch.from_numpy], ids=["pandas", "torch"])
def test_data_of_any_kind_and_seeds(convert):
    vae = VAE.mlp(D, 2, hidden=(5,), seed=0).double()
    x, truth = make()[1], torch.zeros(N)
    options = {"log_p": truth, "steps": 2, "tolerance": None}
    first = gaps(vae.model, vae.guide, x, seed=1, **options)
    again = gaps(vae.model, vae.guide, convert(x), seed=1, **options)
    other = gaps(vae.model, vae.guide, x, seed=2, **options)
    assert torch.equal(first.elbo, again.elbo)
    assert torch.equal(first.best_elbo, again.best_elbo)
    assert not torch.isclose(first.elbo, other.elbo, rtol=1e-9).any()


# Errors


BAD = [
    ({"covariance": "round"}, "covariance must be one of 'unit', .*; got 'round'"),
    ({"steps": 0}, "steps must be a whole number >= 1; got 0"),
    ({"num_samples": 0}, "num_samples must be a whole number >= 1; got 0"),
    ({"x": np.ones(D)}, "x must be 2-d"),
    ({"x": np.full((3, D), np.nan)}, "x has rows with nothing observed"),
    ({"log_p": torch.zeros(N - 1).double()}, "log_p"),
    ({"log_p": torch.zeros(1).double()}, "log_p"),
    ({"tolerance": 0.0}, "tolerance must be positive, in nats per datum; got 0.0"),
]


@pytest.mark.parametrize(("options", "match"), BAD, ids=[str(o)[:30] for o, _ in BAD])
def test_invalid_arguments_raise(options, match):
    ppca, x, _ = make()
    guide = AmortizedGuide(mlp(D, 2 * K, seed=0), K).double()
    with pytest.raises(ValueError, match=match):
        gaps(ppca.model, guide, **({"x": x, "steps": 2} | options))


def test_a_point_mass_raises(float64):
    model, _, x = user_pairs.positive_latent()

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.ones(len(x), 2), event_dim=1))

    with pytest.raises(ValueError, match="guide is a Delta: a point mass has no dens"):
        gaps(model, point, x, steps=2)


# Results


def test_a_result_prints_and_converts():
    ppca, x, parameters = make()
    guide = optimal_linear(ppca, parameters)
    given = gaps(ppca.model, guide, x, log_p=log_p(x, parameters), steps=5, seed=0)
    estimated = gaps(ppca.model, guide, x, steps=5, num_samples=50, seed=0)
    assert isinstance(given, Gaps)
    assert given.estimate is None
    for found, source in ((given, "given"), (estimated, "estimated")):
        text = repr(found)
        assert text.startswith("Gaps in nats per datum")
        assert f"log p {found.log_likelihood.mean():.3f} ({source})" in text
        assert f"ELBO {found.elbo.mean():.3f}" in text
        line = f"approximation {found.approximation:.3f} ± {found.approximation_error:.3f}"
        assert f"{line} (best diagonal q per datum)" in text
        assert f"amortization  {found.amortization:.3f} ± {found.amortization_error:.3f}" in text
        assert "tensor(" not in text
        frame = found.to_frame()
        assert len(frame) == N
        assert list(frame.columns[:3]) == ["log_likelihood", "elbo", "best_elbo"]
        errors = ["approximation_mc_error", "amortization_mc_error"]
        assert list(frame.columns[3:]) == [*errors, "last_gain", "total_mc_error", "kept_own_q"]
        as_json = json.loads(json.dumps(found.to_dict()))
        assert as_json["elbo"] == found.elbo.tolist()
        assert as_json["covariance"] == "diagonal"
    assert json.loads(json.dumps(estimated.to_dict()))["estimate"]["num_samples"] == 50
    assert given.to_dict()["estimate"] is None
