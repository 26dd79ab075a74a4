"""Tests of the digits, splits and units."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import oracles
from ppl_vae import PPCA, fit_closed_form
from ppl_vae.data.handwritten_digits import digits
from ppl_vae.data.splits import Split, split
from ppl_vae.data.units import Units


def test_digits_are_sixteenths():
    assert digits().shape == (1797, 64)
    assert np.array_equal(digits() * 16, load_digits().data)


def sorted_rows(*parts):
    return sorted(tuple(row) for part in parts for row in part.tolist())


def test_splits_are_disjoint_and_complete():
    x = torch.arange(300.0).reshape(100, 3)
    parts = split(x, seed=3)
    assert [len(p) for p in (parts.train, parts.val, parts.test)] == [75, 8, 17]
    assert sorted_rows(parts.train, parts.val, parts.test) == sorted_rows(x)
    again, other = split(x, seed=3), split(x, seed=4)
    assert torch.equal(parts.train, again.train) and not torch.equal(parts.train, other.train)


def test_given_test_rows_are_not_split():
    x, x_test = torch.arange(300.0).reshape(100, 3), -torch.ones(7, 3)
    parts = split(x, x_test)
    assert isinstance(parts, Split)
    assert torch.equal(parts.test, x_test)
    assert sorted_rows(parts.train, parts.val) == sorted_rows(x)
    with pytest.raises(ValueError, match="x_test has 2 columns, x 3"):
        split(x, x_test[:, :2])
    with pytest.raises(ValueError, match="too few"):
        split(x[:4])


def test_units_change_log_p_by_their_jacobian():
    x = torch.from_numpy(oracles.simulate_ppca((16, 8, 4), 1, 60, 7, seed=0)) * 1e4
    units = Units.of(x)
    inner = units.apply(x)
    assert inner.mean(0).abs().max() < 1e-10
    assert inner.var(0, correction=0).mean().item() == pytest.approx(1)
    models = PPCA.like(x, 3, seed=0), PPCA.like(inner, 3, seed=0)
    for model, rows in zip(models, (x, inner), strict=True):
        fit_closed_form(model, rows)
    ours, theirs = models[0].log_likelihood(x), models[1].log_likelihood(inner)
    assert (ours - theirs - units.log_jacobian(x)).abs().max() < 1e-8
    assert (units.log_jacobian(x) == -7 * math.log(float(units.scale))).all()
    with pytest.raises(ValueError, match="does not vary"):
        Units.of(torch.ones(4, 2))
