"""Imputation by importance sampling, against the exact conditional distribution of PPCA."""

import inspect
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from scipy import stats
from torch import nn

import loops
import oracles
import user_pairs
from fitted import assert_close
from incomplete import assert_draws_of_missing_values
from ppl_vae import (
    PPCA,
    VAE,
    Bernoulli,
    ExactGuide,
    Gaussian,
    PerDatumGuide,
    digits,
    elbo,
    fit_svi,
    gaps,
    impute,
    log_likelihood,
    log_weights,
    mlp,
    to_arviz,
)
from ppl_vae.core.batch import Batch
from ppl_vae.core.introspection import filter_kwargs, modules_of
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import validation
from ppl_vae.core.traces import by_draw_and_datum, sites
from ppl_vae.evaluation import kl_by_dimension
from ppl_vae.evaluation.marginal_likelihood import batching
from ppl_vae.evaluation.prediction import predictive
from ppl_vae.evaluation.prediction.imputation import _Sampler
from ppl_vae.evaluation.prediction.resampling import resample
from ppl_vae.evaluation.prediction.weighted_moments import WeightedMoments

N, D, K = 12, 7, 3


def make(noise=0.6, seed=0):
    """A model in general position, and its parameters (loc, loadings, noise variance)."""
    rng = np.random.default_rng(seed)
    loc, loadings = 3 * rng.normal(size=D), rng.normal(size=(D, K))
    scale = torch.tensor(noise**0.5, dtype=torch.float64)
    return PPCA.from_parameters(torch.tensor(loadings), torch.tensor(loc), scale), (
        loc,
        loadings,
        noise,
    )


def incomplete_rows(ppca, num_rows=N, seed=1, fraction=0.4):
    return oracles.with_missing_values(ppca.sample(num_rows, seed=seed).numpy(), fraction, seed)


def widened(ppca, c2=2.0, shift=0.7):
    """The posterior with its covariance times c^2 and its mean shifted by ``shift`` deviations."""

    def guide(x, mask=None, index=None, num_data=None):
        posterior = ppca.posterior(x, mask=mask)
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            tril = posterior.scale_tril
            loc = posterior.mean + shift * tril[..., :, 0]
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=c2**0.5 * tril))

    return guide


def linear_vae(ppca, **guide):
    decoder = nn.Linear(K, D).double()
    with torch.no_grad():
        decoder.weight.copy_(ppca.loadings)
        decoder.bias.copy_(ppca.loc)
    scale = float(ppca.noise_scale.detach())
    guide = guide or {"guide": ExactGuide(ppca)}
    shape = {"data_dim": D, "latent_dim": K, "likelihood": Gaussian(scale)}
    return VAE(decoder=decoder, **guide, **shape).double()


def encoder_near_the_prior(inputs):
    """An encoder whose initial q is close to the prior."""
    encoder = mlp(inputs, 2 * K, seed=0)
    with torch.no_grad():
        encoder[0].weight.mul_(0.1)
    return encoder


def assert_same(a, b):
    for name in ("mean", "sd", "draws", "ess"):
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True
        )


# The exact guide


def test_the_exact_guide_has_full_ess_and_the_moments_of_independent_draws():
    """Sample means and variances of S exact draws: normal, and chi^2 of S - 1."""
    (ppca, truth), S = make(), 2000
    _, loadings, noise = truth
    x = incomplete_rows(ppca)
    found = impute(ppca.model, ExactGuide(ppca), x, S, seed=0)
    incomplete = np.isnan(x).any(1)
    assert_close(
        found.ess[incomplete], torch.full((int(incomplete.sum()),), float(S)).double(), 1e-9
    )
    assert found.ess[~incomplete].isnan().all()
    mean, _ = oracles.impute(x, *truth)
    _, covariances = oracles.posterior(x, *truth)
    of_mean = np.einsum("dk,nkl,dl->nd", loadings, covariances, loadings)  # Var E[x_d | z]
    missing = np.isnan(x)
    z = ((found.mean.numpy() - mean) / np.sqrt(of_mean / S))[missing]
    assert np.abs(z).max() < oracles.z_limit(missing.sum())
    spread = S * ((found.sd.numpy() ** 2 - noise) / of_mean)[missing]
    tails = np.minimum(stats.chi2(S - 1).sf(spread), stats.chi2(S - 1).cdf(spread))
    assert tails.min() > oracles.FAILURE_RATE / missing.sum() / 2
    assert_close(found.sd[~torch.from_numpy(missing)], torch.zeros(int((~missing).sum())).double())
    # The closed form agrees with the oracle.
    assert_close(mean, ppca.impute(x).mean)


