"""Commands whose process is killed leave each file as it was, or whole and new."""

import importlib
import itertools
import os
import pkgutil
import random
import sys

import numpy as np
import pytest
import xarray

import ppl_vae.cli
from killed import completed, killed_after, killed_at_event
from ppl_vae.cli.main import main
from ppl_vae.report.archive import read_results


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Every module of the command, once for all child processes."""
    for module in pkgutil.iter_modules(ppl_vae.cli.__path__, "ppl_vae.cli."):
        importlib.import_module(module.name)
    importlib.import_module("ppl_vae.report.imputation")


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
            if error.code:
                raise

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


@pytest.mark.slow
def test_a_killed_lineage_leaves_whole_files(table, tmp_path):
    out, rng = tmp_path / "out", random.Random(0)
    given = ("--latent-dim", 1, "--stages", "px-em,linear-amortized", "--out", out)
    work = command("lineage", table, *given)
    assert completed(work) == 0
    expected = {path.relative_to(out) for path in out.rglob("*")}
    for _ in range(8):
        killed_at_event(work, rng.randrange(1, 40))
        assert_files_are_whole(out)
    for _ in range(8):
        killed_after(work, rng.uniform(0.0, 10.0))
        assert_files_are_whole(out)
    assert completed(work) == 0
    assert_files_are_whole(out)
    assert {path.relative_to(out) for path in out.rglob("*")} == expected
