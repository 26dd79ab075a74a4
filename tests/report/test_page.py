"""The report: a verdict that the numbers bear out, and a page that needs nothing else."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import pytest
import torch
from test_table import COSTLY, EXACT, NEURAL, SVI, lineage

import lineages
from ppl_vae.evaluation.marginal_likelihood.estimate import exact_result
from ppl_vae.lineage.metrics import MeanEstimate
from ppl_vae.lineage.run import Lineage
from ppl_vae.report.archive import read_results, write_report, write_results
from ppl_vae.report.figures import pictures
from ppl_vae.report.html import page
from ppl_vae.report.verdict import verdict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_results(folder, lineages.ladder(), lineages.shown())
    write_report(folder, lineages.ladder(), lineages.shown())
    return folder


class Reader(html.parser.HTMLParser):
    """What a page would load, and what it says."""

    def __init__(self):
        super().__init__()
        self.tags, self.loaded, self.said, self.images = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.loaded += [v for k, v in attributes.items() if k in ("src", "href", "srcset", "data")]
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        self.said.append(data.strip())


def read(text):
    reader = Reader()
    reader.feed(text)
    return reader


def test_the_page_is_one_file(folder):
    text = (folder / "report.html").read_text()
    assert len(text) < 5e6
    reader = read(text)
    assert "script" not in reader.tags and "iframe" not in reader.tags
    assert all(url.startswith("data:") for url in reader.loaded)
    assert "@import" not in text and "url(" not in text


def test_the_verdict_comes_first_and_everything_is_there(folder):
    reader = read((folder / "report.html").read_text())
    said = [s for s in reader.said if s]
    sentences = verdict(lineages.ladder())
    places = [said.index(sentence) for sentence in sentences]
    assert places == sorted(places)
    assert places[-1] < said.index("The lineage in numbers") < said.index("How it was run")
    for row in lineages.ladder().rows:
        assert said.count(row.stage) >= 2, row.stage
    for word in (
        "Words",
        "amortization gap",
        "less the best",
        "versions",
        "seed",
        "found: a note",
    ):
        assert word in said, word
    assert any("a <small> table" in s for s in said)
    found = pictures(lineages.ladder(), lineages.shown())
    assert [image["alt"] for image in reader.images] == [p.sentence for p in found]
    assert all(p.sentence in said for p in found)
    files = {path.stem for path in (folder / "pictures").iterdir()}
    assert files == {p.name for p in found}


def test_a_page_of_one_rung():
    drawn = [(p, p.png()) for p in pictures(lineages.plain_ladder(), lineages.plain_shown())]
    text = page(lineages.plain_ladder(), lineages.plain_shown(), drawn)
    assert "not shown: VAE and its latent plane: the stage vae was not climbed" in text
    assert "Held-out log p, row by row" not in text


BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
OFFLINE = ("background-networking", "component-update", "sync", "gpu", "quic", "extensions")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_has_nothing_to_say_and_asks_for_nothing(folder, tmp_path):
    log = tmp_path / "net.json"
    command = [BROWSER, "--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"]
    command += [f"--disable-{what}" for what in OFFLINE]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--dump-dom"]
    address = (folder / "report.html").as_uri()
    run = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0
    assert "CONSOLE" not in run.stderr
    assert verdict(lineages.ladder())[0] in run.stdout
    asked = re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]*)"', log.read_text())
    # What the browser asks its own maker for is not the page's doing.
    own = ("google", "gvt1", "chromium")
    assert [url for url in asked if not any(name in url.split("/")[2] for name in own)] == []


def test_results_come_back_from_their_file(folder):
    found, shown = read_results(folder)
    assert found.to_dict() == lineages.ladder().to_dict()
    assert shown.to_dict() == lineages.shown().to_dict()
    assert read_results(folder / "results.json")[0].about == found.about


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_results(tmp_path / "results.json")
    for content in ("{", "[]", json.dumps({"rows": []}), json.dumps({"report_data": None})):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match="holds no results of a lineage"):
            read_results(tmp_path)


# The verdict


def scored(rows, values):
    """Rows with held-out values of their own."""
    found = []
    for row, value in zip(rows, values, strict=True):
        held_out = exact_result(torch.as_tensor(value))
        reliable = row.test_log_p.reliable
        if row.log_p.how != "exact":
            sure = torch.arange(len(held_out.value)) < round(reliable * len(held_out.value))
            held_out = dataclasses.replace(held_out, method="importance", reliable=sure)
        how = "exact" if held_out.method == "exact" else "estimated"
        mean = MeanEstimate(held_out.mean, held_out.mean_error, held_out.share_reliable, how)
        found.append(dataclasses.replace(row, held_out=held_out, test_log_p=mean))
    return found


def said(rows, num_rows=100):
    found = lineage(rows)
    return verdict(dataclasses.replace(found, about=found.about | {"num_scored": num_rows}))


NOISE = torch.randn(100, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(
    ("shift", "start"),
    [
        (5.0, "On held-out rows vae does better than PPCA: about "),
        (-5.0, "On held-out rows PPCA does better than vae: about "),
        (0.0, "On held-out rows vae and PPCA cannot be told apart: about "),
    ],
)
def test_who_does_better_row_by_row(shift, start):
    other = torch.randn(100, generator=torch.Generator().manual_seed(1)).double()
    other = other - other.mean()
    rows = scored([EXACT[0], NEURAL[0]], [NOISE, NOISE + shift + other])
    first = said(rows)[0]
    assert first.startswith(start)
    assert f"the difference is {shift:.2f} ± {float(other.std()) / 10:.2f}." in first
    assert (
        f"{float(NOISE.mean()):.2f} ± {float(NOISE.std()) / 10:.2f} nats per datum (exact)"
        in first
    )


def test_unreliable_estimates_and_few_rows_are_said():
    rows = scored([EXACT[0], NEURAL[0]], [NOISE, NOISE + 5])
    unsure = dataclasses.replace(rows[1].test_log_p, reliable=0.5)
    rows[1] = dataclasses.replace(rows[1], test_log_p=unsure)
    sentences = said(rows, num_rows=6)
    assert "at least" in sentences[0] and "50 % reliable" in sentences[0]
    assert sentences[1].startswith("Held-out log p of vae is no more than a lower bound: fewer")
    assert sentences[2] == "There are only 6 held-out rows, so all errors over them are rough."


def test_a_lower_bound_below_ppca_settles_nothing_and_few_rows_little():
    spread = torch.linspace(-1, 1, 100).double()
    rows = scored([EXACT[0], NEURAL[0]], [NOISE, NOISE - 5 + spread])
    assert said(rows)[0].startswith("On held-out rows PPCA does better than vae")
    unsure = dataclasses.replace(rows[1].test_log_p, reliable=0.5)
    rows[1] = dataclasses.replace(rows[1], test_log_p=unsure)
    assert "cannot be told apart" in said(rows)[0]
    # 2.2 standard errors are clear for many rows, not for six.
    for number, clear in ((100, True), (6, False)):
        other = torch.linspace(-1, 1, number).double()
        other = other / other.std() * number**0.5 + 2.2
        rows = scored([EXACT[0], NEURAL[0]], [NOISE[:number], NOISE[:number] + other])
        assert ("cannot be told apart" in said(rows)[0]) != clear


def test_what_reached_the_optimum_and_where_the_bound_hides():
    rows = scored(EXACT + SVI + COSTLY + NEURAL, [NOISE] * 13)
    sentences = said(rows)
    assert any(
        s == "PPCA's exact optimum is reached by closed-form, em, px-em and variational-em."
        for s in sentences
    )
    assert any(s.startswith("Short of it") and "unit-q (7.10)" in s for s in sentences)
    assert "The ELBO hides most at unit-q: it is 4.71 nats per datum below log p" in sentences[-1]


def test_ladders_of_ppca_alone_or_without_it():
    assert said(scored(EXACT[:2], [NOISE, NOISE]))[0].startswith(
        "On held-out rows closed-form does"
    )
    alone = said(scored(NEURAL[:2], [NOISE, NOISE + 1]))
    assert alone[0].startswith("On held-out rows iwae does best: about")
    assert said([dataclasses.replace(EXACT[0])]) == (
        "PPCA's exact optimum is reached by closed-form.",
    )
    assert isinstance(lineage(EXACT), Lineage)
