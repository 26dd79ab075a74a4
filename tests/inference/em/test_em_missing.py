"""EM and PX-EM on data with missing values, against dense oracles."""

import collections
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import combinations
import oracles
from fitted import assert_close, parameters
from incomplete import MECHANISMS, NOISES, SPECTRUM, D, K, N, data, make, ppca_from_arrays
from ppl_vae import PPCA, ExactGuide, fit_em, fit_svi
from ppl_vae.data.sources import row_blocks
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.inference.em.complete_data import CompleteDataEM, CompleteProblem
from ppl_vae.inference.em.missing_data import MissingDataEM, MissingDataProblem
from ppl_vae.inference.em.noise import Noise
from ppl_vae.inference.em.run import RESTARTED
from ppl_vae.models.linear.sufficient_statistics import summarize_table


@pytest.mark.parametrize("size", [1, 1000, 2**23])
def test_results_do_not_depend_on_the_block_size(size, monkeypatch):
    """For rows with many and with few patterns."""
    ppca, truth = make()
    x = data()
    x[20:] = np.where(np.isnan(x[20]), np.nan, oracles.with_missing_values(x, 0.0, 0)[20:])
    x = x[~np.isnan(x).all(1)]
    x[:, 0] = np.where(np.isnan(x[:, 0]), 1.0, x[:, 0])
    monkeypatch.setattr(row_blocks, "WORKING_FLOATS", size)
    assert_close(ppca.log_likelihood(x), oracles.log_density(x, *truth))
    assert_close(ppca.posterior(x).mean, oracles.posterior(x, *truth)[0])
    mean, sd = oracles.impute(x, *truth)
    assert_close(ppca.impute(x).mean, mean)
    assert_close(ppca.impute(x).sd, sd)
    fit_em(ppca, x, max_iterations=1)
    assert_close(parameters(ppca)[1], oracles.em_step_missing(x, *truth)[1], 1e-9)


# One step


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("accelerate", [True, False], ids=["PX-EM", "EM"])
def test_one_step_matches_the_dense_oracle(noise, mechanism, accelerate):
    (ppca, truth), x = make(noise), data(mechanism)
    for _ in range(3):
        before = truth
        result = fit_em(ppca, x, accelerate=accelerate, max_iterations=1)
        truth = oracles.em_step_missing(x, *before, noise == "diagonal", accelerate)
        for mine, its in zip(parameters(ppca), truth, strict=True):
            assert_close(mine, its, 1e-9)
        ends = [oracles.log_density(x, *p).mean() for p in (before, truth)]
        assert_close(result.log_likelihood.numpy(), ends)
        assert float(result.objective[0]) == pytest.approx(ends[0], rel=1e-12)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("accelerate", [True, False], ids=["PX-EM", "EM"])
def test_the_bound_after_an_m_step_is_log_p_minus_the_kl_of_the_old_posterior(noise, accelerate):
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
def test_without_missing_values_the_steps_match_those_on_complete_data(noise, expand):
    x = oracles.simulate_ppca(SPECTRUM, 0.8, N, D, seed=0)
    (ppca, (_, loadings, variance)), blocks = make(noise), RowBlocks(torch.from_numpy(x))
    columns, covariance = summarize_table(blocks)
    rule = Noise.of(ppca, columns, 1e-6, accelerated=expand)
    W, psi = torch.tensor(loadings), torch.tensor(variance).expand(D)
    prior_update = "expand" if expand else "fixed"
    one = CompleteDataEM(CompleteProblem(covariance, rule, "full", prior_update), W, psi)
    other = MissingDataEM(
        MissingDataProblem(blocks, columns, rule, "full", prior_update), W, columns.mean, psi
    )
    for _ in range(10):
        after, following = one.step()
        its_after, its_following = other.step()
        assert float(its_after) == pytest.approx(float(after), rel=1e-11)
        for mine, its in zip(one.residual_moments(), other.residual_moments(), strict=True):
            assert_close(mine, its.numpy())
        one, other = following, its_following
        assert_close(other.log_likelihood, one.log_likelihood.numpy())
        assert_close(other.bound, one.bound.numpy())
        for its, mine in zip(other.parameters, one.parameters, strict=True):
            assert_close(its, mine.numpy())


# Monotone convergence to the optimum

EXTREME_STARTS = {
    "tiny loadings": (1e-3, 1.0, 0.0),
    "huge loadings": (1e3, 1.0, 0.0),
    "tiny noise": (1.0, 1e-6, 0.0),
    "huge noise": (1.0, 1e6, 0.0),
    "all tiny": (1e-3, 1e-4, 0.0),
    "all huge": (1e3, 1e4, 0.0),
    "far away": (1.0, 1.0, 1e3),
}


