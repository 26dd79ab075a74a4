"""The pages of the documentation: their code runs, their links and their build are sound."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
SLOW = {"coming_from", "index", "first_steps", "lineage", "log_likelihood", "missing_values"}
SLOW |= {"own_pair", "tasks"}
"""Pages whose code takes more than ten seconds."""


def script(page):
    """The ``python`` blocks of a page as one script."""
    return "\n".join(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    )


PAGES = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in SLOW))
    for page in sorted(DOCS.glob("*.md"))
    if script(page)
]


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs(page, tmp_path):
    # The first import of ArviZ 0.x on a day warns of version 1.x.
    if "arviz" in script(page):
        subprocess.run([sys.executable, "-c", "import arviz"], capture_output=True, check=True)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script(page)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_slow_pages_exist():
    assert {page.stem for page in DOCS.glob("*.md")} >= SLOW


def test_each_page_is_in_a_table_of_contents():
    pages = list(DOCS.glob("*.md"))
    text = "\n".join(page.read_text() for page in pages)
    trees = re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL)
    listed = {line for tree in trees for line in tree.splitlines()}
    assert {page.stem for page in pages} - listed == {"index"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the extra docs")
def test_the_documentation_builds_without_warnings_or_links_to_a_network(tmp_path):
    built = tmp_path / "html"
    command = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-D", "plot_gallery=0"]
    run = subprocess.run(
        [sys.executable, *command, "-d", str(tmp_path / "trees"), str(DOCS), str(built)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stderr
    for page in built.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"([^\"]+)\"", page.read_text()
        )
        assert not [address for address in loaded if re.match(r"(?:https?:)?//", address)]
