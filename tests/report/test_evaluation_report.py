"""The command ``ppl-vae evaluate``, which evaluates a saved model on a table."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import oracles
from ppl_vae import PPCA, VAE, PerDatumGuide, fit_em, fit_svi, log_likelihood, save
from ppl_vae.cli.main import app, main
from ppl_vae.evaluation import Annealing

D = 6


def table(seed=0, rows=80):
    x = oracles.simulate_ppca((16, 8), 1, rows, D, seed=seed)
    return oracles.with_missing_values(x, 0.1, seed=seed)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "test.csv"
    pd.DataFrame(table(seed=1), columns=list("abcdef")).to_csv(path, index=False)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_a_ppca_is_exact(data, tmp_path):
    ppca = PPCA.like(table(), 2, seed=0)
    fit_em(ppca, table())
    save(ppca, tmp_path / "ppca")
    out = tmp_path / "evaluation.json"
    result = run(tmp_path / "ppca", data, "--out", out, "--rows", 50)
    assert result.exit_code == 0, result.output
    log_p = ppca.log_likelihood(table(seed=1)[:50]).detach()
    assert "PPCA in" in result.output and "on 50 rows of test.csv" in result.output
    assert f"{float(log_p.mean()):.3f} ± " in result.output and "closed form" in result.output
    assert "bits per dimension" in result.output and f"wrote {out}" in result.output
    found = json.loads(out.read_text())
    np.testing.assert_allclose(found["log_likelihood"]["value"], log_p.numpy(), atol=1e-9)
    gap = np.array(found["gaps"]["log_likelihood"]) - np.array(found["gaps"]["elbo"])
    assert np.abs(gap).max() < 1e-6  # the guide is exact


@pytest.mark.slow
def test_a_vae_is_evaluated_like_by_the_functions(data, tmp_path):
    vae = VAE.mlp(D, 2, hidden=(16,), seed=0)
    fit_svi(vae.model, vae.guide, table(), steps=60, batch_size=40, lr=1e-2, seed=0)
    save(vae, tmp_path / "vae")
    out = tmp_path / "evaluation.json"
    options = ["--draws", 100, "--refine", 20, "--seed", 3, "--rows", 40]
    options += ["--annealed", 8, "--num-temperatures", 5]
    result = run(tmp_path / "vae", data, "--out", out, *options)
    assert result.exit_code == 0, result.output
    x = table(seed=1)[:40]
    expected = log_likelihood(vae.model, vae.guide, x, 100, refine=20, seed=3)
    found = json.loads(out.read_text())
    np.testing.assert_allclose(found["log_likelihood"]["value"], expected.value.numpy(), atol=1e-5)
    for part in ("log-likelihood:", "Gaps in nats", "amortization"):
        assert part in result.output
    assert len(found["collapse"]["kl_by_dimension"]) == 2
    estimates = found["cross_check"]["estimates"]
    assert set(estimates) == {"importance", "refined", "annealed"}
    assert estimates["refined"]["value"] == found["log_likelihood"]["value"][:8]
    chains = log_likelihood(
        vae.model,
        vae.guide,
        x,
        32,
        method="annealed",
        annealing=Annealing(5),
        seed=5,
        rows=torch.arange(8),
    )
    np.testing.assert_allclose(estimates["annealed"]["value"], chains.value.numpy(), atol=1e-5)
    assert "log p of 8 data points by each method" in result.output
    again = run(tmp_path / "vae", data, "--out", tmp_path / "again.json", *options)
    assert again.output.splitlines()[:-1] == result.output.splitlines()[:-1]
    again = json.loads((tmp_path / "again.json").read_text())
    assert without_paths(again) == without_paths(found)
    options += ["--rows", 5, "--refine", 0]
    assert run(tmp_path / "vae", data, "--out", out, *options).exit_code == 0
    estimates = json.loads(out.read_text())["cross_check"]["estimates"]
    assert set(estimates) == {"importance", "annealed"}
    assert len(estimates["annealed"]["value"]) == 5
    assert run(tmp_path / "vae", data, "--out", out, *options, "--annealed", 0).exit_code == 0
    assert json.loads(out.read_text())["cross_check"] is None


def without_paths(content):
    """The results, without the remarks on execution, which contain times."""
    if not isinstance(content, dict):
        return content
    return {k: without_paths(v) for k, v in content.items() if k != "execution"}


def test_errors_are_one_line(data, tmp_path, monkeypatch, capsys):
    save(PPCA(4, 2, seed=0), tmp_path / "narrow")
    save(PerDatumGuide(10, 2), tmp_path / "guide")
    cases = (
        ("narrow", [], "test.csv has 6 columns, and the model in"),
        ("guide", [], "holds a PerDatumGuide, which has one q for each row"),
        ("nowhere", [], "nowhere"),
        ("narrow", ["--rows", "0"], "rows must be a whole number >= 1; got 0"),
    )
    monkeypatch.chdir(tmp_path)
    for folder, more, message in cases:
        arguments = ["ppl-vae", "evaluate", str(tmp_path / folder), str(data), *more]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "evaluation.json").exists()
