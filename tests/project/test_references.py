"""Names of the package that the texts mention exist."""

import importlib
import re

from files import ROOT

NAME = re.compile(r"(?<![\w./-])ppl_vae(?:\.[A-Za-z_]\w*)+")
FOLDERS = ("ppl_vae", "tests", "examples", "docs")
CUSTOM_OPERATORS = {"ppl_vae.onednn_matmul"}
"""Names that torch's registry of operators has under the package's name."""


def exists(name):
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:size]))
        except ImportError:
            continue
        for part in parts[size:]:
            if part in getattr(value, "__annotations__", {}):  # an attribute without a default
                return True
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def test_every_dotted_name_exists():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    texts = [path for path in paths if path.suffix in (".py", ".pyi", ".md", ".svg")]
    built = ROOT / "docs" / "_build"
    found = {
        name: path.relative_to(ROOT)
        for path in (*texts, ROOT / "README.md")
        if built not in path.parents
        for name in NAME.findall(path.read_text())
    }
    assert len(found) > 100
    assert {name: path for name, path in found.items() if not exists(name)}.keys() == (
        CUSTOM_OPERATORS
    )
    assert not exists("ppl_vae.core.pair" + ".NoSuchName")


def test_names_in_the_list_of_tasks_are_where_it_states():
    import ppl_vae

    text = (ROOT / "docs" / "tasks.md").read_text().split("\n## ")[0]
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ")]
    names = {name for row in rows for name in re.findall(r"`([A-Za-z_]\w*)[`(]", row)}
    calls = {name for name in names if name.islower() or name[0].isupper()}
    assert len(calls) > 30
    assert not {name for name in calls if not hasattr(ppl_vae, name)} - {"use", "score", "impute"}
