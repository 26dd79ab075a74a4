"""The expected loss of PPCA under a restricted family of q, exact for complete data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.guides.families import FAMILIES


@dataclass(frozen=True)
class ExpectedLoss(Result):
    """How far the best fit within a family of q is below the maximum of log p.

    Both numbers are in nats per datum.

    Attributes:
        loss: the maximum of PPCA's log p, minus the maximum of the ELBO over q in the family and
            PPCA's parameters jointly; NaN where there is no bound or theory gives no value.
        shortfall: the maximum of log p, minus log p at the parameters that maximize the ELBO.
    """

    loss: float
    shortfall: float


UNKNOWN = ExpectedLoss(math.nan, math.nan)


def expected_ppca_loss(
    eigenvalues: ArrayLike | Sequence[float], latent_dim: int, covariance: str
) -> ExpectedLoss:
    """The expected loss of PPCA with this family of q, fitted to complete data.

    With l_1 >= ... >= l_D the eigenvalues of the sample covariance over N, T the sum of the last
    D - K, and M = W'W + sigma^2 I:

    * ``"full"`` and ``"diagonal"`` lose nothing: on principal axes the posterior is diagonal, and
      its mean is linear in x.
    * ``"isotropic"``: the optimal eigenvalues of M are sqrt(l_i) mean(sqrt(l)), and sigma^2 is
      that of the closed form. The bound loses K log(mean sqrt(l) / geometric mean sqrt(l)) over
      the K axes, one half of it in log p and one half as the gap between log p and the bound.
    * ``"unit"``: with A the sum of sqrt(l_i) over the K axes, sigma = (A + sqrt(A^2 + 4 D T)) /
      (2 D), the eigenvalues of M are sigma sqrt(l_i), and -ELBO = 1/2 (D log(2 pi sigma^2) +
      2 A / sigma - K + T / sigma^2). An axis with l_i < sigma^2 would need a negative column
      norm; its column is zero and l_i is part of T.
    * ``"delta"`` is PCA, scored by the Gaussian that its codes and its squared error imply: there
      is no bound. sigma^2 = T / D, the noise is counted twice along the K axes, and log p is that
      of variances l_i + sigma^2 along them and sigma^2 elsewhere.

    Args:
        eigenvalues: all D of them, (D,).
        latent_dim: K.
        covariance: the family, see :mod:`ppl_vae.guides.families`.

    Raises:
        ValueError: if the family is unknown or K is not below the number of positive eigenvalues.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), for the optimum; Lucas
        et al.: Don't blame the ELBO! (2019), for the diagonal family. The others follow by
        setting derivatives with respect to M and sigma to zero.
    """
    check_option("covariance", covariance, FAMILIES)
    values = (
        torch.as_tensor(eigenvalues, dtype=torch.float64).clamp(min=0).sort(descending=True)[0]
    )
    k = check_int("latent_dim", latent_dim)
    if not k < int((values > 0).sum()):
        raise ValueError(
            f"latent_dim={k} must be smaller than the number of positive eigenvalues, "
            f"{int((values > 0).sum())}: PPCA has no finite optimum"
        )
    if covariance in ("full", "diagonal"):
        return ExpectedLoss(0.0, 0.0)
    leading, rest = values[:k], values[k:]
    compute = {"isotropic": _isotropic, "unit": _unit, "delta": _point}[covariance]
    return compute(leading, rest)


def _negative_log_density(
    modelled: Tensor, leading: Tensor, variance: Tensor, rest: Tensor
) -> Tensor:
    """-2 log p per datum without D log 2 pi, for a model with these variances along the axes."""
    leading_terms = (modelled.log() + leading / modelled).sum()
    return leading_terms + len(rest) * variance.log() + rest.sum() / variance


def _optimum(leading: Tensor, rest: Tensor) -> Tensor:
    return _negative_log_density(leading, leading, rest.mean(), rest)


def _isotropic(leading: Tensor, rest: Tensor) -> ExpectedLoss:
    roots = leading.sqrt()
    loss = len(roots) * float(roots.mean().log() - roots.log().mean())
    return ExpectedLoss(loss, loss / 2)


def _unit(leading: Tensor, rest: Tensor) -> ExpectedLoss:
    values, data_dim = torch.cat([leading, rest]), len(leading) + len(rest)
    active = next(k for k in range(len(leading), -1, -1) if _all_active(values, k))
    roots, left, scale = values[:active].sqrt(), values[active:], _unit_scale(values, active)
    variance = scale.square()
    bound = data_dim * variance.log() + 2 * roots.sum() / scale - active + left.sum() / variance
    density = _negative_log_density(scale * roots, values[:active], variance, left)
    best = _optimum(leading, rest)
    return ExpectedLoss(float(bound - best) / 2, float(density - best) / 2)


def _unit_scale(values: Tensor, active: int) -> Tensor:
    """The optimal sigma for q = N(m, I) if the first ``active`` axes have nonzero columns."""
    total, left = values[:active].sqrt().sum(), values[active:].sum()
    return (total + (total.square() + 4 * len(values) * left).sqrt()) / (2 * len(values))


def _all_active(values: Tensor, active: int) -> bool:
    return bool((values[:active].sqrt() >= _unit_scale(values, active)).all())


def _point(leading: Tensor, rest: Tensor) -> ExpectedLoss:
    variance = rest.sum() / (len(leading) + len(rest))
    density = _negative_log_density(leading + variance, leading, variance, rest)
    return ExpectedLoss(math.nan, float(density - _optimum(leading, rest)) / 2)
