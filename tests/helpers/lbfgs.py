"""Direct maximization of the observed log-likelihood of PPCA and factor analysis by L-BFGS.

It uses torch and scipy only and shares no code with the package.
"""

import math

import numpy as np
import torch
from scipy.optimize import minimize


def observed_log_likelihood(x, loadings, loc, variance):
    """The mean over rows of log p of the observed entries, from dense covariances; a tensor."""
    total, patterns = 0.0, ~np.isnan(x)
    distinct, which = np.unique(patterns, axis=0, return_inverse=True)
    for number, observed in enumerate(distinct):
        rows = torch.from_numpy(x[which.reshape(-1) == number][:, observed]) - loc[observed]
        part = loadings[observed]
        lower = torch.linalg.cholesky(part @ part.T + variance[observed].diag())
        whitened = torch.linalg.solve_triangular(lower, rows.T, upper=False)
        constant = int(observed.sum()) * math.log(2 * math.pi) + 2 * lower.diagonal().log().sum()
        total = total - 0.5 * (len(rows) * constant + whitened.square().sum())
    return total / len(x)


def maximize_from(x, loadings, loc, variance):
    """The log-likelihood at these parameters, and at the end of L-BFGS started from them.

    The optimizer works on columns scaled to unit standard deviation and on the logarithms of the
    noise variances. This changes its path, not the objective.
    """
    data_dim, latent_dim = loadings.shape
    scale, isotropic = np.nanstd(x, axis=0), np.ndim(variance) == 0
    units, z = torch.from_numpy(scale), x / scale

    def value(vector):
        leaf = torch.tensor(vector, requires_grad=True)
        parts = leaf.split(
            [data_dim * latent_dim, data_dim, len(vector) - data_dim * (latent_dim + 1)]
        )
        noise = parts[2].exp().expand(data_dim)
        noise = noise / units**2 if isotropic else noise
        log_likelihood = observed_log_likelihood(
            z, parts[0].reshape(data_dim, latent_dim), parts[1], noise
        )
        (-log_likelihood).backward()
        return -float(log_likelihood.detach()), leaf.grad.numpy()

    noise = variance if isotropic else variance / scale**2
    start = np.concatenate(
        [(loadings.T / scale).T.ravel(), loc / scale, np.atleast_1d(np.log(noise))]
    )
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-16, "gtol": 1e-10}
    result = minimize(value, start, jac=True, method="L-BFGS-B", options=options)
    shift = np.log(scale)[None, :] * ~np.isnan(x)
    shift = shift.sum() / len(x)
    return -value(start)[0] - shift, -result.fun - shift
