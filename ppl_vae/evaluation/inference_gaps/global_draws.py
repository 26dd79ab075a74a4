"""Gaps of a pair with global latent variables: averages over draws of them, and their own part.

With q(theta, z_1, ..., z_N | x) = q(theta) prod_n q(z_n | x_n, theta),

    log p(x) - ELBO = KL(q(theta) || p(theta | x))
                      + E_q(theta) sum_n [log p(x_n | theta) - ELBO_n(theta)].

The bracket is split datum by datum for each of several draws of theta, in the pair given the draw.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.global_sites import conditioned
from ppl_vae.core.pair import Pair
from ppl_vae.core.stats import mean_and_error
from ppl_vae.evaluation.inference_gaps.result import Gaps, GlobalPart
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.objectives.divergences import check_latents


def conditioned_on_draws(
    pair: Pair, batch: Batch, num_draws: int
) -> tuple[list[Pair], Float[Tensor, " G"]]:
    """The pair given draws of its global latent variables, and their log density ratios."""
    runs = [pair.run(batch) for _ in range(num_draws)]
    check_latents(runs[0])
    log_ratios = torch.stack([run.global_log_weights()[0].detach().cpu() for run in runs])
    return [conditioned(pair, run) for run in runs], log_ratios


def check_no_constants(**given: Any) -> None:
    """Refuse arguments that depend on global latent variables.

    Raises:
        ValueError: naming the first that is given.
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} depends on the global latent variables, which are random here; leave it "
                "out, or fix them: ppl_vae.core.condition_on_globals(model, guide, x)"
            )


def average_over_draws(
    found: Sequence[Gaps], log_ratios: Float[Tensor, " G"], *, has_all_data: bool
) -> Gaps:
    """The mean of the gaps given G draws of theta.

    Args:
        found: the gaps given each draw.
        log_ratios: log p(theta) - log q(theta) of each draw, in nats.
        has_all_data: whether the gaps are those of all data that theta was fitted to.
    """
    first = found[0]
    totals = torch.tensor([each.total for each in found], dtype=torch.float64)
    approximations = torch.tensor([each.approximation for each in found], dtype=torch.float64)
    amortizations = torch.tensor([each.amortization for each in found], dtype=torch.float64)
    return replace(
        first,
        log_likelihood=_mean([each.log_likelihood for each in found]),
        elbo=_mean([each.elbo for each in found]),
        best_elbo=_mean([each.best_elbo for each in found]),
        estimate=_combined([each.estimate for each in found if each.estimate is not None]),
        approximation_mc_error=_error([each.approximation_mc_error for each in found]),
        amortization_mc_error=_error([each.amortization_mc_error for each in found]),
        last_gain=_mean([each.last_gain for each in found]),
        total_mc_error=_error([each.total_mc_error for each in found]),
        kept_own_q=torch.stack([each.kept_own_q for each in found]).all(0),
        unsplit_reason=next((each.unsplit_reason for each in found if each.unsplit_reason), ""),
        global_part=GlobalPart(
            num_draws=len(found),
            total_error=mean_and_error(totals)[1],
            approximation_error=mean_and_error(approximations)[1],
            amortization_error=mean_and_error(amortizations)[1],
            kl=_global_kl(found, log_ratios) if has_all_data else math.nan,
        ),
    )


def _global_kl(found: Sequence[Gaps], log_ratios: Float[Tensor, " G"]) -> float:
    """KL(q(theta) || p(theta | x)) / N from joint log weights of the draws, in nats per datum.

    With a_g = sum_n log p(x_n | theta_g) + log p(theta_g) - log q(theta_g), the log of the mean of
    exp(a_g) is a lower bound on log p(x) in expectation, and the mean of a_g estimates what is
    left of it; unbiased weights p(x | theta_g) with a log variance v lower that mean by v / 2.
    """
    log_p = torch.stack([each.log_likelihood.sum() for each in found])
    errors = [e.estimate.standard_error for e in found if e.estimate is not None]
    variance = torch.stack([e.double().square().sum() for e in errors]) if errors else 0.0
    joint = log_p.double() + log_ratios.double()
    bound = torch.logsumexp(joint, 0) - math.log(len(found))
    return float(bound - (joint + variance / 2).mean()) / len(found[0].elbo)


def _combined(estimates: Sequence[LogLikelihood]) -> LogLikelihood | None:
    """The mean of log p(x_n | theta) over draws; reliable where it is for each draw."""
    if not estimates:
        return None
    return replace(
        estimates[0],
        value=_mean([each.value for each in estimates]),
        standard_error=_error([each.standard_error for each in estimates]),
        reliable=torch.stack([each.reliable for each in estimates]).all(0),
        curve=None,
    )


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _error(errors: Sequence[Tensor]) -> Tensor:
    """The standard error of a mean of independent estimates."""
    return torch.stack(list(errors)).square().sum(0).sqrt() / len(errors)
