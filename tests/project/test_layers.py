"""Imports run one way: from folder to folder, and from module to module."""

import ast
import graphlib

import pytest
from files import FILES, MODULES, ROOT, module_name

# Each folder imports from itself and from those before it only.
LAYERS = (
    ("core",),
    ("networks", "capture", "data"),
    ("objectives",),
    ("guides",),
    ("likelihoods",),
    ("models",),
    ("inference",),
    ("evaluation",),
    ("lineage",),
    ("fitted", "interop", "plots"),
    ("report",),
    ("cli",),
)
EVALUATION = (
    ("local_guides",),
    ("marginal_likelihood",),
    ("inference_gaps", "prediction", "evidence"),
    ("latent_space", "calibration"),
)
TOP_LEVEL = {"__init__.py", "__init__.pyi", "__main__.py", "py.typed"}


def layer(folder, layers):
    found = [number for number, names in enumerate(layers) if folder in names]
    assert found, f"the folder {folder} has no layer"
    return found[0]


def order(imported, importing, layers):
    return layer(imported, layers), layer(importing, layers), imported == importing


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ppl_vae."):
            name = node.module.removeprefix("ppl_vae.")
            package = (ROOT / "ppl_vae" / name).is_dir()
            yield from (f"{name}.{alias.name}" for alias in node.names) if package else (name,)


INSIDE = [path for path in MODULES if path.parent.name != "ppl_vae"]


@pytest.mark.parametrize("path", INSIDE, ids=module_name)
def test_imports_run_one_way(path):
    mine = module_name(path).split(".")
    for other in (name.split(".") for name in imported(path)):
        if other[0] == mine[0] == "evaluation":
            low, high, same = order(other[1], mine[1], EVALUATION)
        else:
            low, high, same = order(other[0], mine[0], LAYERS)
        assert low < high or same, f"{'.'.join(mine)} imports {'.'.join(other)}"


def test_imports_have_no_cycle():
    graph = {module_name(path): set(imported(path)) for path in INSIDE}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= graph.keys()


def test_modules_are_in_folders_of_one_subject():
    entries = {p.name for p in (ROOT / "ppl_vae").iterdir() if p.name != "__pycache__"}
    folders = {name for layer in LAYERS for name in layer}
    assert entries == TOP_LEVEL | folders
    for folder in {path.parent for path in INSIDE}:
        held = [p for p in folder.iterdir() if p.suffix == ".py" and p.name != "__init__.py"]
        assert len(held) + sum((p / "__init__.py").exists() for p in folder.iterdir()) >= 2, folder


def test_initial_modules_hold_nothing_but_names():
    for path in FILES:
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree)
            kinds = ast.Expr | ast.Import | ast.Assign
            assert all(isinstance(node, kinds) for node in tree.body), path


def relative(path):
    return str(path.relative_to(ROOT / "ppl_vae"))


FOLDERS = sorted({relative(path.parent) for path in MODULES} - {"."})
ELSEWHERE = {"core/processes": "distributed"}
"""Folders whose tests have a folder of another name."""


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_has_tests_in_a_folder_of_its_name(folder):
    assert list((ROOT / "tests" / ELSEWHERE.get(folder, folder)).glob("test_*.py"))
