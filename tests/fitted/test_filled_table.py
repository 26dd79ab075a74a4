"""Imputation of a table by a model selected by cross-validation: selection, command and file."""

import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import oracles
from fitted import parameters
from ppl_vae import (
    PPCA,
    BayesianPPCA,
    fit_em,
    impute,
    sample_posterior,
    select_by_masked_cv,
)
from ppl_vae.cli.main import app, main
from ppl_vae.core.imputed import Imputation
from ppl_vae.data.files.tables import Table
from ppl_vae.evaluation.prediction.masked_cv import MaskedCV, _draw_masked
from ppl_vae.fitted.filled_table import FilledTable, filled_frame

DATA = Path(os.environ.get("PPL_VAE_DATA", "nowhere"))
NEEDS_DATA = pytest.mark.skipif(not DATA.is_dir(), reason="PPL_VAE_DATA is not set")


def table(spread=1.0, num_rows=150):
    """Ten columns of rank three with noise; ``spread`` sets how much their units differ."""
    x = oracles.simulate_ppca((30, 20, 12), 1, num_rows, 10, seed=1)
    return x * np.geomspace(1, spread, 10)


def incomplete(spread=1.0, num_rows=150):
    x = table(spread, num_rows)
    return np.where(np.random.default_rng(0).random(x.shape) < 0.15, np.nan, x)


# Selection of the model


@pytest.mark.slow
def test_masked_cv_selects_the_number_of_latent_dimensions_and_the_noise():
    found = select_by_masked_cv(incomplete(), seed=0)
    best = found.best
    assert (found.noise[best], found.latent_dim[best]) == ("isotropic", 3)
    assert 0.92 < found.coverage[best] < 0.98 and found.rmse[best] < 0.7
    found = select_by_masked_cv(incomplete(spread=1e4), seed=0)
    assert (found.noise[found.best], found.latent_dim[found.best]) == ("diagonal", 3)


def test_scores_are_those_of_masked_values():
    x = incomplete()
    found = select_by_masked_cv(x, noises=["isotropic"], latent_dims=[2], fraction=0.2, seed=5)
    hidden = _draw_masked(torch.from_numpy(~np.isnan(x)), 0.2, 5).numpy()
    assert found.num_masked == hidden.sum() and not np.isnan(x[hidden]).any()
    left = np.where(hidden, np.nan, x)
    ppca = PPCA.like(left, 2, seed=5)
    fit_em(ppca, left, tol=1e-5, max_iterations=200)
    mean, sd = oracles.impute(left, *parameters(ppca))
    away = (x - mean)[hidden] / sd[hidden]
    log_density = -0.5 * (np.log(2 * np.pi) + 2 * np.log(sd[hidden]) + away**2)
    assert float(found.log_density[0]) == pytest.approx(log_density.mean(), abs=1e-9)
    usual = np.broadcast_to(np.nanstd(left, 0), x.shape)[hidden]
    error = np.sqrt((((x - mean)[hidden] / usual) ** 2).mean())
    assert float(found.rmse[0]) == pytest.approx(error, abs=1e-9)
    assert float(found.coverage[0]) == pytest.approx((np.abs(away) < 1.96).mean())


@pytest.mark.parametrize("shape", [(3, 4), (40, 3), (6, 30), (200, 2)])
def test_no_row_and_no_column_loses_all_values(shape):
    rng = np.random.default_rng(0)
    for seed in range(20):
        observed = rng.random(shape) < 0.5
        observed[0], observed[:, 0] = True, True
        hidden = _draw_masked(torch.from_numpy(observed), 0.9, seed).numpy()
        left = observed & ~hidden
        assert left.any(1).all() and (left.sum(0) >= np.minimum(observed.sum(0), 2)).all()
        assert hidden.any() or observed.sum() < 8


def test_its_text_lists_models_that_cannot_be_fitted():
    found = select_by_masked_cv(incomplete(), latent_dims=[1, 3, 8], seed=0)
    assert found.latent_dim == (1, 3, 8) * 2
    assert re.search(r"isotropic +3 .*% +<- best", str(found))
    x = incomplete()
    x[:, 4] = 1.5
    found = select_by_masked_cv(x, latent_dims=[2], seed=0)
    assert found.noise == ("isotropic",)
    assert "noise='diagonal', K = 2: x has constant columns: [4]" in str(found)
    again = type(found).from_dict(found.to_dict())
    assert again.to_dict() == found.to_dict()


