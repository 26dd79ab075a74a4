"""The commands that fit a model, apply it and evaluate it: numbers, files, errors."""

import json
import os
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal

import ppl_vae
from commands import NAMES, SCALES, failing, frame, read, run
from ppl_vae.core.results import Result
from ppl_vae.fitted.folder import load_fitted


def dense(fitted):
    """Mean and covariance of a PPCA in the units of its table."""
    ppca, units = fitted.program, fitted.units
    scale = units.scale.expand(5).numpy()
    mean = ppca.loc.detach().numpy() * scale + units.loc.numpy()
    return mean, ppca.covariance().detach().numpy() * np.outer(scale, scale)


def test_scores_are_the_dense_density_in_the_units_of_the_table(folder):
    fitted = load_fitted(folder / "ppca")
    mean, covariance = dense(fitted)
    found = read(run("score", folder / "ppca", folder / "mine.csv"))
    for row, value in zip(frame()[NAMES].to_numpy(), found["log_p"], strict=True):
        known = ~np.isnan(row)
        unit = SCALES[known]
        spread = covariance[np.ix_(known, known)] / np.outer(unit, unit)
        expected = multivariate_normal(mean[known] / unit, spread).logpdf(row[known] / unit)
        assert value == pytest.approx(expected - np.log(unit).sum(), abs=1e-8)
    assert (found["standard_error"] == 0).all() and found["reliable"].all()


def test_imputed_values_are_the_dense_conditional_means(folder, tmp_path):
    mean, covariance = dense(load_fitted(folder / "ppca"))
    run("impute", folder / "ppca", folder / "mine.csv", "--out", tmp_path / "filled.csv")
    found, before = pd.read_csv(tmp_path / "filled.csv"), frame()
    row = int(before[NAMES].isna().any(axis=1).to_numpy().argmax())
    values = before[NAMES].to_numpy()[row]
    gone = np.isnan(values)
    gain = covariance[np.ix_(gone, ~gone)] @ np.linalg.inv(covariance[np.ix_(~gone, ~gone)])
    expected = mean[gone] + gain @ (values - mean)[~gone]
    variance = covariance[np.ix_(gone, gone)] - gain @ covariance[np.ix_(~gone, gone)]
    filled = found[NAMES].to_numpy()[row]
    assert filled[gone] == pytest.approx(expected, rel=1e-5)
    assert filled[~gone].tolist() == values[~gone].tolist()
    sds = [found[f"{name} sd"][row] for name in np.array(NAMES)[gone]]
    assert sds == pytest.approx(np.sqrt(variance.diagonal()), rel=1e-5)
    assert found["kind"].tolist() == before["kind"].tolist()


def test_codes_and_reconstructions(folder):
    fitted, values = load_fitted(folder / "ppca"), frame()[NAMES].to_numpy()
    codes = read(run("transform", folder / "ppca", folder / "mine.csv"))
    assert [*codes.columns] == ["z1", "z2", "z1 sd", "z2 sd"]
    mean, sd = fitted.codes(values)
    np.testing.assert_allclose(codes.to_numpy(), torch.cat([mean, sd], 1).numpy(), rtol=1e-9)
    rebuilt = read(run("reconstruct", folder / "ppca", folder / "mine.csv"))
    assert [*rebuilt.columns] == NAMES
    ppca, scale = fitted.program, fitted.units.scale.numpy()
    expected = (mean @ ppca.loadings.detach().mT + ppca.loc.detach()).numpy() * scale
    np.testing.assert_allclose(rebuilt, expected + fitted.units.loc.numpy(), rtol=1e-8)


def test_samples_have_the_moments_of_the_model(folder):
    mean, covariance = dense(load_fitted(folder / "ppca"))
    drawn = read(run("sample", folder / "ppca", "-n", 4000, "--seed", 3))
    assert [*drawn.columns] == NAMES and len(drawn) == 4000
    deviations = np.sqrt(covariance.diagonal())
    assert (np.abs(drawn.mean() - mean) < 5 * deviations / 4000**0.5).all()
    error = np.abs(np.cov(drawn.T) - covariance) / np.outer(deviations, deviations)
    assert error.max() < 5 * (2 / 4000) ** 0.5
    again = read(run("sample", folder / "ppca", "-n", 4000, "--seed", 3))
    assert again.equals(drawn)


