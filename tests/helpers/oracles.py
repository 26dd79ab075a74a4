"""Slow and obvious truths, in numpy and scipy only. Nothing here is shared with the package.

Notation: N rows of D dimensions, K latent dimensions; ``loadings`` W is (D, K), ``loc`` mu is
(D,), ``noise`` is the noise *variance* sigma^2 = s2, ``l_i`` are eigenvalues of the sample
covariance S over N (not N - 1), and M = W'W + s2 I. All values are in nats per datum.
"""

import math
from fractions import Fraction

import numpy as np
from scipy import linalg, stats

FAILURE_RATE = 1e-6
"""The chance that one statistical assertion of the suite fails although the code is right."""


def z_limit(num_assertions=1):
    """How many standard errors an estimate may be off at ``FAILURE_RATE``."""
    return stats.norm.isf(FAILURE_RATE / num_assertions / 2)


# Data


def simulate_ppca(eigenvalues, noise, N, D, seed):
    """Data whose *sample* covariance over N has exactly the eigenvalues (l_1..l_K, s2, ..., s2).

    A random draw is centred and whitened (QR), then scaled along random orthonormal axes and
    moved to a random mean. Needs N > D.
    """
    rng = np.random.default_rng(seed)
    if N <= D:
        raise ValueError("whitening needs N > D")
    white = rng.normal(size=(N, D))
    white = np.sqrt(N) * np.linalg.qr(white - white.mean(0))[0]
    axes = np.linalg.qr(rng.normal(size=(D, D)))[0]
    spectrum = np.full(D, float(noise))
    spectrum[: len(eigenvalues)] = eigenvalues
    return (white * np.sqrt(spectrum)) @ axes.T + rng.normal(size=D)


def with_missing_values(x, fraction, seed):
    """A copy of x with NaN in about this fraction of its cells; no row or column is left empty."""
    rng = np.random.default_rng(seed)
    missing = rng.random(x.shape) < fraction
    missing[np.arange(len(x)), rng.integers(x.shape[1], size=len(x))] = False
    missing[rng.integers(len(x), size=x.shape[1]), np.arange(x.shape[1])] = False
    return np.where(missing, np.nan, x)


def sample_spectrum(x):
    """Eigenvalues of the sample covariance over N, largest first, and its eigenvectors."""
    values, vectors = np.linalg.eigh(np.cov(np.asarray(x, dtype=float).T, bias=True))
    return values[::-1], vectors[:, ::-1]


def rotation(size, seed):
    """A random orthogonal matrix (of determinant +1 or -1)."""
    return stats.ortho_group.rvs(size, random_state=seed) if size > 1 else np.eye(1)


# PPCA


def ppca_covariance(loadings, noise):
    """C = W W' + s2 I, dense; ``noise`` may be a vector of variances (factor analysis)."""
    return loadings @ loadings.T + np.diag(np.broadcast_to(noise, len(loadings)))


def log_density(x, loc, loadings, noise):
    """log N(x; mu, W W' + s2 I), with the D x D covariance; missing values (NaN) are marginalised
    out."""
    covariance = ppca_covariance(loadings, noise)
    values = []
    for row in np.atleast_2d(x):
        observed = ~np.isnan(row)
        block = covariance[np.ix_(observed, observed)]
        values.append(stats.multivariate_normal.logpdf(row[observed], loc[observed], block))
    return np.array(values)


def spectral_log_density(x, loc, axes, eigenvalues, noise):
    """The same from the eigendecomposition, accurate however small the noise.

    = -1/2 [D log 2 pi + sum_i log l_i + sum_i (u_i'(x - mu))^2 / l_i], with orthonormal ``axes``
    (D, K) of eigenvalues l_1..l_K and D - K further ones of eigenvalue s2.
    """
    D, K = axes.shape
    rest = linalg.null_space(axes.T)
    spectrum = np.concatenate([eigenvalues, np.full(D - K, noise)])
    scores = (x - loc) @ np.hstack([axes, rest])
    return -0.5 * (D * np.log(2 * np.pi) + np.log(spectrum).sum() + (scores**2 / spectrum).sum(-1))


