"""The report: one self-contained page in HTML with the results and the figures."""

import base64
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from ppl_vae.core.text_table import render_html
from ppl_vae.evaluation.marginal_likelihood.compare import Comparison
from ppl_vae.lineage.report_data import ReportData
from ppl_vae.lineage.result import Lineage, heading
from ppl_vae.lineage.table import format_number, format_percent, html_table, legend
from ppl_vae.report.figures import ReportFigure
from ppl_vae.report.verdict import verdict

PIXELS_PER_INCH = 96
GLOSSARY = (
    ("x", "a datum, one flat row of D columns"),
    ("z", "its latent code of K numbers, with prior N(0, I)"),
    ("log p(x)", "the marginal log-likelihood of a datum under a model, in nats"),
    ("q(z|x), the guide", "the approximation to the posterior p(z|x) of the code"),
    ("ELBO, the bound", "log p(x) - KL(q || p(z|x)): the objective of variational inference"),
    ("W, mu, sigma", "PPCA's loadings, mean and noise scale: x given z is N(W z + mu, sigma² I)"),
    ("decoder, encoder", "networks from z to x and from x to q"),
    ("autoencoder, PCA", "encoder and decoder with the least squared error, q a point: scored by "
     "the Gaussian that its codes and the squared error imply"),
    ("EM, PX-EM", "exact E- and M-steps; PX-EM (parameter-expanded) also estimates the covariance "
     "of z, and absorbs it into W"),
    ("variational EM", "EM with a restricted q for each datum"),
    ("amortized", "an encoder computes q from x for all data, instead of one q per datum"),
    ("SVI", "stochastic gradient ascent on the bound, jointly in model and guide"),
    ("IWAE", "a VAE trained on the bound of S importance-weighted draws instead of one"),
    ("approximation gap", "log p minus the ELBO of the family's best q for each datum"),
    ("amortization gap", "the ELBO of that best q minus the ELBO of the guide's own q"),
    ("tail index, reliable", "how heavy the tail of the importance weights is, pooled over data; "
     "an estimate is reliable if its 95 % interval is expected to cover log p with at least 90 %, "
     "otherwise it is only a lower bound in expectation"),
    ("nat", "the unit of natural logarithms; 1 nat is 1.44 bits"),
)  # fmt: skip


def render_page(
    lineage: Lineage, data: ReportData, figures: Sequence[tuple[ReportFigure, bytes]]
) -> str:
    """The report as one HTML document.

    Args:
        lineage: the results.
        data: the data of the figures.
        figures: each with its PNG.
    """
    about = lineage.about
    return _template("report.html").render(
        title="From probabilistic PCA to the variational autoencoder",
        source=about.get("data", "data"),
        subtitle=heading(about),
        verdict=verdict(lineage),
        table=Markup(html_table(lineage.rows)),
        legend=legend(about),
        comparison=data.comparison,
        ranking=_ranking(data.comparison),
        groups=_groups(figures),
        run=_run_details(about),
        notes=_notes(lineage, data),
        glossary=GLOSSARY,
    )


def _template(name: str) -> Template:
    loader = PackageLoader("ppl_vae.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name)


@dataclass(frozen=True)
class Page:
    """The page of a fit or of an evaluation.

    Attributes:
        title, subtitle: its heading.
        verdict: the findings in sentences, the most important first.
        tables: each with its heading, its header, its rows and a legend.
        figures: in the order of the page.
        run: details of the run, by name.
        notes: caveats.
    """

    title: str
    subtitle: str
    verdict: Sequence[str]
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]], str]]
    figures: Sequence[ReportFigure]
    run: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()

    def render(self) -> str:
        """The page as one HTML document with its figures."""
        return _template("page.html").render(
            title=self.title,
            subtitle=self.subtitle,
            verdict=self.verdict,
            tables=[
                (heading, Markup(render_html([*map(list, rows)], header)), legend)
                for heading, header, rows, legend in self.tables
            ],
            groups=_groups([(figure, figure.png()) for figure in self.figures]),
            run=self.run,
            notes=self.notes,
            glossary=GLOSSARY,
        )


def _notes(lineage: Lineage, data: ReportData) -> list[str]:
    left_out = [f"not shown: {what}" for what in data.left_out]
    return [*lineage.about.get("notes", ()), *lineage.notes(), *left_out]


def _ranking(comparison: Comparison | None) -> Markup | None:
    if comparison is None:
        return None
    names = ("mean", "error", "difference", "difference_error")
    columns = [[format_number(v, 2) for v in getattr(comparison, name).tolist()] for name in names]
    columns.append([format_percent(share) for share in comparison.reliable.tolist()])
    columns.append([format_number(weight, 2) for weight in comparison.weight.tolist()])
    header = (
        "model",
        "log p",
        "± error",
        "minus the best",
        "± paired error",
        "reliable",
        "weight",
    )
    rows = [list(row) for row in zip(comparison.names, *columns, strict=True)]
    return Markup(render_html(rows, header))


def _groups(
    figures: Sequence[tuple[ReportFigure, bytes]],
) -> list[tuple[str, list[dict[str, Any]]]]:
    grouped = itertools.groupby(figures, key=lambda pair: pair[0].group)
    return [(group, [_embedded(*pair) for pair in pairs]) for group, pairs in grouped]


def _embedded(figure: ReportFigure, png: bytes) -> dict[str, Any]:
    width, height = (round(inches * PIXELS_PER_INCH) for inches in figure.size)
    content = base64.b64encode(png).decode()
    return {
        "name": figure.name,
        "caption": figure.caption,
        "content": content,
        "width": width,
        "height": height,
    }


def _run_details(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, versions = about["settings"], about["versions"]
    num_train, num_val, num_test = (about[f"num_{part}"] for part in ("train", "val", "test"))
    rows = f"{num_train} for training, {num_val} for early stopping, {num_test} for testing"
    values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    return [
        ("data", about.get("data", "given in memory")),
        ("rows", f"{rows} ({about['num_scored']} of these scored)"),
        ("settings", values),
        ("seed", str(about["seed"])),
        ("seconds", f"{about['seconds']:.0f} on {about['threads']} thread"),
        ("date", about["date"]),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
    ]
