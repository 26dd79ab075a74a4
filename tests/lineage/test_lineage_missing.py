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
from fitted import parameters
from ppl_vae import PPCA, fit_em, run_lineage, spectrum
from ppl_vae.cli.main import app
from ppl_vae.data.transforms import split
from ppl_vae.evaluation.latent_space.spectrum import expected_covariance
from ppl_vae.lineage.report_data import report_data
from ppl_vae.lineage.run import Lineage
from ppl_vae.lineage.stages import STAGES
from ppl_vae.report.archive import read_results, write_draws, write_report, write_results
from ppl_vae.report.table import legend
from ppl_vae.report.verdict import verdict

MINE = "mine"
FAST = replace(lineages.SHORT, steps=60, gap_rows=60, draws=100, refine=25)
DATA = Path(os.environ.get("PPL_VAE_DATA", "nowhere"))
NEEDS_DATA = pytest.mark.skipif(not DATA.is_dir(), reason="PPL_VAE_DATA is not set")


def table():
    return oracles.with_holes(lineages.table(), 0.15, seed=3)


def masked_pair(width=6):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decode = torch.nn.Linear(2, width).double()
        encode = torch.nn.Linear(width, 4).double()

    def model(x=None, *, mask=None, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            fn = dist.Normal(decode(z), 1.5)
            pyro.sample("x", (fn if mask is None else fn.mask(mask)).to_event(1), obs=x)

    def guide(x=None, *, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            loc, log_scale = encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


@pytest.fixture(scope="module")
def lineage():
    about = {"data": "a table with missing values"}
    return run_lineage(
        table(), latent_dim=2, extra={MINE: masked_pair()}, settings=FAST, seed=1,
        about=about,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shown(lineage):
    return report_data(lineage, image_shape=(2, 3))


@pytest.fixture(scope="module")
def optimum():
    """PPCA fitted to the training rows in the data's own units, outside the lineage."""
    data = split(table(), seed=1)
    ppca = PPCA.like(data.train, 2, seed=1)
    fit_em(ppca, data.train, tol=1e-11)
    return ppca, data


def test_only_what_needs_complete_data_is_left_out_and_why_is_said(lineage):
    names = [name for name in STAGES if name not in ("pca", "closed-form")]
    assert [row.stage for row in lineage.rows] == [*names, MINE] and lineage.finished
    why = (
        "closed-form is left out: with missing values the likelihood has no maximum in closed form"
    )
    assert lineage.notes()[:2] == ["pca is left out: PCA has no place for missing values", why]
    assert lineage.about["num_missing"] == int(np.isnan(table()).sum())
    text = legend(lineage.about)
    assert "angle to where PX-EM ends" in text and "what is scored is what was observed" in text
    sentences = " ".join(verdict(lineage))
    assert "PPCA's best known optimum, where PX-EM ends, is reached by" in sentences


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


def test_nats_add_up_and_bounds_are_bounds(lineage):
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


def test_other_units_of_the_data_move_every_number_by_the_jacobian_of_observed_cells(lineage):
    names = ("em", "variational-em", "linear-amortized", "vae")
    again = run_lineage(
        10 * table(), latent_dim=2, stages=names, settings=FAST, seed=1
    )  # fmt: skip
    data = split(table(), seed=1)
    shifts = {
        part: -float((~getattr(data, part).isnan()).sum(1).double().mean()) * math.log(10)
        for part in ("train", "val", "test")
    }
    assert len({round(shift, 6) for shift in shifts.values()}) > 1  # the parts can be told apart
    for name in names:
        mine, its = lineage.row(name), again.row(name)
        moved = its.log_p.value - mine.log_p.value
        assert moved == pytest.approx(shifts["train"], abs=1e-3), name
        assert its.elbo - mine.elbo == pytest.approx(shifts["train"], abs=1e-3), name
        moved = (its.held_out.value - mine.held_out.value).mean()
        assert float(moved) == pytest.approx(shifts["test"], abs=1e-3), name
        moved = its.fit.objective[-1] - mine.fit.objective[-1]
        assert float(moved) == pytest.approx(shifts["train"], abs=1e-3), name
        if mine.fit.validation is not None:
            moved = (its.fit.validation - mine.fit.validation).mean()
            assert float(moved) == pytest.approx(shifts["val"], abs=1e-3), name


def test_the_spectrum_is_that_of_the_covariance_expected_where_em_ends(lineage, shown, optimum):
    ppca, data = optimum
    named = parameters(ppca)
    dense = oracles.expected_covariance(data.train.numpy(), *named)
    mine = expected_covariance(ppca, data.train)
    np.testing.assert_allclose(mine.numpy(), dense, rtol=0, atol=1e-9)
    values = np.linalg.eigvalsh(dense)[::-1]
    np.testing.assert_allclose(shown.spectrum.eigenvalues.numpy(), values, rtol=1e-4)
    # Where EM ends the model is the closed form for this covariance.
    noise, strong = values[2:].mean(), np.linalg.svd(named[1])[1] ** 2
    assert noise == pytest.approx(float(named[2]), rel=1e-4)
    np.testing.assert_allclose(values[:2], strong + float(named[2]), rtol=1e-3)


def test_a_spectrum_without_holes_is_the_same_with_a_model_or_without():
    x = lineages.table()
    with_model, without = (
        spectrum(x, 2, {}, ppca=ppca).eigenvalues for ppca in (PPCA.like(x, 2, seed=0), None)
    )
    torch.testing.assert_close(with_model, without)
    with pytest.raises(ValueError, match="missing"):
        spectrum(table(), 2, {})


def test_everything_is_written_and_can_be_read_again(lineage, shown, tmp_path):
    write_results(tmp_path, lineage, shown)
    page, pictures = write_report(tmp_path, lineage, shown)
    write_draws(tmp_path, lineage)
    text = page.read_text()
    assert f"{lineage.about['num_missing']} cells missing" in text
    assert "closed-form is left out" in text and "expected given what was observed" in text
    assert {"spectrum.png", "reconstructions.png"} <= {p.name for p in pictures.iterdir()}
    found, its = read_results(tmp_path)
    assert found.to_dict() == lineage.to_dict() and isinstance(found, Lineage)
    assert its.reconstructions.has_missing and not its.samples.has_missing


def test_what_cannot_be_fitted_is_refused_at_once():
    x = table()
    with pytest.raises(
        ValueError, match=r"no stage is left without .'closed-form'.: with missing values"
    ):
        run_lineage(x, latent_dim=2, stages=["closed-form"])
    pair = lineages.hand_written_pair()
    with pytest.raises(ValueError, match="the model takes no keyword 'mask'"):
        run_lineage(x, latent_dim=2, extra={"mine": pair}, settings=FAST)
    empty = x.copy()
    empty[7] = np.nan
    with pytest.raises(ValueError, match=r"x has rows with nothing observed: \[7\]; drop them"):
        run_lineage(empty, latent_dim=2)
    thin = x.copy()
    thin[split(x, seed=0).train_rows.numpy(), 4] = np.nan
    with pytest.raises(ValueError, match=r"training rows of x have nothing observed in .*'e'"):
        run_lineage(thin, latent_dim=2, columns=list("abcdef"))


def test_holes_in_rows_held_out_alone_leave_the_fits_as_they_were():
    x = lineages.table()
    names = ("px-em", "linear-amortized")
    data, holed = split(x, seed=1), x.copy()
    rows = data.test_rows.numpy()
    holed[rows] = oracles.with_holes(x[rows], 0.3, seed=0)
    one, other = (
        run_lineage(values, latent_dim=2, stages=names, settings=FAST, seed=1)
        for values in (x, holed)
    )
    for name in names:
        assert one.row(name).log_p == other.row(name).log_p
        assert one.row(name).test_log_p != other.row(name).test_log_p


def test_the_number_of_latent_dimensions_goes_with_what_rows_have(tmp_path):
    x = oracles.with_holes(oracles.simulate_ppca((16, 8), 1, 60, 8, seed=0), 0.5, seed=0)
    path = tmp_path / "half.csv"
    pd.DataFrame(x).to_csv(path, index=False)
    arguments = ["lineage", str(path), "--stages", "px-em", "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "60 rows, 8 columns" in shown.output and "K = 2, seed 0" in shown.output


@pytest.mark.data
@NEEDS_DATA
def test_the_command_takes_a_real_table_with_holes(tmp_path):
    file = DATA / "pcaMethods" / "metaboliteData.csv"
    arguments = ["lineage", file, "--stages", "closed-form,px-em"]
    shown = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "419 of 8008 cells missing" in shown.output
    assert "note: closed-form is left out: with missing values" in shown.output
    assert "PPCA's best known optimum, where PX-EM ends, is reached by px-em" in shown.output
    about = json.loads((tmp_path / "results.json").read_text())["about"]
    assert about["num_missing"] == 419 and about["stages"] == ["px-em"]
