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

from ppl_vae.core.program import Density
from ppl_vae.core.validation import check_option

COVARIANCES = ("unit", "isotropic", "diagonal", "full")
FAMILIES = (*COVARIANCES, "delta")
"""What a guide with parameters of its own may be of; a point is no Gaussian."""
LARGEST, SMALLEST = 30.0, -60.0
"""Log-variances are what a network says they are from the smallest to the largest of these."""
ROOM_ABOVE, ROOM_BELOW = 5.0, 20.0
"""Beyond them they stay within so many units."""


def num_scale_outputs(covariance: str, latent_dim: int) -> int:
    """How many free numbers a covariance of the family has."""
    k = latent_dim
    check_option("covariance", covariance, FAMILIES)
    sizes = {"unit": 0, "isotropic": 1, "diagonal": k, "full": k * (k + 1) // 2, "delta": 0}
    return sizes[covariance]


def soft_clamp(log_variance: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """A log-variance that a float can hold: the identity from -60 to 30, within -80 and 35 always.

    Between the two it is the number given, bit for bit, so that weights of a network that was
    trained elsewhere give the same q. Beyond them it goes on with slope one and bends towards its
    bound, 1 - 1 / (1 + u) of the room that is left at a distance of u rooms; its gradient is
    1 / (1 + u)^2, and never zero for a finite distance.

    In float32 a variance, its inverse and their ratios to variances of order one are finite up to
    exp(87). Above, less is safe: a loss grows with the variance, and Adam squares its gradient,
    which overflows at exp(44) already, for good and without a word.
    """
    above = torch.relu(log_variance - LARGEST) / ROOM_ABOVE
    below = torch.relu(SMALLEST - log_variance) / ROOM_BELOW
    inside = log_variance.clamp(SMALLEST, LARGEST)
    return inside + ROOM_ABOVE * (1 - 1 / (1 + above)) - ROOM_BELOW * (1 - 1 / (1 + below))


def gaussian(
    loc: Float[Tensor, "*B K"],
    raw: Float[Tensor, "*B R"],
    covariance: str,
    units: Float[Tensor, "*B K"] | None = None,
) -> Density:
    """The member of a family with mean ``loc``, its covariance read from unconstrained ``raw``.

    Args:
        loc: means.
        raw: :func:`num_scale_outputs` numbers per datum: log-variances, or for ``"full"`` the K
            log-variances on the diagonal of L followed by its lower triangle, row by row, each
            row in units of its diagonal entry. They are bounded by :func:`soft_clamp`.
        covariance: the family.
        units: standard deviations that ``raw`` is relative to, all of them 1 by default; for
            ``"isotropic"`` the same for all dimensions, and ``"unit"`` has none.
    """
    k = loc.shape[-1]
    if covariance == "delta":
        return dist.Delta(loc, event_dim=1)
    if covariance == "unit":
        return dist.Normal(loc, torch.ones_like(loc)).to_event(1)
    if covariance != "full":
        scale = _scale(raw, units).expand(loc.shape)
        return dist.Normal(loc, scale).to_event(1)
    scale = _scale(raw[..., :k], units)
    rows, columns = torch.tril_indices(k, k, -1, device=loc.device)
    unit_lower = torch.diag_embed(torch.ones_like(scale))
    unit_lower[..., rows, columns] = raw[..., k:]
    return dist.MultivariateNormal(loc, scale_tril=scale.unsqueeze(-1) * unit_lower)


def _scale(log_variance: Tensor, units: Tensor | None) -> Tensor:
    scale = torch.exp(0.5 * soft_clamp(log_variance))
    return scale if units is None else units * scale


def kl_projection(posterior: Density, covariance: str) -> Density:
    """The member of a family that minimizes KL(q || posterior), for a Gaussian posterior.

    With P the posterior's precision: variances 1 / P_kk (diagonal), K / tr P (isotropic), 1
    (unit); the mean is the posterior's. ("Best diagonal q" is not the marginal variances.)
    """
    if covariance == "full":
        return posterior
    loc, precision = posterior.mean, posterior.precision_matrix.diagonal(dim1=-2, dim2=-1)
    variance = _projected_variances(precision, covariance)
    return dist.Normal(loc, variance.sqrt().expand(loc.shape)).to_event(1)


def projected_covariance(
    precision: Float[Tensor, "*B K K"], covariance: str
) -> Float[Tensor, "*B K K"]:
    """The covariance of :func:`kl_projection`, given the posterior's precision matrix."""
    if covariance == "full":
        return torch.linalg.inv(precision)
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    return torch.diag_embed(_projected_variances(diagonal, covariance).expand_as(diagonal))


def _projected_variances(
    precision: Float[Tensor, "*B K"], covariance: str
) -> Float[Tensor, "*B R"]:
    # From the diagonal of the precision matrix; one for all dimensions if isotropic.
    return {
        "unit": torch.ones_like(precision),
        "isotropic": 1 / precision.mean(-1, keepdim=True),
        "diagonal": 1 / precision,
    }[covariance]
