"""Moves of a Gibbs sampler along transformations of the latent space.

For any invertible g and vector t, (W, mu, z) and (W g^-1, mu - W g^-1 t, g z + t) have the same
likelihood. The conditionals of z and of (W, mu) change g and t by little when data are many, since
W then determines z and z determines W; drawing g and t given everything else removes this
dependence. The transformations form a group, and g is drawn from the conditional density with
respect to its left Haar measure, which leaves the posterior invariant (Liu & Sabatti 2000). It is
to Gibbs sampling what parameter expansion is to EM.

With lower triangular g, S the sum of z z' over N data, and C its Cholesky factor, that density is
|g|^(N - D) exp(-tr(g S g') / 2) p(W g^-1) prod_i g_ii^-i dg. Without p, T = g C is the Bartlett
factor of a Wishart matrix with N - D degrees of freedom, whose rows are independent. T is proposed
with nu degrees of freedom and accepted with the ratio of |g|^(N - D - nu) p(W g^-1): as a whole
under the normal prior, with nu = N - D. With few data, and under the ARD
prior, where p without relevance is nearly proportional to |W_k|^-D in each column W_k, nu is N,
and rows are accepted one by one. Under the ARD prior the axes of W matter, and rotations are drawn
in addition.

References:
    Liu, Sabatti: Generalised Gibbs sampler and multigrid Monte Carlo for Bayesian computation
    (2000).
    Liu, Wu: Parameter expansion for data augmentation (1999).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.mcmc.gibbs_codes import Codes
from ppl_vae.inference.mcmc.gibbs_priors import ConjugatePriors
from ppl_vae.inference.mcmc.wishart import bartlett_factor
from ppl_vae.models.bayesian_ppca import Parameters
from ppl_vae.models.table_statistics import TableStatistics

MIN_FREEDOM = 10
"""The least N - D per latent dimension for which all rows of g are accepted together: with fewer
this has a small probability."""
NUM_ANGLES = 16
"""Angles of a plane rotation that are compared, the current one included."""


def translate_codes(
    statistics: TableStatistics, priors: ConjugatePriors, parameters: Parameters, codes: Codes
) -> tuple[Float[Tensor, "C D"], Codes]:
    """z_n + t and mu - W t, with t drawn from its conditional, which is normal."""
    loadings, loc = parameters.loadings, parameters.loc
    weighted = loadings * priors.loc_strength[:, None]
    eye = torch.eye(loadings.shape[-1], dtype=loc.dtype, device=loc.device)
    tril = torch.linalg.cholesky(loadings.mT @ weighted + statistics.num_data * eye)
    total = statistics.weight @ codes.rows
    score = ((loc - priors.loc_mean).unsqueeze(-2) @ weighted).squeeze(-2) - total
    noise = tril @ torch.randn_like(score).unsqueeze(-1)
    t = torch.cholesky_solve(score.unsqueeze(-1) + noise, tril)
    rows = codes.rows + statistics.weight[:, None] * t.mT
    return loc - (loadings @ t).squeeze(-1), codes._replace(rows=rows)


def expand_codes(
    statistics: TableStatistics,
    priors: ConjugatePriors,
    loadings: Float[Tensor, "C D K"],
    codes: Codes,
) -> tuple[Float[Tensor, "C D K"], Codes, Float[Tensor, " C"]]:
    """W g^-1 and g z with g triangular, or the identity where it is rejected; and the share of
    its rows that were accepted."""
    data_dim, size = loadings.shape[-2:]
    excess = statistics.num_data - data_dim
    whole = excess >= MIN_FREEDOM * size and priors.relevance is None
    freedom = excess if whole else statistics.num_data
    tril = torch.linalg.cholesky(codes.second_moment())
    proposed = bartlett_factor(tril.new_full((len(tril),), freedom), size)
    factor, log_prior, accepted = tril, priors.log_loadings(loadings), []
    fixed = loadings @ tril  # W C = (W g^-1) (g C)
    for rows in [slice(size)] if whole else [slice(row, row + 1) for row in range(size)]:
        trial = factor.clone()
        trial[:, rows] = proposed[:, rows]
        changed = torch.linalg.solve_triangular(trial, fixed, upper=False, left=False)
        log_ratio = priors.log_loadings(changed) - log_prior
        log_det = _log_det(trial) - _log_det(factor)
        log_ratio = log_ratio + (excess - freedom) * log_det
        keep = log_ratio > -torch.empty_like(log_ratio).exponential_()
        factor = torch.where(keep[:, None, None], trial, factor)
        loadings = torch.where(keep[:, None, None], changed, loadings)
        log_prior = priors.log_loadings(loadings)
        accepted.append(keep)
    g = torch.linalg.solve_triangular(tril, factor, upper=False, left=False)
    return loadings, codes.transform(g), torch.stack(accepted).to(tril).mean(0)


def _log_det(tril: Float[Tensor, "C K K"]) -> Float[Tensor, " C"]:
    return tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def rotate_codes(
    priors: ConjugatePriors, loadings: Float[Tensor, "C D K"], codes: Codes
) -> tuple[Float[Tensor, "C D K"], Codes]:
    """W R' and R z under the ARD prior, with R rotating disjoint pairs of latent dimensions.

    The density of z and the likelihood do not change. The angle in each plane is chosen among the
    current one and others drawn uniformly, with probabilities proportional to the prior of W R'.
    """
    rotation = _plane_rotations(priors, priors.gram(loadings), loadings.shape[-2])
    return loadings @ rotation.mT, codes.transform(rotation)


def _plane_rotations(
    priors: ConjugatePriors, gram: Float[Tensor, "C K K"], data_dim: int
) -> Float[Tensor, "C K K"]:
    size = gram.shape[-1]
    first, second = torch.randperm(size)[: size // 2 * 2].reshape(2, -1)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    one, other, both = squares[:, first], squares[:, second], gram[:, first, second]
    # Rotations by a and by a + pi differ in signs only.
    angles = math.pi * (torch.rand(*both.shape, NUM_ANGLES).to(gram) - 0.5)
    angles[..., 0] = 0.0
    cos, sin = angles.cos(), angles.sin()
    product = 2 * cos * sin * both.unsqueeze(-1)
    one, other = one.unsqueeze(-1), other.unsqueeze(-1)
    turned = cos**2 * one + sin**2 * other + product, sin**2 * one + cos**2 * other - product
    log_p = priors.log_column(turned[0], first, data_dim) + priors.log_column(
        turned[1], second, data_dim
    )
    gumbel = -torch.empty_like(log_p).exponential_().log()
    chosen = (log_p + gumbel).argmax(-1, keepdim=True)
    cos, sin = cos.gather(-1, chosen).squeeze(-1), sin.gather(-1, chosen).squeeze(-1)
    rotation = torch.eye(size).to(gram).repeat(len(gram), 1, 1)
    rotation[:, first, first], rotation[:, second, second] = cos, cos
    rotation[:, first, second], rotation[:, second, first] = sin, -sin
    return rotation
