"""Commands whose process is killed leave each file as it was, or whole and new."""

import importlib
import itertools
import json
import os
import pkgutil
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
from typer.testing import CliRunner

import ppl_vae.cli
from killed import completed, killed_after, killed_at_event
from ppl_vae.cli.console import guarded_output, interrupting_signals
from ppl_vae.cli.main import _run_guarded, app, main
from ppl_vae.fitted.folder import load_fitted
from ppl_vae.report.archive import read_results


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Every module of the command, once for all child processes."""
    for module in pkgutil.iter_modules(ppl_vae.cli.__path__, "ppl_vae.cli."):
        importlib.import_module(module.name)
    importlib.import_module("ppl_vae.fitted.filled_table")


def command(*arguments):
    """A callable that runs a command in this process, without output."""

    def work():
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        sys.argv = ["ppl-vae", *map(str, arguments)]
        try:
            main()
        except SystemExit as error:
            os._exit(error.code)

    return work


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((30, 2)) @ rng.standard_normal((2, 4))
    values += 0.3 * rng.standard_normal(values.shape)
    values[3, 1] = values[8, 2] = np.nan
    path = tmp_path / "table.csv"
    lines = [",".join("" if np.isnan(v) else f"{v:.3f}" for v in row) for row in values]
    path.write_text("\n".join(["a,b,c,d", *lines]) + "\n")
    return path


def imputation(table, out, latent_dim):
    given = ("--latent-dim", latent_dim, "--noise", "isotropic", "--no-parameter-uncertainty")
    return command("impute", table, "--out", out, *given)


def test_a_killed_imputation_leaves_the_old_table_or_the_new(table, tmp_path):
    folder = tmp_path / "filled"
    folder.mkdir()
    files, texts = [folder / name for name in ("old.csv", "new.csv", "out.csv")], []
    for file, latent_dim in zip(files[:2], (1, 2), strict=True):
        assert completed(imputation(table, file, latent_dim)) == 0
        texts.append(file.read_bytes())
        file.unlink()
    assert texts[0] != texts[1]
    out, found = files[2], []
    for number in itertools.count(1):
        out.write_bytes(texts[0])
        killed = killed_at_event(imputation(table, out, 2), number)
        assert out.read_bytes() in texts
        found.append(out.read_bytes() == texts[1])
        if not killed:
            break
    assert found[-1] and found.count(False) > 2
    assert [path.name for path in folder.iterdir()] == ["out.csv"]


def assert_files_are_whole(folder):
    """Each file is complete; files that are being written have names of their own."""
    for path in folder.rglob("*"):
        if path.name.endswith(".partial") or path.is_dir():
            continue
        data = path.read_bytes()
        if path.name == "results.json":
            read_results(path)
        elif path.suffix == ".html":
            assert data.rstrip().endswith(b"</html>")
        elif path.suffix == ".png":
            assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
        else:
            assert path.suffix == ".nc"
            xarray.open_datatree(path, engine="h5netcdf").close()


def lineage(table, out, latent_dim):
    given = ("--latent-dim", latent_dim, "--stages", "closed-form,linear-amortized")
    return command("lineage", table, *given, "--out", out)


def contents(folder):
    """The files of a folder but those that are being written."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".partial")
    }


def assert_results_are_of_one_run(folder, old):
    """The files are those of the old run, or they are of the new one, which writes the data of
    the figures last."""
    assert_files_are_whole(folder)
    found, results = contents(folder), Path("results.json")
    if found[results] == old[results]:
        assert found.items() <= old.items()
        return
    assert not found.items() & old.items()
    lineage, report_data = read_results(folder)
    assert lineage.about["latent_dim"] == 2
    if report_data is not None:
        assert lineage.finished and {Path("report.html"), Path("lineage.nc")} < found.keys()


@pytest.fixture(scope="module")
def complete_table(tmp_path_factory):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((60, 2)) @ rng.standard_normal((2, 5))
    values += 0.3 * rng.standard_normal(values.shape)
    path = tmp_path_factory.mktemp("table") / "table.csv"
    np.savetxt(path, values, delimiter=",", header="a,b,c,d,e", comments="", fmt="%.3f")
    return path


