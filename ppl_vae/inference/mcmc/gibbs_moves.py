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
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.inference.mcmc.gibbs_priors import ConjugatePriors
from ppl_vae.inference.mcmc.wishart import bartlett_factor, draw_normal, half_degrees
from ppl_vae.models.bayesian_ppca import ParameterDraws

MIN_FREEDOM = 10
"""The least N - D per latent dimension for which all rows of g are accepted together: with fewer
this has a small probability."""
NUM_ANGLES = 16
"""Angles of a plane rotation that are compared, the current one included."""


@dataclass(frozen=True)
class LatentMoves:
    """Moves of parameters and codes along transformations of the latent space.

    Attributes:
        priors: the priors of the parameters.
        num_data: N.
        data_dim: D.
    """

    priors: ConjugatePriors
    num_data: int
    data_dim: int

    @property
    def _together(self) -> bool:
        # Whether all rows of g are proposed and accepted together.
        few = self.num_data - self.data_dim < MIN_FREEDOM * self.priors.latent_dim
        return not few and self.priors.relevance is None

    @cached_property
    def _freedom(self) -> Float[Tensor, " K"]:
        # The degrees of freedom of the proposals, as bartlett_factor takes them.
        freedom = self.num_data - self.data_dim if self._together else self.num_data
        return half_degrees(
            self.priors.loc_scale.new_tensor(float(freedom)), self.priors.latent_dim
        )

    @cached_property
    def _last_row(self) -> Float[Tensor, " L"]:
        row = self.priors.loc_scale.new_zeros(self.priors.latent_dim + 1)
        row[-1] = 1.0
        return row

    def move(
        self, parameters: ParameterDraws, total: Float[Tensor, "C L L"]
    ) -> tuple[ParameterDraws, Float[Tensor, "C L L"], Float[Tensor, " C"]]:
        """Draw a transformation v -> g v of v = (z, 1), and change W and mu by its inverse.

        Args:
            parameters: the parameters of each chain.
            total: the sum of v v' over data.

        Returns:
            The parameters, g, and the share of proposals that were accepted.
        """
        size = self.priors.latent_dim
        t = self.translation(parameters, total)
        loc = parameters.loc - (parameters.loadings @ t.unsqueeze(-1)).squeeze(-1)
        sums = total[:, -1, :-1]
        shifted = sums + self.num_data * t
        second = total[:, :size, :size] + t.unsqueeze(-1) * sums.unsqueeze(-2)
        second = second + shifted.unsqueeze(-1) * t.unsqueeze(-2)
        loadings, g, accepted = self.expansion(parameters.loadings, second)
        if self.priors.relevance is not None:
            rotation = _plane_rotations(self.priors, self.priors.gram(loadings), self.data_dim)
            loadings, g = loadings @ rotation.mT, rotation @ g
        upper = torch.cat([g, g @ t.unsqueeze(-1)], -1)
        g = torch.cat([upper, self._last_row.expand(len(g), 1, size + 1)], 1)
        return parameters._replace(loadings=loadings, loc=loc), g, accepted

    def translation(
        self, parameters: ParameterDraws, total: Float[Tensor, "C L L"]
    ) -> Float[Tensor, "C K"]:
        """t of z + t and mu - W t, drawn from its conditional, which is normal."""
        loadings, loc = parameters.loadings, parameters.loc
        weighted = loadings * self.priors.loc_precision[:, None]
        precision = loadings.mT @ weighted
        precision.diagonal(dim1=-2, dim2=-1).add_(self.num_data)
        offset = (loc - self.priors.loc_mean).unsqueeze(-2)
        return draw_normal(precision, (offset @ weighted).squeeze(-2) - total[:, -1, :-1])

    def expansion(
        self, loadings: Float[Tensor, "C D K"], second: Float[Tensor, "C K K"]
    ) -> tuple[Float[Tensor, "C D K"], Float[Tensor, "C K K"], Float[Tensor, " C"]]:
        """W g^-1 and the triangular g of g z, or the identity where it is rejected; and the share
        of its rows that were accepted. ``second`` is the sum of z z'."""
        size, together = self.priors.latent_dim, self._together
        tril = torch.linalg.cholesky(second)
        proposed = bartlett_factor(self._freedom.expand(len(tril), size))
        factor, log_prior, accepted = tril, self.priors.log_loadings(loadings), []
        fixed = loadings @ tril  # W C = (W g^-1) (g C)
        for row in range(1 if together else size):
            trial = proposed
            if not together:
                trial = factor.clone()
                trial[:, row] = proposed[:, row]
            changed = torch.linalg.solve_triangular(trial, fixed, upper=False, left=False)
            log_changed = self.priors.log_loadings(changed)
            log_ratio = log_changed - log_prior
            if not together:  # the proposals have N degrees of freedom, and not N - D
                log_ratio = log_ratio - self.data_dim * (_log_det(trial) - _log_det(factor))
            keep = log_ratio > -torch.empty_like(log_ratio).exponential_()
            factor = torch.where(keep[:, None, None], trial, factor)
            loadings = torch.where(keep[:, None, None], changed, loadings)
            log_prior = torch.where(keep, log_changed, log_prior)
            accepted.append(keep)
        g = torch.linalg.solve_triangular(tril, factor, upper=False, left=False)
        return loadings, g, torch.stack(accepted).to(tril).mean(0)


def _log_det(tril: Float[Tensor, "C K K"]) -> Float[Tensor, " C"]:
    return tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _plane_rotations(
    priors: ConjugatePriors, gram: Float[Tensor, "C K K"], data_dim: int
) -> Float[Tensor, "C K K"]:
    # Under the ARD prior: R rotates disjoint pairs of latent dimensions. The density of z and the
    # likelihood do not change. The angle in each plane is chosen among the current one and others
    # drawn uniformly, with probabilities proportional to the prior of W R'.
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
