"""Commands whose output cannot be written: one line, the exit status, and the old output."""

import importlib
import os
import pkgutil
import resource
import shutil
import sys

import numpy as np
import pytest

import ppl_vae.cli
from killed import NO_MOUNT, completed, on_small_disk
from ppl_vae.cli.main import main
from ppl_vae.data.files.tables import Table
from ppl_vae.fitted.fit import fit_table
from ppl_vae.fitted.folder import save_fitted
from ppl_vae.fitted.settings import FitSettings


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a table and two models; what the commands import is imported."""
    for module in pkgutil.iter_modules(ppl_vae.cli.__path__, "ppl_vae.cli."):
        importlib.import_module(module.name)
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 4)) + 0.3 * rng.normal(size=(40, 4))
    np.savetxt(folder / "x.csv", x, delimiter=",", header="a,b,c,d", comments="")
    for name, latent_dim in (("m", 1), ("other", 2)):
        fitted = fit_table(Table("x.csv", x, tuple("abcd")), FitSettings(latent_dim=latent_dim))
        save_fitted(fitted, folder / name)
    return folder


FAST = ("--num-samples", "20", "--refine", "0")
VERBS = {
    "fit": ("model", ("fit", "x.csv", "--latent-dim", "2")),
    "score": ("out.csv", ("score", "m", "x.csv")),
    "transform": ("out.csv", ("transform", "m", "x.csv")),
    "reconstruct": ("out.csv", ("reconstruct", "m", "x.csv")),
    "sample": ("out.csv", ("sample", "m", "-n", "200")),
    "impute": ("out.csv", ("impute", "m", "x.csv")),
    "evaluate": ("out.json", ("evaluate", "m", "x.csv", *FAST, "--rows", "4", "--annealed", "0")),
    "compare": ("out.csv", ("compare", "m", "other", "x.csv")),
    "report": ("out.html", ("report", "m")),
    "lineage": ("results", ("lineage", "x.csv", "--latent-dim", "1", "--stages", "closed-form")),
}
"""For each command its output, and its arguments but for ``--out``."""
TABLES = ("score", "transform", "reconstruct", "sample", "impute")


def run(given, verb, *more, stdout=None, stderr=None, before=lambda: None):
    """Run a command in a child process; its exit status and the lines of its errors."""
    ours, theirs = os.pipe()
    quiet = ["--quiet"] if stderr is None else []

    def work():
        os.dup2(os.open(os.devnull, os.O_WRONLY) if stdout is None else stdout, 1)
        os.dup2(theirs if stderr is None else stderr, 2)
        sys.stdout, sys.stderr = (os.fdopen(k, "w", closefd=False) for k in (1, 2))
        os.chdir(given)
        sys.argv = ["ppl-vae", *VERBS[verb][1], *quiet, *map(str, more)]
        before()
        try:
            main()
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)

    status = completed(work)
    os.close(theirs)
    with os.fdopen(ours) as file:
        return status, file.read().splitlines()


def contents(path):
    """The bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.read_bytes()
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def written(given, verb):
    """The output of a command that has been run once."""
    out = given / VERBS[verb][0]
    if out.is_dir():
        shutil.rmtree(out)
    status, errors = run(given, verb, "--out", out)
    assert (status, errors) == (0, [])
    return out


SOME = ("fit", "score")
EVERY_VERB = pytest.mark.parametrize(
    "verb",
    [verb if verb in SOME else pytest.param(verb, marks=pytest.mark.slow) for verb in VERBS],
)


@EVERY_VERB
def test_a_file_that_cannot_grow_leaves_the_old_output(verb, given):
    out = written(given, verb)
    old = contents(out)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))

    status, errors = run(given, verb, "--out", out, before=limit)
    assert status == 1 and len(errors) == 1, errors
    assert errors[0].startswith("error: ") and "File too large" in errors[0]
    found = contents(out)
    if verb == "fit":  # the options of the fit that was not finished may be there
        found = {path: found[path] for path in old}
    assert found == old


@EVERY_VERB
def test_a_full_disk_leaves_the_old_output(verb, given, tmp_path):
    out = written(given, verb)
    old, on_disk = contents(out), tmp_path / out.name

    def work():
        (shutil.copytree if out.is_dir() else shutil.copy)(out, on_disk)
        with pytest.raises(OSError), (tmp_path / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(512)):
                pass
        status, lines = run(given, verb, "--out", on_disk)
        assert status == 1 and len(lines) == 1 and "No space left" in lines[0], lines
        assert contents(on_disk) == old

    status = on_small_disk(tmp_path, 2**21, work)
    if status == NO_MOUNT:
        pytest.skip("no file system can be mounted here")
    assert status == 0


@EVERY_VERB
def test_a_place_that_cannot_be_written_is_found_before_the_work(verb, given):
    name = VERBS[verb][0]
    for place in ("/proc/nothing", "x.csv/inside", "nowhere"):
        status, errors = run(given, verb, "--out", f"{place}/{name}")
        assert len(errors) <= 1
        if place == "nowhere" and verb in ("fit", "lineage"):
            assert status == 0  # folders are made
            shutil.rmtree(given / "nowhere")
            continue
        assert status in (1, 2) and errors[0].startswith("error: "), errors
        assert place.split("/")[-1] in errors[0] or name in errors[0]


@pytest.mark.parametrize(
    "verb", ["score", *(pytest.param(verb, marks=pytest.mark.slow) for verb in TABLES[1:])]
)
def test_standard_output_that_is_full_or_closed_is_one_line(verb, given):
    ours, theirs = os.pipe()
    os.close(ours)
    cases = ((os.open("/dev/full", os.O_WRONLY), "No space left on device"), (theirs, "closed it"))
    for stdout, reason in cases:
        for more in (("--out", "-"), ("--out", "-", "--json")):
            status, errors = run(given, verb, *more, stdout=stdout)
            assert status == 1 and len(errors) == 1, errors
            assert (
                errors[0].startswith("error: standard output is incomplete")
                and reason in errors[0]
            )
        os.close(stdout)


@pytest.mark.slow
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in TABLES])
def test_findings_that_cannot_be_printed_are_written_all_the_same(verb, given):
    out = written(given, verb)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    full = os.open("/dev/full", os.O_WRONLY)
    status, errors = run(given, verb, "--out", out, stdout=full)
    os.close(full)
    printing = verb != "report"
    assert status == int(printing) and len(errors) == int(printing), errors
    assert out.exists()


@EVERY_VERB
def test_progress_that_cannot_be_printed_does_not_end_the_work(verb, given):
    out = written(given, verb)
    expected = contents(out)
    ours, closed = os.pipe()
    os.close(ours)
    for stderr in (closed, os.open("/dev/full", os.O_WRONLY)):
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        status, _ = run(given, verb, "--out", out, stderr=stderr)
        os.close(stderr)
        assert status == 0
        if out.is_dir():
            assert contents(out).keys() == expected.keys()
        else:
            assert contents(out) == expected or verb not in TABLES
