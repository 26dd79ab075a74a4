"""KL per latent dimension, mutual information, and the diagnosis of posterior collapse."""

import json
import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
import user_pairs
from draws import draw
from scipy import stats

from ppl_vae import (
    PPCA,
    VAE,
    AmortizedGuide,
    ExactGuide,
    PerDatumGuide,
    collapse,
    digits,
    fit_closed_form,
    fit_svi,
    mlp,
)
from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.evaluation import Collapse
from ppl_vae.evaluation.latent_space import aggregate_posterior
from ppl_vae.evaluation.latent_space.collapse import kl_by_dimension
from ppl_vae.evaluation.latent_space.spectrum import spectrum
from ppl_vae.likelihoods import Bernoulli, Gaussian
from ppl_vae.objectives.bounds import ELBO


def test_at_the_optimum_of_ppca_each_axis_carries_half_log_of_its_ratio():
    x = oracles.simulate_ppca((16, 8, 4), 1, 300, 7, seed=0)
    ppca = PPCA.like(x, 3, seed=0)
    fit_closed_form(ppca, x)
    turned = ppca.canonical()
    guide = ExactGuide(turned, covariance="diagonal")
    values, _ = oracles.sample_spectrum(x)
    noise = values[3:].mean()
    expected = 0.5 * np.log(values[:3] / noise)
    assert kl_by_dimension(turned.model, guide, x).numpy() == pytest.approx(expected, abs=1e-7)


def test_kl_by_dimension_sums_to_the_kl_of_the_elbo_for_any_batch_size():
    vae = VAE.mlp(6, 3, hidden=(8,), seed=0)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    kl = kl_by_dimension(vae.model, vae.guide, x)
    whole = ELBO().terms(vae.model, vae.guide, x)[1].mean()
    assert float(kl.sum()) == pytest.approx(float(whole.detach()), rel=1e-5)
    parts = kl_by_dimension(vae.model, vae.guide, x, batch_size=7)
    assert parts.numpy() == pytest.approx(kl.numpy(), rel=1e-5)


def test_the_kl_is_zero_if_the_guide_is_the_prior():
    ppca = PPCA(5, 2, seed=0)
    encoder = torch.nn.Linear(5, 2)
    torch.nn.init.zeros_(encoder.weight), torch.nn.init.zeros_(encoder.bias)
    guide = AmortizedGuide(encoder, 2, covariance="unit")
    assert kl_by_dimension(ppca.model, guide, torch.randn(9, 5)).abs().max() == 0


def test_a_full_covariance_is_rejected():
    ppca = PPCA(5, 2, seed=0)
    guide = AmortizedGuide(mlp(5, 5, seed=0), 2, covariance="full")
    with pytest.raises(ValueError, match="site 'z' has a MultivariateNormal"):
        kl_by_dimension(ppca.model, guide, torch.randn(9, 5))


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_external_pairs(name):
    model, guide, x = user_pairs.PAIRS[name]()
    kl = kl_by_dimension(model, guide, x, seed=0)
    assert kl.dim() == 1 and kl.isfinite().all()


def test_spectrum_and_collapsing_axes_of_the_digits():
    found = spectrum(digits(), 10, {"unit": 1.0, "small": 1e-3})
    values, _ = oracles.sample_spectrum(digits())
    assert found.eigenvalues.numpy() == pytest.approx(values, abs=1e-10)
    assert float(found.eigenvalues[0]) == pytest.approx(0.699, abs=5e-4)
    assert found.collapsing(1.0) == list(range(10)) and found.collapsing(1e-3) == []
    assert found.collapsing(float(found.eigenvalues[4])) == [4, 5, 6, 7, 8, 9]


