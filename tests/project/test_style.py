"""Style: ruff, types (slow), short functions and files."""

import ast
import sys

import pytest

from files import FILES, functions, module_name, run


def body_length(function):
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_files_and_functions_are_short():
    lengths = {module_name(p): len(p.read_text().splitlines()) for p in FILES}
    assert {name: n for name, n in lengths.items() if n > 350} == {}
    long = {f"{module_name(p)}.{f.name}": body_length(f) for p in FILES for f in functions(p)}
    assert {name: n for name, n in long.items() if n > 40} == {}
    assert sorted(long.values())[len(long) // 2] <= 6


def test_ruff():
    for command in (("check", "."), ("format", "--check", ".")):
        found = run("-m", "ruff", *command)
        assert found.returncode == 0, found.stdout


@pytest.mark.slow
def test_types():
    found = run("-m", "basedpyright", "--level", "error", "--pythonpath", sys.executable)
    assert found.returncode == 0, found.stdout
    assert "0 errors" in found.stdout


def test_every_exception_is_called_an_error():
    names = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                if any(base.endswith(("Error", "Exception")) for base in bases):
                    names[node.name] = path
    assert names and all(name.endswith("Error") for name in names)


def test_plots_are_called_plots():
    for path in FILES:
        if path.parent.name == "plots":
            public = [f.name for f in functions(path) if not f.name.startswith("_")]
            drawn = [name for name in public if name.startswith("plot_")]
            assert drawn or path.name in ("__init__.py", "axes.py"), path
