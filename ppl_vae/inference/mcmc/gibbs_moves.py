"""Moves of a Gibbs sampler along transformations of the latent space.

For any invertible g and vector t, (W, mu, z) and (W g^-1, mu - W g^-1 t, g z + t) have the same
likelihood. The conditionals of z and of (W, mu) change g and t by little when data are many, since
W then determines z and z determines W; drawing g and t given everything else removes this
dependence. The transformations form a group, and g is drawn from the conditional density with
respect to its left Haar measure, which leaves the posterior invariant (Liu & Sabatti 2000). It is
to Gibbs sampling what parameter expansion is to EM.

With lower triangular g, S the sum of z z' over N data, and C its Cholesky factor, that density is
|g|^(N - D) exp(-tr(g S g') / 2) p(W g^-1) prod_i g_ii^-i dg: without p, g C is the Bartlett factor
of a Wishart matrix with N - D degrees of freedom. It is proposed with nu degrees of freedom and
accepted with the ratio of |g|^(N - D - nu) p(W g^-1).

References:
    Liu, Sabatti: Generalised Gibbs sampler and multigrid Monte Carlo for Bayesian computation
    (2000).
    Liu, Wu: Parameter expansion for data augmentation (1999).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.mcmc.gibbs_codes import Codes
from ppl_vae.inference.mcmc.gibbs_priors import ConjugatePriors
from ppl_vae.inference.mcmc.wishart import bartlett_factor
from ppl_vae.models.bayesian_ppca import Parameters
from ppl_vae.models.table_statistics import TableStatistics


def translate_codes(
    statistics: TableStatistics, priors: ConjugatePriors, parameters: Parameters, codes: Codes
) -> tuple[Float[Tensor, "C D"], Codes]:
    """z_n + t and mu - W t, with t drawn from its conditional, which is normal."""
    loadings, loc = parameters.loadings, parameters.loc
    weighted = loadings * priors.loc_strength[:, None]
    eye = torch.eye(loadings.shape[-1]).to(loadings)
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
    """W g^-1 and g z with g triangular, or the given W and z if the proposal is rejected; and
    whether it was accepted."""
    data_dim, size = loadings.shape[-2:]
    excess = statistics.num_data - data_dim
    freedom = excess if excess >= size else statistics.num_data
    tril = torch.linalg.cholesky(codes.second_moment())
    factor = bartlett_factor(tril.new_full((len(tril),), freedom), size)
    # g = factor tril^-1, W g^-1 = W tril factor^-1
    g = torch.linalg.solve_triangular(tril, factor, upper=False, left=False)
    proposal = torch.linalg.solve_triangular(factor, loadings @ tril, upper=False, left=False)
    log_ratio = priors.log_loadings(proposal) - priors.log_loadings(loadings)
    if excess != freedom:
        log_det = g.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_ratio = log_ratio + (excess - freedom) * log_det
    accepted = log_ratio > -torch.empty_like(log_ratio).exponential_()
    keep = accepted[:, None, None]
    # A rejected g is replaced by the identity.
    g = torch.where(keep, g, torch.eye(size).to(g))
    moved = Codes(codes.rows @ g.mT, g.unsqueeze(1) @ codes.spread @ g.mT.unsqueeze(1))
    return torch.where(keep, proposal, loadings), moved, accepted.to(log_ratio)
