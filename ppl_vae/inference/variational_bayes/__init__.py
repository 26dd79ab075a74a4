"""Variational Bayes for probabilistic PCA and factor analysis with conjugate priors.

=====================  ====================================================================
``fit``, ``result``    the public function, ``fit_vb``, and its result
``ascent``             the iterations, and their extrapolation
``parameters``         q(W, mu) q(sigma) q(relevance): updates, and divergence from the prior
``latent_moments``     q(z), as sums over data
``reparametrization``  the affine map of z that maximizes the bound, in closed form
=====================  ====================================================================

The bound is E_q[log p(x, z, W, mu, sigma, relevance)] plus the entropy of
q = q(z) q(W, mu) q(sigma) q(relevance). Each factor is updated in closed form from sums over data,
which are linear in the sufficient statistics of the table. (w_d, mu_d) of a row of W is jointly
normal; all other factors are those of Bishop (1999).
"""
