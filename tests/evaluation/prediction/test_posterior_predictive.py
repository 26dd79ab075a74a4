"""Evaluation of pairs with global latent variables: exact densities, errors, refusals."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import oracles
from global_pairs import GLOBAL_PAIRS, linear_decoder, normal_mean
from ppl_vae.core.global_sites import condition_on_globals
from ppl_vae.core.pair import Pair
from ppl_vae.evaluation.latent_space.collapse import collapse
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.evaluation.marginal_likelihood.bidirectional import bidirectional
from ppl_vae.evaluation.marginal_likelihood.compare import compare
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.evaluation.prediction.imputation import impute
from ppl_vae.evaluation.prediction.predictive import decode, encode, reconstruct
from ppl_vae.interop.arviz import to_arviz
from ppl_vae.interop.draws import pair_draws
from ppl_vae.objectives.bounds import elbo
from user_pairs import N, draw

D, K = 4, 2


def predictive_of_the_mean(guide, x):
    """log E_q(theta) N(x; theta, I) = log N(x; loc, scale^2 + 1)."""
    scale = (guide.scale.square() + 1).sqrt()
    return dist.Normal(guide.loc, scale).to_event(1).log_prob(x).detach()


def test_the_posterior_predictive_density_of_a_conjugate_model(float64):
    model, guide, x = normal_mean()
    exact = predictive_of_the_mean(guide, x)
    found = log_likelihood(model, guide, x, 2000, seed=0, capture=False)
    z = (found.value - exact) / found.standard_error
    assert float(z.abs().max()) < oracles.z_limit(N)
    assert bool(found.reliable.all())
    # Jensen: the ELBO without the KL of theta is a bound on it.
    assert bool((elbo(model, guide, x, num_samples=2000, global_kl=False, seed=1) < exact).all())


def test_the_error_of_the_mean_includes_that_data_share_draws(float64):
    """z-scores of the mean over repeated estimates are standard normal; independent errors of the
    data would make the scores several times too large.
    """
    model, guide, x = normal_mean()
    exact, scores, naive = float(predictive_of_the_mean(guide, x).mean()), [], []
    for seed in range(60):
        found = log_likelihood(model, guide, x, 100, seed=seed, capture=False)
        assert found.global_error is not None
        scores.append((found.mean - exact) / found.global_error)
        naive.append((found.mean - exact) * N / float(found.standard_error.norm()))
    assert np.mean(np.square(scores)) == pytest.approx(1, abs=oracles.z_limit() * (2 / 60) ** 0.5)
    assert np.mean(np.square(naive)) > 2
    assert found.mean_error > found.global_error


def test_without_global_variables_there_is_no_shared_error(float64):
    model, guide, x = linear_decoder()
    found = log_likelihood(*condition_on_globals(model, guide, x, seed=0), x, 50, capture=False)
    assert found.global_error is None


def test_estimates_of_batches_have_errors_of_their_own_draws(float64, monkeypatch):
    """In batches of 8 the draws of theta differ, and so the error of the mean is smaller."""
    model, guide, x = normal_mean()
    whole = log_likelihood(model, guide, x, 400, seed=0, capture=False)
    module = "ppl_vae.evaluation.marginal_likelihood.importance.block_size"
    monkeypatch.setattr(module, lambda x, num_samples, refined: 8)
    parts = log_likelihood(model, guide, x, 400, seed=0, capture=False)
    assert parts.global_error < whole.global_error
    ratio = float(parts.standard_error.norm()) / N / parts.global_error
    assert ratio < 1


def exact_given(values, x):
    """log p(x | theta) of the linear decoder, for draws of its weights and scale."""
    weight, scale = values["weight"], values["scale"]
    cov = weight @ weight.mT + scale.square()[:, None, None] * torch.eye(D)
    return torch.stack([dist.MultivariateNormal(torch.zeros(D), c).log_prob(x) for c in cov])


def exact_predictive(guide, x, number=3000):
    with torch.no_grad():
        torch.manual_seed(5)
        weight = dist.Normal(guide.weight_loc, guide.weight_scale).sample((number,))
        scale = dist.LogNormal(torch.tensor(-0.4), guide.noise_scale).sample((number,))
        log_p = exact_given({"weight": weight, "scale": scale}, x)
        value = log_p.logsumexp(0) - np.log(number)
        error = (log_p - value).exp().std(0) / number**0.5
    return value, error


@pytest.mark.parametrize("proposal", ["guide", "prior", "refined"])
def test_the_posterior_predictive_density_with_latent_variables(proposal, float64):
    """Against the mean of the exact p(x | theta) over draws of theta."""
    model, guide, x = linear_decoder()
    x = 0.7 * x[:8]
    with torch.random.fork_rng():
        exact, error = exact_predictive(guide, x)
    options = {"guide": {}, "prior": {"method": "prior"}, "refined": {"refine": 100}}
    options = options[proposal]
    found = log_likelihood(model, guide, x, 4000, seed=0, capture=False, **options)
    z = (found.value - exact) / found.standard_error.hypot(error)
    good = found.reliable
    assert good.double().mean() > 0.4
    assert float(z[good].abs().max()) < oracles.z_limit(len(x))


@pytest.mark.parametrize("name", GLOBAL_PAIRS)
def test_captured_estimates_are_eager_ones(name, float64):
    model, guide, x = GLOBAL_PAIRS[name]()
    eager = log_likelihood(model, guide, x, 8, seed=0, capture=False)
    recorded = log_likelihood(model, guide, x, 8, seed=0, capture="auto")
    torch.testing.assert_close(eager.value, recorded.value)


def test_without_a_guide_prior_draws_give_the_prior_predictive(float64):
    model, guide, x = normal_mean()
    found = log_likelihood(model, None, x, 3000, method="prior", seed=0, capture=False)
    exact = dist.Normal(torch.zeros(D), 5**0.5).to_event(1).log_prob(x)
    z = (found.value - exact) / found.standard_error
    assert float(z[found.reliable].abs().max()) < oracles.z_limit(N)
    assert int(found.reliable.sum()) > N / 4
    posterior = log_likelihood(model, guide, x, 500, method="prior", seed=0, capture=False)
    close = (posterior.value - predictive_of_the_mean(guide, x)) / posterior.standard_error
    assert float(close.abs().max()) < oracles.z_limit(N)


def test_comparisons_add_the_error_of_shared_draws(float64):
    model, guide, x = normal_mean()
    found = log_likelihood(model, guide, x, 100, seed=0, capture=False)
    other = found.value - 0.1 - 0.01 * draw(N, seed=1)
    ranking = compare({"mine": found, "other": other})
    assert float(ranking.error[0]) == pytest.approx(found.mean_error)
    assert float(ranking.difference_error[1]) >= found.global_error
    assert float(ranking.difference_error[0]) == 0


# Draws


@pytest.mark.parametrize("name", ["linear_decoder", "random_decoder"])
def test_exported_global_variables_have_no_dimension_of_data(name, float64):
    model, guide, x = GLOBAL_PAIRS[name]()
    data = to_arviz(model, guide, x, num_samples=8, num_chains=2, seed=0)
    posterior, stats = data["posterior"], data["sample_stats"]
    assert posterior["z"].dims == ("chain", "draw", "datum", "z_dim_0")
    shared = set(posterior.data_vars) - {"z"}
    assert len(shared) == 2
    for variable in shared:
        assert "datum" not in posterior[variable].dims
        assert posterior[variable].shape[:2] == (2, 4)
        assert float(posterior[variable].std(("chain", "draw")).min()) > 0
    assert stats["global_log_weight"].dims == ("chain", "draw")
    assert stats["log_weight"].dims == ("chain", "draw", "datum")


@pytest.mark.parametrize("name", ["linear_decoder", "random_decoder"])
def test_blocks_of_rows_share_the_draws(name, float64, monkeypatch):
    """log p(x, z | theta) of every block is that of the exported theta."""
    model, guide, x = GLOBAL_PAIRS[name]()
    monkeypatch.setattr("ppl_vae.interop.draws.rows_at_once", lambda x: 10)
    pair = Pair(model, guide)
    draws = pair_draws(pair, pair.observe(x), torch.arange(N), 3, seed=0)
    assert draws.global_log_weight.shape == (3,)
    names = dict(zip(("weight", "other"), draws.global_latent.values(), strict=True))
    z = torch.as_tensor(draws.latent["z"])
    mean = z @ torch.as_tensor(names["weight"]).mT
    other = torch.as_tensor(names["other"])
    if name == "random_decoder":
        px = dist.Normal(mean + other[:, None], 0.8)
    else:
        px = dist.Normal(mean, other[:, None, None])
    joint = px.log_prob(x).sum(-1) + dist.Normal(torch.zeros(K), 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(joint, torch.as_tensor(draws.log_joint))


def test_prior_predictive_draws_have_global_variables_of_their_own(float64):
    model, guide, x = normal_mean()
    pair = Pair(model, guide)
    draws = pair_draws(pair, pair.observe(x), torch.arange(N), 400, seed=0)
    values = draws.prior_predictive["x"]
    # Of variance 2^2 + 1; rows that share theta would have 1.
    assert values.var() == pytest.approx(5, abs=oracles.z_limit() * 5 * (2 / 1600) ** 0.5)
    correlation = np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]
    assert abs(correlation) < oracles.z_limit() / 400**0.5


# Imputation, codes


def test_imputation_averages_over_the_global_variables(float64):
    """Under q(theta) the missing entries of the conjugate model are independent of the others."""
    model, guide, x = normal_mean()
    missing = x.clone()
    missing[0, 1] = torch.nan
    found = impute(model, guide, missing, 4000, seed=0)
    sd = float((guide.scale[1].detach().square() + 1).sqrt())
    assert float(found.mean[0, 1]) == pytest.approx(float(guide.loc[1].detach()), abs=0.1)
    assert float(found.sd[0, 1]) == pytest.approx(sd, abs=0.05)
    with pytest.raises(ValueError, match=r"joint draws of missing values need a model without gl"):
        impute(model, guide, missing, 50, draws=3)
    fixed = condition_on_globals(model, guide, missing, seed=0)
    assert impute(*fixed, missing, 50, draws=3, seed=0).draws.shape == (3, N, D)


def test_codes_are_those_of_each_datum(float64):
    model, guide, x = linear_decoder()
    codes = encode(model, guide, x)
    torch.testing.assert_close(codes, guide.encoder(x).chunk(2, -1)[0].detach())
    for use in (lambda: decode(model, codes, x), lambda: reconstruct(model, guide, x)):
        with pytest.raises(ValueError, match=r"decoding needs a model without global.*'weight'"):
            use()
    fixed = condition_on_globals(model, guide, x, seed=0)
    torch.testing.assert_close(decode(fixed[0], codes, x), reconstruct(*fixed, x))


REFUSED = {
    "annealing": lambda *pair: log_likelihood(*pair, 4, method="annealed"),
    "bidirectional": lambda *pair: bidirectional(*pair, annealing=Annealing(2)),
    "the aggregate posterior": lambda *pair: collapse(*pair),
}


@pytest.mark.parametrize("purpose", REFUSED)
def test_what_needs_fixed_global_variables_names_the_function_that_fixes_them(purpose, float64):
    match = rf"{purpose} needs a model without global latent variables, .*condition_on_globals"
    with pytest.raises(ValueError, match=match):
        REFUSED[purpose](*linear_decoder())


def test_a_pair_given_a_draw_can_be_annealed(float64):
    """Annealed estimates and bidirectional bounds of p(x | theta), which is known."""
    model, guide, x = linear_decoder()
    x = x[:2]
    fixed = condition_on_globals(model, guide, x, seed=0)
    trace = poutine.trace(fixed[0]).get_trace(x)
    values = {name: trace.nodes[name]["value"][None] for name in ("weight", "scale")}
    annealing = Annealing(10, leapfrog=4)
    exact = exact_given(values, x)[0]
    found = log_likelihood(
        *fixed, x, 16, method="annealed", annealing=annealing, seed=0, capture=False
    )
    assert float((found.value - exact).abs().max()) < 0.5
    bounds = bidirectional(*fixed, x, num_chains=16, annealing=annealing, seed=0)
    truth = exact_given(values, bounds.x)[0]
    assert (
        float(bounds.lower.mean()) - 0.3 < float(truth.mean()) < float(bounds.upper.mean()) + 0.3
    )


def test_missing_values_are_masked_given_the_globals(float64):
    """log p of the observed entries: that of a model of these columns."""
    model, guide, x = normal_mean()
    missing = x.clone()
    missing[:, 2] = torch.nan
    found = log_likelihood(model, guide, missing, 2000, seed=0, capture=False)
    scale = (guide.scale.square() + 1).sqrt()
    each = dist.Normal(guide.loc, scale).log_prob(x).detach()
    exact = each[:, [0, 1, 3]].sum(1)
    z = (found.value - exact) / found.standard_error
    assert float(z.abs().max()) < oracles.z_limit(N)