def test_its_text_has_neither_long_numbers_nor_trailing_spaces():
    density, rmse = torch.tensor([-1.5, -123456789.0]), torch.tensor([0.5, 2.5e9])
    found = MaskedCV(("isotropic", "diagonal"), (1, 2), density, rmse, torch.ones(2), 1)
    lines = repr(found).splitlines()
    assert lines[0].startswith("1 observed value, masked")
    assert lines[2].split() == ["isotropic", "1", "-1.500", "0.500", "100.0%", "<-", "best"]
    assert lines[3].split() == ["diagonal", "2", "-1.23e+08", "2.5e+09", "100.0%"]
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.slow
def test_several_starts_are_made():
    data = Table("data", incomplete(num_rows=40), tuple(f"x{k}" for k in range(10)))
    filled = FilledTable.of(data, 2, "diagonal", starts=2)
    assert any("2 starts end" in note for note in filled.notes())


def test_invalid_searches_are_rejected():
    with pytest.raises(ValueError, match=r"fraction must lie between 0 and 1; got 1\.5"):
        select_by_masked_cv(incomplete(), fraction=1.5)
    with pytest.raises(ValueError, match="can be masked without a row or column losing all"):
        select_by_masked_cv(np.eye(3)[:, :1])
    with pytest.raises(ValueError, match="K = 10: latent_dim must be smaller than the rank"):
        select_by_masked_cv(incomplete(), latent_dims=[10])


@pytest.mark.parametrize("offset", [0.0, 2459000.5, -1e8, 1e12])
def test_rounding_is_small_beside_the_standard_deviation(offset):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 3)) * [1e-3, 1.0, 50.0] + offset
    values[4, 0] = values[7, 1] = values[9, 2] = np.nan
    missing = np.isnan(values)
    mean = torch.from_numpy(np.where(missing, offset + rng.normal(size=values.shape), values))
    sd = torch.from_numpy(np.where(missing, rng.uniform(0.1, 1, values.shape), 0.0))
    sd[9, 2] = torch.nan
    names = ("a", "b", "c")
    frame = filled_frame(Table("data", values, names), Imputation(mean, sd))
    found = frame[[*names]].to_numpy()
    np.testing.assert_array_equal(found[~missing], values[~missing])
    error = np.abs(found - mean.numpy())[missing]
    assert (error[:2] <= 1e-5 * sd.numpy()[missing][:2] + 2e-16 * abs(offset)).all()
    assert error[2] == 0  # its standard deviation is unknown


# The command

PLUG_IN = "--no-parameter-uncertainty"


def run(*arguments):
    return CliRunner().invoke(app, ["impute", *map(str, arguments)])


@pytest.fixture
def file(tmp_path):
    x = incomplete(spread=100)
    path = tmp_path / "table.csv"
    names = ["wool", "silk", "flax", "hemp", "jute", "felt", "tulle", "voile", "lawn", "lawn sd"]
    frame = pd.DataFrame(x, columns=names, index=[f"row {n}" for n in range(len(x))])
    frame["count"] = np.arange(len(x))
    frame["kind"] = ["ab"[n % 2] for n in range(len(x))]
    frame.to_csv(path)
    return path


def test_only_missing_values_are_changed(file, tmp_path):
    out = tmp_path / "filled.csv"
    arguments = ("--out", out, "--latent-dim", 3, "--noise", "diagonal", PLUG_IN)
    result = run(file, *arguments)
    assert result.exit_code == 0, result.output
    assert "the uncertainty of the parameters is left out, as requested" in result.output
    assert "take the fitted parameters as known" in result.output
    before = pd.read_csv(file, index_col=0, dtype=str, keep_default_na=False)
    after = pd.read_csv(out, index_col=0, dtype=str, keep_default_na=False)
    data = [name for name in before.columns if name != "kind"]
    filled_names = [name for name in data if (before[name] == "").any()]
    sds = [f"{name} sd" + "_" * (name == "lawn") for name in filled_names]
    assert list(after.columns) == [*data, "kind", *sds]
    assert list(after.index) == list(before.index) and after["kind"].equals(before["kind"])
    x = before[data].apply(pd.to_numeric).to_numpy(dtype=float).copy()
    ppca = PPCA.like(x, 3, noise="diagonal", seed=0)
    fit_em(ppca, x)
    expected = ppca.impute(x)
    for name, sd_name in zip(filled_names, sds, strict=True):
        missing, k = (before[name] == "").to_numpy(), data.index(name)
        assert after[name][~missing].equals(before[name][~missing])
        assert (after[sd_name][~missing] == "").all()
        for column, values in ((name, expected.mean), (sd_name, expected.sd)):
            written = after[column][missing].astype(float).to_numpy()
            np.testing.assert_allclose(written, values.numpy()[missing, k], rtol=1e-5)
    assert after["count"].equals(before["count"])
    assert f"imputed {int(np.isnan(x).sum())} values in 10 columns" in result.output
    assert "factor analysis with K = 3: PX-EM" in result.output and f"wrote {out}" in result.output