def test_errors_decrease_with_the_number_of_draws():
    ppca, _ = make()
    x = incomplete_rows(ppca)
    exact = ppca.impute(x).mean
    errors = [
        float((impute(ppca.model, widened(ppca), x, S, seed=0).mean - exact).square().mean())
        for S in (20, 20_000)
    ]
    assert 100 < errors[0] / errors[1] < 10_000  # 1000 in expectation


# Weighted draws of an inexact guide


def replicates(x, number):
    return np.tile(x, (number, 1)), lambda values: values.reshape(number, *x.shape)


def test_weights_correct_for_an_inexact_guide():
    """The standard error of the mean estimate is found from replicates of each row."""
    (ppca, truth), R = make(), 60
    _, loadings, noise = truth
    x, c2, shift = incomplete_rows(ppca, 6), 2.0, 0.7
    missing, (many, by_replicate) = np.isnan(x), replicates(x, R)
    found = impute(ppca.model, widened(ppca, c2, shift), many, 1000, seed=0)
    assert (found.ess[found.ess.isfinite()] > 200).all()
    assert (found.ess[found.ess.isfinite()] < 700).all()
    mean, sd = oracles.impute(x, *truth)
    limit = stats.t(R - 1).isf(oracles.FAILURE_RATE / missing.sum() / 4)

    def z_score(values, expected):
        each = by_replicate(values)
        error = each.std(0, ddof=1) / R**0.5
        return (np.abs(each.mean(0) - expected)[missing] / error[missing]).max()

    assert z_score(found.mean.numpy(), mean) < limit
    assert z_score(found.sd.numpy() ** 2, sd**2) < limit
    # Unweighted, the same draws have the moments of the guide, which the check rejects.
    _, covariances = oracles.posterior(x, *truth)
    roots = np.linalg.cholesky(covariances)
    own_mean = mean + shift * np.einsum("dk,nk->nd", loadings, roots[:, :, 0])
    own_variance = noise + c2 * np.einsum("dk,nkl,dl->nd", loadings, covariances, loadings)
    assert z_score(found.mean.numpy(), own_mean) > 3 * limit
    assert z_score(found.sd.numpy() ** 2, own_variance) > 3 * limit


def test_draws_are_from_the_joint_conditional_distribution():
    """Squared Mahalanobis distances of the draws and of their mean are chi^2."""
    ppca, truth = make()
    loc, loadings, noise = truth
    x = incomplete_rows(ppca, 40)
    x, S = x[np.isnan(x).sum(1) > 1][:2], 1500
    many, by_replicate = replicates(x, S)
    found = impute(ppca.model, widened(ppca, 1.5, 0.3), many, 200, draws=1, seed=0)
    assert found.draws.shape == (1, *many.shape)
    draws = by_replicate(found.draws.numpy())
    assert_draws_of_missing_values(draws, x, loc, oracles.ppca_covariance(loadings, noise), 6)


def test_draws_with_the_same_z_have_independent_noise():
    (ppca, (_, _, noise)), S = make(), 3000
    x = incomplete_rows(ppca, 3)
    found = impute(ppca.model, ExactGuide(ppca), x, 1, draws=S, seed=0)
    missing = np.isnan(x)
    deviation = (found.draws - found.mean).numpy()[:, missing]
    assert_close(found.sd.numpy()[missing], np.full(missing.sum(), noise**0.5))
    size = (deviation**2).sum() / noise
    law = stats.chi2(deviation.size)
    assert min(law.sf(size), law.cdf(size)) > oracles.FAILURE_RATE / 2
    correlations = np.corrcoef(deviation.T)[np.triu_indices(missing.sum(), 1)]
    assert np.abs(correlations).max() * S**0.5 < oracles.z_limit(correlations.size)


