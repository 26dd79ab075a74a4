"""The examples, each at its smoke size."""

import runpy
import sys

import matplotlib.pyplot as plt
import pytest

from files import ROOT

# The others take longer than these, and run with the slow tests and when the gallery is built.
QUICK = [
    "port_an_encoder",
    "rank_k_reconstructions",
    "tobamovirus_map",
    "topic_recovery",
]
EXAMPLES = [
    pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.slow, id=path.name)
    for path in sorted((ROOT / "examples").glob("*.py"))
]


def run_example(path, *arguments, folder, monkeypatch):
    """Run an example in this process, which has imported torch and Pyro already."""
    plt.switch_backend("Agg")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")
    plt.close("all")


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_run(path, tmp_path, monkeypatch, capsys):
    _, title, script = path.read_text().split('"""', 2)
    assert title.count("\n") < 16 and script.count("\n") < 60
    run_example(path, "--smoke", folder=tmp_path, monkeypatch=monkeypatch)
    assert "nats per datum" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["impute_metabolites", "tobamovirus_map"])
def test_examples_without_their_data_say_so(name, tmp_path, monkeypatch):
    monkeypatch.delenv("PPL_VAE_DATA", raising=False)
    path = ROOT / "examples" / f"{name}.py"
    with pytest.raises(SystemExit, match=r"^set PPL_VAE_DATA to the data's folder"):
        run_example(path, folder=tmp_path, monkeypatch=monkeypatch)
