"""The lineage on tables with missing values."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from typer.testing import CliRunner

import lineages
import oracles
import user_pairs
from fitted import parameters
from ppl_vae import PPCA, fit_em, run_lineage, spectrum
from ppl_vae.cli.main import app
from ppl_vae.data.splits import split
from ppl_vae.evaluation.latent_space.spectrum import expected_covariance
from ppl_vae.lineage.report_data import report_data
from ppl_vae.lineage.result import Lineage
from ppl_vae.lineage.table import legend
from ppl_vae.report.archive import read_results, write_draws, write_report, write_results
from ppl_vae.report.verdict import verdict

USER_PAIR = "user"
FAST = lineages.with_evaluation(
    replace(lineages.SHORT, steps=60, gap_rows=60),
    num_samples=100,
    refine=25,
    rows=4,
    temperatures=10,
)
DATA = Path(os.environ.get("PPL_VAE_DATA", "nowhere"))
NEEDS_DATA = pytest.mark.skipif(not DATA.is_dir(), reason="PPL_VAE_DATA is not set")


def table():
    return oracles.with_missing_values(lineages.table(), 0.15, seed=3)


def masked_pair():
    decode, encode = lineages.linear_networks()

    def model(x=None, *, mask=None, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            fn = dist.Normal(decode(z), 1.5)
            pyro.sample("x", (fn if mask is None else fn.mask(mask)).to_event(1), obs=x)

    return model, user_pairs.normal_guide(encode)


@pytest.fixture(scope="module")
def lineage():
    about = {"data": "a table with missing values"}
    return run_lineage(
        table(), latent_dim=2, extra={USER_PAIR: masked_pair()}, settings=FAST, seed=1,
        about=about,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(lineage):
    return report_data(lineage, image_shape=(2, 3))


@pytest.fixture(scope="module")
def optimum():
    """PPCA fitted to the training rows in the data's own units, outside the lineage."""
    data = split(table(), seed=1)
    ppca = PPCA.like(data.train, 2, seed=1)
    fit_em(ppca, data.train, tol=1e-11)
    return ppca, data


def test_stages_that_need_complete_data_are_left_out_with_a_note(lineage):
    names = [name for name in lineages.default_stages() if name not in ("pca", "closed-form")]
    assert [row.stage for row in lineage.rows] == [*names, USER_PAIR] and lineage.finished
    assert lineage.notes()[:2] == [
        "pca is left out: PCA does not support missing values",
        "closed-form is left out: with missing values the maximum of the likelihood has no closed "
        "form",
    ]
    assert lineage.about["num_missing"] == int(np.isnan(table()).sum())
    text = legend(lineage.about)
    assert "angle to the result of PX-EM" in text and "that of the observed entries" in text
    sentences = " ".join(verdict(lineage))
    assert "PPCA's best known optimum, the result of PX-EM, is attained by" in sentences


def test_the_reference_is_the_optimum_in_the_units_of_the_data(lineage, optimum):
    ppca, data = optimum
    log_p = ppca.log_likelihood(data.train).detach()
    assert lineage.optimum == pytest.approx(float(log_p.mean()), abs=1e-6)
    held_out = ppca.log_likelihood(data.test).detach().double()
    for name in ("em", "px-em"):
        row = lineage.row(name)
        assert row.log_p.value == pytest.approx(lineage.optimum, abs=1e-6)
        assert row.shortfall == pytest.approx(0, abs=1e-6) and row.angle < 0.1
        assert row.noise_scale == pytest.approx(float(ppca.noise_scale.detach()), rel=1e-4)
        torch.testing.assert_close(row.held_out.value, held_out, rtol=0, atol=1e-3)


def test_the_gaps_sum_up_and_bounds_are_below_log_p(lineage):
    for row in lineages.bounded(lineage):
        gap = row.approximation + row.amortization
        assert row.log_p.value - row.elbo == pytest.approx(gap, abs=1e-9), row.stage
        assert row.approximation > -0.02, row.stage
        if row.stage != "per-datum-svi":
            assert math.isfinite(row.test_log_p.value), row.stage
        if row.ascent is not None:
            assert (row.ascent.bound <= row.ascent.log_likelihood + 1e-9).all(), row.stage
            last = float(row.ascent.log_likelihood[-1])
            assert last == pytest.approx(row.log_p.value, abs=0.5), row.stage


@pytest.mark.slow
def test_units_of_the_data_change_every_number_by_the_jacobian_of_observed_entries(lineage):
    names = ("em", "variational-em", "linear-amortized", "vae")
    again = run_lineage(
        10 * table(), latent_dim=2, stages=names, settings=FAST, seed=1
    )  # fmt: skip
    data = split(table(), seed=1)
    shifts = {
        part: -float((~getattr(data, part).isnan()).sum(1).double().mean()) * math.log(10)
        for part in ("train", "val", "test")
    }
    assert len({round(shift, 6) for shift in shifts.values()}) > 1  # the parts differ
    for name in names:
        base, other = lineage.row(name), again.row(name)
        moved = other.log_p.value - base.log_p.value
        assert moved == pytest.approx(shifts["train"], abs=1e-3), name
        assert other.elbo - base.elbo == pytest.approx(shifts["train"], abs=1e-3), name
        moved = (other.held_out.value - base.held_out.value).mean()
        assert float(moved) == pytest.approx(shifts["test"], abs=1e-3), name
        moved = other.fit.objective[-1] - base.fit.objective[-1]
        assert float(moved) == pytest.approx(shifts["train"], abs=1e-3), name
        if base.fit.validation is not None:
            moved = (other.fit.validation - base.fit.validation).mean()
            assert float(moved) == pytest.approx(shifts["val"], abs=1e-3), name


