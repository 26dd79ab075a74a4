"""PPCA and factor analysis on data with missing values, against slow dense oracles."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import oracles
from fitted import close, parameters
from ppl_vae import PPCA, ExactGuide, fit_em, fit_svi, log_weights
from ppl_vae.data import row_blocks
from ppl_vae.data.row_blocks import RowBlocks
from ppl_vae.inference.em.complete import CompleteDataEM, CompleteProblem
from ppl_vae.inference.em.missing import MissingDataEM, MissingDataProblem
from ppl_vae.inference.em.noise import Noise
from ppl_vae.inference.em.run import RESTARTED
from ppl_vae.models.linear_gaussian import MissingnessPatterns
from ppl_vae.models.sufficient_statistics import summarize

SPECTRUM, N, D, K = (9.0, 4.0, 2.5), 60, 7, 3
MECHANISMS = {"MCAR": oracles.with_holes, "MAR": oracles.drop_high}
NOISES = ("isotropic", "diagonal")


def data(mechanism="MCAR", fraction=0.3, N=N, D=D, seed=0):
    x = oracles.simulate_ppca(SPECTRUM, 0.8, N, D, seed)
    return MECHANISMS[mechanism](x, fraction, seed + 1)


def make(noise="isotropic", seed=0, D=D, K=K):
    """A model in general position, and its parameters as arrays (noise as variances)."""
    rng = np.random.default_rng(seed)
    loc, loadings = rng.normal(size=D), rng.normal(size=(D, K))
    variance = rng.uniform(0.3, 2.0, size=() if noise == "isotropic" else D)
    return assigned(loc, loadings, variance), (loc, loadings, variance)


def assigned(loc, loadings, variance):
    return PPCA.from_parameters(
        torch.tensor(loadings), torch.tensor(loc), torch.tensor(variance).double().sqrt()
    )


# What is known of a row


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_posterior_and_log_likelihood_are_those_of_what_was_observed(noise, mechanism):
    (ppca, truth), x = make(noise), data(mechanism)
    means, covariances = oracles.posterior(x, *truth)
    posterior = ppca.posterior(x)
    assert (posterior.batch_shape, posterior.event_shape) == ((N,), (K,))
    close(posterior.mean, means)
    close(posterior.covariance_matrix, covariances)
    close(ppca.log_likelihood(x), oracles.log_density(x, *truth))
    close(ppca.reconstruct(x), means @ truth[1].T + truth[0])


@pytest.mark.parametrize("noise", NOISES)
def test_a_mask_is_as_good_as_nan_whatever_it_hides(noise):
    (ppca, truth), x = make(noise), data()
    mask = ~np.isnan(x)
    expected = oracles.log_density(x, *truth)
    for filler in (0.0, 1e6, np.nan):
        filled = np.where(mask, x, filler)
        for form in (mask, torch.from_numpy(mask), mask.tolist()):
            close(ppca.log_likelihood(filled, mask=form), expected)
        close(ppca.posterior(filled, mask=mask).mean, ppca.posterior(x).mean.detach())
        close(ppca.reconstruct(filled, mask=mask), ppca.reconstruct(x).detach())
        close(ppca.impute(filled, mask=mask).mean, ppca.impute(x).mean)
    both = x.copy()
    both[0, 1], mask[0, 1] = 3.0, False
    x[0, 1] = np.nan
    close(ppca.log_likelihood(both, mask=mask), oracles.log_density(x, *truth))


@pytest.mark.parametrize("noise", NOISES)
def test_where_nothing_is_missing_a_mask_changes_nothing(noise):
    ppca, _ = make(noise)
    x = oracles.simulate_ppca(SPECTRUM, 0.8, N, D, seed=0)
    full = np.ones(x.shape, dtype=bool)
    assert torch.equal(ppca.log_likelihood(x, mask=full), ppca.log_likelihood(x))
    # One missing value: the other rows go through the patterns, and come out the same.
    holed = x.copy()
    holed[0, 0] = np.nan
    close(ppca.log_likelihood(holed)[1:], ppca.log_likelihood(x)[1:].detach())
    close(ppca.posterior(holed).mean[1:], ppca.posterior(x).mean[1:].detach())
    tril = ppca.posterior(x).scale_tril[1:]
    close(ppca.posterior(holed).scale_tril[1:], tril.detach())


def test_gradients_are_those_of_the_dense_density():
    ppca, _ = make("diagonal")
    x = data(N=12)
    names = [ppca.loadings, ppca.loc, ppca.noise_scale_unconstrained]
    actual = torch.autograd.grad(ppca.log_likelihood(x).sum(), names)
    C = ppca.loadings @ ppca.loadings.mT + ppca.noise_scale.square().diag()
    total = torch.zeros((), dtype=torch.float64)
    for row in torch.from_numpy(x):
        s = (~row.isnan()).nonzero().flatten()
        block = torch.distributions.MultivariateNormal(ppca.loc[s], C[s][:, s])
        total = total + block.log_prob(row[s])
    torch.testing.assert_close(actual, torch.autograd.grad(total, names), rtol=1e-9, atol=1e-9)


def test_rows_that_share_a_pattern_are_solved_once():
    few = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]], dtype=bool)
    like = torch.zeros(3, dtype=torch.float64)
    patterns = MissingnessPatterns.shared(torch.from_numpy(few), like)
    assert len(patterns.observed) == 3
    assert np.array_equal(patterns.gather_rows(patterns.observed).numpy(), few)
    sums = patterns.sum_by_pattern(torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64))
    assert sorted(sums.tolist()) == [10.0, 101.0, 1000.0]
    assert MissingnessPatterns.shared(torch.eye(3).bool(), like).index is None


@pytest.mark.parametrize("size", [1, 1000, 2**23])
def test_pieces_of_any_size_give_the_same(size, monkeypatch):
    """Of rows with many and with few patterns."""
    ppca, truth = make()
    x = data()
    x[20:] = np.where(np.isnan(x[20]), np.nan, oracles.with_holes(x, 0.0, 0)[20:])
    x = x[~np.isnan(x).all(1)]
    x[:, 0] = np.where(np.isnan(x[:, 0]), 1.0, x[:, 0])
    monkeypatch.setattr(row_blocks, "WORKING_FLOATS", size)
    close(ppca.log_likelihood(x), oracles.log_density(x, *truth))
    close(ppca.posterior(x).mean, oracles.posterior(x, *truth)[0])
    mean, sd = oracles.impute(x, *truth)
    close(ppca.impute(x).mean, mean)
    close(ppca.impute(x).sd, sd)
    fit_em(ppca, x, max_iterations=1)
    close(parameters(ppca)[1], oracles.holed_step(x, *truth)[1], 1e-9)


# One step


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("accelerate", [True, False], ids=["PX-EM", "EM"])
def test_a_step_is_that_of_the_slow_oracle(noise, mechanism, accelerate):
    (ppca, truth), x = make(noise), data(mechanism)
    for _ in range(3):
        before = truth
        result = fit_em(ppca, x, accelerate=accelerate, max_iterations=1)
        truth = oracles.holed_step(x, *before, noise == "diagonal", accelerate)
        for mine, its in zip(parameters(ppca), truth, strict=True):
            close(mine, its, 1e-9)
        ends = [oracles.log_density(x, *p).mean() for p in (before, truth)]
        close(result.log_likelihood.numpy(), ends)
        assert float(result.objective[0]) == pytest.approx(ends[0], rel=1e-12)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("accelerate", [True, False], ids=["PX-EM", "EM"])
def test_the_bound_after_an_m_step_is_log_p_less_the_kl_of_the_old_posterior(noise, accelerate):
    (ppca, truth), x = make(noise), data()
    result = fit_em(ppca, x, accelerate=accelerate, max_iterations=1)
    means, covariances = oracles.posterior(x, *truth)
    eta, root = np.zeros(K), np.eye(K)
    if accelerate:  # in the coordinates in which the expanded prior is N(0, I)
        eta = means.mean(0)
        root = np.linalg.cholesky(covariances.mean(0) + np.cov(means.T, bias=True))
    back = np.linalg.inv(root)
    new_means, new_covariances = oracles.posterior(x, *parameters(ppca))
    kl = [
        oracles.gaussian_kl(back @ (m - eta), back @ V @ back.T, *its)
        for m, V, *its in zip(means, covariances, new_means, new_covariances, strict=True)
    ]
    expected = (oracles.log_density(x, *parameters(ppca)) - kl).mean()
    assert float(result.objective[1]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("expand", [True, False], ids=["PX-EM", "EM"])
def test_where_nothing_is_missing_the_steps_are_those_on_the_covariance(noise, expand):
    x = oracles.simulate_ppca(SPECTRUM, 0.8, N, D, seed=0)
    (ppca, (_, loadings, variance)), blocks = make(noise), RowBlocks(x)
    columns, covariance = summarize(blocks)
    rule = Noise.of(ppca, columns, 1e-6, accelerated=expand)
    W, psi = torch.tensor(loadings), torch.tensor(variance).expand(D)
    prior_update = "expand" if expand else "none"
    one = CompleteDataEM(CompleteProblem(covariance, rule, "full", prior_update), W, psi)
    other = MissingDataEM(
        MissingDataProblem(blocks, columns, rule, "full", prior_update), W, columns.mean, psi
    )
    for _ in range(10):
        after, following = one.step()
        its_after, its_following = other.step()
        assert float(its_after) == pytest.approx(float(after), rel=1e-11)
        for mine, its in zip(one.own_squares(), other.own_squares(), strict=True):
            close(mine, its.numpy())
        one, other = following, its_following
        for name in ("log_likelihood", "bound", "loadings", "loc", "variance"):
            close(getattr(other, name), getattr(one, name).numpy())


# Monotone, and to the optimum

WILD = {
    "tiny loadings": (1e-3, 1.0, 0.0),
    "huge loadings": (1e3, 1.0, 0.0),
    "tiny noise": (1.0, 1e-6, 0.0),
    "huge noise": (1.0, 1e6, 0.0),
    "all tiny": (1e-3, 1e-4, 0.0),
    "all huge": (1e3, 1e4, 0.0),
    "far away": (1.0, 1.0, 1e3),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("start", WILD)
@pytest.mark.parametrize("accelerate", [True, False], ids=["PX-EM", "EM"])
def test_log_p_never_falls(noise, mechanism, start, accelerate):
    x, (scale, variance, offset) = data(mechanism), WILD[start]
    rng = np.random.default_rng(3)
    loc, loadings = offset * rng.normal(size=D), scale * rng.normal(size=(D, K))
    if noise == "diagonal":
        variance = variance * rng.uniform(0.5, 2.0, size=D)
    ppca = assigned(loc, loadings, variance)
    result = fit_em(ppca, x, accelerate=accelerate, tol=0.0, max_iterations=30)
    # Rounding counts in r / sigma; far from the data terms of this size cancel.
    size = result.objective.abs()
    least = min(np.min(variance), np.min(parameters(ppca)[2]))
    slack = 1e-14 * (D / np.sqrt(least) + torch.maximum(size[1:], size[:-1]))
    assert (result.objective.diff() >= -slack).all()
    assert (result.objective <= result.log_likelihood + 1e-14 * D / np.sqrt(least)).all()
    assert torch.equal(result.objective[::2], result.log_likelihood[::2])
    truth = oracles.log_density(x, *parameters(ppca)).mean()
    assert float(result.log_likelihood[-1]) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_px_em_ends_where_em_ends(noise, mechanism):
    x = data(mechanism, fraction=0.2, N=200, D=8)
    ends = {}
    for accelerate in (True, False):
        ppca = PPCA.like(x, 2, noise=noise, seed=0)
        result = fit_em(ppca, x, accelerate=accelerate, tol=1e-11)
        ends[accelerate] = float(result.log_likelihood[-1]), ppca.covariance(), result.steps
        assert result.stopped.startswith("converged")
    assert ends[True][0] == pytest.approx(ends[False][0], abs=1e-8)
    torch.testing.assert_close(ends[True][1], ends[False][1], rtol=0, atol=1e-2)
    assert ends[True][2] < ends[False][2]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("ratio", [1e4, 1e8])
def test_px_em_does_not_stall_where_the_noise_is_small(noise, ratio):
    x = oracles.with_holes(oracles.simulate_ppca([ratio] * 3, 1.0, 200, 30, seed=0), 0.3, 1)
    ends = []
    for seed in (0, 1):
        ppca = PPCA.like(x, 3, noise=noise, seed=seed)
        result = fit_em(ppca, x)
        assert result.steps < 60
        assert result.stopped.startswith("converged")
        ends.append(float(result.log_likelihood[-1]))
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)
    crawling = fit_em(PPCA.like(x, 3, noise=noise, seed=0), x, accelerate=False, max_iterations=60)
    before = next((n for n in crawling.notes if n.startswith(RESTARTED)), "")
    if ratio == 1e4:  # slower than what rounding hides at 1e8, where the certificate finds it out
        assert not before
        assert float(crawling.log_likelihood[-1]) < ends[0] - 0.02
        assert crawling.certificate > 0.01 and not crawling.converged
    else:
        assert before


def test_a_fit_goes_on_from_where_it_stopped():
    x = data()
    whole, parts = PPCA.like(x, K, seed=0), PPCA.like(x, K, seed=0)
    fit_em(whole, x, tol=0.0, max_iterations=6)
    for _ in range(2):
        fit_em(parts, x, tol=0.0, max_iterations=3)
    for mine, its in zip(parameters(whole), parameters(parts), strict=True):
        close(mine, its)


@pytest.mark.parametrize("noise", NOISES)
def test_permuted_rows_and_other_units_change_what_they_must(noise):
    x, order = data(), np.random.default_rng(0).permutation(N)
    ppca, other = PPCA.like(x, K, noise=noise, seed=0), PPCA.like(x, K, noise=noise, seed=0)
    fit_em(ppca, x, tol=1e-11)
    fit_em(other, 10 * x[order] + 5, tol=1e-11)
    observed = np.mean((~np.isnan(x)).sum(1))
    shift = (ppca.log_likelihood(x) - other.log_likelihood(10 * x + 5)).mean()
    assert float(shift.detach()) == pytest.approx(observed * np.log(10), abs=1e-8)
    close(other.loc, 10 * ppca.loc.detach().numpy() + 5, 1e-3)


def test_a_mean_far_from_the_data_is_not_started_from():
    x = data() + 1e9
    ppca = PPCA(D, K, seed=0).double()
    result = fit_em(ppca, x)
    assert any("far from any data" in note for note in result.notes)
    reference = fit_em(PPCA.like(x, K, seed=0), x)
    assert float(result.log_likelihood[-1]) == pytest.approx(
        float(reference.log_likelihood[-1]), abs=1e-6
    )


@pytest.mark.parametrize("convert", [pd.DataFrame, torch.from_numpy, lambda x: x.astype("f4")])
def test_holes_in_data_of_any_kind(convert):
    x = np.round(data(), 2)
    ppca = PPCA.like(convert(x), K, seed=0).double()
    fit_em(ppca, convert(x))
    expected = fit_em(PPCA.like(x, K, seed=0), x).log_likelihood[-1]
    assert float(ppca.log_likelihood(x).mean().detach()) == pytest.approx(
        float(expected), abs=1e-6
    )


def test_constant_columns_with_holes_are_noted():
    x = data()
    x[:, 2] = np.where(np.isnan(x[:, 2]), np.nan, 0.1)
    assert "constant columns: 2" in fit_em(PPCA.like(x, 2, seed=0), x).notes


# Imputation


@pytest.mark.parametrize("noise", NOISES)
def test_holes_are_filled_with_their_conditional_mean_and_sd(noise):
    (ppca, truth), x = make(noise), data("MAR")
    found = ppca.impute(x)
    mean, sd = oracles.impute(x, *truth)
    close(found.mean, mean)
    close(found.sd, sd)
    seen = ~np.isnan(x)
    assert np.array_equal(found.mean.numpy()[seen], x[seen])
    assert found.draws is None
    assert repr(found).startswith(f"Imputation: {int((~seen).sum())} of {x.size} cells filled, st")


@pytest.mark.parametrize("noise", NOISES)
def test_draws_of_a_row_s_holes_are_joint(noise):
    """Their squared Mahalanobis distances are chi^2, and so is that of their mean."""
    (ppca, (loc, loadings, variance)), x = make(noise), data("MAR")
    x = x[np.isnan(x).sum(1) > 1][:2]
    S, C = 4000, oracles.ppca_covariance(loadings, variance)
    draws = ppca.impute(x, num_samples=S, seed=0).draws.numpy()
    assert draws.shape == (S, *x.shape)
    for n, row in enumerate(x):
        m, s = np.isnan(row), ~np.isnan(row)
        assert (draws[:, n, s] == row[s]).all()
        gain = C[np.ix_(m, s)] @ np.linalg.inv(C[np.ix_(s, s)])
        inverse = np.linalg.inv(C[np.ix_(m, m)] - gain @ C[np.ix_(s, m)])
        off = draws[:, n, m] - (loc[m] + gain @ (row - loc)[s])
        tails = [
            stats.chi2(m.sum() * S).sf(np.einsum("si,ij,sj->", off, inverse, off)),
            stats.chi2(m.sum()).sf(S * off.mean(0) @ inverse @ off.mean(0)),
        ]
        assert min(tails) > oracles.FAILURE_RATE / 8
        assert tails[0] < 1 - oracles.FAILURE_RATE / 8


def test_draws_repeat_with_a_seed():
    (ppca, _), x = make(), data()
    first, again = (ppca.impute(x, num_samples=2, seed=4).draws for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, ppca.impute(x, num_samples=2, seed=5).draws)


def test_complete_data_have_nothing_to_fill():
    ppca, _ = make()
    x = oracles.simulate_ppca(SPECTRUM, 0.8, N, D, seed=0)
    found = ppca.impute(x, num_samples=2)
    assert np.array_equal(found.mean.numpy(), x)
    assert not found.sd.any()
    assert np.array_equal(found.draws.numpy(), np.stack([x, x]))


def test_a_single_precision_model_leaves_the_digits_of_observed_cells():
    x = data()
    ppca = PPCA.like(x, K, seed=0).float()
    found = ppca.impute(x).mean.numpy()
    assert found.dtype == np.float64
    assert np.array_equal(found[~np.isnan(x)], x[~np.isnan(x)])


@pytest.mark.parametrize("noise", NOISES)
def test_intervals_cover(noise):
    """95 % intervals over five fits at N = 500, D = 20, K = 3, 20 % missing."""
    inside, cells = 0, 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scale = 0.7 if noise == "isotropic" else rng.uniform(0.4, 1.2, size=20)
        whole = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 20))
        whole = whole + scale * rng.normal(size=(500, 20))
        x = oracles.with_holes(whole, 0.2, seed)
        ppca = PPCA.like(x, 3, noise=noise, seed=0)
        fit_em(ppca, x)
        found, holes = ppca.impute(x), np.isnan(x)
        z = np.abs(whole - found.mean.numpy())[holes] / found.sd.numpy()[holes]
        inside, cells = inside + int((z < stats.norm.ppf(0.975)).sum()), cells + holes.sum()
    print(f"{noise}: {inside / cells:.4f} of {cells} cells covered")
    assert cells >= 2000
    assert 0.935 < inside / cells < 0.965


@pytest.mark.data
@pytest.mark.skipif("PPL_VAE_DATA" not in os.environ, reason="needs PPL_VAE_DATA")
def test_metabolites_are_filled_as_well_as_by_iterative_svd_and_with_intervals():
    folder = Path(os.environ["PPL_VAE_DATA"]) / "pcaMethods"
    x, truth = (
        pd.read_csv(folder / f"metaboliteData{which}.csv", index_col=0).to_numpy(dtype=float)
        for which in ("", "Complete")
    )
    holes = np.isnan(x)
    assert holes.sum() == 419

    def error(filled):
        return np.sqrt(np.mean((filled - truth)[holes] ** 2))

    means = error(np.where(holes, np.nanmean(x, 0), x))
    for latent_dim in range(1, 9):
        ppca = PPCA.like(x, latent_dim, seed=0)
        fit_em(ppca, x)
        found = ppca.impute(x)
        mine, svd = error(found.mean.numpy()), error(oracles.iterative_svd(x, latent_dim))
        z = np.abs(found.mean.numpy() - truth)[holes] / found.sd.numpy()[holes]
        covered = (z < stats.norm.ppf(0.975)).mean()
        print(
            f"K = {latent_dim}: RMSE {mine:.4f}, {mine / means:.3f} of column means', "
            f"{mine / svd:.3f} of iterative SVD's, {covered:.3f} covered"
        )
        assert mine <= 0.5 * means
        assert mine <= 1.02 * svd
        assert covered > 0.88  # the noise is neither normal nor of one size


# The Pyro program


@pytest.mark.parametrize("noise", NOISES)
def test_the_exact_guide_s_weights_are_p_of_what_was_observed(noise):
    (ppca, truth), x = make(noise), data()
    weights = log_weights(ppca.model, ExactGuide(ppca), x, 3, seed=0)
    close(weights, np.tile(oracles.log_density(x, *truth), (3, 1)), 1e-9)


@pytest.mark.parametrize("noise", NOISES)
def test_svi_comes_to_the_optimum_of_px_em(noise):
    x = data(fraction=0.2, N=100)
    best, ppca = PPCA.like(x, 2, noise=noise, seed=0), PPCA.like(x, 2, noise=noise, seed=0)
    top = float(fit_em(best, x).log_likelihood[-1])
    fit_em(ppca, x, max_iterations=2)
    start = float(ppca.log_likelihood(x).mean().detach())
    fit_svi(ppca.model, ExactGuide(ppca), x, steps=120, lr=0.03, capture=False, seed=0)
    reached = float(ppca.log_likelihood(x).mean().detach())
    assert start < top - 0.1
    assert top - 0.01 < reached < top + 1e-9


# What is refused


@pytest.mark.parametrize("method", ["posterior", "log_likelihood", "impute", "reconstruct"])
@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (np.ones((N, D - 1), dtype=bool), r"mask must be boolean .*\(60, 7\); .*\(60, 6\)"),
        (np.ones((N, D)), "mask must be boolean .*float64"),
        (np.arange(N)[:, None] + np.zeros(D) != 5, r"nothing observed: \[5\]; drop them"),
    ],
)
def test_masks_that_make_no_sense_are_refused(method, mask, match):
    ppca, _ = make()
    with pytest.raises(ValueError, match=match):
        getattr(ppca, method)(np.zeros((N, D)), mask=mask)
    with pytest.raises(ValueError, match=match):
        fit_em(ppca, np.random.default_rng(0).normal(size=(N, D)), mask=mask)


def test_a_projection_needs_complete_rows():
    ppca, _ = make()
    x = data()
    with pytest.raises(
        ValueError, match=f"{np.isnan(x).sum()} missing .*shrink=True takes missing"
    ):
        ppca.reconstruct(x, shrink=False)


@pytest.mark.parametrize("bad", [-1, 1.5, True])
def test_a_number_of_draws_is_whole(bad):
    with pytest.raises((ValueError, TypeError), match="num_samples"):
        make()[0].impute(data(), num_samples=bad)


def test_columns_without_a_cell_are_refused():
    x, (ppca, _) = data(), make()
    x[:, 4] = np.nan
    with pytest.raises(ValueError, match=r"columns with nothing observed: \[4\]; drop them"):
        fit_em(ppca, x)


def test_more_latent_dimensions_than_the_data_have_are_found_out():
    rng = np.random.default_rng(0)
    x = oracles.with_holes(rng.normal(size=(80, 2)) @ rng.normal(size=(2, 9)), 0.2, 0)
    ppca = PPCA.like(x, 3, seed=0)
    before = parameters(ppca)
    with pytest.raises(ValueError, match=r"latent_dim=3 leaves no noise.*smaller latent_dim"):
        fit_em(ppca, x)
    for mine, its in zip(before, parameters(ppca), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_loadings_and_noise_that_float64_cannot_tell_apart_are_refused():
    rng = np.random.default_rng(0)
    ppca = assigned(np.zeros(D), 1e17 * rng.normal(size=(D, K)), 1e-4)
    with pytest.raises(ValueError, match=r"too large beside the noise.*start from PPCA.like"):
        fit_em(ppca, data(fraction=0.6))
