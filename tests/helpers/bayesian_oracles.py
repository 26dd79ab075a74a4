"""Slow and obvious truths on Bayesian PPCA, in numpy and scipy only.

Priors are given as a dictionary: ``s``, the scales of the rows of W, (D,); ``m`` and ``c``, mean
and scale of mu, (D,); ``a`` and ``b``, of sigma^-2 ~ Gamma(a, b), numbers for isotropic and (D,)
for diagonal noise; ``alpha``, None or (a, b) of the relevances' gamma prior.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy import special, stats


@dataclass
class MeanField:
    """Coordinate ascent on the bound of Bayesian PPCA, row by row and column by column.

    ``rows`` and ``covariances`` are means and covariances of (w_d, mu_d), ``noise`` and
    ``relevance`` pairs of a shape and a rate; NaN marks a missing value.
    """

    x: np.ndarray
    prior: dict
    rows: np.ndarray
    covariances: np.ndarray
    noise: tuple
    relevance: tuple | None
    latents: list = field(default_factory=list)

    def __post_init__(self):
        self.D, self.K = len(self.rows), self.rows.shape[1] - 1
        self.observed = ~np.isnan(self.x)
        self.update_latents()

    def precision(self, d):
        a, b = np.broadcast_to(self.noise[0], self.D), np.broadcast_to(self.noise[1], self.D)
        return a[d] / b[d]

    def second(self, d):
        return self.covariances[d] + np.outer(self.rows[d], self.rows[d])

    def update_latents(self):
        self.latents = []
        for n, row in enumerate(self.x):
            precision, score = np.eye(self.K), np.zeros(self.K)
            for d in np.flatnonzero(self.observed[n]):
                second = self.second(d)
                precision += self.precision(d) * second[: self.K, : self.K]
                score += self.precision(d) * (
                    self.rows[d, : self.K] * row[d] - second[: self.K, self.K]
                )
            covariance = np.linalg.inv(precision)
            self.latents.append((covariance @ score, covariance))

    def design(self, n):
        """E (z, 1) and E (z, 1) (z, 1)' of row n."""
        mean, covariance = self.latents[n]
        first = np.append(mean, 1.0)
        return first, np.pad(covariance, (0, 1)) + np.outer(first, first)

    def squares(self, n, d):
        first, second = self.design(n)
        value = self.x[n, d]
        return value**2 - 2 * value * first @ self.rows[d] + np.trace(second @ self.second(d))

    def expected_relevance(self):
        return np.ones(self.K) if self.relevance is None else self.relevance[0] / self.relevance[1]

    def sweep(self):
        p, K = self.prior, self.K
        for d in range(self.D):
            diagonal = np.append(self.expected_relevance() / p["s"][d] ** 2, p["c"][d] ** -2.0)
            precision, score = np.diag(diagonal), np.zeros(K + 1)
            score[K] = p["m"][d] / p["c"][d] ** 2
            for n in np.flatnonzero(self.observed[:, d]):
                first, second = self.design(n)
                precision = precision + self.precision(d) * second
                score = score + self.precision(d) * self.x[n, d] * first
            self.covariances[d] = np.linalg.inv(precision)
            self.rows[d] = self.covariances[d] @ score
        sums = np.array(
            [
                sum(self.squares(n, d) for n in np.flatnonzero(self.observed[:, d]))
                for d in range(self.D)
            ]
        )
        counts = self.observed.sum(0)
        if np.ndim(p["a"]) == 0:
            sums, counts = sums.sum(), counts.sum()
        self.noise = p["a"] + counts / 2, p["b"] + sums / 2
        if self.relevance is not None:
            a, b = p["alpha"]
            scaled = sum(np.diag(self.second(d))[:K] / p["s"][d] ** 2 for d in range(self.D))
            self.relevance = np.full(K, a + self.D / 2), b + scaled / 2
        self.update_latents()

    def bound(self):
        """E log p(x, z, W, mu, sigma^-2, relevance) plus the entropies, in nats."""
        p, K, total = self.prior, self.K, 0.0
        shape, rate = (np.broadcast_to(v, self.D) for v in self.noise)
        log_precision = special.digamma(shape) - np.log(rate)
        for n, (mean, covariance) in enumerate(self.latents):
            for d in np.flatnonzero(self.observed[n]):
                total += 0.5 * (log_precision[d] - np.log(2 * np.pi))
                total -= 0.5 * self.precision(d) * self.squares(n, d)
            total -= 0.5 * (K * np.log(2 * np.pi) + mean @ mean + np.trace(covariance))
            total += stats.multivariate_normal(mean, covariance).entropy()
        relevance, log_relevance = self.expected_relevance(), np.zeros(K)
        if self.relevance is not None:
            log_relevance = special.digamma(self.relevance[0]) - np.log(self.relevance[1])
            total += expected_log_gamma(relevance, log_relevance, *p["alpha"]).sum()
            total += gamma_entropy(*self.relevance).sum()
        for d in range(self.D):
            second = self.second(d)
            total += 0.5 * (log_relevance - np.log(2 * np.pi * p["s"][d] ** 2)).sum()
            total -= 0.5 * (relevance * np.diag(second)[:K]).sum() / p["s"][d] ** 2
            deviation = self.covariances[d][K, K] + (self.rows[d, K] - p["m"][d]) ** 2
            total -= 0.5 * (np.log(2 * np.pi * p["c"][d] ** 2) + deviation / p["c"][d] ** 2)
            total += stats.multivariate_normal(self.rows[d], self.covariances[d]).entropy()
        precision = np.asarray(self.noise[0] / self.noise[1])
        log_precision = special.digamma(self.noise[0]) - np.log(self.noise[1])
        total += np.sum(expected_log_gamma(precision, log_precision, p["a"], p["b"]))
        return total + np.sum(gamma_entropy(*self.noise))