@pytest.mark.parametrize("verb", ["score", "transform", "reconstruct"])
def test_columns_are_matched_by_name(verb, folder, tmp_path):
    expected = read(run(verb, folder / "ppca", folder / "mine.csv"))
    permuted = frame()[["jute", "kind", "flax", "wool", "silk", "hemp"]].assign(more=1.5)
    permuted["more"] += np.arange(60)
    permuted.to_csv(tmp_path / "permuted.csv", index=False)
    found = run(verb, folder / "ppca", tmp_path / "permuted.csv")
    pd.testing.assert_frame_equal(read(found), expected)
    assert "left out: 'more'" in found.stderr


def test_row_names_go_out_under_the_name_of_their_column(folder, tmp_path):
    table = frame().drop(columns="kind").rename(index="r{}".format).rename_axis("plot")
    table.to_csv(tmp_path / "named.csv")
    for verb in ("score", "transform", "reconstruct", "impute"):
        out = tmp_path / f"{verb}.csv"
        run(verb, folder / "ppca", tmp_path / "named.csv", "--out", out)
        found = pd.read_csv(out)
        assert found.columns[0] == "plot" and found["plot"].tolist() == table.index.tolist()
    clash = table.rename_axis("log_p")  # a column of the scores
    clash.to_csv(tmp_path / "clash.csv")
    found = read(run("score", folder / "ppca", tmp_path / "clash.csv"))
    assert found.columns.is_unique and found[found.columns[0]].tolist() == table.index.tolist()


def test_a_table_of_one_column_has_no_factors(tmp_path, monkeypatch, capsys):
    (tmp_path / "one.csv").write_text("height\n" + "\n".join(map(str, range(30))))
    error = failing(monkeypatch, capsys, "fit", tmp_path / "one.csv", "--out", tmp_path / "m")
    assert "one.csv has one column, 'height'" in error and "--delimiter" in error


def test_a_model_of_another_version_is_named_with_the_way_out(
    folder, tmp_path, monkeypatch, capsys
):
    model = tmp_path / "model"
    shutil.copytree(folder / "ppca", model)
    metadata = json.loads((model / "fit.json").read_text())
    (model / "fit.json").write_text(json.dumps(metadata | {"format": 1}))
    error = failing(monkeypatch, capsys, "score", model, folder / "mine.csv")
    assert "fit.json was written by another version" in error and "ppl-vae fit --config" in error


def test_a_table_is_read_as_the_fitted_one(folder, tmp_path):
    marked = frame().fillna(-999.0).assign(note=[f"n{k}" for k in range(60)])
    marked.to_csv(tmp_path / "marked.csv", index=False)
    options = ["--missing", "-999", "--drop", "note", "--label", "kind", "--latent-dim", 2]
    run("fit", tmp_path / "marked.csv", "--out", tmp_path / "m", *options)
    found = run("score", tmp_path / "m", tmp_path / "marked.csv")
    expected = read(run("score", folder / "ppca", folder / "mine.csv"))
    pd.testing.assert_frame_equal(read(found), expected)
    assert "is read with --label kind --missing -999 --drop note, as" in found.stderr
    marked.drop(columns=["note", "kind"]).to_csv(tmp_path / "other.csv", index=False)
    other = read(run("score", tmp_path / "m", tmp_path / "other.csv", "--missing", "-999"))
    pd.testing.assert_frame_equal(other, expected)


def test_missing_columns_are_named(folder, tmp_path, monkeypatch, capsys):
    frame().drop(columns=["silk", "hemp"]).to_csv(tmp_path / "narrow.csv", index=False)
    error = failing(monkeypatch, capsys, "score", folder / "ppca", tmp_path / "narrow.csv")
    assert "lacks 2 of the 5 columns that the model was fitted to: 'silk', 'hemp'" in error