def posterior(x, loc, loadings, noise):
    """p(z | x): means (N, K) and covariances (N, K, K), through the precision I + W' Psi^-1 W.

    ``noise`` may be a vector of variances; missing values (NaN) are left out row by row.
    """
    noise = np.broadcast_to(noise, len(loadings))
    means, covariances = [], []
    for row in np.atleast_2d(x):
        observed = ~np.isnan(row)
        weighted = loadings[observed] / noise[observed, None]
        precision = np.eye(loadings.shape[1]) + loadings[observed].T @ weighted
        covariances.append(np.linalg.inv(precision))
        means.append(covariances[-1] @ weighted.T @ (row - loc)[observed])
    return np.array(means), np.array(covariances)


def impute(x, loc, loadings, noise):
    """Mean and standard deviation of the missing values of x given the rest: C_ms C_ss^-1 (x_s -
    mu_s).

    Observed cells keep their value and have sd 0.
    """
    covariance = ppca_covariance(loadings, noise)
    mean, sd = np.array(x, dtype=float), np.zeros(np.shape(x))
    for n, row in enumerate(x):
        s, m = ~np.isnan(row), np.isnan(row)
        gain = covariance[np.ix_(m, s)] @ np.linalg.inv(covariance[np.ix_(s, s)])
        left = covariance[np.ix_(m, m)] - gain @ covariance[np.ix_(s, m)]
        mean[n, m] = loc[m] + gain @ (row - loc)[s]
        sd[n, m] = np.sqrt(np.diag(left))
    return mean, sd


def closed_form_ppca(x, K):
    """Tipping & Bishop's solution from eigh of S: W = U_K (L_K - s2 I)^1/2, s2 = mean of the rest.

    Returns:
        loadings (D, K), loc (D,), noise variance.
    """
    values, vectors = sample_spectrum(x)
    noise = values[K:].mean()
    return vectors[:, :K] * np.sqrt(values[:K] - noise), x.mean(0), noise


def closed_form_log_likelihood(eigenvalues, K):
    """Mean log p at the solution: -1/2 (D log 2 pi + sum_{i<=K} log l_i + (D - K) log s2 + D).

    ``eigenvalues``: all D of them, largest first.
    """
    D = len(eigenvalues)
    noise = np.mean(eigenvalues[K:])
    logs = np.log(eigenvalues[:K]).sum() + (D - K) * np.log(noise)
    return -0.5 * (D * np.log(2 * np.pi) + logs + D)


def implied_by_pca(x, K):
    """Mean log density under N(mean, U cov(codes) U' + s2 I), s2 the mean squared residual."""
    x = np.asarray(x, dtype=float)
    _, axes = sample_spectrum(x)
    codes = (x - x.mean(0)) @ axes[:, :K]
    residuals = x - x.mean(0) - codes @ axes[:, :K].T
    spread = np.atleast_2d(np.cov(codes.T, bias=True))
    covariance = axes[:, :K] @ spread @ axes[:, :K].T + (residuals**2).mean() * np.eye(x.shape[1])
    return stats.multivariate_normal(x.mean(0), covariance).logpdf(x).mean()


def mean_kl(eigenvalues, noise):
    """At the ML solution, the mean of KL(p(z | x_n) || N(0, I)): 1/2 sum_{i<=K} log(l_i / s2)."""
    return 0.5 * np.log(np.asarray(eigenvalues) / noise).sum()


def posterior_mean_variance(eigenvalues, noise):
    """At the ML solution, the variance over data of the posterior mean of axis i: 1 - s2 / l_i."""
    return 1 - noise / np.asarray(eigenvalues)


