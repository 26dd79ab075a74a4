"""The bound and the log-likelihood along fits: where they touch, and their distance elsewhere."""

import numpy as np
import pytest
import torch

import oracles
from ppl_vae import PPCA, AmortizedGuide, ExactGuide, fit_closed_form, fit_em, fit_svi, mlp
from ppl_vae.evaluation.inference_gaps.bound_history import (
    BoundMonitor,
    bound_slice,
    em_ascent,
    exact_bound,
)


@pytest.fixture(scope="module")
def table():
    return torch.from_numpy(oracles.simulate_ppca((16, 8, 4), 1, 120, 7, seed=0))


@pytest.mark.parametrize("accelerate", [True, False])
def test_the_bound_of_em_touches_after_e_steps_only(table, accelerate):
    ppca = PPCA.like(table, 3, seed=0)
    ascent = em_ascent(fit_em(ppca, table, accelerate=accelerate))
    e_steps = ascent.at == ascent.at.floor()
    assert e_steps.sum() == len(ascent.at) / 2 > 3
    gap = ascent.log_likelihood - ascent.bound
    assert gap[e_steps].abs().max() < 1e-9
    assert gap[~e_steps][:5].min() > 1e-9 and gap.min() > -1e-9
    # An E-step does not move the model.
    assert (ascent.log_likelihood[1:-1:2] - ascent.log_likelihood[2::2]).abs().max() < 1e-9
    assert (ascent.bound[1:] - ascent.bound[:-1]).min() > -1e-9


def test_an_ascent_in_other_units(table):
    ascent = em_ascent(fit_em(PPCA.like(table, 2, seed=0), table))
    moved = ascent.shifted(3.0)
    assert torch.equal(moved.bound, ascent.bound + 3) and torch.equal(moved.at, ascent.at)
    assert torch.equal(moved.log_likelihood, ascent.log_likelihood + 3)


def test_only_em_has_e_and_m_steps(table):
    with pytest.raises(ValueError, match="needs a fit by EM, not by closed form"):
        em_ascent(fit_closed_form(PPCA.like(table, 2, seed=0), table))


@pytest.mark.parametrize("covariance", ["unit", "isotropic", "diagonal", "full"])
def test_the_exact_bound_against_numpy(table, covariance):
    ppca = PPCA.like(table, 3, seed=1)
    width = {"unit": 3, "isotropic": 4, "diagonal": 6, "full": 9}[covariance]
    guide = AmortizedGuide(mlp(7, width, seed=2).double(), 3, covariance=covariance)
    bound, log_p = exact_bound(ppca, guide, table)
    w, mu = ppca.loadings.detach().numpy(), ppca.loc.detach().numpy()
    s2 = float(ppca.noise_scale.detach()) ** 2
    q = guide.distribution(table)
    means = q.mean.detach().numpy()
    if covariance == "full":
        covariances = q.covariance_matrix.detach().numpy()
    else:
        covariances = np.stack([np.diag(v) for v in q.variance.detach().numpy()])
    posterior = oracles.posterior(table.numpy(), mu, w, s2)
    kl = [oracles.gaussian_kl(*row) for row in zip(means, covariances, *posterior, strict=True)]
    exact = oracles.log_density(table.numpy(), mu, w, s2).mean()
    assert float(log_p) == pytest.approx(exact, abs=1e-9)
    assert float(bound) == pytest.approx(exact - np.mean(kl), abs=1e-8)


def test_a_monitor_of_svi(table):
    ppca = PPCA.like(table, 2, seed=0)
    guide = AmortizedGuide(mlp(7, 4, seed=0).double(), 2)
    monitor = BoundMonitor(ppca, guide, table)
    monitor(0, 0.0)
    start = exact_bound(ppca, guide, table)
    fit_svi(ppca.model, guide, table, steps=120, batch_size=40, lr=1e-2, seed=0, progress=monitor)
    ascent = monitor.ascent()
    assert ascent.unit == "steps" and ascent.at[0] == 0 and ascent.at[-1] <= 120
    assert (ascent.at[1:] > ascent.at[:-1]).all()
    assert float(ascent.bound[0]) == pytest.approx(float(start[0]), abs=1e-12)
    assert float(ascent.log_likelihood[0]) == pytest.approx(float(start[1]), abs=1e-12)
    assert (ascent.log_likelihood - ascent.bound).min() > 0
    assert ascent.bound[-1] > ascent.bound[0]


def test_the_bound_of_an_exact_guide_is_the_log_likelihood(table):
    ppca = PPCA.like(table, 2, seed=0)
    bound, log_p = exact_bound(ppca, ExactGuide(ppca), table)
    assert float(bound) == pytest.approx(float(log_p), abs=1e-9)


def test_a_slice_touches_with_the_slope_of_log_p(table):
    start, end = PPCA.like(table, 2, seed=0), PPCA.like(table, 2, seed=0)
    fit_closed_form(end, table)
    shown = bound_slice(start, end, table, touching=(0.3, 0.8), points=41)
    assert shown.at[0] == 0 and shown.at[-1] == 1 and shown.bounds.shape == (2, len(shown.at))
    gap = shown.log_likelihood - shown.bounds
    assert gap.min() > -1e-9
    for place, row in zip(shown.touching, gap, strict=True):
        where = int((shown.at - place).abs().argmin())
        assert shown.at[where] == place and abs(float(row[where])) < 1e-9
        # A gap with no slope grows with the square of the distance.
        h = 1e-3
        near = bound_slice(start, end, table, touching=(float(place), float(place) + h), points=2)
        there = int((near.at - (place + h)).abs().argmin())
        assert float(near.log_likelihood[there] - near.bounds[0, there]) < 50 * h**2
    assert float(shown.log_likelihood[0]) == pytest.approx(
        float(start.log_likelihood(table).detach().mean()), abs=1e-9
    )
    assert float(shown.log_likelihood[-1]) == pytest.approx(
        float(end.log_likelihood(table).detach().mean()), abs=1e-9
    )
