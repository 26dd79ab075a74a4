"""Every kind of folder that fit or save wrote, with every verb that takes one."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import oracles
import ppl_vae
from ppl_vae.cli.main import app
from ppl_vae.fitted.folder import load_fitted

NAMES = [f"c{k}" for k in range(6)]
ROWS = 12
"""The number of rows that are evaluated."""
FEW = ["--num-samples", "60", "--refine", "0"]
ANNEALED = ["--annealed", "2", "--num-temperatures", "3"]
SHORT = ["--latent-dim", "2", "--hidden", "8", "--epochs", "2"]
SLOW = pytest.mark.slow
FITTED = [
    "bayesian-ppca",
    "autoencoder",
    pytest.param("ppca", marks=SLOW),
    pytest.param("vae", marks=SLOW),
    pytest.param("factor-analysis", marks=SLOW),
    pytest.param("bayesian-factor-analysis", marks=SLOW),
    pytest.param("iwae", marks=SLOW),
]


def attempt(*arguments):
    """The result of a command that may fail with a named error."""
    found = CliRunner().invoke(app, [*map(str, arguments)])
    assert found.exception is None or isinstance(found.exception, ValueError), found.exception
    return found


def run(*arguments):
    found = attempt(*arguments)
    assert found.exit_code == 0, (found.output, found.exception)
    return found


def read(*arguments):
    return pd.read_csv(io.StringIO(run(*arguments).stdout))


@pytest.fixture(scope="module")
def place(short_evaluations, tmp_path_factory):
    """A folder with tables and a fitted PPCA."""
    found = tmp_path_factory.mktemp("product")
    x = np.array(oracles.simulate_ppca((16, 8), 1, 40, 6, seed=2))
    frame = pd.DataFrame(x, columns=NAMES)
    frame.to_csv(found / "whole.csv", index=False)
    pd.DataFrame((x > 0).astype(int), columns=NAMES).to_csv(found / "bits.csv", index=False)
    frame.mask(np.random.default_rng(0).random(x.shape) < 0.1).to_csv(
        found / "gaps.csv", index=False
    )
    run("fit", found / "gaps.csv", "--out", found / "other", "--latent-dim", 1)
    return found


def check_density_verbs(folder, table, place):
    """Score, impute and compare, for models with log p, or their named refusal."""
    fitted = load_fitted(folder)
    if fitted.has_density:
        assert np.isfinite(read("score", folder, table, *FEW)["log_p"]).all()
        filled = read("impute", folder, table, "--out", "-")
        assert not filled[list(NAMES)].isna().any().any()
        found = run("compare", folder, place / "other", table, *FEW).stdout
        assert "differences to the best" in found
        return
    others = ([place / "other", table, *FEW], [table, *FEW], [table])
    for verb, rest in zip(("compare", "score", "impute"), others, strict=True):
        error = attempt(verb, folder, *rest).exception
        assert "autoencoder" in str(error) and "--model vae" in str(error)


def check_sample(folder):
    fitted = load_fitted(folder)
    if fitted.can_sample:
        drawn = read("sample", folder, "-n", 7)
        assert [*drawn] == [*fitted.columns] and np.isfinite(drawn).all().all() and len(drawn) == 7
    else:
        error = str(attempt("sample", folder).exception)
        assert "no rows can be drawn" in error
        assert "prior on z" in error or "totals" in error


def read_only_rows(table, tmp_path):
    """A table with the first rows only."""
    pd.read_csv(table)[:ROWS].to_csv(tmp_path / "rows.csv", index=False)
    return tmp_path / "rows.csv"


def check_evaluation(folder, table, values, tmp_path):
    """Evaluate and its page, against the verbs reconstruct and score."""
    fitted, out = load_fitted(folder), tmp_path / "evaluation.json"
    shown = run("evaluate", folder, table, "--out", out, "--rows", ROWS, *ANNEALED, *FEW)
    found = json.loads(out.read_text())
    rebuilt = read("reconstruct", folder, table).to_numpy()
    squares = ((rebuilt - values) / fitted.units.scale.numpy())[:ROWS] ** 2
    rows = np.nanmean(squares, axis=1)
    assert found["reconstruction"]["value"] == pytest.approx(rows.mean() ** 0.5, rel=1e-6)
    error = rows.std(ddof=1) / len(rows) ** 0.5 / (2 * rows.mean() ** 0.5)
    assert found["reconstruction"]["error"] == pytest.approx(error, rel=1e-5)
    assert f"reconstruction error {rows.mean() ** 0.5:.4g} ± {error:.3g}" in shown.stdout
    if fitted.has_density:
        table = read_only_rows(table, tmp_path)
        scores = read("score", folder, table, *FEW)["log_p"]
        assert found["log_likelihood"]["value"] == pytest.approx(scores.to_list(), rel=1e-6)
    else:
        assert "the guide of an autoencoder is a point mass" in shown.stdout
    run("report", out, "--out", tmp_path / "evaluation.html")
    assert "econstruction error" in (tmp_path / "evaluation.html").read_text()


def check_every_verb(folder, table, place, tmp_path):
    values = pd.read_csv(table).to_numpy()
    codes = read("transform", folder, table)
    assert len(codes) == 40 and np.isfinite(codes).all().all()
    check_density_verbs(folder, table, place)
    check_sample(folder)
    check_evaluation(folder, table, values, tmp_path)
    run("report", folder, table, "--out", tmp_path / "page.html")
    assert "reconstructions" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("model", FITTED)
def test_a_folder_of_fit_with_every_verb(model, place, tmp_path):
    run("fit", place / "gaps.csv", "--model", model, "--out", tmp_path / "m", *SHORT)
    check_every_verb(tmp_path / "m", place / "gaps.csv", place, tmp_path)


def saved_programs(x):
    """Programs that save writes, by name."""
    frame = pd.DataFrame(x, columns=NAMES)
    bayesian = ppl_vae.BayesianPPCA.like(frame, 2)
    topics = ppl_vae.models.topic_vae(6, 2, hidden=(4,), seed=0)
    return {
        "PPCA of a frame": ppl_vae.PPCA.like(frame, 2, noise="diagonal", seed=0),
        "posterior": ppl_vae.fit_vb(bayesian, frame, seed=0).guide,
        "VAE": ppl_vae.VAE.like(frame, 2, hidden=(4,), seed=0),
        "Autoencoder with a prior": ppl_vae.Autoencoder.mlp(
            6, 2, hidden=(4,), prior="normal", penalty=1.0, seed=0
        ),
        "topics": topics,
    }


SAVED = [
    "PPCA of a frame",
    pytest.param("VAE", marks=SLOW),
    "Autoencoder with a prior",
    pytest.param("posterior", marks=SLOW),
    pytest.param("topics", marks=SLOW),
]


@pytest.mark.parametrize("kind", SAVED)
def test_a_folder_of_save_with_every_verb(kind, place, tmp_path):
    table = place / ("bits.csv" if kind == "topics" else "whole.csv")
    program = saved_programs(pd.read_csv(place / "whole.csv").to_numpy())[kind]
    ppl_vae.save(program, tmp_path / "m")
    check_every_verb(tmp_path / "m", table, place, tmp_path)


def test_what_cannot_be_applied_to_a_table_is_named(place, tmp_path):
    ppl_vae.save(ppl_vae.BayesianPPCA(6, 2), tmp_path / "prior")
    ppl_vae.save(ppl_vae.PerDatumGuide(40, 2), tmp_path / "guide")
    for name, reason in (("prior", "save fit_vb"), ("guide", "one q for each row")):
        error = attempt("score", tmp_path / name, place / "whole.csv").exception
        assert reason in str(error) and "give the folder of a PPCA" in str(error)


def test_a_single_row_is_evaluated(place, tmp_path):
    pd.read_csv(place / "whole.csv")[:1].to_csv(tmp_path / "row.csv", index=False)
    out = tmp_path / "evaluation.json"
    shown = run("evaluate", place / "other", tmp_path / "row.csv", "--out", out)
    assert "needs two rows or more" in shown.stdout
    run("report", out, "--out", tmp_path / "page.html")


def test_columns_of_a_saved_program_are_matched_by_name(place, tmp_path):
    x = pd.read_csv(place / "whole.csv")
    program = ppl_vae.PPCA.like(x, 2, seed=0)
    ppl_vae.save(program, tmp_path / "m")
    x[NAMES[::-1]].to_csv(tmp_path / "permuted.csv", index=False)
    expected = program.log_likelihood(torch.from_numpy(x.to_numpy())).detach().numpy()
    found = read("score", tmp_path / "m", tmp_path / "permuted.csv")["log_p"]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
