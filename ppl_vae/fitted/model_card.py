"""The model card: what a fitted model is, how it was fitted, how good it is, and its limits."""

from collections.abc import Iterator

from ppl_vae.core.text import counted
from ppl_vae.fitted.metadata import FitMetadata
from ppl_vae.fitted.model import FittedModel
from ppl_vae.fitted.names import MODEL_NAMES

MAX_COLUMNS = 30
"""The number of columns that a card lists."""
LIMITS = {
    "ppca": "The model is linear and Gaussian: nonlinear structure and heavy tails are not "
    "represented. Standard deviations take the fitted parameters as known.",
    "factor-analysis": "The model is linear and Gaussian: nonlinear structure and heavy tails are "
    "not represented. Standard deviations take the fitted parameters as known.",
    "bayesian-ppca": "The model is linear and Gaussian. Its posterior is a mean-field "
    "approximation, whose variances are too small.",
    "bayesian-factor-analysis": "The model is linear and Gaussian. Its posterior is a mean-field "
    "approximation, whose variances are too small.",
    "vae": "log p is estimated; the share of reliable estimates is stated with it. Rows unlike "
    "the fitted ones can have a high log p.",
    "iwae": "log p is estimated; the share of reliable estimates is stated with it. Rows unlike "
    "the fitted ones can have a high log p.",
    "autoencoder": "The model has no density: it has no log p, and cannot be sampled.",
}


def model_card(fitted: FittedModel) -> str:
    """The card as a page in Markdown.

    Raises:
        ValueError: if the model has no metadata of its fit.
    """
    if fitted.metadata is None:
        raise ValueError("there is no metadata of the fit")
    sections = (
        ("The model", _model(fitted, fitted.metadata)),
        ("How it was fitted", _fit(fitted.metadata)),
        ("How good it is", _quality(fitted.metadata)),
        ("Limits", _limits(fitted.metadata)),
        ("Use", _use(fitted.name)),
    )
    parts = [f"# {model_title(fitted)}\n"]
    parts += [f"## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections]
    return "\n".join(parts)


def model_title(fitted: FittedModel) -> str:
    """The kind of model, K and the name of its table, as a heading."""
    assert fitted.metadata is not None
    name = MODEL_NAMES.get(fitted.metadata.model, fitted.metadata.model)
    sentence = f"{name[0].upper()}{name[1:]}"
    return f"{sentence} of {_code(fitted.metadata.table)} with K = {fitted.latent_dim}"


def _code(text: str) -> str:
    return text.replace("`", "'").replace("\n", " ")


def _model(fitted: FittedModel, metadata: FitMetadata) -> Iterator[str]:
    shown = ", ".join(f"`{_code(name)}`" for name in metadata.columns[:MAX_COLUMNS])
    more = len(metadata.columns) - MAX_COLUMNS
    yield f"- {fitted.data_dim} columns: {shown}{f' and {more} more' if more > 0 else ''}"
    yield f"- {counted(fitted.latent_dim, 'latent dimension')}"
    if metadata.settings.get("likelihood", "gaussian") != "gaussian":
        yield f"- likelihood: {metadata.settings['likelihood']}"
    if metadata.scaling == "standardize":
        yield "- each column is standardised for the fit; results are in the units of the table"


def _fit(metadata: FitMetadata) -> Iterator[str]:
    rows = (metadata.train_rows, metadata.val_rows, metadata.held_out_rows)
    train, val, held_out = map(len, rows)
    stopping = f", {counted(val, 'row')} for stopping" if val else ""
    yield (
        f"- data: `{_code(metadata.table)}`, {counted(train, 'row')} fitted{stopping}, "
        f"{held_out} held out"
    )
    history = metadata.history
    yield (
        f"- {history.algorithm}: {counted(history.steps, 'step')} in {history.seconds:.1f} s, "
        f"{history.stopped}"
    )
    chosen = ", ".join(f"{name} {_setting(value)}" for name, value in metadata.settings.items())
    yield f"- settings: {chosen}"
    yield from (f"- {_code(note)}" for note in metadata.notes)
    yield f"- {metadata.date}; {', '.join(f'{n} {v}' for n, v in metadata.versions.items())}"


def _setting(value: object) -> str:
    return "auto" if value is None else str(value)


def _quality(metadata: FitMetadata) -> Iterator[str]:
    yield f"- {metadata.held_out or 'no rows were held out, so that this is not known'}"


def _limits(metadata: FitMetadata) -> Iterator[str]:
    yield f"- {LIMITS.get(metadata.model, 'They are not known.')}"
    yield "- It describes rows that come from the same source as the fitted ones."


def _use(name: str) -> Iterator[str]:
    yield "```sh"
    yield f"ppl-vae score {name} new.csv --out scores.csv"
    yield f"ppl-vae impute {name} new.csv --out filled.csv"
    yield f"ppl-vae report {name} --out report.html"
    yield "```"
    yield ""
    yield f'`ppl_vae.fitted.load_fitted("{name}")` reads it in Python.'