def exact_given_observed(row, loc, loadings, scale):
    """log p of what is observed of a row, and means and sds of the missing cells given it.

    By Gaussian elimination on W W' + diag(scale^2) in rational numbers, which rounds nothing until
    logarithms and square roots are taken. NaN is missing.
    """
    numbers = [[Fraction(float(value)) for value in values] for values in loadings]
    noise = [Fraction(float(value)) ** 2 for value in np.broadcast_to(scale, len(loc))]

    def covariance(i, j):
        inner = sum((a * b for a, b in zip(numbers[i], numbers[j], strict=True)), Fraction(0))
        return inner + (noise[i] if i == j else 0)

    observed, missing = np.flatnonzero(~np.isnan(row)), np.flatnonzero(np.isnan(row))
    order = [*observed, *missing]
    left = [[covariance(i, j) for j in order] for i in order]
    offset = [Fraction(float(row[i])) - Fraction(float(loc[i])) for i in observed]
    offset += [Fraction(0)] * len(missing)
    log_p, mahalanobis = -0.5 * len(observed) * math.log(2 * math.pi), Fraction(0)
    for k in range(len(observed)):
        pivot = left[k][k]
        log_p -= 0.5 * (math.log(pivot.numerator) - math.log(pivot.denominator))
        mahalanobis += offset[k] ** 2 / pivot
        for i in range(k + 1, len(order)):
            factor = left[i][k] / pivot
            offset[i] -= factor * offset[k]
            left[i] = [a - factor * b for a, b in zip(left[i], left[k], strict=True)]
    # What is left of a missing cell's row is minus its conditional mean, and its variance.
    places = range(len(observed), len(order))
    means = [float(Fraction(float(loc[order[i]])) - offset[i]) for i in places]
    roots = [
        math.exp(0.5 * (math.log(left[i][i].numerator) - math.log(left[i][i].denominator)))
        for i in places
    ]
    return log_p - 0.5 * float(mahalanobis), np.array(means), np.array(roots)


# Gaussians


def gaussian_kl(loc_q, cov_q, loc_p, cov_p):
    """KL(N(m_q, S_q) || N(m_p, S_p)), d = m_p - m_q:

    1/2 [tr(S_p^-1 S_q) + d' S_p^-1 d - K + log |S_p| / |S_q|].
    """
    inverse, d = np.linalg.inv(cov_p), loc_p - loc_q
    logs = np.linalg.slogdet(cov_p)[1] - np.linalg.slogdet(cov_q)[1]
    return 0.5 * (np.trace(inverse @ cov_q) + d @ inverse @ d - len(loc_q) + logs)


def best_q_variances(loadings, noise, covariance):
    """The variances, (K,), of the q of a family with the least KL(q || p(z | x)).

    With P the posterior's precision: 1 (unit), K / tr P (isotropic), 1 / P_kk (diagonal). The
    noise is one variance, or one per column.
    """
    diagonal = np.diag((loadings.T / noise) @ loadings) + 1
    return {
        "unit": np.ones_like(diagonal),
        "isotropic": np.full_like(diagonal, 1 / diagonal.mean()),
        "diagonal": 1 / diagonal,
    }[covariance]


def best_q_gap(loadings, noise, covariance):
    """KL(q || p(z | x)) of the best q of a family, the same for every x. With P = M / s2:

    * unit: 1/2 (tr P - K - log det P)
    * isotropic: 1/2 (K log(tr P / K) - log det P)
    * diagonal: 1/2 (sum_k log M_kk - log det M)
    * full: 0
    """
    K = loadings.shape[1]
    precision = np.eye(K) + loadings.T @ loadings / noise
    log_det = np.linalg.slogdet(precision)[1]
    trace = np.trace(precision)
    return {
        "unit": 0.5 * (trace - K - log_det),
        "isotropic": 0.5 * (K * np.log(trace / K) - log_det),
        "diagonal": 0.5 * (np.log(np.diag(precision)).sum() - log_det),
        "full": 0.0,
    }[covariance]


def rotated_pair_gap(l_i, l_j, angle):
    """The best diagonal q's gap with two principal axes rotated by an angle t:

    1/2 log(1 + (l_i - l_j)^2 sin^2(2 t) / (4 l_i l_j)).
    """
    return 0.5 * np.log1p((l_i - l_j) ** 2 * np.sin(2 * angle) ** 2 / (4 * l_i * l_j))


def isotropic_price(eigenvalues):
    """What q = N(m(x), v I) costs at its optimum over (W, s2, m, v): with l_1..l_K,

    K log(mean sqrt(l) / geometric mean sqrt(l)); s2 is the closed form's.
    """
    roots = np.sqrt(np.asarray(eigenvalues, dtype=float))
    return len(roots) * (np.log(roots.mean()) - np.log(roots).mean())


