"""Gaussian variational families, chosen by one argument, ``covariance``, and point masses.

For z of K dimensions:

===============  ======================  ==========================================
``"unit"``       q = N(m, I)             no parameters
``"isotropic"``  q = N(m, v I)           one log-variance
``"diagonal"``   q = N(m, diag(v))       K log-variances
``"full"``       q = N(m, L L')          lower triangle of L, with a log diagonal
``"delta"``      z = m, a point mass     no parameters; no density, so no bound
===============  ======================  ==========================================
"""

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.program import Density
from ppl_vae.core.validation import check_option

COVARIANCES = ("unit", "isotropic", "diagonal", "full")
FAMILIES = (*COVARIANCES, "delta")
"""Families of guides with their own parameters: the Gaussian ones and the point mass."""
LOWER_KNEE, UPPER_KNEE = -60.0, 30.0
"""Interval on which :func:`soft_clamp` is the identity."""
MARGIN_BELOW, MARGIN_ABOVE = 20.0, 5.0
"""Distances of its bounds from the ends of this interval."""


def num_scale_outputs(covariance: str, latent_dim: int) -> int:
    """Number of parameters of a covariance of the family."""
    k = latent_dim
    check_option("covariance", covariance, FAMILIES)
    sizes = {"unit": 0, "isotropic": 1, "diagonal": k, "full": k * (k + 1) // 2, "delta": 0}
    return sizes[covariance]


def soft_clamp(log_variance: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Smooth clamp of a log-variance: the identity from -60 to 30, bounded by -80 and 35.

    Inside the interval it is exact to the last bit, so that weights trained with other software
    give the same q. Outside it continues with slope one and saturates: at a distance of u margins
    it covers 1 - 1 / (1 + u) of the margin, and its gradient 1 / (1 + u)^2 is never zero.

    In float32 a variance, its inverse and their ratios to variances of order one are finite up to
    exp(87). The upper bound is lower, since a loss grows with the variance, and Adam squares its
    gradient, which overflows silently and permanently at exp(44).
    """
    above = torch.relu(log_variance - UPPER_KNEE) / MARGIN_ABOVE
    below = torch.relu(LOWER_KNEE - log_variance) / MARGIN_BELOW
    inside = log_variance.clamp(LOWER_KNEE, UPPER_KNEE)
    return inside + MARGIN_ABOVE * (1 - 1 / (1 + above)) - MARGIN_BELOW * (1 - 1 / (1 + below))


def gaussian(
    loc: Float[Tensor, "*B K"],
    unconstrained: Float[Tensor, "*B R"],
    covariance: str,
    units: Float[Tensor, "*B K"] | None = None,
) -> Density:
    """The member of a family with mean ``loc`` and an unconstrained covariance parameter.

    Args:
        loc: means.
        unconstrained: :func:`num_scale_outputs` numbers per datum: log-variances, or for
            ``"full"`` the log-variances that give the diagonal of L, followed by its lower
            triangle row by row, each row divided by its diagonal entry. Log-variances are bounded
            by :func:`soft_clamp`.
        covariance: the family.
        units: standard deviations that ``unconstrained`` is relative to, 1 by default; the same
            for all dimensions for ``"isotropic"``, and not used for ``"unit"``.
    """
    k = loc.shape[-1]
    if covariance == "delta":
        return dist.Delta(loc, event_dim=1)
    if covariance == "unit":
        return dist.Normal(loc, torch.ones_like(loc)).to_event(1)
    if covariance != "full":
        scale = _scale(unconstrained, units).expand(loc.shape)
        return dist.Normal(loc, scale).to_event(1)
    scale = _scale(unconstrained[..., :k], units)
    rows, columns = torch.tril_indices(k, k, -1, device=loc.device)
    unit_lower = torch.diag_embed(torch.ones_like(scale))
    unit_lower[..., rows, columns] = unconstrained[..., k:]
    return dist.MultivariateNormal(loc, scale_tril=scale.unsqueeze(-1) * unit_lower)


def _scale(log_variance: Tensor, units: Tensor | None) -> Tensor:
    scale = torch.exp(0.5 * soft_clamp(log_variance))
    return scale if units is None else units * scale


def kl_projection(posterior: Density, covariance: str) -> Density:
    """The member of a family that minimizes KL(q || posterior), for a Gaussian posterior.

    With P the precision of the posterior, its variances are 1 / P_kk (diagonal), K / tr P
    (isotropic) or 1 (unit), and its mean is that of the posterior. The variances of the optimal
    diagonal q are not the marginal variances of the posterior.
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
        return torch.linalg.inv_ex(precision)[0]  # of I + W'W: it cannot fail
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    return torch.diag_embed(_projected_variances(diagonal, covariance).expand_as(diagonal))


def _projected_variances(
    precision: Float[Tensor, "*B K"], covariance: str
) -> Float[Tensor, "*B R"]:
    # They follow from the diagonal of the precision matrix; one for all if isotropic.
    return {
        "unit": torch.ones_like(precision),
        "isotropic": 1 / precision.mean(-1, keepdim=True),
        "diagonal": 1 / precision,
    }[covariance]
