"""The page of an evaluation."""

from collections.abc import Iterator
from functools import partial

from ppl_vae.core.text import counted
from ppl_vae.evaluation.latent_space.collapse_result import Collapse
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.fitted.evaluation import Evaluation
from ppl_vae.plots.axes import SIZE
from ppl_vae.plots.estimates import plot_convergence, plot_cross_check, plot_tail_index
from ppl_vae.plots.fits import plot_log_p
from ppl_vae.plots.latent_spaces import plot_kl_by_dimension
from ppl_vae.report.figures import ReportFigure
from ppl_vae.report.html import Page

LOG_P, LATENT = "Log p of the rows", "Latent dimensions"
MODEL = "model"


def evaluation_page(evaluation: Evaluation) -> Page:
    """The page of an evaluation, with its findings and figures."""
    estimate, found = evaluation.log_likelihood, evaluation.collapse
    verdict = [*_lines(estimate)[:2], *_lines(evaluation.gaps)[:1]]
    verdict += [] if found is None else [f"The latent space: {found.verdict}."]
    verdict += [_sentence(str(evaluation.reconstruction)), *map(_sentence, evaluation.reasons)]
    return Page(
        title=f"Evaluation on {evaluation.data}",
        subtitle=f"{evaluation.model}, {counted(evaluation.num_rows, 'row')}",
        verdict=verdict,
        tables=[] if found is None else [_dimensions(found)],
        figures=[*_figures(evaluation)],
        run=[("model", evaluation.model), ("data", evaluation.data), *_method(estimate)],
        notes=[
            *(() if estimate is None else estimate.notes),
            *(f"Log p: {line}" for line in _lines(estimate)[2:]),
            *(f"Gaps: {line}" for line in _lines(evaluation.gaps)[1:]),
            *(f"Latent space: {line}" for line in _lines(found)[1:]),
        ],
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _method(estimate: LogLikelihood | None) -> Iterator[tuple[str, str]]:
    if estimate is None:
        return
    draws = "" if estimate.method == "exact" else f", {counted(estimate.num_samples, 'draw')}"
    yield "method", f"{estimate.method}{draws}"
    yield "execution", estimate.execution or "exact"


def _lines(result: object) -> list[str]:
    return [] if result is None else [line.strip() for line in str(result).splitlines()]


def _dimensions(
    found: Collapse,
) -> tuple[str, tuple[str, ...], list[tuple[str, ...]], str]:
    rows = zip(
        found.names,
        found.kl_by_dimension.tolist(),
        found.mean_variances.tolist(),
        found.active.tolist(),
        strict=True,
    )
    cells = [(n, f"{kl:.3f}", f"{v:.3f}", "yes" if on else "no") for n, kl, v, on in rows]
    legend = "KL: of q(z | x) from the prior, in nats per datum; a value near zero is collapsed."
    return "Latent dimensions", ("dimension", "KL", "variance of means", "active"), cells, legend


def _figures(evaluation: Evaluation) -> Iterator[ReportFigure]:
    if evaluation.log_likelihood is not None:
        yield from _figures_of_log_p(evaluation.log_likelihood)
    if evaluation.cross_check is not None:
        checked = {MODEL: evaluation.cross_check}
        caption = "log p of the same rows by several methods."
        yield ReportFigure("cross-check", caption, SIZE, partial(plot_cross_check, checked), LOG_P)
    if evaluation.collapse is not None:
        kl = {MODEL: evaluation.collapse.kl_by_dimension}
        caption = "KL of each latent dimension."
        yield ReportFigure("kl", caption, SIZE, partial(plot_kl_by_dimension, kl), LATENT)


def _figures_of_log_p(estimate: LogLikelihood) -> Iterator[ReportFigure]:
    reliable = estimate.reliable if estimate.is_weighted else None
    yield ReportFigure(
        "log-p",
        "The distribution of log p over the rows.",
        SIZE,
        partial(plot_log_p, estimate.value, reliable),
        LOG_P,
    )
    if estimate.is_weighted:
        named = {MODEL: estimate}
        yield ReportFigure(
            "tail-index",
            "The tail index of the importance weights of each row; an estimate above the limit is "
            "not reliable.",
            SIZE,
            partial(plot_tail_index, named),
            LOG_P,
        )
        if estimate.curve is not None:
            caption = "Mean log p from the first draws, minus that from all of them."
            yield ReportFigure(
                "convergence", caption, SIZE, partial(plot_convergence, named), LOG_P
            )
