"""Progress: a bar on a terminal, one line per stage elsewhere, nothing with --quiet."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
import time

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import ppl_vae
from ppl_vae.cli.console import StageDisplay, Verbosity, log_imports
from ppl_vae.cli.main import app
from ppl_vae.report.terminal import Display

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a table and two saved models."""
    found = tmp_path_factory.mktemp("progress")
    x = np.random.default_rng(0).normal(size=(30, 3))
    frame = pd.DataFrame(x, columns=["a", "b", "c"])
    frame.mask(x > 1.5).to_csv(found / "t.csv", index=False)
    for name, latent_dim in (("m", 1), ("n", 2)):
        ppl_vae.save(ppl_vae.PPCA.like(frame, latent_dim, seed=0), found / name)
    return found


def standard_error(arguments, *, terminal):
    """What a command writes to standard error, which is a terminal or a pipe."""
    return written(lambda: app([*map(str, arguments)], standalone_mode=False), terminal=terminal)


def written(function, *, terminal, columns=80):
    """What a function writes to standard error."""
    reading, writing = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    pieces = []

    def read():
        try:
            while piece := os.read(reading, 65536):
                pieces.append(piece)
        except OSError:  # a terminal whose other end was closed
            pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(writing, "w", buffering=1) as stream:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
        patch.setenv("COLUMNS", str(columns))
        function()
    thread.join(10)
    os.close(reading)
    return b"".join(pieces).decode()


def verbs(place):
    model, table = place / "m", place / "t.csv"
    settings = ["--latent-dim", 1]
    return {
        "fitting ppca": ["fit", table, "--out", place / "f", *settings],
        "computing log p": ["score", model, table, "--out", place / "s.csv"],
        "computing the codes": ["transform", model, table, "--out", place / "z.csv"],
        "reconstructing": ["reconstruct", model, table, "--out", place / "r.csv"],
        "drawing 100 rows": ["sample", model, "--out", place / "x.csv"],
        "imputing by": ["impute", model, table, "--out", place / "f.csv"],
        "computing the gaps": ["evaluate", model, table, "--out", place / "e.json"],
        "under n": ["compare", model, place / "n", table],
    }


STAGES = [
    *("fitting ppca", "computing log p", "computing the codes", "reconstructing"),
    *("drawing 100 rows", "imputing by", "computing the gaps", "under n"),
]


@pytest.mark.parametrize("stage", STAGES)
def test_every_verb_shows_its_stages(stage, place):
    arguments = verbs(place)[stage]
    shown = CODES.sub("", standard_error(arguments, terminal=True))
    assert stage in shown and "━" in shown and re.search(r"\d:\d\d:\d\d", shown)
    piped = standard_error(arguments, terminal=False)
    assert "\x1b" not in piped and "━" not in piped
    assert sum(stage in line for line in piped.splitlines()) == 1
    assert standard_error([*arguments, "--quiet"], terminal=False) == ""


def test_stages_of_an_imputation(place):
    options = ["--latent-dim", 1, "--no-parameter-uncertainty", "--out", place / "g.csv"]
    lines = standard_error(["impute", place / "t.csv", *options], terminal=False).splitlines()
    assert lines[0].startswith("selecting the model on masked entries of ")
    assert "imputing" in lines


def test_the_reading_of_a_large_file_is_a_stage(place, monkeypatch):
    monkeypatch.setattr("ppl_vae.cli.reading.LARGE_FILE", 10)
    found = standard_error(["score", place / "m", place / "t.csv"], terminal=False)
    assert f"reading {place / 't.csv'}" in found.splitlines()


@pytest.mark.parametrize("columns", [40, 100])
def test_a_bar_fits_the_terminal_and_states_the_time_left(columns):
    def stage():
        with Verbosity().logging(), StageDisplay().live() as display:
            display.begin("fitting a model", 100)
            for step in (20, 40, 60):
                display.update(step, -1234.5678)
                time.sleep(0.11)  # between two refreshes

    shown = CODES.sub("", written(stage, terminal=True, columns=columns))
    bars = [line for line in re.split(r"[\r\n]+", shown) if "━" in line]
    assert bars and all(len(line.rstrip()) <= columns for line in bars)
    assert any(re.search(r"\d:\d\d:\d\d left +-1234.568", line) for line in bars)
    assert ("nats per datum" in "".join(bars)) == (columns == 100)


def test_a_terminal_shows_that_torch_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")

    def begin():
        with Verbosity().logging():
            log_imports()

    assert written(begin, terminal=True).split() == ["importing", "torch"]
    assert written(begin, terminal=False) == ""
    monkeypatch.undo()
    assert written(begin, terminal=True) == ""


@pytest.mark.parametrize("columns", [40, 100])
def test_the_progress_of_a_lineage_fits_the_terminal(columns):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=columns)
    display = Display(console, ["closed-form", "linear-amortized"])
    with display.live(table=False):
        display.update("linear-amortized", "fitting by SVI", 50, 100)
    lines = re.split(r"[\r\n]+", CODES.sub("", text.getvalue()))
    assert all(len(line) <= columns for line in lines)
    assert "stage 2 of 2, linear-amortized: " in text.getvalue()
    assert any(re.search("━ 50 %", line) for line in lines)