def test_rows_with_nothing_observed_stay_empty(folder, tmp_path):
    table = frame()
    table.loc[3, NAMES] = np.nan
    table.to_csv(tmp_path / "empty.csv", index=False)
    for verb in ("score", "transform", "reconstruct"):
        found = read(run(verb, folder / "ppca", tmp_path / "empty.csv"))
        assert len(found) == 60 and found.isna().any(axis=1).to_numpy().nonzero()[0].tolist() == [
            3
        ]
    fitted = run("fit", tmp_path / "empty.csv", "--out", tmp_path / "m", "--latent-dim", 1)
    assert "1 row with nothing observed left out of the fit" in fitted.stderr


def test_the_folder_has_what_later_work_needs(folder):
    names = {path.name for path in (folder / "ppca").iterdir()}
    assert names >= {"config.json", "model.safetensors", "fit.json", "run.toml", "README.md"}
    assert isinstance(ppl_vae.load(folder / "ppca"), ppl_vae.PPCA)
    metadata = load_fitted(folder / "ppca").metadata
    rows = metadata.train_rows + metadata.val_rows + metadata.held_out_rows
    assert sorted(rows) == [*range(60)] and len(metadata.held_out_rows) == 12
    assert metadata.columns == tuple(NAMES) and metadata.versions["ppl_vae"] == ppl_vae.__version__
    scored = json.loads(
        run("score", folder / "ppca", folder / "mine.csv", "--held-out", "--json").stdout
    )
    assert scored["mean"] == pytest.approx(metadata.held_out.value, abs=1e-10)
    card = (folder / "ppca" / "README.md").read_text()
    assert f"{metadata.held_out.value:.4f}" in card and "`hemp`" in card and "Limits" in card
    assert isinstance(metadata, Result) and metadata.settings["latent_dim"] == 2


def test_what_takes_too_much_memory_is_refused_in_one_line(folder, monkeypatch, capsys):
    error = failing(monkeypatch, capsys, "sample", folder / "ppca", "-n", 10**13, status=1)
    assert error.startswith("error: there is too little memory for ") and "--rows" in error


def test_hidden_widths_are_all_given(folder, tmp_path):
    given = ("--model", "vae", "--latent-dim", 2, "--out", tmp_path / "m")
    for widths in ("4,,4", "4,", ","):
        found = run("fit", folder / "mine.csv", *given, "--hidden", widths, status=1)
        assert str(found.exception) == "--hidden must be a whole number; got ''"
    assert not (tmp_path / "m").exists()


def test_a_configuration_repeats_the_fit(folder, tmp_path):
    run("fit", "--config", folder / "vae" / "run.toml", "--out", tmp_path / "again")
    for name in ("model.safetensors",):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "vae" / name).read_bytes()
    run("fit", "--config", folder / "ppca" / "run.toml", "--out", tmp_path / "b", "--seed", 5)
    assert load_fitted(tmp_path / "b").metadata.settings["seed"] == 5
    assert load_fitted(tmp_path / "b").latent_dim == 2


def test_models_are_compared_on_rows_that_no_fit_used(folder, tmp_path):
    out = tmp_path / "comparison.csv"
    paths = [folder / "ppca", folder / "vae", folder / "mine.csv"]
    found = run("compare", *paths, "--held-out", "--out", out, "--num-samples", 300, "--refine", 0)
    assert "log p of 12 data points" in found.stdout and "differences to the best" in found.stdout
    table = pd.read_csv(out, index_col="model")
    assert set(table.index) == {"ppca", "vae"}
    metadata = load_fitted(folder / "ppca").metadata
    assert table["mean"]["ppca"] == pytest.approx(metadata.held_out.value, abs=1e-10)
    shown = run("compare", *paths, "--json", "--num-samples", 300, "--refine", 0)
    assert len(json.loads(shown.stdout)["pointwise"][0]) == 60
    assert "which log p is too high; --held-out" in shown.stderr


def test_log_p_of_another_unit_differs_by_the_jacobian(folder, tmp_path):
    other = frame()
    other["silk"] *= 1000
    other.to_csv(tmp_path / "other.csv", index=False)
    run("fit", tmp_path / "other.csv", "--out", tmp_path / "m", "--latent-dim", 2)
    first = read(run("score", folder / "ppca", folder / "mine.csv"))["log_p"]
    second = read(run("score", tmp_path / "m", tmp_path / "other.csv"))["log_p"]
    observed = frame()["silk"].notna()
    np.testing.assert_allclose(second - first, -np.log(1000) * observed, atol=1e-6)


