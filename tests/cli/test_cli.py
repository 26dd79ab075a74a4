"""The command: what a person sees, what is written, and what a mistaken command prints."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

import oracles
from killed import started
from ppl_vae.cli.main import app, main
from ppl_vae.interop.arviz import read_netcdf
from ppl_vae.report.archive import read_results

FAST = ["--stages", "closed-form,px-em,variational-em"]
COMMAND = [sys.executable, "-c", "from ppl_vae.cli.main import main; main()", "lineage"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
DATA = Path(os.environ.get("PPL_VAE_DATA", "."))
NEEDS_DATA = pytest.mark.skipif("PPL_VAE_DATA" not in os.environ, reason="PPL_VAE_DATA is not set")


def run(*arguments):
    return CliRunner().invoke(app, ["lineage", *map(str, arguments)])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    x = oracles.simulate_ppca((16, 8), 1, 60, 6, seed=0)
    x[:, 4] = 2.5
    path = tmp_path_factory.mktemp("table") / "mine.csv"
    lines = ["wool,silk,flax,hemp,jute,kind"]
    lines += [",".join([*map(repr, row[:5].tolist()), "ab"[k % 2]]) for k, row in enumerate(x)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(table):
    """What the command showed, and the folder it has written."""
    folder = table.parent / "out"
    return run(table, "--latent-dim", 2, "--out", folder, *FAST), folder


def test_a_table_of_ones_own(finished):
    shown, _ = finished
    assert shown.exit_code == 0, shown.output
    assert "mine.csv: 60 rows, 5 columns; K = 2, seed 0" in shown.output
    lines = shown.output.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("stage"))
    for title in ("ELBO", "log p", "appr.", "amort.", "held out", "sigma", "angle", "steps"):
        assert title in lines[start]
    stages = [line.split()[0] for line in lines[start + 1 : start + 4]]
    assert stages == ["closed-form", "px-em", "variational-em"]
    assert "…" not in shown.output and "━" not in shown.output
    assert "constant columns: jute" in shown.output and "kind" in shown.output
    assert "PPCA's exact optimum is attained by closed-form, px-em and" in shown.output


def test_what_is_written(finished):
    shown, folder = finished
    found, report_data = read_results(folder)
    assert found.about["data"] == "mine.csv" and found.about["latent_dim"] == 2
    assert found.about["columns"] == ["wool", "silk", "flax", "hemp", "jute"]
    assert len(found.rows) == 3 and found.finished
    assert report_data.spectrum.latent_dim == 2
    page = (folder / "report.html").read_text()
    assert "mine.csv: 60 rows" in page and "jute" in page
    draws = read_netcdf(folder / "lineage.nc")
    assert draws["posterior_predictive"]["px-em"].column.values.tolist() == found.about["columns"]
    figures = list((folder / "figures").glob("*.png"))
    assert len(figures) >= 7
    for figure in figures:
        assert min(matplotlib.image.imread(figure).shape[:2]) > 200
    for file in ("results.json", "report.html", "figures", "lineage.nc"):
        assert f"wrote {folder / file}" in shown.output
    assert sorted(p.name for p in folder.iterdir()) == [
        *("figures", "lineage.nc", "report.html", "results.json")
    ]


@pytest.mark.slow
def test_json_is_all_that_is_printed(table, tmp_path):
    command = [*COMMAND, table, "--json", "--latent-dim", "2", "--out", tmp_path / "out", *FAST]
    shown = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout) == json.loads((tmp_path / "out" / "results.json").read_text())
    lines = shown.stderr.splitlines()
    assert lines[0] == "stage 1 of 3, closed-form" and "stage 3 of 3, variational-em" in lines
    assert len(lines) <= 6


def test_what_cannot_be_found_can_be_given(tmp_path):
    path = tmp_path / "odd.txt"
    x = oracles.simulate_ppca((16, 8), 1, 60, 4, seed=0)
    rows = ["1;2;3;4;5"]
    rows += [";".join([*map(repr, row.tolist()), str(k % 3)]) for k, row in enumerate(x)]
    path.write_text("\n".join(rows))
    options = ("--header", "--delimiter", ";", "--label", "5", "--image-shape", "2x2", *FAST)
    shown = run(path, *options, "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    assert "odd.txt: 60 rows, 4 columns; K = 2" in shown.output
    found, report_data = read_results(tmp_path / "out")
    assert found.about["columns"] == ["1", "2", "3", "4"]
    assert report_data.reconstructions.image_shape == (2, 2)


@pytest.mark.slow
def test_numpy_tables_and_the_default_latent_dim(tmp_path):
    np.save(tmp_path / "x.npy", oracles.simulate_ppca((16, 8), 1, 60, 6, seed=0))
    shown = run(tmp_path / "x.npy", "--out", tmp_path / "out", "--seed", 5, *FAST)
    assert "K = 3, seed 5" in shown.output
    np.save(tmp_path / "short.npy", np.random.default_rng(0).normal(size=(12, 30)))
    shown = run(tmp_path / "short.npy", "--out", tmp_path / "out", *FAST)
    assert shown.exit_code == 0 and "12 rows, 30 columns; K = 4" in shown.output


@pytest.mark.slow
def test_digits_are_the_default(tmp_path):
    shown = run("--out", tmp_path, *FAST)
    assert shown.exit_code == 0
    assert "digits / 16: 1797 rows, 64 columns; K = 10" in shown.output
    assert "constant columns: r0c0, r4c0, r4c7" in shown.output
    assert read_results(tmp_path)[1].samples.image_shape == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "error: there is no file none.csv"),
        (["--stages", "foo"], "error: stages must be one of"),
        (["--latent-dim", "64"], "error: latent_dim must be smaller than the rank"),
        (["--image-shape", "8"], "error: --image-shape must be HEIGHTxWIDTH, such as 28x28; got"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    errors = failing(arguments, 2, monkeypatch, capsys)
    assert errors.startswith(message)
    assert list(tmp_path.iterdir()) == []


def failing(arguments, status, monkeypatch, capsys):
    """What the command writes to standard error, one line, when it fails."""
    monkeypatch.setattr("sys.argv", ["ppl-vae", "lineage", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    errors = capsys.readouterr().err
    assert stopped.value.code == status and len(errors.splitlines()) == 1
    return errors


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--out", tmp_path / "file" / "out", *FAST]
    assert failing(arguments, 1, monkeypatch, capsys).startswith("error: ")


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_finished_with_a_message(table, tmp_path):
    process = started(
        [*COMMAND, table, "--latent-dim", "2", "--out", tmp_path / "out"], ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "results.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # in the middle of a stage, or after it: both must do
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    found, report_data = read_results(tmp_path / "out")
    finished = len(found.rows)
    number = len(found.about["stages"])
    assert 1 <= finished < number and not found.finished and report_data is None
    assert [row.stage for row in found.rows] == found.about["stages"][:finished]
    message = f"interrupted: {finished} of {number} stages are finished, saved in"
    *stages, last = errors.splitlines()
    assert last.startswith(message) and len(stages) in (finished, finished + 1)
    assert all(re.match(r"stage \d+ of \d+, [\w-]+$", line) for line in stages)
    assert found.rows[-1].stage in output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["results.json"]


@pytest.mark.slow  # the bar itself is tested without a terminal
def test_a_terminal_shows_the_progress_of_a_stage(table, tmp_path):
    ours, theirs = pty.openpty()
    command = [*COMMAND, table, "--latent-dim", "2", "--out", tmp_path / "out"]
    command += ["--stages", "px-em,exact-svi"]
    environment = ENVIRONMENT | {"COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:
                break
            if not part:
                break
            shown += part
    os.close(ours)
    text = shown.decode()
    assert process.returncode == 0, text
    assert "stage 2 of 2, exact-svi: fitting" in text
    assert "left" in text and "%" in text and "━" in text
    assert "stage 2 of 2, exact-svi: evaluating" in text


def test_help_lists_what_there_is():
    shown = CliRunner().invoke(app, ["lineage", "--help"])
    for option in (
        *("--latent-dim", "--stages", "--out", "--seed", "--label", "--delimiter", "--no-header"),
        *("--missing", "--image-shape", "--json"),
    ):
        assert option in shown.output
    assert "ppl-vae lineage mine.csv --latent-dim 3 --out results\n" in shown.output
    assert "130 interrupted" in " ".join(shown.output.split())
    assert "lineage" in CliRunner().invoke(app, ["--help"]).output


@pytest.mark.data
@NEEDS_DATA
@pytest.mark.parametrize(
    ("file", "says", "names"),
    [
        (
            "Tobamovirus/tobamovirus.csv",
            "tobamovirus.csv: 38 rows, 18 columns; K = 9",
            "closed-form,em,px-em,variational-em",
        ),
        # EM takes ten times as many steps as PX-EM here.
        (
            "pcaMethods/metaboliteDataComplete.csv",
            "154 rows, 52 columns; K = 10",
            "closed-form,px-em",
        ),
    ],
    ids=["tobamovirus", "metabolites"],
)
def test_real_tables_as_they_are(file, says, names, tmp_path):
    shown = run(DATA / file, "--out", tmp_path, "--stages", names)
    assert shown.exit_code == 0, shown.output
    assert says in shown.output
    found, _ = read_results(tmp_path)
    values = [row.log_p.value for row in found.rows]
    assert max(values) - min(values) < 1e-5


@pytest.mark.slow
@pytest.mark.data
@NEEDS_DATA
@pytest.mark.parametrize(
    "file",
    [
        "Tobamovirus/tobamovirus.csv",
        "pcaMethods/metaboliteDataComplete.csv",
        "pcaMethods/metaboliteData.csv",
    ],
)
def test_the_whole_lineage_on_real_tables(file, tmp_path):
    shown = run(DATA / file, "--out", tmp_path)
    print(shown.output)
    assert shown.exit_code == 0
    found, report_data = read_results(tmp_path)
    assert found.finished and report_data.left_out == ()
