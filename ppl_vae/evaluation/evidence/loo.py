"""Held-out log p of each datum from draws of one posterior, by leave-one-out importance
sampling."""

import torch
from jaxtyping import Float
from torch import Tensor

MAX_TAIL_INDEX = 0.7
"""The largest k-hat with which a leave-one-out estimate is reliable."""


def leave_one_out(
    log_likelihood: Float[Tensor, "S N"],
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """log p(x_n | all other data), and the tail index of each datum's weights.

    The weights of the draws are 1 / p(x_n | theta_s), smoothed by a generalised Pareto
    distribution.

    Args:
        log_likelihood: log p(x_n | theta_s) with z integrated out, in nats.

    Returns:
        log p of each datum in nats, and k-hat.

    References:
        Vehtari, Gelman, Gabry: Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC (2017).
    """
    from arviz_stats.base.array import array_stats

    columns = log_likelihood.double().mT.numpy(force=True)
    weights, k_hat = array_stats.psislw(columns, axis=-1)
    log_weights = torch.as_tensor(weights).to(log_likelihood.device)
    values = torch.logsumexp(log_likelihood.double().mT + log_weights, -1)
    return values - log_weights.logsumexp(-1), torch.as_tensor(k_hat)
