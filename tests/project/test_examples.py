"""The examples, each at its smoke size."""

import os
import runpy
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from files import ONE_THREAD, ROOT

# The others take longer than these, and run with the slow tests and when the gallery is built.
QUICK = [
    "beta_is_decoder_variance",
    "embeddings",
    "gradient_estimators",
    "impute_metabolites",
    "label_efficiency",
    "latent_dimensions",
    "ring",
    "sparse_coding",
    "tobamovirus_map",
    "topics",
]
EXAMPLES = [
    pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.slow, id=path.name)
    for path in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_run(path, tmp_path, monkeypatch, capsys):
    _, title, script = path.read_text().split('"""', 2)
    assert title.count("\n") < 16 and script.count("\n") < 60
    # In this process, which has imported torch and Pyro already.
    plt.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--smoke"])
    runpy.run_path(str(path), run_name="__main__")
    plt.close("all")
    assert "nats per datum" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["impute_metabolites", "tobamovirus_map"])
def test_examples_without_their_data_say_so(name, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PPL_VAE_DATA"} | ONE_THREAD
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment | {"MPLBACKEND": "Agg"},
    )
    assert run.returncode == 1
    assert run.stderr.startswith("set PPL_VAE_DATA to the data's folder")