def test_axes_collapse_at_the_threshold_of_ppca():
    # For a given noise the best column of an axis is zero if and only if l_i <= s2.
    x = oracles.simulate_ppca((16, 8, 4), 1, 300, 7, seed=0)
    found = spectrum(x, 3, {})
    for noise in (0.5, 5.0, 12.0, 40.0):
        lengths = (found.eigenvalues[:3] - noise).clamp(min=0).sqrt()
        off = (lengths == 0).nonzero().flatten().tolist()
        assert found.collapsing(noise) == off
        best = oracles_log_p(found.eigenvalues.numpy(), lengths.numpy(), noise)
        for axis in range(3):
            longer = lengths.clone()
            longer[axis] = math.sqrt(float(lengths[axis]) ** 2 + 0.01)
            assert oracles_log_p(found.eigenvalues.numpy(), longer.numpy(), noise) < best


def oracles_log_p(eigenvalues, lengths, noise):
    variances = np.full(len(eigenvalues), noise)
    variances[: len(lengths)] += lengths**2
    return -0.5 * np.sum(np.log(2 * np.pi * variances) + eigenvalues / variances)


def test_the_spectrum_of_fewer_rows_than_columns():
    x = oracles.simulate_ppca((16, 8), 1, 30, 9, seed=0)[:5]
    found = spectrum(x, 2, {})
    assert len(found.eigenvalues) == 9 and (found.eigenvalues[5:] == 0).all()
    with pytest.raises(ValueError, match="latent_dim"):
        spectrum(x, 0, {})


# The information in codes


