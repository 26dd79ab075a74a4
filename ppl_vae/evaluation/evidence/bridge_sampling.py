"""Bridge sampling: the evidence from draws of the posterior.

Let p~(v) = p(x, v) be the unnormalised posterior density of the unconstrained parameters v, and
q a normal distribution with the mean and the covariance of one half of each chain. With N1 draws
of the other half and N2 draws from q, the evidence p(x) is the fixed point of

    r = [mean over q of p~ / (s1 p~ + s2 r q)] / [mean over the posterior of q / (s1 p~ + s2 r q)],

s1 = n1 / (n1 + N2), s2 = 1 - s1, where n1 is the effective number of the N1 draws. It is the
optimal choice of the bridge function.

The identity is due to Meng, Wong: Simulating ratios of normalizing constants via a simple identity
(1996); the error to Fruehwirth-Schnatter: Estimating marginal likelihoods for mixture and Markov
switching models using bridge sampling techniques (2004). See also Gronau et al.: A tutorial on
bridge sampling (2017).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.state import seeded

BatchLogDensity: TypeAlias = Callable[[Tensor], Tensor]
"""A function from vectors (M, P) to log densities (M,)."""

MAX_ITERATIONS = 1000
TOLERANCE = 1e-10
MAX_RELATIVE_ERROR = 0.5
"""Estimates of the evidence with a larger relative standard error are called unreliable."""


@dataclass(frozen=True, repr=False)
class LogEvidence(Result):
    """An estimate of log p(x), in nats for the whole data set.

    Attributes:
        value: log p(x).
        standard_error: the standard error of log p(x); that of the ratio p(x) relative to its
            size.
        ess: the effective number of posterior draws in the estimate.
        num_draws: the number of posterior draws in the estimate.
        num_proposals: the number of draws from the normal approximation.
        converged: whether the fixed point was reached.
    """

    value: float
    standard_error: float
    ess: float
    num_draws: int
    num_proposals: int
    converged: bool = True

    @property
    def reliable(self) -> bool:
        """Whether the fixed point was reached and the standard error is at most 0.5 nats."""
        return self.converged and self.standard_error <= MAX_RELATIVE_ERROR

    def __repr__(self) -> str:
        lines = [
            f"log evidence {self.value:.3f} ± {self.standard_error:.3f} nats (± one standard "
            f"error) by bridge sampling from {self.num_draws} draws of the posterior (effective "
            f"{self.ess:.0f})"
        ]
        if not self.reliable:
            reason = (
                f"its standard error exceeds {MAX_RELATIVE_ERROR} nats"
                if self.converged
                else f"its fixed point was not reached in {MAX_ITERATIONS} iterations"
            )
            lines.append(
                f"  the estimate is unreliable because {reason}; draw more samples of the "
                "posterior"
            )
        return "\n".join(lines)


def bridge_sampling(
    log_density: BatchLogDensity,
    draws: Float[Tensor, "C S P"],
    *,
    num_proposals: int | None = None,
    seed: int | None = None,
) -> LogEvidence:
    """Estimate the integral of exp(log_density) from draws of the density it is proportional to.

    Args:
        log_density: the log density of unconstrained vectors, log p(x, v), constants included:
            those that it leaves out are missing from the evidence.
        draws: chains of a sampler, in the coordinates of ``log_density``. They should have one
            mode: parameters that are not identified (rotations, signs, order of columns) must be
            in a form in which they are.
        num_proposals: draws from the normal approximation; as many as there are posterior draws
            in the estimate if None.
        seed: the seed of these draws.

    Raises:
        ValueError: if a chain has fewer than 4 draws; if the draws have no more than P + 1
            vectors, from which no covariance can be computed; if log_density is NaN.
    """
    chains, size, dim = draws.shape
    half = size // 2
    if size < 4 or chains * half <= dim + 1:
        raise ValueError(
            f"draws must be at least 4 a chain and more than {2 * (dim + 2)} in all for {dim} "
            f"parameters; there are {chains} chains of {size}. Draw more (num_samples)"
        )
    first, second = draws[:, :half].reshape(-1, dim).double(), draws[:, half:].double()
    posterior = second.reshape(-1, dim)
    proposal = _normal_like(first)
    with seeded(seed):
        proposed = proposal.sample(torch.Size([num_proposals or len(posterior)]))
    ratio_posterior = _checked(log_density(posterior)) - proposal.log_prob(posterior)
    ratio_proposed = _checked(log_density(proposed)) - proposal.log_prob(proposed)
    return _estimate(
        ratio_posterior.reshape(chains, -1).numpy(force=True), ratio_proposed.numpy(force=True)
    )


def _normal_like(draws: Float[Tensor, "M P"]) -> torch.distributions.MultivariateNormal:
    covariance = torch.cov(draws.mT).reshape(draws.shape[1], draws.shape[1])
    ridge = 1e-10 * covariance.diagonal().clamp(min=torch.finfo(draws.dtype).tiny)
    return torch.distributions.MultivariateNormal(draws.mean(0), covariance + ridge.diag())


def _checked(values: Tensor) -> Tensor:
    if bool(values.isnan().any()):
        raise ValueError(
            f"log_density is NaN at {int(values.isnan().sum())} of {len(values)} vectors; it must "
            "be a number, or -inf outside the support"
        )
    return values


def _estimate(
    posterior: Float[np.ndarray, "C S"], proposed: Float[np.ndarray, " M"]
) -> LogEvidence:
    """The fixed point, from log p~ - log q at posterior draws and at draws of q."""
    centre = float(np.median(posterior))
    at_posterior, at_proposed = posterior - centre, proposed - centre
    effective, log_r, converged = float(posterior.size), 0.0, False
    f1, f2 = np.zeros_like(at_proposed), np.zeros_like(at_posterior)
    for _ in range(MAX_ITERATIONS):
        share = math.log(effective / (effective + len(proposed)))
        rest = math.log(len(proposed) / (effective + len(proposed)))
        # log of p~ / (s1 p~ + s2 r q) and of r q / (s1 p~ + s2 r q)
        f1 = at_proposed - np.logaddexp(share + at_proposed, rest + log_r)
        f2 = log_r - np.logaddexp(share + at_posterior, rest + log_r)
        step = _log_mean(f1) - _log_mean(f2.ravel())
        log_r += step
        effective = _effective_size(np.exp(f2))
        if converged := abs(step) < TOLERANCE:
            break
    variance = _relative_variance(np.exp(f1)) / len(proposed)
    variance += _relative_variance(np.exp(f2)) / effective
    return LogEvidence(
        centre + log_r, math.sqrt(variance), effective, posterior.size, len(proposed), converged
    )


def _log_mean(values: Float[np.ndarray, " M"]) -> float:
    return float(np.logaddexp.reduce(values) - math.log(values.size))


def _relative_variance(values: np.ndarray) -> float:
    return float(values.var() / values.mean() ** 2)


def _effective_size(values: Float[np.ndarray, "C S"]) -> float:
    """The effective number of draws for the mean of a function of them, over all chains."""
    from arviz_stats.base.array import array_stats

    if np.ptp(values) == 0:
        return float(values.size)
    size: Any = array_stats.ess(values, method="mean")
    found = float(size)
    return min(found, float(values.size)) if math.isfinite(found) else float(values.size)