def optimal_unit_q(eigenvalues, K):
    """The optimum over (W, s2, m) with q = N(m(x), I), from all D eigenvalues, largest first.

    With A = sum_{i<=K} sqrt(l_i), T = sum_{j>K} l_j: sigma = (A + sqrt(A^2 + 4 D T)) / (2 D),
    squared column norms sigma sqrt(l_i) - s2, and
    -ELBO = 1/2 (D log 2 pi + D log s2 + 2 A / sigma - K + T / s2).

    Returns:
        sigma, squared column norms (K,), and the ELBO a datum.
    """
    D, roots = len(eigenvalues), np.sqrt(eigenvalues[:K])
    A, T = roots.sum(), np.sum(eigenvalues[K:])
    sigma = (A + np.sqrt(A**2 + 4 * D * T)) / (2 * D)
    cost = D * np.log(2 * np.pi * sigma**2) + 2 * A / sigma - K + T / sigma**2
    return sigma, sigma * roots - sigma**2, -0.5 * cost


# Rates of contraction


def em_scale_rate(l_i, noise):
    """EM's contraction of a column's scale error: 1 - 2 r (1 - r), r = s2 / l_i."""
    r = noise / l_i
    return 1 - 2 * r * (1 - r)


def px_em_scale_rate(l_i, noise):
    """PX-EM's contraction of a column's scale error: r^2, r = s2 / l_i."""
    return (noise / l_i) ** 2


def subspace_rate(eigenvalues, K):
    """EM's and PX-EM's contraction in the subspace, at best (l_{K+1} / l_K)^2."""
    return (eigenvalues[K] / eigenvalues[K - 1]) ** 2


def variational_em_rate(l_i, l_j, noise):
    """Contraction of a rotation between two axes in variational EM with a diagonal q:

    rho = (s2 + sqrt(a_i a_j))^2 / (l_i l_j), a = l - s2; the gap contracts by rho^2.
    """
    return (noise + np.sqrt((l_i - noise) * (l_j - noise))) ** 2 / (l_i * l_j)


# Gaussian proposals


def proposal_second_moment(cov_q, cov_p, offset):
    """E_q[w^2] / Z^2 for w = Z p / q: |Sq| / sqrt(|Sp| |2 Sq - Sp|) exp(d' (2 Sq - Sp)^-1 d).

    Infinite unless 2 Sq > Sp.
    """
    difference = 2 * cov_q - cov_p
    if np.linalg.eigvalsh(difference).min() <= 0:
        return np.inf
    logs = [np.linalg.slogdet(matrix)[1] for matrix in (cov_q, cov_p, difference)]
    quadratic = offset @ np.linalg.solve(difference, offset)
    return np.exp(logs[0] - 0.5 * (logs[1] + logs[2]) + quadratic)


def pooled_standard_error(log_weights):
    """The standard error of the log of each datum's mean weight, pooled over similar data.

    Data weigh exp(-d^2 / 2 h^2), with d the distance of the logs of how far their weights' 80 %
    and 20 % quantiles lie from the median, and h = 3 / sqrt(S) >= 0.1; then Student's quantile
    with ESS degrees of freedom, to first order, in units of the normal one. Without k-hats.
    """
    S, N = log_weights.shape
    ordered = np.sort(log_weights, 0)
    low, middle, high = (ordered[round(p * (S - 1))] for p in (0.2, 0.5, 0.8))
    bulk = np.log(np.clip([high - middle, middle - low], 1e-4, 50))
    weights = np.exp(log_weights - log_weights.max(0))
    variances = (weights / weights.mean(0)).var(0)
    errors = []
    for n in range(N):
        distances = np.sqrt(((bulk - bulk[:, n : n + 1]) ** 2).sum(0))
        alike = np.exp(-0.5 * (distances / max(3 / np.sqrt(S), 0.1)) ** 2)
        variance = (alike * variances).sum() / alike.sum()
        ess = S / (1 + variance)
        errors.append(np.sqrt(variance / (S - 1)) * (1 + (1.96**2 + 1) / 4 / ess))
    return np.array(errors)


def proposal_tail_index(cov_q, cov_p):
    """The Pareto tail index of the weights: max(0, 1 - lambda_min(Sp^-1 Sq))."""
    return max(0.0, 1 - linalg.eigh(cov_q, cov_p, eigvals_only=True).min())


