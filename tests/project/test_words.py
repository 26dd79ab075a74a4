"""Words: the field's terms in names, comments, messages and prose, and none that needs a key."""

import io
import keyword
import re
import tokenize

import pytest

from files import ROOT

# A pattern, and what to write instead.
BANNED = {
    r"hole[sd]?": "missing values, missing entries",
    r"(?:nats?|bits?|draws?|chains?|values?|samples?|weights?|terms?|numbers|seconds|steps) an? "
    r"(?:datum|row|cell|column|step|iteration|(?:latent )?dimension|draw|call)": "per "
    "(nats per datum)",
    r"(?:is|are) given of": "warns of",
    r"who(?:so)?ever": "the process that, the user who",
    r"cut (?:draws|samples|ones)": "detached draws",
    r"rungs?": "stage",
    r"ladders?": "lineage",
    r"rails?": "batches, execution",
    r"opinions?": "estimate, cross-check",
    r"reckon\w*": "compute",
    r"mend(?:s|ed|ing)?": "fix, correct",
    r"strangers?": "a pair written by a user",
    r"foreign": "written by a user, external",
    r"exhibits?": "report data",
    r"pictured": "fitted pair",
    r"climb(?:s|ed|ing)?": "fit, run, increase",
    r"weighers?": "log-weight sampler",
    r"rooms?": "module",
    r"(?:house|houses)": "project",
    r"seen": "observed",
    r"look(?:s|ed|ing)?(?! up\b)": "evaluate, inspect, check",
    r"(?:tell|tells|told)": "pass, state, report, distinguish",
    r"so many": "this number of",
    r"coins?": "Bernoulli draws",
    r"hears?": "obtain",
    r"honest\w*": "correct, unbiased",
    r"thaw\w*": "unfreeze",
    r"leaps?": "several steps",
    r"culprits?": "the site at fault",
    r"deja[ _]vu": "the limit of a VAE",
    r"believed?": "reliable",
}
# Parts of names, between underscores and capitals.
NAMES = {
    **dict.fromkeys(("hole", "holes", "holed"), "missing"),
    **dict.fromkeys(("rung", "rungs", "ladder"), "stage, lineage"),
    **dict.fromkeys(("rails", "opinion", "opinions"), "runner, estimate"),
    **dict.fromkeys(("look", "looks", "seen", "told", "tell"), "check, observed, given"),
    **dict.fromkeys(("how",), "the arguments spelled out"),
    **dict.fromkeys(("climb", "exhibits", "pictured", "ground"), "fit, report data, context"),
    **dict.fromkeys(("culprit", "thaw", "stranger", "foreign", "leap"), "see BANNED"),
}
FOLDERS = ("ppl_vae", "examples", "docs", "tests")
SKIPPED = ("docs/_build", "docs/gallery", "docs/reference/", "tests/project/test_words.py")


def files():
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    found += [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    for path in sorted(found):
        name = path.relative_to(ROOT).as_posix()
        kind = path.suffix in (".py", ".pyi", ".md", ".rst", ".html", ".toml")
        if kind and path.is_file() and not name.startswith(SKIPPED):
            yield name


def prose(text, is_python):
    """Lines of prose, by number: all of a page; comments and strings of a program."""
    if not is_python:
        return list(enumerate(text.splitlines(), 1))
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            found.extend(enumerate(token.string.splitlines(), token.start[0]))
    return found


def parts(name):
    return re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)


def names(text):
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
            yield token.start[0], token.string


PATTERNS = [(re.compile(rf"\b(?:{p})\b", re.IGNORECASE), instead) for p, instead in BANNED.items()]


@pytest.mark.parametrize("name", list(files()))
def test_prose_uses_the_fields_terms(name):
    text = (ROOT / name).read_text()
    found = [
        f"{name}:{number}: {match[0]!r}; write: {instead}"
        for number, line in prose(text, name.endswith((".py", ".pyi")))
        for pattern, instead in PATTERNS
        if (match := pattern.search(line))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", [n for n in files() if n.endswith(".py")])
def test_names_use_the_fields_terms(name):
    text = (ROOT / name).read_text()
    found = {
        f"{name}:{number}: {word!r}; write: {NAMES[part.lower()]}"
        for number, word in names(text)
        for part in parts(word)
        if part.lower() in NAMES
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("name", [n for n in files() if n.startswith("ppl_vae/")])
def test_descriptions_of_arguments_name_what_is_described(name):
    text = (ROOT / name).read_text()
    found = re.findall(r"^\s+[a-z_]+(?:, [a-z_]+)*: of .*$", text, re.MULTILINE)
    assert not found, "write the noun, as in 'seed: the seed of the draws'"
