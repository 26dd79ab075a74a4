"""Variational EM on incomplete_data with missing values, against dense oracles."""

import numpy as np
import pytest
import torch

import oracles
from fitted import assert_close, parameters
from ppl_vae import PPCA, fit_em, variational_em
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.inference.em.complete_data import CompleteDataEM, CompleteProblem
from ppl_vae.inference.em.missing_data import MissingDataEM, MissingDataProblem
from ppl_vae.inference.em.noise import Noise
from ppl_vae.models.linear.sufficient_statistics import summarize_table

N, D, K = 60, 7, 3
FAMILIES = ("unit", "isotropic", "diagonal", "full")
NOISES = ("isotropic", "diagonal")


def incomplete_data(seed=0, num_data=N):
    x = oracles.simulate_ppca((9, 5, 3), 0.8, num_data, D, seed)
    return oracles.with_missing_values(x, 0.3, seed)


def bound(x, loc, loadings, noise, family):
    """The mean over rows of log p - KL(q || p(z | x)), q the family's best for each row."""
    values = oracles.log_density(x, loc, loadings, noise)
    for n, row in enumerate(x):
        (mean,), (covariance,) = oracles.posterior(row[None], loc, loadings, noise)
        q = covariance
        if family != "full":
            s, every = ~np.isnan(row), np.broadcast_to(noise, D)
            q = np.diag(oracles.best_q_variances(loadings[s], every[s], family))
        values[n] -= oracles.gaussian_kl(mean, q, mean, covariance)
    return values.mean()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_and_bounds_match_the_dense_oracle(noise, family):
    x = incomplete_data()
    ppca = PPCA.like(x, K, noise=noise, seed=0)
    truth = parameters(ppca)
    for _ in range(3):
        before = truth
        fit = variational_em(ppca, x, covariance=family, rotate=False, max_iterations=1)
        truth = oracles.em_step_missing(x, *before, noise == "diagonal", False, family)
        for mine, its in zip(parameters(ppca), truth, strict=True):
            assert_close(mine, its, 1e-9)
        assert float(fit.objective[0]) == pytest.approx(bound(x, *before, family), abs=1e-10)
        log_p = oracles.log_density(x, *before).mean()
        assert float(fit.log_likelihood[0]) == pytest.approx(log_p, abs=1e-10)
        at_end = bound(x, *truth, family)
        assert fit.objective[0] < fit.objective[1] <= at_end + 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_without_missing_values_the_steps_match_those_on_complete_data(family):
    x = oracles.simulate_ppca((9, 5, 3), 0.8, N, D, seed=0)
    ppca, blocks = PPCA.like(x, K, seed=0), RowBlocks(torch.from_numpy(x))
    columns, covariance = summarize_table(blocks)
    rule, (_, loadings, variance) = Noise.of(ppca, columns, 1e-6), parameters(ppca)
    W, psi = torch.tensor(loadings), torch.tensor(variance).expand(D)
    one = CompleteDataEM(CompleteProblem(covariance, rule, family, "fixed"), W, psi)
    problem = MissingDataProblem(blocks, columns, rule, family, "fixed")
    other = MissingDataEM(problem, W, columns.mean, psi)
    for _ in range(10):
        its = other.log_likelihood, other.bound, *other.parameters
        mine = one.log_likelihood, one.bound, *one.parameters
        torch.testing.assert_close(its, mine, rtol=1e-10, atol=1e-10)
        (after, one), (its_after, other) = one.step(), other.step()
        assert float(its_after) == pytest.approx(float(after), rel=1e-11)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_bound_is_monotone_and_below_log_p(noise, rotate, scale):
    x = incomplete_data(seed=1)
    ppca = PPCA.like(x, K, noise=noise, seed=1)
    ppca.assign(loadings=scale * ppca.loadings.detach())
    fit = variational_em(ppca, x, rotate=rotate, max_iterations=60, tol=0.0)
    assert (fit.objective.diff() > -1e-11 * (1 + fit.objective[0].abs())).all()
    assert (fit.objective <= fit.log_likelihood + 1e-11 * (1 + fit.log_likelihood.abs())).all()
    after_e_step = bound(x, *parameters(ppca), "diagonal")
    assert fit.objective[-1] <= after_e_step + 1e-11
    again = variational_em(ppca, x, rotate=rotate, max_iterations=1)
    assert float(again.objective[0]) == pytest.approx(after_e_step, abs=1e-10)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("family", ["unit", "isotropic", "diagonal"])
def test_the_bound_is_stationary_at_the_end_and_em_can_still_raise_log_p(noise, family):
    latent_dim = 2 if noise == "isotropic" else 1
    x = incomplete_data(seed=2, num_data=150)
    if noise == "diagonal":  # one factor, so that no noise variance converges to zero
        x = oracles.with_missing_values(
            oracles.simulate_ppca((9,), 0.8, 150, D, seed=2), 0.3, seed=2
        )
    ppca = PPCA.like(x, latent_dim, noise=noise, seed=0)
    fit = variational_em(ppca, x, covariance=family, tol=1e-13)
    assert fit.stopped.startswith("converged")
    loc, loadings, variance = (torch.tensor(p).requires_grad_() for p in parameters(ppca))
    psi, observed = variance.expand(D), torch.from_numpy(~np.isnan(x))
    value = dense_bound(torch.from_numpy(np.nan_to_num(x)), observed, loc, loadings, psi, family)
    assert float(value.detach()) == pytest.approx(float(fit.objective[-1]), abs=1e-9)
    value.backward()
    for parameter in (loc, loadings, variance):
        assert parameter.grad.abs().max() < 1e-4
    gained = float(fit_em(ppca, x).log_likelihood[-1] - fit.log_likelihood[-1])
    if latent_dim == 1 and family != "unit":  # then the family holds the posterior
        assert gained == pytest.approx(0, abs=1e-6)
    else:
        assert gained > 1e-4


def dense_bound(x, observed, loc, loadings, psi, family):
    total = 0
    for row, s in zip(x, observed, strict=True):
        W, noise = loadings[s], psi[s]
        p = torch.distributions.MultivariateNormal(loc[s], W @ W.mT + noise.diag())
        precision = torch.eye(len(loadings.mT)) + (W.mT / noise) @ W
        diagonal = precision.diagonal()
        variances = {
            "unit": torch.ones_like(diagonal),
            "isotropic": (1 / diagonal.mean()).expand_as(diagonal),
            "diagonal": 1 / diagonal,
        }[family]
        logs = precision.logdet() + variances.log().sum()
        kl = (diagonal @ variances - len(diagonal) - logs) / 2
        total = total + p.log_prob(row[s]) - kl
    return total / len(x)


def test_rotation_saves_iterations():
    x = incomplete_data(seed=3, num_data=150)
    ends = {}
    for rotate in (True, False):
        ppca = PPCA.like(x, K, seed=0)
        fit = variational_em(ppca, x, rotate=rotate)
        ends[rotate] = float(fit.objective[-1]), fit.steps
    print(ends)
    assert ends[True][0] == pytest.approx(ends[False][0], abs=1e-4)
    assert ends[True][1] < ends[False][1]


def test_a_mask_and_nan_are_equivalent():
    x = incomplete_data()
    filled = np.where(np.isnan(x), 1e3, x)
    ends = []
    for values, mask in ((x, None), (filled, ~np.isnan(x))):
        ppca = PPCA.like(x, K, seed=0)
        variational_em(ppca, values, mask=mask, max_iterations=5)
        ends.append(parameters(ppca))
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)