def pair_with_posterior(q, K):
    """A pair with q(z | x) = q(x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    return model, guide


def linear_pair(slope, variance, K=1):
    """x ~ N(0, I) makes q(z | x) = N(slope x, variance): q(z) = N(0, slope^2 + variance)."""
    return pair_with_posterior(lambda x: dist.Normal(slope * x, variance**0.5).to_event(1), K)


def of_linear_pair(slope, variance, K):
    """Mean KL, mutual information and KL of the aggregate, in the limit of many data."""
    information = 0.5 * K * math.log(1 + slope**2 / variance)
    second = slope**2 + variance
    far = 0.5 * K * (second - 1 - math.log(second))
    return information + far, information, far


def standardized_errors(slope, variance, K, N, num_samples, repetitions):
    """(estimate - truth) / error of all three terms, and the share of underestimated estimates."""
    truth, found, underestimated = of_linear_pair(slope, variance, K), [], 0
    for seed in range(repetitions):
        codes = collapse(
            *linear_pair(slope, variance, K), draw(N, K, seed=seed),
            num_samples=num_samples, seed=seed,
        )  # fmt: skip
        values = codes.mean_kl, codes.mutual_information, codes.aggregate_kl
        errors = codes.mean_kl_error, codes.mutual_information_error, codes.aggregate_kl_error
        found.append([(v - t) / e for v, t, e in zip(values, truth, errors, strict=True)])
        underestimated += codes.underestimated
    return np.array(found), underestimated / repetitions


def assert_calibrated_errors(z, repetitions):
    limit = stats.norm.isf(5e-7)
    assert abs(z.mean()) < limit / repetitions**0.5 + 0.3  # the allowed bias
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], repetitions - 1) / (repetitions - 1)
    assert low < z.var(ddof=1) < high
    covered = int((np.abs(z) < 1.96).sum())
    assert covered >= stats.binom.ppf(5e-7, repetitions, 0.93)


@pytest.mark.slow
def test_standard_errors_are_calibrated_although_the_mixture_is_shared():
    """All data share one mixture; the standard deviation over data still gives the error."""
    z, underestimated = standardized_errors(1.5, 0.36, 1, 150, 2, 80)
    assert underestimated == 0
    for column in z.T:
        assert_calibrated_errors(column, 80)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slope", "variance", "K", "N", "num_samples"),
    [
        (0.8, 0.36, 1, 200, 1),
        (1.5, 0.36, 1, 200, 4),
        (0.8, 0.36, 2, 500, 2),
        (0.1, 0.99, 2, 300, 2),
    ],
)
def test_intervals_have_nominal_coverage(slope, variance, K, N, num_samples):
    z, underestimated = standardized_errors(slope, variance, K, N, num_samples, 400)
    assert underestimated < 0.05
    for column in z.T[:2]:  # where the aggregate is the prior its estimate is all bias
        assert_calibrated_errors(column, 400)


def test_estimates_without_nominal_coverage_are_lower_bounds():
    z, underestimated = standardized_errors(0.9, 0.19, 8, 400, 2, 3)
    assert underestimated == 1 and z[:, 1].max() < -4
    # Both bounds hold: the lower one by the estimate, the upper one by the moments.
    codes = collapse(*linear_pair(0.9, 0.19, 8), draw(400, 8), seed=0)
    truth = of_linear_pair(0.9, 0.19, 8)[1]
    assert codes.mutual_information < codes.max_mutual_information == pytest.approx(math.log(400))
    width = 5 * codes.mean_kl_error
    assert codes.upper_bound == pytest.approx(truth, abs=width) and codes.moment_kl < 0.1
    assert codes.failure is None and "too few data, 400, to distinguish" in codes.verdict
    assert f"at most {codes.upper_bound:.3f}" in repr(codes)


def test_the_estimated_bias_has_the_right_size():
    found = [
        collapse(*linear_pair(0.8, 0.36, 3), draw(200, 3, seed=seed), num_samples=2, seed=seed)
        for seed in range(40)
    ]
    off = np.array([codes.mutual_information for codes in found]) - of_linear_pair(0.8, 0.36, 3)[1]
    kl = np.array([codes.mean_kl for codes in found]) - of_linear_pair(0.8, 0.36, 3)[0]
    # The KL has no bias and most of the same noise.
    bias = off.mean() - kl.mean()
    stated = np.mean([codes.bias for codes in found])
    assert 0.6 * stated < -bias < 2.5 * stated
    # It is small, but not relative to the error: intervals would have less than nominal coverage.
    errors = np.array([codes.mutual_information_error for codes in found])
    assert (
        0.01 < stated < errors.mean() and np.mean([codes.underestimated for codes in found]) > 0.5
    )
    # Far below log N, that bound is no explanation.
    low = next(codes for codes in found if codes.underestimated)
    assert not low.saturated and low.mutual_information < math.log(200) - math.log(2)
    assert "there are too few data, 200" in repr(low) and "log N" not in repr(low)


def test_the_terms_for_few_data_agree_with_quadrature():
    """For fixed data the means over many draws converge to one-dimensional integrals."""
    x = torch.tensor([[-2.0], [-1.5], [0.3], [0.4], [2.5]]).double()
    means, sd = 0.7 * x.numpy()[:, 0], 0.5
    codes = collapse(*linear_pair(0.7, sd**2), x, num_samples=4000, seed=0)

    def log_mixture(z):
        return np.log(np.mean([stats.norm.pdf(z, m, sd) for m in means]))

    for n, mean in enumerate(means):
        q = stats.norm(mean, sd)
        functions = {
            "information": lambda z, q=q: q.logpdf(z) - log_mixture(z),
            "aggregate": lambda z: log_mixture(z) - stats.norm.logpdf(z),
            "retrieval_prob": lambda z, q=q: q.pdf(z) / np.exp(log_mixture(z)) / len(means),
        }
        for name, function in functions.items():
            first, second = (
                q.expect(lambda z, k=k, f=function: f(z) ** k, lb=mean - 4, ub=mean + 4)
                for k in (1, 2)
            )
            error = math.sqrt((second - first**2) / 4000)
            z = (float(getattr(codes, name)[n]) - first) / error
            assert abs(z) < oracles.z_limit(15), name


def test_the_aggregate_posterior_is_the_mixture_over_all_rows_for_any_block_size(monkeypatch):
    x = oracles.simulate_ppca((16, 8), 1, 60, 5, seed=0)[:20]
    x = oracles.with_missing_values(x, 0.3, seed=0)
    ppca = PPCA.from_parameters(draw(5, 2), draw(5, seed=1), 0.7)
    guide, rows = ExactGuide(ppca), torch.tensor([3, 0, 7, 8, 15, 19, 2, 11])
    parameters = (*(p.detach().numpy() for p in (ppca.loc, ppca.loadings)), 0.49)
    means, covariances = oracles.posterior(x[rows], *parameters)
    for pairs in (40, 2**16):
        monkeypatch.setattr(aggregate_posterior, "DENSITIES_PER_BLOCK", pairs)
        data = Batch(torch.from_numpy(np.nan_to_num(x)), torch.from_numpy(~np.isnan(x)))
        pair = Pair(ppca.model, guide)
        with torch.no_grad():
            blocks = list(aggregate_posterior.code_densities(pair, data, rows, 3))
        assert len(blocks) == {40: 4, 2**16: 1}[pairs]
        z = torch.cat([block.run.guide.nodes["z"]["value"] for block in blocks], 1).numpy()
        densities = [
            stats.multivariate_normal.pdf(z, m, v) for m, v in zip(means, covariances, strict=True)
        ]
        expected = np.log(np.mean(densities, 0))
        found = torch.cat([block.log_aggregate for block in blocks], 1).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        own = np.log(np.stack([densities[n][:, n] for n in range(8)], 1))
        log_q = torch.cat([block.log_q for block in blocks], 1).numpy()
        np.testing.assert_allclose(log_q, own, rtol=1e-9)
        prior = torch.cat([block.log_prior for block in blocks], 1).numpy()
        np.testing.assert_allclose(prior, stats.norm.logpdf(z).sum(-1), rtol=1e-9)


def test_on_principal_axes_posterior_means_vary_by_one_minus_a_ratio():
    x = oracles.simulate_ppca((16, 8, 4), 1, 300, 7, seed=0)
    ppca = PPCA.like(x, 3, seed=0)
    fit_closed_form(ppca, x)
    turned = ppca.canonical()
    values, _ = oracles.sample_spectrum(x)
    expected = oracles.posterior_mean_variance(values[:3], values[3:].mean())
    for guide in (ExactGuide(turned), ExactGuide(turned, covariance="diagonal")):
        codes = collapse(turned.model, guide, x, num_samples=2, seed=0)
        assert codes.mean_variances.numpy() == pytest.approx(expected, abs=1e-9)
        each = 0.5 * np.log(values[:3] / values[3:].mean())
        assert codes.kl_by_dimension.numpy() == pytest.approx(each, abs=1e-7)
        total = oracles.mean_kl(values[:3], values[3:].mean())
        assert abs(codes.mean_kl - total) < oracles.z_limit() * codes.mean_kl_error
        assert codes.names == ("z[0]", "z[1]", "z[2]") and bool(codes.active.all())
        assert codes.spectrum.collapsing(codes.spectrum.noise["model"]) == []
        assert "uses 3 of 3 axes" in repr(codes)
        assert codes.failure is None and codes.verdict.startswith("3 of 3 dimensions active")


@pytest.mark.parametrize("name", [*user_pairs.PAIRS, "param_table", "auto_normal"])
def test_the_terms_of_external_pairs_add_up(name, float64):
    model, guide, x = (user_pairs.PAIRS.get(name) or getattr(user_pairs, name))()
    codes = collapse(model, guide, x, num_samples=3, seed=0)
    assert codes.mean_kl == pytest.approx(codes.mutual_information + codes.aggregate_kl, abs=1e-12)
    assert len(codes.kl) == len(x) and len(codes.names) == len(codes.mean_variances)
    assert (
        bool((codes.retrieval_prob <= 1 + 1e-9).all())
        and codes.mutual_information <= codes.max_mutual_information
    )
    assert bool(codes.mean_variances.isfinite().all())
    assert bool(codes.kl_by_dimension.isfinite().all()) != (name == "auto_normal")
    again = collapse(model, guide, x, num_samples=3, seed=0)
    assert torch.equal(again.information, codes.information)
    assert repr(codes).startswith(f"collapse: {codes.verdict}\n  KL ")


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_codes_of_identical_data_have_no_mutual_information(name, float64):
    """Each code has the same density under all data, for any plates and sites."""
    model, guide, x = user_pairs.PAIRS[name]()
    codes = collapse(model, guide, x[:1].repeat(5, 1), num_samples=4, seed=0)
    assert float(codes.information.abs().max()) < 1e-9
    assert float((codes.retrieval_prob - 0.2).abs().max()) < 1e-9


def test_the_kl_of_levels_in_opposite_order_is_estimated_from_draws(float64):
    """q(z2 | z1): the closed form of a site given the other is wrong, and the mean is noisy."""
    model, guide, x = user_pairs.two_level()
    codes = collapse(model, guide, x, num_samples=5, seed=0)
    assert codes.names == ("z2[0]", "z2[1]", "z1[0]", "z1[1]", "z1[2]")
    assert float(codes.kl_by_dimension.sum()) == pytest.approx(codes.mean_kl, abs=1e-12)
    many = collapse(model, guide, x, num_samples=2000, seed=0).mean_variances[:2]
    few = [collapse(model, guide, x, num_samples=2, seed=s).mean_variances[:2] for s in range(60)]
    error = torch.stack(few).std(0) / 60**0.5
    assert float(((torch.stack(few).mean(0) - many) / error).abs().max()) < oracles.z_limit(2)


# Posterior collapse, lookup tables, and neither


def per_datum_guide(means, scale):
    guide = PerDatumGuide(*means.shape).double()
    with torch.no_grad():
        guide.loc.copy_(means)
        guide.unconstrained_scale.fill_(2 * math.log(scale))
    return guide


def test_a_guide_equal_to_the_prior_is_posterior_collapse():
    ppca = PPCA.from_parameters(torch.zeros(5, 2).double(), torch.zeros(5).double(), 1.0)
    codes = collapse(ppca.model, per_datum_guide(torch.zeros(30, 2), 1.0), draw(30, 5), seed=0)
    assert codes.failure == "posterior collapse"
    assert repr(codes).startswith("collapse: posterior collapse: q(z | x) is the prior in all 2")
    for value in (codes.mean_kl, codes.mutual_information, codes.aggregate_kl, codes.bias):
        assert abs(value) < 1e-9
    assert float((codes.retrieval_prob - 1 / 30).abs().max()) < 1e-9
    assert (
        not codes.underestimated and not codes.active.any() and codes.kl_by_dimension.max() < 1e-9
    )


def test_a_constant_q_other_than_the_prior_is_no_posterior_collapse():
    ppca = PPCA(5, 2, seed=0).double()
    codes = collapse(ppca.model, per_datum_guide(torch.ones(30, 2), 0.1), draw(30, 5), seed=0)
    assert (
        codes.failure is None
        and "differs from the prior, but no dependence on x is detected" in codes.verdict
    )
    assert abs(codes.mutual_information) < 1e-9 and codes.aggregate_kl > 2
    assert codes.aggregate_kl == pytest.approx(codes.mean_kl)
    # The aggregate is one Gaussian, whose KL follows from its moments.
    assert codes.moment_kl == pytest.approx(codes.aggregate_kl, abs=0.5)


def test_narrow_codes_far_from_the_prior_are_a_lookup_table():
    ppca, x = PPCA(5, 2, seed=0).double(), draw(40, 5)
    codes = collapse(ppca.model, per_datum_guide(30 * draw(40, 2), 1e-3), x, seed=0)
    assert codes.failure == "lookup table" and codes.underestimated
    assert repr(codes).startswith(
        "collapse: lookup table: codes identify their datum with probability 1.00"
    )
    assert (
        codes.mutual_information
        == pytest.approx(math.log(40), abs=1e-9)
        == codes.max_mutual_information
    )
    assert codes.mean_kl > codes.max_mutual_information and codes.moment_kl > 0.5 * codes.mean_kl
    assert codes.aggregate_kl == pytest.approx(
        codes.mean_kl - codes.max_mutual_information, abs=1e-9
    )
    # Narrow codes within the prior cannot be distinguished from good codes of a larger data set.
    near = collapse(ppca.model, per_datum_guide(draw(40, 2), 1e-3), x, seed=0)
    assert near.failure is None and near.underestimated and near.saturated
    assert "no estimate from N data exceeds log N = 3.689" in repr(near)
    assert (
        "codes identify their datum with probability 1.00: there are too few data, 40,"
        in near.verdict
    )


def test_collapsed_dimensions_are_counted():
    means = torch.stack([draw(50), 0 * draw(50), 0 * draw(50)], 1)
    codes = collapse(
        PPCA(5, 3, seed=0).double().model, per_datum_guide(means, 1.0), draw(50, 5), seed=0
    )
    assert codes.active.tolist() == [True, False, False]
    assert codes.verdict == "1 of 3 dimensions active, 2 collapsed to the prior"
    variance = float(means[:, 0].var(correction=0))
    assert float(codes.mean_variances[0]) == pytest.approx(variance, abs=1e-9)


def test_the_threshold_of_ppca_is_printed_if_there_is_a_noise_variance():
    x = digits()[:200]
    vae = VAE.mlp(64, 4, hidden=(8,), likelihood=Gaussian(1.0), seed=0)
    codes = collapse(vae.model, vae.guide, x, num_samples=1, seed=0)
    assert codes.spectrum.noise == {"model": 1.0} and "uses 0 of 4 axes" in repr(codes)
    other = collapse(vae.model, vae.guide, x, num_samples=1, noise_variance=0.01, seed=0)
    assert "PPCA with this noise variance, 0.01, uses 4 of 4 axes" in repr(other)
    x = np.where(np.arange(64) % 7 == 3, np.nan, x)
    assert collapse(vae.model, vae.guide, x, num_samples=1).spectrum is None
    binary = VAE.mlp(64, 2, hidden=(8,), likelihood=Bernoulli(), seed=0)
    codes = collapse(binary.model, binary.guide, (digits()[:50] > 0.5).astype(float))
    assert codes.spectrum is None and "PPCA" not in repr(codes)
    incomplete = oracles.with_missing_values(
        oracles.simulate_ppca((16, 8), 1, 60, 5, seed=0), 0.2, seed=0
    )
    ppca = PPCA.like(incomplete, 2, seed=0)
    assert len(collapse(ppca.model, ExactGuide(ppca), incomplete).spectrum.eigenvalues) == 5


def test_rows_select_the_data():
    ppca, x, rows = PPCA(5, 2, seed=0).double(), draw(40, 5), torch.tensor([7, 3, 11])
    guide = per_datum_guide(draw(40, 2), 0.5)
    some = collapse(ppca.model, guide, x, rows=rows, num_samples=2, seed=0)
    alone = collapse(
        ppca.model, per_datum_guide(guide.loc[rows], 0.5), x[rows], num_samples=2, seed=0
    )
    assert some.max_mutual_information == math.log(3)
    np.testing.assert_allclose(some.information, alone.information, rtol=1e-9)


def test_a_result_has_a_frame_and_can_be_stored():
    codes = collapse(*linear_pair(0.8, 0.36, 2), draw(30, 2), num_samples=2, seed=0)
    frame = codes.to_frame()
    assert list(frame.index) == ["z[0]", "z[1]"]
    assert list(frame.columns) == ["kl", "mean_variance", "active"]
    again = Collapse.from_dict(json.loads(json.dumps(codes.to_dict())))
    assert repr(again) == repr(codes) and torch.equal(again.information, codes.information)


def test_bad_arguments_of_collapse():
    model, guide = linear_pair(0.8, 0.36)
    with pytest.raises(ValueError, match="mutual information needs at least 2 rows of x"):
        collapse(model, guide, draw(1, 1))
    with pytest.raises(ValueError, match="num_samples must be a whole number >= 1; got 0"):
        collapse(model, guide, draw(5, 1), num_samples=0)

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x).to_event(1))

    with pytest.raises(ValueError, match="guide is a Delta: a point mass has no dens"):
        collapse(model, point, draw(5, 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_vae_collapses_at_the_threshold_and_not_with_a_learned_noise(seed):
    x, found = digits(), []
    for likelihood in (Gaussian(1.0), Gaussian("shared")):
        vae = VAE.mlp(64, 8, hidden=(64,), likelihood=likelihood, seed=seed)
        fit_svi(vae.model, vae.guide, x, epochs=150, batch_size=150, lr=3e-3, seed=seed)
        found.append(collapse(vae.model, vae.guide, x, seed=seed))
    unit, learned = found
    assert unit.failure == "posterior collapse" and float(unit.kl_by_dimension.max()) < 0.05
    assert unit.spectrum.collapsing(1.0) == list(range(8)) and unit.mutual_information < 0.05
    assert int(learned.active.sum()) >= 5 and learned.failure is None and learned.underestimated


# The upper bound on the mutual information


TRIL = torch.tensor([[0.8, 0.0], [-0.5, 0.3]], dtype=torch.float64)
GAUSSIANS = {
    "diagonal": (
        lambda x: dist.Normal(0.7 * x + 0.1, x.new_tensor([0.5, 0.9])).to_event(1),
        np.diag([0.25, 0.81]),
    ),
    "full": (
        lambda x: dist.MultivariateNormal(0.7 * x + 0.1, scale_tril=TRIL),
        (TRIL @ TRIL.T).numpy(),
    ),
}


@pytest.mark.parametrize("name", GAUSSIANS)
@pytest.mark.parametrize("num_samples", [1, 3])
def test_the_upper_bound_has_no_monte_carlo_error(name, num_samples):
    """Mean KL and moments of the mixture agree with numpy for any seed."""
    q, covariance = GAUSSIANS[name]
    x = oracles.simulate_ppca((2.0,), 0.5, 60, 2, seed=1)
    means = 0.7 * x + 0.1
    trace, log_det = np.trace(covariance), np.linalg.slogdet(covariance)[1]
    kl = 0.5 * (trace + (means**2).sum(1) - 2 - log_det)
    variances = means.var(0) + np.diag(covariance)
    moments = 0.5 * (variances + means.mean(0) ** 2 - 1 - np.log(variances)).sum()
    for seed in (0, 1):
        pair = pair_with_posterior(q, 2)
        codes = collapse(*pair, torch.as_tensor(x), num_samples=num_samples, seed=seed)
        np.testing.assert_allclose(codes.closed_kl.numpy(), kl, rtol=1e-10)
        assert codes.moment_kl == pytest.approx(moments, rel=1e-10)
        assert codes.upper_bound == pytest.approx(kl.mean() - moments, rel=1e-9)
        assert codes.kl.numpy() != pytest.approx(kl, rel=1e-3)


def test_the_upper_bound_is_from_draws_if_the_kl_has_no_closed_form():
    model, guide, x = user_pairs.auto_normal()
    codes = collapse(model, guide, x, seed=0)
    assert torch.equal(codes.closed_kl, codes.kl)


def test_an_estimate_above_the_upper_bound_is_reported():
    """q is almost the prior, with one draw per datum: for some seeds the estimate is too large."""

    def q(x):
        return dist.Normal(0.02 * x, 1.0).to_event(1)

    x = oracles.simulate_ppca((1.0,), 0.5, 40, 2, seed=1)
    found = [
        collapse(*pair_with_posterior(q, 2), x, num_samples=1, seed=seed) for seed in range(12)
    ]
    above = [codes.mutual_information > codes.upper_bound + 0.0005 for codes in found]
    assert 0 < sum(above) < 12
    for codes, is_above in zip(found, above, strict=True):
        note = f"at most {codes.upper_bound:.3f}; the excess is Monte Carlo error"
        assert codes.above_upper_bound == is_above == (note in repr(codes))
        assert len({f"{codes.upper_bound:.12f}" for codes in found}) == 1