@pytest.mark.slow
def test_the_spectrum_is_that_of_the_covariance_expected_at_the_optimum(lineage, data, optimum):
    ppca, split_data = optimum
    named = parameters(ppca)
    dense = oracles.expected_covariance(split_data.train.numpy(), *named)
    found = expected_covariance(ppca, split_data.train)
    np.testing.assert_allclose(found.numpy(), dense, rtol=0, atol=1e-9)
    values = np.linalg.eigvalsh(dense)[::-1]
    np.testing.assert_allclose(data.spectrum.eigenvalues.numpy(), values, rtol=1e-4)
    # At the optimum of EM the model is the closed form for this covariance.
    noise, signal = values[2:].mean(), np.linalg.svd(named[1])[1] ** 2
    assert noise == pytest.approx(float(named[2]), rel=1e-4)
    np.testing.assert_allclose(values[:2], signal + float(named[2]), rtol=1e-3)


def test_the_spectrum_of_complete_data_does_not_depend_on_the_model():
    x = lineages.table()
    with_model, without = (
        spectrum(x, 2, {}, ppca=ppca).eigenvalues for ppca in (PPCA.like(x, 2, seed=0), None)
    )
    torch.testing.assert_close(with_model, without)
    with pytest.raises(ValueError, match="missing"):
        spectrum(table(), 2, {})


@pytest.mark.slow
def test_all_files_are_written_and_read_back(lineage, data, tmp_path):
    write_results(tmp_path, lineage, data)
    page, figures = write_report(tmp_path, lineage, data)
    write_draws(tmp_path, lineage)
    text = page.read_text()
    assert f"{lineage.about['num_missing']} missing values" in text
    assert "closed-form is left out" in text and "expected given the observed entries" in text
    assert {"spectrum.png", "reconstructions.png"} <= {p.name for p in figures.iterdir()}
    found, stored = read_results(tmp_path)
    assert found.to_dict() == lineage.to_dict() and isinstance(found, Lineage)
    assert stored.reconstructions.has_missing and not stored.samples.has_missing


def test_data_that_cannot_be_fitted_are_rejected_at_once():
    x = table()
    with pytest.raises(
        ValueError,
        match=r"none of the requested stages supports missing values: .'closed-form'.; with",
    ):
        run_lineage(x, latent_dim=2, stages=["closed-form"])
    pair = lineages.user_written_pair()
    with pytest.raises(ValueError, match="the model takes no keyword 'mask'"):
        run_lineage(x, latent_dim=2, extra={"user": pair}, settings=FAST)
    empty = x.copy()
    empty[7] = np.nan
    with pytest.raises(ValueError, match=r"x has rows with nothing observed: \[7\]; drop them"):
        run_lineage(empty, latent_dim=2)
    unobserved = x.copy()
    unobserved[split(x, seed=0).train_rows.numpy(), 4] = np.nan
    with pytest.raises(ValueError, match=r"training rows of x have nothing observed in .*'e'"):
        run_lineage(unobserved, latent_dim=2, columns=list("abcdef"))


def test_several_starts_of_em():
    settings = replace(FAST, starts=2)
    found = run_lineage(table(), latent_dim=1, stages=["px-em"], settings=settings, seed=1)
    assert any("2 starts" in note for note in found.rows[0].fit.notes)


def test_missing_values_in_held_out_rows_do_not_change_the_fits():
    x = lineages.table()
    names = ("px-em", "linear-amortized")
    data, incomplete = split(x, seed=1), x.copy()
    rows = data.test_rows.numpy()
    incomplete[rows] = oracles.with_missing_values(x[rows], 0.3, seed=0)
    one, other = (
        run_lineage(values, latent_dim=2, stages=names, settings=FAST, seed=1)
        for values in (x, incomplete)
    )
    for name in names:
        assert one.row(name).log_p == other.row(name).log_p
        assert one.row(name).test_log_p != other.row(name).test_log_p


def test_the_default_number_of_latent_dimensions_depends_on_the_observed_entries(tmp_path):
    x = oracles.with_missing_values(oracles.simulate_ppca((16, 8), 1, 60, 8, seed=0), 0.5, seed=0)
    path = tmp_path / "half.csv"
    pd.DataFrame(x).to_csv(path, index=False)
    arguments = ["lineage", str(path), "--stages", "px-em", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "60 rows, 8 columns" in result.output and "K = 2, seed 0" in result.output


@pytest.mark.data
@NEEDS_DATA
def test_the_command_supports_a_real_table_with_missing_values(tmp_path):
    file = DATA / "pcaMethods" / "metaboliteData.csv"
    arguments = ["lineage", file, "--stages", "closed-form,px-em"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "419 of 8008 values missing" in result.output
    assert "note: closed-form is left out: with missing values" in result.output
    assert "PPCA's best known optimum, the result of PX-EM, is attained by px-em" in result.output
    about = json.loads((tmp_path / "results.json").read_text())["about"]
    assert about["num_missing"] == 419 and about["stages"] == ["px-em"]