@pytest.mark.parametrize(
    ("noise", "mechanism", "start"), combinations.one_in(2, NOISES, MECHANISMS, EXTREME_STARTS)
)
@pytest.mark.parametrize(
    "accelerate", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["PX-EM", "EM"]
)
def test_log_p_is_monotone(noise, mechanism, start, accelerate):
    x, (scale, variance, offset) = data(mechanism), EXTREME_STARTS[start]
    rng = np.random.default_rng(3)
    loc, loadings = offset * rng.normal(size=D), scale * rng.normal(size=(D, K))
    if noise == "diagonal":
        variance = variance * rng.uniform(0.5, 2.0, size=D)
    ppca = ppca_from_arrays(loc, loadings, variance)
    result = fit_em(ppca, x, accelerate=accelerate, tol=0.0, max_iterations=30)
    # Rounding errors scale with r / sigma; far from the data, terms of this size cancel.
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
def test_em_and_px_em_reach_the_same_maximum(noise, mechanism):
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
def test_px_em_converges_fast_with_small_noise(noise, ratio):
    x = oracles.with_missing_values(
        oracles.simulate_ppca([ratio] * 3, 1.0, 200, 30, seed=0), 0.3, 1
    )
    ends = []
    for seed in (0, 1):
        ppca = PPCA.like(x, 3, noise=noise, seed=seed)
        result = fit_em(ppca, x)
        assert result.steps < 60
        assert result.stopped.startswith("converged")
        ends.append(float(result.log_likelihood[-1]))
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)
    em_fit = fit_em(PPCA.like(x, 3, noise=noise, seed=0), x, accelerate=False, max_iterations=60)
    before = next((n for n in em_fit.notes if n.startswith(RESTARTED)), "")
    if ratio == 1e4:  # at 1e8 rounding hides the gains, and the certificate detects it
        assert not before
        assert float(em_fit.log_likelihood[-1]) < ends[0] - 0.02
        assert em_fit.certificate > 0.01 and not em_fit.converged
    else:
        assert before


def test_a_fit_can_be_continued():
    x = data()
    whole, parts = PPCA.like(x, K, seed=0), PPCA.like(x, K, seed=0)
    fit_em(whole, x, tol=0.0, max_iterations=6)
    for _ in range(2):
        fit_em(parts, x, tol=0.0, max_iterations=3)
    for mine, its in zip(parameters(whole), parameters(parts), strict=True):
        assert_close(mine, its)


@pytest.mark.parametrize("noise", NOISES)
def test_permuting_rows_and_scaling_columns_transforms_the_fit(noise):
    x, order = data(), np.random.default_rng(0).permutation(N)
    ppca, other = PPCA.like(x, K, noise=noise, seed=0), PPCA.like(x, K, noise=noise, seed=0)
    fit_em(ppca, x, tol=1e-11)
    fit_em(other, 10 * x[order] + 5, tol=1e-11)
    observed = np.mean((~np.isnan(x)).sum(1))
    shift = (ppca.log_likelihood(x) - other.log_likelihood(10 * x + 5)).mean()
    assert float(shift.detach()) == pytest.approx(observed * np.log(10), abs=1e-8)
    assert_close(other.loc, 10 * ppca.loc.detach().numpy() + 5, 1e-3)


def test_an_initial_mean_far_from_the_data_is_reset():
    x = data() + 1e9
    ppca = PPCA(D, K, seed=0).double()
    result = fit_em(ppca, x)
    assert any("far from any data" in note for note in result.notes)
    reference = fit_em(PPCA.like(x, K, seed=0), x)
    assert float(result.log_likelihood[-1]) == pytest.approx(
        float(reference.log_likelihood[-1]), abs=1e-6
    )


@pytest.mark.parametrize("convert", [pd.DataFrame, torch.from_numpy, lambda x: x.astype("f4")])
def test_missing_values_in_all_data_types(convert):
    x = np.round(data(), 2)
    ppca = PPCA.like(convert(x), K, seed=0).double()
    fit_em(ppca, convert(x))
    expected = fit_em(PPCA.like(x, K, seed=0), x).log_likelihood[-1]
    assert float(ppca.log_likelihood(x).mean().detach()) == pytest.approx(
        float(expected), abs=1e-6
    )


