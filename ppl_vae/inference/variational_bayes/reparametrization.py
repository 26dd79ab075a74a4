"""The affine map z -> R z + b, with W and mu changed so that W z + mu is not, that maximizes the
bound.

The likelihood does not depend on the map, the bound does, through p(z), p(W), p(mu), and the
entropies. Without this step variational Bayes converges slowly along such maps. It is to
variational Bayes what parameter expansion is to EM. Both parts have a closed form.

*Translation* (R = I). The bound is quadratic in b, and its maximum solves
(N I + sum_d E[w_d w_d'] / c_d^2) b = sum_d E[w_d (mu_d - m_d)] / c_d^2 - sum_n E z_n, for
mu_d ~ N(m_d, c_d^2).

*Linear map* (b = 0). With Z = sum_n E z_n z_n' = L L' and B = sum_d E[w_d w_d'] / s_d^2, the bound
depends on R through
-1/2 tr(R Z R') + (N - D) log |det R| + g(diag(R'^-1 B R^-1)), where g is
-1/2 times the sum under normal priors, and -(a + D/2) sum_k log(b + h_k / 2) under ARD with
relevance_k ~ Gamma(a, b), after q(relevance) has been updated. g of all matrices with the same
eigenvalues is largest for the diagonal one, and given these eigenvalues tr(R Z R') is smallest if
R Z R' is diagonal too. So R L = diag(y)^1/2 V', with V the eigenvectors of L'BL and m its
eigenvalues, and each y_k maximizes a function of its own, whose derivative has one positive root:
y^2 - (N - D) y - m = 0, and 2b y^2 + (m - 2b (N - D)) y - (N + 2a) m = 0 under ARD.

References:
    Luttinen, Ilin: Transformations in variational Bayesian factor analysis to speed up learning
    (2010), which maximize the bound numerically.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.mcmc.gibbs_priors import ConjugatePriors
from ppl_vae.inference.variational_bayes.latent_moments import LatentMoments
from ppl_vae.inference.variational_bayes.parameters import ConjugateUpdates, ParameterPosterior


def best_inverse_map(
    updates: ConjugateUpdates, posterior: ParameterPosterior, latents: LatentMoments
) -> Float[Tensor, "L L"]:
    """U^-1 of the best map (z, 1) -> U (z, 1): the best translation, then the best R for it.

    If the relevances have priors that differ between columns, R is the best diagonal matrix.
    """
    size, num_data = len(latents.total), latents.num_data
    shift = _best_translation(updates.priors, posterior, latents)
    outer = torch.outer(shift, latents.total)
    second_moment = latents.second_moment + outer + outer.mT + num_data * torch.outer(shift, shift)
    squares = updates.scaled_squares(posterior)
    inverse = _inverse_linear_map(updates.priors, second_moment, squares, num_data)
    result = torch.eye(size + 1).to(inverse)
    result[:-1, :-1], result[:-1, -1] = inverse, -shift
    return result


def _best_translation(
    priors: ConjugatePriors, posterior: ParameterPosterior, latents: LatentMoments
) -> Float[Tensor, " K"]:
    weighted = posterior.second_moment[:, :-1] / priors.loc_scale.square()[:, None, None]
    loadings = posterior.mean[:, :-1] / priors.loc_scale.square()[:, None]
    score = weighted[..., -1].sum(0) - priors.loc_mean @ loadings - latents.total
    eye = torch.eye(len(score), dtype=score.dtype, device=score.device)
    return torch.linalg.solve(latents.num_data * eye + weighted[..., :-1].sum(0), score)


def _inverse_linear_map(
    priors: ConjugatePriors,
    second_moment: Float[Tensor, "K K"],
    squares: Float[Tensor, "K K"],
    num_data: int,
) -> Float[Tensor, "K K"]:
    # R^-1 = L V diag(y)^-1/2.
    relevance, excess = priors.relevance, float(num_data - len(priors.loc_mean))
    if relevance is None or _is_constant(*relevance):
        lower = torch.linalg.cholesky(second_moment)
        values, axes = torch.linalg.eigh(lower.mT @ squares @ lower)
        values, axes = values.flip(0), lower @ axes.flip(1)
        # Signs are arbitrary: those that change the loadings least let iterations be extrapolated.
        axes = axes * torch.where(axes.diagonal() < 0, -1.0, 1.0).to(axes)
    else:
        values, axes = second_moment.diagonal() * squares.diagonal(), second_moment.diagonal()
        axes = axes.sqrt().diag()
    if relevance is None:
        one = torch.ones_like(values)
        lengths = _positive_root(one, -excess * one, values)
    else:
        twice, total = 2 * relevance[1], num_data + 2 * relevance[0]
        lengths = _positive_root(twice, values - twice * excess, total * values)
    return axes / lengths.sqrt()


def _is_constant(*values: Float[Tensor, " K"]) -> bool:
    return all(bool((value == value[0]).all()) for value in values)


def _positive_root(
    first: Float[Tensor, " K"], second: Float[Tensor, " K"], third: Float[Tensor, " K"]
) -> Float[Tensor, " K"]:
    # The positive root of first y^2 + second y - third, all but second positive.
    root = (second.square() + 4 * first * third).sqrt()
    return torch.where(second > 0, 2 * third / (second + root), (root - second) / (2 * first))