def diagonal_q_tail_index(M):
    """The best diagonal q's tail index: 1 - lambda_min(correlation matrix of M)."""
    scale = np.sqrt(np.diag(M))
    return 1 - np.linalg.eigvalsh(M / np.outer(scale, scale)).min()


def scaled_proposal_kl(c2, D):
    """KL(N(0, c^2 I) || N(0, I)) in D dimensions: D ((c^2 - 1) / 2 - log c)."""
    return D * ((c2 - 1) / 2 - 0.5 * np.log(c2))


# One step of EM, datum by datum


def em_step(x, loc, loadings, noise, covariance="full", expand=False):
    """One EM step of PPCA on complete data with mu the sample mean, from explicit q_n a datum.

    E: q_n = N(m_n, V_n), V_n the posterior's covariance or its best restriction to a family. M:
    W = (sum (x_n - mu) m_n') R^-1, R = sum (m_n m_n' + V_n), and
    s2 = sum E |x_n - mu - W z|^2 / (N D). PX-EM (``expand``) folds mean R: W <- W chol(R / N).

    Returns:
        loadings (D, K), noise variance.
    """
    means, covariances = posterior(x, loc, loadings, noise)
    if covariance != "full":
        variances = best_q_variances(loadings, noise, covariance)
        covariances = np.array([np.diag(variances)] * len(x))
    cross = sum(np.outer(row - loc, m) for row, m in zip(x, means, strict=True))
    second = sum(np.outer(m, m) + V for m, V in zip(means, covariances, strict=True))
    new = cross @ np.linalg.inv(second)
    squares = [
        np.sum((row - loc - new @ m) ** 2) + np.trace(new @ V @ new.T)
        for row, m, V in zip(x, means, covariances, strict=True)
    ]
    if expand:
        new = new @ np.linalg.cholesky(second / len(x))
    return new, np.mean(squares) / x.shape[1]


def mean_elbo(x, loc, loadings, noise, covariance):
    """mean log p(x_n) - KL(q_n || p(z | x_n)), with q_n the best of a family, all dense."""
    means, covariances = posterior(x, loc, loadings, noise)
    log_p = log_density(x, loc, loadings, noise)
    if covariance == "full":
        return log_p.mean()
    q = np.diag(best_q_variances(loadings, noise, covariance))
    kl = [gaussian_kl(m, q, m, V) for m, V in zip(means, covariances, strict=True)]
    return (log_p - kl).mean()


# Dictionary learning, number by number


def dictionary_loss(x, W, b, Z, penalty, sigma):
    """-mean log p(x_n, z_n), all constants kept:

    |x - W z - b|^2 / (2 s^2) + D/2 log(2 pi s^2) + lambda |z|_1 + K log(2 / lambda).
    """
    (D, K), left = W.shape, x - Z @ W.T - b
    squares = (left**2).sum(1) / (2 * sigma**2) + D / 2 * np.log(2 * np.pi * sigma**2)
    return (squares + penalty * np.abs(Z).sum(1) + K * np.log(2 / penalty)).mean()


def lasso_sweeps(x, W, b, Z, threshold, sweeps):
    """Coordinate descent: z_nk minimises 1/2 |e - w_k z|^2 + t |z|, e the rest without atom k.

    With |w_k| = 1 that is sign(w_k'e) max(|w_k'e| - t, 0).
    """
    Z = Z.copy()
    for _ in range(sweeps):
        for n in range(len(x)):
            for k in range(W.shape[1]):
                e = x[n] - b - W @ Z[n] + W[:, k] * Z[n, k]
                pull = W[:, k] @ e
                Z[n, k] = np.sign(pull) * max(abs(pull) - threshold, 0.0)
    return Z


def dictionary_sweep(x, W, b, Z):
    """Each w_k in turn minimises sum_n |e_n - w z_nk|^2 over |w| = 1: sum_n z_nk e_n, its length
    made one; then b minimises sum_n |x_n - W z_n - b|^2.
    """
    W = W.copy()
    for k in range(W.shape[1]):
        e = x - b - Z @ W.T + np.outer(Z[:, k], W[:, k])
        u = Z[:, k] @ e
        W[:, k] = u / np.linalg.norm(u)
    return W, (x - Z @ W.T).mean(0)


