"""Predictive checks: observed statistics, replicated data sets and p-values."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import oracles
from ppl_vae.evaluation.prediction.predictive_checks import (
    MAX_COLUMNS,
    MAX_ROWS,
    PredictiveCheck,
    predictive_check,
)
from ppl_vae.models.bayesian_ppca import ParameterDraws
from ppl_vae.plots import plot_covariance_check, plot_quantile_check

LOADINGS = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 1.5], [0.5, 0.5]], dtype=torch.float64)


def parameters(loadings=LOADINGS, number=100, scale=0.7):
    """The same parameters in each draw."""
    loc = torch.zeros(number, len(loadings), dtype=torch.float64)
    sigma = torch.full((number,), scale, dtype=torch.float64)
    return ParameterDraws(loadings.expand(number, -1, -1), loc, sigma, None)


def data(num_rows=400, seed=0):
    random = np.random.default_rng(seed)
    z = random.normal(size=(num_rows, 2))
    return z @ LOADINGS.numpy().T + 0.7 * random.normal(size=(num_rows, 4))


def test_the_observed_statistics_are_correlations_and_standardised_quantiles():
    x = data()
    check = predictive_check(x, parameters(), "covariance", num_replicates=5, seed=0)
    expected = np.corrcoef(x.T)[np.tril_indices(4)]
    np.testing.assert_allclose(check.observed.numpy(), expected, atol=1e-12)
    assert check.elements[1] == "x2, x1" and check.posterior.shape == (5, 10)
    frame = pd.DataFrame(x, columns=[*"abcd"])
    check = predictive_check(frame, parameters(), "quantiles", num_replicates=5, seed=0)
    standard = (x - x.mean(0)) / x.std(0)
    expected = np.quantile(standard, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0).T.ravel()
    np.testing.assert_allclose(check.observed.numpy(), expected, atol=1e-12)
    assert check.elements[:2] == ("a, 5%", "a, 25%")


def test_covariances_of_incomplete_data_are_over_pairs():
    x = oracles.with_missing_values(data(60), 0.2, seed=1)
    check = predictive_check(x, parameters(), num_replicates=3, seed=0)
    both = ~np.isnan(x[:, 1]) & ~np.isnan(x[:, 0])
    centred = x - np.nanmean(x, 0)
    expected = (centred[both, 1] * centred[both, 0]).mean()
    expected /= np.nanstd(x[:, 1]) * np.nanstd(x[:, 0])
    assert float(check.observed[1]) == pytest.approx(expected, abs=1e-12)
    assert check.posterior.isfinite().all()


@pytest.mark.parametrize("statistic", ["covariance", "quantiles"])
def test_p_values_are_extreme_for_a_wrong_model_only(statistic):
    right = predictive_check(data(), parameters(), statistic, seed=0)
    # Of 10 or 20 p-values that are uniform, but correlated, 5 % are extreme in the mean.
    assert int(right.extreme.sum()) <= 3
    assert float(right.p_value.min()) >= 0 and float(right.p_value.max()) <= 1
    wrong = parameters(torch.zeros_like(LOADINGS), scale=0.2)
    found = predictive_check(data(), wrong, statistic, seed=0)
    assert float(found.extreme.double().mean()) > 0.6
    assert "p-values below 0.025 or above 0.975" in repr(found)


def test_draws_are_reproducible_and_the_prior_is_beside_them():
    first, second = (
        predictive_check(data(50), parameters(), prior=parameters(scale=5.0), seed=3)
        for _ in range(2)
    )
    assert torch.equal(first.posterior, second.posterior)
    assert first.prior.shape == first.posterior.shape
    assert first.prior.std() > first.posterior.std()
    assert PredictiveCheck.from_dict(first.to_dict()).to_dict() == first.to_dict()


def test_large_tables_are_thinned_with_notes():
    x = np.random.default_rng(0).normal(size=(2 * MAX_ROWS, 40)) * np.arange(1, 41)
    wide = parameters(torch.zeros(40, 1, dtype=torch.float64), number=2)
    check = predictive_check(x, wide, "quantiles", seed=0)
    assert len(check.elements) == 5 * MAX_COLUMNS and check.elements[0] == "x11, 5%"
    assert check.notes == (
        "every 2-th row only",
        "the 30 columns with the largest variances, of 40, only",
    )


def test_invalid_arguments():
    with pytest.raises(ValueError, match=r"statistic must be one of 'covariance'.*got 'mean'"):
        predictive_check(data(), parameters(), "mean")
    with pytest.raises(ValueError, match="draws are of parameters for 3 columns"):
        predictive_check(data(), parameters(LOADINGS[:3]))
    check = predictive_check(data(), parameters(), num_replicates=3, seed=0)
    with pytest.raises(ValueError, match="check must be of the statistic 'quantiles'"):
        plot_quantile_check(check)


@pytest.mark.parametrize(
    ("statistic", "plot"),
    [("covariance", plot_covariance_check), ("quantiles", plot_quantile_check)],
)
def test_plots_show_medians_against_the_data(statistic, plot):
    check = predictive_check(data(), parameters(), statistic, prior=parameters(), seed=0)
    ax = plot(check)
    drawn = np.concatenate([line.lines[0].get_xdata() for line in ax.containers])
    np.testing.assert_allclose(np.sort(drawn), np.sort(check.observed.numpy()))
    assert "prior, 90 %" in [text.get_text() for text in ax.get_legend().get_texts()]
    none = plot(dataclasses.replace(check, prior=None))
    assert len(none.collections) < len(ax.collections)
    plt.close("all")
