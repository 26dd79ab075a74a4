"""The API reference and the list of references: they have all that is public and cited."""

import ast
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import ppl_vae

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import equations  # noqa: E402
import reference_pages  # noqa: E402

CITATION = re.compile(r"(?:, | et al\.|[\w.'-]+): ([A-Z][^:;]{6,140}?) ?\((?:19|20)\d\d\)")


def test_every_public_name_is_documented_under_a_heading():
    pages = dict(reference_pages.pages())
    listed = (DOCS / "reference.md").read_text()
    for found in pkgutil.iter_modules(ppl_vae.__path__):
        root = importlib.import_module(f"ppl_vae.{found.name}")
        public = [n for n in getattr(root, "__all__", ()) if callable(getattr(root, n))]
        if not (found.ispkg and public):
            continue
        assert f"reference/{found.name}\n" in listed
        page = pages[found.name]
        missing = [n for n in public if not re.search(rf":: {root.__name__}\.{n}$", page, re.M)]
        assert not missing, f"{root.__name__}: {missing}"
        headings = reference_pages.PAGES[found.name][1]
        assert re.findall(r"(?m)^(.+)\n-+$", page) == list(headings), "a module has no heading"


def test_each_equation_has_a_heading_and_its_source_is_in_the_references():
    references = (DOCS / "references.md").read_text()
    pages = dict(reference_pages.pages())
    for (name, heading), (_, formula, source) in equations.EQUATIONS.items():
        assert heading in reference_pages.PAGES[name][1]
        assert formula.splitlines()[0] in pages[name]
        for work in filter(None, source.split("; ")):
            first = re.split(r",| and | et al| \(", work)[0]
            year = work[-5:-1]
            assert re.search(rf"{first}.*\({year}\)", references), work


def docstrings():
    for path in sorted((ROOT / "ppl_vae").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                yield path, " ".join((ast.get_docstring(node) or "").split())


def letters(text):
    return re.sub(r"\W", "", text.lower())


def test_every_cited_paper_is_in_the_references():
    page = letters((DOCS / "references.md").read_text())
    cited = [(path, title) for path, text in docstrings() for title in CITATION.findall(text)]
    assert len(cited) > 50
    missing = {title: path.name for path, title in cited if letters(title)[:25] not in page}
    assert not missing
