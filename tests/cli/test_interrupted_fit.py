"""Fits that are interrupted, killed or resumed, and standard output that cannot be written."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from killed import started
from ppl_vae.cli.main import app, main
from ppl_vae.fitted.folder import CHECKPOINT, load_fitted
from ppl_vae.fitted.settings import Run
from ppl_vae.report.archive import read_results

COMMAND = [sys.executable, "-m", "ppl_vae"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
EPOCHS = 1200
FIT = ["--model", "vae", "--latent-dim", "2", "--hidden", "8", "--patience", "5000"]


def command(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
        **options,
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "x.csv"
    x = np.random.default_rng(0).normal(size=(40, 4)) @ np.diag([1, 2, 3, 4])
    pd.DataFrame(x, columns=list("abcd")).to_csv(path, index=False)
    return path


def begin(table, out, epochs=EPOCHS):
    """A fit in another process, stopped in the middle of its steps."""
    arguments = ["fit", table, "--out", out, "--epochs", epochs, *FIT]
    process = started([*COMMAND, *map(str, arguments)], ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not (out / CHECKPOINT).exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    "last_step",
    [pytest.param(1, marks=pytest.mark.slow), 25, pytest.param(120, marks=pytest.mark.slow)],
)
def test_a_fit_that_is_interrupted_anywhere_is_resumed(last_step, table, tmp_path, monkeypatch):
    monkeypatch.setattr("ppl_vae.fitted.held_out.REFINE", 0)
    arguments = ["fit", table, "--epochs", 200, *FIT, "--out"]
    whole = CliRunner().invoke(app, [*map(str, arguments), str(tmp_path / "whole")])
    assert whole.exit_code == 0, whole.output

    def interrupt(self, step, value):
        if step >= last_step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ppl_vae.cli.console.StageDisplay.update", interrupt)
        stopped = CliRunner().invoke(app, [*map(str, arguments), str(tmp_path / "m")])
    assert stopped.exit_code == 130
    assert "interrupted: ppl-vae fit --resume --out" in stopped.stderr
    resumed = CliRunner().invoke(app, ["fit", "--resume", "--out", str(tmp_path / "m")])
    assert resumed.exit_code == 0, resumed.output
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("m", "whole"))
    assert one == two


SIGNALS = pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)


def interrupted(arguments, number, monkeypatch, capsys):
    """The exit status of a command that receives a signal, and the last line of its errors."""
    monkeypatch.setattr("sys.argv", ["ppl-vae", *map(str, arguments)])
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert signal.getsignal(signal.SIGTERM) == before[1]
    return stopped.value.code, capsys.readouterr().err.splitlines()[-1]


@SIGNALS
def test_a_signal_before_a_command_has_begun(number, status, monkeypatch, capsys):
    monkeypatch.setattr("ppl_vae.cli.main.app", lambda: signal.raise_signal(number))
    found = interrupted(["fit", "x.csv"], number, monkeypatch, capsys)
    assert found == (status, "interrupted: no output was written")


@SIGNALS
def test_a_signal_during_a_command(number, status, table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "ppl_vae.cli.fitting.fit_table", lambda *_, **__: signal.raise_signal(number)
    )
    out = tmp_path / "m"
    found = interrupted(["fit", table, "--out", out], number, monkeypatch, capsys)
    assert found == (status, f"interrupted: ppl-vae fit --resume --out {out} begins again")


class SignalWhenDeleted:
    """An object in whose destructor a signal arrives, from which no exception leaves."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@SIGNALS
def test_a_signal_in_a_destructor_is_not_lost(
    number, status, table, tmp_path, monkeypatch, capsys
):
    def fit(*_, **__):
        SignalWhenDeleted(number)
        time.sleep(5)
        raise AssertionError("the fit went on")

    monkeypatch.setattr("ppl_vae.cli.fitting.fit_table", fit)
    out, hook = tmp_path / "m", sys.unraisablehook
    found = interrupted(["fit", table, "--out", out], number, monkeypatch, capsys)
    assert found == (status, f"interrupted: ppl-vae fit --resume --out {out} begins again")
    assert sys.unraisablehook is hook