def test_running_moments_equal_those_of_all_draws():
    """Also if weights change by hundreds of nats from run to run."""
    rng = np.random.default_rng(0)
    log_w = 30 * rng.normal(size=(50, 4)) + 1000 * rng.normal(size=4)
    log_w[:20] = np.sort(log_w[:20], 0)
    log_w[:5, 1] = -np.inf
    means, variances = 1e4 + rng.normal(size=(50, 4, 3)), rng.uniform(size=(50, 4, 3))
    parts = [torch.from_numpy(values) for values in (log_w, means, variances)]
    moments = WeightedMoments(parts[1][0])
    for piece in zip(*(part.split(4) for part in parts), strict=True):
        moments.add(*piece)
    found = moments.estimate(None)
    w = np.exp(log_w - log_w.max(0))
    w /= w.sum(0)
    mean = np.einsum("sb,sbd->bd", w, means)
    variance = np.einsum("sb,sbd->bd", w, variances + (means - mean) ** 2)
    assert_close(found.mean, mean, 1e-12)
    assert_close(found.variance, variance, 1e-9)
    assert_close(found.ess, 1 / (w**2).sum(0), 1e-9)


def test_draws_are_resampled_from_all_runs_in_proportion_to_their_weights(monkeypatch):
    """300 draws in runs of 16 are resampled as if they were one run."""
    ppca, _ = make()
    monkeypatch.setattr(batching, "ROWS_AT_ONCE", dict.fromkeys(batching.ROWS_AT_ONCE, 16))
    x = incomplete_rows(ppca)[np.isnan(incomplete_rows(ppca)).any(1)][:1]
    pair = Pair(ppca.model, ExactGuide(ppca))
    sampler = _Sampler(pair, pair.observe(x))
    runs = list(sampler._runs(300))
    assert [len(run.log_weights()) for run in runs] == [16] * 18 + [12]
    R, total, resampled = 4000, torch.zeros(1).double(), sampler._run(pair, 4000)
    for run in runs:
        weights = (
            run.log_weights().double() * 0 + 1 + torch.arange(len(run.log_weights()))[:, None]
        )
        total = total + weights.sum(0)
        resample(resampled, run, R, weights, total)
    every = torch.cat([sites(run.guide)["z"]["value"] for run in runs])[:, 0, 0]
    expected = torch.cat([1 + torch.arange(len(r.log_weights())) for r in runs]).double()
    picked = sites(resampled.guide)["z"]["value"][:, 0, 0]
    counts = (picked[:, None] == every).double().sum(0)
    assert counts.sum() == R
    expected = R * expected / expected.sum()
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert stats.chi2(len(every) - 1).sf(float(chi2)) > oracles.FAILURE_RATE


# Other models and dtypes


def test_a_linear_vae_agrees_with_ppca():
    ppca, _ = make()
    x = incomplete_rows(ppca)
    vae = linear_vae(ppca)
    expected = impute(ppca.model, ExactGuide(ppca), x, 300, draws=3, seed=0)
    found = impute(vae.model, vae.guide, x, 300, draws=3, seed=0)
    for name in ("mean", "sd", "draws"):
        assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("missing", ["zeros", "zeros+mask"])
def test_log_likelihoods_of_a_linear_vae_with_missing_values_agree_with_ppca(missing):
    ppca, truth = make()
    x = incomplete_rows(ppca, 20)
    encoder = encoder_near_the_prior(D if missing == "zeros" else 2 * D)
    vae = linear_vae(ppca, encoder=encoder, missing=missing)
    found = log_likelihood(vae.model, vae.guide, x, 2000, refine=100, seed=0)
    exact = ppca.log_likelihood(x).detach()
    assert_close(exact, oracles.log_density(x, *truth), 1e-9)
    z = (found.value - exact) / found.standard_error
    assert found.reliable.all() and float(z.abs().max()) < oracles.z_limit(20)


