"""What is imported when: nothing at import, and each library when it is used."""

import json
import types

import pytest

import ppl_vae
from files import run

NO_STATE = """
import logging, random
import rich.console, rich.progress  # draws from Python's generator when it is imported
import numpy as np, torch, pyro, pyro.settings, matplotlib
from torch.distributions import Distribution
def world():
    return (torch.get_default_dtype(), torch.get_rng_state().tolist(), random.getstate(),
            np.random.get_state()[1].tolist(), Distribution._validate_args,
            len(pyro.get_param_store()),
            dict(pyro.settings.get()), list(logging.getLogger().handlers), torch.get_num_threads(),
            dict(matplotlib.rcParams))
before = world()
import ppl_vae, ppl_vae.cli.main, ppl_vae.cli.applying, ppl_vae.cli.fitting
for name in ppl_vae.__all__:
    getattr(ppl_vae, name)
assert world() == before
print("unchanged")
"""
HEAVY = (
    "pandas",
    "sklearn",
    "scipy.stats",
    "xarray",
    "arviz",
    "arviz_stats",
    "rich",
    "matplotlib",
)
BRIDGES = ("to_arviz", "PPCATransformer", "plots", "read_table")


def public(package):
    return [n for n in package.__all__ if isinstance(getattr(package, n), types.ModuleType)]


def test_import_changes_nothing():
    found = run("-c", NO_STATE)
    assert found.stdout.strip() == "unchanged", found.stderr


def test_public_names_are_about_fifty_and_documented():
    names = [n for n in ppl_vae.__all__ if n not in public(ppl_vae)]
    assert 40 <= len(names) <= 55 and len(set(names)) == len(names)
    assert all(getattr(ppl_vae, name).__doc__ for name in names)


@pytest.mark.parametrize("package", public(ppl_vae))
def test_public_names_of_folders_are_there(package):
    folder = getattr(ppl_vae, package)
    assert folder.__all__
    for name in folder.__all__:
        value = getattr(folder, name)
        assert value.__doc__ and not isinstance(value, types.ModuleType)


def test_libraries_are_imported_when_they_are_used():
    script = f"""
import json, sys
import torch, pyro
before = set(sys.modules)
import ppl_vae
for name in ppl_vae.__all__:
    if name not in {BRIDGES}:
        getattr(ppl_vae, name)
print(json.dumps([name for name in {HEAVY} if name in sys.modules and name not in before]))
"""
    found = run("-c", script)
    assert json.loads(found.stdout) == [], found.stderr


def test_the_command_line_starts_without_torch():
    for option in ("--help", "--version"):
        script = f"""
import sys
sys.argv = ["ppl-vae", "{option}"]
from ppl_vae.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules and "pyro" not in sys.modules
"""
        found = run("-c", script)
        assert found.returncode == 0, found.stderr
        assert found.stdout.strip()
    assert found.stdout.strip() == ppl_vae.__version__


FIRST_LINE = """
import sys
import typer
class FirstLine(Exception):
    pass
def stop(text):
    raise FirstLine(text)
typer.echo = stop
from ppl_vae.cli.lineage_run import write_lineage
from ppl_vae.cli.options import LineageFlags
from pathlib import Path
try:
    write_lineage(None, None, LineageFlags(), Path("."), as_json=False)
except FirstLine as first:
    assert "1797 rows, 64 columns" in str(first)
print(sorted({"matplotlib", "xarray", "arviz"} & sys.modules.keys()))
print([name for name in sys.modules if name.startswith(("ppl_vae.lineage.", "ppl_vae.models."))])
"""


@pytest.mark.slow
def test_the_lineage_prints_its_first_line_before_it_imports_models_and_plots():
    found = run("-c", FIRST_LINE)
    assert found.stdout.splitlines() == ["[]", "['ppl_vae.lineage.names']"], found.stderr


TIMES = """
import time
import torch, pyro
theirs = time.process_time()
import ppl_vae
print(time.process_time() / theirs)
"""


def test_import_costs_little_more_than_torch_and_pyro():
    # The lower of two: the first may write byte code.
    assert min(float(run("-c", TIMES).stdout) for _ in range(2)) < 1.2
