"""Progress: a bar on a terminal, one line per stage elsewhere, nothing with --quiet."""

import io
import os
import pty
import re
import sys
import threading

import numpy as np
import pandas as pd
import pytest

import ppl_vae
from ppl_vae.cli.main import app

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
    reading, writing = pty.openpty() if terminal else os.pipe()
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
        app([*map(str, arguments)], standalone_mode=False)
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