def test_a_program_that_save_wrote_is_applied_in_its_own_units(tmp_path):
    x = frame(missing=0.0)[NAMES]
    x.to_csv(tmp_path / "x.csv", index=False)
    ppca = ppl_vae.PPCA.like(x.to_numpy(), 2, seed=0)
    ppl_vae.save(ppca, tmp_path / "saved")
    found = read(run("score", tmp_path / "saved", tmp_path / "x.csv"))
    expected = ppca.log_likelihood(x.to_numpy()).detach().numpy()
    np.testing.assert_allclose(found["log_p"], expected, rtol=1e-9)


def test_evaluations_are_in_the_units_of_the_table(folder, tmp_path):
    out = tmp_path / "evaluation.json"
    run("evaluate", folder / "ppca", folder / "mine.csv", "--held-out", "--out", out)
    content = json.loads(out.read_text())
    metadata = load_fitted(folder / "ppca").metadata
    assert np.mean(content["log_likelihood"]["value"]) == pytest.approx(metadata.held_out.value)
    assert content["gaps"]["elbo"] == pytest.approx(content["log_likelihood"]["value"])
    page = tmp_path / "evaluation.html"
    run("report", out, "--out", page)
    text = page.read_text()
    assert "Evaluation on mine.csv" in text
    details = re.findall(r"<li>(.*?)</li>", text)  # each states what it is about
    assert details and all(": " in detail for detail in details)
    assert any(detail.startswith("Latent space: ") for detail in details)


def test_the_page_of_a_fit(folder, tmp_path):
    page = tmp_path / "report.html"
    run("report", folder / "ppca", folder / "mine.csv", "--out", page)
    text = page.read_text()
    metadata = load_fitted(folder / "ppca").metadata
    assert f"{metadata.held_out.value:.4f}" in text
    for part in ("hemp", "Loadings", "reconstructions", 'id="samples"', "not fitted"):
        assert part in text or part.lower() in text, part
    assert not re.search(r'(src|href)="https?:', text)


# Outputs


def test_parquet_and_json(folder, tmp_path):
    pytest.importorskip("pyarrow")
    expected = read(run("transform", folder / "ppca", folder / "mine.csv"))
    run("transform", folder / "ppca", folder / "mine.csv", "--out", tmp_path / "z.parquet")
    np.testing.assert_allclose(pd.read_parquet(tmp_path / "z.parquet"), expected, rtol=1e-12)


def test_json_is_all_that_standard_output_has(folder):
    found = run("transform", folder / "ppca", folder / "mine.csv", "--json")
    rows = json.loads(found.stdout)["rows"]
    assert len(rows) == 60 and set(rows[0]) == {"z1", "z2", "z1 sd", "z2 sd"}


@pytest.mark.parametrize("as_link", [False, True])
def test_inputs_are_never_overwritten(as_link, folder, tmp_path, monkeypatch, capsys):
    table, model = tmp_path / "t.csv", tmp_path / "m"
    shutil.copy(folder / "mine.csv", table)
    shutil.copytree(folder / "ppca", model)
    before = {p: p.read_bytes() for p in (table, *model.iterdir())}
    target = tmp_path / "link.csv"
    if as_link:
        os.link(table, target)
    else:
        target = table
    for verb in ("score", "transform", "reconstruct", "impute"):
        error = failing(monkeypatch, capsys, verb, model, table, "--out", target)
        assert "is an input" in error
    for out in (model / "config.json", model / "fit.json"):
        failing(monkeypatch, capsys, "evaluate", model, table, "--out", out)
    assert {p: p.read_bytes() for p in before} == before