def test_constant_columns_with_missing_values_are_noted():
    x = data()
    x[:, 2] = np.where(np.isnan(x[:, 2]), np.nan, 0.1)
    assert "constant columns: 2" in fit_em(PPCA.like(x, 2, seed=0), x).notes


@pytest.mark.parametrize("noise", NOISES)
def test_svi_reaches_the_optimum_of_px_em(noise):
    x = data(fraction=0.2, N=100)
    best, ppca = PPCA.like(x, 2, noise=noise, seed=0), PPCA.like(x, 2, noise=noise, seed=0)
    top = float(fit_em(best, x).log_likelihood[-1])
    fit_em(ppca, x, max_iterations=2)
    start = float(ppca.log_likelihood(x).mean().detach())
    fit_svi(ppca.model, ExactGuide(ppca), x, steps=60, lr=0.05, capture=False, seed=0)
    reached = float(ppca.log_likelihood(x).mean().detach())
    assert start < top - 0.1
    assert top - 0.01 < reached < top + 1e-9


# Invalid arguments


@pytest.mark.parametrize("method", ["posterior", "log_likelihood", "impute", "reconstruct"])
@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (np.ones((N, D - 1), dtype=bool), r"mask must be boolean .*\(60, 7\); .*\(60, 6\)"),
        (np.ones((N, D)), "mask must be boolean .*float64"),
    ],
)
def test_invalid_masks_are_rejected(method, mask, match):
    ppca, _ = make()
    with pytest.raises(ValueError, match=match):
        getattr(ppca, method)(np.zeros((N, D)), mask=mask)
    with pytest.raises(ValueError, match=match):
        fit_em(ppca, np.random.default_rng(0).normal(size=(N, D)), mask=mask)


def test_columns_without_observed_entries_are_rejected():
    x, (ppca, _) = data(), make()
    x[:, 4] = np.nan
    with pytest.raises(ValueError, match=r"columns with nothing observed: \[4\]; drop them"):
        fit_em(ppca, x)


def test_too_many_latent_dimensions_are_detected():
    rng = np.random.default_rng(0)
    x = oracles.with_missing_values(rng.normal(size=(80, 2)) @ rng.normal(size=(2, 9)), 0.2, 0)
    ppca = PPCA.like(x, 3, seed=0)
    before = parameters(ppca)
    with pytest.raises(ValueError, match=r"latent_dim=3 leaves no noise.*smaller latent_dim"):
        fit_em(ppca, x)
    for mine, its in zip(before, parameters(ppca), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_loadings_too_large_for_the_noise_are_rejected():
    rng = np.random.default_rng(0)
    ppca = ppca_from_arrays(np.zeros(D), 1e17 * rng.normal(size=(D, K)), 1e-4)
    with pytest.raises(ValueError, match=r"too large relative to the noise.*start from PPCA.like"):
        fit_em(ppca, data(fraction=0.6))


# Cost


class MatrixCounter(TorchDispatchMode):
    """Counts the K x K matrices that are factorized or inverted, by operation."""

    def __init__(self, size):
        super().__init__()
        self.size, self.counts = size, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        factorizes = name in (
            "linalg_cholesky_ex",
            "cholesky",
            "cholesky_inverse",
            "linalg_inv_ex",
        )
        if factorizes and args[0].shape[-2:] == (self.size, self.size):
            self.counts[name] += args[0].numel() // self.size**2
        return func(*args, **(kwargs or {}))


def test_an_iteration_factorizes_one_matrix_for_each_pattern():
    num_patterns, repeats, latent_dim = 50, 8, 3
    generator = np.random.default_rng(0)
    observed = np.array(list(itertools.product([True, False], repeat=6)))[1 : num_patterns + 1]
    observed = np.hstack([observed, np.ones((num_patterns, 4), bool)])
    observed = np.repeat(observed, repeats, 0)[generator.permutation(num_patterns * repeats)]
    x = np.where(observed, generator.normal(size=observed.shape), np.nan)
    counts = []
    for iterations in (3, 8):
        ppca = PPCA(10, latent_dim, seed=0).double()
        with MatrixCounter(latent_dim) as counter:
            fit_em(ppca, x, accelerate=False, tol=0.0, max_iterations=iterations)
        assert set(counter.counts) == {"linalg_cholesky_ex"}
        counts.append(counter.counts["linalg_cholesky_ex"])
    # Beside the patterns: W' Psi^-1 W, whose columns are tested for collinearity.
    assert counts[1] - counts[0] == 5 * (num_patterns + 1)
