"""What a restricted family of q costs PPCA at the optimum: known exactly on complete data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.guides.families import FAMILIES


@dataclass(frozen=True)
class Price(Result):
    """How far the best fit within a family stays below the best log p, in nats per datum.

    Attributes:
        bound: the best log p that PPCA reaches, minus the best ELBO over the family's q and
            PPCA's parameters together; NaN where there is no bound, or nothing is known.
        log_p: the best log p, minus log p under the parameters that reach this best ELBO.
    """

    bound: float
    log_p: float


UNKNOWN = Price(math.nan, math.nan)


def ppca_price(
    eigenvalues: ArrayLike | Sequence[float], latent_dim: int, covariance: str
) -> Price:
    """The price of a family of q in PPCA fitted to complete data.

    With l_1 >= ... >= l_D the eigenvalues of the sample covariance over N, T the sum of the last
    D - K, and M = W'W + sigma^2 I:

    * ``"full"`` costs nothing, nor does ``"diagonal"``: on principal axes the posterior is
      diagonal, and its mean is linear in x.
    * ``"isotropic"``: the best eigenvalues of M are sqrt(l_i) mean(sqrt(l)), sigma^2 is the closed
      form's. The bound loses K log(mean sqrt(l) / geometric mean sqrt(l)) over the K axes, one
      half of it as log p and one half as the gap below log p.
    * ``"unit"``: with A the sum of sqrt(l_i) over the K axes, sigma = (A + sqrt(A^2 + 4 D T)) /
      (2 D), the eigenvalues of M are sigma sqrt(l_i), and -ELBO = 1/2 (D log(2 pi sigma^2) +
      2 A / sigma - K + T / sigma^2). An axis with l_i < sigma^2 would need a negative column
      norm; it is switched off and counts among the others.
    * ``"delta"``, PCA scored by the Gaussian that codes and squared error imply: there is no
      bound. sigma^2 = T / D, the noise is counted twice along the K axes, and log p is that of
      variances l_i + sigma^2 there and sigma^2 elsewhere.

    Args:
        eigenvalues: all D of them, (D,).
        latent_dim: K.
        covariance: the family, see :mod:`ppl_vae.guides.families`.

    Raises:
        ValueError: if the family is unknown, K is not below the number of positive eigenvalues.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), of the optimum; Lucas
        et al.: Don't blame the ELBO! (2019), of the diagonal family. The others follow by setting
        derivatives with respect to M and sigma to zero.
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
        return Price(0.0, 0.0)
    strong, rest = values[:k], values[k:]
    found = {"isotropic": _isotropic, "unit": _unit, "delta": _point}[covariance]
    return found(strong, rest)


def _negative_log_density(
    modelled: Tensor, strong: Tensor, variance: Tensor, rest: Tensor
) -> Tensor:
    """-2 log p per datum, less D log 2 pi, of a model with these variances along the axes."""
    along = (modelled.log() + strong / modelled).sum()
    return along + len(rest) * variance.log() + rest.sum() / variance


def _optimum(strong: Tensor, rest: Tensor) -> Tensor:
    return _negative_log_density(strong, strong, rest.mean(), rest)


def _isotropic(strong: Tensor, rest: Tensor) -> Price:
    roots = strong.sqrt()
    price = len(roots) * float(roots.mean().log() - roots.log().mean())
    return Price(price, price / 2)


def _unit(strong: Tensor, rest: Tensor) -> Price:
    values, data_dim = torch.cat([strong, rest]), len(strong) + len(rest)
    active = next(k for k in range(len(strong), -1, -1) if _all_on(values, k))
    roots, left, scale = values[:active].sqrt(), values[active:], _unit_scale(values, active)
    variance = scale.square()
    bound = data_dim * variance.log() + 2 * roots.sum() / scale - active + left.sum() / variance
    density = _negative_log_density(scale * roots, values[:active], variance, left)
    best = _optimum(strong, rest)
    return Price(float(bound - best) / 2, float(density - best) / 2)


def _unit_scale(values: Tensor, active: int) -> Tensor:
    """The best sigma with q = N(m, I), of which so many axes are in use."""
    total, left = values[:active].sqrt().sum(), values[active:].sum()
    return (total + (total.square() + 4 * len(values) * left).sqrt()) / (2 * len(values))


def _all_on(values: Tensor, active: int) -> bool:
    return bool((values[:active].sqrt() >= _unit_scale(values, active)).all())


def _point(strong: Tensor, rest: Tensor) -> Price:
    variance = rest.sum() / (len(strong) + len(rest))
    density = _negative_log_density(strong + variance, strong, variance, rest)
    return Price(math.nan, float(density - _optimum(strong, rest)) / 2)