@pytest.mark.slow
def test_the_selected_model_is_reported(file, tmp_path):
    out = tmp_path / "filled.tsv"
    result = run(file, "--noise", "diagonal", "--out", out, PLUG_IN)
    assert result.exit_code == 0, result.output
    assert "observed values, masked and predicted from the rest of their rows" in result.output
    assert re.search(r"diagonal +3 .*<- best", result.output)
    assert "factor analysis with K = 3" in result.output
    after = pd.read_csv(out, sep="\t", index_col=0)
    assert not after[["wool", "silk"]].isna().any().any()
    again = run(file, "--noise", "diagonal", "--out", tmp_path / "again.tsv", PLUG_IN)
    assert again.output.splitlines()[:-1] == result.output.splitlines()[:-1]
    assert (tmp_path / "again.tsv").read_bytes() == out.read_bytes()


def small_table(folder):
    path = folder / "small.csv"
    pd.DataFrame(incomplete(num_rows=30)[:, :6], columns=list("abcdef")).to_csv(path, index=False)
    return path


def test_few_values_are_imputed_over_draws_of_the_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr("ppl_vae.fitted.filled_table.NUM_SAMPLES", 50)
    path, out = small_table(tmp_path), tmp_path / "filled.csv"
    result = run(path, "--out", out, "--latent-dim", 2, "--noise", "isotropic")
    assert result.exit_code == 0, result.output
    x = pd.read_csv(path).to_numpy()
    observed = int((~np.isnan(x)).sum())
    assert f"{observed} observed values for 18 parameters, fewer than 50 each" in result.output
    assert "standard deviations include the uncertainty of the parameters" in result.output
    model = BayesianPPCA.like(x, 2)
    sizes = {"num_samples": 50, "warmup": 50, "chains": 4}
    posterior = sample_posterior(model, x, seed=0, progress=False, **sizes)
    expected = impute(model.model, None, x, posterior=posterior)
    after = pd.read_csv(out)
    for k, name in enumerate("abcdef"):
        missing = np.isnan(x[:, k])
        np.testing.assert_allclose(after[name], expected.mean[:, k], rtol=1e-5)
        if missing.any():
            np.testing.assert_allclose(
                after[f"{name} sd"][missing], expected.sd[missing, k], rtol=1e-5
            )


def test_parameters_are_taken_as_known_where_their_posterior_is_not_sampled(tmp_path, monkeypatch):
    path = small_table(tmp_path)
    monkeypatch.setattr("ppl_vae.fitted.filled_table.CELLS_PER_PARAMETER", 5)
    monkeypatch.setattr("ppl_vae.fitted.filled_table.parameters_matter", lambda n, p: n < 5 * p)
    few = ("--out", tmp_path / "filled.csv", "--latent-dim", 2, "--noise", "isotropic")
    assert "at least 5 each (--parameter-uncertainty includes it)" in run(path, *few).output
    monkeypatch.undo()
    constant = pd.read_csv(path).assign(f=2.5)
    constant.to_csv(path, index=False)
    text = "the uncertainty of the parameters is left out, since x has constant columns"
    assert text in run(path, *few).output
    assert isinstance(run(path, *few, "--parameter-uncertainty").exception, ValueError)


