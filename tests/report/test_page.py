"""The report: findings that agree with the numbers, and a self-contained page."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import pytest
import torch

import lineages
from lineage_rows import EXACT, NEURAL, RESTRICTED, SVI, lineage
from ppl_vae.evaluation.marginal_likelihood.estimate import exact_result
from ppl_vae.lineage.estimates import MeanEstimate
from ppl_vae.lineage.result import Lineage
from ppl_vae.report.archive import read_results, write_report, write_results
from ppl_vae.report.figures import report_figures
from ppl_vae.report.html import render_page
from ppl_vae.report.verdict import verdict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    results = lineages.small_lineage(), lineages.small_report_data()
    write_results(folder, *results)
    write_report(folder, *results)
    return folder


class Reader(html.parser.HTMLParser):
    """The resources that a page loads, and its texts."""

    def __init__(self):
        super().__init__()
        self.tags, self.loaded, self.texts, self.images = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.loaded += [v for k, v in attributes.items() if k in ("src", "href", "srcset", "data")]
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        self.texts.append(data.strip())


def read(text):
    reader = Reader()
    reader.feed(text)
    return reader


def test_the_page_is_self_contained(folder):
    text = (folder / "report.html").read_text()
    assert len(text) < 5e6
    reader = read(text)
    assert "script" not in reader.tags and "iframe" not in reader.tags
    assert all(url.startswith("data:") for url in reader.loaded)
    assert "@import" not in text and "url(" not in text


def test_the_page_starts_with_the_verdict_and_is_complete(folder):
    reader = read((folder / "report.html").read_text())
    texts = [s for s in reader.texts if s]
    sentences = verdict(lineages.small_lineage())
    places = [texts.index(sentence) for sentence in sentences]
    assert places == sorted(places)
    assert places[-1] < texts.index("Results of each stage") < texts.index("Run details")
    for row in lineages.small_lineage().rows:
        assert texts.count(row.stage) >= 2, row.stage
    for word in (
        "Glossary",
        "amortization gap",
        "minus the best",
        "versions",
        "seed",
        "found: a note",
    ):
        assert word in texts, word
    assert any("a <small> table" in s for s in texts)
    figures = report_figures(lineages.small_lineage(), lineages.small_report_data())
    assert [image["alt"] for image in reader.images] == [figure.caption for figure in figures]
    assert all(figure.caption in texts for figure in figures)
    files = {path.stem for path in (folder / "figures").iterdir()}
    assert files == {figure.name for figure in figures}


def test_a_page_of_one_stage():
    results = lineages.single_stage_lineage(), lineages.single_stage_report_data()
    text = render_page(*results, [(figure, b"") for figure in report_figures(*results)])
    assert "not shown: VAE and its latent plane: the stage vae was not run" in text
    assert "Comparison of held-out log p" not in text


BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
OFFLINE = ("background-networking", "component-update", "sync", "gpu", "quic", "extensions")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_reports_no_error_and_requests_nothing(folder, tmp_path):
    log = tmp_path / "net.json"
    command = [BROWSER, "--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"]
    command += [f"--disable-{what}" for what in OFFLINE]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--dump-dom"]
    address = (folder / "report.html").as_uri()
    run = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0
    assert "CONSOLE" not in run.stderr
    assert verdict(lineages.small_lineage())[0] in run.stdout
    requested = re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]*)"', log.read_text())
    # Requests of the browser to its vendor are independent of the page.
    own = ("google", "gvt1", "chromium")
    assert [url for url in requested if not any(name in url.split("/")[2] for name in own)] == []


def test_results_are_read_back_from_their_file(folder):
    found, data = read_results(folder)
    assert found.to_dict() == lineages.small_lineage().to_dict()
    assert data.to_dict() == lineages.small_report_data().to_dict()
    assert read_results(folder / "results.json")[0].about == found.about


def test_files_of_other_content_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_results(tmp_path / "results.json")
    for content in ("{", "[]", json.dumps({"rows": []}), json.dumps({"report_data": None})):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match="does not contain results of a lineage"):
            read_results(tmp_path)


# The verdict


def scored(rows, values):
    """These rows with given held-out values."""
    found = []
    for row, value in zip(rows, values, strict=True):
        held_out = exact_result(torch.as_tensor(value))
        reliable = row.test_log_p.share_reliable
        if row.log_p.method != "exact":
            reliable_rows = torch.arange(len(held_out.value)) < round(
                reliable * len(held_out.value)
            )
            held_out = dataclasses.replace(held_out, method="importance", reliable=reliable_rows)
        method = "exact" if held_out.method == "exact" else "estimated"
        mean = MeanEstimate(held_out.mean, held_out.mean_error, held_out.share_reliable, method)
        found.append(dataclasses.replace(row, held_out=held_out, test_log_p=mean))
    return found


def verdict_of(rows, num_rows=100):
    found = lineage(rows)
    return verdict(dataclasses.replace(found, about=found.about | {"num_scored": num_rows}))


NOISE = torch.randn(100, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(
    ("shift", "start"),
    [
        (5.0, "On held-out rows vae has a higher log p than PPCA: about "),
        (-5.0, "On held-out rows PPCA has a higher log p than vae: about "),
        (
            0.0,
            "On held-out rows vae and PPCA do not differ significantly, since the 95% interval of "
            "the paired difference contains zero: about ",
        ),
    ],
)
def test_the_paired_comparison_of_vae_and_ppca(shift, start):
    other = torch.randn(100, generator=torch.Generator().manual_seed(1)).double()
    other = other - other.mean()
    rows = scored([EXACT[0], NEURAL[0]], [NOISE, NOISE + shift + other])
    first = verdict_of(rows)[0]
    assert first.startswith(start)
    assert f"the paired difference is {shift:.2f} ± {float(other.std()) / 10:.2f}." in first
    assert (
        f"{float(NOISE.mean()):.2f} ± {float(NOISE.std()) / 10:.2f} nats per datum (exact)"
        in first
    )


def test_unreliable_estimates_and_few_rows_are_reported():
    rows = scored([EXACT[0], NEURAL[0]], [NOISE, NOISE + 5])
    unreliable = dataclasses.replace(rows[1].test_log_p, share_reliable=0.5)
    rows[1] = dataclasses.replace(rows[1], test_log_p=unreliable)
    sentences = verdict_of(rows, num_rows=6)
    assert "at least" in sentences[0] and "50 % reliable" in sentences[0]
    assert sentences[1].startswith("Held-out log p of vae is only a lower bound: fewer")
    assert sentences[2] == "Standard errors are over 6 held-out rows only, and imprecise."


def test_a_lower_bound_below_ppca_is_not_significant_and_few_rows_are_less_so():
    spread = torch.linspace(-1, 1, 100).double()
    rows = scored([EXACT[0], NEURAL[0]], [NOISE, NOISE - 5 + spread])
    assert verdict_of(rows)[0].startswith("On held-out rows PPCA has a higher log p than vae")
    unreliable = dataclasses.replace(rows[1].test_log_p, share_reliable=0.5)
    rows[1] = dataclasses.replace(rows[1], test_log_p=unreliable)
    first = verdict_of(rows)[0]
    assert "it is not known whether vae or PPCA has the higher log p, since that of vae" in first
    assert "is only a lower bound: at least" in first and "difference is -5.00" in first
    # 2.2 standard errors are significant for many rows, not for six.
    for number, significant in ((100, True), (6, False)):
        other = torch.linspace(-1, 1, number).double()
        other = other / other.std() * number**0.5 + 2.2
        rows = scored([EXACT[0], NEURAL[0]], [NOISE[:number], NOISE[:number] + other])
        assert ("do not differ significantly" in verdict_of(rows)[0]) != significant


def test_the_optimum_and_the_largest_gap_are_reported():
    rows = scored(EXACT + SVI + RESTRICTED + NEURAL, [NOISE] * 13)
    sentences = verdict_of(rows)
    assert any(
        s == "PPCA's exact optimum is attained by closed-form, em, px-em and variational-em."
        for s in sentences
    )
    assert any(s.startswith("Shortfall of log p") and "unit-q (7.10)" in s for s in sentences)
    assert "between log p and the ELBO is largest at unit-q: 4.71 nats per datum" in sentences[-1]


def test_verdicts_on_ppca_alone_and_without_ppca():
    assert verdict_of(scored(EXACT[:2], [NOISE, NOISE]))[0].startswith(
        "On held-out rows closed-form has the highest log p"
    )
    alone = verdict_of(scored(NEURAL[:2], [NOISE, NOISE + 1]))
    assert alone[0].startswith("On held-out rows iwae has the highest log p: about")
    assert verdict_of([dataclasses.replace(EXACT[0])]) == (
        "PPCA's exact optimum is attained by closed-form.",
    )
    assert isinstance(lineage(EXACT), Lineage)
