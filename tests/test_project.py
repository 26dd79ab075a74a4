"""The house itself: layers, size of rooms, nothing at import, style, README and examples."""

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ppl_vae

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "ppl_vae").rglob("*.py"))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# Imports run from right to left only.
LAYERS = (
    (
        "arguments",
        "files",
        "handlers",
    ),
    ("program", "blocks"),
    ("state", "results"),
    (
        "automatic",
        "traces",
        "families",
        "guides",
        "models.networks",
        "models.patches",
        "models.transformers",
        "models.columns",
        "models.spectra",
        "models.moments",
        "models.linear_gaussian",
        "models.axes",
        "models.identifiability",
        "models.exact",
        "models.densities",
        "models.observation",
        "models.gaussian",
        "models.likelihoods",
        "models.standardization",
        "models.codes",
        "models.corruption",
        "models.decoded",
    ),
    (
        "models.ppca",
        "models.vae",
        "models.autoencoder",
        "models.supervised",
        "divergences",
        "data",
        "images",
        "sheets",
        "tables",
        "image_grid",
        "texts",
    ),
    ("topics",),
    ("gradients",),
    ("objectives", "storage"),
    ("inference.",),
    ("evaluation.",),
    ("task", "stages", "sparse_rungs"),
    ("measured", "sparse_measured"),
    ("lineage", "fitted_pair", "plot_sparse_lineage"),
    ("interop.", "report_data"),
    ("report.",),
    ("cli",),
)


def module_name(path):
    parts = path.relative_to(ROOT / "ppl_vae").with_suffix("").parts
    return ".".join(parts)


def layer(name):
    for number, names in enumerate(LAYERS):
        if any(name == n or (n.endswith(".") and name.startswith(n)) for n in names):
            return number
    raise AssertionError(f"{name} stands in no layer")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ppl_vae."):
            name = node.module.removeprefix("ppl_vae.")
            package = (ROOT / "ppl_vae" / name).is_dir()
            yield from (f"{name}.{alias.name}" for alias in node.names) if package else (name,)


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def body_length(function):
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


ROOMS = [path for path in FILES if path.name != "__init__.py"]


@pytest.mark.parametrize("path", ROOMS, ids=module_name)
def test_imports_run_one_way(path):
    mine = layer(module_name(path))
    assert all(layer(name) <= mine for name in imported(path))


def test_imports_have_no_cycle():
    graph = {module_name(path): set(imported(path)) for path in ROOMS}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= graph.keys()


def test_subpackages_hold_a_docstring_and_no_reexports():
    inits = [p for p in FILES if p.name == "__init__.py" and p.parent.name != "ppl_vae"]
    assert len(inits) == 5
    for path in inits:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) and len(tree.body) == 1


def test_rooms_are_small():
    lengths = {module_name(p): len(p.read_text().splitlines()) for p in FILES}
    assert {name: n for name, n in lengths.items() if n > 350} == {}
    long = {f"{module_name(p)}.{f.name}": body_length(f) for p in FILES for f in functions(p)}
    assert {name: n for name, n in long.items() if n > 40} == {}
    assert sorted(long.values())[len(long) // 2] <= 6


def test_public_names_are_there():
    assert len(set(ppl_vae.__all__)) == len(ppl_vae.__all__)
    assert all(getattr(ppl_vae, name).__doc__ for name in ppl_vae.__all__)


def test_import_changes_nothing():
    script = """
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
import ppl_vae, ppl_vae.cli.main
assert world() == before
print("unchanged")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "unchanged", run.stderr


def test_ruff():
    for command in (("check", "."), ("format", "--check", ".")):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout


def test_pyright():
    run = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--level", "error", "--pythonpath", sys.executable],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert "0 errors" in run.stdout


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"))
def test_readme_blocks_run(block, tmp_path):
    if "arviz" in block:
        # Whoever is the first to import ArviZ 0.x on a day is told of 1.x.
        subprocess.run([sys.executable, "-c", "import arviz"], capture_output=True, check=True)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | ONE_THREAD,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_readme_commands_name_what_there_is():
    commands = "\n".join(blocks("sh"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "pip install -e . && .venv/bin/ppl-vae lineage" in commands
    assert "pip install -e '.[test]' && .venv/bin/pytest" in commands
    assert project["scripts"] == {"ppl-vae": "ppl_vae.cli.main:main"}
    assert "test" in project["optional-dependencies"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
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
