"""Predictive checks of the posterior that a stage of the lineage sampled."""

from torch import Tensor

from ppl_vae.evaluation.prediction.predictive_checks import PredictiveCheck, predictive_check
from ppl_vae.lineage.posterior_stages import prior_draws
from ppl_vae.lineage.problem import LineageProblem
from ppl_vae.lineage.result import Lineage


def posterior_check(
    lineage: Lineage, problem: LineageProblem, train: Tensor, statistic: str
) -> PredictiveCheck | None:
    """A check of the training rows, in the data's units; None if no posterior was sampled."""
    samples = next(iter(lineage.samples.values()), None)
    if samples is None or lineage.units is None:
        return None
    return predictive_check(
        train,
        samples.parameters(),
        statistic,
        prior=prior_draws(problem, lineage.units),
        columns=lineage.about["columns"],
        seed=problem.seed,
    )