def ista(x, W, b, threshold, steps):
    """z <- S_{t/L}(z + W'(x - b - W z) / L) from z = 0, L the largest eigenvalue of W'W."""
    L, z = np.linalg.norm(W, 2) ** 2, np.zeros((len(x), W.shape[1]))
    for _ in range(steps):
        ahead = z + (x - b - z @ W.T) @ W / L
        z = np.sign(ahead) * np.maximum(np.abs(ahead) - threshold / L, 0.0)
    return z


def planted_dictionary(N, D, K, share, noise, seed):
    """Rows of a few unit atoms each, with Laplace weights, and noise: x, W (D, K)."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(D, K))
    W /= np.linalg.norm(W, axis=0)
    Z = rng.laplace(size=(N, K)) * (rng.random((N, K)) < share)
    return Z @ W.T + noise * rng.normal(size=(N, D)), W


# Comparing linear-Gaussian models


def implied_kl(first, second):
    """KL between the marginals of x of two (loc, loadings, noise), with dense covariances."""
    (loc, W, noise), (other_loc, V, other_noise) = first, second
    return gaussian_kl(loc, ppca_covariance(W, noise), other_loc, ppca_covariance(V, other_noise))


def proposal_log_weight_variance(cov_q, cov_p):
    """Var_q[log p - log q] for q and p of one mean: 1/2 tr((Sp^-1 Sq - I)^2)."""
    difference = np.linalg.solve(cov_p, cov_q) - np.eye(len(cov_p))
    return 0.5 * np.trace(difference @ difference)


def mean_log_density(x, loc, loadings, noise):
    """The mean of :func:`log_density` over complete rows, T their second moment about mu:

    -1/2 (D log 2 pi + log |C| + tr C^-1 T).
    """
    covariance, residual = ppca_covariance(loadings, noise), x - loc
    second = residual.T @ residual / len(x)
    log_det = np.linalg.slogdet(covariance)[1]
    trace = np.trace(np.linalg.solve(covariance, second))
    return -0.5 * (len(loc) * np.log(2 * np.pi) + log_det + trace)


# Missing values


def em_step_missing(x, loc, loadings, noise, diagonal=False, expand=True, family="full"):
    """One step of EM, or of PX-EM (``expand``), row by row and column by column.

    With another family of q than "full" V_n is that of :func:`best_q_variances`.

    E: of row n with the columns s, C = cov(x_s): m_n = W_s' C^-1 (x_s - mu_s),
    V_n = I - W_s' C^-1 W_s. M: each column is regressed on (z, 1) over the rows that have it, with
    E z z' = V_n + m_n m_n'; the noise is the mean of E (x - mu* - W* z)^2 over the observed cells,
    all of them or the column's. Fold: eta = mean m_n, R = mean(V_n + m_n m_n') - eta eta';
    mu <- mu* + W* eta, W <- W* chol(R).

    Returns:
        loc (D,), loadings (D, K), noise variance, () or (D,).
    """
    N, (D, K) = len(x), loadings.shape
    covariance = ppca_covariance(loadings, noise)
    posteriors = []
    for row in x:
        s = ~np.isnan(row)
        gain = np.linalg.solve(covariance[np.ix_(s, s)], loadings[s]).T
        V = np.eye(K) - gain @ loadings[s]
        if family != "full":
            V = np.diag(best_q_variances(loadings[s], np.broadcast_to(noise, D)[s], family))
        posteriors.append((gain @ (row - loc)[s], V))
    new, new_loc, squares, counts = np.zeros((D, K)), np.zeros(D), np.zeros(D), np.zeros(D)
    for d in range(D):
        rows = [n for n in range(N) if not np.isnan(x[n, d])]
        second, cross = np.zeros((K + 1, K + 1)), np.zeros(K + 1)
        for n in rows:
            m, V = posteriors[n]
            z = np.append(m, 1.0)
            second += np.outer(z, z)
            second[:K, :K] += V
            cross += x[n, d] * z
        solution = np.linalg.solve(second, cross)
        new[d], new_loc[d], counts[d] = solution[:K], solution[K], len(rows)
        for n in rows:
            m, V = posteriors[n]
            squares[d] += (x[n, d] - new_loc[d] - new[d] @ m) ** 2 + new[d] @ V @ new[d]
    if expand:
        eta = np.mean([m for m, _ in posteriors], 0)
        R = np.mean([V + np.outer(m, m) for m, V in posteriors], 0) - np.outer(eta, eta)
        new_loc, new = new_loc + new @ eta, new @ np.linalg.cholesky(R)
    return new_loc, new, squares / counts if diagonal else squares.sum() / counts.sum()


def expected_covariance(x, loc, loadings, noise):
    """The sample covariance expected under PPCA given what is observed, row by row.

    Of the joint Gaussian with covariance C: missing values h given observed s have mean
    mu_h + C_hs C_ss^-1 (x_s - mu_s) and covariance C_hh - C_hs C_ss^-1 C_sh.
    """
    covariance, (N, D) = ppca_covariance(loadings, noise), x.shape
    filled, spread = x - loc, np.zeros((D, D))
    for n in range(N):
        h = np.isnan(x[n])
        gain = np.linalg.solve(covariance[np.ix_(~h, ~h)], covariance[np.ix_(~h, h)]).T
        filled[n, h] = gain @ (x[n] - loc)[~h]
        spread[np.ix_(h, h)] += covariance[np.ix_(h, h)] - gain @ covariance[np.ix_(~h, h)]
    return np.cov(filled.T, bias=True) + spread / N


def drop_high(x, fraction, seed):
    """Missing values at random given what is observed (MAR): a high first column loses more of the
    others.

    The first column is complete, so no row is left empty.
    """
    rng = np.random.default_rng(seed)
    rank = stats.rankdata(x[:, 0]) / len(x)
    missing = rng.random(x.shape) < 2 * fraction * rank[:, None]
    missing[:, 0] = False
    missing[rng.integers(len(x), size=x.shape[1]), np.arange(x.shape[1])] = False
    return np.where(missing, np.nan, x)


def iterative_svd(x, K, tol=1e-6, iterations=1000):
    """Missing values filled by a truncated SVD of the centred, filled table, again and again.

    Starts from the column means; the mean is that of the filled table, too. Stops when the filled
    cells move by less than ``tol`` of their size.
    """
    missing = np.isnan(x)
    filled = np.where(missing, np.nanmean(x, 0), x)
    for _ in range(iterations):
        mean = filled.mean(0)
        u, s, v = np.linalg.svd(filled - mean, full_matrices=False)
        before = filled[missing]
        filled[missing] = ((u[:, :K] * s[:K]) @ v[:K] + mean)[missing]
        if np.linalg.norm(filled[missing] - before) < tol * np.linalg.norm(before):
            break
    return filled


# Spectra to all digits


def long_spectrum(x):
    """Eigenvalues of the covariance over N, largest first, by Jacobi rotations in long double.

    One-sided: columns of the centred data are rotated until they are orthogonal. Columns of very
    different units lose no digits.
    """
    columns = np.asarray(x, dtype=np.longdouble)
    columns = columns - columns.mean(0)
    columns = columns[:, np.argsort(-(columns**2).sum(0))]
    D = columns.shape[1]
    for _ in range(60):
        turned = False
        for i in range(D - 1):
            for j in range(i + 1, D):
                a, b = columns[:, i], columns[:, j]
                aa, bb, ab = a @ a, b @ b, a @ b
                if abs(ab) <= np.finfo(np.longdouble).eps * np.sqrt(aa) * np.sqrt(bb) * 8:
                    continue
                turned = True
                ratio = (bb - aa) / (2 * ab)
                t = np.copysign(1, ratio) / (abs(ratio) + np.sqrt(1 + ratio**2))
                c = 1 / np.sqrt(1 + t**2)
                columns[:, i], columns[:, j] = c * a - c * t * b, c * t * a + c * b
        if not turned:
            break
    return np.sort((columns**2).mean(0))[::-1]


def long_closed_form_log_likelihood(values, latent_dim):
    """The maximal log-likelihood of PPCA per datum, from eigenvalues in long double."""
    D, noise = len(values), values[latent_dim:].mean()
    parts = np.log(values[:latent_dim]).sum() + (D - latent_dim) * np.log(noise) + D
    return float(-(D * np.log(2 * np.longdouble(np.pi)) + parts) / 2)
