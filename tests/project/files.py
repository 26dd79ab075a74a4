"""The files of the project, for the tests of this folder."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "ppl_vae").rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def module_name(path):
    parts = path.relative_to(ROOT / "ppl_vae").with_suffix("").parts
    return ".".join(parts)


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def run(*command, cwd=ROOT, **environment):
    """Run Python with these arguments, on one thread."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | ONE_THREAD | environment,
    )
