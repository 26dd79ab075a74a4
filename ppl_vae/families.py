"""Families of Gaussians that guides are taken from, and points: one argument, ``covariance``.

With z of K dimensions it is

=============  ==============================  ====================================
``"unit"``     q = N(m, I)                     nothing to learn
``"isotropic"``  q = N(m, v I)                 one log-variance
``"diagonal"``  q = N(m, diag(v))              K log-variances
``"full"``     q = N(m, L L')                  lower triangle of L, its diagonal by log
``"delta"``    z = m, a point                  nothing to learn; no density, so no bound
=============  ==============================  ====================================
"""

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.arguments import choose_option
from ppl_vae.program import Density

COVARIANCES = ("unit", "isotropic", "diagonal", "full")
FAMILIES = (*COVARIANCES, "delta")
"""What a guide with parameters of its own may be of; a point is no Gaussian."""
LOG_VARIANCE_BOUND = 20.0


def num_scale_outputs(covariance: str, latent_dim: int) -> int:
    """How many free numbers a covariance of the family has."""
    k = latent_dim
    choose_option("covariance", covariance, FAMILIES)
    sizes = {"unit": 0, "isotropic": 1, "diagonal": k, "full": k * (k + 1) // 2, "delta": 0}
    return sizes[covariance]


def soft_bound(log_variance: Tensor, bound: float = LOG_VARIANCE_BOUND) -> Tensor:
    """The identity near zero, with values that stay within +-bound and a gradient everywhere."""
    return bound * torch.tanh(log_variance / bound)


def gaussian(loc: Float[Tensor, "*B K"], raw: Float[Tensor, "*B R"], covariance: str) -> Density:
    """The member of a family with mean ``loc``, its covariance read from unconstrained ``raw``.

    Args:
        loc: means.
        raw: :func:`num_scale_outputs` numbers a datum: log-variances, or for ``"full"`` the K
            log-variances on the diagonal of L followed by its lower triangle, row by row, each
            row in units of its diagonal entry.
        covariance: the family.
    """
    k = loc.shape[-1]
    if covariance == "delta":
        return dist.Delta(loc, event_dim=1)
    if covariance == "unit":
        return dist.Normal(loc, torch.ones_like(loc)).to_event(1)
    if covariance != "full":
        scale = torch.exp(0.5 * soft_bound(raw)).expand(loc.shape)
        return dist.Normal(loc, scale).to_event(1)
    scale = torch.exp(0.5 * soft_bound(raw[..., :k]))
    rows, columns = torch.tril_indices(k, k, -1, device=loc.device)
    unit_lower = torch.diag_embed(torch.ones_like(scale))
    unit_lower[..., rows, columns] = raw[..., k:]
    return dist.MultivariateNormal(loc, scale_tril=scale.unsqueeze(-1) * unit_lower)


def restrict(posterior: Density, covariance: str) -> Density:
    """The member of a family that minimises KL(q || posterior), for a Gaussian posterior.

    With P the posterior's precision: variances 1 / P_kk (diagonal), K / tr P (isotropic), 1
    (unit); the mean is the posterior's. ("Best diagonal q" is not the marginal variances.)
    """
    if covariance == "full":
        return posterior
    loc, precision = posterior.mean, posterior.precision_matrix.diagonal(dim1=-2, dim2=-1)
    variance = {
        "unit": torch.ones_like(precision),
        "isotropic": 1 / precision.mean(-1, keepdim=True),
        "diagonal": 1 / precision,
    }[covariance]
    return dist.Normal(loc, variance.sqrt().expand(loc.shape)).to_event(1)