def test_a_complete_table_is_written_unchanged(tmp_path):
    path, out = tmp_path / "whole.csv", tmp_path / "filled.csv"
    pd.DataFrame(table(), columns=list("abcdefghij")).to_csv(path, index=False)
    result = run(path, "--out", out, "--latent-dim", 2, "--noise", "isotropic")
    assert result.exit_code == 0 and "no values are missing" in result.output
    assert out.read_text() == path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--out", "filled.xlsx"],
            "the output must end in .csv or .tsv or .parquet; got filled.xlsx",
        ),
        (["--noise", "round"], "noise must be one of 'isotropic', 'diagonal'; got 'round'"),
        (["--latent-dim", "40"], "latent_dim must be smaller than the rank"),
        (["--latent-dim", "0"], "latent_dim must be a whole number >= 1; got 0"),
    ],
)
def test_errors_are_one_line(file, arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ppl-vae", "impute", str(file), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.glob("filled*"))


def test_the_table_itself_is_never_overwritten(file, monkeypatch, capsys):
    before = file.read_bytes()
    monkeypatch.setattr("sys.argv", ["ppl-vae", "impute", str(file), "--out", str(file)])
    with pytest.raises(SystemExit):
        main()
    assert "is an input" in capsys.readouterr().err and file.read_bytes() == before


@pytest.mark.slow
@pytest.mark.data
@NEEDS_DATA
def test_metabolites_are_imputed_better_than_by_column_means(tmp_path):
    folder, out = DATA / "pcaMethods", tmp_path / "filled.csv"
    result = run(folder / "metaboliteData.csv", "--out", out)
    assert result.exit_code == 0, result.output
    print(result.output)
    incomplete_table = pd.read_csv(folder / "metaboliteData.csv", index_col=0)
    truth = pd.read_csv(folder / "metaboliteDataComplete.csv", index_col=0)
    after = pd.read_csv(out, index_col=0)
    filled = after.iloc[:, :52]
    assert list(filled.columns) == list(incomplete_table.columns) and list(after.index) == list(
        incomplete_table.index
    )
    where = incomplete_table.isna().to_numpy()
    assert not filled.isna().to_numpy().any() and where.sum() == 419
    np.testing.assert_array_equal(filled.to_numpy()[~where], incomplete_table.to_numpy()[~where])
    by_model, by_means = (
        np.sqrt((table - truth).to_numpy()[where] @ (table - truth).to_numpy()[where] / 419)
        for table in (filled, incomplete_table.fillna(incomplete_table.mean()))
    )
    assert by_model < by_means / 2


@pytest.mark.slow
def test_columns_of_mixed_units_are_standardised_as_by_fit(tmp_path):
    """The filled values do not depend on the units of the columns."""
    units = np.array([1.0, 1e-3, 1.0, 250.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    x = incomplete()
    frames = []
    for name, scale in (("plain", np.ones(10)), ("mixed", units)):
        path, out = tmp_path / f"{name}.csv", tmp_path / f"{name} filled.csv"
        pd.DataFrame(x * scale, columns=list("abcdefghij")).to_csv(path, index=False)
        scaling = ("--scale", "standardize") if name == "plain" else ()
        result = run(path, "--out", out, "--latent-dim", 2, "--noise", "isotropic", *scaling)
        assert result.exit_code == 0, result.output
        assert "note: the columns are standardised for every fit" in result.output
        frame = pd.read_csv(out)
        for column, unit in zip("abcdefghij", scale, strict=True):
            frame[[c for c in (column, f"{column} sd") if c in frame]] /= unit
        frames.append(frame)
    pd.testing.assert_frame_equal(*frames, rtol=2e-5)
    raw = run(path, "--out", out, "--latent-dim", 2, "--noise", "isotropic", "--scale", "none")
    assert "note: the columns are not standardised (scale='none', --scale none)" in raw.output
    assert raw.output.count("standard deviations of the columns range from") == 1
    wrong = run(path, "--out", out, "--scale", "maybe")
    assert wrong.exit_code != 0 and "--scale" in str(wrong.exception)


def test_the_search_on_standardised_columns_states_it(tmp_path):
    x = incomplete() * np.geomspace(1, 1e3, 10)
    path = tmp_path / "t.csv"
    pd.DataFrame(x, columns=list("abcdefghij")).to_csv(path, index=False)
    result = run(path, "--out", tmp_path / "o.csv", PLUG_IN)
    assert result.exit_code == 0 and "(of standardised columns)" in result.output
