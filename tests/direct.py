"""The observed log-likelihood of PPCA and factor analysis maximised directly, by L-BFGS.

Written with plain torch and scipy: it shares no code with the package.
"""

import math

import numpy as np
import torch
from scipy.optimize import minimize


def observed_log_likelihood(x, loadings, loc, variance):
    """Mean over rows of log p of what was observed, from dense covariances, as a torch scalar."""
    total, patterns = 0.0, ~np.isnan(x)
    distinct, which = np.unique(patterns, axis=0, return_inverse=True)
    for number, seen in enumerate(distinct):
        rows = torch.from_numpy(x[which.reshape(-1) == number][:, seen]) - loc[seen]
        part = loadings[seen]
        lower = torch.linalg.cholesky(part @ part.T + variance[seen].diag())
        whitened = torch.linalg.solve_triangular(lower, rows.T, upper=False)
        constant = int(seen.sum()) * math.log(2 * math.pi) + 2 * lower.diagonal().log().sum()
        total = total - 0.5 * (len(rows) * constant + whitened.square().sum())
    return total / len(x)


def best_from(x, loadings, loc, variance):
    """The log-likelihood at these parameters, and where L-BFGS gets to from them.

    Columns are in units of their standard deviations and noise variances in logarithms; that
    changes the path of the search, and not the function.
    """
    data_dim, latent_dim = loadings.shape
    scale, isotropic = np.nanstd(x, axis=0), np.ndim(variance) == 0
    units, z = torch.from_numpy(scale), x / scale

    def value(packed):
        free = torch.tensor(packed, requires_grad=True)
        parts = free.split(
            [data_dim * latent_dim, data_dim, len(packed) - data_dim * (latent_dim + 1)]
        )
        noise = parts[2].exp().expand(data_dim)
        noise = noise / units**2 if isotropic else noise
        found = observed_log_likelihood(z, parts[0].reshape(data_dim, latent_dim), parts[1], noise)
        (-found).backward()
        return -float(found.detach()), free.grad.numpy()

    noise = variance if isotropic else variance / scale**2
    start = np.concatenate(
        [(loadings.T / scale).T.ravel(), loc / scale, np.atleast_1d(np.log(noise))]
    )
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-16, "gtol": 1e-10}
    found = minimize(value, start, jac=True, method="L-BFGS-B", options=options)
    shift = np.log(scale)[None, :] * ~np.isnan(x)
    shift = shift.sum() / len(x)
    return -value(start)[0] - shift, -found.fun - shift
