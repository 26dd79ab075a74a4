"""Laplace approximations of the evidence: at the posterior mode, and Minka's for PCA."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.evaluation.evidence.bridge_sampling import BatchLogDensity

MAX_PARAMETERS = 2000
"""The largest number of parameters for which the Hessian is computed."""
MODE_STEPS = 200


def laplace_log_evidence(log_density: BatchLogDensity, start: Float[Tensor, " P"]) -> float:
    """log of the integral of exp(log_density) by Laplace's approximation at its mode.

    With m the mode and H the Hessian of -log_density there, it is
    log_density(m) + P/2 log 2 pi - 1/2 log det H. It depends on the coordinates.

    Args:
        log_density: twice differentiable, of unconstrained vectors (M, P).
        start: where the search for the mode begins.

    Returns:
        The approximation in nats; NaN if the Hessian is not positive definite where the search
        ends, or if P is larger than 2000.
    """
    if len(start) > MAX_PARAMETERS:
        return math.nan
    mode = _mode(log_density, start)
    hessian = -torch.autograd.functional.hessian(lambda v: log_density(v[None])[0], mode)
    tril, info = torch.linalg.cholesky_ex((hessian + hessian.mT) / 2)
    if bool(info) or not bool(tril.isfinite().all()):
        return math.nan
    half_log_det = float(tril.diagonal().log().sum())
    value = float(log_density(mode[None])[0])
    return value + len(start) / 2 * math.log(2 * math.pi) - half_log_det


def _mode(log_density: BatchLogDensity, start: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    point = start.detach().clone().requires_grad_()
    search = torch.optim.LBFGS(
        [point],
        max_iter=MODE_STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = -log_density(point[None])[0]
        value.backward()
        return value

    search.step(loss)
    return point.detach()


def minka_log_evidence(eigenvalues: Float[Tensor, " D"], num_data: int) -> Float[Tensor, " M"]:
    """Minka's approximation of log p(x | K) for PPCA, for K = 1, ..., D - 1.

    Under a noninformative prior on the parameters and up to a constant that does not depend on K,
    so that only differences between numbers of dimensions have a meaning. With l_1 >= ... >= l_D
    the eigenvalues of the sample covariance, v the mean of the D - K smallest, h_i = l_i for
    i <= K and h_i = v for the others, and m = D K - K (K + 1) / 2,

        log p = log p(U) - N/2 sum_{i <= K} log l_i - N (D - K)/2 log v + (m + K)/2 log 2 pi
            - 1/2 sum_{i <= K} sum_{j > i} log[(1/h_j - 1/h_i) (l_i - l_j) N] - K/2 log N,
        log p(U) = -K log 2 + sum_{i <= K} [log Gamma((D - i + 1)/2) - (D - i + 1)/2 log pi].

    Args:
        eigenvalues: the eigenvalues of the sample covariance of complete data, with denominator N,
            largest first.
        num_data: N.

    Returns:
        Values in nats, those of K = 1, ..., D - 1; -inf for a K whose eigenvalues are not all
        positive, or are not distinct from those that follow.

    References:
        Minka: Automatic choice of dimensionality for PCA (2000), equation 30.
    """
    values = eigenvalues.double()
    return torch.stack([_minka(values, k, num_data) for k in range(1, len(values))])


def _minka(values: Float[Tensor, " D"], rank: int, num_data: int) -> Float[Tensor, ""]:
    size = len(values)
    noise = values[rank:].mean()
    smoothed = torch.where(torch.arange(size, device=values.device) < rank, values, noise)
    order = torch.arange(size, size - rank, -1, device=values.device).double() / 2
    prior = (torch.lgamma(order) - order * math.log(math.pi)).sum() - rank * math.log(2)
    pairs = (1 / smoothed - 1 / smoothed[:rank, None]) * (values[:rank, None] - values) * num_data
    curvature = pairs.triu(1)[torch.ones_like(pairs).triu(1).bool()]
    if bool((curvature <= 0).any()) or not bool(noise > 0):
        return values.new_tensor(-math.inf)
    number = size * rank - rank * (rank + 1) / 2
    fit = values[:rank].log().sum() + (size - rank) * noise.log()
    return (
        prior
        - num_data / 2 * fit
        + (number + rank) / 2 * math.log(2 * math.pi)
        - curvature.log().sum() / 2
        - rank / 2 * math.log(num_data)
    )


def number_of_parameters(data_dim: int, latent_dim: int, noise: str) -> int:
    """Free parameters of PPCA or factor analysis: W up to rotation, mu and the noise variances."""
    loadings = data_dim * latent_dim - latent_dim * (latent_dim - 1) // 2
    return loadings + data_dim + (1 if noise == "isotropic" else data_dim)


def bic_log_evidence(log_likelihood: float, num_parameters: int, num_data: int) -> float:
    """Schwarz's approximation: the maximal log-likelihood of all data - 1/2 P log N, in nats.

    References:
        Schwarz: Estimating the dimension of a model (1978).
    """
    return log_likelihood - num_parameters / 2 * math.log(num_data)
