"""The command: what a person sees, what is written, and what a mistake looks like."""

import json
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

import oracles
from ppl_vae.cli import app

FAST = ["--rungs", "closed-form,px-em,variational-em"]


def run(*arguments):
    return CliRunner().invoke(app, ["lineage", *map(str, arguments)])


@pytest.fixture
def table(tmp_path):
    x = oracles.simulate_ppca((16, 8), 1, 60, 6, seed=0)
    path = tmp_path / "mine.csv"
    np.savetxt(path, x, delimiter=",", header="a,b,c,d,e,f", comments="")
    return path


def test_a_table_of_ones_own(table, tmp_path):
    shown = run(table, "--latent-dim", 2, "--out", tmp_path / "out", *FAST)
    assert shown.exit_code == 0, shown.output
    assert "mine.csv: 60 rows, 6 columns; K = 2, seed 0" in shown.output
    lines = shown.output.splitlines()
    header = next(line for line in lines if line.startswith("rung"))
    for title in ("ELBO", "log p", "appr.", "amort.", "held out", "sigma", "angle", "steps"):
        assert title in header
    assert [line.split()[0] for line in lines[3:6]] == ["closed-form", "px-em", "variational-em"]
    assert "…" not in shown.output
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["about"]["data"] == "mine.csv"
    assert content["about"]["latent_dim"] == 2
    assert len(content["rows"]) == 3
    picture = matplotlib.image.imread(tmp_path / "out" / "gap_staircase.png")
    assert min(picture.shape[:2]) > 300


def test_numpy_tables_and_the_default_latent_dim(tmp_path):
    np.save(tmp_path / "x.npy", oracles.simulate_ppca((16, 8), 1, 60, 6, seed=0))
    shown = run(tmp_path / "x.npy", "--out", tmp_path / "out", "--seed", 5, *FAST)
    assert "K = 3, seed 5" in shown.output


def test_digits_are_the_default(tmp_path):
    shown = run("--out", tmp_path, *FAST)
    assert shown.exit_code == 0
    assert "digits / 16: 1797 rows, 64 columns; K = 10" in shown.output
    assert "constant columns: 0, 32, 39 (closed-form, px-em, variational-em)" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "error: there is no file none.csv"),
        (["--rungs", "foo"], "error: rungs must be one of"),
        (["--latent-dim", "64"], "error: latent_dim must be smaller than the rank"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path):
    command = [sys.executable, "-c", "from ppl_vae.cli import main; main()", "lineage"]
    shown = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 2
    assert shown.stderr.startswith(message)
    assert len(shown.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_help_lists_what_there_is():
    shown = CliRunner().invoke(app, ["lineage", "--help"])
    for option in ("--latent-dim", "--rungs", "--out", "--seed"):
        assert option in shown.output
