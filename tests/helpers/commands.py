"""Commands that are run in the process of a test, and a small table for them."""

import io

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import oracles
from ppl_vae.cli.main import app, main

NAMES = ["wool", "silk", "flax", "hemp", "jute"]
SCALES = np.array([1.0, 1e3, 1e-2, 5.0, 1.0])
SMALL_VAE = ["--model", "vae", "--latent-dim", "2", "--hidden", "8", "--epochs", "4"]


def run(*arguments, status=0):
    """The result of a command; its standard output is ``stdout``."""
    found = CliRunner().invoke(app, [*map(str, arguments)])
    assert found.exit_code == status, (found.output, found.exception)
    return found


def failing(monkeypatch, capsys, *arguments, status=2):
    """What a command writes to standard error, one line, when it fails."""
    monkeypatch.setattr("sys.argv", ["ppl-vae", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capsys.readouterr().err.splitlines()
    assert ended.value.code == status and errors[-1].startswith("error: ")
    return errors[-1]


def frame(num_rows=60, seed=0, missing=0.1):
    x = oracles.simulate_ppca((16, 8), 1, num_rows, 5, seed=seed)
    x = np.asarray(x) * SCALES + np.arange(5)
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(x, columns=NAMES).mask(rng.random(x.shape) < missing)
    return table.assign(kind=[*"ab"] * (num_rows // 2))


def read(result):
    return pd.read_csv(io.StringIO(result.stdout))
