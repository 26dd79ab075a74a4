"""The tail index of many data at once, against ArviZ's of one after another."""

import math

import numpy as np
import pytest
import torch
from arviz_stats.base.array import array_stats

from ppl_vae.evaluation.marginal_likelihood.pareto_tail import tail_index, tail_size
from ppl_vae.evaluation.marginal_likelihood.reliability import has_ties, k_hat


def by_arviz(log_weights):
    """ArviZ takes log-likelihoods, whose importance weights are their reciprocals."""
    with np.errstate(all="ignore"):
        columns = (column.max() - column for column in log_weights.numpy().T)
        return torch.tensor([float(array_stats.psislw(column)[1]) for column in columns])


def weights(num_draws, kind, seed=0):
    generator = np.random.default_rng(seed)
    uniform, normal = generator.random((num_draws, 6)), generator.normal(size=(num_draws, 6))
    return torch.from_numpy(
        {
            "Pareto": -np.array([0.1, 0.5, 0.9, 1.3, 3.0, 30.0]) * np.log(uniform),
            "log-normal": np.array([0.01, 0.1, 1.0, 3.0, 10.0, 100.0]) * normal - 500,
            "bounded": np.log(uniform),
            "some zero": np.where(uniform < 0.9, -np.inf, normal),
        }[kind]
    )


@pytest.mark.parametrize("num_draws", [25, 100, 225, 226, 1000, 5001])
@pytest.mark.parametrize("kind", ["Pareto", "log-normal", "bounded"])
def test_the_index_is_that_of_arviz(num_draws, kind):
    log_weights = weights(num_draws, kind)
    torch.testing.assert_close(
        tail_index(log_weights.sort(0).values),
        by_arviz(log_weights).double(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_weights_of_zero_below_the_tail_change_nothing():
    log_weights = weights(5000, "some zero")
    torch.testing.assert_close(k_hat(log_weights), by_arviz(log_weights).double())


def test_equal_weights_have_no_index():
    log_weights = torch.zeros(1000, 2, dtype=torch.float64)
    log_weights[:800, 1] = torch.linspace(-5, -1, 800, dtype=torch.float64)
    assert tail_index(log_weights.sort(0).values).isnan().all()
    assert has_ties(log_weights.sort(0).values).all()
    found = k_hat(log_weights)  # constant weights have moments of any order
    assert found[0] == 0
    assert math.isnan(found[1])


def test_the_tail_has_the_size_of_arviz():
    for num_draws in (25, 224, 225, 226, 1000, 4000, 10**6):
        assert tail_size(num_draws) == array_stats._get_ps_tails(num_draws, 1, "right")
