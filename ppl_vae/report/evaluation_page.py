"""The page of an evaluation."""

from collections.abc import Iterator
from functools import partial

from ppl_vae.core.text import counted
from ppl_vae.plots.drawing import SIZE
from ppl_vae.plots.estimates import plot_convergence, plot_cross_check, plot_tail_index
from ppl_vae.plots.fits import plot_log_p
from ppl_vae.plots.latent_spaces import plot_kl_by_dimension
from ppl_vae.report.evaluation import Evaluation
from ppl_vae.report.figures import ReportFigure
from ppl_vae.report.html import Page

LOG_P, LATENT = "Log p of the rows", "Latent dimensions"
MODEL = "model"


def evaluation_page(evaluation: Evaluation) -> Page:
    """The page of an evaluation, with its findings and figures."""
    estimate = evaluation.log_likelihood
    return Page(
        title=f"Evaluation on {evaluation.data}",
        subtitle=f"{evaluation.model}, {counted(len(estimate.value), 'row')}",
        verdict=[
            *_lines(estimate)[:2],
            *_lines(evaluation.gaps)[:1],
            f"The latent space: {evaluation.collapse.verdict}.",
        ],
        tables=[_dimensions(evaluation)],
        figures=[*_figures(evaluation)],
        run=[
            ("model", evaluation.model),
            ("data", evaluation.data),
            ("method", f"{estimate.method}, {counted(estimate.num_samples, 'draw')} per row"),
            ("execution", estimate.execution or "exact"),
        ],
        notes=[
            *estimate.notes,
            *_lines(estimate)[2:],
            *_lines(evaluation.gaps)[1:],
            *_lines(evaluation.collapse)[1:],
        ],
    )


def _lines(result: object) -> list[str]:
    return [line.strip() for line in str(result).splitlines()]


def _dimensions(
    evaluation: Evaluation,
) -> tuple[str, tuple[str, ...], list[tuple[str, ...]], str]:
    found = evaluation.collapse
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
    estimate = evaluation.log_likelihood
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
    if evaluation.cross_check is not None:
        checked = {MODEL: evaluation.cross_check}
        caption = "log p of the same rows by several methods."
        yield ReportFigure("cross-check", caption, SIZE, partial(plot_cross_check, checked), LOG_P)
    kl = {MODEL: evaluation.collapse.kl_by_dimension}
    yield ReportFigure(
        "kl", "KL of each latent dimension.", SIZE, partial(plot_kl_by_dimension, kl), LATENT
    )