@pytest.mark.slow
def test_refining_the_guide_increases_the_effective_sample_size():
    ppca, truth = make(noise=0.1)
    x = incomplete_rows(ppca)
    vae = linear_vae(ppca, encoder=encoder_near_the_prior(D))
    amortized = impute(vae.model, vae.guide, x, 400, seed=0)
    full = impute(vae.model, vae.guide, x, 400, refine=200, seed=0)
    diagonal = impute(vae.model, vae.guide, x, 400, refine=200, covariance="diagonal", seed=0)
    incomplete = full.ess.isfinite()
    ess = [float(found.ess[incomplete].median()) for found in (amortized, diagonal, full)]
    print("ESS of 400 draws: amortized {:.0f}, diagonal {:.0f}, full {:.0f}".format(*ess))
    assert ess[0] < 20 and ess[0] < ess[1] / 2 and ess[1] < ess[2]
    assert full.ess[incomplete].min() > 100
    assert "NOT reliable in" in repr(amortized) and "remedy: refine=300" in repr(amortized)
    assert "trusted" not in repr(full) and "effective draws of z per row: median" in repr(full)
    spread = oracles.impute(x, *truth)[1].max()
    assert (full.mean - ppca.impute(x).mean).abs().max() < 6 * spread / 100**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_missing_binary_values_have_the_exact_probability(dtype):
    """z takes effectively two values, so that the exact answer is a sum over both."""
    logits = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 1.5, 0.0]], dtype=dtype)

    def model(x=None, *, mask=None, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=dtype), 1.0).to_event(1))
            px = dist.Bernoulli(logits=torch.where(z > 0, logits[0], logits[1]))
            px = px if mask is None else px.mask(mask)
            pyro.sample("x", px.to_event(1), obs=x)

    def guide(x, **_):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1, dtype=dtype), 1.0).to_event(1))

    x = torch.tensor([[1.0, torch.nan, torch.nan], [0.0, 1.0, 1.0]], dtype=dtype)
    found = impute(model, guide, x, 100_000, draws=2000, seed=0)
    p = logits.double().sigmoid()
    weight = p[0, 0] / (p[0, 0] + p[1, 0])
    expected = weight * p[0, 1:] + (1 - weight) * p[1, 1:]
    assert found.mean.dtype == dtype
    assert (found.mean[0, 1:].double() - expected).abs().max() < 6 * 0.5 / 50_000**0.5
    assert_close(
        found.sd[0, 1:].double() ** 2, (found.mean * (1 - found.mean))[0, 1:].double(), 1e-5
    )
    drawn = found.draws[:, 0, 1:].double()
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert (drawn.mean(0) - expected).abs().max() < 6 * 0.5 / 2000**0.5
    both = weight * p[0, 1] * p[0, 2] + (1 - weight) * p[1, 1] * p[1, 2]
    assert abs(drawn.prod(1).mean() - both) < 6 * 0.5 / 2000**0.5
    assert found.ess[1].isnan() and torch.equal(found.mean[1], x[1])


def test_single_precision_agrees_with_double_and_observed_values_are_unchanged():
    vae = VAE.mlp(D, K, hidden=(8,), missing="zeros+mask", seed=0)
    ppca, _ = make()
    x = incomplete_rows(ppca)
    found = impute(vae.model, vae.guide, x, 4000, draws=2, refine=40, seed=0)
    double = impute(vae.double().model, vae.guide, x, 4000, refine=40, seed=1)
    assert found.mean.dtype == found.sd.dtype == found.draws.dtype == found.ess.dtype
    assert found.mean.dtype == torch.float64
    observed = ~np.isnan(x)
    for values in (found.mean.numpy(), *found.draws.numpy()):
        assert np.array_equal(values[observed], x[observed])
    error = found.sd / found.ess[:, None].sqrt() + double.sd / double.ess[:, None].sqrt()
    missing = torch.from_numpy(~observed)
    assert ((found.mean - double.mean).abs() / error)[missing].max() < 6