@pytest.fixture(scope="module")
def old_lineage(complete_table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lineage") / "out"
    assert completed(lineage(complete_table, folder, 1)) == 0
    return folder


@pytest.mark.slow
def test_a_lineage_that_is_killed_leaves_files_of_one_run(complete_table, old_lineage, tmp_path):
    """At operations on files, each of which comes before or after the replacement of others."""
    old, out = contents(old_lineage), tmp_path / "out"
    work, number, changed = lineage(complete_table, out, 2), 1, 0
    while True:
        shutil.copytree(old_lineage, out)
        killed = killed_at_event(work, number)
        assert_results_are_of_one_run(out, old)
        changed += contents(out) != old
        shutil.rmtree(out)
        if not killed:
            break
        number += 1 if number < 12 else 5
    assert 4 < changed < number


# Signals at every moment of the functions around a command


def at_step(number, signal_number):
    """Run ``--version`` with a signal at a bytecode of the functions around the command.

    Returns:
        The exit status, and whether there are that many bytecodes.
    """
    around = {main, interrupting_signals.__wrapped__, guarded_output.__wrapped__, _run_guarded}
    codes = {function.__code__ for function in around}
    reader, writer = os.pipe()

    def traced():
        remaining = number

        def trace(frame, event, argument):
            nonlocal remaining
            if frame.f_code not in codes:
                return None
            frame.f_trace_opcodes = True
            remaining -= event == "opcode"
            if event == "opcode" and remaining == 0:
                os.write(writer, b"x")
                signal.raise_signal(signal_number)
            return trace

        sys.settrace(trace)
        command("--version")()

    status = completed(traced)
    os.close(writer)
    reached = os.read(reader, 1) == b"x"
    os.close(reader)
    return status, reached


@pytest.mark.parametrize(
    ("number", "stride"),
    [
        (signal.SIGTERM, 19),
        (signal.SIGINT, 41),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
    ],
)
def test_no_moment_without_a_handler(number, stride):
    """A command that a signal ends has the exit status of that signal, whenever it arrives."""
    expected, found = {signal.SIGTERM: 143, signal.SIGINT: 130}[number], Counter()
    for step in itertools.count(1, stride):
        status, reached = at_step(step, number)
        assert status in (0, expected, -number), (step, status)
        found[status] += 1
        if not reached:
            break
    assert found[expected] > 2 and status == 0


# Signals at random moments


class Counted:
    """Processes that are sent a signal at a random moment.

    Attributes:
        sent: the number of signals by name.
        ended: of these, those that ended their process.
    """

    def __init__(self, seed):
        self.rng, self.sent, self.ended = random.Random(seed), Counter(), Counter()

    def interrupt(self, work, seconds):
        """Send one of the signals within this time; returns whether it ended the process."""
        number = self.rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        status = killed_after(work, self.rng.uniform(0.0, seconds), number)
        # A process that is not yet prepared for a signal is ended by it.
        regular = {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
        assert status in (0, regular, -number), (number.name, status)
        self.sent[number.name] += 1
        self.ended[number.name] += status != 0
        return status != 0

    def __str__(self):
        total, ended = self.sent.total(), self.ended.total()
        return f"{total} signals {dict(self.sent)}, {ended} ended a process {dict(self.ended)}"


@pytest.fixture
def counted(request):
    found = Counted(seed=0)
    yield found
    print(f"\n{request.node.name}: {found}")


def timed(work):
    start = time.perf_counter()
    assert completed(work) == 0
    return time.perf_counter() - start


def model_bytes(folder):
    """What two equal fits have in common: the parameters, and the metadata without its times."""
    metadata = json.loads((folder / "fit.json").read_text())
    for name in ("checksum", "date", "history", "notes"):
        del record[name]
    history = load_fitted(folder).metadata.history
    program = (folder / "model.safetensors").read_bytes()
    validation = () if history.validation is None else history.validation.tolist()
    return program, metadata, history.objective.tolist(), validation


FITS = {
    "vae": ("--model", "vae", "--latent-dim", 2, "--hidden", 8, "--epochs", 300),
    "compiled": (
        *("--model", "vae", "--latent-dim", 2, "--hidden", 8, "--epochs", 3000),
        *("--patience", 5000, "--compile"),
    ),
    "em": ("--model", "factor-analysis", "--latent-dim", 2),
    "bayesian": ("--model", "bayesian-ppca", "--latent-dim", 2),
}


@pytest.fixture(scope="module")
def used(complete_table, tmp_path_factory):
    """What a fit imports when it is first run is imported."""
    given = ("--model", "vae", "--latent-dim", "1", "--epochs", "2")
    out = str(tmp_path_factory.mktemp("first") / "m")
    found = CliRunner().invoke(app, ["fit", str(complete_table), *given, "--out", out])
    assert found.exit_code == 0, found.output


@pytest.mark.slow
@pytest.mark.usefixtures("used")
@pytest.mark.parametrize(
    ("name", "number"), [("vae", 36), ("compiled", 8), ("em", 12), ("bayesian", 12)]
)
def test_a_fit_with_signals_at_random_moments(name, number, complete_table, tmp_path, counted):
    """The old model stays until the new one is whole, and resuming ends in the same fit."""
    out, given = tmp_path / "m", FITS[name]
    old, whole = (
        command("fit", complete_table, "--out", tmp_path / part, *settings)
        for part, settings in (("old", FITS["em"][:2]), ("whole", given))
    )
    assert completed(old) == 0
    seconds = timed(whole)
    expected = model_bytes(tmp_path / "whole")
    finished = 0
    while counted.sent.total() < number:
        shutil.copytree(tmp_path / "old", out)
        arguments = (complete_table, *given)
        while counted.interrupt(command("fit", *arguments, "--out", out), 0.8 * seconds):
            found = model_bytes(out)
            assert found in (expected, model_bytes(tmp_path / "old"))
            if not (out / "unfinished.toml").exists() and found != expected:
                continue  # it was ended before it began
            arguments = ("--resume",)
            if counted.sent.total() >= number:
                assert completed(command("fit", *arguments, "--out", out)) == 0
                break
        assert model_bytes(out) == expected
        finished += 1
        shutil.rmtree(out)
    print(f"\n{finished} interrupted fits, each equal to the uninterrupted one")


@pytest.mark.slow
def test_an_imputation_with_signals_at_random_moments(table, tmp_path, counted):
    old, new, out = (tmp_path / f"{name}.csv" for name in ("old", "new", "out"))
    assert completed(imputation(table, old, 1)) == 0
    seconds = timed(imputation(table, new, 2))
    texts = old.read_bytes(), new.read_bytes()
    for _ in range(20):
        out.write_bytes(texts[0])
        ended = counted.interrupt(imputation(table, out, 2), seconds)
        assert out.read_bytes() in (texts if ended else texts[1:])


@pytest.mark.slow
def test_a_lineage_with_signals_at_random_moments(complete_table, old_lineage, tmp_path, counted):
    old, out = contents(old_lineage), tmp_path / "out"
    work = lineage(complete_table, out, 2)
    seconds = timed(work)
    for _ in range(16):
        shutil.rmtree(out)
        shutil.copytree(old_lineage, out)
        ended = counted.interrupt(work, seconds)
        assert_results_are_of_one_run(out, old)
        assert ended or read_results(out)[1] is not None


@pytest.mark.slow
def test_saves_with_signals_at_random_moments(tmp_path, counted):
    programs = [ppl_vae.PPCA(40, 5, seed=seed) for seed in (0, 1)]

    def work():
        for number in itertools.count(1):
            ppl_vae.save(programs[number % 2], tmp_path / "m")

    ppl_vae.save(programs[0], tmp_path / "m")
    for _ in range(20):
        assert counted.interrupt(work, 0.3)
        loadings = ppl_vae.load(tmp_path / "m").loadings
        assert any(torch.equal(loadings, program.loadings) for program in programs)