@SIGNALS
def test_a_signal_during_the_lineage_keeps_what_is_finished(
    number, status, table, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("report.html", "lineage.nc", "results.json"):
        (out / name).write_text("of an earlier run")

    def update(display, *progress):
        if display.lineage is not None:
            signal.raise_signal(number)

    monkeypatch.setattr("ppl_vae.report.terminal.Display.update", update)
    stages = ("--latent-dim", 1, "--stages", "closed-form,px-em")
    arguments = ["lineage", table, "--out", out, *stages]
    found = interrupted(arguments, number, monkeypatch, capsys)
    saved = f"interrupted: 1 of 2 stages are finished, saved in {out / 'results.json'}"
    assert found == (status, saved)
    assert [path.name for path in out.iterdir()] == ["results.json"]
    assert len(read_results(out)[0].rows) == 1


@pytest.mark.slow
@SIGNALS
def test_an_interrupted_fit_is_resumed_to_the_same_result(number, status, table, tmp_path):
    process = begin(table, tmp_path / "m")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    last = errors.splitlines()[-1]
    assert last.startswith("interrupted: ppl-vae fit --resume --out") and "goes on from" in last
    assert not (tmp_path / "m" / "fit.json").exists()
    resumed = command("fit", "--resume", "--out", tmp_path / "m")
    assert resumed.returncode == 0, resumed.stderr
    whole = command("fit", table, "--out", tmp_path / "whole", "--epochs", EPOCHS, *FIT)
    assert whole.returncode == 0, whole.stderr
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("m", "whole"))
    assert one == two
    found = [load_fitted(tmp_path / name).metadata for name in ("m", "whole")]
    assert found[0].history.objective.tolist() == found[1].history.objective.tolist()
    assert found[0].held_out == found[1].held_out


@pytest.mark.slow
def test_a_resumed_fit_has_the_settings_and_the_table_it_had(table, tmp_path):
    own = tmp_path / "x.csv"
    own.write_bytes(table.read_bytes())
    process = begin(own, tmp_path / "m")
    process.kill()
    process.communicate()
    resume = ["fit", "--resume", "--out", tmp_path / "m"]
    other = command(*resume, "--latent-dim", 3)
    assert other.returncode == 2 and "['latent_dim'] are other" in other.stderr
    own.write_text(own.read_text().replace(own.read_text()[-5:-3], "77"))
    changed = command(*resume)
    assert changed.returncode == 2 and "has changed since the fit was begun" in changed.stderr
    assert (tmp_path / "m" / CHECKPOINT).exists()


@pytest.mark.slow
def test_a_killed_fit_leaves_the_model_that_was_there(table, tmp_path):
    out = tmp_path / "m"
    first = command("fit", table, "--out", out, "--latent-dim", 1)
    assert first.returncode == 0, first.stderr
    before = (out / "model.safetensors").read_bytes()
    process = begin(table, out)
    process.kill()
    process.communicate()
    assert (out / "model.safetensors").read_bytes() == before
    assert load_fitted(out).metadata.model == "ppca"
    assert Run.read(out / "run.toml").settings["model"] == "ppca"


@pytest.mark.slow
def test_an_output_that_is_full_or_closed_is_one_line(table, tmp_path):
    out = tmp_path / "m"
    with open("/dev/full", "w") as full:
        fit = [*COMMAND, "fit", str(table), "--out", str(out), "--latent-dim", "1"]
        found = subprocess.run(
            fit, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
    last = found.stderr.splitlines()[-1]
    assert found.returncode == 1 and "No space left on device" in last
    assert load_fitted(out).latent_dim == 1
    drawing = [*COMMAND, "sample", str(out), "-n", "100000", "--quiet"]
    with subprocess.Popen(
        drawing, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert errors.splitlines() == [
        "error: standard output is incomplete: its reader closed it; what goes to files was "
        "written"
    ]


@pytest.mark.slow
def test_json_of_a_fit(table, tmp_path):
    found = command("fit", table, "--out", tmp_path / "m", "--latent-dim", 1, "--json", "--quiet")
    content = json.loads(found.stdout)
    assert content["latent_dim"] == 1 and content["held_out"]["measure"] == "log p"
    assert found.stderr == ""
