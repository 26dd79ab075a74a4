"""The evaluation of a Bayesian stage: its row of the table."""

import math
from typing import Any

import torch

from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.lineage.estimates import PREDICTIVE, MeanEstimate, PosteriorSummary, paired_gain
from ppl_vae.lineage.metrics import EvaluationContext, StageMetrics, mean_estimate
from ppl_vae.lineage.posterior_stages import PosteriorFit
from ppl_vae.lineage.stage import Stage

NO_EVIDENCE = MeanEstimate(math.nan, method="log p of the training rows is the evidence")
NOT_COMPARED = MeanEstimate(math.nan, method="not yet compared")


def posterior_row(
    context: EvaluationContext, stage: Stage[Any], fitted: PosteriorFit
) -> StageMetrics:
    """The stage's row of the table, without its gain over a reference."""
    held_out = _posterior_predictive(context, fitted.samples)
    at_mean = context.exact_held_out(fitted.mean)
    fit = context.in_data_units(fitted.fit)
    return StageMetrics(
        *stage.labels,
        elbo=float(fit.objective[-1]) if fitted.bounded else math.nan,
        log_p=NO_EVIDENCE,
        approximation=math.nan,
        amortization=math.nan,
        approximation_error=math.nan,
        amortization_error=math.nan,
        shortfall=math.nan,
        expected_loss=math.nan,
        expected_shortfall=math.nan,
        test_log_p=mean_estimate(held_out),
        noise_scale=float(fitted.mean.noise_scale.detach()) * context.units.common_scale,
        angle=math.nan,
        fit=fit,
        convergence=fitted.convergence,
        curve=fit.curve(),
        ascent=None,
        held_out=held_out,
        posterior=PosteriorSummary(
            over_optimum=NOT_COMPARED,
            over_mean=paired_gain(held_out, at_mean.value),
            num_active=fitted.num_active,
            diagnosis=fitted.diagnosis,
        ),
    )


def _posterior_predictive(context: EvaluationContext, samples: PosteriorSamples) -> LogLikelihood:
    # log E p(x_n | parameters) of the scored test rows, in the data's units. The draws are common
    # to all rows: the error of the mean is at most the mean of the errors.
    found = samples.log_predictive(context.scored)
    value, error = found.value.cpu(), found.standard_error.cpu()
    none = torch.full_like(value, math.nan)
    estimate = LogLikelihood(
        value=value,
        standard_error=error,
        ess=none,
        k_hat=none,
        reliable=value.isfinite(),
        num_samples=samples.num_chains * samples.num_samples,
        method=PREDICTIVE,
        refine=0,
        global_error=float(error.mean()),
    )
    return estimate.shifted(context.units.log_jacobian(context.scored))
