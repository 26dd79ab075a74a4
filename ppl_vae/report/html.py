"""The report: one page that needs nothing else, laid out from results and finished pictures."""

import base64
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ppl_vae.evaluation.marginal_likelihood.compare import Comparison
from ppl_vae.lineage.report_data import ReportData
from ppl_vae.lineage.run import Lineage
from ppl_vae.report.figures import Picture
from ppl_vae.report.table import COLUMNS, legend, number, percent
from ppl_vae.report.verdict import verdict

PIXELS_PER_INCH = 96
WORDS = (
    ("x", "a datum, one flat row of D columns"),
    ("z", "its latent code of K numbers, a priori N(0, I)"),
    ("log p(x)", "the marginal log-likelihood, in nats: how well a model explains a datum"),
    ("q(z|x), the guide", "the approximation to the posterior p(z|x) of the code"),
    ("ELBO, the bound", "log p(x) - KL(q || p(z|x)): what variational inference raises"),
    ("W, mu, sigma", "PPCA's loadings, mean and noise scale: x given z is N(W z + mu, sigma² I)"),
    ("decoder, encoder", "networks from z to x and from x to q"),
    ("autoencoder, PCA", "encoder and decoder of least squared error, q a point: scored here by "
     "the Gaussian that its codes and the squared error imply"),
    ("EM, PX-EM", "exact E- and M-steps; PX-EM lets z's covariance move too and folds it back"),
    ("variational EM", "EM with a restricted q for each datum"),
    ("amortized", "q is read off x by one encoder for all data, instead of one q per datum"),
    ("SVI", "stochastic gradients of the bound, model and guide together"),
    ("IWAE", "trained on the bound of S importance-weighted draws instead of one"),
    ("approximation gap", "log p less the ELBO of the family's best q for each datum"),
    ("amortization gap", "what the guide's own q loses against that best one"),
    ("tail index, reliable", "how heavy the tail of the importance weights is, pooled over data; "
     "an estimate is reliable if its 95 % interval is expected to cover log p with 90 % at least, "
     "else no more than a lower bound in expectation"),
    ("nat", "the unit of natural logarithms; 1 nat is 1.44 bits"),
)  # fmt: skip


def page(lineage: Lineage, shown: ReportData, pictures: Sequence[tuple[Picture, bytes]]) -> str:
    """The report as HTML in one piece.

    Args:
        lineage: the table.
        shown: what the pictures show.
        pictures: each with its PNG.
    """
    about = lineage.about
    loader = PackageLoader("ppl_vae.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(
        source=about.get("data", "data"),
        subtitle=_subtitle(about),
        verdict=verdict(lineage),
        columns=COLUMNS,
        cells=[[column.cell(row) for column in COLUMNS] for row in lineage.rows],
        legend=legend(about),
        comparison=shown.comparison,
        ranking=_ranking(shown.comparison),
        groups=_groups(pictures),
        run=_run(about),
        notes=_notes(lineage, shown),
        words=WORDS,
    )


def _subtitle(about: Mapping[str, Any]) -> str:
    num_rows = about["num_train"] + about["num_val"] + about["num_test"]
    holes = f", {about['num_missing']} cells missing" if about["num_missing"] else ""
    return (
        f"{about.get('data', 'data')}: {num_rows} rows, {about['data_dim']} columns{holes}; "
        f"K = {about['latent_dim']}, seed {about['seed']}"
    )


def _notes(lineage: Lineage, shown: ReportData) -> list[str]:
    left_out = [f"not shown: {what}" for what in shown.left_out]
    return [*lineage.about.get("notes", ()), *lineage.notes(), *left_out]


def _ranking(comparison: Comparison | None) -> list[list[str]]:
    if comparison is None:
        return []
    names = ("mean", "error", "difference", "difference_error")
    columns = [[number(v, 2) for v in getattr(comparison, name).tolist()] for name in names]
    columns.append([percent(share) for share in comparison.reliable.tolist()])
    columns.append([number(weight, 2) for weight in comparison.weight.tolist()])
    return [list(row) for row in zip(comparison.names, *columns, strict=True)]


def _groups(
    pictures: Sequence[tuple[Picture, bytes]],
) -> list[tuple[str, list[dict[str, Any]]]]:
    grouped = itertools.groupby(pictures, key=lambda pair: pair[0].group)
    return [(group, [_embedded(*pair) for pair in pairs]) for group, pairs in grouped]


def _embedded(picture: Picture, png: bytes) -> dict[str, Any]:
    width, height = (round(inches * PIXELS_PER_INCH) for inches in picture.size)
    content = base64.b64encode(png).decode()
    return {
        "name": picture.name,
        "sentence": picture.sentence,
        "content": content,
        "width": width,
        "height": height,
    }


def _run(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, versions = about["settings"], about["versions"]
    num_train, num_val, num_test = (about[f"num_{part}"] for part in ("train", "val", "test"))
    rows = f"{num_train} to fit, {num_val} to stop early, {num_test} to test"
    svi = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    found = [
        ("data", about.get("data", "given in memory")),
        ("rows", f"{rows} ({about['num_scored']} of these scored)"),
        ("SVI and measuring", svi),
        ("seed", str(about["seed"])),
        ("seconds", f"{about['seconds']:.0f} on {about['threads']} thread"),
        ("date", about["date"]),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
    ]
    return found
