"""The Bayesian stages of the lineage: they gain with few rows, and tie with many."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch

import oracles
from ppl_vae import run_lineage
from ppl_vae.lineage import Lineage
from ppl_vae.lineage.estimates import paired_gain
from ppl_vae.lineage.problem import LineageSettings
from ppl_vae.lineage.table import legend, shown_columns, text_table
from ppl_vae.report.verdict import verdict

STAGES = ("px-em", "variational-bayes", "posterior")
SETTINGS = LineageSettings(posterior_draws=200)


def simulated(num_rows, latent_dim, data_dim, seed=0):
    return oracles.simulate_ppca(tuple(4.0 + np.arange(latent_dim)), 1, num_rows, data_dim, seed)


@functools.cache
def few_rows():
    """More axes than the data need, and hardly more rows than columns."""
    x = simulated(524, 2, 10)
    return run_lineage(
        x[:24], x_test=x[24:], latent_dim=6, stages=STAGES, settings=SETTINGS, scale="none"
    )


@functools.cache
def standardized_with_missing_values():
    x = oracles.with_missing_values(simulated(120, 2, 5), 0.1, seed=1)
    x = x * np.array([1.0, 10, 100, 1, 1])
    return run_lineage(x, latent_dim=2, stages=STAGES, settings=SETTINGS, scale="standardize")


@pytest.mark.parametrize("stage", ["variational-bayes", "posterior"])
def test_with_few_rows_the_average_over_parameters_exceeds_the_maximum_of_the_likelihood(stage):
    row = few_rows().row(stage)
    gain, over_mean = row.posterior.over_optimum, row.posterior.over_mean
    assert gain.value > 4 * gain.error and gain.value > 0.5
    # The ARD prior shrinks the mean itself; under the normal prior the average is needed.
    assert stage == "variational-bayes" or over_mean.value > 3 * over_mean.error
    (sentence,) = (s for s in verdict(few_rows()) if f"({stage})" in s and "Averaging" in s)
    assert "raises held-out log p relative to PPCA" in sentence


def test_with_many_rows_the_average_and_the_maximum_tie():
    x = simulated(3000, 2, 5)
    lineage = run_lineage(
        x[:2500], x_test=x[2500:], latent_dim=2, stages=STAGES, settings=SETTINGS, scale="none"
    )
    for stage in STAGES[1:]:
        posterior = lineage.row(stage).posterior
        assert abs(posterior.over_optimum.value) < 0.01
        assert abs(posterior.over_mean.value) < 0.01
        assert posterior.num_active in (2, None)
    # The evidence is below the maximal likelihood by about 1/2 log N for each of the parameters.
    bound = lineage.row("variational-bayes").elbo
    assert lineage.optimum - 0.1 < bound < lineage.optimum


def test_the_gain_is_the_paired_difference_to_the_reference():
    lineage = few_rows()
    reference, row = lineage.row("px-em"), lineage.row("posterior")
    difference = (row.held_out.value - reference.held_out.value).numpy()
    gain = row.posterior.over_optimum
    # The reference is the closed form, from which PX-EM differs by its tolerance.
    assert gain.value == pytest.approx(difference.mean(), abs=1e-3)
    alone = difference.std(ddof=1) / math.sqrt(len(difference))
    assert gain.error == pytest.approx(math.hypot(alone, row.held_out.global_error), rel=1e-2)
    single = row.held_out.first(1)
    assert paired_gain(single, single.value * 0).error is None


@pytest.mark.parametrize("lineage", [few_rows, standardized_with_missing_values])
def test_draws_and_densities_are_in_the_units_of_the_data(lineage):
    lineage = lineage()
    samples, row = lineage.samples["posterior"], lineage.row("posterior")
    found = samples.log_predictive(lineage.data.test)
    torch.testing.assert_close(found.value, row.held_out.value.double(), rtol=0, atol=1e-9)
    assert row.test_log_p.value == pytest.approx(float(found.value.mean()), abs=1e-9)
    mean = samples.draws["loc"].mean((0, 1)).numpy()
    centre = np.nanmean(lineage.data.train.numpy(), 0)
    scale = np.nanstd(lineage.data.train.numpy(), 0)
    assert (np.abs(mean - centre) < scale).all()


def test_only_bayesian_tables_have_the_columns_of_the_posterior():
    lineage = standardized_with_missing_values()
    titles = [column.title for column in shown_columns(lineage.rows)]
    assert {"over ML", "over mean", "axes"} <= set(titles)
    assert "over ML" not in [column.title for column in shown_columns(lineage.rows[:1])]
    lines = text_table(lineage.rows).splitlines()
    assert "over ML" in lines[0] and "average" in lines[2] and "±" in lines[2]
    assert "Bayesian stages" in legend(lineage.about)
    row = lineage.row("variational-bayes")
    assert math.isfinite(row.elbo) and math.isnan(row.log_p.value) and math.isnan(row.loss)
    assert math.isnan(lineage.row("posterior").elbo)
    assert f"{row.posterior.num_active} of 2 columns of W are active" in " ".join(verdict(lineage))


def test_saved_results_have_the_gains():
    lineage = standardized_with_missing_values()
    again = Lineage.from_dict(json.loads(json.dumps(lineage.to_dict(), allow_nan=False)))
    assert again.to_dict() == lineage.to_dict() and again.samples == {}
    assert again.row("posterior").posterior == lineage.row("posterior").posterior
    assert again.row("px-em").posterior is None
    assert verdict(again) == verdict(lineage)


def test_variational_bayes_switches_off_axes_that_the_data_do_not_need():
    x = simulated(500, 2, 8)
    lineage = run_lineage(x, latent_dim=5, stages=["variational-bayes"], settings=SETTINGS)
    assert lineage.row("variational-bayes").posterior.num_active == 2


def test_chains_that_have_not_mixed_do_not_meet_their_tolerance():
    short = dataclasses.replace(SETTINGS, posterior_draws=8)
    x = simulated(60, 2, 5)
    lineage = run_lineage(x, latent_dim=2, stages=["posterior"], settings=short)
    row = lineage.row("posterior")
    assert not row.convergence.met and row.posterior.diagnosis.startswith("NOT")
    assert "posterior (NOT reliable" in " ".join(verdict(lineage))


@pytest.mark.slow
def test_nuts_agrees_with_gibbs():
    x = simulated(300, 1, 4)
    stages = ["posterior", "nuts"]
    lineage = run_lineage(x, latent_dim=1, stages=stages, settings=SETTINGS, scale="none")
    gibbs, nuts = (lineage.row(name) for name in stages)
    error = gibbs.held_out.global_error + nuts.held_out.global_error
    assert gibbs.test_log_p.value == pytest.approx(nuts.test_log_p.value, abs=4 * error)
