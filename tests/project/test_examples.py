"""The examples, each at its smoke size."""

import os
import subprocess
import sys

import pytest
from files import ONE_THREAD, ROOT

# The others take longer than these, and run with the slow tests and when the gallery is built.
QUICK = [
    "impute_metabolites",
    "port_an_encoder",
    "rank_k_reconstructions",
    "tobamovirus_map",
    "topic_recovery",
    "vae_as_model_and_guide",
]
EXAMPLES = [
    pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.slow, id=path.name)
    for path in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_run(path, tmp_path):
    _, title, script = path.read_text().split('"""', 2)
    assert title.count("\n") < 16 and script.count("\n") < 60
    environment = os.environ | ONE_THREAD | {"MPLBACKEND": "Agg"}
    run = subprocess.run(
        [sys.executable, "-W", "error", str(path), "--smoke"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert "nats per datum" in run.stdout


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
