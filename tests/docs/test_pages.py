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
SLOW |= {"own_pair", "posterior", "slips", "tasks"}
"""Pages whose code takes more than ten seconds."""


sys.path.insert(0, str(DOCS))
import page_outputs  # noqa: E402

PAGES = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in SLOW))
    for page in page_outputs.pages()
]
WORD = re.compile(r"[A-Za-z]+")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def numbers(outputs):
    """The numbers of a page's outputs."""
    found = NUMBER.findall(" ".join(outputs))
    return [float(number.replace(",", "")) for number in found]


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_what_their_code_prints(page):
    """Optimizers amplify the rounding of a machine, so that not all numbers can agree.

    A page is up to date if each output starts with the same word, and if nine in ten of the
    numbers agree to a tenth. A message that is given on one machine only changes their count.
    """
    shown, printed = page_outputs.shown(page), page_outputs.printed(page)
    assert any(printed)
    assert [WORD.findall(text)[:1] for text in shown] == [
        WORD.findall(text)[:1] for text in printed
    ]
    before, now = numbers(shown), numbers(printed)
    assert len(before) == pytest.approx(len(now), rel=0.1)
    if len(before) == len(now):
        agree = [
            a == pytest.approx(b, rel=0.1, abs=0.01) for a, b in zip(before, now, strict=True)
        ]
        assert sum(agree) >= 0.9 * len(agree)


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