def expected_log_gamma(mean, mean_log, a, b):
    """E log Gamma(v; a, b), given E v and E log v."""
    return a * np.log(b) - special.gammaln(a) + (a - 1) * mean_log - b * mean


def gamma_entropy(a, b):
    return stats.gamma.entropy(a, scale=1 / np.asarray(b))


def log_evidence_by_quadrature(x, prior, sizes=(81, 81, 81), reach=4.0):
    """log p(x) for D = 2, K = 1, isotropic noise and a normal prior on W, in nats.

    mu is integrated exactly: the sample mean is N(m, C / N + diag(c^2)). w and log sigma are on a
    grid, w within ``reach`` times its prior scale; the integrand is smooth and vanishes at its
    ends, so that the trapezoidal rule converges fast.
    """
    N, mean = len(x), x.mean(0)
    scatter = (x - mean).T @ (x - mean)
    ends = reach * prior["s"]
    first, second = (np.linspace(-ends[d], ends[d], sizes[d]) for d in (0, 1))
    spread = 0.5 * np.log(np.trace(scatter) / N)
    log_sigma = np.linspace(spread - 4.5, spread + 1.5, sizes[2])
    w1, w2, eta = np.meshgrid(first, second, log_sigma, indexing="ij")
    variance = np.exp(2 * eta)
    c11, c22, c12 = w1**2 + variance, w2**2 + variance, w1 * w2
    det = c11 * c22 - c12**2
    quadratic = (c22 * scatter[0, 0] + c11 * scatter[1, 1] - 2 * c12 * scatter[0, 1]) / det
    log_p = -0.5 * (N - 1) * (2 * np.log(2 * np.pi) + np.log(det)) - 0.5 * quadratic - np.log(N)
    # The density of the sample mean.
    v11, v22 = c11 / N + prior["c"][0] ** 2, c22 / N + prior["c"][1] ** 2
    v12, (r1, r2) = c12 / N, mean - prior["m"]
    det = v11 * v22 - v12**2
    quadratic = (v22 * r1**2 + v11 * r2**2 - 2 * v12 * r1 * r2) / det
    log_p += -0.5 * (2 * np.log(2 * np.pi) + np.log(det) + quadratic)
    # The priors of w and of sigma^-2 = exp(-2 eta), whose derivative is -2 exp(-2 eta).
    log_p += stats.norm.logpdf(w1, scale=prior["s"][0]) + stats.norm.logpdf(
        w2, scale=prior["s"][1]
    )
    log_p += stats.gamma.logpdf(1 / variance, prior["a"], scale=1 / prior["b"])
    log_p += np.log(2) - 2 * eta
    steps = [values[1] - values[0] for values in (first, second, log_sigma)]
    return special.logsumexp(log_p) + np.log(np.prod(steps))