def test_what_cannot_be_written_is_found_before_the_work(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ppl_vae.fitted.fit.fit_program", None)
    monkeypatch.setattr("ppl_vae.fitted.model.FittedModel.log_likelihood", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    table = folder / "mine.csv"
    error = failing(monkeypatch, capsys, "fit", table, "--out", tmp_path / "full")
    assert "holds something else than a model" in error
    failing(monkeypatch, capsys, "fit", table, "--out", table, status=1)
    failing(
        monkeypatch, capsys, "score", folder / "ppca", table, "--out", tmp_path / "no" / "s.csv"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("seed", ["-1", str(2**32), str(10**30)])
@pytest.mark.parametrize("verb", ["fit", "score", "sample", "impute", "lineage"])
def test_a_seed_outside_its_range_is_named(verb, seed, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = {
        "score": [folder / "ppca", folder / "mine.csv"],
        "sample": [folder / "ppca"],
        "lineage": [],
    }.get(verb, [folder / "mine.csv"])
    assert "--seed must be a whole number" in failing(
        monkeypatch, capsys, verb, *paths, "--seed", seed
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "pca"], "--model must be one of 'ppca', 'factor-analysis'"),
        (["--latent-dim", "many"], "--latent-dim must be a whole number, or auto; got 'many'"),
        (["--latent-dim", "9"], "latent_dim must be smaller than the rank"),
        (["--held-out", "1.5"], "--held-out must be between 0 and 1; got 1.5"),
        (["--likelihood", "poisson"], "--likelihood poisson needs a model with a decoder"),
        (["--hidden", "8,x", "--model", "vae"], "--hidden must be a whole number; got 'x'"),
        (["--config", "none.toml"], "there is no file none.toml"),
        (["--resume"], "--resume: there is no fit in"),
        (["--quiet", "--verbose"], "give --quiet or --verbose, not both"),
        (["--model", "vae", "--device", "abacus", "--latent-dim", "1"], "'abacus'"),
    ],
)
def test_errors_of_fit_are_one_line(arguments, message, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "m"
    error = failing(monkeypatch, capsys, "fit", folder / "mine.csv", "--out", out, *arguments)
    assert message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fit = 3", "fit cannot be 3"),
        ("[fit]\nmodel = 3", "model must be a text; got 3"),
        ("[fit]\nshoes = 3", "unknown settings ['shoes']"),
        ("[read]\nshoes = 3", "unknown option of reading, 'shoes'"),
        ("[read]\nlabel = 3", "label cannot be 3"),
        ("[fit", "is not TOML"),
        ("[fit]\nlatent_dim = 1", "give a table to fit"),
    ],
)
def test_a_configuration_that_is_wrong(text, message, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.toml").write_text(text)
    table = [] if "give a table" in message else [folder / "mine.csv"]
    out = tmp_path / "m"
    config = tmp_path / "run.toml"
    error = failing(monkeypatch, capsys, "fit", *table, "--out", out, "--config", config)
    assert message in error and not out.exists()


def test_a_constant_column_is_named(tmp_path, monkeypatch, capsys):
    frame(missing=0).assign(flax=3.0).to_csv(tmp_path / "x.csv", index=False)
    out = ["--out", tmp_path / "m", "--latent-dim", 1]
    found = run("fit", tmp_path / "x.csv", *out)
    assert "constant columns: flax" in found.stderr
    fa = ["--model", "factor-analysis"]
    error = failing(monkeypatch, capsys, "fit", tmp_path / "x.csv", *out, *fa)
    assert "the columns 'flax' are constant" in error and "(--drop flax)" in error


def test_all_columns_that_a_fit_cannot_have_are_in_one_option(tmp_path, monkeypatch, capsys):
    constant = {f"level, {k}": 3.0 for k in range(7)}
    frame(missing=0).assign(**constant).to_csv(tmp_path / "x.csv", index=False)
    arguments = ["fit", tmp_path / "x.csv", "--out", tmp_path / "m", "--latent-dim", 1]
    arguments += ["--model", "factor-analysis"]
    error = failing(monkeypatch, capsys, *arguments)
    options = shlex.split(re.search(r"\((--drop .*?)\), or", error).group(1))
    run(*arguments, *options)
    assert load_fitted(tmp_path / "m").columns == tuple(NAMES)


def test_quiet_and_verbose(folder):
    paths = folder / "ppca", folder / "mine.csv"
    quiet, normal = run("score", *paths, "--quiet"), run("score", *paths)
    assert quiet.stderr == "" and quiet.stdout == normal.stdout
    assert "computing log p of 60 rows" in normal.stderr.splitlines()
    assert len(run("score", *paths, "--verbose").stderr) >= len(normal.stderr)