class EntryMask(Messenger):
    """Masks entries of an observed site."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def _pyro_sample(self, msg):
        if self.mask is None or not msg["is_observed"] or not msg["value"].numel():
            return
        fn, mask = msg["fn"], self.mask
        if fn.event_shape:
            msg["fn"] = fn.base_dist.mask(mask).to_event(1)
        else:
            msg["fn"] = fn.mask(mask if fn.batch_shape[-2:] == mask.shape else mask.T)


def with_mask_keyword(model):
    """An external model with a keyword ``mask``."""

    def program(x=None, mask=None, **keywords):
        with EntryMask(mask):
            return model(x, **filter_kwargs(model, keywords))

    program.__signature__ = inspect.signature(program)
    program.__wrapped__ = model  # so that its modules are found
    return program


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_external_pairs_agree_with_a_loop_over_rows_and_draws(name, float64):
    model, guide, x = user_pairs.PAIRS[name]()
    model, S = with_mask_keyword(model), 4
    x = oracles.with_missing_values(x.numpy().astype(float), 0.3, seed=0)
    x = torch.from_numpy(x[np.isnan(x).any(1)][:4])
    with loops.Recorder() as recorder:
        found = impute(model, guide, x, S, seed=0)
    for part in modules_of(model, guide):
        part.eval()
    filled, observed = x.nan_to_num(), ~x.isnan()
    with poutine.block(), torch.no_grad():
        nodes = poutine.trace(model).get_trace(filled).nodes
    name = next(k for k, s in nodes.items() if s["type"] == "sample" and s["is_observed"])
    for n in range(len(x)):
        row, mask = filled[n : n + 1], observed[n : n + 1]
        weights, means, variances = [], [], []
        for draw in recorder.draws(S):
            z = recorder.row(draw, n)
            with torch.no_grad():
                log_p = loops.log_joint(model, z, row, mask=mask)
                weights.append(float(log_p - loops.log_joint(guide, z, row)))
                with pyro.get_param_store().scope(pyro.get_param_store().get_state()):
                    trace = poutine.trace(poutine.condition(model, data=z)).get_trace(row)
            fn = trace.nodes[name]["fn"]
            means.append(fn.mean.flatten().numpy())
            variances.append((fn.mean * 0 + fn.variance).flatten().numpy())
        w = np.exp(np.array(weights) - max(weights))
        w /= w.sum()
        mean = w @ np.array(means)
        variance = w @ (np.array(variances) + np.array(means) ** 2) - mean**2
        assert float(found.ess[n]) == pytest.approx(1 / (w**2).sum(), rel=1e-8)
        missing = ~observed[n]
        np.testing.assert_allclose(found.mean[n][missing], mean[missing], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(
            found.sd[n][missing] ** 2, variance[missing], rtol=1e-7, atol=1e-10
        )


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_draws_of_external_pairs_are_resampled_independently_per_datum(name, float64):
    model, guide, x = user_pairs.PAIRS[name]()
    x = torch.as_tensor(x).double()[:5]
    pair = Pair(model, guide)
    sampler = _Sampler(pair, Batch(x, torch.ones_like(x).bool()))
    resampled, run = (sampler._run(pair, number) for number in (3, 4))
    weights = nn.functional.one_hot(torch.arange(5) % 4, 4).T.double()
    resample(resampled, run, 3, weights, weights.sum(0))
    for key, site in sites(resampled.guide).items():
        picked = by_draw_and_datum(resampled, site, site["value"])
        drawn = sites(run.guide)[key]
        every = by_draw_and_datum(run, drawn, drawn["value"])
        for n in range(5):
            assert torch.equal(picked[:, n], every[n % 4, n].expand_as(picked[:, n]))
    with torch.no_grad():
        assert sampler._draw_x(resampled, 3).shape == (3, *x.shape)
    assert (
        impute(with_mask_keyword(model), guide, x, 5, draws=2, refine=2, seed=0).draws is not None
    )


def test_a_per_datum_guide_finds_rows_by_position():
    ppca, _ = make()
    x = incomplete_rows(ppca)
    x[::3] = ppca.sample(N, seed=2)[::3].numpy()  # complete rows are skipped
    guide = PerDatumGuide(N, K).double()
    with torch.no_grad():
        guide.unconstrained_scale.fill_(-60.0)
        guide.loc.copy_(torch.randn(N, K, generator=torch.Generator().manual_seed(0)).double())
    found = impute(ppca.model, guide, x, 3, seed=0)
    missing = torch.from_numpy(np.isnan(x))
    expected = guide.loc @ ppca.loadings.mT + ppca.loc
    assert (found.mean - expected.detach())[missing].abs().max() < 1e-2


# Memory


def test_no_more_rows_are_decoded_at_once_than_the_limit(monkeypatch):
    ppca, _ = make()
    batch_sizes = []

    class Counting(nn.Linear):
        def forward(self, z):
            batch_sizes.append(len(z))
            return super().forward(z)

    vae = VAE(
        decoder=Counting(K, D),
        encoder=mlp(D, 2 * K),
        likelihood=Gaussian(1.0),
        data_dim=D,
        latent_dim=K,
    ).double()
    monkeypatch.setattr(batching, "ROWS_AT_ONCE", dict.fromkeys(batching.ROWS_AT_ONCE, 10))
    for S, draws in ((25, 0), (5, 10), (1, 3)):
        found = impute(vae.model, vae.guide, incomplete_rows(ppca, 14), S, draws=draws, seed=0)
        assert max(batch_sizes) <= 10
        assert found.mean.isfinite().all()


# Masks and missing values


def test_a_mask_is_equivalent_to_nan_for_any_masked_values():
    vae = VAE.mlp(D, K, hidden=(8,), missing="zeros+mask", seed=0).double()
    ppca, _ = make()
    x = incomplete_rows(ppca)
    mask, run = ~np.isnan(x), partial(impute, draws=2, refine=3, seed=0)
    expected = run(vae.model, vae.guide, x, 50)
    for arbitrary in (0.0, 1e6, np.nan):
        for form in (mask, torch.from_numpy(mask)):
            filled = np.where(mask, x, arbitrary)
            assert_same(run(vae.model, vae.guide, filled, 50, mask=form), expected)
    assert_same(run(vae.model, vae.guide, pd.DataFrame(x), 50), expected)


def test_complete_rows_are_unchanged():
    vae = VAE.mlp(D, K, hidden=(8,), seed=0).double()
    ppca, _ = make()
    whole = ppca.sample(N, seed=1)
    found = impute(vae.model, vae.guide, whole, 5, draws=2)
    assert torch.equal(found.mean, whole) and not found.sd.any()
    assert torch.equal(found.draws, whole.expand(2, -1, -1)) and found.ess.isnan().all()
    assert repr(found) == f"Imputation: 0 of {N * D} entries filled\n  2 draws"
    incomplete = whole.clone()
    incomplete[3, 2] = torch.nan
    found = impute(vae.model, vae.guide, incomplete, 5, draws=2, seed=0)
    assert found.ess.isfinite().nonzero().flatten().tolist() == [3]
    others = torch.arange(N) != 3
    assert torch.equal(found.mean[others], whole[others])
    assert found.to_dict()["ess"][0] is None
    np.testing.assert_array_equal(found.to_frame().to_numpy(), found.mean.numpy())


def test_results_are_reproducible_and_global_state_is_unchanged():
    model, guide, x = user_pairs.regularized()
    x = torch.from_numpy(oracles.with_missing_values(x.numpy(), 0.3, seed=0))
    buffers = [b.clone() for b in model.__self__.buffers()]
    before = torch.get_rng_state()
    first, again, other = (impute(model, guide, x, 8, draws=2, seed=s) for s in (1, 1, 2))
    assert_same(first, again)
    assert not torch.equal(first.mean, other.mean)
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, buffers, model.__self__.buffers()))
    assert model.__self__.training


# The input of encoders, in every function that runs a pair


class RecordingEncoder(nn.Module):
    """An encoder that records its inputs."""

    def __init__(self, width):
        super().__init__()
        self.network, self.inputs = mlp(2 * width, 2 * K, (8,), seed=0), []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return self.network(x)


RUNS = {
    "elbo": lambda v, x, m: elbo(v.model, v.guide, x, mask=m, batch_size=5),
    "log_weights": lambda v, x, m: log_weights(v.model, v.guide, x, 3, mask=m),
    "log_likelihood": lambda v, x, m: log_likelihood(v.model, v.guide, x, 30, mask=m),
    "refined": lambda v, x, m: log_likelihood(v.model, v.guide, x, 30, refine=2, mask=m),
    "gaps": lambda v, x, m: gaps(
        v.model, v.guide, x, steps=2, num_samples=30, tolerance=1.0, mask=m
    ),
    "kl_by_dimension": lambda v, x, m: kl_by_dimension(v.model, v.guide, x, mask=m),
    "latent_means": lambda v, x, m: predictive.latent_means(v.model, v.guide, x, mask=m),
    "reconstruct": lambda v, x, m: predictive.reconstruct(v.model, v.guide, x, mask=m),
    "vae.reconstruct": lambda v, x, m: v.reconstruct(x, mask=m),
    "to_arviz": lambda v, x, m: to_arviz(v.model, v.guide, x, num_samples=4, mask=m),
    "impute": lambda v, x, m: impute(v.model, v.guide, x, 4, draws=2, mask=m),
    "fit_svi": lambda v, x, m: fit_svi(v.model, v.guide, x, steps=2, mask=m),
    "batches": lambda v, x, m: fit_svi(v.model, v.guide, x, steps=4, batch_size=5, mask=m),
    "Trace_ELBO": lambda v, x, m: fit_svi(
        v.model, v.guide, x, steps=2, mask=m, objective=pyro.infer.Trace_ELBO()
    ),
    "x_val": lambda v, x, m: fit_svi(
        v.model, v.guide, np.where(m, x, np.nan), steps=2, x_val=np.where(m, x, np.nan)
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_encoders_receive_zeros_and_the_mask_in_every_function(name):
    ppca, _ = make()
    x = incomplete_rows(ppca)
    x = x[np.isnan(x).any(1)][:6]
    mask = ~np.isnan(x)
    shape = {"data_dim": D, "latent_dim": K, "likelihood": Gaussian("shared")}
    vae = VAE(
        decoder=mlp(K, D, seed=1), encoder=RecordingEncoder(D), missing="zeros+mask", **shape
    ).double()
    RUNS[name](vae, np.where(mask, x, 1e6), mask)
    rows = torch.from_numpy(np.hstack([np.where(mask, x, 0.0), mask]))
    assert vae.guide.encoder.inputs
    for inputs in vae.guide.encoder.inputs:
        assert (inputs[:, None] == rows).all(-1).any(1).all()


# A VAE trained on missing values


# With the mask as input the encoder is twice as wide and trains more slowly.
@pytest.mark.parametrize(
    ("inputs", "epochs"),
    [("zeros", 20), pytest.param("zeros+mask", 40, marks=pytest.mark.slow)],
)
def test_a_vae_trained_on_incomplete_digits_imputes_them(inputs, epochs):
    x, train, test = torch.from_numpy(digits()), slice(0, 1000), slice(1000, 1200)
    missing = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    incomplete = torch.where(missing, torch.nan, x)
    vae = VAE.mlp(64, 8, hidden=(64,), missing=inputs, seed=0)
    fit_svi(
        vae.model,
        vae.guide,
        incomplete[train],
        epochs=epochs,
        batch_size=50,
        lr=3e-3,
        capture=False,
        seed=0,
    )
    found = impute(vae.model, vae.guide, incomplete[test], 100, seed=0)

    def rmse(imputed):
        return float((imputed - x[test])[missing[test]].square().mean().sqrt())

    ours, means = rmse(found.mean), rmse(incomplete[train].nanmean(0).expand(200, -1))
    print(f"{inputs}: RMSE {ours:.4f}, {ours / means:.3f} of column means'\n{found}")
    assert ours < 0.9 * means


# Errors


def program_of(sample):
    """A model that observes x by ``sample``."""

    def model(x=None, *, mask=None, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            sample(x, z, torch.ones_like(x).bool() if mask is None else mask)

    return model


def prior(x, **_):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))


def independent(fn, mask):
    return fn.mask(mask).to_event(1)


def two_sites(x, z, mask):
    for name, part in (("a", slice(0, 2)), ("b", slice(2, 4))):
        pyro.sample(name, independent(dist.Normal(z, 1.0), mask[:, part]), obs=x[:, part])


UNSUPPORTED = {
    "several sites": (two_sites, r"observes several sites, \['a', 'b'\]"),
    "no moments": (
        lambda x, z, m: pyro.sample(
            "x", independent(dist.Cauchy(z[..., :1] + 0 * x, 1.0), m), obs=x
        ),
        r"site 'x' of the model \(Cauchy\) has no mean and variance in closed form",
    ),
    "no closed form": (
        lambda x, z, m: pyro.sample(
            "x",
            independent(
                dist.TransformedDistribution(
                    dist.Normal(z[..., :1] + 0 * x, 1.0), [dist.transforms.TanhTransform()]
                ),
                m,
            ),
            obs=x,
        ),
        "has no mean and variance in closed form",
    ),
    "a transform": (
        lambda x, z, m: pyro.sample("x", independent(dist.Normal(z[..., :1], 1.0), m), obs=2 * x),
        "does not hold x itself",
    ),
    "fewer columns": (
        lambda x, z, m: pyro.sample("x", independent(dist.Normal(z, 1.0), m[:, :2]), obs=x[:, :2]),
        r"does not hold x itself, of shape \(rows, 4\): it has shape \(3, 2\)",
    ),
    "dependent cells": (
        lambda x, z, m: pyro.sample(
            "x",
            dist.MultivariateNormal(z[..., :1] + 0 * x, torch.eye(4).double()).mask(m.any(-1)),
            obs=x,
        ),
        r"entries of site 'x' of the model \(MultivariateNormal\) are not independent given z",
    ),
    "nothing": (lambda x, z, m: None, "the model observes nothing"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_rejected(name):
    sample, match = UNSUPPORTED[name]
    x = torch.full((3, 4), 0.5).double()
    x[:, 1] = torch.nan
    with pytest.raises(ValueError, match=match):
        impute(program_of(sample), prior, x, 4)


def test_invalid_weights_are_reported():
    x = torch.full((3, 4), 0.5).double()
    x[0, 1] = torch.nan

    def broken(x, z, m):
        pyro.sample("x", independent(dist.Normal(z[..., :1] + torch.nan * x, 1.0), m), obs=x)

    def impossible(x, z, m):
        pyro.sample("x", independent(dist.Normal(z[..., :1] + 0 * x, 1.0), m), obs=x)
        pyro.factor("f", z[..., 0] * 0 - torch.inf)

    with validation(False), pytest.raises(FloatingPointError, match="'loc' that is NaN in row 0"):
        impute(program_of(broken), prior, x, 4)
    with (
        validation(False),
        pytest.raises(
            FloatingPointError, match=r"site 'f' of the model has a log density .* in row 0"
        ),
    ):
        impute(program_of(impossible), prior, x, 40, draws=2)


BAD = [
    ({"num_samples": 0}, "num_samples must be a whole number >= 1; got 0"),
    ({"draws": -1}, "draws must be a whole number >= 0; got -1"),
    ({"refine": -1}, "refine must be a whole number >= 0; got -1"),
    ({"covariance": "full"}, "covariance= is the family of the refined q; it needs refine=steps"),
    ({"covariance": "round", "refine": 2}, "covariance must be one of .*; got 'round'"),
    ({"mask": np.ones((2, D))}, "mask must be boolean"),
    ({"x": np.ones((2, D + 1))}, rf"x must have shape \(rows, {D}\) for this model"),
    ({"x": np.full((2, D), np.inf)}, "x has 14 infinite entries"),
    ({"model": user_pairs.tutorial()[0]}, "the model takes no keyword 'mask'"),
]


@pytest.mark.parametrize(("changes", "match"), BAD, ids=[str(c)[:30] for c, _ in BAD])
def test_bad_arguments(changes, match):
    ppca, _ = make()
    arguments = {"model": ppca.model, "guide": ExactGuide(ppca), "x": incomplete_rows(ppca)}
    with pytest.raises(ValueError, match=match):
        impute(**(arguments | {"num_samples": 4} | changes))


def test_data_outside_the_support_are_rejected():
    vae = VAE.mlp(D, K, likelihood=Bernoulli(), seed=0)
    x = np.full((2, D), 0.5)
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"x has 13 entries outside \{0, 1\}"):
        impute(vae.model, vae.guide, x)
