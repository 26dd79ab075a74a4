"""The pages of the documentation: their code runs, their links and their build are sound."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import page_outputs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
SLOW = {"coming_from", "index", "first_steps", "lineage", "log_likelihood", "missing_values"}
SLOW |= {"arrays_and_frames", "own_pair", "posterior", "slips", "tasks"}
"""All pages but those whose code takes the least time."""


PAGES = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in SLOW))
    for page in page_outputs.pages()
]
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
TOLERANCE, NEGLIGIBLE = 0.01, 1e-3
"""The share by which a number may differ, and the difference, in nats or other units, that may be
larger than this share. One unit of its last digit is allowed, too.

Instructions are the same on all x86-64 processors (``page_outputs.ENVIRONMENT``); versions of
torch and of the C library are not, and their roundings are amplified by training.
"""


def masked(text):
    """The text with # for its numbers, and one space where columns are aligned by several."""
    return re.sub(r" +", " ", NUMBER.sub("#", text))


def unit(number):
    """One unit of the last digit of a number as it is printed."""
    digits, _, exponent = number.replace(",", "").partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def agrees(one, other):
    """Whether two printed numbers agree up to the tolerance."""
    a, b = (float(number.replace(",", "")) for number in (one, other))
    last = max(unit(one), unit(other)) * (1 + 1e-9)
    return abs(a - b) <= max(last, NEGLIGIBLE, TOLERANCE * max(abs(a), abs(b)))


def differing_lines(shown, printed):
    """The lines of two outputs with the same masked text in which some numbers disagree."""
    return [
        (before, now)
        for before, now in zip(shown.splitlines(), printed.splitlines(), strict=True)
        if not all(map(agrees, NUMBER.findall(before), NUMBER.findall(now)))
    ]


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_what_their_code_prints(page):
    """A page that fails is written again by ``python docs/page_outputs.py PAGE.md``.

    The sentences that interpret its numbers have to be read again, too.
    """
    shown, printed = page_outputs.shown(page), page_outputs.printed(page)
    assert any(printed)
    assert list(map(masked, shown)) == list(map(masked, printed))
    assert list(map(differing_lines, shown, printed)) == [[]] * len(shown)


def test_outputs_are_compared_line_by_line_and_number_by_number():
    assert masked("log p  -7.73 \u00b1 0.1, 5 rows\n") == masked(
        "log p 12.1 \u00b1 1e-05, 1,797 rows\n"
    )
    assert masked("reliable for all 20 data points") != masked(
        "NOT reliable for 3 of 20 data points"
    )
    assert agrees("1,797", "1,798") and agrees("-3.27", "-3.28") and agrees("1e-09", "2e-09")
    assert not agrees("0.47", "0.55") and not agrees("31", "44") and not agrees("-1.0", "1.0")
    assert differing_lines("a 1\nb 0.30\n", "a 1\nb 0.35\n") == [("b 0.30", "b 0.35")]


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
